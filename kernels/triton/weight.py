"""Packed weights times floats: 4 bits (or fewer), 8 bits, or E4M3 weights, with 16-bit activations.

For the middle: more tokens than a hand-written kernel for decoding is good at, fewer than it takes to pay for writing the
weight out (`dequantize`, then torch's product). Weights are the left operand of the product, so that a few tokens are its
narrow side. Codes minus their zero point are exact in 16 bits; scales multiply the fp32 sums, once for each part of
columns, and never a weight.

Nibbles lie in planes (`kernels/packing.py`), so that both halves of a byte are whole tiles of columns and nothing is
interleaved.

Legend: T tokens, I input columns, O output channels, G scales of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infopt.kernels.packing import Packed
from infopt.kernels.triton.decode import TYPES
from infopt.kernels.triton.numeric import activate, from_e4m3


@triton.jit
def _codes(at, mask, zero, KIND: tl.constexpr, HIGH: tl.constexpr):
    byte = tl.load(at, mask=mask, other=0)
    if KIND == "fp8":
        w = from_e4m3(byte)
    elif KIND == "int8":
        w = byte.to(tl.float32) - zero
    elif HIGH:
        w = (byte >> 4).to(tl.float32) - zero
    else:
        w = (byte & 15).to(tl.float32) - zero
    return w


@triton.jit
def _multiply(
    x, codes, scale, zero, bias, y, T, I, O, G, GROUP, HAS_BIAS: tl.constexpr, ZERO: tl.constexpr, KIND: tl.constexpr,
    ACT: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr, PART: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    HALF: tl.constexpr = PART // 2 if KIND == "int4" else PART
    k = tl.arange(0, HALF)
    parts = tl.cdiv(I, PART)
    row = o.to(tl.int64)[:, None] * (parts * HALF if KIND == "int4" else I)
    at_x = x + t.to(tl.int64)[None, :] * I
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for part in range(parts):
        g = part * PART // GROUP
        z = 128.0 if KIND == "int8" else 8.0
        if ZERO:
            z = tl.load(zero + o * G + g, mask=o < O, other=0).to(tl.float32)[:, None]
        column = part * PART + k
        mask = (o < O)[:, None] & (tl.full((1, HALF), True, tl.int1) if KIND == "int4" else (column < I)[None, :])
        w = _codes(codes + row + part * HALF + k[None, :], mask, z, KIND, False).to(TYPE)
        mask_x = (t < T)[None, :] & (column < I)[:, None]
        some = tl.load(at_x + column[:, None], mask=mask_x, other=0.0).to(tl.float32).to(TYPE)
        product = tl.dot(w, some, input_precision=PRECISION)
        if KIND == "int4":
            w = _codes(codes + row + part * HALF + k[None, :], mask, z, KIND, True).to(TYPE)
            mask_x = (t < T)[None, :] & (column + HALF < I)[:, None]
            some = tl.load(at_x + column[:, None] + HALF, mask=mask_x, other=0.0).to(tl.float32).to(TYPE)
            product = tl.dot(w, some, product, input_precision=PRECISION)
        total += product * tl.load(scale + o * G + g, mask=o < O, other=0.0).to(tl.float32)[:, None]
    if HAS_BIAS:
        total += tl.load(bias + o, mask=o < O, other=0.0).to(tl.float32)[:, None]
    total = activate(total, ACT)
    at_y = y + t.to(tl.int64)[None, :] * O + o[:, None]
    tl.store(at_y, total.to(y.dtype.element_ty), mask=(o < O)[:, None] & (t < T)[None, :])


@triton.jit
def _dequantize(
    codes,
    scale,
    zero,
    w,
    I,
    O,
    G,
    GROUP,
    ZERO: tl.constexpr,
    KIND: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
):
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    HALF: tl.constexpr = PART // 2 if KIND == "int4" else PART
    k = tl.arange(0, HALF)
    column = part * PART + k
    g = part * PART // GROUP
    z = 128.0 if KIND == "int8" else 8.0
    if ZERO:
        z = tl.load(zero + o * G + g, mask=o < O, other=0).to(tl.float32)[:, None]
    s = tl.load(scale + o * G + g, mask=o < O, other=0.0).to(tl.float32)[:, None]
    row = o.to(tl.int64)[:, None] * (tl.cdiv(I, PART) * HALF if KIND == "int4" else I)
    at_w = w + o.to(tl.int64)[:, None] * I + column[None, :]
    mask = (o < O)[:, None] & (column < I)[None, :]
    value = _codes(codes + row + part * HALF + k[None, :], mask, z, KIND, False) * s
    tl.store(at_w, value.to(w.dtype.element_ty), mask=mask)
    if KIND == "int4":
        mask_high = (o < O)[:, None] & (column + HALF < I)[None, :]
        value = _codes(codes + row + part * HALF + k[None, :], mask_high, z, KIND, True) * s
        tl.store(at_w + HALF, value.to(w.dtype.element_ty), mask=mask_high)


def multiply(x_TI: Tensor, w: Packed, bias_O: Tensor | None = None, act: str = "none") -> Tensor:
    """act(x W^T + b) [T, O] in the dtype of x, which is the one that is multiplied in."""
    x_TI = x_TI.contiguous()
    tokens, rows = len(x_TI), len(w.codes)
    y_TO = torch.empty(tokens, rows, dtype=x_TI.dtype, device=x_TI.device)
    if y_TO.numel() == 0:
        return y_TO
    step = min(max(16, triton.next_power_of_2(tokens)), 128)
    exact = x_TI.dtype == torch.float32
    _multiply[(triton.cdiv(rows, 64), triton.cdiv(tokens, step))](
        x_TI, w.codes, w.scale_OG, w.scale_OG if w.zero_OG is None else w.zero_OG, x_TI if bias_O is None else bias_O,
        y_TO, tokens, w.columns, rows, w.scale_OG.shape[1], w.group, HAS_BIAS=bias_O is not None,
        ZERO=w.zero_OG is not None, KIND=w.kind, ACT=act, TYPE=TYPES[x_TI.dtype],
        PRECISION="ieee" if exact else "tf32", PART=w.part, TOKENS=step, ROWS=64,
        num_warps=4 if step <= 64 else 8, num_stages=3,
    )  # fmt: skip
    return y_TO


def dequantize(w: Packed, dtype: torch.dtype) -> Tensor:
    """W [O, I], computed in fp32 and rounded once: for a product of many tokens."""
    rows = len(w.codes)
    w_OI = torch.empty(rows, w.columns, dtype=dtype, device=w.codes.device)
    _dequantize[(triton.cdiv(rows, 16), triton.cdiv(w.columns, w.part))](
        w.codes, w.scale_OG, w.scale_OG if w.zero_OG is None else w.zero_OG, w_OI, w.columns, rows,
        w.scale_OG.shape[1], w.group, ZERO=w.zero_OG is not None, KIND=w.kind, PART=w.part, ROWS=16, num_warps=4,
    )  # fmt: skip
    return w_OI
