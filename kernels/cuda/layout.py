"""A quantized weight as the decode kernels read it: the same bytes in another order, and back.

The order is stated in `decode.cuh`. Tiles of 16 output rows, chunks of 64 columns, for each of 32 lanes one vector of 16
bytes (4 bits) or two (8 bits). Nothing is rounded here: codes are moved, scales keep their own 16 bits (or 32), and
zero points stay whole numbers. A weight that does not fit (`pack` gives None) is multiplied dequantized.

Legend: O output rows, I input columns, G groups of columns, T tiles of 16 rows (h: upper or lower half, g: row in it),
C chunks of 64 columns (c: which 32 of them, t: which 8 of these, d: which 4, p: which 2, e: which one).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from infopt.grid import FP8
from infopt.qtensor import QTensor

Codes = Literal["INT4", "INT8", "FP8"]
CHUNK, TILE = 64, 16
_GROUPS = (128, 64, 32)
#: torch's 16-bit floats and fp32 by the names that the kernels have for them.
FLOATS = {torch.float16: "Half", torch.bfloat16: "Bfloat", torch.float32: "Float"}
# The order of a byte's parts in memory: T C, the vector and the lane (g t), and the byte in the vector. With 4 bits the two
# halves h are one byte's nibbles; E4M3 has row g in the odd bytes.
_ORDER = {"INT4": "TCgtcdep", "INT8": "TCcgtdphe", "FP8": "TCcgtdpeh"}
_NATURAL = "ThgCctdpe"


@dataclass(frozen=True)
class Packed:
    """weight int32 [T, C, vectors, 32 lanes, 4], scales int32 (see `Scales` in decode.cuh), and what they mean.

    group: columns per scale, 0 for one scale per row. zeros: whether each scale has its own zero point; otherwise it is
    `zero` everywhere. gated: the rows are a gate and a factor, eight by eight, and the product has half as many.
    arrived: the blocks' counters, zero between launches; so one weight belongs to one stream at a time.
    """

    weight: Tensor
    scales: Tensor
    arrived: Tensor
    shape: tuple[int, int]
    codes: Codes
    scale_dtype: torch.dtype
    group: int
    zeros: bool
    zero: int
    gated: bool = False

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.scales.nbytes

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """W [O, I], in the order of rows that it was packed from; computed in fp32 and rounded once."""
        rows, columns = self.shape
        scale_OG, zero_OG = _unpack_scales(self)
        codes_OI = _unpack_codes(self)
        numbers = codes_OI.view(FP8).float() if self.codes == "FP8" else codes_OI.float()
        w_OGK = numbers[:rows].view(rows, scale_OG.shape[1], -1)
        w_OI = w_OGK.sub_(zero_OG[..., None]).mul_(scale_OG[..., None]).view(rows, columns).to(dtype)
        return ungated(w_OI) if self.gated else w_OI


def pack(q: QTensor, gated: bool = False) -> Packed | None:
    """The weight in the kernels' order, None where no kernel reads it.

    gated: q's rows are [gate; factor] of a gated MLP, as many of each, and the kernel multiplies silu(gate) by the factor.
    """
    rows, columns = q.shape
    if q.grid.inputs is not None or columns % CHUNK or (gated and rows % TILE) or columns % q.grid.width(columns):
        return None
    scale_OG, zero_OG = (q.grid.spread(part, rows, columns)[..., 0] for part in (q.scale, q.zero))
    dtype = _scale_dtype(scale_OG)
    group = 0 if scale_OG.shape[1] == 1 else next((g for g in _GROUPS if columns // scale_OG.shape[1] % g == 0), None)
    zeros = not q.grid.symmetric
    if group is None or (group and zeros and dtype is torch.float32):
        return None
    codes_OI = q.codes
    if group:
        repeats = columns // group // scale_OG.shape[1]
        scale_OG, zero_OG = scale_OG.repeat_interleave(repeats, 1), zero_OG.repeat_interleave(repeats, 1)
    if gated:
        codes_OI, scale_OG, zero_OG = map(_gated, (codes_OI, scale_OG, zero_OG))
    codes: Codes = "FP8" if q.grid.kind == "float" else "INT8" if q.grid.bits == 8 else "INT4"
    if codes == "FP8" and (codes_OI & 0x7F == 0x7F).any():
        return None  # NaN: what it means is not for a kernel to say
    weight = _pack_codes(_padded(codes_OI), codes)
    scales = _pack_scales(_padded(scale_OG).to(dtype), _padded(zero_OG), group, zeros)
    arrived = torch.zeros(-(-rows // TILE), dtype=torch.int32, device=q.codes.device)
    if weight.is_cuda and torch.cuda.is_available():
        torch.cuda.synchronize(weight.device)  # `decode.cuh` reads weights without waiting for the kernel before
    return Packed(weight, scales, arrived, q.shape, codes, dtype, group, zeros, q.grid.middle, gated)


def _scale_dtype(scale: Tensor) -> torch.dtype:
    """The narrowest type that holds these scales exactly; fp32 scales that came from 16 bits are 16 bits again."""
    exact = (dtype for dtype in (torch.float16, torch.bfloat16) if torch.equal(scale.to(dtype).float(), scale.float()))
    return scale.dtype if scale.dtype in (torch.float16, torch.bfloat16) else next(exact, torch.float32)


def _padded(part: Tensor) -> Tensor:
    """Rows of zeros up to a whole tile."""
    return torch.nn.functional.pad(part, (0, 0, 0, -len(part) % TILE))


def _gated(part: Tensor) -> Tensor:
    """[gate; factor] -> eight rows of the gate, eight of the factor, ..."""
    return part.unflatten(0, (2, -1, TILE // 2)).transpose(0, 1).flatten(0, 2)


def ungated(part: Tensor) -> Tensor:
    """The opposite of packing the rows of a gate and its factor eight by eight."""
    return part.unflatten(0, (-1, 2, TILE // 2)).transpose(0, 1).flatten(0, 2)


def gated_order(rows: int) -> Tensor:
    """The order of rows in which a gated weight is packed (for its bias)."""
    return _gated(torch.arange(rows)[:, None])[:, 0]


def _sizes(tiles: int, chunks: int) -> dict[str, int]:
    return dict(zip(_NATURAL, (tiles, 2, TILE // 2, chunks, 2, 4, 2, 2, 2), strict=True))


def _pack_codes(codes_OI: Tensor, codes: Codes) -> Tensor:
    tiles, chunks = codes_OI.shape[0] // TILE, codes_OI.shape[1] // CHUNK
    parts, names = codes_OI.reshape(*_sizes(tiles, chunks).values()), _NATURAL
    if codes == "INT4":
        parts, names = parts[:, 0] | parts[:, 1] << 4, _NATURAL.replace("h", "")
    elif codes == "FP8":
        parts = parts.flip(1)
    ordered = parts.permute(*(names.index(name) for name in _ORDER[codes])).contiguous()
    return ordered.view(-1).view(torch.int32).view(tiles, chunks, 1 if codes == "INT4" else 2, 32, 4)


def _unpack_codes(packed: Packed) -> Tensor:
    """codes [16 T, I], uint8."""
    tiles, chunks = packed.weight.shape[:2]
    sizes, order = _sizes(tiles, chunks), _ORDER[packed.codes]
    names = _NATURAL if "h" in order else _NATURAL.replace("h", "")
    ordered = packed.weight.view(torch.uint8).view(*(sizes[name] for name in order))
    parts = ordered.permute(*(order.index(name) for name in names))
    if packed.codes == "INT4":
        parts = torch.stack((parts & 15, parts >> 4), dim=1)
    elif packed.codes == "FP8":
        parts = parts.flip(1)
    return parts.reshape(tiles * TILE, chunks * CHUNK)


def _pack_scales(scale_OG: Tensor, zero_OG: Tensor, group: int, zeros: bool) -> Tensor:
    """int32, in the order that `Scales` in decode.cuh reads."""
    if not group:
        scale_Tgh, zero_Tgh = (part.view(-1, 2, TILE // 2).transpose(1, 2) for part in (scale_OG.float(), zero_OG))
        return torch.cat((scale_Tgh.contiguous().view(torch.int32), zero_Tgh.to(torch.int32)), dim=-1)
    scale_TUgih = _by_unit(scale_OG, group)
    if not zeros:
        return scale_TUgih.view(torch.int32)
    zero_TUgih = _by_unit(zero_OG, group).to(torch.int16)
    return torch.stack((scale_TUgih.view(torch.int16), zero_TUgih), dim=-1).view(torch.int32)


def _by_unit(part_OG: Tensor, group: int) -> Tensor:
    """[T, units, g, groups in a unit, h]"""
    groups = max(CHUNK // group, 1)
    parts = part_OG.view(-1, 2, TILE // 2, part_OG.shape[1] // groups, groups)
    return parts.permute(0, 3, 2, 4, 1).contiguous()


def _unpack_scales(packed: Packed) -> tuple[Tensor, Tensor]:
    """(scale, zero), fp32 [O, G] in the packed order of rows."""
    rows = packed.shape[0]
    if not packed.group:
        halves = (packed.scales[..., :2].contiguous().view(torch.float32), packed.scales[..., 2:].float())
        scale, zero = (part_Tgh.transpose(1, 2).reshape(-1, 1)[:rows] for part_Tgh in halves)
        return scale, zero
    if packed.zeros:
        pairs = packed.scales.view(torch.int16)
        scale_TUgih, zero_TUgih = pairs[..., 0].contiguous().view(packed.scale_dtype), pairs[..., 1]
    else:
        scale_TUgih = packed.scales.view(packed.scale_dtype)
        zero_TUgih = torch.full_like(scale_TUgih, packed.zero)
    rearranged = (part.permute(0, 4, 2, 1, 3).flatten(0, 2).flatten(1)[:rows] for part in (scale_TUgih, zero_TUgih))
    scale, zero = (part.float() for part in rearranged)
    return scale, zero
