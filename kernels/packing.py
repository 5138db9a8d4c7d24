"""A quantized weight as the kernels for GPUs read it; in torch.

Bytes of 8-bit weights are the codes. Of 4 bits (or fewer), nibbles lie in planes: in a part of 32 columns or more, byte i
holds columns i and i + half in its lower and upper half. A row is filled up to whole parts.

Legend: I input columns, O output channels, G scales of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from infopt.errors import Unsupported
from infopt.grid import FP8
from infopt.qtensor import QTensor

_PARTS = (128, 64, 32)
MIDDLE = {"int4": 8, "int8": 128, "fp8": 0}


@dataclass(frozen=True)
class Packed:
    """A weight [O, I]. kind: "int4", "int8" or "fp8". part: columns of one step of a kernel, which share a scale.
    zero is None where it is the middle."""

    codes: Tensor
    scale_OG: Tensor
    zero_OG: Tensor | None
    kind: str
    part: int
    columns: int

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.codes, self.scale_OG, self.zero_OG) if part is not None)

    @property
    def group(self) -> int:
        """Columns per scale, counting those that rows are filled up with."""
        return -(-self.columns // self.part) * self.part // self.scale_OG.shape[1]

    @staticmethod
    def of(q: QTensor) -> Packed:
        """Raises Unsupported for groups of another size, and for scales that are not of rows."""
        width = q.grid.width(q.shape[1])
        part = next((part for part in _PARTS if width % part == 0), 32)
        if q.grid.rows != 1 or (q.grid.group is not None and width % part):
            what = f"a weight with scales of {q.grid.strategy}s of {width}"
            raise Unsupported(what, "The kernel knows groups of 32 columns, of multiples of them, and whole rows.")
        kind = "fp8" if q.grid.kind == "float" else "int8" if q.grid.bits == 8 else "int4"
        codes = _planes(q.codes, part) if kind == "int4" else q.codes.contiguous()
        same = q.grid.symmetric and q.grid.middle == MIDDLE[kind]
        return Packed(codes, q.scale.contiguous(), None if same else q.zero.contiguous(), kind, part, q.shape[1])

    def dequantize(self) -> Tensor:
        """W [O, I], fp32."""
        codes = self.codes
        if self.kind == "int4":
            bytes_OPH = codes.unflatten(1, (-1, self.part // 2))
            codes = torch.cat((bytes_OPH & 15, bytes_OPH >> 4), dim=-1).flatten(1)
        w_OI = (codes.view(FP8) if self.kind == "fp8" else codes)[:, : self.columns].float()
        scale_OI = self.scale_OG.float().repeat_interleave(self.group, 1)[:, : self.columns]
        if self.zero_OG is None:
            return (w_OI - MIDDLE[self.kind]) * scale_OI
        return (w_OI - self.zero_OG.float().repeat_interleave(self.group, 1)[:, : self.columns]) * scale_OI


def _planes(codes_OI: Tensor, part: int) -> Tensor:
    rows, columns = codes_OI.shape
    padded = torch.nn.functional.pad(codes_OI, (0, -columns % part))
    low, high = padded.view(rows, -1, 2, part // 2).unbind(2)
    return (low | high << 4).flatten(1).contiguous()
