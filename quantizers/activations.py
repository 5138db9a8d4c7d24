"""Static scales for the inputs of layers: chosen once, from calibration, so that a server need not look for maxima.

The largest value seen wastes codes on outliers, so the range is shrunk by the ratio with the smallest error of the outputs.
That of floats is not: their error is relative, and it may only grow, by less than two.
Errors of different channels are taken as independent, which needs no product per candidate:

    err(r) = sum over c of ||W_:c||^2 * sum over sampled tokens of (x_c - r(x_c))^2

All readers of a space share the scale, because servers fuse them.

Legend: O output channels, C channels of a space, S sampled tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from infopt.grid import Inputs
from infopt.quantizers.rounding import CLIPPING, OCTAVE
from infopt.quantizers.work import BlockWork
from infopt.topology import Op, Space


@dataclass(frozen=True)
class InputScale:
    """Step `input_scale`, after the step that rounds: the scale of layers whose inputs are static. search: see the module."""

    search: bool = True
    needs = frozenset({"max", "sample"})
    rewrites = False

    def __call__(self, work: BlockWork, space: Space) -> None:
        by_inputs: dict[Inputs, list[Op]] = {}
        for op in work.topology.readers(space):
            inputs = work.grids[op.name].inputs if op.name in work.results else None
            if inputs is not None and not inputs.dynamic:
                by_inputs.setdefault(inputs, []).append(op)
        for inputs, ops in by_inputs.items():
            scale = self._scale(work, space, inputs, ops)
            for op in ops:
                work.results[op.name] = replace(work.results[op.name], input_scale=scale)

    def _scale(self, work: BlockWork, space: Space, inputs: Inputs, ops: list[Op]) -> torch.Tensor:
        x_SC, most = work.sample(space), float(work.max_abs(space).max())
        cost_C = torch.stack([work.weight(op).square().sum(0) for op in ops]).sum(0)

        def scale(ratio: float) -> torch.Tensor:
            return torch.tensor([max(ratio * most / inputs.largest, 2.0**-40)])

        def error(ratio: float) -> float:
            return float(((inputs.round(x_SC, scale(ratio)) - x_SC).square_().sum(0) * cost_C).sum(dtype=torch.float64))

        return scale(min(CLIPPING if inputs.kind == "int" else OCTAVE, key=error) if self.search else 1.0)
