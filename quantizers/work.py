"""One block on the workbench: what every step of a recipe reads and changes.

A step is a callable on a `BlockWork` and one of its spaces. It may scale weights in place (recording what it rewrote) and
it may finish an op by giving its QTensor. The Gram matrices follow the scales analytically: when the inputs of a space
are divided by s, H becomes H / (s s^T), so no step has to run the block again.

Legend: O output channels, I input columns, C channels of a space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from infopt.calibration.stats import InputStats
from infopt.grid import Grid, Inputs
from infopt.qtensor import QTensor
from infopt.team import ALONE, Team
from infopt.topology import Fold, Op, Space, Topology


class Step(Protocol):
    """A row of a recipe, called for one space after another. needs: the statistics that it reads (see `InputStats`).
    rewrites: it changes what other spaces hold, so it works on the whole block before any step that rounds."""

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def rewrites(self) -> bool: ...

    def __call__(self, work: BlockWork, space: Space) -> None: ...


@dataclass
class BlockWork:
    """block: the module with fp32 parameters. grids: the numeric type of every op to quantize; absent ops are left alone.
    stats: by space name; empty for methods without data, and filled as the spaces are reached when a block is quantized
    space by space. stored: the storage dtype of each parameter, by its path in
    the block. Filled by steps: `results` (op -> QTensor), `rewritten` (parameter paths that no longer equal the source)
    and `notes` (what the user should know).
    """

    block: nn.Module
    topology: Topology
    grids: Mapping[str, Grid]
    stats: MutableMapping[str, InputStats]
    stored: Mapping[str, torch.dtype]
    team: Team = ALONE
    results: dict[str, QTensor] = field(default_factory=dict)
    rewritten: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    _hooks: list[RemovableHandle] = field(default_factory=list)
    _grams: dict[str, torch.Tensor] = field(default_factory=dict)
    _scales: dict[str, torch.Tensor] = field(default_factory=dict)

    def targets(self, space: Space) -> Iterator[tuple[Op, Grid]]:
        """The readers of a space that are to be quantized and are not finished, with their grids."""
        for op in self.topology.readers(space):
            if op.name in self.grids and op.name not in self.results:
                yield op, self.grids[op.name]

    def weight(self, op: Op) -> torch.Tensor:
        """A view of the op's weight as [O, I], whatever way the module stores it; a norm's as [C]."""
        weight = self._parameter(op.name, "weight")
        return weight.T if op.kind == "conv1d" else weight

    def bias(self, op: Op) -> torch.Tensor | None:
        has_one = "bias" in dict(self.block.get_submodule(op.name).named_parameters(recurse=False))
        return self._parameter(op.name, "bias") if has_one else None

    def gram(self, space: Space) -> torch.Tensor:
        """X^T X [C, C] of the space as it is now, after every scale folded so far."""
        if space.name not in self._grams:
            self._grams[space.name] = self.stats[space.name].gram
        return self._grams[space.name]

    def mean_abs(self, space: Space) -> torch.Tensor:
        """Mean |x| [C] of the space as it is now."""
        return self.stats[space.name].mean_abs / self._scales.get(space.name, 1)

    def observe(self, space: Space, stats: InputStats) -> None:
        """Take the statistics of a space's inputs as they are now, with every scale in them."""
        self.forget(space)
        self.stats[space.name] = stats

    def forget(self, space: Space) -> None:
        """Give the memory of the space's statistics back."""
        self.stats.pop(space.name, None)
        self._grams.pop(space.name, None)
        self._scales.pop(space.name, None)

    def max_abs(self, space: Space) -> torch.Tensor:
        """Max |x| [C] of the space as it is now."""
        return self.stats[space.name].max_abs / self._scales.get(space.name, 1)

    def sample(self, space: Space) -> torch.Tensor:
        """Some of the space's inputs [S, C] as it is now."""
        return self.stats[space.name].sample / self._scales.get(space.name, 1)

    def scale_space(self, space: Space, scale_C: torch.Tensor) -> None:
        """Divide the space's channels by s and multiply its readers' columns: the block's function stays.

        scale_C: positive fp32, equal on columns that one writer channel feeds. What the writer's storage type makes of the
        division is what the readers undo, so a norm kept in bf16 adds no error of its own.
        """
        if space.fold is None:
            raise ValueError(f"space {space.name} has no proven fold")
        scale_C = self._scale_writer(space.fold, scale_C)
        for op in self.topology.readers(space):
            self.weight(op).mul_(scale_C)
            self.rewritten.add(f"{op.name}.weight")
        if "gram" in self.stats[space.name].needs:
            self._grams[space.name] = self.gram(space) / scale_C / scale_C[:, None]
        self._scales[space.name] = self._scales.get(space.name, 1) * scale_C

    def finish(self, op: Op, q: QTensor) -> None:
        self.results[op.name] = q

    @property
    def carried(self) -> set[str]:
        """Rewritten parameters that no result takes the place of."""
        return self.rewritten - {f"{op}.weight" for op in self.results}

    def install(self, op: Op) -> None:
        """Make the block compute with the op's result, until `close`."""
        q = self.results[op.name]
        self.weight(op).copy_(q.dequantize())
        if q.grid.inputs is not None:
            module = self.block.get_submodule(op.name)
            self._hooks.append(module.register_forward_pre_hook(_rounding_hook(q.grid.inputs, q.input_scale)))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _scale_writer(self, fold: Fold, scale_C: torch.Tensor) -> torch.Tensor:
        """Divide the writer's channels by the scale; returns the scale that the stored writer really has, per column."""
        op = self.topology.op(fold.writer)
        weight, bias = self.weight(op), self.bias(op)
        rows = torch.arange(op.out_features) if fold.rows is None else torch.tensor(fold.rows)
        s_R = torch.ones(op.out_features).scatter_(0, rows, scale_C)
        if fold.law != "linear":
            offset = 1.0 if fold.law == "one_plus" else 0.0
            old = weight + offset
            new = (old / s_R - offset).to(self.stored[f"{op.name}.weight"]).float()
            # Channels that rounding would lose (or that are zero) keep their weight, and so their scale of one.
            ok = (new + offset != 0) & (old != 0)
            new = torch.where(ok, new, weight)
            s_R = torch.where(ok, old / (new + offset), torch.ones(()))
            weight.copy_(new)
        else:
            weight.div_(s_R[:, None])
        self.rewritten.add(f"{op.name}.weight")
        if bias is not None:
            bias.div_(s_R)
            self.rewritten.add(f"{op.name}.bias")
        return s_R[rows]

    def _parameter(self, op_name: str, name: str) -> torch.Tensor:
        return self.block.get_submodule(op_name).get_parameter(name).data


def _rounding_hook(inputs: Inputs, scale: torch.Tensor | None) -> Callable[..., tuple[torch.Tensor, ...]]:
    return lambda _, args: (inputs.round(args[0], scale).to(args[0].dtype), *args[1:])


def obstacle(work: BlockWork, space: Space, targets: int) -> str:
    """Why the space cannot be scaled, or nothing. Layers that stay as they are must not change by a scale's rounding."""
    if space.fold is None:
        return space.reason
    if targets < len(space.readers):
        return "some of its readers stay as they are"
    if space.fold.law == "linear" and space.fold.writer not in work.grids:
        return f"its writer {space.fold.writer} stays as it is"
    return ""


def shared(x_C: torch.Tensor, space: Space, how: str) -> torch.Tensor:
    """Each column's value replaced by the "mean" or "amax" over the columns that the same writer channel feeds."""
    if space.fold is None or space.fold.rows is None:
        return x_C
    rows = torch.tensor(space.fold.rows)
    return torch.zeros(int(rows.max()) + 1).scatter_reduce(0, rows, x_C, how, include_self=False)[rows]
