"""Rounding to the nearest code, on a grid whose range is chosen by its error.

Plain round-to-nearest spans each group from its smallest to its largest weight. That wastes codes on outliers, so the
range is shrunk by the ratio, one per group of an output channel, that makes the *output* error smallest:

    err(r) = d^T H_g d,   d = w - Q_r(w),   H_g = the group's block of the Gram matrix of the inputs

which is AWQ's clip search (Lin et al. 2023, section 4) computed from the Gram matrix instead of from samples. Without
calibration data H_g is the identity, and the ratio minimises the squared weight error. Ratio 1 is always a candidate,
so the choice is never worse than minimum-maximum on the data that it sees.

Legend: O output channels, I input columns, G groups, K columns of a group (I = G * K).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from infopt.grid import Grid
from infopt.qtensor import QTensor
from infopt.quantizers.work import BlockWork
from infopt.topology import Space

_RATIOS = tuple(1 - 0.04 * i for i in range(13))  # 1.00, 0.96, ... 0.52


def choose_range(
    w_OI: torch.Tensor, grid: Grid, weight: torch.Tensor | None = None, ratios: tuple[float, ...] = _RATIOS
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero), fp32 [O, G] and ready to store, for weights fp32 [O, I].

    weight: how much an error costs: None (equally), [I] (per column), or [G, K, K] (a quadratic form per group).
    """
    rows, columns = w_OI.shape
    w_OGK = w_OI.reshape(rows, -1, grid.width(columns))
    low_OG = w_OGK.amin(-1).clamp_max(0)
    high_OG = w_OGK.amax(-1).clamp_min(0)
    best = grid.range(low_OG, high_OG)
    if len(ratios) == 1:
        return best
    least_OG = _error(w_OGK, grid, *best, weight)
    for ratio in ratios[1:]:
        scale, zero = grid.range(low_OG * ratio, high_OG * ratio)
        error_OG = _error(w_OGK, grid, scale, zero, weight)
        better = error_OG < least_OG
        least_OG = torch.where(better, error_OG, least_OG)
        best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
    return best


def _error(
    w_OGK: torch.Tensor, grid: Grid, scale_OG: torch.Tensor, zero_OG: torch.Tensor, weight: torch.Tensor | None
) -> torch.Tensor:
    scale, zero = scale_OG[..., None], zero_OG[..., None]
    # In place: this is called for every candidate on every weight of the model, and memory traffic is its whole cost.
    d_OGK = torch.div(w_OGK, scale).add_(zero).round_().clamp_(0, grid.levels).sub_(zero).mul_(scale).sub_(w_OGK)
    if weight is None:
        return d_OGK.square_().sum(-1)
    if weight.dim() == 1:
        return d_OGK.square_().mul_(weight.view(d_OGK.shape[1:])).sum(-1)
    moved_GOK = torch.bmm(d_OGK.transpose(0, 1), weight)
    return moved_GOK.mul_(d_OGK.transpose(0, 1)).sum(-1).T


def round_nearest(w_OI: torch.Tensor, grid: Grid, scale_OG: torch.Tensor, zero_OG: torch.Tensor) -> QTensor:
    """The QTensor of the nearest codes on a chosen range."""
    w_OGK = w_OI.reshape(*scale_OG.shape, -1)
    codes = grid.encode(w_OGK, scale_OG[..., None], zero_OG[..., None])
    return QTensor(codes.to(torch.uint8).view_as(w_OI), scale_OG.to(grid.scale_dtype), zero_OG.to(torch.uint8), grid)


def group_forms(gram_CC: torch.Tensor, width: int) -> torch.Tensor:
    """The diagonal blocks [G, K, K] of a Gram matrix, one per group of `width` columns."""
    groups = gram_CC.shape[0] // width
    return gram_CC.view(groups, width, groups, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Round:
    """Step `round`: every op to its nearest codes. search: choose each group's range by error instead of by its extremes."""

    search: bool = True
    needs_stats = False
    rewrites = False

    def __call__(self, work: BlockWork, space: Space) -> None:
        for op, grid in work.targets(space):
            w_OI = work.weight(op)
            weight = None
            if self.search and space.name in work.stats:
                weight = group_forms(work.gram(space), grid.width(w_OI.shape[1]))
            ratios = _RATIOS if self.search else _RATIOS[:1]
            work.finish(op, round_nearest(w_OI, grid, *choose_range(w_OI, grid, weight, ratios)))
