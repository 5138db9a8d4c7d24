"""What each quantized operation means, in plain torch and fp32. Every fast kernel is tested against this file.

    y = r(x) W^T + b,   W = (codes - zero) * scale,   r: how the grid says that inputs are rounded, if it does

Nothing here is fast, and nothing here may be clever.

Legend: T tokens (any leading dimensions), I input columns, O output channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from infopt.qtensor import QTensor


def linear(x_TI: Tensor, q: QTensor, bias_O: Tensor | None = None) -> Tensor:
    """y [..., O] in fp32 for x [..., I] of any floating dtype; the weight is dequantized in fp32 on every call."""
    bias = None if bias_O is None else bias_O.to(torch.float32)
    x_TI = x_TI.to(torch.float32) if q.grid.inputs is None else q.grid.inputs.round(x_TI, q.input_scale)
    return F.linear(x_TI, q.dequantize(torch.float32), bias)
