"""Rounding to the nearest code, on a grid whose range is chosen by its error.

Plain round-to-nearest spans each group from its smallest to its largest weight. That wastes codes on outliers, so the
range is shrunk by the ratio, one per group, that makes the *output* error smallest:

    err(r) = d^T H_g d,   d = w - Q_r(w),   H_g = the group's block of the Gram matrix of the inputs

which is AWQ's clip search (Lin et al. 2023, section 4) computed from the Gram matrix instead of from samples. Ratio 1 is
always a candidate, so the choice is never worse than minimum-maximum on the data that it sees.

Without calibration data H_g is the identity, and only ratios near 1 are tried: they undo what rounding the scale to 8
significant bits does to a group (SmolLM2-135M, 4 bits, group 64: perplexity 42.4 becomes 40.3), while clipping by the
error of the weights alone made that model worse. Integers of 8 bits keep the extremes: their steps are too small for that
harm.

Legend: O output channels, I input columns, R groups of rows, G groups of columns, K columns of a group (I = G * K).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from infopt.grid import Grid, to_fp8
from infopt.qtensor import QTensor
from infopt.quantizers.work import BlockWork
from infopt.topology import Op, Space

_CHUNK = 256  # rows whose candidates are tried together
CLIPPING = tuple(1 - 0.04 * i for i in range(13))  # 1.00, 0.96, ... 0.52
NEAR = tuple(1 + i / 128 for i in sorted(range(-6, 7), key=abs))  # steps of the significant bits of a bf16 scale
# Of floats: all the ways to lie between two powers of two, and nothing is cut off.
OCTAVE = tuple(1 + i / 16 for i in range(16))


def choose_range(
    w_OI: torch.Tensor, grid: Grid, weight: torch.Tensor | None = None, ratios: tuple[float, ...] = CLIPPING
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero), fp32 [R, G] and ready to store, for weights fp32 [O, I].

    weight: how much an error costs: None (equally), [I] (per column), or [G, K, K] (a quadratic form per group; not for
    blocks that are cut short). ratios: candidates for the range as a part of the extremes, the first one first.
    """
    rows, columns = w_OI.shape
    if grid.rows == 1 and len(ratios) > 1 and rows > _CHUNK:  # a few rows at a time stay in the processor's cache
        parts = [choose_range(part, grid, weight, ratios) for part in w_OI.split(_CHUNK)]
        return torch.cat([scale for scale, _ in parts]), torch.cat([zero for _, zero in parts])
    width = grid.width(columns)
    w_OGK = F.pad(w_OI, (0, -columns % width)).view(rows, -1, width)
    low_RG = -_by_rows(-w_OGK.amin(-1), grid, "amax").clamp_min(0)
    high_RG = _by_rows(w_OGK.amax(-1), grid, "amax").clamp_min(0)
    ratios_N11 = torch.tensor(ratios)[:, None, None]
    scale_NRG, zero_NRG = grid.range(low_RG * ratios_N11, high_RG * ratios_N11)
    if len(ratios) == 1:
        return scale_NRG[0], zero_NRG[0]
    if weight is not None and weight.dim() == 1:
        weight = F.pad(weight, (0, -columns % width))

    def error(scale_RG: torch.Tensor, zero_RG: torch.Tensor) -> torch.Tensor:
        if grid.rows != 1:
            scale_RG, zero_RG = (part.repeat_interleave(grid.rows or rows, 0)[:rows] for part in (scale_RG, zero_RG))
        return _by_rows(_error(w_OGK, grid, scale_RG[..., None], zero_RG[..., None], weight), grid, "sum")

    errors_NRG = torch.stack([error(scale, zero) for scale, zero in zip(scale_NRG, zero_NRG, strict=True)])
    best_1RG = errors_NRG.argmin(0, keepdim=True)  # the first of equals
    return scale_NRG.gather(0, best_1RG)[0], zero_NRG.gather(0, best_1RG)[0]


def _by_rows(part_OG: torch.Tensor, grid: Grid, how: str) -> torch.Tensor:
    """[R, G] from [O, G]: the maximum or the sum over the rows that share a scale."""
    if grid.rows == 1:
        return part_OG
    height = grid.rows or len(part_OG)
    padded = F.pad(part_OG, (0, 0, 0, -len(part_OG) % height), value=float("-inf") if how == "amax" else 0.0)
    return getattr(padded.view(-1, height, part_OG.shape[1]), how)(1)


