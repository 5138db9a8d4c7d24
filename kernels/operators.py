"""The kernels as operators of torch, `torch.ops.infopt.*`: so that graphs, exports and profilers know them.

Each is what `reference.py` says on a processor and Triton's kernel (`tile_linear`: that in CUDA C++) on a GPU, and
has a fake implementation, which gives
shapes and types without computing. Import this module to define them. Nothing returned shares memory with an argument, as
torch asks of operators, so a scale that was given comes back as a copy.

`kind` is "none", "int8" or "fp8" for activations; "none", "fp8", "int8" or "int4" for caches (see `pages.py`).

Legend: T tokens, C width, I input columns, O output channels, B texts, Q queries, K tokens, N tokens in any order, H heads,
D channels of a head, P pages of a text, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from infopt.grid import FP8, Inputs
from infopt.kernels import reference, sampling
from infopt.kernels.cuda.layout import Codes, ungated
from infopt.kernels.cuda.layout import Packed as Tiles
from infopt.kernels.packing import Packed
from infopt.kernels.pages import Pages
from infopt.kv_cache import CacheGrid, Strategy

_CODES = {"int8": torch.int8, "fp8": FP8}


def _quantized(y_TC: Tensor, like: Tensor, kind: str, group: int, given: Tensor | None) -> tuple[Tensor, Tensor]:
    """The reference's end of a row: as it is, or as codes with their scales."""
    if kind == "none":
        return y_TC.to(like.dtype), y_TC.new_empty(1, 1)
    inputs = Inputs("int" if kind == "int8" else "float", given is None, group or None)
    codes_TC, scale = reference.quantize(y_TC, inputs, given)
    return codes_TC, scale if given is None else given.clone()


def _fake_quantized(x: Tensor, width: int, kind: str, group: int, given: Tensor | None) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.shape[0], width, dtype=_CODES.get(kind, x.dtype))
    if given is not None:
        return codes, torch.empty_like(given)
    shape = (1, 1) if kind == "none" else (x.shape[0], width // group if group else 1)
    return codes, x.new_empty(shape, dtype=torch.float32)


def _own(scale: Tensor, given: Tensor | None) -> Tensor:
    return scale if given is None else scale.clone()


# Rows


@custom_op("infopt::add_rms_norm", mutates_args=(), device_types="cpu")
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, kind: str = "none", group: int = 0,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y or codes [T, C], scales, x + residual)."""
    y, h = reference.add_rms_norm(x, residual, weight, eps)
    return *_quantized(y, x, kind, group, given), h


@add_rms_norm.register_kernel("cuda")
def _(x, residual, weight, eps, kind="none", group=0, given=None):
    from infopt.kernels.triton import rows

    y, scale, h = rows.add_rms_norm(x, residual, weight, eps, kind, group, given)
    return y, _own(scale, given), h


@add_rms_norm.register_fake
def _(x, residual, weight, eps, kind="none", group=0, given=None):
    return *_fake_quantized(x, x.shape[1], kind, group, given), torch.empty_like(x)


@custom_op("infopt::rms_norm", mutates_args=(), device_types="cpu")
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, kind: str = "none", group: int = 0, given: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(y or codes [T, C], scales)."""
    return _quantized(reference.rms_norm(x, weight, eps), x, kind, group, given)


@rms_norm.register_kernel("cuda")
def _(x, weight, eps, kind="none", group=0, given=None):
    from infopt.kernels.triton import rows

    y, scale, _ = rows.add_rms_norm(x, None, weight, eps, kind, group, given)
    return y, _own(scale, given)


@rms_norm.register_fake
def _(x, weight, eps, kind="none", group=0, given=None):
    return _fake_quantized(x, x.shape[1], kind, group, given)


