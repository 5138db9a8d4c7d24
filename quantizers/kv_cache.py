"""Static scales for the key-value cache, chosen by the error that they leave and not by the largest value alone.

For every tensor, head or channel the range is shrunk by the ratio that makes the squared error of what the cache gives back
smallest, on a sample of the calibration tokens:

    err(r) = sum over tokens of || x - Q_r(x) ||^2

FP8 has as fine a grid at 1/16 of its range as at all of it, so for it the choice is mostly about the smallest values.

Legend: N windows, H key-value heads, T tokens, D channels of a head.
"""

from __future__ import annotations

import torch

from infopt.kv_cache import CacheGrid, CacheScales
from infopt.quantizers.rounding import CLIPPING

_SPREAD = tuple(2.0**-i * part for i in range(5) for part in (1.0, 0.84, 0.71, 0.59))


def choose_scales(grid: CacheGrid, seen: dict[str, list[torch.Tensor]]) -> CacheScales:
    """The best scales for the keys and values [N, H, T, D] of one layer."""
    scale, zero = {}, {}
    for which, parts in seen.items():
        scale[which], zero[which] = _best(grid, torch.cat(parts))
    return CacheScales(scale, zero)


def _best(grid: CacheGrid, x_NHTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    best = grid.range(x_NHTD)
    least = grid.error(x_NHTD, *best)
    for ratio in (CLIPPING if grid.kind == "int" else _SPREAD)[1:]:
        scale, zero = grid.range(x_NHTD, ratio)
        error = grid.error(x_NHTD, scale, zero)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
    return best
