"""The product of a few tokens and a quantized weight on a GPU: which kernel, how many blocks, and its launch.

One source (`decode.cuh`) for all of them; a kernel is an instance of its template, compiled when it is first asked for.
Compiling and loading cannot be captured in a CUDA graph, so whoever captures runs once before.

Legend: T tokens, I input columns, O output channels.
"""

from __future__ import annotations

import ctypes
import functools
from importlib import resources

import torch
from torch import Tensor

from infopt.errors import Unsupported
from infopt.kernels import jit
from infopt.kernels.cuda.layout import CHUNK, FLOATS, TILE, Packed

MOST_TOKENS = 32
WARPS = 8
_BLOCKS_PER_PROCESSOR = 2  # as many as fit, whatever the number of tokens
_LEAST_CHUNKS = 2  # of a block: below, adding up the parts costs more than it saves
_ENTRY = """#include "device.cuh"
#include "decode.cuh"
extern "C" __global__ void __launch_bounds__(THREADS, {blocks}) kernel(const Decode d) {{ decode<{variant}>(d); }}
"""


class Arguments(ctypes.Structure):
    """`Decode` of decode.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "scales", "x", "bias", "y", "partial", "arrived")),
        *((name, ctypes.c_int) for name in ("tokens", "rows", "columns")),
    ]


def variant(packed: Packed, dtype: torch.dtype, tokens: int) -> str:
    """The kernel for this weight, activations of `dtype` (fp16 or bf16) and up to 8, 16 or 32 tokens, as C++."""
    eights = 1 if tokens <= 8 else 2 if tokens <= 16 else 4
    flags = [str(value).lower() for value in (packed.group, packed.zeros, packed.zero, eights, packed.gated)]
    return f"Variant<{', '.join([packed.codes, FLOATS[dtype], FLOATS[packed.scale_dtype], *flags])}>"


def headers(*names: str) -> tuple[tuple[str, str], ...]:
    folder = resources.files("infopt.kernels.cuda")
    return tuple((name, (folder / name).read_text()) for name in names)


def source(variant: str) -> jit.Source:
    text = _ENTRY.format(variant=variant, blocks=_BLOCKS_PER_PROCESSOR)
    return jit.Source(text, headers("device.cuh", "unpack.cuh", "decode.cuh"))


def architecture(device: int) -> int:
    """What to compile for, for torch's CUDA device of this number."""
    return jit.supported(torch.cuda.get_device_capability(device), jit.nvrtc().architectures)


def blocks(packed: Packed, processors: int) -> int:
    """How many blocks share the work. It must not depend on the number of tokens, since the order of sums does on it."""
    rows, columns = packed.shape
    chunks = -(-rows // (WARPS * TILE)) * (columns // CHUNK)
    per_unit = max(packed.group // CHUNK, 1)
    return max(1, min(_BLOCKS_PER_PROCESSOR * processors, chunks // max(per_unit, _LEAST_CHUNKS)))


def partial_sums(blocks: int, tokens: int) -> int:
    """How many fp32 numbers the blocks may have to leave for each other: two parts of 128 rows each."""
    eights = 1 if tokens <= 8 else 2 if tokens <= 16 else 4
    return blocks * 2 * WARPS * TILE * 8 * eights


def multiply(packed: Packed, x_TI: Tensor, bias_O: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """y [T, O] (or [T, O / 2] of a gated weight) in the dtype of x; T up to 32, x fp16 or bf16 on the weight's GPU.

    bias: in the order of the packed rows. out: where y goes, contiguous. Deterministic, and the same for a token
    whatever else is in the batch.
    """
    tokens, (rows, columns) = len(x_TI), packed.shape
    if x_TI.device.type != "cuda" or x_TI.device != packed.weight.device:
        raise Unsupported(f"Activations ({x_TI.device}) and weight ({packed.weight.device}) are not on a GPU together.")
    x_TI = _aligned(x_TI.contiguous())
    y = x_TI.new_empty(tokens, rows // 2 if packed.gated else rows) if out is None else out
    if not tokens:
        return y
    device = x_TI.device
    bias = None if bias_O is None else bias_O.to(x_TI.dtype).contiguous()
    with torch.cuda.device(device):
        count = blocks(packed, torch.cuda.get_device_properties(device).multi_processor_count)
        partial = torch.empty(partial_sums(count, tokens), dtype=torch.float32, device=device)
        pointers = (packed.weight, packed.scales, x_TI, bias, y, partial, packed.arrived)
        arguments = Arguments(*(None if p is None else p.data_ptr() for p in pointers), tokens, rows, columns)
        kernel = _kernel(variant(packed, x_TI.dtype, tokens), device.index)
        kernel.launch(count, 32 * WARPS, torch.cuda.current_stream(device).cuda_stream, arguments)
    return y


def _aligned(x: Tensor) -> Tensor:
    """Vectors of 16 bytes are read; a view may begin anywhere."""
    return x.clone() if x.data_ptr() % 16 else x


@functools.cache
def _kernel(variant: str, device: int) -> jit.Kernel:
    return jit.load(jit.compiled(source(variant), architecture(device)))
