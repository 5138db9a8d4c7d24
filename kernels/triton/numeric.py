"""Rounding, E4M3, activation functions and the order of launches, for use inside other kernels. Everything is fp32 in and out,
codes are int32."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: in its neighbourhood fp32 has whole numbers only
TINY = tl.constexpr(2.0**-40)  # the smallest scale, as `infopt.grid` has it


def early(x: Tensor) -> dict[str, bool]:
    """Options of a launch on x's device: whether the kernel may begin before the one before it has ended, and waits itself."""
    hopper = x.is_cuda and _is_hopper(x.device)
    return {"EARLY": hopper, "launch_pdl": True} if hopper else {"EARLY": False}


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def wait_for_kernel_before(EARLY: tl.constexpr):
    """The first line of a kernel that is launched with `early`. From then on the next one may begin."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def nearest(x):
    """The nearest whole number, halves to the even one, for |x| < 2^22."""
    return (x + MAGIC) - MAGIC


@triton.jit
def quotient(x, s, inverse):
    """x / s, correctly rounded, of 1 / s, correctly rounded, where nothing overflows (Markstein 1990). On a GPU alone: the
    interpreter does not fuse the additions."""
    q = x * inverse
    return tl.fma(tl.fma(-q, s, x), inverse, q)


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


# Four codes at a time, two in a word, because a compiler that sees one code at a time takes three times as long. Only on a
# GPU; `decode._whole` has what they mean. An integer or-ed into the fraction of 128 in bf16 adds itself to it. An 8-bit code
# minus 128 is its seven lower bits minus 0 or 128: (128 + lower) - (128 or 256), where the code's own highest bit makes 256
# of 128. E4M3 keeps its bits and moves to the wider exponent, which divides it by 2^120.
_INT8 = tl.constexpr("""{ .reg .b32 e, l, h, one; mov.b32 one, 0x3f803f80;
prmt.b32 e, $2, 0, 0x4140; lop3.b32 l, e, 0x007f007f, 0x43004300, 0xea; lop3.b32 h, e, 0x00800080, 0xc300c300, 0xae;
fma.rn.bf16x2 $0, l, one, h;
prmt.b32 e, $2, 0, 0x4342; lop3.b32 l, e, 0x007f007f, 0x43004300, 0xea; lop3.b32 h, e, 0x00800080, 0xc300c300, 0xae;
fma.rn.bf16x2 $1, l, one, h; }""")
_LOW = tl.constexpr("""{ .reg .b32 e, one, less; mov.b32 one, 0x3f803f80; mov.b32 less, 0xc308c308;
prmt.b32 e, $2, 0, 0x4140; lop3.b32 e, e, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $0, e, one, less;
prmt.b32 e, $2, 0, 0x4342; lop3.b32 e, e, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $1, e, one, less; }""")
_HIGH = tl.constexpr("""{ .reg .b32 s, e, one, less; mov.b32 one, 0x3f803f80; mov.b32 less, 0xc308c308; shr.u32 s, $2, 4;
prmt.b32 e, s, 0, 0x4140; lop3.b32 e, e, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $0, e, one, less;
prmt.b32 e, s, 0, 0x4342; lop3.b32 e, e, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $1, e, one, less; }""")
_FP8 = tl.constexpr("""{ .reg .b32 e, m, up, none; mov.b32 up, 0x7b807b80; mov.b32 none, 0x80008000;
prmt.b32 e, $2, 0, 0x1404; shr.u32 m, e, 4; and.b32 m, m, 0x07f007f0; lop3.b32 m, e, 0x80008000, m, 0xea;
fma.rn.bf16x2 $0, m, up, none;
prmt.b32 e, $2, 0, 0x3424; shr.u32 m, e, 4; and.b32 m, m, 0x07f007f0; lop3.b32 m, e, 0x80008000, m, 0xea;
fma.rn.bf16x2 $1, m, up, none; }""")


@triton.jit
def to_bf16(byte, KIND: tl.constexpr, HIGH: tl.constexpr):
    """An int8 code minus 128, the lower or higher half of a byte minus 8, or an E4M3 value, exactly, in bf16."""
    code: tl.constexpr = _FP8 if KIND == "fp8" else _INT8 if KIND == "int8" else _HIGH if HIGH else _LOW
    return tl.inline_asm_elementwise(code, "=r,=r,r", [byte], tl.bfloat16, False, 4)


@triton.jit
def to_int8(x):
    return nearest(tl.minimum(tl.maximum(x, -128.0), 127.0)).to(tl.int32)


# 1 / (1 + 2^(-x log2 e)) in four instructions and two last places; a compiler minds numbers below 2^-126 and takes twelve.
_SIGMOID = tl.constexpr("""{ .reg .f32 e; mul.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; add.f32 e, e, 0f3F800000;
rcp.approx.ftz.f32 $0, e; }""")


@triton.jit
def activate(x, ACT: tl.constexpr, GPU: tl.constexpr = False):
    """GPU: whether it may take instructions that the interpreter does not have."""
    if ACT == "silu" and GPU:
        x = x * tl.inline_asm_elementwise(_SIGMOID, "=f,f", [x], tl.float32, True, 1)
    elif ACT == "silu":
        x = x * tl.sigmoid(x)
    elif ACT == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x


@triton.jit
def tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0
