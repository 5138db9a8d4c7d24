"""Quantized linears on a GPU: a weight is prepared once, as the kernel that fits its grid and its inputs' reads it.

| inputs                   | weight                                  | kernel                                          |
| ------------------------ | --------------------------------------- | ----------------------------------------------- |
| floats                   | rows or groups of rows, 2 to 8 bits     | `weight.multiply`; many tokens: written out     |
| int8, per token or fixed | 8 bits, symmetric, per channel          | `rows.quantize`, `gemm.int8_linear`             |
| E4M3                     | E4M3, tensor, channels, blocks of 128   | `rows.quantize`, `fp8_product`                  |
| anything else            |                                         | dequantized once, in the precision of `exact`   |

`exact` is fp32 on a GPU too: what `verify` compares with.

Legend: T tokens, I input columns, O output channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from infopt.grid import FP8, Inputs
from infopt.kernels.cpu import Precision, PreparedLinear
from infopt.kernels.packing import Packed
from infopt.kernels.triton import gemm, rows, weight
from infopt.qtensor import QTensor

MANY = 128  # tokens from which a weight is written out for one product
SOME = 64  # tokens from which torch's product of E4M3 is the faster one
TYPE = torch.bfloat16
_NAMES = {"int4": "triton-w4a16", "int8": "triton-w8a16", "fp8": "triton-fp8a16"}


def prepare(q: QTensor, precision: Precision = "exact") -> PreparedLinear:
    """The kernel for this weight on its device; `.kernel` tells which."""
    inputs = q.grid.inputs
    if precision == "packed":
        if inputs is None and _groups(q):
            return _weight_only(q)
        if inputs is not None and _fits_int8(q, inputs):
            return _int8(q, inputs)
        if inputs is not None and _fits_fp8(q, inputs):
            return _fp8(q, inputs)
    w_OI = q.dequantize(torch.float32)
    if inputs is not None:
        return PreparedLinear("fp32", lambda x_TI: F.linear(inputs.round(x_TI, q.input_scale), w_OI), w_OI.nbytes)
    return PreparedLinear("fp32", lambda x_TI: F.linear(x_TI.to(torch.float32), w_OI), w_OI.nbytes)


def _groups(q: QTensor) -> bool:
    return q.grid.rows == 1 and (q.grid.group is None or q.grid.group % 32 == 0)


def _weight_only(q: QTensor) -> PreparedLinear:
    packed = Packed.of(q)

    def multiply(x_TI: Tensor) -> Tensor:
        x_TI = x_TI.to(TYPE)
        if len(x_TI) >= MANY:
            return F.linear(x_TI, weight.dequantize(packed, TYPE)).float()
        return weight.multiply(x_TI, packed).float()

    return PreparedLinear(_NAMES[packed.kind], multiply, packed.nbytes)


def _fits_int8(q: QTensor, inputs: Inputs) -> bool:
    own = q.grid.strategy in ("channel", "tensor") and q.grid.symmetric and inputs.group is None
    return own and q.grid.kind == inputs.kind == "int" and q.grid.bits == 8


def _int8(q: QTensor, inputs: Inputs) -> PreparedLinear:
    codes_OI = (q.codes.to(torch.int16) - q.grid.middle).to(torch.int8)
    scale = q.scale.to(torch.float32)

    def multiply(x_TI: Tensor) -> Tensor:
        x_TI, x_scale = rows.quantize(x_TI, "int8", given=None if inputs.dynamic else q.input_scale)
        return gemm.int8_linear(x_TI, x_scale, codes_OI, scale, None, torch.float32)

    return PreparedLinear("triton-w8a8", multiply, codes_OI.nbytes + scale.nbytes)


def _fits_fp8(q: QTensor, inputs: Inputs) -> bool:
    if q.grid.kind != "float" or inputs.kind != "float" or inputs.group not in (None, gemm.BLOCK):
        return False
    return q.grid.group in (None, gemm.BLOCK) and (inputs.group is None or q.shape[1] % gemm.BLOCK == 0)


def _fp8(q: QTensor, inputs: Inputs) -> PreparedLinear:
    codes_OI, scale = q.codes.view(FP8), q.scale.to(torch.float32)

    def multiply(x_TI: Tensor) -> Tensor:
        given = None if inputs.dynamic else q.input_scale
        x_TI, x_scale = rows.quantize(x_TI, "fp8", inputs.group or 0, given)
        return fp8_product(x_TI, x_scale, codes_OI, scale, q.grid.rows or q.shape[0], torch.float32)

    return PreparedLinear("triton-fp8", multiply, codes_OI.nbytes + scale.nbytes)


def fp8_product(
    x_TI: Tensor, x_scale: Tensor, w_OI: Tensor, w_scale_RG: Tensor, rows_of_scale: int, dtype: torch.dtype
) -> Tensor:
    """y [T, O]; the arguments are those of `gemm.fp8_linear`. Many tokens go to torch's own kernel, which rounds y to bf16,
    where it has one: for scales of whole rows on Hopper and later."""
    tokens, (rows, columns) = len(x_TI), w_OI.shape
    capability = torch.cuda.get_device_capability(w_OI.device) if w_OI.is_cuda else (8, 9)
    whole = x_scale.shape[-1] == w_scale_RG.shape[1] == 1 and rows_of_scale in (1, rows)
    if tokens < SOME or not whole or rows % 16 or columns % 16 or not w_OI.is_cuda or capability < (9, 0):
        return gemm.fp8_linear(x_TI, x_scale, w_OI, w_scale_RG, rows_of_scale, None, dtype, capability >= (8, 9))
    x_scale, w_scale = x_scale.reshape(-1, 1).expand(tokens, 1), w_scale_RG.reshape(1, -1).expand(1, rows)
    y_TO = torch._scaled_mm(x_TI, w_OI.T, x_scale.contiguous(), w_scale.contiguous(), out_dtype=TYPE)
    return y_TO.to(dtype)
