"""How much each part of a model suffers from fewer bits, measured once in the stream, and the bits that follow from it.

For every space of every block and every candidate number of bits the space's readers alone are rounded, as the recipe rounds
them and by statistics of other windows, and the block is run on some windows. What its output's change does to the model's
answer is a derivative away: where g is that of -log p(token) by the block's output, for a token drawn from the model's own
answer p, the KL divergence that a change d of the output leaves is to second order

    E[(g . d)^2] / 2

(Fisher's information; LeCun, Denker and Solla 1989 take the Hessian, Kim et al. 2024, arXiv:2306.07629, the same squares of
gradients). So all numbers are nats a token, of whatever block, and they add up to what the model loses. Products between
tokens are left out.

The derivatives travel from the end of the model to its beginning, one block at a time, as activations do the other way.
Readers of one space get the same bits, because servers fuse them.

Legend: B windows of a batch, T tokens of a window, C hidden width, K some tokens, V vocabulary, R real tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infopt.calibration.discover import discover, structure_key
from infopt.calibration.lanes import enough_cores
from infopt.calibration.padding import only_real
from infopt.calibration.stats import InputStats
from infopt.calibration.stream import Stream
from infopt.errors import BadInput
from infopt.grid import Grid
from infopt.header import read_json
from infopt.memory import release
from infopt.model import Skeleton
from infopt.output import write_json
from infopt.quantizers.search import Allocation, allocate
from infopt.quantizers.work import BlockWork, Step
from infopt.recipe import Override, Recipe
from infopt.recipes.plan import out_in
from infopt.recipes.run import Run, needs_of
from infopt.topology import Space, Topology

_MEASURED, _COUNTED = 8, 24  # windows: of errors, and of the statistics that solvers are given


@dataclass(frozen=True)
class Part:
    """The readers of one space, by their module paths: weights in all of them, and the nats lost at each candidate's bits."""

    names: tuple[str, ...]
    weights: int
    errors: tuple[float, ...]


def measure(run: Run, windows_NT: Tensor, on_block: Callable[[int], None]) -> list[Part]:
    """Every part's errors at `run.recipe.target.choices`, on the first of the calibration windows. A finished measurement in
    the work folder is used again."""
    target, path = run.recipe.target, run.output.work / "sensitivity.json"
    if target is None:
        raise ValueError("the recipe has no target")
    mark = hashlib.sha256(f"{run.fingerprint()} {tuple(windows_NT.shape)}".encode()).hexdigest()
    if (found := _earlier(path, mark)) is not None:
        return found
    needs = needs_of(_rounding(run))
    measured = run.stream(windows_NT[:_MEASURED], "sensitivity")
    streams = [measured]
    if needs and len(windows_NT) >= 2 * _MEASURED:
        streams.append(run.stream(windows_NT[_MEASURED:][:_COUNTED], "sensitivity-statistics"))
    counted = streams[-1]  # a solver would know the errors of the windows that it was shown
    for stream in streams:
        stream.start()
    for i in range(run.blocks):
        block = run.skeleton.load_block(i)
        for stream in streams:
            stream.advance(i, block)
        run.skeleton.free_block(i)
        release()
    gradients = at_the_end(run.skeleton, measured)
    topologies: dict[Any, Topology] = {}
    parts: list[Part] = []
    for i in reversed(range(run.blocks)):
        block = run.skeleton.load_block(i)
        key = structure_key(block)
        if key not in topologies:
            topologies[key] = discover(run.skeleton, i)
            block = run.skeleton.load_block(i)
        stats = counted.gather(i, block, topologies[key], needs) if needs else {}
        outputs = [hidden_BTC for hidden_BTC, _ in measured.inputs(i + 1)]
        loss = partial(_loss, measured, i, block, outputs, gradients)
        for space in topologies[key].spaces:
            work = BlockWork(block, topologies[key], _grids(run, i, topologies[key], space), {}, {})
            if work.grids:
                parts.append(_part(run, i, work, space, stats.pop(space.name, None), loss))
        gradients = before(measured, i, block, gradients)
        for stream in streams:
            stream.forget(i + 1)
        run.skeleton.free_block(i)
        release()
        on_block(i)
    for stream in streams:
        stream.forget(0)
    write_json(path, {"mark": mark, "parts": [part.__dict__ for part in parts]})
    return parts


def decide(run: Run, parts: list[Part]) -> tuple[Recipe, dict[str, Any]]:
    """(the recipe with the bits of every layer in its overrides, what was decided and why); UsageError if nothing fits."""
    recipe, target = run.recipe, run.recipe.target
    if target is None:
        raise ValueError("the recipe has no target")
    total = sum(part.weights for part in parts)
    if target.bits is not None:
        budget = int(target.bits * total)
    else:
        budget = 8 * (target.nbytes() - _bytes_besides_codes(run))
    costs = [[bits * part.weights for bits in target.choices] for part in parts]
    found = allocate(costs, [part.errors for part in parts], budget)
    by_bits: dict[int, list[str]] = {}
    for part, choice in zip(parts, found.choices, strict=True):
        by_bits.setdefault(target.choices[choice], []).extend(part.names)
    overrides = tuple(
        Override(match=tuple(names), weights=recipe.weights.model_copy(update={"bits": bits}))
        for bits, names in sorted(by_bits.items())
    )
    report = {
        "bits": found.cost / total,
        "error": found.error,
        "layers": {bits: len(names) for bits, names in sorted(by_bits.items())},
        "front": _thinned(found, total),
        "uniform": {bits: sum(part.errors[c] for part in parts) for c, bits in enumerate(target.choices)},
    }
    return recipe.model_copy(update={"overrides": overrides, "target": None}), report


