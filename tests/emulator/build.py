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

from infopt.kernels.cuda import decode
from infopt.kernels.cuda.layout import Packed

HERE = Path(__file__).parent
SOURCES = HERE.parent.parent / "kernels" / "cuda"
COMPILER = shutil.which("g++")
_DRIVER = """#include "machine.h"
#include "decode.cuh"
typedef void (*Body)(const void*);
template <typename V>
void body(const void* d) {{ decode<V>(*(const Decode*)d); }}
static const Body bodies[] = {{{bodies}}};
extern "C" const char* run(int which, const Decode* d, int blocks, u32 seed, const emulator::Buffer* known, int n) {{
  emulator::buffers.assign(known, known + n);
  return emulator::launch(blocks, THREADS, seed, bodies[which], d);
}}
"""


class _Buffer(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_void_p), ("end", ctypes.c_void_p)]


class Fault(Exception):
    """What the emulator saw a kernel do: a deadlock, an access outside of its buffers."""


@dataclass(frozen=True)
class Emulator:
    """The given variants, compiled."""

    library: ctypes.CDLL
    variants: tuple[str, ...]

    @staticmethod
    def build(variants: Sequence[str], folder: Path, sources: Path = SOURCES) -> Emulator:
        bodies = ", ".join(f"body<{name}>" for name in variants)
        driver, library = folder / "driver.cpp", folder / "emulated.so"
        driver.write_text(_DRIVER.format(bodies=bodies))
        command = ["g++", "-std=c++17", "-O1", "-w", "-fPIC", "-shared", f"-I{HERE}", f"-I{sources}"]
        done = subprocess.run([*command, str(driver), "-o", str(library)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        loaded = ctypes.CDLL(str(library))
        loaded.run.restype = ctypes.c_char_p
        return Emulator(loaded, tuple(variants))

    def multiply(
        self, packed: Packed, x_TI: Tensor, bias_O: Tensor | None = None, *, blocks: int = 1, seed: int = 0
    ) -> Tensor:
        """What `decode.multiply` does on a GPU. All that the kernel is to write is NaN before."""
        tokens, (rows, columns) = len(x_TI), packed.shape
        y = torch.full((tokens, rows // 2 if packed.gated else rows), torch.nan, dtype=x_TI.dtype)
        partial = torch.full((decode.partial_sums(blocks, tokens),), torch.nan)
        parts = [packed.weight, packed.scales, x_TI, bias_O, y, partial, packed.arrived]
        pointers = [None if part is None else part.data_ptr() for part in parts]
        known = [_Buffer(part.data_ptr(), part.data_ptr() + part.nbytes) for part in parts if part is not None]
        arguments = decode.Arguments(*pointers, tokens, rows, columns)
        number = self.variants.index(decode.variant(packed, x_TI.dtype, tokens))
        fault = self.library.run(
            number, ctypes.byref(arguments), blocks, seed, (_Buffer * len(known))(*known), len(known)
        )
        if fault:
            raise Fault(fault.decode())
        return y
