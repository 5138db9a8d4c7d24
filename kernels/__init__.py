"""One operation, one meaning (`reference.py`), several backends. `prepare` picks the backend for a weight.

A weight in memory is used by the processor (`cpu.py`), one on a GPU by Triton's kernels (`triton/linear.py`); on any other
device it is an error here, not a slow surprise. `operators.py` has the operations without a weight's state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from infopt.errors import Unsupported

if TYPE_CHECKING:  # torch is imported when a kernel is asked for, so that this package costs nothing to import
    from infopt.kernels.cpu import PreparedLinear
    from infopt.qtensor import QTensor

__all__ = ["prepare"]


def prepare(q: QTensor, precision: Literal["exact", "packed"] = "exact") -> PreparedLinear:
    """A callable linear for the quantized weight `q`, on the device where its codes are."""
    device = q.codes.device.type
    if device == "cpu":
        from infopt.kernels import cpu

        return cpu.prepare(q, precision)
    if device == "cuda":
        try:
            from infopt.kernels.triton import linear
        except ModuleNotFoundError as error:
            what, why = "The kernels for GPUs need Triton.", f"{error.name} is not installed."
            raise Unsupported(what, why, 'pip install "infopt[gpu]"') from error
        return linear.prepare(q, precision)
    raise Unsupported(
        f"A quantized weight lies on the device {device!r}.", "Kernels exist for processors and CUDA GPUs."
    )
