"""A quantized weight: made once by a solver, then only renamed, packed and unpacked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch

from infopt.grid import Grid
from infopt.memory import bytes_of


@dataclass(frozen=True)
class QTensor:
    """codes uint8 [O, I] as `grid.pack` makes them, scale [R, G] in `grid.scale_dtype`, zero uint8 [R, G]:
    W = (codes - zero) * scale.

    input_scale: fp32 [1], where the grid says that the layer's inputs are rounded, and not dynamically.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    grid: Grid
    input_scale: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def to(self, device: torch.device | str) -> QTensor:
        """The same on a device."""
        given = None if self.input_scale is None else self.input_scale.to(device)
        return replace(
            self, codes=self.codes.to(device), scale=self.scale.to(device), zero=self.zero.to(device), input_scale=given
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """W [O, I], computed in fp32 and rounded once to `dtype`."""
        rows, columns = self.shape
        scale, zero = (self.grid.spread(part.float(), rows, columns) for part in (self.scale, self.zero))
        w_OGK = self.grid.unpack(self.codes).view(*scale.shape[:2], -1)
        return w_OGK.sub_(zero).mul_(scale).view(rows, columns).to(dtype)

    def digest(self) -> str:
        """sha256 of everything that decides the layer's arithmetic: one digest means the same numbers, bit for bit."""
        total = hashlib.sha256(repr((self.grid, self.shape)).encode())
        for part in (self.codes, self.scale, self.zero, self.input_scale):
            if part is not None:
                total.update(bytes_of(part).numpy().data)
        return total.hexdigest()
