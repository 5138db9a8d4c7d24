"""A folder's model with all its blocks in memory, which reads a text once and then token by token.

The module tree is transformers', with our linears in it (`runtime/model.py`) and our cache (`runtime/paged.py`). Masks,
rotary angles, soft caps and whatever else a family has are its own code. Before the first request the engine proves on a
few tokens that this model answers the same through the cache, in steps, as for the whole text at once: a family that keeps
a state of another kind is refused here, and does not talk nonsense later.

A prompt is read in pieces, so the memory of attention grows with the text and not with its square.

Legend: B requests, Q new tokens of each, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from infopt.errors import BadInput, InfoptError, OutOfResources, Unsupported, UsageError, VerificationFailed
from infopt.exporters.assemble import is_shards
from infopt.exporters.folder import open_model
from infopt.header import read_json
from infopt.kernels.cpu import Precision
from infopt.kernels.native import native
from infopt.kv_cache import CacheGrid
from infopt.memory import release
from infopt.runtime import gpu
from infopt.runtime.block import PROOF_TOKENS, Angles, FusedBlock, try_fuse
from infopt.runtime.decode import Decoder
from infopt.runtime.decode import find as find_decoder
from infopt.runtime.device import free_memory
from infopt.runtime.gpu import GpuDecoder
from infopt.runtime.head import HalfEmbedding, PackedHead, halved, pack_head
from infopt.runtime.linear import QuantLinear
from infopt.runtime.model import CacheChoice, RuntimeModel
from infopt.runtime.paged import PagedCache, Request, Step, half_kinds
from infopt.runtime.rank import RankModel
from infopt.runtime.store import LayerKind

KVCache = Literal["stored", "float", "fp8", "int8", "int4"]
#: What a user asks for where nothing was calibrated: a scale for each token and head, taken when it is stored.
GRIDS = {
    "fp8": CacheGrid("float", 8, "token"),
    "int8": CacheGrid("int", 8, "token"),
    "int4": CacheGrid("int", 4, "token", symmetric=False),
}
CHUNK = 512
#: Largest relative difference between steps and the whole: fp32 summed in another order; bf16 activations.
TOLERANCE = {"exact": 1e-3, "packed": 5e-2}
_TRIAL = (3, 2, 1, 1)  # tokens of the steps of the proof
_NO_CACHE = (AttributeError, TypeError, ValueError, LookupError, RuntimeError, NotImplementedError)


def check_folder(folder: Path) -> None:
    """Raise what is wrong with a model's folder before anything is loaded."""
    if is_shards(folder):
        fix = f"infopt assemble {folder} -o {folder.name}-whole"
        raise UsageError(f"{folder} holds shards", "They are run by their ranks.", fix)
    open_model(folder)


