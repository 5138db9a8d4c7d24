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
extern "C" const char* run(int which, const void* d, int blocks, u32 seed, const emulator::Buffer* known, int n) {{
  emulator::buffers = known;
  emulator::buffer_count = n;
  return emulator::launch(blocks, THREADS, seed, bodies[which], d);
}}
"""


class _Buffer(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_void_p), ("end", ctypes.c_void_p)]


class Fault(Exception):
    """What the emulator saw a kernel do: a deadlock, an access outside of its buffers."""


@dataclass(frozen=True)
class Emulator:
    """The given variants, compiled. bodies: what can be run, as C++."""

    library: ctypes.CDLL
    bodies: tuple[str, ...]

    @staticmethod
    def build(variants: Sequence[str], folder: Path, sources: Path = SOURCES, dense: Sequence[str] = ()) -> Emulator:
        """variants: of the product. dense: of the weight written out."""
        bodies = (*(f"multiply<{name}>" for name in variants), *(f"write_out<{name}>" for name in dense))
        driver, library = folder / "driver.cpp", folder / "emulated.so"
        driver.write_text(_DRIVER.format(bodies=", ".join(bodies)))
        command = ["g++", "-std=c++17", "-w", "-fPIC", "-shared", f"-I{HERE}", f"-I{sources}"]
        done = subprocess.run([*command, str(driver), "-o", str(library)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        loaded = ctypes.CDLL(str(library))
        loaded.run.restype = ctypes.c_char_p
        return Emulator(loaded, bodies)

    def multiply(
        self, packed: Packed, x_TI: Tensor, bias_O: Tensor | None = None, *, blocks: int = 1, seed: int = 0
    ) -> Tensor:
        """What `decode.multiply` does on a GPU. All that the kernel is to write is NaN before."""
        tokens, (rows, columns) = len(x_TI), packed.shape
        y = torch.full((tokens, rows // 2 if packed.gated else rows), torch.nan, dtype=x_TI.dtype)
        partial = torch.full((decode.partial_sums(blocks, tokens),), torch.nan)
        parts = [packed.weight, packed.scales, x_TI, bias_O, y, partial, packed.arrived]
        pointers = [None if part is None else part.data_ptr() for part in parts]
        body = f"multiply<{decode.variant(packed, x_TI.dtype, tokens)}>"
        self._run(body, decode.Arguments(*pointers, tokens, rows, columns), parts, blocks, seed)
        return y

    def dense(self, packed: Packed, dtype: torch.dtype, blocks: int = 2) -> Tensor:
        """What `dense.dense` does, in the packed order of rows."""
        w_OI = torch.full(packed.shape, torch.nan, dtype=dtype)
        parts = [packed.weight, packed.scales, w_OI]
        arguments = dense.Arguments(*(part.data_ptr() for part in parts), *packed.shape)
        self._run(f"write_out<{decode.variant(packed, dtype, 1)}>", arguments, parts, blocks, 0)
        return w_OI

    def _run(
        self, body: str, arguments: ctypes.Structure, parts: Sequence[Tensor | None], blocks: int, seed: int
    ) -> None:
        known = [_Buffer(part.data_ptr(), part.data_ptr() + part.nbytes) for part in parts if part is not None]
        buffers, number = (_Buffer * len(known))(*known), self.bodies.index(body)
        fault = self.library.run(number, ctypes.byref(arguments), blocks, seed, buffers, len(known))
        if fault:
            raise Fault(fault.decode())
