"""A packed weight written out for a product with many tokens (`dequantize.cuh`), on a GPU in one pass over its bytes."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from infopt.kernels import jit
from infopt.kernels.cuda.decode import WARPS, architecture, headers, variant
from infopt.kernels.cuda.layout import FLOATS, Packed, ungated

_BLOCKS_PER_PROCESSOR = 8
_ENTRY = """#include "device.cuh"
#include "dequantize.cuh"
extern "C" __global__ void __launch_bounds__(THREADS) kernel(const Dequantize d) {{ dequantize<{variant}>(d); }}
"""


class Arguments(ctypes.Structure):
    """`Dequantize` of dequantize.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "scales", "w")),
        *((name, ctypes.c_int) for name in ("rows", "columns")),
    ]


def source(variant: str) -> jit.Source:
    return jit.Source(
        _ENTRY.format(variant=variant), headers("device.cuh", "unpack.cuh", "decode.cuh", "dequantize.cuh")
    )


def dense(packed: Packed, dtype: torch.dtype) -> Tensor:
    """W [O, I], the same bits as `packed.dequantize(dtype)`; by a kernel where the weight is on a GPU and dtype has 16 bits."""
    device = packed.weight.device
    if device.type != "cuda" or dtype not in FLOATS or dtype is torch.float32:
        return packed.dequantize(dtype)
    w_OI = torch.empty(packed.shape, dtype=dtype, device=device)
    with torch.cuda.device(device):
        blocks = torch.cuda.get_device_properties(device).multi_processor_count * _BLOCKS_PER_PROCESSOR
        pointers = (part.data_ptr() for part in (packed.weight, packed.scales, w_OI))
        stream = torch.cuda.current_stream(device).cuda_stream
        _kernel(variant(packed, dtype, 1), device.index).launch(
            blocks, 32 * WARPS, stream, Arguments(*pointers, *packed.shape)
        )
    return ungated(w_OI) if packed.gated else w_OI


@functools.cache
def _kernel(variant: str, device: int) -> jit.Kernel:
    return jit.load(jit.compiled(source(variant), architecture(device)))
