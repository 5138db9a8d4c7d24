"""A weight that torch packed for its int4 kernel, as fp32 again: for many tokens at once.

The int4 kernel is made for a few tokens. From about `MANY` on, writing the weight out in fp32 for one product and
forgetting it is faster than reading nibbles again for every four tokens, and needs no second copy of the codes: the packed
ones are read back.

How torch packs is not documented and depends on the processor (blocks of 64 rows with AVX-512, 32 with AVX2, other pairs
of rows in a block that is cut short). So the order of rows in a block is *found*, by packing rows that spell their own
number, and what is read back must equal the codes that went in; where it does not, there is no such path.

Legend: T tokens, I input columns, O output rows, G groups of columns, R rows of a block, N blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

MANY = 96
_BLOCKS = (64, 32, 16)


class Int4Dense:
    """packed: what torch's packing made of codes_OI. `find` makes one, or None."""

    def __init__(self, packed: Tensor, shape: tuple[int, int], block: int) -> None:
        self._packed, self._shape = packed.view(torch.uint8).flatten(), shape
        rows = shape[0]
        self._parts = [(0, rows // block, block)] if rows >= block else []
        if rows % block:
            self._parts.append((rows // block * block, 1, rows % block))
        self._orders = [_order(part) for _, _, part in self._parts]

    @staticmethod
    def find(packed: Tensor, codes_OI: Tensor) -> Int4Dense | None:
        shape = (codes_OI.shape[0], codes_OI.shape[1])
        for block in _BLOCKS:
            found = Int4Dense(packed, shape, block)
            if torch.equal(found.codes(torch.uint8), codes_OI.to(torch.uint8).t()):
                return found
        return None

    def codes(self, dtype: torch.dtype) -> Tensor:
        """codes_IO, the weight's transpose."""
        rows, columns = self._shape
        codes_IO = torch.empty(columns, rows, dtype=dtype)
        for (start, blocks, block), order_R in zip(self._parts, self._orders, strict=True):
            some = self._packed[start * columns // 2 : (start + blocks * block) * columns // 2]
            pairs = some.view(blocks, columns, block // 2)
            codes_NIR = torch.cat((pairs & 15, pairs >> 4), dim=-1)
            codes_NIR = codes_NIR if order_R is None else codes_NIR[..., order_R]
            target = codes_IO[:, start : start + blocks * block].unflatten(1, (blocks, block))
            target.copy_(codes_NIR.transpose(0, 1))
        return codes_IO

    def multiply(self, x_TI: Tensor, scale_offset_GO2: Tensor) -> Tensor:
        """y_TO fp32, w = (code - 8) * scale + offset."""
        scale_GO, offset_GO = scale_offset_GO2.float().unbind(-1)
        w_IO = self.codes(torch.float32)
        w_GKO = w_IO.unflatten(0, (len(scale_GO), -1))
        w_GKO.mul_(scale_GO[:, None]).add_((offset_GO - 8 * scale_GO)[:, None])
        return x_TI.float() @ w_IO


def _order(rows: int) -> Tensor | None:
    """Where each row of a block is among its nibbles, the low ones first; None where they are in order."""
    number_R2 = torch.arange(rows, dtype=torch.int32)[:, None].expand(rows, 2).contiguous()
    row_P = torch.zeros(rows, dtype=torch.int64)
    for digit in (0, 1):
        packed = torch._convert_weight_to_int4pack_for_cpu(number_R2 // 16**digit % 16, 1).view(torch.uint8).flatten()
        first = packed[: rows // 2].long()
        row_P += torch.cat((first & 15, first >> 4)) * 16**digit
    place_R = row_P.argsort()
    return None if torch.equal(place_R, torch.arange(rows)) else place_R
