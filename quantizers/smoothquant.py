"""SmoothQuant: move the outliers of the activations into the weights, where they do less harm.

Xiao et al. 2022 (arXiv:2211.10438), eq. 4: the inputs of a space are divided by, and its readers' columns multiplied with,

    s_j = max|X_j|^a / max|W_j|^(1-a)

so that both are easy to round to 8 bits. Changed here, and why: the migration strength `a` is found for each space by the
output error that it leaves, on a sample of the calibration tokens, with the weights and the inputs rounded as they will be:

    err(a) = sum over readers of || r(X / s) Q(W s)^T - X W^T ||^2

and no migration at all is one of the candidates; 1/s folds into whatever op the topology *proved* to write the space (norms,
and the linears before v -> o and up -> down, whose own scales per row take it up without loss), not into a table of norms.

Legend: O output channels, C channels of a space, S sampled tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from infopt.grid import Grid
from infopt.quantizers.rounding import rounded
from infopt.quantizers.work import BlockWork, obstacle, shared
from infopt.topology import Space

_STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def scale_for(max_x_C: torch.Tensor, max_w_C: torch.Tensor, strength: float) -> torch.Tensor:
    """s [C]; channels that no input or no weight uses keep 1."""
    alive = (max_x_C > 0) & (max_w_C > 0)
    s_C = max_x_C.pow(strength) / max_w_C.pow(1 - strength)
    return torch.where(alive, s_C.clamp(1e-5, 1e5), torch.ones(()))


def migration_error(weights: list[tuple[torch.Tensor, Grid]], x_SC: torch.Tensor, s_C: torch.Tensor) -> float:
    """The squared error of all readers' outputs on the sample, weights and inputs rounded after the migration."""
    total = 0.0
    for w_OC, grid in weights:
        q_OC = rounded(w_OC * s_C, grid)
        moved_SC = x_SC / s_C
        if grid.inputs is not None:
            static = None if grid.inputs.dynamic else (moved_SC.abs().amax() / grid.inputs.largest).view(1)
            moved_SC = grid.inputs.round(moved_SC, static)
        total += float((moved_SC @ q_OC.T - x_SC @ w_OC.T).square_().sum(dtype=torch.float64))
    return total


@dataclass(frozen=True)
class Smooth:
    """Step `smooth`. strength: the exponent of the activations; search: try others, and none, for each space."""

    strength: float = 0.5
    search: bool = True
    needs = frozenset({"max", "sample"})
    rewrites = True

    def __call__(self, work: BlockWork, space: Space) -> None:
        weights = [(work.weight(op), grid) for op, grid in work.targets(space)]
        if not weights:
            return
        if reason := obstacle(work, space, len(weights)):
            work.notes.append(f"{space.name}: not smoothed ({reason})")
            return
        max_x_C = shared(work.max_abs(space), space, "amax")
        max_w_C = shared(torch.stack([w_OC.abs().amax(0) for w_OC, _ in weights]).amax(0), space, "amax")
        candidates = [scale_for(max_x_C, max_w_C, self.strength)]
        if self.search:
            others = [scale_for(max_x_C, max_w_C, a) for a in _STRENGTHS if a != self.strength]
            candidates = [torch.ones_like(max_x_C), *candidates, *others]
            x_SC = work.sample(space)
            candidates.sort(key=lambda s_C: migration_error(weights, x_SC, s_C))
        if bool((candidates[0] != 1).any()):
            work.scale_space(space, candidates[0])
