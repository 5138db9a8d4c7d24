"""One operation, one meaning (`reference.py`), several backends. `prepare` picks the backend for a weight.

The processor backend is the only one so far; a weight on any other device is an error here, not a slow surprise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from infopt.errors import Unsupported

if TYPE_CHECKING:  # torch is imported when a kernel is asked for, so that this package costs nothing to import
    from infopt.kernels.cpu import PreparedLinear
    from infopt.qtensor import QTensor

__all__ = ["prepare"]


def prepare(q: QTensor, precision: Literal["exact", "packed"] = "exact", compiled: bool = True) -> PreparedLinear:
    """A callable linear for the quantized weight `q`, on the device where its codes are. compiled: C++ may be used."""
    from infopt.kernels import cpu

    device = q.codes.device.type
    if device != "cpu":
        raise Unsupported(f"A quantized weight lies on the device {device!r}.", "Kernels exist for the processor only.")
    return cpu.prepare(q, precision, compiled)
