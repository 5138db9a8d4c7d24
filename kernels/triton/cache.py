"""Norms and rotary angles of queries and keys, and the writing of keys and values to the cache: one launch.

One program per token and head. A channel's partner under the rotation is loaded a second time (it lies in the cache line
next to it), so that halves of a head need no exchange between threads, and two values of 4 bits that share a byte are
simply the even and the odd channels of one head.

Legend: N tokens, Hq heads of queries, H heads of keys, D channels of a head, R of them turned.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infopt.kernels.pages import Pages
from infopt.kernels.triton.numeric import TINY, early, nearest, to_e4m3, wait_for_kernel_before


@triton.jit
def _turned(x, weight, cos, sin, c, r, D, R, NORM: tl.constexpr, TURN: tl.constexpr):
    """Channels c of a head, fp32; r: what the norm multiplies with."""
    value = tl.load(x + c, mask=c < D, other=0.0).to(tl.float32)
    if NORM:
        value = value * r * tl.load(weight + c, mask=c < D, other=0.0).to(tl.float32)
    if TURN:
        low = c < R // 2
        partner = tl.where(low, c + R // 2, c - R // 2)
        other = tl.load(x + partner, mask=c < R, other=0.0).to(tl.float32)
        if NORM:
            other = other * r * tl.load(weight + partner, mask=c < R, other=0.0).to(tl.float32)
        cosine = tl.load(cos + c, mask=c < R, other=1.0).to(tl.float32)
        sine = tl.load(sin + c, mask=c < R, other=0.0).to(tl.float32)
        value = value * cosine + tl.where(low, -other, other) * sine
    return value


@triton.jit
def _rms(x, eps, D, NORM: tl.constexpr, BLOCK: tl.constexpr):
    r = 1.0
    if NORM:
        c = tl.arange(0, BLOCK)
        value = tl.load(x + c, mask=c < D, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(value * value, axis=0) / D + eps)
    return r


@triton.jit
def _grid(low, high, KIND: tl.constexpr, ZERO: tl.constexpr):
    """(scale, zero) of values from low <= 0 to high >= 0, as `infopt.grid.Grid.range` has them; scales are kept in bf16."""
    levels: tl.constexpr = 448.0 if KIND == "fp8" else 255.0 if KIND == "int8" else 15.0
    if ZERO:
        width = high - low
    elif KIND == "fp8":
        width = tl.maximum(-low, high)
    else:
        width = 2.0 * tl.maximum(-low, high)
    s = tl.maximum(tl.div_rn(width, levels + tl.zeros_like(width)), TINY).to(tl.bfloat16).to(tl.float32)
    if ZERO:
        z = tl.minimum(nearest(tl.div_rn(-low, s)), levels)
    elif KIND == "fp8":
        z = 0.0 * s
    else:
        z = 0.0 * s + (levels + 1.0) / 2.0
    return s, z


@triton.jit
def _code(value, s, z, KIND: tl.constexpr):
    ratio = tl.div_rn(value, s + tl.zeros_like(value))
    if KIND == "fp8":
        code = to_e4m3(ratio)
    else:
        levels: tl.constexpr = 255.0 if KIND == "int8" else 15.0
        ratio = nearest(tl.minimum(tl.maximum(ratio, -1e6), 1e6)) + z
        code = tl.minimum(tl.maximum(ratio, 0.0), levels).to(tl.int32)
    return code


@triton.jit
def _static(scale, zero, c, D, step, KIND: tl.constexpr, ZERO: tl.constexpr):
    """A calibration's scale and zero point of each channel."""
    s = tl.load(scale + c * step, mask=c < D, other=1.0)
    if ZERO:
        z = tl.load(zero + c * step, mask=c < D, other=0.0)
    elif KIND == "fp8":
        z = 0.0 * s
    else:
        z = 0.0 * s + (128.0 if KIND == "int8" else 8.0)
    return s, z


