"""Norms and gated activations, each with the rounding that the next layer wants: one row of tokens per program.

A row is read once and written once: what a norm needs of it (its mean square), and what rounding needs (the largest value
of each group of columns), is found in registers. Rows of up to `LONGEST` elements.

Legend: T tokens, C width of what is written, G groups of columns that share a scale, K columns of one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infopt.errors import Unsupported
from infopt.kernels.triton.numeric import TINY, activate, early, quotient, to_e4m3, to_int8, wait_for_kernel_before

LONGEST = 65536
_FP8 = torch.float8_e4m3fn


@triton.jit
def _put(
    h, y, given, scale, t, g, c, C, KIND: tl.constexpr, STATIC: tl.constexpr, GROUP: tl.constexpr, GPU: tl.constexpr
):
    """Store a row h [G, K], as it is or as codes with their scales."""
    inside = c < C
    if KIND == "none":
        tl.store(y + t * C + c, h.to(y.dtype.element_ty), mask=inside)
    else:
        if STATIC:
            s = tl.load(given)
        else:
            largest: tl.constexpr = 127.0 if KIND == "int8" else 448.0
            most = tl.max(tl.where(inside, tl.abs(h), 0.0), axis=1)
            s = tl.maximum(tl.div_rn(most, tl.full(most.shape, largest, tl.float32)), TINY)
            tl.store(scale + t * tl.cdiv(C, GROUP) + g, s, mask=g * GROUP < C)
            s = s[:, None]
        if GPU and not STATIC:
            ratio = quotient(h, s, tl.div_rn(tl.full(s.shape, 1.0, tl.float32), s))
        else:
            ratio = tl.div_rn(h, s + tl.zeros_like(h))
        if KIND == "int8":
            tl.store(y + t * C + c, to_int8(ratio).to(tl.int8), mask=inside)
        else:
            tl.store(y + t * C + c, to_e4m3(ratio).to(tl.uint8), mask=inside)


@triton.jit
def _add_rms_norm(
    x, residual, weight, y, summed, given, scale, C, eps, ADD: tl.constexpr, NORM: tl.constexpr, KIND: tl.constexpr,
    STATIC: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, GPU: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_kernel_before(EARLY)
    t = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, BLOCK // GROUP)
    c = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = c < C
    h = tl.load(x + t * C + c, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        h += tl.load(residual + t * C + c, mask=inside, other=0.0).to(tl.float32)
        kept = h.to(summed.dtype.element_ty)
        tl.store(summed + t * C + c, kept, mask=inside)
        h = kept.to(tl.float32)
    if NORM:
        mean = tl.sum(tl.sum(h * h, axis=1), axis=0) / C
        h = h * tl.rsqrt(mean + eps) * tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    _put(h, y, given, scale, t, g, c, C, KIND, STATIC, GROUP, GPU)


@triton.jit
def _gated(
    x, y, given, scale, C, ACT: tl.constexpr, KIND: tl.constexpr, STATIC: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, GPU: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_kernel_before(EARLY)
    t = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, BLOCK // GROUP)
    c = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    gate = tl.load(x + t * 2 * C + c, mask=c < C, other=0.0).to(tl.float32)
    up = tl.load(x + t * 2 * C + C + c, mask=c < C, other=0.0).to(tl.float32)
    _put(activate(gate, ACT, GPU) * up, y, given, scale, t, g, c, C, KIND, STATIC, GROUP, GPU)


def add_rms_norm(
    x_TC: Tensor, residual_TC: Tensor | None, weight_C: Tensor, eps: float, kind: str = "none", group: int = 0,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y or codes [T, C], scale fp32 [T, G], h = x + residual in the dtype of x).

    kind: "none", "int8" or "fp8"; group: columns that share a scale, 0 for all; given: fp32 [1], a scale to use.
    """
    x_TC = x_TC.contiguous()
    h_TC = x_TC if residual_TC is None else torch.empty_like(x_TC)
    y, scale, launch = _prepare(x_TC, x_TC.shape[1], kind, group, given)
    residual_TC = x_TC if residual_TC is None else residual_TC.contiguous()
    if len(x_TC):
        _add_rms_norm[(len(x_TC),)](
            x_TC, residual_TC, weight_C, _bytes(y), h_TC, scale if given is None else given, scale, x_TC.shape[1], eps,
            ADD=h_TC is not x_TC, NORM=True, **launch,
        )  # fmt: skip
    return y, scale, h_TC


def quantize(x_TC: Tensor, kind: str, group: int = 0, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(codes, scale) of rows as they are; the arguments are those of `add_rms_norm`."""
    x_TC = x_TC.contiguous()
    y, scale, launch = _prepare(x_TC, x_TC.shape[1], kind, group, given)
    if len(x_TC):
        given = scale if given is None else given
        _add_rms_norm[(len(x_TC),)](
            x_TC, x_TC, x_TC, _bytes(y), x_TC, given, scale, x_TC.shape[1], 0.0, ADD=False, NORM=False, **launch
        )
    return y, scale


def gated(
    x_T2C: Tensor, act: str, kind: str = "none", group: int = 0, given: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(act(gate) * up or its codes [T, C], scale) of rows [gate | up]; the other arguments are those of `add_rms_norm`."""
    x_T2C = x_T2C.contiguous()
    width = x_T2C.shape[1] // 2
    y, scale, launch = _prepare(x_T2C, width, kind, group, given)
    if len(x_T2C):
        given = scale if given is None else given
        _gated[(len(x_T2C),)](x_T2C, _bytes(y), given, scale, width, ACT=act, **launch)
    return y, scale


def _prepare(
    x: Tensor, width: int, kind: str, group: int, given: Tensor | None
) -> tuple[Tensor, Tensor, dict[str, object]]:
    """What is written, its scales, and what a launch needs to know."""
    block = triton.next_power_of_2(width)
    if block > LONGEST:
        raise Unsupported(f"rows of {width:,} values", f"A row is held in registers, up to {LONGEST:,} values.")
    if group and (width % group or group & (group - 1)):
        raise Unsupported(f"groups of {group} in rows of {width}", "A group is a power of two and divides the row.")
    dtype = {"none": x.dtype, "int8": torch.int8, "fp8": _FP8}[kind]
    y = torch.empty(len(x), width, dtype=dtype, device=x.device)
    groups = (1, 1) if kind == "none" or given is not None else (len(x), width // group if group else 1)
    scale = torch.empty(groups, dtype=torch.float32, device=x.device) if given is None else given
    short = block <= 16384  # longer rows have no registers to spare
    warps = min(max(block // 512, 1), 32 if short else 16)
    launch = {
        "KIND": kind, "STATIC": given is not None, "GROUP": group or block, "BLOCK": block, "num_warps": warps,
        "GPU": not x.is_cpu and short, **early(x),
    }  # fmt: skip
    return y, scale, launch


def _bytes(y: Tensor) -> Tensor:
    """E4M3 is written as bits."""
    return y.view(torch.uint8) if y.dtype == _FP8 else y