def _rounding(run: Run) -> list[Step]:
    return [step for step in run.steps if not step.rewrites]


def _grids(run: Run, i: int, topology: Topology, space: Space) -> dict[str, Grid]:
    """Those of a space's readers in block i that are to be quantized."""
    planned = {op.name: run.plan.grids.get(f"{run.skeleton.blocks[i]}.{op.name}") for op in topology.readers(space)}
    return {name: grid for name, grid in planned.items() if grid is not None}


@torch.no_grad()
def _part(run: Run, i: int, work: BlockWork, space: Space, stats: InputStats | None, loss: Callable[[], float]) -> Part:
    """The readers of a space, at every number of bits; the block is left as it was."""
    if run.recipe.target is None:
        raise ValueError("the recipe has no target")
    ops = [op for op, _ in work.targets(space)]
    kept = [work.weight(op).clone() for op in ops]
    count = sum(weight.numel() for weight in kept)
    errors = []
    for bits in run.recipe.target.choices:
        grids = {name: replace(grid, bits=bits) for name, grid in work.grids.items()}
        given = {} if stats is None else {space.name: stats}
        rounded = BlockWork(work.block, work.topology, grids, given, {})
        with enough_cores(count):
            for step in _rounding(run):
                step(rounded, space)
        for op in ops:
            rounded.install(op)
        errors.append(loss())
        rounded.close()
        for op, weight in zip(ops, kept, strict=True):
            work.weight(op).copy_(weight)
    return Part(tuple(f"{run.skeleton.blocks[i]}.{op.name}" for op in ops), count, tuple(errors))


def at_the_end(skeleton: Skeleton, stream: Stream) -> list[Tensor]:
    """Of every batch [B, T, C]: the derivatives of -log p(token) by the last block's output, zero where there is no token."""
    draw = torch.Generator().manual_seed(0)
    found = []
    with skeleton.outer_loaded():
        for batch, (hidden_BTC, _) in enumerate(stream.inputs(len(skeleton.blocks))):
            some = hidden_BTC.flatten(0, 1).split(skeleton.logits_at_once)
            parts = [_drawn(skeleton, hidden_KC, draw) for hidden_KC in some]
            gradient_BTC, real_BT = torch.cat(parts).view_as(hidden_BTC), stream.batches.real(batch)
            found.append(gradient_BTC if real_BT is None else gradient_BTC * real_BT[..., None])
    return found


def _drawn(skeleton: Skeleton, hidden_KC: Tensor, draw: torch.Generator) -> Tensor:
    hidden_KC = hidden_KC.detach().requires_grad_()
    with torch.enable_grad():
        log_p_KV = skeleton.tail(hidden_KC[None])[0].float().log_softmax(-1)
        p_KV = log_p_KV.detach().exp()
        if not p_KV.isfinite().all():
            raise BadInput(
                f"{skeleton.blocks[-1]} leads to logits that are not finite",
                "the model overflows or its weights are damaged",
                "check it with `infopt eval MODEL`",
            )
        token_K1 = torch.multinomial(p_KV, 1, generator=draw)
        (gradient_KC,) = torch.autograd.grad(-log_p_KV.gather(1, token_K1).sum(), hidden_KC)
    return gradient_KC


def before(stream: Stream, i: int, block: nn.Module, gradients: list[Tensor]) -> list[Tensor]:
    """Derivatives by block i's input, of those by its output; of every batch [B, T, C]."""
    found: list[Tensor] = []
    for (hidden_BTC, call), gradient_BTC in zip(stream.inputs(i), gradients, strict=True):
        if call is None:
            raise ValueError("nothing comes before what is behind the last block")
        with torch.enable_grad():
            answer_BTC = call.run(block, hidden_BTC.requires_grad_())
            found += torch.autograd.grad(answer_BTC, hidden_BTC, gradient_BTC)
    return found


def _loss(stream: Stream, i: int, block: nn.Module, outputs: list[Tensor], gradients: list[Tensor]) -> float:
    """Nats a token that block i's answers, as it is now, are worse than `outputs`."""
    total, count = 0.0, 0
    for batch, new_BTC in enumerate(stream.outputs(i, block)):
        felt_BT = ((new_BTC - outputs[batch]) * gradients[batch]).sum(-1)
        felt_R = only_real(felt_BT, stream.batches.real(batch))
        total += felt_R.square().sum(dtype=torch.float64).item() / 2
        count += felt_R.numel()
    return total / count


def _bytes_besides_codes(run: Run) -> int:
    """Of the whole checkpoint: what is not quantized, and the scales and zero points of what is."""
    total = sum(info.nbytes for info in run.reader.tensors.values())
    for name, grid in run.plan.grids.items():
        rows, columns = out_in(run.skeleton.model.get_submodule(name))
        total -= run.reader.tensors[run.stored_key(name)].nbytes
        total += int((grid.bits_per_weight(columns) - grid.bits) * rows * columns / 8)
    return total


def _earlier(path: Path, mark: str) -> list[Part] | None:
    if not path.is_file():
        return None
    try:
        found = read_json(path)
        if found.get("mark") != mark:
            return None
        return [Part(tuple(part["names"]), part["weights"], tuple(part["errors"])) for part in found["parts"]]
    except (BadInput, KeyError, TypeError, AttributeError):
        return None


def _thinned(found: Allocation, total: int) -> list[tuple[float, float]]:
    step = max(1, len(found.front) // 400)
    return [(cost / total, error) for cost, error in [*found.front[::step], found.front[-1]]]