@triton.jit
def _keep(
    x, weight, cos, sin, codes, scale, zero, at, head, D, R, eps, head_step, step, NORM: tl.constexpr,
    TURN: tl.constexpr, KIND: tl.constexpr, OWN: tl.constexpr, ZERO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store one head. at: which head of all slots it is."""
    r = _rms(x, eps, D, NORM, BLOCK)
    if KIND == "none":
        c = tl.arange(0, BLOCK)
        value = _turned(x, weight, cos, sin, c, r, D, R, NORM, TURN)
        tl.store(codes + at * D + c, value.to(codes.dtype.element_ty), mask=c < D)
    elif KIND == "int4":
        c = 2 * tl.arange(0, BLOCK // 2)
        even = _turned(x, weight, cos, sin, c, r, D, R, NORM, TURN)
        odd = _turned(x, weight, cos, sin, c + 1, r, D, R, NORM, TURN)
        if OWN:
            low = tl.minimum(tl.min(tl.minimum(even, odd), axis=0), 0.0)
            high = tl.maximum(tl.max(tl.maximum(even, odd), axis=0), 0.0)
            s, z = _grid(low, high, KIND, ZERO)
            tl.store(scale + at, s.to(tl.bfloat16))
            if ZERO:
                tl.store(zero + at, z.to(tl.int32).to(tl.uint8))
            byte = _code(even, s, z, KIND) | _code(odd, s, z, KIND) << 4
        else:
            s, z = _static(scale + head * head_step, zero + head * head_step, c, D, step, KIND, ZERO)
            byte = _code(even, s, z, KIND)
            s, z = _static(scale + head * head_step, zero + head * head_step, c + 1, D, step, KIND, ZERO)
            byte = byte | _code(odd, s, z, KIND) << 4
        tl.store(codes + at * (D // 2) + c // 2, byte.to(tl.uint8), mask=c < D)
    else:
        c = tl.arange(0, BLOCK)
        value = _turned(x, weight, cos, sin, c, r, D, R, NORM, TURN)
        if OWN:
            low = tl.minimum(tl.min(value, axis=0), 0.0)
            high = tl.maximum(tl.max(value, axis=0), 0.0)
            s, z = _grid(low, high, KIND, ZERO)
            tl.store(scale + at, s.to(tl.bfloat16))
            if ZERO:
                tl.store(zero + at, z.to(tl.int32).to(tl.uint8))
        else:
            s, z = _static(scale + head * head_step, zero + head * head_step, c, D, step, KIND, ZERO)
        tl.store(codes + at * D + c, _code(value, s, z, KIND).to(tl.uint8), mask=c < D)


@triton.jit
def _rope_write(
    qkv, cos, sin, q_weight, k_weight, q, slots, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, HQ, H, D, R, eps,
    head_step, step, NORM: tl.constexpr, KIND: tl.constexpr, OWN: tl.constexpr, ZERO: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_kernel_before(EARLY)
    n = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    x = qkv + (n * (HQ + 2 * H) + h) * D
    cos += n * R
    sin += n * R
    if h < HQ:
        c = tl.arange(0, BLOCK)
        value = _turned(x, q_weight, cos, sin, c, _rms(x, eps, D, NORM, BLOCK), D, R, NORM, True)
        tl.store(q + (n * HQ + h) * D + c, value.to(q.dtype.element_ty), mask=c < D)
    else:
        slot = tl.load(slots + n).to(tl.int64)
        if h < HQ + H:
            head = h - HQ
            _keep(x, k_weight, cos, sin, k_codes, k_scale, k_zero, slot * H + head, head, D, R, eps, head_step, step,
                  NORM, True, KIND, OWN, ZERO, BLOCK)  # fmt: skip
        else:
            head = h - HQ - H
            _keep(x, k_weight, cos, sin, v_codes, v_scale, v_zero, slot * H + head, head, D, R, eps, head_step, step,
                  False, False, KIND, OWN, ZERO, BLOCK)  # fmt: skip


def rope_write(
    qkv_NHD: Tensor, cos_NR: Tensor, sin_NR: Tensor, q_weight_D: Tensor | None, k_weight_D: Tensor | None, eps: float,
    slots_N: Tensor, keys: Pages, values: Pages,
) -> Tensor:  # fmt: skip
    """q [N, Hq, D] in the dtype of qkv [N, Hq + 2 H, D]; see `reference.rope_write`. Both halves are kept in one way."""
    qkv_NHD, cos_NR, sin_NR = qkv_NHD.contiguous(), cos_NR.contiguous(), sin_NR.contiguous()
    count, heads, width = qkv_NHD.shape
    queries = heads - 2 * keys.heads
    q_NHD = torch.empty(count, queries, width, dtype=qkv_NHD.dtype, device=qkv_NHD.device)
    norm = q_weight_D is not None and k_weight_D is not None
    k_scale, k_zero, head_step, step = parts(keys)
    v_scale, v_zero, *_ = parts(values)
    if count:
        _rope_write[(count, heads)](
            qkv_NHD, cos_NR, sin_NR, q_weight_D if norm else qkv_NHD, k_weight_D if norm else qkv_NHD, q_NHD, slots_N,
            keys.codes, k_scale, k_zero, values.codes, v_scale, v_zero, queries, keys.heads, width, cos_NR.shape[1], eps,
            head_step, step, NORM=norm, KIND=keys.kind, OWN=keys.own, ZERO=keys.zero is not None,
            BLOCK=max(triton.next_power_of_2(width), 2), num_warps=1, **early(qkv_NHD),
        )  # fmt: skip
    return q_NHD


def parts(pages: Pages) -> tuple[Tensor, Tensor, int, int]:
    """(scale, zero, from one head's to the next's, from one channel's to the next's); anything where there is none."""
    scale = pages.codes if pages.scale is None else pages.scale
    zero = scale if pages.zero is None else pages.zero
    if pages.scale is None or pages.own:
        return scale, zero, 0, 0
    heads, channels = pages.scale.shape
    return scale, zero, channels if heads > 1 else 0, 1 if channels > 1 else 0
