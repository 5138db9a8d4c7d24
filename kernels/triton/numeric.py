"""Rounding, E4M3 and activation functions, for use inside other kernels. Everything is fp32 in and out, codes are int32."""

import triton
import triton.language as tl

MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: in its neighbourhood fp32 has whole numbers only
TINY = tl.constexpr(2.0**-40)  # the smallest scale, as `infopt.grid` has it


@triton.jit
def nearest(x):
    """The nearest whole number, halves to the even one, for |x| < 2^22."""
    return (x + MAGIC) - MAGIC


@triton.jit
def to_e4m3(x):
    """The bits of the nearest E4M3 value, the largest one for everything beyond it."""
    x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # 20 of 23 bits of the fraction go, halves to even; the exponent's bias is 7 and not 127
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    small = nearest(tl.abs(x) * 512.0).to(tl.int32)  # below 2^-6 values are multiples of 2^-9
    return ((bits >> 24) & 0x80) | tl.where(tl.abs(x) < 0.015625, small, normal)


@triton.jit
def from_e4m3(code):
    """The values of E4M3 bits (uint8): as fp16 they are 2^8 too small, and exact."""
    code = code.to(tl.int32)
    half = (((code & 0x80) << 8) | ((code & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True)
    return half.to(tl.float32) * 256.0


@triton.jit
def to_int8(x):
    return nearest(tl.minimum(tl.maximum(x, -128.0), 127.0)).to(tl.int32)


@triton.jit
def activate(x, ACT: tl.constexpr):
    if ACT == "silu":
        x = x * tl.sigmoid(x)
    elif ACT == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x


@triton.jit
def tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0
