"""AWQ's scale search: protect the columns that see large activations, before anything is rounded.

Lin et al. 2023 (arXiv:2306.00978), eq. 4-5: multiply a weight's columns by s = a^alpha, a = mean |x| per channel, and divide
the inputs by s. A column with a large scale keeps more of its precision inside its group. alpha is found by search:

    err(alpha) = sum over readers of tr(D H D^T),   D = Q(W s) / s - W,   H = X^T X

Changed here, and why: the error is a quadratic form in the Gram matrix that is already there, so one candidate costs one
product of the weight's size instead of a forward pass of the block; the search is coarse to fine (a smooth
curve with one valley: nine candidates find what a grid of twenty finds) and looks at 256 output channels of each reader,
evenly spread, for one scale serves them all; 1/s folds into whatever op the topology *proved*
to write the space, so there is no table of layer names; spaces without a proven writer are left alone and noted.
Channels that one writer channel feeds (grouped heads) share their scale: the mean of their activations decides.

Legend: O output channels, I = C input columns, R channels of the writer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from infopt.grid import Grid
from infopt.quantizers.rounding import rounded
from infopt.quantizers.work import BlockWork, obstacle, shared
from infopt.topology import Space

_ROWS = 256  # output channels of a reader that the search looks at
_COARSE = (0.0, 0.25, 0.5, 0.75, 1.0)


def scale_for(mean_abs_C: torch.Tensor, alpha: float) -> torch.Tensor:
    """s [C] = a^alpha, normalised so that its largest and smallest value are reciprocals; channels never seen keep 1."""
    if alpha == 0:
        return torch.ones_like(mean_abs_C)
    alive = mean_abs_C > 0
    s_C = torch.where(alive, mean_abs_C, torch.ones(())).pow(alpha).clamp(1e-4, 1e4)
    if alive.any():
        s_C = s_C / (s_C[alive].max() * s_C[alive].min()).sqrt()
    return torch.where(alive, s_C, torch.ones(()))


def output_error(d_OI: torch.Tensor, h_CC: torch.Tensor) -> float:
    """||X D^T||^2 = tr(D H D^T)."""
    return float(((d_OI @ h_CC) * d_OI).sum(dtype=torch.float64))


def search(
    weights: list[tuple[torch.Tensor, Grid]], h_CC: torch.Tensor, mean_abs_C: torch.Tensor
) -> tuple[float, float, float]:
    """(the best alpha, its error, the error of alpha 0) for the weights [O, I] that read one space."""
    errors: dict[float, float] = {}

    def error(alpha: float) -> float:
        if alpha not in errors:
            s_C = scale_for(mean_abs_C, alpha)
            errors[alpha] = sum(_rounding_error(w_OI, grid, s_C, h_CC) for w_OI, grid in weights)
        return errors[alpha]

    best = min(_COARSE, key=error)
    for step in (0.125, 0.0625):
        near = [alpha for alpha in (best - step, best, best + step) if 0 <= alpha <= 1]
        best = min(near, key=error)
    return best, errors[best], errors[0.0]


def _rounding_error(w_OI: torch.Tensor, grid: Grid, s_C: torch.Tensor, h_CC: torch.Tensor) -> float:
    return output_error(rounded(w_OI * s_C, grid).div_(s_C).sub_(w_OI), h_CC)


def _some_rows(weights: list[tuple[torch.Tensor, Grid]]) -> list[tuple[torch.Tensor, Grid]]:
    """The same part of every reader's output channels, evenly spread; all of them where rows share their scales."""
    stride = -(-max((len(w_OI) for w_OI, _ in weights), default=1) // _ROWS)
    return [(w_OI[::stride] if grid.rows == 1 else w_OI, grid) for w_OI, grid in weights]


@dataclass(frozen=True)
class AWQScale:
    """Step `awq_scale`: search and fold one scale per space, for spaces whose readers are to be quantized."""

    needs = frozenset({"gram", "mean"})
    rewrites = True

    def __call__(self, work: BlockWork, space: Space) -> None:
        weights = _some_rows([(work.weight(op), grid) for op, grid in work.targets(space)])
        if not weights:
            return
        if reason := obstacle(work, space, len(weights)):
            work.notes.append(f"{space.name}: no AWQ scale ({reason})")
            return
        mean_abs_C = shared(work.mean_abs(space), space, "mean")
        alpha, least, plain = search(weights, work.gram(space), mean_abs_C)
        if least < plain:
            work.scale_space(space, scale_for(mean_abs_C, alpha))
