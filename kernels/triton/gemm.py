"""Products of 8-bit codes on both sides, and LayerNorm + Linear.

`int8_linear` sums in int32, so its sums are exact, and multiplies by both scales once. `fp8_linear` sums each 128 columns
in fp32 and multiplies by the scales of those columns, of blocks as well as of whole rows. On GPUs before compute
capability 8.9, which have no product of E4M3, values are turned into fp16 first, where all of them are exact.

`norm_linear` folds the norm around the product: with mean m and deviation d of a token, and V = W gamma,
    layer_norm(x) W^T + b = (x V^T - m * sum(V)) / d + (W beta + b)
so rows are read once, and m and d are found while they are. m is subtracted after the product, so a token whose mean is
large beside its deviation loses as many bits as that ratio has.

Legend: T tokens, I input columns, O output channels, G scales of a token, R by G scales of blocks of the weight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infopt.errors import Unsupported
from infopt.kernels.triton.decode import TYPES
from infopt.kernels.triton.numeric import activate, from_e4m3

BLOCK = 128  # columns that share a scale


@triton.jit
def _int8_linear(
    x, x_scale, w, w_scale, bias, y, T, I, O, x_step, w_step, HAS_BIAS: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLUMNS)
    at_x = x + t.to(tl.int64)[:, None] * I + k[None, :]
    at_w = w + o.to(tl.int64)[None, :] * I + k[:, None]
    total = tl.zeros((TOKENS, ROWS), tl.int32)
    for start in range(0, I, COLUMNS):
        inside = start + k < I
        some_x = tl.load(at_x + start, mask=(t < T)[:, None] & inside[None, :], other=0)
        some_w = tl.load(at_w + start, mask=(o < O)[None, :] & inside[:, None], other=0)
        total = tl.dot(some_x, some_w, total, out_dtype=tl.int32)
    scale_x = tl.load(x_scale + t * x_step, mask=t < T, other=0.0)
    scale_w = tl.load(w_scale + o * w_step, mask=o < O, other=0.0).to(tl.float32)
    result = total.to(tl.float32) * scale_x[:, None] * scale_w[None, :]
    if HAS_BIAS:
        result += tl.load(bias + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    at_y = y + t.to(tl.int64)[:, None] * O + o[None, :]
    tl.store(at_y, result.to(y.dtype.element_ty), mask=(t < T)[:, None] & (o < O)[None, :])


@triton.jit
def _fp8_linear(
    x, x_scale, w, w_scale, bias, y, T, I, O, x_t, x_g, w_rows, w_r, w_g, HAS_BIAS: tl.constexpr, NATIVE: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLUMNS)
    at_x = x + t.to(tl.int64)[:, None] * I + k[None, :]
    at_w = w + o.to(tl.int64)[None, :] * I + k[:, None]
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for start in range(0, I, COLUMNS):
        inside = start + k < I
        mask_x, mask_w = (t < T)[:, None] & inside[None, :], (o < O)[None, :] & inside[:, None]
        if NATIVE:
            some_x = tl.load(at_x + start, mask=mask_x, other=0.0)
            some_w = tl.load(at_w + start, mask=mask_w, other=0.0)
        else:
            some_x = from_e4m3(tl.load(at_x + start, mask=mask_x, other=0)).to(tl.float16)
            some_w = from_e4m3(tl.load(at_w + start, mask=mask_w, other=0)).to(tl.float16)
        g = start // COLUMNS
        scale_x = tl.load(x_scale + t * x_t + g * x_g, mask=t < T, other=0.0)
        scale_w = tl.load(w_scale + o // w_rows * w_r + g * w_g, mask=o < O, other=0.0).to(tl.float32)
        total += tl.dot(some_x, some_w) * scale_x[:, None] * scale_w[None, :]
    if HAS_BIAS:
        total += tl.load(bias + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    at_y = y + t.to(tl.int64)[:, None] * O + o[None, :]
    tl.store(at_y, total.to(y.dtype.element_ty), mask=(t < T)[:, None] & (o < O)[None, :])


@triton.jit
def _norm_linear(
    x, v, sums, bias, y, T, I, O, eps, NORM: tl.constexpr, ACT: tl.constexpr, TYPE: tl.constexpr,
    PRECISION: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLUMNS)
    at_x = x + t.to(tl.int64)[:, None] * I + k[None, :]
    at_v = v + o.to(tl.int64)[None, :] * I + k[:, None]
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    shift = tl.load(x + t.to(tl.int64) * I, mask=t < T, other=0.0).to(
        tl.float32
    )  # close to the mean, as one value goes
    first = tl.zeros((TOKENS,), tl.float32)
    second = tl.zeros((TOKENS,), tl.float32)
    for start in range(0, I, COLUMNS):
        inside = start + k < I
        some_x = tl.load(at_x + start, mask=(t < T)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        some_v = tl.load(at_v + start, mask=(o < O)[None, :] & inside[:, None], other=0.0).to(tl.float32)
        total += tl.dot(some_x.to(TYPE), some_v.to(TYPE), input_precision=PRECISION)
        if NORM:
            apart = tl.where(inside[None, :], some_x - shift[:, None], 0.0)
            first += tl.sum(apart, axis=1)
            second += tl.sum(apart * apart, axis=1)
    if NORM:
        mean = first / I
        r = tl.rsqrt(tl.maximum(second / I - mean * mean, 0.0) + eps)
        column_sums = tl.load(sums + o, mask=o < O, other=0.0)
        total = (total - (mean + shift)[:, None] * column_sums[None, :]) * r[:, None]
    total += tl.load(bias + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    total = activate(total, ACT)
    at_y = y + t.to(tl.int64)[:, None] * O + o[None, :]
    tl.store(at_y, total.to(y.dtype.element_ty), mask=(t < T)[:, None] & (o < O)[None, :])


def int8_linear(
    x_TI: Tensor, x_scale: Tensor, w_OI: Tensor, w_scale: Tensor, bias_O: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """y [T, O] of int8 codes. x_scale: fp32 [T, 1], or [1] for all; w_scale: [O, 1], or [1, 1] for all."""
    (tokens, columns), rows = x_TI.shape, len(w_OI)
    y_TO = torch.empty(tokens, rows, dtype=dtype, device=x_TI.device)
    if y_TO.numel() == 0:
        return y_TO
    step = min(max(16, triton.next_power_of_2(tokens)), 256)
    height = 64 if step <= 128 else 128
    _int8_linear[(triton.cdiv(rows, height), triton.cdiv(tokens, step))](
        x_TI.contiguous(), x_scale, w_OI, w_scale, w_scale if bias_O is None else bias_O, y_TO, tokens, columns, rows,
        int(x_scale.numel() > 1), int(w_scale.numel() > 1), HAS_BIAS=bias_O is not None, TOKENS=step,
        ROWS=height, COLUMNS=BLOCK, num_warps=4 if step <= 64 else 8, num_stages=3,
    )  # fmt: skip
    return y_TO


def fp8_linear(
    x_TI: Tensor, x_scale: Tensor, w_OI: Tensor, w_scale_RG: Tensor, rows_of_scale: int, bias_O: Tensor | None,
    dtype: torch.dtype, native: bool = True,
) -> Tensor:  # fmt: skip
    """y [T, O] of E4M3 codes. x_scale: fp32 [T, G], [T, 1] or [1]; w_scale: [R, G] or [R, 1], for so many rows each, where G
    parts have 128 columns. native: whether the GPU multiplies E4M3."""
    (tokens, columns), rows = x_TI.shape, len(w_OI)
    groups = -(-columns // BLOCK)
    if not {x_scale.shape[-1], w_scale_RG.shape[1]} <= {1, groups}:
        raise Unsupported(
            "an FP8 layer with scales of other columns", f"The kernel knows whole rows and parts of {BLOCK}."
        )
    y_TO = torch.empty(tokens, rows, dtype=dtype, device=x_TI.device)
    if y_TO.numel() == 0:
        return y_TO
    step = min(max(16, triton.next_power_of_2(tokens)), 128)
    x_TI, w_OI = x_TI.contiguous(), w_OI.contiguous()
    if not native:
        x_TI, w_OI = x_TI.view(torch.uint8), w_OI.view(torch.uint8)
    x_g, w_g = int(x_scale.shape[-1] > 1), int(w_scale_RG.shape[1] > 1)
    _fp8_linear[(triton.cdiv(rows, 64), triton.cdiv(tokens, step))](
        x_TI, x_scale, w_OI, w_scale_RG, w_scale_RG if bias_O is None else bias_O, y_TO, tokens, columns, rows,
        x_scale.shape[-1] if x_scale.numel() > 1 else 0, x_g, rows_of_scale, w_scale_RG.shape[1], w_g,
        HAS_BIAS=bias_O is not None, NATIVE=native, TOKENS=step, ROWS=64, COLUMNS=BLOCK,
        num_warps=4 if step <= 64 else 8, num_stages=3,
    )  # fmt: skip
    return y_TO


def fold_norm(gamma_I: Tensor, beta_I: Tensor, w_OI: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(V [O, I] in the dtype of W, its row sums fp32 [O], bias fp32 [O]): done once, see the module."""
    v_OI = (w_OI.float() * gamma_I.float()).to(w_OI.dtype)
    return v_OI, v_OI.float().sum(1), w_OI.float() @ beta_I.float() + bias_O.float()


def norm_linear(
    x_TI: Tensor, v_OI: Tensor, sums_O: Tensor | None, bias_O: Tensor, eps: float, act: str = "none"
) -> Tensor:
    """act(layer_norm(x) W^T + b) [T, O] in the dtype of x, of what `fold_norm` gives; without sums, act(x V^T + b)."""
    x_TI = x_TI.contiguous()
    (tokens, columns), rows = x_TI.shape, len(v_OI)
    y_TO = torch.empty(tokens, rows, dtype=x_TI.dtype, device=x_TI.device)
    if y_TO.numel() == 0:
        return y_TO
    step = min(max(16, triton.next_power_of_2(tokens)), 64)
    exact = x_TI.dtype == torch.float32
    _norm_linear[(triton.cdiv(rows, 64), triton.cdiv(tokens, step))](
        x_TI, v_OI, bias_O if sums_O is None else sums_O, bias_O, y_TO, tokens, columns, rows, eps,
        NORM=sums_O is not None, ACT=act, TYPE=TYPES[x_TI.dtype], PRECISION="ieee" if exact else "tf32", TOKENS=step,
        ROWS=64, COLUMNS=32 if exact else 64, num_warps=4, num_stages=2 if exact else 3,
    )  # fmt: skip
    return y_TO
