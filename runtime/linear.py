"""The module that stands in a transformers model where a quantized linear was.

Legend: T tokens (any leading dimensions), I input columns, O output channels.
"""

from __future__ import annotations

from torch import Tensor, nn

from infopt import kernels
from infopt.kernels.cpu import Precision
from infopt.qtensor import QTensor


class QuantLinear(nn.Module):
    """y = x W^T + b with a quantized W [O, I], whatever module it replaces (nn.Linear, or GPT-2's transposed Conv1D).

    Only the prepared form of the weight is kept. `kernel` names what runs.
    """

    def __init__(self, q: QTensor, bias_O: nn.Parameter | None = None, precision: Precision = "exact") -> None:
        super().__init__()
        self.out_features, self.in_features = q.shape
        self.bias = bias_O
        self._prepared = kernels.prepare(q, precision)

    @property
    def kernel(self) -> str:
        return self._prepared.kernel

    @property
    def packed_bytes(self) -> int:
        """Of the weight as it is kept."""
        return self._prepared.nbytes

    def forward(self, x_TI: Tensor) -> Tensor:
        """y [..., O] in the dtype of x [..., I]."""
        return self._prepared(x_TI, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kernel={self.kernel}"
