"""Times on a GPU: contenders in turns, each a captured graph over more memory than the cache holds; and the ceilings."""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from infopt.kernels import jit

ROTATED = 256 << 20  # bytes: several times any L2
_BATCH_US = 2000.0
READ = """struct Read { const uint4* from; unsigned int* to; unsigned long long vectors; };
extern "C" __global__ void __launch_bounds__(512, 4) kernel(const Read d) {
  unsigned int all = 0;
  const unsigned long long step = (unsigned long long)gridDim.x * 512 * 4;
  for (unsigned long long i = (unsigned long long)blockIdx.x * 2048 + threadIdx.x; i + 1536 < d.vectors; i += step)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const uint4 v = __ldcs(d.from + i + j * 512);
      all ^= v.x ^ v.y ^ v.z ^ v.w;
    }
  if (all == 0x12345678u) *d.to = all;
}
"""
COPY = """struct Copy { const uint4* from; uint4* to; };
extern "C" __global__ void __launch_bounds__(512, 4) kernel(const Copy d) {
  const unsigned long long i = (unsigned long long)blockIdx.x * 2048 + threadIdx.x;
  uint4 v[4];
#pragma unroll
  for (int j = 0; j < 4; j++) v[j] = __ldcs(d.from + i + j * 512);
#pragma unroll
  for (int j = 0; j < 4; j++) __stcs(d.to + i + j * 512, v[j]);
}
"""
NOTHING = 'struct Nothing { int nothing; };\nextern "C" __global__ void kernel(const Nothing d) {}\n'


@dataclass(frozen=True)
class Time:
    """us: the median of the batches. spread: (largest - smallest) / median."""

    us: float
    spread: float


@dataclass(frozen=True)
class Graph:
    graph: torch.cuda.CUDAGraph
    calls: int
    keep: Any  # the memory that the graph reads and writes

    @staticmethod
    def capture(calls: Sequence[Callable[[], object]]) -> Graph:
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            keep = [call() for call in calls]
        return Graph(graph, len(calls), (keep, calls))

    def time(self, replays: int) -> float:
        """us for one call"""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(replays):
            self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1000 / replays / self.calls


def copies(nbytes: int) -> int:
    """How many copies of an input are read in turns, so that none of them is still in the cache."""
    return max(2, min(-(-ROTATED // max(nbytes, 1)), 256))


def in_turns(graphs: dict[str, Graph], batches: int = 10) -> dict[str, Time]:
    """All contenders once, then all of them again, ...; so that whatever changes on the machine changes for all."""
    replays = {}
    for name, graph in graphs.items():
        graph.time(1)
        replays[name] = max(1, round(_BATCH_US / (graph.time(1) * graph.calls)))
    found: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(batches):
        for name, graph in graphs.items():
            found[name].append(graph.time(replays[name]))
    return {name: summary(times) for name, times in found.items()}


def summary(times: Sequence[float]) -> Time:
    middle = statistics.median(times)
    return Time(middle, (max(times) - min(times)) / middle)


# --- ceilings -----------------------------------------------------------------------------------------------------


class _Read(ctypes.Structure):
    _fields_ = [("from_", ctypes.c_void_p), ("to", ctypes.c_void_p), ("vectors", ctypes.c_ulonglong)]


class _Copy(ctypes.Structure):
    _fields_ = [("from_", ctypes.c_void_p), ("to", ctypes.c_void_p)]


class _Nothing(ctypes.Structure):
    _fields_ = [("nothing", ctypes.c_int)]


def _kernel(source: str) -> jit.Kernel:
    architecture = jit.supported(torch.cuda.get_device_capability(), jit.nvrtc().architectures)
    return jit.load(jit.compiled(jit.Source(source), architecture))


def _launch(kernel: jit.Kernel, blocks: int, threads: int, arguments: ctypes.Structure) -> None:
    kernel.launch(blocks, threads, torch.cuda.current_stream().cuda_stream, arguments)


def ceilings() -> dict[str, float]:
    """read and copy in bytes/s (a copied byte counts twice; by a kernel, which is faster than torch's copy), bf16 in FLOP/s, an
    empty kernel of a graph in us."""
    size = 1 << 30
    data = torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda")
    other = torch.empty_like(data)
    read, copy, nothing = _kernel(READ), _kernel(COPY), _kernel(NOTHING)
    blocks = torch.cuda.get_device_properties(0).multi_processor_count * 4
    arguments = _Read(data.data_ptr(), other.data_ptr(), size // 16)
    copied = _Copy(data.data_ptr(), other.data_ptr())
    a, b = (torch.randn(8192, 8192, device="cuda").to(torch.bfloat16) for _ in range(2))
    graphs = {
        "read": Graph.capture([lambda: _launch(read, blocks, 512, arguments)] * 2),
        "copy": Graph.capture([lambda: _launch(copy, size // 16 // 2048, 512, copied)] * 2),
        "bf16": Graph.capture([lambda: a @ b] * 2),
        "launch": Graph.capture([lambda: _launch(nothing, 1, 32, _Nothing())] * 200),
    }
    times = {name: time.us for name, time in in_turns(graphs).items()}
    return {
        "read_bytes_per_s": size / times["read"] * 1e6,
        "copy_bytes_per_s": 2 * size / times["copy"] * 1e6,
        "bf16_flops_per_s": 2 * 8192**3 / times["bf16"] * 1e6,
        "launch_us": times["launch"],
    }