def _error(
    w_OGK: torch.Tensor, grid: Grid, scale: torch.Tensor, zero: torch.Tensor, weight: torch.Tensor | None
) -> torch.Tensor:
    # In place: this is called for every candidate on every weight of the model, and memory traffic is its whole cost.
    d_OGK = torch.div(w_OGK, scale)
    if grid.kind == "float":
        d_OGK = to_fp8(d_OGK).float().mul_(scale).sub_(w_OGK)
    elif grid.symmetric:
        d_OGK.round_().clamp_(-grid.middle, grid.levels - grid.middle).mul_(scale).sub_(w_OGK)
    else:
        d_OGK.add_(zero).round_().clamp_(0, grid.levels).sub_(zero).mul_(scale).sub_(w_OGK)
    if weight is None:
        return d_OGK.square_().sum(-1)
    if weight.dim() == 1:
        return d_OGK.square_().mul_(weight.view(d_OGK.shape[1:])).sum(-1)
    moved_GOK = torch.bmm(d_OGK.transpose(0, 1), weight)
    return moved_GOK.mul_(d_OGK.transpose(0, 1)).sum(-1).T


def round_nearest(w_OI: torch.Tensor, grid: Grid, scale_RG: torch.Tensor, zero_RG: torch.Tensor) -> QTensor:
    """The QTensor of the nearest codes on a chosen range."""
    scale, zero = (grid.spread(part, *w_OI.shape) for part in (scale_RG, zero_RG))
    codes = grid.encode(w_OI.reshape(*scale.shape[:2], -1), scale, zero)
    return QTensor(grid.pack(codes).view(w_OI.shape), scale_RG.to(grid.scale_dtype), zero_RG.to(torch.uint8), grid)


def rounded(w_OI: torch.Tensor, grid: Grid) -> torch.Tensor:
    """W as plain rounding between the extremes leaves it, fp32 [O, I]: what searches try their candidates with."""
    scale, zero = (grid.spread(part, *w_OI.shape) for part in choose_range(w_OI, grid, ratios=(1.0,)))
    w_OGK = w_OI.reshape(*scale.shape[:2], -1)
    return grid.decode(grid.encode(w_OGK, scale, zero), scale, zero).view(w_OI.shape)


def group_forms(gram_CC: torch.Tensor, width: int) -> torch.Tensor:
    """The diagonal blocks [G, K, K] of a Gram matrix, one per group of `width` columns."""
    groups = gram_CC.shape[0] // width
    return gram_CC.view(groups, width, groups, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def together(work: BlockWork, space: Space) -> Iterator[tuple[list[Op], Grid, torch.Tensor]]:
    """(ops, their grid, their weights one above the other, fp32 [O, I]) for what is to be solved as one in a space.

    Readers of one space share its statistics; where a whole tensor has one scale they share that as well, because servers
    fuse them. Blocks of rows must not reach from one op into the next.
    """
    by_grid: dict[tuple[Grid, str], list[Op]] = {}
    for op, grid in work.targets(space):
        by_grid.setdefault((grid, op.name if grid.strategy == "block" else ""), []).append(op)
    for (grid, _), ops in by_grid.items():
        yield ops, grid, torch.cat([work.weight(op) for op in ops])


def finish(work: BlockWork, ops: list[Op], q: QTensor) -> None:
    """Hand each op its rows of the common result."""
    sizes = [op.out_features for op in ops]
    whole = q.grid.rows != 1  # then there is one op, or one scale
    scales = [q.scale] * len(ops) if whole else q.scale.split(sizes)
    zeros = [q.zero] * len(ops) if whole else q.zero.split(sizes)
    for op, codes, scale, zero in zip(ops, q.codes.split(sizes), scales, zeros, strict=True):
        work.finish(op, QTensor(codes, scale, zero, q.grid))


@dataclass(frozen=True)
class Round:
    """Step `round`: every op to its nearest codes. search: clip each group's range by its error on the calibration inputs."""

    search: bool = True
    rewrites = False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gram"} if self.search else ())

    def __call__(self, work: BlockWork, space: Space) -> None:
        for ops, grid, w_OI in together(work, space):
            weight = None
            width = grid.width(w_OI.shape[1])
            if self.search and space.name in work.stats and w_OI.shape[1] % width == 0:
                weight = group_forms(work.gram(space), width)
            finish(work, ops, round_nearest(w_OI, grid, *choose_range(w_OI, grid, weight, self._ratios(grid))))

    def _ratios(self, grid: Grid) -> tuple[float, ...]:
        """What is tried: where one scale serves a whole tensor of floats, cutting its largest weights off buys nothing."""
        if (grid.kind, grid.strategy) == ("float", "tensor"):
            return OCTAVE
        unsearched = (1.0,) if (grid.kind, grid.bits) == ("int", 8) else NEAR
        return CLIPPING if self.search else unsearched