@custom_op("infopt::gated", mutates_args=(), device_types="cpu")
def gated(
    x: Tensor, act: str, kind: str = "none", group: int = 0, given: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(act(gate) * up or its codes, scales) of rows [gate | up]."""
    return _quantized(reference.gated(x, act), x, kind, group, given)


@gated.register_kernel("cuda")
def _(x, act, kind="none", group=0, given=None):
    from infopt.kernels.triton import rows

    y, scale = rows.gated(x, act, kind, group, given)
    return y, _own(scale, given)


@gated.register_fake
def _(x, act, kind="none", group=0, given=None):
    return _fake_quantized(x, x.shape[1] // 2, kind, group, given)


@custom_op("infopt::quantize", mutates_args=(), device_types="cpu")
def quantize(x: Tensor, kind: str, group: int = 0, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(codes [T, C], scales)."""
    return _quantized(x.float(), x, kind, group, given)


@quantize.register_kernel("cuda")
def _(x, kind, group=0, given=None):
    from infopt.kernels.triton import rows

    codes, scale = rows.quantize(x, kind, group, given)
    return codes, _own(scale, given)


@quantize.register_fake
def _(x, kind, group=0, given=None):
    return _fake_quantized(x, x.shape[1], kind, group, given)


# Linear layers


@custom_op("infopt::packed_linear", mutates_args=(), device_types="cpu")
def packed_linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, kind: str, part: int, columns: int,
    bias: Tensor | None = None, act: str = "none",
) -> Tensor:  # fmt: skip
    """act(x W^T + b) [T, O]; the weight's parts are those of `packing.Packed`."""
    w_OI = Packed(codes, scale, zero, kind, part, columns).dequantize()
    y_TO = torch.nn.functional.linear(x.float(), w_OI, None if bias is None else bias.float())
    return reference.ACTIVATIONS[act](y_TO).to(x.dtype, copy=True)


@packed_linear.register_kernel("cuda")
def _(x, codes, scale, zero, kind, part, columns, bias=None, act="none"):
    from infopt.kernels.triton import weight

    return weight.multiply(x, Packed(codes, scale, zero, kind, part, columns), bias, act)


@packed_linear.register_fake
def _(x, codes, scale, zero, kind, part, columns, bias=None, act="none"):
    return x.new_empty(x.shape[0], codes.shape[0])


