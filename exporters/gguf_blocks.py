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

Legend: O output channels, I input columns, G groups of columns, N blocks.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from gguf import GGMLQuantizationType

from infopt.exporters import compressed_tensors
from infopt.exporters.quantized import Format, Shape
from infopt.grid import Grid
from infopt.qtensor import QTensor

BLOCK = 32
_SCALE_BITS = 7


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
