"""The heads of a block's attention, measured by derivatives and proven by changing them. No layout is assumed.

`infopt.calibration.cells` tells which output channels each query head needs. Two more questions make parts of them:

* Which are queries? The attended values of the last token depend on the query of the last token only, on keys and values of
  earlier tokens too. Which of these are values is in the proven fold of the output projection.
* May heads be regrouped? Two proofs on the running block, by what a rewrite will do. Exchange the key-value heads, with their
  query heads and the columns of the output projection: the answer must not change, so no head is special (a norm over all
  heads has a weight for each, ALiBi a slope) and the channels of different heads correspond. Multiply the pairs of channels
  of each key head by random complex numbers and let the queries undo it: where the answer does not change, keys of different
  heads may be aligned before they are merged. Rotary embeddings pair channels d and d + D/2 or 2d and 2d + 1.

Legend: B batch, T tokens, H query heads, G key-value heads, D channels of a head, O output channels, C hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from infopt.calibration.cells import find_cells
from infopt.calibration.discover import PROOF_SHAPE, TOLERANCE
from infopt.calibration.facts import without_experts
from infopt.cells import Cells
from infopt.errors import Unsupported
from infopt.heads import Attention, HeadWeights, Part, put, take, turned
from infopt.model import BlockCall, Skeleton
from infopt.topology import Space, Topology

SEED = 20250601
_TOKENS = 6


def find_attention(skeleton: Skeleton, i: int, topology: Topology) -> Attention | None:
    """The heads of block i's one attention, None where it has none. `turns` is left to `prove_heads`.

    Raises Unsupported for heads whose queries, keys and values cannot be told apart or are not made from one input.
    """
    name = skeleton.blocks[i]
    topology = without_experts(topology, skeleton.model.get_submodule(name))
    try:
        found = [cells for cells in find_cells(skeleton, i, topology) if cells.mixes]
    except Unsupported as error:
        raise _refused(f"{name}: its heads cannot be told apart", error.why) from error
    if not found:
        return None
    if len(found) > 1 or len(found[0].readers) > 1:
        raise _refused(f"{name} has more than one attention", "infopt regroups the heads of one")
    space = topology.space_of(found[0].readers[0])
    if space.fold is None:
        raise _refused(f"{name}: the values of its heads are unknown", space.reason)
    block = skeleton.model.get_submodule(name)
    earlier = _seen_earlier(block, *_bench(skeleton, i, _TOKENS), found[0])
    return _attention(name, topology, space, found[0], earlier)


@torch.no_grad()
def prove_heads(skeleton: Skeleton, i: int, attention: Attention) -> Attention:
    """The attention with its `turns`; Unsupported unless exchanging its heads leaves block i's answer as it is.

    The block must be loaded; its weights end unchanged.
    """
    block = skeleton.model.get_submodule(skeleton.blocks[i])
    call, hidden_BTC = _bench(skeleton, i, PROOF_SHAPE[1])
    original = take(block, attention)
    generator = torch.Generator().manual_seed(SEED)
    before = call.run(block, hidden_BTC)

    def change(edit: Callable[[HeadWeights], HeadWeights]) -> float:
        put(block, attention, edit(original))
        after = call.run(block, hidden_BTC)
        put(block, attention, original)
        return float((after - before).norm() / before.norm().clamp(min=1e-30))

    order = [*range(1, attention.kv_heads), 0]
    error = change(lambda weights: exchanged(weights, attention, order))
    if not error <= TOLERANCE:
        raise _refused(
            f"{skeleton.blocks[i]}: its heads cannot be regrouped",
            f"exchanging them changes its answer by {error:.0e}: a norm, a position or a scale belongs to single heads",
        )
    for turns in _candidates(attention.key.channels.shape[1], skeleton.config.get_text_config()):
        factor_GF = _factors(attention.kv_heads, turns, generator)
        if change(partial(_turned, attention=attention, turns=turns, factor_GF=factor_GF)) <= TOLERANCE:
            return replace(attention, turns=turns)
    return attention


def exchanged(weights: HeadWeights, attention: Attention, order: list[int]) -> HeadWeights:
    """The weights with key-value head `order[g]` in the place of head g, its query heads with it."""
    heads = [0] * len(attention.group)
    for place, source in enumerate(order):
        for to, head in zip(attention.queries_of(place), attention.queries_of(source), strict=True):
            heads[to] = head
    return HeadWeights(weights.q_HDI[heads], weights.k_GDI[order], weights.v_GDI[order], weights.o_HCD[heads])


def _bench(skeleton: Skeleton, i: int, length: int) -> tuple[BlockCall, Tensor]:
    with skeleton.outer_loaded():
        call = skeleton.calls(PROOF_SHAPE[0], length)[i]
    generator = torch.Generator().manual_seed(SEED)
    return call, torch.randn(PROOF_SHAPE[0], length, skeleton.width, generator=generator)


@torch.enable_grad()
def _seen_earlier(block: nn.Module, call: BlockCall, hidden_BTC: Tensor, cells: Cells) -> dict[str, np.ndarray]:
    """For each op, which output channels [O] of earlier tokens reach the last token's heads."""
    leaves: dict[str, Tensor] = {}
    seen: list[Tensor] = []

    def as_leaf(name: str) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, _args: object, out: Tensor) -> Tensor:
            leaves[name] = out.detach().requires_grad_()
            return leaves[name] * 1.0  # a block may write into what a projection answers, which a leaf forbids

        return hook

    handles = [block.get_submodule(op).register_forward_hook(as_leaf(op)) for op in cells.channels]
    reader = block.get_submodule(cells.readers[0])
    handles.append(reader.register_forward_pre_hook(lambda _m, args: seen.append(args[0])))
    try:
        call.run(block, hidden_BTC)
    finally:
        for handle in handles:
            handle.remove()
    last = seen[0].reshape(*hidden_BTC.shape[:2], -1)[:, -1]
    asked = (last * torch.randn(last.shape, generator=torch.Generator().manual_seed(SEED))).sum()
    grads = torch.autograd.grad(asked, list(leaves.values()))
    shape = hidden_BTC.shape[:2]
    return {
        op: grad.reshape(*shape, -1)[:, :-1].abs().amax((0, 1)).gt(0).numpy()
        for op, grad in zip(leaves, grads, strict=True)
    }


