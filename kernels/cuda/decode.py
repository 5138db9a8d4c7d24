"""The product of a few tokens and a quantized weight on a GPU: which kernel, how many blocks, and its launch.

One source (`decode.cuh`) for all of them; a kernel is an instance of its template, compiled when it is first asked for.
Compiling and loading cannot be captured in a CUDA graph, so whoever captures runs once before.

Legend: T tokens, I input columns, O output channels.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from importlib import resources

import torch
from torch import Tensor

from infopt.errors import Unsupported
from infopt.kernels import jit
from infopt.kernels.cuda.layout import CHUNK, FLOATS, TILE, Packed

MOST_TOKENS = 32
WARPS = 8  # of a block, at most
THREADS = 32 * WARPS
CLUSTERS = 90  # the first architecture whose blocks read each other's memory, and that begins a kernel early
_AT_ONCE = 16  # tokens of a launch
_BLOCKS_PER_PROCESSOR = 2  # as many of `WARPS` as fit
_CLUSTER = 2  # blocks that share their rows; of more, a GPU does not hold as many as of these
_START = 8  # units that a warp could have multiplied with while it begins and ends
_PIECE = 1024  # bytes, as decode.cuh has it
_VECTOR = 16  # bytes: where a piece may begin
#: Bytes of the next weight, by eights of tokens: what memory gives while it would rest.
_AHEAD = {1: 8 << 20, 2: 4 << 20}
_ENTRY = """#include "device.cuh"
#include "decode.cuh"
extern "C" __global__ void __launch_bounds__(THREADS, {blocks}) kernel(const Decode d) {{ decode<{variant}>(d); }}
"""


class Arguments(ctypes.Structure):
    """`Decode` of decode.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "scales", "x", "bias", "y", "partial", "arrived", "ahead")),
        *(
            (name, ctypes.c_int)
            for name in ("tokens", "rows", "columns", "tiles", "cuts", "cluster", "pieces", "stride")
        ),
    ]


