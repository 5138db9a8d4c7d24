"""A quantized weight: made once by a solver, then only renamed, packed and unpacked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from infopt.grid import Grid


@dataclass(frozen=True)
class QTensor:
    """codes uint8 [O, I] in 0..2^b-1, scale [O, G] in `grid.scale_dtype`, zero uint8 [O, G]: W = (codes - zero) * scale."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    grid: Grid

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """W [O, I], computed in fp32 and rounded once to `dtype`."""
        rows, columns = self.shape
        w_OGK = self.codes.view(rows, self.scale.shape[1], -1).float()
        w_OGK.sub_(self.zero.float()[..., None]).mul_(self.scale.float()[..., None])
        return w_OGK.view(rows, columns).to(dtype)

    def digest(self) -> str:
        """sha256 of the codes, scales and zero points: two tensors with one digest mean the same numbers, bit for bit."""
        total = hashlib.sha256(repr((self.grid, self.shape)).encode())
        for part in (self.codes, self.scale, self.zero):
            total.update(part.reshape(-1).view(torch.uint8).numpy().data)
        return total.hexdigest()
