"""Quantized linears on a GPU: a weight is packed once, then used for every token.

`packed` keeps the weight in its 4 or 8 bits: up to 32 tokens by the decode kernel, more (a prompt) by the weight written
out in the activations' type for that product and torch's matrix multiplication.

Legend: T tokens (any leading dimensions), I input columns, O output channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from infopt.kernels.cuda import decode
from infopt.kernels.cuda.dense import dense
from infopt.kernels.cuda.layout import Packed, gated_order, pack, ungated
from infopt.kernels.operators import tile_linear
from infopt.qtensor import QTensor


@dataclass(eq=False)
class CudaLinear:
    """A weight ready for use. fp16 and bf16 activations are multiplied as they are, others rounded to bf16.

    ahead: the packed weight that is multiplied with next, where that is known: a few tokens' kernel brings a part of it nearer.
    """

    packed: Packed
    ahead: Tensor | None = None

    @classmethod
    def of(cls, q: QTensor, gated: bool = False) -> CudaLinear | None:
        """The weight packed on its own GPU; None for what the kernel does not read. gated: its first half is a gate, of which
        silu is taken, and its second half what that is multiplied with."""
        packed = pack(q, gated)
        return None if packed is None else cls(packed)

    @property
    def kernel(self) -> str:
        return f"cuda-{self.packed.codes.lower()}"

    @property
    def nbytes(self) -> int:
        """Of the weight as it is kept, which is what a token reads."""
        return self.packed.nbytes

    @property
    def inputs(self) -> None:
        """It rounds nothing."""

    def __call__(self, x_TI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """y [..., O], or [..., O / 2] of a gated weight, in the dtype of x [..., I]; the bias is added before y is rounded."""
        flat_TI, p = x_TI.reshape(-1, x_TI.shape[-1]), self.packed
        if flat_TI.dtype not in (torch.float16, torch.bfloat16):
            flat_TI = flat_TI.to(torch.bfloat16)
        if p.gated and bias_O is not None:
            bias_O = bias_O[gated_order(len(bias_O)).to(bias_O.device)]
        parts = (p.weight, p.scales, p.arrived, p.shape, p.codes, p.scale_dtype, p.group, p.zeros, p.zero)
        y_TO = tile_linear(flat_TI, *parts, bias_O, p.gated, self.ahead)
        return y_TO.to(x_TI.dtype).reshape(*x_TI.shape[:-1], y_TO.shape[-1])


def follow(linears: Sequence[object]) -> None:
    """Tell each of these, in a circle, which comes after it."""
    for one, after in zip(linears, [*linears[1:], *linears[:1]], strict=True):
        if isinstance(one, CudaLinear) and isinstance(after, CudaLinear):
            one.ahead = after.packed.weight


def multiply(packed: Packed, x_TI: Tensor, bias_O: Tensor | None, ahead: Tensor | None) -> Tensor:
    """What the operator does on a GPU."""
    if len(x_TI) <= decode.MOST_TOKENS:
        return decode.multiply(packed, x_TI, bias_O, ahead=ahead)
    bias = None if bias_O is None else bias_O.to(x_TI.dtype)
    if not packed.gated:
        return F.linear(x_TI, dense(packed, x_TI.dtype), bias)
    from infopt.kernels.triton import rows  # where a GPU is

    bias = None if bias is None else ungated(bias[:, None])[:, 0]
    return rows.gated(F.linear(x_TI, dense(packed, x_TI.dtype), bias), "silu")[0]
