"""A numeric type is a value: how many bits, how many columns share a scale, where zero lies, and how a scale is stored.

An integer grid holds codes u in 0 .. 2^b - 1 and means w = (u - z) * s. A symmetric grid has z = 2^(b-1) everywhere, so
every on-disk convention (signed codes, offset codes, stored zero points) is a shift of this one. Scales are rounded to
their storage type *before* the first division: whoever reads the bytes back computes with the number that the solver
used, and the codes never need rounding again.

Legend: O output channels, I input columns, G groups of columns, K columns of one group (I = G * K).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from infopt.errors import UsageError

BITS = (2, 3, 4, 8)
GROUPS = (32, 64, 128)
#: The smallest scale that is stored: a group of zeros still needs a finite, non-zero scale in every storage type.
_SMALLEST = 2.0**-14


@dataclass(frozen=True)
class Grid:
    """An integer grid. `group` is the number of columns that share a scale; None means a whole output channel.

    scale_bits: significant bits of a scale, where a solver must use fewer than `scale_dtype` has; no part of what the
    numbers mean, so two grids that differ in it are equal.
    """

    bits: int = 4
    group: int | None = 64
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.bfloat16
    scale_bits: int | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UsageError(f"{self.bits} bits", f"integer grids have {_words(BITS)} bits", "choose one with --bits")
        if self.group is not None and self.group < 1:
            raise UsageError(f"group size {self.group}", "it must be positive, or 'channel'", "try --group-size 64")

    @property
    def levels(self) -> int:
        """The largest code, 2^b - 1."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid, 2^(b-1)."""
        return 2 ** (self.bits - 1)

    def width(self, columns: int) -> int:
        """Columns per group in a weight with this many columns."""
        return columns if self.group is None else self.group

    def fits(self, columns: int) -> bool:
        return columns % self.width(columns) == 0

    def stored(self, scale: torch.Tensor) -> torch.Tensor:
        """A positive fp32 scale rounded to what the file will hold, still fp32, never zero."""
        scale = scale.clamp_min(_SMALLEST)
        if self.scale_bits is not None:
            fraction, exponent = torch.frexp(scale.float())
            scale = torch.ldexp((fraction * 2**self.scale_bits).round(), exponent - self.scale_bits)
        return scale.to(self.scale_dtype).float()

    def range(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, zero), both fp32 and ready to store, of a grid that spans low <= 0 <= high (same shapes).

        Symmetric: s = 2 max|w| / (2^b - 1), so that both ends round to the outermost codes (the convention of
        compressed-tensors and GPTQ). Asymmetric: s = (high - low) / (2^b - 1), z = round(-low / s).
        """
        if self.symmetric:
            scale = self.stored(2 * torch.maximum(-low, high) / self.levels)
            return scale, torch.full_like(scale, self.middle)
        scale = self.stored((high - low) / self.levels)
        return scale, (-low / scale).round_().clamp_(0, self.levels)

    def encode(self, w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Nearest codes as fp32 whole numbers; all arguments fp32 and broadcastable."""
        return (w / scale).round_().add_(zero).clamp_(0, self.levels)

    def decode(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        return (codes - zero) * scale

    def bits_per_weight(self, columns: int) -> float:
        """Stored bits per weight, with the scales and zero points."""
        overhead = self.scale_dtype.itemsize * 8 + (0 if self.symmetric else self.bits)
        return self.bits + overhead / self.width(columns)


def _words(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values[:-1])) + f" or {values[-1]}"
