"""New tokens through all blocks of a model in one call of C++, where that is proven to give the same answer.

A step at batch 1 of a small model costs transformers about as much between the blocks as the blocks need. Where every block is
a `FusedBlock` with packed weights of the C++ (`kernels/native.py`), a step is

    norm(blocks(embedding(token))) -> head

with transformers' own embedding, rotary angles and head. No sum in it depends on which other tokens are computed, or how
many: a text's tokens have the same bits alone, among others, and however its prompt was cut.

Two proofs, on a few tokens, before it is used. That nothing else
happens between the parts: the parts in this order answer as transformers' forward does, bit for bit or nearly. That the C++
computes what its block does: both get the same hidden states and must give the same ones but for the last bits of fp32, some
of which move a rounded activation by one step.

Legend: B texts, Q new tokens of each, C width, D channels of a head, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from infopt.kernels.native import BlockStruct, Native, PackedWeight, PagesStruct, TextStruct
from infopt.runtime.block import ODD, FusedBlock, Norm, rms_norm
from infopt.runtime.paged import PagedCache, Step
from infopt.runtime.store import LayerKind

OUTER, INNER = 1e-4, 1e-2  # tolerances of the two proofs, relative
TOKENS = 3
PIECE = (
    64  # tokens of one call: more do not make a product faster, and what attention keeps for each grows with the text
)
WIDEST = 512  # channels of a head
ONE = range(1)
_ALL = slice(None)
_ACTS = {0: nn.functional.silu, 1: lambda x: nn.functional.gelu(x, approximate="tanh")}


class Decoder:
    """The step of a model. Raises ValueError or AttributeError where a part is not what it would have to be."""

    def __init__(self, model: Any, blocks: Sequence[FusedBlock], kinds: Sequence[LayerKind], library: Native) -> None:
        base = model.base_model
        self._embed, self._rotary = model.get_input_embeddings, base.rotary_emb
        self._norm, self._head = rms_norm(base.norm), model.get_output_embeddings
        self._library, self.blocks = library, blocks
        self._windows = list(dict.fromkeys(kind.window for kind in kinds))
        structs = [_struct(block, self._windows.index(kind.window)) for block, kind in zip(blocks, kinds, strict=True)]
        self._structs = (BlockStruct * len(structs))(*structs)
        self._known = WeakKeyDictionary[PagedCache, tuple[ctypes.Array[PagesStruct], list[PagesStruct]]]()

    def __call__(self, ids_BQ: Tensor, step: Step) -> Tensor:
        """logits [B, V] of what follows these tokens, which are stored."""
        hidden_BQC = torch.empty(0)
        for tokens in torch.arange(ids_BQ.shape[1]).split(max(1, PIECE // len(ids_BQ))):
            some = range(int(tokens[0]), int(tokens[-1]) + 1)
            hidden_BQC, angles = self.start(ids_BQ[:, some.start : some.stop], step, some)
            self.run(hidden_BQC, *angles, step, some)
        return self._head()(self._norm(hidden_BQC[:, -1:]))[:, 0]

    def start(self, ids_BQ: Tensor, step: Step, tokens: range = ONE) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What enters the first block, and the angles; tokens: which of the step's."""
        hidden_BQC = self._embed()(ids_BQ).float().contiguous()
        cos_BQD, sin_BQD = self._rotary(hidden_BQC, step.positions()[:, tokens.start : tokens.stop])
        return hidden_BQC, (
            cos_BQD.expand(len(ids_BQ), -1, -1).contiguous(),
            sin_BQD.expand(len(ids_BQ), -1, -1).contiguous(),
        )

    def run(
        self,
        hidden_BQC: Tensor,
        cos_BQD: Tensor,
        sin_BQD: Tensor,
        step: Step,
        tokens: range = ONE,
        layers: slice = _ALL,
    ) -> None:
        """The hidden states after these blocks, in place."""
        for request in step.requests if step.cache.sinks else ():
            step.cache.sinks_of(request, self.blocks[0].heads[1], self.blocks[0].width)
        places = [place for window in self._windows for place in step.places(window, tokens)]
        texts = (TextStruct * len(places))(*(TextStruct(*place) for place in places))
        some = range(len(self.blocks))[layers]
        pages = ctypes.byref(self._pages(step.cache), some.start * ctypes.sizeof(PagesStruct))
        first = ctypes.byref(self._structs, some.start * ctypes.sizeof(BlockStruct))
        pointers = (cos_BQD.data_ptr(), sin_BQD.data_ptr(), hidden_BQC.data_ptr())
        count = len(step.requests) * len(tokens)
        self._library("infopt_blocks", first, len(some), pages, texts, count, *pointers)

    def _pages(self, cache: PagedCache) -> ctypes.Array[PagesStruct]:
        """Those of all layers, the same for as long as the cache lives."""
        if cache not in self._known:
            structs = []
            for layer, (block, store) in enumerate(zip(self.blocks, cache.stores, strict=True)):
                pages = store.pages(block.heads[1], block.width, cache.device)
                structs.append(PagesStruct(pages, [store.half(which).frame for which in "kv"], cache.sinks, layer))
            self._known[cache] = (PagesStruct * len(structs))(*structs), structs
        return self._known[cache][0]

    def plain(self, ids_B1: Tensor, step: Step) -> Tensor:
        """The same in the blocks' own way, for the proofs."""
        hidden_B1C, angles = self.start(ids_B1, step)
        for block in self.blocks:
            hidden_B1C = block(hidden_B1C, position_embeddings=angles, past_key_values=step)
        return self._head()(self._norm(hidden_B1C))[:, 0]