class Engine:
    """A model that is ready to generate.

    folder, precision, device: see `RuntimeModel`. cache: another type than "stored", which is what the folder says; where it
    says nothing, floats: in bf16 where all blocks are one call, else in fp32. part: one rank's part of the model, whose other
    ranks are called in the same way at the same time. capture: see `GpuDecoder`. Raises what the reader raises, and Unsupported
    for a model that cannot be run from such a cache.
    """

    def __init__(
        self,
        folder: Path,
        precision: Precision = "exact",
        cache: KVCache = "stored",
        part: RankModel | None = None,
        device: torch.device | str = "cpu",
        capture: Callable[[gpu.Run], gpu.Run] | None = None,
    ) -> None:
        self._capture = capture
        self.folder, self.precision, self._part, self.device = Path(folder), precision, part, torch.device(device)
        if part is None:
            check_folder(self.folder)
        kept: CacheChoice = "stored" if cache == "stored" else "float"
        self._runtime = part or RuntimeModel(self.folder, precision, kept, self.device)
        self._check_memory(free_memory(self.device), part.described.tp if part else 1)
        self._runtime.load_outer()
        self.model = self._runtime.skeleton.model
        self.config = self.model.config.get_text_config()
        self.kinds = self._kinds(cache)
        self.fused: list[int] = []
        self._angles = Angles()
        for i in range(len(self._runtime)):
            self._load_block(i)
        accepted = inspect.signature(self.model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._takes_last = "logits_to_keep" in accepted
        self._head: PackedHead | None = None
        self.decoder: Decoder | GpuDecoder | None = None
        self._prove()
        if precision == "packed" and part is None:
            self._pack_outer()
            self._find_decoder()

    @property
    def positions(self) -> int | None:
        """How long a text may be, where the model says so."""
        limit = getattr(self.config, "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a text: of generation_config.json, or of config.json."""
        path = self.folder / "generation_config.json"
        said = read_json(path) if path.exists() else {}
        found = said.get("eos_token_id") if isinstance(said, dict) else None
        found = getattr(self.config, "eos_token_id", None) if found is None else found
        return frozenset(part for part in (found if isinstance(found, list) else [found]) if isinstance(part, int))

    def cache(self, tokens: int, requests: int = 1, chunk: int = CHUNK) -> PagedCache:
        """An empty cache for so many texts of so many tokens, or of as many as the model knows positions."""
        tokens = tokens if self.positions is None else min(tokens, self.positions)
        return PagedCache(self.kinds, tokens, requests, min(chunk, tokens), self.device)

    @property
    def weight_bytes(self) -> tuple[int, int]:
        """(of the tensors in the folder's files, of what one token's pass reads here: packed layers as they are kept)."""
        reader = self._runtime.reader
        stored = sum(info.nbytes for info in getattr(reader, "stored", reader.tensors).values())
        embedding = self.model.get_input_embeddings()  # of which a token reads one row
        modules = [module for module in self.model.modules() if module is not embedding]
        read = sum(int(getattr(module, "packed_bytes", 0)) for module in modules)
        read += sum(parameter.nbytes for module in modules for parameter in module.parameters(recurse=False))
        return stored, read

    @property
    def kernels(self) -> dict[str, int]:
        """What multiplies, and how many weights; q, k and v of a fused block are one, gate and up another."""
        found: list[str] = []
        for module in self.model.modules():
            if isinstance(module, FusedBlock):
                found += [kernel for linear in module.linears for kernel in linear.kernels]
            elif isinstance(module, QuantLinear | PackedHead):
                found.append(module.kernel)
        return dict(sorted(Counter(found).items()))

    @property
    def cache_name(self) -> str:
        """The cache's type, "int8"; "fp32" or "bf16" for floats."""
        grid = self.kinds[0].grid
        if grid is None:
            return "bf16" if self.kinds[0].dtype == torch.bfloat16 else "fp32"
        return f"{'fp' if grid.kind == 'float' else 'int'}{grid.bits}"

    def check_prompt(self, ids: Sequence[int]) -> None:
        """Raise UsageError or BadInput for a prompt that cannot be continued."""
        if not ids:
            raise UsageError("the prompt is empty", "There is nothing to go on from.", 'Give --prompt "some text".')
        if self.positions is not None and len(ids) >= self.positions:
            why = f"{self.folder} knows {self.positions:,} positions, and the answer needs one."
            raise BadInput(f"the prompt has {len(ids):,} tokens", why, "Give a shorter prompt.")
        if not 0 <= min(ids) <= max(ids) < self.config.vocab_size:
            what = f"{self.folder}: the tokenizer gives the ids {min(ids)} to {max(ids)}"
            why = f"The model has {self.config.vocab_size} tokens."
            raise BadInput(what, why, "Use the tokenizer of the original model.")

    @torch.inference_mode()
    def advance(self, cache: PagedCache, requests: Sequence[Request], ids_BQ: Tensor, fine: bool = True) -> Tensor:
        """Store these tokens, the next ones of each request; logits_BV, fp32, of what follows the last.

        fine: whether more than the most likely tokens' logits will be used; see `runtime/head.py`."""
        if self._head is not None:
            self._head.fine = fine
        step = Step(cache, requests, ids_BQ.shape[1])
        if self.decoder is not None:
            logits_BV = self.decoder(ids_BQ, step)
        else:
            logits_BV = self._forward(ids_BQ, step)[:, -1].float()
        step.commit()
        return logits_BV if self._part is None else self._part.agreed(logits_BV)

    def prefill(self, cache: PagedCache, request: Request, ids: Sequence[int]) -> Tensor:
        """Read a prompt in the cache's pieces; logits_V of what follows it."""
        logits_BV = torch.empty(0)
        start = 0
        while start < len(ids):
            piece = ids[start : start + cache.piece(start)]
            logits_BV = self.advance(cache, [request], torch.tensor([piece]))
            start += len(piece)
        return logits_BV[0]

    def _forward(self, ids_BQ: Tensor, step: Step) -> Tensor:
        extra: dict[str, Any] = {"position_ids": step.positions()} if self._takes_positions else {}
        extra |= {"logits_to_keep": 1} if self._takes_last else {}
        return self.model(
            input_ids=ids_BQ.to(self.device), attention_mask=step.mask(), past_key_values=step, use_cache=True, **extra
        ).logits

    # Loading

    def _check_memory(self, limit: int | None, ranks: int = 1) -> None:
        """Raise OutOfResources where the weights alone do not fit: the system would end the process without a word."""
        reader, quantized = self._runtime.reader, self._runtime.quantized
        needed, each = 0.0, f"; {ranks} ranks share them" if ranks > 1 else ""
        for name, info in reader.tensors.items():
            grid = quantized.get(name.removesuffix(".weight")) if self.precision == "packed" else None
            wide = 4.0 if grid is None or grid.kind == "float" else grid.bits / 8
            needed += wide * math.prod(info.shape)
        if limit is not None and needed > limit / ranks:
            what = f"{self.folder} needs {needed / 1e9:.1f} GB of memory, and {limit / 1e9:.1f} GB are free{each}"
            raise OutOfResources(
                what, "All its blocks are kept.", "Try --precision packed; infopt eval needs one block."
            )

    @torch.inference_mode()
    def _load_block(self, i: int) -> None:
        """Block i as it is, or for `packed` a fused one in its place where it is proven to be the same."""
        runtime = self._runtime
        if self.precision == "packed" and isinstance(runtime, RuntimeModel):
            runtime.precision = "exact"  # the proof is one about fp32
            block = runtime.load_block(i)
            call = runtime.skeleton.calls(1, PROOF_TOKENS)[i]
            if try_fuse(block, i, runtime.codes_of(i), call, self.kinds[i], len(runtime)):
                fused = FusedBlock(block, i, runtime.codes_of(i), "packed", self._angles)
                runtime.replace_block(i, fused.eval())
                self.fused.append(i)
                return
            runtime.precision = "packed"
        runtime.load_block(i)

    def _pack_outer(self) -> None:
        """The head as `runtime/head.py` packs it, and the embedding in the 16 bits of the file."""
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if type(head) is not nn.Linear:
            return
        weight_VC = halved(head.weight.detach())
        tied = getattr(embedding, "weight", None) is head.weight
        self._head = pack_head(head, weight_VC)
        if self._head is None:
            return
        self.model.set_output_embeddings(self._head.eval())
        if type(embedding) is nn.Embedding:
            self.model.set_input_embeddings(HalfEmbedding(weight_VC if tied else halved(embedding.weight.detach())))
        release()

    @torch.inference_mode()
    def _find_decoder(self) -> None:
        """One call for all blocks, where they all allow it, with floats of a cache in bf16; see `runtime/decode.py` and
        `runtime/gpu.py`."""
        blocks = [module for module in self.model.modules() if isinstance(module, FusedBlock)]
        kinds = half_kinds(self.kinds)
        if len(blocks) < len(kinds):
            return
        if self.device.type != "cpu":
            if not all(kind.grid is None or kind.grid.plain for kind in kinds):
                return
            self.decoder = gpu.find(self.model, blocks, kinds, self.device, self._capture)
        elif library := native():
            self.decoder = find_decoder(self.model, blocks, kinds, library)
        if self.decoder is not None:
            self.kinds = kinds

    # What the layers cache, and the proof

    def _kinds(self, choice: KVCache) -> list[LayerKind]:
        try:
            layers: list[Any] = list(DynamicCache(config=self.model.config).layers)
        except _NO_CACHE as error:
            raise _refused(type(self.model).__name__, f"{type(error).__name__}: {error}") from error
        if len(layers) != len(self._runtime) or not all(hasattr(layer, "keys") for layer in layers):
            raise _refused(type(self.model).__name__, "Some of its layers keep a state, or share what they keep.")
        windows = [getattr(layer, "sliding_window", None) if layer.is_sliding else None for layer in layers]
        stored = self._runtime.cache
        if choice == "stored" and stored is not None:
            return [LayerKind(window, stored, self._runtime.cache_scales(i)) for i, window in enumerate(windows)]
        return [LayerKind(window, GRIDS.get(choice)) for window in windows]

    @torch.inference_mode()
    def _prove(self) -> None:
        """Raise Unsupported where this model answers otherwise through a (float) cache than without one."""
        count = sum(_TRIAL)
        ids_BQ = torch.randint(self.config.vocab_size, (1, count), generator=torch.Generator().manual_seed(0))
        cache = PagedCache([LayerKind(kind.window) for kind in self.kinds], count, 1, max(_TRIAL), self.device)
        request = Request(count, {window: ring.take(count) for window, ring in cache.rings.items()})
        name = type(self.model).__name__
        try:
            wanted_V = self.model(input_ids=ids_BQ.to(self.device), use_cache=False).logits[0, -1].float()
            done = 0
            for part in _TRIAL:
                logits_BV = self.advance(cache, [request], ids_BQ[:, done : done + part])
                done += part
        except InfoptError:
            raise
        except _NO_CACHE as error:
            raise _refused(name, f"{type(error).__name__}: {str(error)[:200]}") from error
        if not bool(torch.isfinite(wanted_V).all()):
            why = "Its weights are damaged, or overflow."
            raise VerificationFailed(f"{self.folder} answers with numbers that are not finite", why, "infopt verify")
        apart = ((logits_BV[0] - wanted_V).abs().max() / wanted_V.abs().max().clamp_min(1e-30)).item()
        if not apart <= TOLERANCE[self.precision]:
            raise _refused(name, f"Its answer differs by {apart:.1e} (relative) from that without a cache.")
        if self._part is not None:
            kinds = zip(self.kinds, cache.stores, strict=True)
            self.kinds = [replace(kind, heads=store.used()) for kind, store in kinds]


def _refused(name: str, why: str) -> Unsupported:
    return Unsupported(f"{name} cannot be run from infopt's cache.", why, "infopt eval reads it without a cache.")
