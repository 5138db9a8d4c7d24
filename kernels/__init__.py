"""One operation, one meaning (`reference.py`), several backends. `prepare` picks the backend for a weight.

A weight in memory is used by the processor (`cpu.py`), one on a GPU by the CUDA C++ kernels (`cuda/`: 4 and 8 bits) or
by Triton's (`triton/`: inputs in 8 bits too); on any other device it is an error here, not a slow surprise. `operators.py`
has the operations without a weight's state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

from infopt.errors import Unsupported

if TYPE_CHECKING:  # torch is imported when a kernel is asked for, so that this package costs nothing to import
    from torch import Tensor

    from infopt.grid import Inputs
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

    @property
    def inputs(self) -> Inputs | None:
        """How the kernel rounds what it reads, None where it does not (but to the type that it computes in)."""

    def __call__(self, x_TI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """y [..., O] in the dtype of x [..., I]."""


def prepare(q: QTensor, precision: Literal["exact", "packed"] = "exact", compiled: bool = True) -> Linear:
    """A callable linear for the quantized weight `q`, on the device where its codes are. compiled: C++ may be used."""
    device = q.codes.device.type
    if device == "cpu" or (device == "cuda" and precision == "exact"):
        from infopt.kernels import cpu

        return cpu.prepare(q, precision, compiled)
    if device == "cuda":
        from infopt.kernels.cuda.linear import CudaLinear

        return CudaLinear.of(q) or _by_triton(q)
    raise Unsupported(
        f"A quantized weight lies on the device {device!r}.", "Kernels exist for processors and CUDA GPUs."
    )


def _by_triton(q: QTensor) -> Linear:
    try:
        from infopt.kernels.triton import linear
    except ModuleNotFoundError as error:
        what, why = "The kernels for GPUs need Triton.", f"{error.name} is not installed."
        raise Unsupported(what, why, 'pip install "infopt[gpu]"') from error
    return linear.prepare(q, "packed")