@custom_op("infopt::tile_linear", mutates_args=(), device_types="cpu")
def tile_linear(
    x: Tensor, weight: Tensor, scales: Tensor, arrived: Tensor, shape: Sequence[int], codes: str,
    scale_dtype: torch.dtype, group: int, zeros: bool, zero: int, bias: Tensor | None = None, gated: bool = False,
    ahead: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x W^T + b [T, O]; the weight's parts are those of `cuda.layout.Packed`, and `arrived` is as it was afterwards.
    gated: silu of the first half times the second [T, O / 2]; the bias is in the order of the packed rows. ahead: the weight
    of what is multiplied with next, which changes no result."""
    packed = _tiles(weight, scales, arrived, shape, codes, scale_dtype, group, zeros, zero, gated)
    bias = None if bias is None else (ungated(bias[:, None])[:, 0] if gated else bias).float()
    y = torch.nn.functional.linear(x.float(), packed.dequantize(torch.float32), bias)
    return (reference.gated(y, "silu") if gated else y).to(x.dtype, copy=True)


@tile_linear.register_kernel("cuda")
def _(x, weight, scales, arrived, shape, codes, scale_dtype, group, zeros, zero, bias=None, gated=False, ahead=None):
    from infopt.kernels.cuda import linear

    packed = _tiles(weight, scales, arrived, shape, codes, scale_dtype, group, zeros, zero, gated)
    return linear.multiply(packed, x, bias, ahead)


@tile_linear.register_fake
def _(x, weight, scales, arrived, shape, codes, scale_dtype, group, zeros, zero, bias=None, gated=False, ahead=None):
    return x.new_empty(x.shape[0], shape[0] // 2 if gated else shape[0])


def _tiles(
    weight: Tensor, scales: Tensor, arrived: Tensor, shape: Sequence[int], codes: str, scale_dtype: torch.dtype,
    group: int, zeros: bool, zero: int, gated: bool,
) -> Tiles:  # fmt: skip
    kind: Codes = "FP8" if codes == "FP8" else "INT8" if codes == "INT8" else "INT4"
    return Tiles(weight, scales, arrived, (shape[0], shape[1]), kind, scale_dtype, group, zeros, zero, gated)


@custom_op("infopt::int8_linear", mutates_args=(), device_types="cpu")
def int8_linear(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """[T, O] of int8 codes; scales [T, 1] or [1], and [O, 1] or [1, 1]."""
    return _codes_linear(x, x_scale, w, w_scale, 1 if len(w_scale) > 1 else len(w), bias).to(dtype)


@int8_linear.register_kernel("cuda")
def _(x, x_scale, w, w_scale, bias, dtype):
    from infopt.kernels.triton import gemm

    return gemm.int8_linear(x, x_scale, w, w_scale, bias, dtype)


@int8_linear.register_fake
def _(x, x_scale, w, w_scale, bias, dtype):
    return x.new_empty(x.shape[0], w.shape[0], dtype=dtype)


@custom_op("infopt::fp8_linear", mutates_args=(), device_types="cpu")
def fp8_linear(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, rows: int, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """[T, O] of E4M3 codes; scales [T, G] or [1], and [R, G], for `rows` rows and 128 columns each, or for all columns."""
    return _codes_linear(x, x_scale, w, w_scale, rows, bias).to(dtype)


@fp8_linear.register_kernel("cuda")
def _(x, x_scale, w, w_scale, rows, bias, dtype):
    from infopt.kernels.triton import gemm

    native = torch.cuda.get_device_capability(x.device) >= (8, 9)
    return gemm.fp8_linear(x, x_scale, w, w_scale, rows, bias, dtype, native)


@fp8_linear.register_fake
def _(x, x_scale, w, w_scale, rows, bias, dtype):
    return x.new_empty(x.shape[0], w.shape[0], dtype=dtype)


def _codes_linear(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, rows: int, bias: Tensor | None) -> Tensor:
    each = x_scale.reshape(1, 1).expand(len(x), 1) if x_scale.numel() == 1 else x_scale
    return reference.codes_linear(x, each, w, w_scale, rows, bias)


@custom_op("infopt::norm_linear", mutates_args=(), device_types="cpu")
def norm_linear(x: Tensor, v: Tensor, sums: Tensor | None, bias: Tensor, eps: float, act: str = "none") -> Tensor:
    """act(layer_norm(x) W^T + b) [T, O] of a folded weight; without its sums, act(x V^T + b)."""
    if sums is None:
        return reference.ACTIVATIONS[act](torch.nn.functional.linear(x.float(), v.float(), bias.float())).to(x.dtype)
    one = torch.ones(x.shape[1], device=x.device)
    return reference.norm_linear(x, one, torch.zeros_like(one), eps, v, bias, act).to(x.dtype)


@norm_linear.register_kernel("cuda")
def _(x, v, sums, bias, eps, act="none"):
    from infopt.kernels.triton import gemm

    return gemm.norm_linear(x, v, sums, bias, eps, act)


@norm_linear.register_fake
def _(x, v, sums, bias, eps, act="none"):
    return x.new_empty(x.shape[0], v.shape[0])


@custom_op("infopt::rescore", mutates_args=(), device_types="cpu")
def rescore(rough: Tensor, x: Tensor, weight: Tensor, margin: Tensor, bias: Tensor | None = None) -> Tensor:
    """logits fp32 [T, V] of rough ones, exact where they may be the largest; margin fp32 [V]."""
    return reference.rescore(rough, x, weight, margin, bias)


@rescore.register_kernel("cuda")
def _(rough, x, weight, margin, bias=None):
    from infopt.kernels.triton import head

    return head.rescore(rough, x, weight, margin, bias)


@rescore.register_fake
def _(rough, x, weight, margin, bias=None):
    return torch.empty_like(rough, dtype=torch.float32, memory_format=torch.contiguous_format)


# Attention


def _pages(codes: Tensor, scale: Tensor | None, zero: Tensor | None, kind: str) -> Pages:
    if scale is None:
        return Pages(codes)
    strategy: Strategy = (
        "token" if scale.dim() == 3 else "tensor"
    )  # how a calibration shares its scales is in their shape
    grid = CacheGrid("float" if kind == "fp8" else "int", 4 if kind == "int4" else 8, strategy, zero is None)
    return Pages(codes, scale, zero, grid)


@custom_op(
    "infopt::rope_write",
    mutates_args=("k_codes", "k_scale", "k_zero", "v_codes", "v_scale", "v_zero"),
    device_types="cpu",
)
def rope_write(
    qkv: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, slots: Tensor,
    k_codes: Tensor, k_scale: Tensor | None, k_zero: Tensor | None, v_codes: Tensor, v_scale: Tensor | None,
    v_zero: Tensor | None, kind: str,
) -> Tensor:  # fmt: skip
    """q [N, Hq, D] of qkv [N, Hq + 2 H, D]; keys and values go to the cache."""
    keys, values = _pages(k_codes, k_scale, k_zero, kind), _pages(v_codes, v_scale, v_zero, kind)
    return reference.rope_write(qkv, cos, sin, q_weight, k_weight, eps, slots, keys, values).to(qkv.dtype)


@rope_write.register_kernel("cuda")
def _(qkv, cos, sin, q_weight, k_weight, eps, slots, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, kind):
    from infopt.kernels.triton import cache

    keys, values = _pages(k_codes, k_scale, k_zero, kind), _pages(v_codes, v_scale, v_zero, kind)
    return cache.rope_write(qkv, cos, sin, q_weight, k_weight, eps, slots, keys, values)


@rope_write.register_fake
def _(qkv, cos, sin, q_weight, k_weight, eps, slots, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, kind):
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] - 2 * k_codes.shape[1], qkv.shape[2])


@custom_op("infopt::paged_decode", mutates_args=(), device_types="cpu")
def paged_decode(
    q: Tensor, k_codes: Tensor, k_scale: Tensor | None, k_zero: Tensor | None, v_codes: Tensor, v_scale: Tensor | None,
    v_zero: Tensor | None, kind: str, tables: Tensor, pages: Tensor, lengths: Tensor, scaling: float,
    window: int | None = None, cap: float | None = None,
) -> Tensor:  # fmt: skip
    """[B, Hq, D]: one token of each text over its pages."""
    keys, values = _pages(k_codes, k_scale, k_zero, kind), _pages(v_codes, v_scale, v_zero, kind)
    return reference.paged_decode(q, keys, values, tables, pages, lengths, scaling, window, cap).to(q.dtype)


@paged_decode.register_kernel("cuda")
def _(
    q, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, kind, tables, pages, lengths, scaling, window=None, cap=None
):
    from infopt.kernels.triton import decode

    keys, values = _pages(k_codes, k_scale, k_zero, kind), _pages(v_codes, v_scale, v_zero, kind)
    return decode.paged_decode(q, keys, values, tables, pages, lengths, scaling, window, cap)


@paged_decode.register_fake
def _(
    q, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, kind, tables, pages, lengths, scaling, window=None, cap=None
):
    return torch.empty_like(q)


@custom_op("infopt::attention", mutates_args=(), device_types="cpu")
def attention(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None = None, cap: float | None = None
) -> Tensor:
    """[B, Hq, Q, D], laid out as [B, Q, Hq, D]: causal, the last query is the last token."""
    y = reference.attention(q, k, v, scaling, window, cap).to(q.dtype)
    return y.transpose(1, 2).contiguous().transpose(1, 2)


@attention.register_kernel("cuda")
def _(q, k, v, scaling, window=None, cap=None):
    from infopt.kernels.triton import attention as kernel

    return kernel.attention(q, k, v, scaling, window, cap)


@attention.register_fake
def _(q, k, v, scaling, window=None, cap=None):
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)


# Sampling


@custom_op("infopt::sample", mutates_args=(), device_types="cpu")
def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, position: Tensor
) -> Tensor:
    """int64 [B] of logits [B, V]."""
    return sampling.sample(logits, temperature, top_k, top_p, min_p, seed, position)


@sample.register_kernel("cuda")
def _(logits, temperature, top_k, top_p, min_p, seed, position):
    from infopt.kernels.triton import sampling as kernel

    return kernel.sample(logits, temperature, top_k, top_p, min_p, seed, position)


@sample.register_fake
def _(logits, temperature, top_k, top_p, min_p, seed, position):
    return logits.new_empty(logits.shape[0], dtype=torch.int64)
