"""How much each part of a model suffers from fewer bits, measured once in the stream, and the bits that follow from it.

For every space of every block and every candidate number of bits the space's readers alone are rounded, the block is run on
some of the calibration windows, and the change of its output is compared with the output, token by token:

    e = mean over tokens of ||out' - out||^2 / ||out||^2

Readers of one space get the same bits, because servers fuse them. The float model's activations go on to the next block, so
every number is about one part alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infopt.calibration.discover import discover, structure_key
from infopt.calibration.padding import only_real
from infopt.calibration.stream import Stream
from infopt.errors import BadInput
from infopt.header import read_json
from infopt.memory import release
from infopt.output import write_json
from infopt.quantizers.rounding import CLIPPING, choose_range, group_forms, round_nearest
from infopt.quantizers.search import Allocation, allocate
from infopt.recipe import Override, Recipe
from infopt.recipes.plan import out_in
from infopt.recipes.run import Run
from infopt.topology import Op, Topology


@dataclass(frozen=True)
class Part:
    """The readers of one space, by their module paths: weights in all of them, and the error at each candidate's bits."""

    names: tuple[str, ...]
    weights: int
    errors: tuple[float, ...]


def measure(run: Run, windows_NT: torch.Tensor, on_block: Callable[[int], None]) -> list[Part]:
    """Every part's errors at `run.recipe.target.choices`. A finished measurement in the work folder is used again."""
    target, path = run.recipe.target, run.output.work / "sensitivity.json"
    if target is None:
        raise ValueError("the recipe has no target")
    mark = hashlib.sha256(f"{run.fingerprint()} {tuple(windows_NT.shape)}".encode()).hexdigest()
    if (found := _earlier(path, mark)) is not None:
        return found
    stream = Stream(run.skeleton, windows_NT, run.output.work / "sensitivity")
    stream.start()
    topologies: dict[Any, Topology] = {}
    parts: list[Part] = []
    for i in range(run.blocks):
        block = run.skeleton.load_block(i)
        key = structure_key(block)
        if key not in topologies:
            topologies[key] = discover(run.skeleton, i)
            block = run.skeleton.load_block(i)
        stats = stream.gather(i, block, topologies[key], frozenset({"gram"}))
        with torch.no_grad():
            outputs = list(stream.outputs(i, block))
            for space in topologies[key].spaces:
                ops = [
                    op
                    for op in topologies[key].readers(space)
                    if f"{run.skeleton.blocks[i]}.{op.name}" in run.plan.grids
                ]
                if ops:
                    change = partial(_change, stream, i, block, outputs)
                    parts.append(_part(run, i, block, ops, target.choices, stats[space.name].gram, change))
        stream.write(i + 1, outputs)
        stream.forget(i)
        run.skeleton.free_block(i)
        release()
        on_block(i)
    stream.forget(run.blocks)
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


def _part(
    run: Run,
    i: int,
    block: nn.Module,
    ops: list[Op],
    choices: tuple[int, ...],
    gram_CC: torch.Tensor,
    change: Callable[[], float],
) -> Part:
    names = tuple(f"{run.skeleton.blocks[i]}.{op.name}" for op in ops)
    weights = [block.get_submodule(op.name).get_parameter("weight").data for op in ops]
    kept = [weight.clone() for weight in weights]
    errors = []
    for bits in choices:
        for op, name, weight, old in zip(ops, names, weights, kept, strict=True):
            grid = replace(run.plan.grids[name], bits=bits)
            w_OI = old.T if op.kind == "conv1d" else old
            width = grid.width(w_OI.shape[1])
            form = group_forms(gram_CC, width) if w_OI.shape[1] % width == 0 else None
            q_OI = round_nearest(w_OI, grid, *choose_range(w_OI, grid, form, CLIPPING)).dequantize()
            weight.copy_(q_OI.T if op.kind == "conv1d" else q_OI)
        errors.append(change())
    for weight, old in zip(weights, kept, strict=True):
        weight.copy_(old)
    return Part(names, sum(op.out_features * op.in_features for op in ops), tuple(errors))


def _change(stream: Stream, i: int, block: nn.Module, outputs: list[torch.Tensor]) -> float:
    total, count = 0.0, 0
    for batch, (new_BTC, old_BTC) in enumerate(zip(stream.outputs(i, block), outputs, strict=True)):
        relative_BT = (new_BTC - old_BTC).square().sum(-1) / old_BTC.square().sum(-1).clamp_min(1e-30)
        relative_R = only_real(relative_BT, stream.batches.real(batch))
        total += relative_R.sum(dtype=torch.float64).item()
        count += relative_R.numel()
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
