"""Packed weights times floats: 4 bits (or fewer), 8 bits, or E4M3 weights, with 16-bit activations.

For the middle: more tokens than a hand-written kernel for decoding is good at, fewer than it takes to pay for writing the
weight out (`dequantize`, then torch's product). Weights are the left operand of the product, so that a few tokens are its
narrow side. Codes minus their zero point are exact in 16 bits; scales multiply the fp32 sums, once for each part of
columns, and never a weight.

`pack4` lays nibbles out in planes: in a part of 32 columns or more, byte i holds columns i and i + half in its lower and
upper half, so that both are whole tiles of columns and nothing is interleaved.

Legend: T tokens, I input columns, O output channels, G scales of a row.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from infopt.errors import Unsupported
from infopt.kernels.triton.decode import TYPES
from infopt.kernels.triton.numeric import activate, from_e4m3
from infopt.qtensor import QTensor

_PARTS = (128, 64, 32)


@dataclass(frozen=True)
class Packed:
    """A weight [O, I] as `multiply` reads it. kind: "int4", "int8" or "fp8". part: columns of one step of the kernel, which
    share a scale. group: columns that share a scale, where it is a multiple of `part`. zero is None where it is the middle."""

    codes: Tensor
    scale_OG: Tensor
    zero_OG: Tensor | None
    kind: str
    part: int
    columns: int

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.codes, self.scale_OG, self.zero_OG) if part is not None)

    @staticmethod
    def of(q: QTensor) -> "Packed":
        """Raises Unsupported for groups of another size, and scales that are not of rows."""
        columns = q.shape[1]
        width = q.grid.width(columns)
        part = next((part for part in _PARTS if width % part == 0), 32)
        if q.grid.rows != 1 or (q.grid.group is not None and width % part):
            raise Unsupported(
                f"a weight with scales of {q.grid.strategy}s of {width}", "The kernel knows groups of 32, 64, ..."
            )
        kind = "fp8" if q.grid.kind == "float" else "int8" if q.grid.bits == 8 else "int4"
        codes = pack4(q.codes, part, q.grid.middle) if kind == "int4" else q.codes.contiguous()
        middle = {"int4": 8, "int8": 128, "fp8": 0}[kind]
        same = q.grid.symmetric and q.grid.middle == middle
        return Packed(codes, q.scale.contiguous(), None if same else q.zero.contiguous(), kind, part, columns)


def pack4(codes_OI: Tensor, part: int, fill: int) -> Tensor:
    """uint8 [O, I / 2] in planes (see the module); columns are filled up to whole parts."""
    rows, columns = codes_OI.shape
    padded = torch.nn.functional.pad(codes_OI, (0, -columns % part), value=fill)
    low, high = padded.view(rows, -1, 2, part // 2).unbind(2)
    return (low | high << 4).flatten(1).contiguous()


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
        y_TO, tokens, w.columns, rows, w.scale_OG.shape[1], _group(w), HAS_BIAS=bias_O is not None,
        ZERO=w.zero_OG is not None, KIND=w.kind, ACT=act, TYPE=TYPES[x_TI.dtype],
        PRECISION="ieee" if exact else "tf32", PART=w.part, TOKENS=step, ROWS=64, num_warps=4, num_stages=3,
    )  # fmt: skip
    return y_TO


def dequantize(w: Packed, dtype: torch.dtype) -> Tensor:
    """W [O, I], computed in fp32 and rounded once: for a product of many tokens."""
    rows = len(w.codes)
    w_OI = torch.empty(rows, w.columns, dtype=dtype, device=w.codes.device)
    _dequantize[(triton.cdiv(rows, 16), triton.cdiv(w.columns, w.part))](
        w.codes, w.scale_OG, w.scale_OG if w.zero_OG is None else w.zero_OG, w_OI, w.columns, rows,
        w.scale_OG.shape[1], _group(w), ZERO=w.zero_OG is not None, KIND=w.kind, PART=w.part, ROWS=16, num_warps=4,
    )  # fmt: skip
    return w_OI


def _group(w: Packed) -> int:
    """Columns per scale; more than all where there is one scale for each row."""
    return -(-w.columns // w.part) * w.part // w.scale_OG.shape[1]