def _struct(block: FusedBlock, kind: int) -> BlockStruct:
    pairs = [(linear.weight, linear.bias_O) for linear in block.linears]
    linears = [weight.with_bias(bias_O) for weight, bias_O in pairs if isinstance(weight, PackedWeight)]
    if (
        len(linears) < len(block.linears)
        or block.width % 8
        or block.width > WIDEST
        or linears[2].rows != 2 * linears[3].columns
    ):
        raise ValueError("a block with other weights")
    norms = [block.norm, block.mlp_norm, *(block.head_norms or (None, None))]
    weights = (None if norm is None else _floats(norm).data_ptr() for norm in norms)
    epsilons = (0.0 if norm is None else norm.eps for norm in norms)
    return BlockStruct(*linears, *weights, *epsilons, block.scaling, *block.heads, block.width, _act(block.act), kind)


def _floats(norm: Norm) -> Tensor:
    if norm.weight_C.dtype != torch.float32 or not norm.weight_C.is_contiguous():
        raise ValueError("a norm that is not in fp32")
    return norm.weight_C


def _act(act: nn.Module) -> int:
    """The C++'s number for the function."""
    x = torch.linspace(-8, 8, 100)
    wanted = act(x)
    for number, function in _ACTS.items():
        if torch.allclose(function(x), wanted, rtol=1e-5, atol=1e-6):
            return number
    raise ValueError("an activation that the C++ does not have")


def find(model: Any, blocks: Sequence[FusedBlock], kinds: Sequence[LayerKind], library: Native) -> Decoder | None:
    """The step of a model whose parts are in memory, None where it has none that is proven."""
    try:
        decoder = Decoder(model, blocks, kinds, library)
        return decoder if proven(decoder, model, kinds) else None
    except ODD:
        return None


def proven(decoder: Decoder, model: Any, kinds: Sequence[LayerKind]) -> bool:
    """Both proofs of the module, on a few tokens that follow each other."""
    ids_T = torch.randint(
        model.config.get_text_config().vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(2)
    )
    floats = [LayerKind(kind.window) for kind in kinds]  # where nothing is rounded, for the narrow first proof
    caches = [PagedCache(some, TOKENS, chunk=1) for some in (floats, floats, kinds)]
    requests = [cache.admit(TOKENS) for cache in caches]
    for id_ in ids_T.split(1):
        steps = [Step(cache, [request], 1) for cache, request in zip(caches, requests, strict=True) if request]
        theirs, ours, kept = steps
        wanted_1V = model(input_ids=id_[None], past_key_values=theirs, use_cache=True).logits[:, -1]
        if not near(decoder.plain(id_[None], ours), wanted_1V, OUTER) or not _blocks_agree(decoder, id_[None], kept):
            return False
        for step in steps:
            step.commit()
    return True


def _blocks_agree(decoder: Decoder, ids_B1: Tensor, step: Step) -> bool:
    hidden_B1C, angles = decoder.start(ids_B1, step)
    for i, block in enumerate(decoder.blocks):
        found_B1C = hidden_B1C.clone()
        decoder.run(found_B1C, *angles, step, layers=slice(i, i + 1))
        hidden_B1C = block(hidden_B1C, position_embeddings=angles, past_key_values=step)
        if not near(found_B1C, hidden_B1C, INNER):
            return False
    return True


def near(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """Whether the difference is so small, relative; False where anything is not finite."""
    return bool((found.float() - wanted.float()).norm() <= tolerance * wanted.float().norm())
