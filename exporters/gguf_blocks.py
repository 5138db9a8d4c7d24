"""Integer codes in GGUF's blocks of 32 values, exactly: what fits which block type, and the bytes.

    Q4_0   f16 d, 16 bytes q[j] | q[j + 16] << 4             w = d (q - 8)
    Q4_1   f16 d, f16 m, the same 16 bytes                   w = d q + m
    Q8_0   f16 d, 32 signed bytes                            w = d q

A block has a scale of its own, so a wider group is its scale written several times: any group that is a multiple of 32
columns fits, at GGUF's price of 16 bits per 32 weights. Two and three bits are moved to Q4_0's middle, with zero points
or without. Only 4 bits with zero points need Q4_1, whose m = -z d must be a float16 number: 4 bits of z leave 7 for d.
`infopt quantize --format gguf --asym` therefore solves with scales of 7 bits; other scales can only be written as Q8_0.

A GGUF file has no place for what other formats call a config. While a model is still codes it stays in the layout of
compressed-tensors; `GGUF` and `GGUF_Q8_0` are that layout with GGUF's limits.

The way back is exact for every Q8_0 and Q4_0 block, and for a Q4_1 block whose m is a multiple of its d. llama.cpp gives half
of its Q4_0 blocks a negative d; (q - 8) d = (15 - q - 7) (-d), so such a block has a positive scale and the zero point 7.

Legend: O output channels, I input columns, G groups of columns, N blocks, B bytes of a block.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from infopt.exporters import compressed_tensors
from infopt.exporters.quantized import Format, Shape
from infopt.grid import Grid
from infopt.qtensor import QTensor

BLOCK = 32
_SCALE_BITS = 7
_SMALLEST = 2.0**-14  # the scale of a block of zeros: formats with codes have none that is zero
CODES = (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0)


def block_type(q8: bool, grid: Grid) -> GGMLQuantizationType:
    """The block type of a grid that `objection` let pass. q8: Q8_0 for everything."""
    if q8 or grid.bits == 8:
        return GGMLQuantizationType.Q8_0
    needs_offset = grid.bits == 4 and not grid.symmetric
    return GGMLQuantizationType.Q4_1 if needs_offset else GGMLQuantizationType.Q4_0


def encode_blocks(q: QTensor, kind: GGMLQuantizationType) -> np.ndarray:
    """uint8 [O, I / 32 * bytes of a block]; ValueError for numbers that `inexact` would have named."""
    rows, columns = q.shape
    blocks = columns // BLOCK
    repeats = blocks // q.scale.shape[1]
    scale_ON = q.scale.repeat_interleave(repeats, dim=1)
    zero_ON1 = q.zero.repeat_interleave(repeats, dim=1).to(torch.int16)[..., None]
    codes_ON32 = q.codes.view(rows, blocks, BLOCK).to(torch.int16)
    parts = [_half(scale_ON)]
    if kind is GGMLQuantizationType.Q8_0:
        parts.append((codes_ON32 - zero_ON1).to(torch.int8).view(torch.uint8))
    elif kind is GGMLQuantizationType.Q4_0:
        parts.append(_nibbles(codes_ON32 - zero_ON1 + 8))
    else:
        parts += [_half(_offset(scale_ON, zero_ON1[..., 0])), _nibbles(codes_ON32)]
    return torch.cat(parts, dim=-1).view(rows, -1).numpy()


def _half(values_ON: torch.Tensor) -> torch.Tensor:
    half = values_ON.to(torch.float16)
    if not torch.equal(half.double(), values_ON.double()):
        raise ValueError("float16 would round a scale or an offset")
    return half[..., None].contiguous().view(torch.uint8)


def _nibbles(codes_ON32: torch.Tensor) -> torch.Tensor:
    codes = codes_ON32.to(torch.uint8)
    return codes[..., :16] | codes[..., 16:] << 4


def _offset(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return 0.0 - scale.double() * zero.double()  # and not -0.0, which other writers do not write


def decode_blocks(raw: np.ndarray, kind: GGMLQuantizationType) -> QTensor | str:
    """The codes in uint8 [O, bytes of a row], in groups of 32 with positive float16 scales; where no codes mean the same
    numbers, why not."""
    blocks_ONB = torch.from_numpy(raw).unflatten(1, (-1, GGML_QUANT_SIZES[kind][1]))
    scale_ON = _floats(blocks_ONB[..., :2])
    if not bool(torch.isfinite(scale_ON).all()):
        return "its scales are not finite"
    bits = 8 if kind is GGMLQuantizationType.Q8_0 else 4
    zero: torch.Tensor | None = torch.full(scale_ON.shape, 2 ** (bits - 1), dtype=torch.uint8)
    if bits == 8:
        codes_ON32 = blocks_ONB[..., 2:] ^ 128  # a signed byte plus 128
    else:
        codes_ON32 = torch.cat([blocks_ONB[..., -16:] & 15, blocks_ONB[..., -16:] >> 4], dim=-1)
    if kind is GGMLQuantizationType.Q4_1:
        zero = _zero(scale_ON, _floats(blocks_ONB[..., 2:4]))
    if zero is None:
        return "its offsets are no multiples of its scales"
    none, flipped = scale_ON == 0, scale_ON < 0
    codes_ON32 = torch.where(none[..., None], zero[..., None], codes_ON32)
    codes_ON32 = torch.where(flipped[..., None], 2**bits - 1 - codes_ON32, codes_ON32)
    zero = torch.where(flipped, 2**bits - 1 - zero, zero)
    grid = Grid(bits, BLOCK, bool((zero == 2 ** (bits - 1)).all()), torch.float16)
    return QTensor(codes_ON32.flatten(1), torch.where(none, _SMALLEST, scale_ON.abs()), zero, grid)


def _floats(bytes_ON2: torch.Tensor) -> torch.Tensor:
    return bytes_ON2.contiguous().view(torch.float16)[..., 0]


def _zero(scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor | None:
    """uint8 zero points with offset = -z * scale exactly, the middle where both are 0; None where there are none."""
    zero = torch.where((scale == 0) & (offset == 0), 8.0, (-offset.double() / scale.double()).round())
    fits = (zero >= 0) & (zero <= 15) & (zero * scale.double() == -offset.double())
    return zero.to(torch.uint8) if bool(fits.all()) else None


def _objection(q8: bool, grid: Grid, shape: Shape) -> str | None:
    if shape[1] % BLOCK or not grid.fits(shape[1]):
        return f"{shape[1]} columns are no whole number of GGUF's blocks of {BLOCK}"
    if grid.width(shape[1]) % BLOCK:
        return f"groups of {grid.group} are no multiple of GGUF's blocks of {BLOCK}"
    return "8 bits with zero points need nine" if grid.bits == 8 and not grid.symmetric else None


def _inexact(q: QTensor) -> str | None:
    """Why Q4_1 cannot say the weight, None where it can or is not needed."""
    if block_type(False, q.grid) is not GGMLQuantizationType.Q4_1:
        return None
    offset = _offset(q.scale, q.zero)
    bad = int((offset.to(torch.float16).double() != offset).sum())
    if not bad:
        return None
    return f"zero point times scale is no float16 number in {bad} of {offset.numel()} groups (gguf_q8_0 is exact)"


def _make(name: str, q8: bool) -> Format:
    return replace(
        compressed_tensors.FORMAT,
        name=name,
        weight_only=True,
        scales=(torch.float16,),
        scale_bits=None if q8 else _SCALE_BITS,
        objection=partial(_objection, q8),
        exact=None if q8 else _inexact,
    )


GGUF, GGUF_Q8_0 = _make("gguf", False), _make("gguf_q8_0", True)
