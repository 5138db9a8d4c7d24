"""New tokens through a model on a GPU: eight kernels for a block, on tokens in bf16 and the packed pages of the cache.

    h = h + x;  y = norm(h)             one kernel, which rounds h to bf16 as the residual stream is kept
    q, keys, values = rope(qkv(y))      the product, then one kernel that also norms heads and writes the cache
    a = attention(q, pages)             split over a text's pages and merged; a prompt is read in tiles
    x = o(a)
    h = h + x;  y = norm(h)
    x = down(gated(gate_up(y)))

A block is a proven `FusedBlock`, whose weights are used as they are; the operators are those of `kernels/operators.py`, which
are Triton's kernels on a GPU. `proven` compares the whole with transformers' own forward over the same blocks before use.

Decoding asks the host for nothing, so a step of up to so many texts (1, 2, 4, ...) is captured once in a CUDA graph and run
again with new inputs. Places that no text has write to page 0 and are not looked at.

Legend: B texts, Q new tokens of each, N tokens in any order, P pages, C width, H heads, D channels of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from infopt.kernels import operators, reference
from infopt.kernels.cuda.linear import follow
from infopt.kernels.pages import PAGE, Pages
from infopt.runtime.block import ODD, FusedBlock, Norm, rms_norm
from infopt.runtime.paged import PagedCache, Request, Step, half_kinds
from infopt.runtime.store import LayerKind

TYPE = torch.bfloat16
TOLERANCE = 5e-2  # of bf16 against fp32 activations over a whole model, relative to the logits' norm
TOKENS = 4
Run = Callable[[], Tensor]
Attend = Callable[[Tensor, Pages, Pages], Tensor]  # q [N, Hq, D] and the pages -> [N, Hq, D]


@dataclass(frozen=True)
class Places:
    """Where the tokens of a step are kept, for the layers with one window. tables [B, P], pages and lengths [B]: of each text,
    with the new tokens; slots [N]: of the new ones."""

    tables: Tensor
    pages: Tensor
    lengths: Tensor
    slots: Tensor

    @staticmethod
    def of(requests: Sequence[Request], count: int, window: int | None, rows: int, width: int) -> Places:
        """In memory, for `rows` texts, of which those behind the requests are nobody's, and tables of `width` pages."""
        tables = torch.zeros(rows, width, dtype=torch.int64)
        pages, lengths = torch.ones(rows, dtype=torch.int64), torch.ones(rows, dtype=torch.int64)
        slots = torch.zeros(rows, count, dtype=torch.int64)
        for i, request in enumerate(requests):
            table = request.tables[window]
            tables[i, : len(table)], pages[i], lengths[i] = table, len(table), request.length + count
            places = torch.arange(request.length, request.length + count)
            slots[i] = table[places // PAGE % len(table)] * PAGE + places % PAGE
        return Places(tables, pages, lengths, slots.flatten())

    def parts(self) -> tuple[Tensor, ...]:
        return self.tables, self.pages, self.lengths, self.slots

    def to(self, device: torch.device | str) -> Places:
        return Places(*(part.to(device) for part in self.parts()))

    def copy_(self, other: Places) -> None:
        for mine, part in zip(self.parts(), other.parts(), strict=True):
            mine.copy_(part)


class GpuBlock:
    """See the module. Raises ValueError for a block that the kernels cannot compute."""

    def __init__(self, block: FusedBlock) -> None:
        self.block = block
        self.act = act_name(block.act)
        norms = block.head_norms
        self.head_norms = (None, None) if norms is None else (norms[0].weight_C, norms[1].weight_C)
        self.head_eps = norms[0].eps if norms is not None else 0.0
        if norms is not None and norms[0].eps != norms[1].eps:
            raise ValueError("the norms of queries and keys differ")

    def __call__(
        self, x_NC: Tensor, h_NC: Tensor, cos_ND: Tensor, sin_ND: Tensor, slots_N: Tensor, keys: Pages, values: Pages,
        attend: Attend,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(what the block adds last, the residual stream before that) of the same two before it."""
        block = self.block
        y_NC, _, h_NC = operators.add_rms_norm(x_NC, h_NC, block.norm.weight_C, block.norm.eps)
        qkv_NHD = block.qkv(y_NC).view(len(x_NC), block.heads[0] + 2 * block.heads[1], block.width)
        parts = (keys.codes, keys.scale, keys.zero, values.codes, values.scale, values.zero)
        q_NHD = operators.rope_write(
            qkv_NHD, cos_ND, sin_ND, *self.head_norms, self.head_eps, slots_N, *parts, keys.kind
        )
        x_NC = block.o(attend(q_NHD, keys, values).flatten(1))
        y_NC, _, h_NC = operators.add_rms_norm(x_NC, h_NC, block.mlp_norm.weight_C, block.mlp_norm.eps)
        return block.down(block.gated(y_NC, lambda x: operators.gated(x, self.act)[0])), h_NC


class GpuDecoder:
    """The step of a model; `Engine` calls it as it calls `runtime.decode.Decoder`. capture: makes something that runs a
    function of static memory again; a CUDA graph, or the function itself. Raises one of `ODD` for what it is not made for."""

    def __init__(
        self, model: Any, blocks: Sequence[FusedBlock], kinds: Sequence[LayerKind], capture: Callable[[Run], Run] | None = None
    ) -> None:  # fmt: skip
        base = model.base_model
        self.blocks = [GpuBlock(block) for block in blocks]
        self._embed, self._rotary, self._head = (
            model.get_input_embeddings(),
            base.rotary_emb,
            model.get_output_embeddings(),
        )
        self._norm: Norm = rms_norm(base.norm)
        self._order = [
            *(linear.weight for block in blocks for linear in block.linears),
            getattr(self._head, "linear", None),
        ]
        follow(self._order)
        self._kinds, self._windows = kinds, list(dict.fromkeys(kind.window for kind in kinds))
        self._capture = capture or graph
        self._graphs: dict[tuple[int, ...], _Graph] = {}
        self._cache: PagedCache | None = None

    def __call__(self, ids_BQ: Tensor, step: Step) -> Tensor:
        """logits [B, V], fp32, of what follows these tokens, which are stored."""
        if ids_BQ.shape[1] > 1:
            return torch.cat([self._read(ids_Q, step, i) for i, ids_Q in enumerate(ids_BQ)])
        if self._cache is not step.cache:  # graphs hold on to the memory of a cache
            self._graphs, self._cache = {}, step.cache
        rows = 1 << (len(ids_BQ) - 1).bit_length()
        widths = [1 << (max(len(r.tables[w]) for r in step.requests) - 1).bit_length() for w in self._windows]
        places = [Places.of(step.requests, 1, w, rows, width) for w, width in zip(self._windows, widths, strict=True)]
        ids_N, positions_N = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
        ids_N[: len(ids_BQ)] = ids_BQ[:, 0].to("cpu")
        positions_N[: len(ids_BQ)] = torch.tensor([request.length for request in step.requests])
        key = (rows, *widths)
        if key not in self._graphs:
            self._graphs[key] = _Graph(self, ids_N, positions_N, places, step.cache)
        return self._graphs[key](ids_N, positions_N, places)[: len(ids_BQ)]

    def _read(self, ids_Q: Tensor, step: Step, which: int) -> Tensor:
        """[1, V] of one text's new tokens, which attend to those before them as the cache keeps them."""
        request, device, count = step.requests[which], step.cache.device, len(ids_Q)
        places = [
            Places.of([request], count, window, 1, len(request.tables[window])).to(device) for window in self._windows
        ]

        def attend(layer: int) -> Attend:
            block, window = self.blocks[layer].block, self._kinds[layer].window
            first = 0 if window is None else max(0, request.length - window + 1)
            position_K = torch.arange(first, request.length + count, device=device)
            table = places[self._windows.index(window)].tables[0]
            slots_K = table[position_K // PAGE % len(table)] * PAGE + position_K % PAGE

            def over(q_NHD: Tensor, keys: Pages, values: Pages) -> Tensor:
                k_BHKD, v_BHKD = (half.read(slots_K).to(q_NHD.dtype).transpose(0, 1)[None] for half in (keys, values))
                y_BHQD = operators.attention(q_NHD.transpose(0, 1)[None], k_BHKD, v_BHKD, block.scaling, window)
                return y_BHQD[0].transpose(0, 1)

            return over

        positions_Q = torch.arange(request.length, request.length + count, device=device)
        return self.run(ids_Q.to(device), positions_Q, places, step.cache, attend, last=True)

    def run(
        self, ids_N: Tensor, positions_N: Tensor, places: Sequence[Places], cache: PagedCache,
        attend: Callable[[int], Attend], last: bool = False,
    ) -> Tensor:  # fmt: skip
        """logits [N, V] of these tokens, or of the last one. Nothing here waits for the GPU."""
        x_NC = self._embed(ids_N).to(TYPE)
        cos_BND, sin_BND = self._rotary(x_NC[None].float(), positions_N[None])
        h_NC = torch.zeros_like(x_NC)
        for layer, (block, kind) in enumerate(zip(self.blocks, self._kinds, strict=True)):
            keys, values = cache.stores[layer].pages(block.block.heads[1], block.block.width, cache.device)
            slots_N = places[self._windows.index(kind.window)].slots
            x_NC, h_NC = block(x_NC, h_NC, cos_BND[0], sin_BND[0], slots_N, keys, values, attend(layer))
        if last:
            x_NC, h_NC = x_NC[-1:], h_NC[-1:]
        return self._head(operators.add_rms_norm(x_NC, h_NC, self._norm.weight_C, self._norm.eps)[0]).float()

    def next_of(self, places: Sequence[Places]) -> Callable[[int], Attend]:
        """How one token of each text attends."""

        def attend(layer: int) -> Attend:
            block, window = self.blocks[layer].block, self._kinds[layer].window
            at = places[self._windows.index(window)]

            def over(q_NHD: Tensor, keys: Pages, values: Pages) -> Tensor:
                parts = (keys.codes, keys.scale, keys.zero, values.codes, values.scale, values.zero)
                return operators.paged_decode(
                    q_NHD, *parts, keys.kind, at.tables, at.pages, at.lengths, block.scaling, window
                )

            return over

        return attend

    def capture(self, run: Run) -> Run:
        return self._capture(run)


class _Graph:
    """One step of so many texts, on memory of its own."""

    def __init__(
        self, decoder: GpuDecoder, ids_N: Tensor, positions_N: Tensor, places: Sequence[Places], cache: PagedCache
    ) -> None:
        self._ids_N, self._positions_N = ids_N.to(cache.device), positions_N.to(cache.device)
        self._places = [place.to(cache.device) for place in places]
        attend = decoder.next_of(self._places)
        self._run = decoder.capture(lambda: decoder.run(self._ids_N, self._positions_N, self._places, cache, attend))

    def __call__(self, ids_N: Tensor, positions_N: Tensor, places: Sequence[Places]) -> Tensor:
        """logits [N, V], to be used before the next call."""
        self._ids_N.copy_(ids_N)
        self._positions_N.copy_(positions_N)
        for mine, place in zip(self._places, places, strict=True):
            mine.copy_(place)
        return self._run()


def graph(run: Run) -> Run:
    """The function captured in a CUDA graph. It is run twice before, which compiles its kernels; what these runs store, the
    first replay stores again."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = run()

    def replay() -> Tensor:
        captured.replay()
        return out

    return replay


def act_name(act: nn.Module) -> str:
    """The kernels' name for the function."""
    x = torch.linspace(-8, 8, 100)
    wanted = act(x)
    for name, function in reference.ACTIVATIONS.items():
        if torch.allclose(function(x), wanted, rtol=1e-5, atol=1e-6):
            return name
    raise ValueError("an activation that the kernels do not have")


def find(
    model: Any, blocks: Sequence[FusedBlock], kinds: Sequence[LayerKind], device: torch.device | str,
    capture: Callable[[Run], Run] | None = None,
) -> GpuDecoder | None:  # fmt: skip
    """The step of a model whose parts are on the device, None where it has none that is proven."""
    try:
        decoder = GpuDecoder(model, blocks, kinds, capture)
        return decoder if proven(decoder, model, kinds, device) else None
    except ODD:
        return None


def proven(decoder: GpuDecoder, model: Any, kinds: Sequence[LayerKind], device: torch.device | str) -> bool:
    """Whether a prompt and a token after it get the logits that transformers' forward gives over the same blocks."""
    ids_BT = torch.randint(
        model.config.get_text_config().vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(2)
    )
    plain = half_kinds([LayerKind(kind.window) for kind in kinds])
    caches = [PagedCache(plain, TOKENS, chunk=TOKENS, device=device) for _ in range(2)]
    requests = [cache.admit(TOKENS) for cache in caches]
    for ids_BQ in ids_BT.split((TOKENS - 1, 1), dim=1):
        theirs, ours = (
            Step(cache, [request], ids_BQ.shape[1]) for cache, request in zip(caches, requests, strict=True) if request
        )
        wanted_BV = model(input_ids=ids_BQ.to(device), past_key_values=theirs, use_cache=True).logits[:, -1].float()
        found_BV = decoder(ids_BQ, ours)
        if not bool((found_BV - wanted_BV).norm() <= TOLERANCE * wanted_BV.norm()):
            return False
        theirs.commit()
        ours.commit()
    return True
