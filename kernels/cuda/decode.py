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
CLUSTERS = 90  # the first architecture whose blocks read each other's memory, and that begins a kernel early
_BLOCKS_PER_PROCESSOR = 2  # as many as fit, whatever the number of tokens
_LEAST_CHUNKS = 2  # of a block: below, adding up the parts costs more than it saves
_CLUSTERED = 1.5  # of those in clusters: each cluster lies within one of the GPU's seven or eight parts
_MOST_PARTS = 8  # the most blocks of a cluster that every GPU with clusters has
_START = 2  # units that a block could have multiplied with while it begins and ends
_ENTRY = """#include "device.cuh"
#include "decode.cuh"
extern "C" __global__ void __launch_bounds__(THREADS, {blocks}) kernel(const Decode d) {{ decode<{variant}>(d); }}
"""


class Arguments(ctypes.Structure):
    """`Decode` of decode.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "scales", "x", "bias", "y", "partial", "arrived")),
        *((name, ctypes.c_int) for name in ("tokens", "rows", "columns", "parts")),
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


@functools.cache
def architecture(device: int) -> int:
    """What to compile for, for torch's CUDA device of this number."""
    return jit.supported(torch.cuda.get_device_capability(device), jit.nvrtc().architectures)


def rows_of_blocks(packed: Packed) -> int:
    """How many blocks the rows are for, with all columns."""
    return -(-packed.shape[0] // (WARPS * TILE))


def parts(packed: Packed, processors: int, clusters: bool) -> int:
    """In how many parts the columns are cut, each for a block: as many as end first, of those that run at once.
    It must not depend on the number of tokens, since the order of sums does on it."""
    columns, per_unit = packed.shape[1], max(packed.group, CHUNK)
    units, most = columns // per_unit, min(_MOST_PARTS, max(1, columns // (_LEAST_CHUNKS * CHUNK)))

    def end(parts: int) -> int:
        at_once = int(processors * (_CLUSTERED if clusters and parts > 1 else _BLOCKS_PER_PROCESSOR))
        return -(-rows_of_blocks(packed) * parts // at_once) * (-(-units // parts) + _START)

    return min(range(1, min(units, most) + 1), key=end)


def partial_sums(packed: Packed, parts: int, tokens: int) -> int:
    """How many fp32 numbers the blocks leave for each other, without clusters."""
    eights = 1 if tokens <= 8 else 2 if tokens <= 16 else 4
    return rows_of_blocks(packed) * parts * WARPS * TILE * 8 * eights


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
        clusters = architecture(device.index) >= CLUSTERS
        count = parts(packed, torch.cuda.get_device_properties(device).multi_processor_count, clusters)
        shared = count > 1 and not clusters
        partial = torch.empty(partial_sums(packed, count, tokens) if shared else 0, dtype=torch.float32, device=device)
        pointers = (packed.weight, packed.scales, x_TI, bias, y, partial, packed.arrived)
        arguments = Arguments(*(None if p is None else p.data_ptr() for p in pointers), tokens, rows, columns, count)
        kernel = _kernel(variant(packed, x_TI.dtype, tokens), device.index)
        stream = torch.cuda.current_stream(device).cuda_stream
        kernel.launch(rows_of_blocks(packed) * count, 32 * WARPS, stream, arguments, count if clusters else 1, clusters)
    return y


def _aligned(x: Tensor) -> Tensor:
    """Vectors of 16 bytes are read; a view may begin anywhere."""
    return x.clone() if x.data_ptr() % 16 else x


@functools.cache
def _kernel(variant: str, device: int) -> jit.Kernel:
    return jit.load(jit.compiled(source(variant), architecture(device)))
