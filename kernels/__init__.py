"""One operation, one meaning (`reference.py`), several backends. `prepare` picks the backend for a weight.

There is one for processors (`cpu.py`) and one for NVIDIA GPUs (`cuda/`); a weight on any other device is an error here,
not a slow surprise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

from infopt.errors import Unsupported

if TYPE_CHECKING:  # torch is imported when a kernel is asked for, so that this package costs nothing to import
    from torch import Tensor

    from infopt.qtensor import QTensor

__all__ = ["Linear", "prepare"]


class Linear(Protocol):
    """A quantized weight, ready for use."""

    @property
    def kernel(self) -> str:
        """What runs."""

    @property
    def nbytes(self) -> int:
        """Of the weight as it is kept, which is what a token reads."""

    def __call__(self, x_TI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """y [..., O] in the dtype of x [..., I]."""


def prepare(q: QTensor, precision: Literal["exact", "packed"] = "exact") -> Linear:
    """A callable linear for the quantized weight `q`, on the device where its codes are."""
    device = q.codes.device.type
    if device == "cuda":
        from infopt.kernels.cuda import linear

        return linear.prepare(q, precision)
    if device != "cpu":
        raise Unsupported(f"A quantized weight lies on the device {device!r}.", "Kernels exist for CPUs and CUDA GPUs.")
    from infopt.kernels import cpu

    return cpu.prepare(q, precision)
