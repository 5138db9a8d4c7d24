"""Quantized linears on a processor: a weight is prepared once, then used for every token.

Two precisions, for two purposes:

* `exact`: dequantized once to fp32, then `F.linear`. The arithmetic of the float model, so a comparison with it sees
  the error of the checkpoint and nothing else. The default of `verify` and `eval`.
* `packed`: the weights stay packed in memory. Where a C++ compiler is at hand, `native.py` multiplies them with activations
  rounded to 8 bits, for any number of tokens. Else kernels of torch, with activations in bf16; each has limits that it does not
  always check itself, so all of them are checked here; where none holds, the answer is `exact`.

  | kernel     | grid                           | limits                                                          |
  | ---------- | ------------------------------ | --------------------------------------------------------------- |
  | `w4a8`     | up to 4 bits, any zero point   | a C++ compiler, I and columns per scale multiples of 32         |
  | `w8a8`     | 8 bits, any zero point         | the same                                                        |
  | `int4pack` | up to 4 bits, any zero point   | O % 16 == 0, columns per scale in 32, 64, 128, 256              |
  | `int8pack` | 8 bits, symmetric, per channel | I % 16 == 0: without it torch reads out of bounds and can crash |

`int4pack` computes w = (code - 8) * scale + offset, so an integer zero point z is the offset (8 - z) * scale; a code of
2 or 3 bits is also one of 4. A scale per channel is repeated for pieces of 256 columns or fewer. Both kernels are
vectorised on AVX2 and AVX-512, and plain (slow) code everywhere else. Activations, scales and offsets are rounded to
bf16, hence their relative error of about 3e-3. Many tokens at once (a prompt) are multiplied by the weight written
out in fp32 for that product (`int4_dense.py`), which is faster and more exact. Refused: fp16 and fp32 activations with
these kernels; torch has only scalar code for them, 30 times slower than dequantizing.

Legend: T tokens (any leading dimensions), I input columns, O output channels, G groups of columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from infopt.grid import Inputs
from infopt.kernels.int4_dense import MANY, Int4Dense
from infopt.kernels.native import ROUNDED, Native, PackedWeight, fits, native
from infopt.qtensor import QTensor

Precision = Literal["exact", "packed"]
_INT4_GROUPS = (256, 128, 64, 32)


@dataclass(frozen=True)
class PreparedLinear:
    """A weight ready for use. `kernel` says what runs: "fp32", "int4pack", "int8pack", "w4a8" or "w8a8"."""

    kernel: str
    multiply: Callable[[Tensor], Tensor]  # [T, I] -> [T, O], both fp32
    nbytes: int  # of the weight as it is kept, which is what a token reads
    inputs: Inputs | None = None  # how the kernel rounds what it reads, None where it does not (but to bf16)
    weight: PackedWeight | None = None  # what the C++ reads, where it is the kernel

    def __call__(self, x_TI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """y [..., O] in the dtype of x [..., I]."""
        y_TO = self.multiply(x_TI.reshape(-1, x_TI.shape[-1]))
        if bias_O is not None:
            y_TO = y_TO + bias_O.to(y_TO.dtype)
        return y_TO.to(x_TI.dtype).reshape(*x_TI.shape[:-1], y_TO.shape[-1])


def prepare(q: QTensor, precision: Precision = "exact", compiled: bool = True) -> PreparedLinear:
    """The kernel for this weight; `packed` falls back to `exact` outside the kernels' limits, and `.kernel` tells.
    compiled: whether the C++ may be used."""
    if precision == "packed" and compiled and fits(q) and (library := native()) is not None:
        return _native(q, library)
    if precision == "packed" and q.grid.kind == "int" and q.grid.rows == 1 and q.grid.inputs is None:
        if (group := _int4_group(q)) is not None:
            return _int4pack(q, group)
        if _fits_int8(q):
            return _int8pack(q)
    w_OI = q.dequantize(torch.float32)
    if (inputs := q.grid.inputs) is not None:
        return PreparedLinear(
            "fp32", lambda x_TI: F.linear(inputs.round(x_TI, q.input_scale), w_OI), w_OI.nbytes, inputs
        )
    return PreparedLinear("fp32", lambda x_TI: F.linear(x_TI.to(torch.float32), w_OI), w_OI.nbytes)


def _native(q: QTensor, library: Native) -> PreparedLinear:
    weight = PackedWeight(library, q)
    kernel = "w8a8" if q.grid.bits == 8 else "w4a8"
    return PreparedLinear(kernel, weight.multiply, weight.nbytes, q.grid.inputs or ROUNDED, weight)


def _int4_group(q: QTensor) -> int | None:
    """The number of columns per scale that the kernel would use, None where it cannot be used."""
    rows, columns = q.shape
    if q.grid.bits > 4 or rows % 16 or not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return None
    width = q.grid.width(columns)
    if q.grid.group is not None:
        return width if width in _INT4_GROUPS and columns % width == 0 else None
    return next((group for group in _INT4_GROUPS if width % group == 0), None)


def _int4pack(q: QTensor, group: int) -> PreparedLinear:
    columns = q.shape[1]
    codes_OI, offset_OG = _centred(q)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes_OI.to(torch.int32), 1)
    scale_OG = q.scale.to(torch.float32)
    repeats = columns // group // scale_OG.shape[1]
    pairs = torch.stack([scale_OG, offset_OG], dim=-1).repeat_interleave(repeats, dim=1)
    scale_offset_GO2 = pairs.transpose(0, 1).contiguous().to(torch.bfloat16)
    dense = Int4Dense.find(packed, codes_OI)

    def multiply(x_TI: Tensor) -> Tensor:
        if dense is not None and len(x_TI) >= MANY:
            return dense.multiply(x_TI, scale_offset_GO2)
        x_TI = x_TI.to(torch.bfloat16).contiguous()
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x_TI, packed, group, scale_offset_GO2).to(torch.float32)

    return PreparedLinear("int4pack", multiply, packed.nbytes + scale_offset_GO2.nbytes)


def _centred(q: QTensor) -> tuple[Tensor, Tensor]:
    """(codes [O, I], offset [O, G]) with w = (codes - 8) * s + offset.

    Codes are moved so that the zero point is 8 and the offset vanishes wherever they still fit 4 bits: always for symmetric
    grids and for 2 and 3 bits. A large offset that the codes have to cancel would lose bits to its rounding to bf16.
    """
    columns_per_scale = q.shape[1] // q.zero.shape[1]
    moved_OI = q.codes.to(torch.int16) + 8 - q.zero.to(torch.int16).repeat_interleave(columns_per_scale, dim=1)
    if moved_OI.amin() >= 0 and moved_OI.amax() <= 15:
        return moved_OI, torch.zeros_like(q.scale, dtype=torch.float32)
    return q.codes, (8 - q.zero.to(torch.float32)) * q.scale.to(torch.float32)


def _fits_int8(q: QTensor) -> bool:
    return q.grid.bits == 8 and q.grid.symmetric and q.scale.shape[1] == 1 and q.shape[1] % 16 == 0


def _int8pack(q: QTensor) -> PreparedLinear:
    codes_OI = (q.codes.to(torch.int16) - q.grid.middle).to(torch.int8)
    scale_O = q.scale[:, 0].to(torch.bfloat16)

    def multiply(x_TI: Tensor) -> Tensor:
        if len(x_TI) >= MANY:
            return F.linear(x_TI.to(torch.float32), codes_OI.to(torch.float32)).mul_(scale_O)
        return torch._weight_int8pack_mm(x_TI.to(torch.bfloat16).contiguous(), codes_OI, scale_O).to(torch.float32)

    return PreparedLinear("int8pack", multiply, codes_OI.nbytes + scale_O.nbytes)
