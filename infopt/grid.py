"""A numeric type is a value: how many bits, which weights share a scale, where zero lies, and how a scale is stored.

An integer grid holds codes u in 0 .. 2^b - 1 and means w = (u - z) * s. A symmetric grid has z = 2^(b-1) everywhere, so
every on-disk convention (signed codes, offset codes, stored zero points) is a shift of this one. A float grid holds the
values of an 8-bit floating type (E4M3: 4 bits of exponent, 3 of fraction, largest 448; OCP 8-bit Floating Point, 2023)
and means w = value * s. Scales are rounded to their storage type *before* the first division: whoever reads the bytes
back computes with the number that the solver used, and the codes never need rounding again.

`Inputs` is the same for the activations that a linear layer reads, which are rounded while the model runs.

Legend: O output channels, I input columns, G groups of columns, K columns of one group (I = G * K), R groups of rows,
T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from infopt.errors import UsageError

BITS = (2, 3, 4, 8)
GROUPS = (32, 64, 128)
Kind = Literal["int", "float"]
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
#: The smallest scale that is stored: a group of zeros still needs a finite, non-zero scale in every storage type.
_SMALLEST = {torch.float16: 2.0**-14}
_TINY = 2.0**-40


@dataclass(frozen=True)
class Inputs:
    """How a linear layer's inputs are rounded: 8 bits, symmetric, s = max|x| / 127 (int) or / 448 (E4M3).

    dynamic: the maximum is taken when the model runs, of each token (`group` None) or of each `group` columns of a token;
    otherwise one scale for the whole tensor comes from calibration.
    """

    kind: Kind = "int"
    dynamic: bool = True
    group: int | None = None

    @property
    def largest(self) -> float:
        return FP8_MAX if self.kind == "float" else 127.0

    def round(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., I] as the layer sees it, fp32. scale: fp32 [1] where the inputs are not dynamic."""
        values, scale = self.encode(x, scale)
        rounded = values * scale
        return rounded if self.group is None else rounded.flatten(-2)[..., : x.shape[-1]]

    def encode(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(values, scale) in fp32, whole numbers or values of E4M3: [..., G, K] and [..., G, 1] with groups, [..., I] and
        [..., 1] without, and the scale that was given where the inputs are not dynamic. A last group that is shorter is
        filled with zeros."""
        x = x.float()
        if not self.dynamic:
            if scale is None:
                raise ValueError("static inputs need a scale")
            return self._nearest(x, scale.float()), scale.float()
        parts = x
        if self.group is not None:  # the last group may be shorter, as blocks of a weight may be
            parts = torch.nn.functional.pad(x, (0, -x.shape[-1] % self.group)).unflatten(-1, (-1, self.group))
        # a token of zeros stays one, whatever it is divided by
        scale = (parts.abs().amax(-1, keepdim=True) / self.largest).clamp_min(_TINY)
        return self._nearest(parts, scale), scale

    def _nearest(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if self.kind == "float":
            return to_fp8(x / scale).float()
        return (x / scale).round_().clamp_(-128, 127)


@dataclass(frozen=True)
class Grid:
    """The numeric type of a weight. group: columns that share a scale, None for all of a row. rows: rows that share one,
    None for all of them: (64, 1) are groups, (None, 1) channels, (None, None) the whole tensor, (128, 128) blocks.
    inputs: how the inputs of a layer with such a weight are rounded, None if they are not.

    scale_bits: significant bits of a scale, where a solver must use fewer than `scale_dtype` has; no part of what the
    numbers mean, so two grids that differ in it are equal.
    """

    bits: int = 4
    group: int | None = 64
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.bfloat16
    scale_bits: int | None = field(default=None, compare=False, repr=False)
    kind: Kind = "int"
    rows: int | None = 1
    inputs: Inputs | None = None

    def __post_init__(self) -> None:
        if self.bits not in BITS or (self.kind == "float" and not (self.bits == 8 and self.symmetric)):
            known = f"integer grids have {_words(BITS)} bits, float grids 8 and no zero point"
            raise UsageError(f"{self.bits} bits, {self.kind}", known, "choose one with --bits")
        if (self.group is not None and self.group < 1) or (self.rows is not None and self.rows < 1):
            raise UsageError(f"group size {self.group}", "it must be positive, or 'channel'", "try --group-size 64")

    @property
    def levels(self) -> int:
        """The largest code of an integer grid, 2^b - 1."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid: 2^(b-1), and 0 for floats."""
        return 0 if self.kind == "float" else 2 ** (self.bits - 1)

    @property
    def strategy(self) -> str:
        """The word of compressed-tensors for what shares a scale: group, channel, tensor or block."""
        if self.rows == 1:
            return "channel" if self.group is None else "group"
        return "tensor" if self.rows is None and self.group is None else "block"

    def width(self, columns: int) -> int:
        """Columns per group in a weight with this many columns."""
        return columns if self.group is None else self.group

    def fits(self, columns: int) -> bool:
        """Whether groups divide the columns; blocks may be cut short at the edges."""
        return self.strategy == "block" or columns % self.width(columns) == 0

    def scales(self, rows: int, columns: int) -> tuple[int, int]:
        """The shape [R, G] of the scales of a weight [rows, columns]."""
        return -(-rows // (self.rows or rows)), -(-columns // self.width(columns))

    def spread(self, part_RG: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """A scale or zero point per weight row and group of columns [O, G, 1], or [O, I, 1] where blocks are cut short."""
        part_OG = part_RG.repeat_interleave(self.rows or rows, 0)[:rows] if self.rows != 1 else part_RG
        if columns % self.width(columns):
            part_OG = part_OG.repeat_interleave(self.width(columns), 1)[:, :columns]
        return part_OG[..., None]

    def stored(self, scale: torch.Tensor) -> torch.Tensor:
        """A positive fp32 scale rounded to what the file will hold, still fp32, never zero."""
        scale = scale.clamp_min(_SMALLEST.get(self.scale_dtype, _TINY))
        if self.scale_bits is not None:
            fraction, exponent = torch.frexp(scale.float())
            scale = torch.ldexp((fraction * 2**self.scale_bits).round(), exponent - self.scale_bits)
        return scale.to(self.scale_dtype).float()

    def range(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, zero), both fp32 and ready to store, of a grid that spans low <= 0 <= high (same shapes).

        Symmetric: s = 2 max|w| / (2^b - 1), so that both ends round to the outermost codes (the convention of
        compressed-tensors and GPTQ). Asymmetric: s = (high - low) / (2^b - 1), z = round(-low / s). Float: s = max|w| / 448.
        """
        if self.symmetric:
            most = torch.maximum(-low, high)
            scale = self.stored(most / FP8_MAX if self.kind == "float" else 2 * most / self.levels)
            return scale, torch.full_like(scale, self.middle)
        scale = self.stored((high - low) / self.levels)
        return scale, (-low / scale).round_().clamp_(0, self.levels)

    def encode(self, w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Nearest codes as fp32 numbers (whole ones, or values of the float type); fp32 arguments, broadcastable."""
        if self.kind == "float":
            return to_fp8(w / scale).float()
        return (w / scale).round_().add_(zero).clamp_(0, self.levels)

    def decode(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        return (codes - zero) * scale

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """What `encode` gives, in one byte each: uint8 numbers, or the bits of the float type."""
        return codes.to(FP8).view(torch.uint8) if self.kind == "float" else codes.to(torch.uint8)

    def unpack(self, codes: torch.Tensor) -> torch.Tensor:
        """fp32 numbers from packed codes."""
        return codes.view(FP8).float() if self.kind == "float" else codes.float()

    def bits_per_weight(self, columns: int) -> float:
        """Stored bits per weight, with the scales and zero points."""
        overhead = self.scale_dtype.itemsize * 8 + (0 if self.symmetric else self.bits)
        return self.bits + (overhead / self.width(columns) / self.rows if self.rows else 0.0)


def to_fp8(x: torch.Tensor) -> torch.Tensor:
    """Nearest E4M3 values, the largest for everything beyond it (torch's own conversion would give NaN)."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def _words(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values[:-1])) + f" or {values[-1]}"