def _attention(name: str, topology: Topology, space: Space, cells: Cells, earlier: dict[str, np.ndarray]) -> Attention:
    fold = space.fold
    if fold is None:
        raise ValueError("a space without a fold has no known values")
    rows = np.arange(space.width) if fold.rows is None else np.asarray(fold.rows)
    values_HD = rows.reshape(cells.count, cells.width)
    queries, keys = [], []
    for op, channels_HK in cells.channels.items():
        own = np.isin(np.arange(topology.op(op).out_features), values_HD) & (op == fold.writer)
        queries += _rows(op, channels_HK, ~earlier[op] & ~own)
        keys += _rows(op, channels_HK, earlier[op] & ~own)
    inputs = {topology.space_of(part.op).name for part in (*queries, *keys)} | {topology.space_of(fold.writer).name}
    if len(queries) != 1 or len(keys) != 1 or len(inputs) != 1:
        raise _refused(
            f"{name}: its heads are not made of one projection each for queries, keys and values",
            f"{len(queries)} projections make queries, {len(keys)} make keys, from {len(inputs)} inputs",
        )
    key, group = _distinct(keys[0])
    value, same = _distinct(Part(fold.writer, values_HD))
    sizes = np.bincount(group)
    if group != same or len(set(sizes.tolist())) > 1 or queries[0].channels.shape[1] != key.channels.shape[1]:
        raise _refused(f"{name}: its heads are not grouped", "keys, values and queries do not belong together evenly")
    attention = Attention(queries[0], key, value, cells.readers[0], group)
    _check_whole(name, topology, attention)
    return attention


def _rows(op: str, channels_HK: np.ndarray, wanted_O: np.ndarray) -> list[Part]:
    """The wanted ones of each head's channels, as a part; none if there are none, or not as many of each head."""
    picked = [row[wanted_O[row]] for row in channels_HK]
    if not any(map(len, picked)) or len({len(row) for row in picked}) > 1:
        return []
    return [Part(op, np.stack(picked))]


def _distinct(part: Part) -> tuple[Part, tuple[int, ...]]:
    """The part with each head's row once, in order of appearance, and for each query head which it is."""
    rows = [tuple(row) for row in part.channels.tolist()]
    order = list(dict.fromkeys(rows))
    return Part(part.op, np.asarray(order, np.int64)), tuple(order.index(row) for row in rows)


def _check_whole(name: str, topology: Topology, attention: Attention) -> None:
    """Every channel of every op belongs to one head of one part: nothing would be left out of the new weights."""
    parts = (attention.query, attention.key, attention.value)
    for op in {part.op for part in parts}:
        used = np.sort(np.concatenate([part.channels.reshape(-1) for part in parts if part.op == op]))
        if not np.array_equal(used, np.arange(topology.op(op).out_features)):
            raise _refused(f"{name}.{op}: some of its channels belong to no head, or to two", "")
    if topology.op(attention.out).kind != "linear" or any(topology.op(part.op).kind != "linear" for part in parts):
        raise _refused(f"{name}: its projections are stored transposed", "")


def _candidates(width: int, text: object) -> list[tuple[tuple[int, int], ...]]:
    """The pairings of a head's channels that are worth a proof, the most usual first."""
    part = getattr(text, "partial_rotary_factor", None) or (getattr(text, "rope_parameters", None) or {}).get(
        "partial_rotary_factor"
    )
    turning = int(width * part) // 2 * 2 if isinstance(part, int | float) and 0 < part < 1 else width
    found: list[tuple[tuple[int, int], ...]] = []
    for size in dict.fromkeys((width // 2 * 2, turning)):
        rest = tuple((d, d) for d in range(size, width))
        found.append((*((d, d + size // 2) for d in range(size // 2)), *rest))
        found.append((*((d, d + 1) for d in range(0, size, 2)), *rest))
    return [*found, tuple((d, d) for d in range(width))]


def _factors(heads: int, turns: tuple[tuple[int, int], ...], generator: torch.Generator) -> Tensor:
    size_GF = torch.exp2(torch.rand(heads, len(turns), generator=generator, dtype=torch.float64) * 2 - 1)
    angle_GF = torch.rand(heads, len(turns), generator=generator, dtype=torch.float64) * 2 * torch.pi
    single_F = torch.tensor([a == b for a, b in turns])
    return torch.polar(size_GF, torch.where(single_F, torch.zeros(()).double(), angle_GF))


def _turned(
    weights: HeadWeights, attention: Attention, turns: tuple[tuple[int, int], ...], factor_GF: Tensor
) -> HeadWeights:
    """Keys divided by the factors; the score is Re(conj(q) k), so queries are multiplied by the conjugates."""
    undo_HF = factor_GF[list(attention.group)].conj().resolve_conj()
    return replace(
        weights, k_GDI=turned(weights.k_GDI, turns, 1 / factor_GF), q_HDI=turned(weights.q_HDI, turns, undo_HF)
    )


def _refused(what: str, why: str) -> Unsupported:
    return Unsupported(what, why, "see what was found with `infopt inspect MODEL`")
