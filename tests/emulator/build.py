"""The CUDA C++ kernels as a shared library for this processor: g++ in place of NVRTC, `machine.h` in place of device.cuh."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from infopt.kernels.cuda import decode, dense
from infopt.kernels.cuda.decode import Geometry
from infopt.kernels.cuda.layout import Packed

HERE = Path(__file__).parent
SOURCES = HERE.parent.parent / "kernels" / "cuda"
COMPILER = shutil.which("g++")
_DRIVER = """#include "machine.h"
#include "dequantize.cuh"
typedef void (*Body)(const void*);
template <typename V>
void multiply(const void* d) {{ decode<V>(*(const Decode*)d); }}
template <typename V>
void write_out(const void* d) {{ dequantize<V>(*(const Dequantize*)d); }}
static const Body bodies[] = {{{bodies}}};
extern "C" const char* run(
    int which, const void* d, int blocks, int threads, int cluster, u32 seed, const emulator::Buffer* known, int n) {{
  emulator::buffers = known;
  emulator::buffer_count = n;
  return emulator::launch(blocks, threads, cluster, seed, bodies[which], d);
}}
"""


class _Buffer(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_void_p), ("end", ctypes.c_void_p)]


class Fault(Exception):
    """What the emulator saw a kernel do: a deadlock, an access outside of its buffers."""


@dataclass(frozen=True)
class Emulator:
    """The given variants, compiled. bodies: what can be run, as C++. clusters: of a GPU whose blocks form them."""

    library: ctypes.CDLL
    bodies: tuple[str, ...]
    clusters: bool

    @staticmethod
    def build(
        variants: Sequence[str], folder: Path, sources: Path = SOURCES, dense: Sequence[str] = (), clusters: bool = True
    ) -> Emulator:
        """variants: of the product. dense: of the weight written out."""
        bodies = (*(f"multiply<{name}>" for name in variants), *(f"write_out<{name}>" for name in dense))
        driver, library = folder / "driver.cpp", folder / "emulated.so"
        driver.write_text(_DRIVER.format(bodies=", ".join(bodies)))
        command = ["g++", "-std=c++17", "-w", "-fPIC", "-shared", f"-I{HERE}", f"-I{sources}"]
        command += ["-DWITH_CLUSTERS"] * clusters
        done = subprocess.run([*command, str(driver), "-o", str(library)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        loaded = ctypes.CDLL(str(library))
        loaded.run.restype = ctypes.c_char_p
        return Emulator(loaded, bodies, clusters)

    def multiply(
        self, packed: Packed, x_TI: Tensor, bias_O: Tensor | None = None, *, geometry: Geometry, seed: int = 0
    ) -> Tensor:
        """What `decode.launch` does on a GPU. All that the kernel is to write is NaN before; what it fetches ahead is its own
        weight again."""
        tokens, (rows, columns) = len(x_TI), packed.shape
        y = torch.full((tokens, rows // 2 if packed.gated else rows), torch.nan, dtype=x_TI.dtype)
        partial = torch.full((0 if self.clusters else decode.partial_sums(packed, geometry, tokens),), torch.nan)
        buffers = [packed.weight, packed.scales, x_TI, bias_O, y, partial, packed.arrived]
        pointers = [None if buffer is None else buffer.data_ptr() for buffer in (*buffers, packed.weight)]
        shape = (geometry.tiles, geometry.cuts, geometry.cluster)
        body = f"multiply<{decode.variant(packed, x_TI.dtype, tokens)}>"
        arguments = decode.Arguments(*pointers, tokens, rows, columns, *shape, *decode.pieces(packed.weight, tokens))
        blocks = (geometry.blocks(packed), geometry.threads, geometry.cluster)
        self._run(body, arguments, buffers, blocks, seed)
        return y

    def dense(self, packed: Packed, dtype: torch.dtype, blocks: int = 2) -> Tensor:
        """What `dense.dense` does, in the packed order of rows."""
        w_OI = torch.full(packed.shape, torch.nan, dtype=dtype)
        buffers = [packed.weight, packed.scales, w_OI]
        arguments = dense.Arguments(*(buffer.data_ptr() for buffer in buffers), *packed.shape)
        self._run(f"write_out<{decode.variant(packed, dtype, 1)}>", arguments, buffers, (blocks, decode.THREADS, 1), 0)
        return w_OI

    def _run(
        self, body: str, arguments: ctypes.Structure, buffers: Sequence[Tensor | None], shape: tuple[int, int, int], seed: int
    ) -> None:  # fmt: skip
        """shape: blocks, threads of each, blocks of a cluster."""
        known = [_Buffer(part.data_ptr(), part.data_ptr() + part.nbytes) for part in buffers if part is not None]
        listed, number = (_Buffer * len(known))(*known), self.bodies.index(body)
        fault = self.library.run(number, ctypes.byref(arguments), *shape, seed, listed, len(known))
        if fault:
            raise Fault(fault.decode())