@dataclass(frozen=True)
class Geometry:
    """A block: `tiles` tiles of rows times `cuts` parts of their columns, a warp for each; `cluster` blocks share the rows."""

    tiles: int
    cuts: int
    cluster: int

    @property
    def parts(self) -> int:
        """Of the columns."""
        return self.cuts * self.cluster

    @property
    def threads(self) -> int:
        return 32 * self.tiles * self.cuts

    def blocks(self, packed: Packed) -> int:
        return -(-_tiles(packed) // self.tiles) * self.cluster


def variant(packed: Packed, dtype: torch.dtype, tokens: int) -> str:
    """The kernel for this weight, activations of `dtype` (fp16 or bf16) and up to 8 or 16 tokens, as C++."""
    flags = [str(value).lower() for value in (packed.group, packed.zeros, packed.zero, _eights(tokens), packed.gated)]
    return f"Variant<{', '.join([packed.codes, FLOATS[dtype], FLOATS[packed.scale_dtype], *flags])}>"


def headers(*names: str) -> tuple[tuple[str, str], ...]:
    folder = resources.files("infopt.kernels.cuda")
    return tuple((name, (folder / name).read_text()) for name in names)


def source(variant: str) -> jit.Source:
    text = _ENTRY.format(variant=variant, blocks=_BLOCKS_PER_PROCESSOR)
    return jit.Source(text, headers("device.cuh", "unpack.cuh", "decode.cuh"))


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def architecture(device: int) -> int:
    """What to compile for, for torch's CUDA device of this number."""
    return jit.supported(torch.cuda.get_device_capability(device), jit.nvrtc().architectures)


def _eights(tokens: int) -> int:
    return 1 if tokens <= 8 else 2


def _tiles(packed: Packed) -> int:
    return -(-packed.shape[0] // TILE)


@functools.cache
def geometry(tiles: int, units: int, processors: int) -> Geometry:
    """How a weight of so many tiles, and units of columns, is spread: so that the longest row of units that one warp walks
    along, and the most that one processor has to do, are short. It does not depend on the number of tokens, since the order of
    sums does on it."""

    def cost(g: Geometry) -> tuple[float, int]:
        blocks, walk = -(-tiles // g.tiles) * g.cluster, -(-units // g.parts)
        waves = -(-blocks // (processors * _BLOCKS_PER_PROCESSOR))
        busiest = -(-blocks // processors) * g.tiles * g.cuts * walk
        together = WARPS * _BLOCKS_PER_PROCESSOR
        return waves * (walk + _START) + busiest / together + (g.parts > 1), -g.tiles

    sizes = range(1, WARPS + 1)
    shapes = (Geometry(t, c, k) for t in sizes for c in sizes if t * c <= WARPS for k in range(1, _CLUSTER + 1))
    return min((g for g in shapes if g.parts <= units), key=cost)


def pieces(ahead: Tensor | None, tokens: int) -> tuple[int, int]:
    """(how many pieces of a weight are fetched ahead, bytes from one to the next): as evenly as may be."""
    whole = 0 if ahead is None else ahead.nbytes // _PIECE
    count = min(whole, _AHEAD[_eights(tokens)] // _PIECE)
    return count, whole * _PIECE // max(count, 1) // _VECTOR * _VECTOR


def partial_sums(packed: Packed, g: Geometry, tokens: int) -> int:
    """How many fp32 numbers the warps leave for each other, without clusters."""
    return _tiles(packed) * g.parts * TILE * 8 * _eights(tokens)


def multiply(
    packed: Packed, x_TI: Tensor, bias_O: Tensor | None = None, out: Tensor | None = None, ahead: Tensor | None = None
) -> Tensor:
    """y [T, O] (or [T, O / 2] of a gated weight) in the dtype of x; T up to 32, x fp16 or bf16 on the weight's GPU.

    bias: in the order of the packed rows. out: where y goes, contiguous. ahead: the `weight` of what is multiplied with next,
    of which a part is brought nearer. Deterministic, and the same for a token whatever else is in the batch.
    """
    tokens, (rows, columns) = len(x_TI), packed.shape
    if x_TI.device.type != "cuda" or x_TI.device != packed.weight.device:
        raise Unsupported(f"Activations ({x_TI.device}) and weight ({packed.weight.device}) are not on a GPU together.")
    x_TI = _aligned(x_TI.contiguous())
    y = x_TI.new_empty(tokens, rows // 2 if packed.gated else rows) if out is None else out
    bias = None if bias_O is None else bias_O.to(x_TI.dtype).contiguous()
    with torch.cuda.device(x_TI.device):
        g = geometry(_tiles(packed), columns // max(packed.group, CHUNK), _processors(x_TI.device.index))
        for first in range(0, tokens, _AT_ONCE):
            some = slice(first, first + _AT_ONCE)
            after = ahead if first + _AT_ONCE >= tokens else packed.weight
            launch(packed, x_TI[some], bias, y[some], after, g)
    return y


def launch(packed: Packed, x_TI: Tensor, bias_O: Tensor | None, y: Tensor, ahead: Tensor | None, g: Geometry) -> None:
    """One kernel, on the current device, for at most 16 tokens."""
    tokens, device = len(x_TI), x_TI.device
    clusters = architecture(device.index) >= CLUSTERS
    shared = g.parts > 1 and not clusters
    partial = torch.empty(partial_sums(packed, g, tokens), dtype=torch.float32, device=device) if shared else None
    pointers = (packed.weight, packed.scales, x_TI, bias_O, y, partial, packed.arrived, ahead)
    addresses = (None if p is None else p.data_ptr() for p in pointers)
    arguments = Arguments(*addresses, tokens, *packed.shape, g.tiles, g.cuts, g.cluster, *pieces(ahead, tokens))
    kernel = _kernel(variant(packed, x_TI.dtype, tokens), device.index)
    stream = torch.cuda.current_stream(device).cuda_stream
    kernel.launch(g.blocks(packed), g.threads, stream, arguments, g.cluster if clusters else 1, clusters)


def _aligned(x: Tensor) -> Tensor:
    """Vectors of 16 bytes are read; a view may begin anywhere."""
    return x.clone() if x.data_ptr() % 16 else x


@functools.cache
def _kernel(variant: str, device: int) -> jit.Kernel:
    return jit.load(jit.compiled(source(variant), architecture(device)))
