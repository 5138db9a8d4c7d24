"""Static scales for the key-value cache, chosen by the error that they leave and not by the largest value alone.

For every tensor, head or channel the range is shrunk by the ratio that makes the squared error of what the cache gives back
smallest, on a sample of the calibration tokens:

    err(r) = sum over tokens of || x - Q_r(x) ||^2

FP8 has as fine a grid at 1/16 of its range as at all of it: a range that is too wide costs next to nothing, and a value beyond
it is cut off. So FP8 gets twice the extremes of the sample at least.

A balanced cache also has coordinates for each head, y = (x - center) M. Rounding y leaves errors e of nearly equal size in all
channels, each about as large as the channels' spread, and an error d = e M^-1 of x costs d G d^T, where G = E[g g^T] are the
derivatives g of the block's answer by x. With C the covariance of x the cost of a head is thus about

    sum over channels of (M^T C M)_jj (M^-1 G M^-T)_jj

With C^1/2 G C^1/2 = U L U^T, M = C^-1/2 U L^1/4 makes both matrices the diagonal L^1/2 and the cost sum L_jj. Turned by a
Hadamard matrix, which spreads both evenly, it is (sum L_jj^1/2)^2 / D, which is never more. (QuaRot, Ashkboos et al. 2024,
arXiv:2404.00456, turns without balancing.) Queries are not asked for: whatever a family does between the cache and its answer
is in the derivatives. The keys' center is their mean: it moves all scores of a query alike, which softmax does not see. The
values' is zero: taking their mean out made nothing better.

Legend: N windows, H key-value heads, T tokens, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from infopt.calibration.stats import HeadSums
from infopt.hadamard import rotation
from infopt.kv_cache import CacheGrid, CacheScales, Frame
from infopt.quantizers.rounding import CLIPPING

_SPREAD = tuple(2.0 * part for part in (1.0, 1.19, 1.41, 1.68, 2.0, 2.38, 2.83, 3.36))
_FLOOR = 1e-6  # of a matrix's largest eigenvalue: what no token showed is not to be trusted


def choose_scales(
    grid: CacheGrid, seen: Mapping[str, list[torch.Tensor]], frames: Mapping[str, Frame] | None = None
) -> CacheScales:
    """The best scales for the keys and values [N, H, T, D] of one layer, in their frames if there are any."""
    scale, zero, frames = {}, {}, frames or {}
    for which, parts in seen.items():
        x_NHTD = torch.cat(parts)
        scale[which], zero[which] = _best(grid, frames[which].enter(x_NHTD) if which in frames else x_NHTD)
    return CacheScales(scale, zero, frames)


def choose_frames(sums: Mapping[str, HeadSums]) -> dict[str, Frame]:
    """The coordinates of one layer's keys ("k") and values ("v")."""
    frames = {}
    for which, of in sums.items():
        tokens = max(of.tokens, 1)
        center_HD = of.sum_HD / tokens * (which == "k")
        covariance_HDD = of.gram_HDD / tokens - center_HD[:, :, None] * center_HD[:, None]
        turn_DD = rotation(center_HD.shape[1], seed=0).matrix()
        frames[which] = Frame((balance(covariance_HDD, of.felt_HDD) @ turn_DD).float(), center_HD.float())
    return frames


def balance(c_HDD: torch.Tensor, g_HDD: torch.Tensor) -> torch.Tensor:
    """M [H, D, D], float64, with M^T C M and M^-1 G M^-T the same diagonal but for a factor, which makes the mean of the first
    one 1; for positive semidefinite matrices."""
    root_HDD, inverse_HDD = _power(c_HDD, 0.5), _power(c_HDD, -0.5)
    values_HD, u_HDD = _eigen(root_HDD @ g_HDD @ root_HDD)
    size_H1 = values_HD.sqrt().mean(1, keepdim=True)
    return inverse_HDD @ u_HDD * (values_HD.pow(0.25) / size_H1.sqrt())[:, None]


def _power(a_HDD: torch.Tensor, exponent: float) -> torch.Tensor:
    values_HD, u_HDD = _eigen(a_HDD)
    return u_HDD * values_HD.pow(exponent)[:, None] @ u_HDD.mT


def _eigen(a_HDD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues [H, D], none of them near zero, and vectors; those of the identity for a matrix of zeros."""
    values_HD, u_HDD = torch.linalg.eigh((a_HDD + a_HDD.mT) / 2)
    largest_H1 = values_HD.amax(1, keepdim=True)
    return torch.where(largest_H1 > 0, values_HD.clamp_min(_FLOOR * largest_H1), 1.0), u_HDD


def _best(grid: CacheGrid, x_NHTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    first, *others = CLIPPING if grid.kind == "int" else _SPREAD
    best = grid.range(x_NHTD, first)
    least = grid.error(x_NHTD, *best)
    for ratio in others:
        scale, zero = grid.range(x_NHTD, ratio)
        error = grid.error(x_NHTD, scale, zero)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
    return best
