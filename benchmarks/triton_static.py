"""Every Triton kernel compiled for GPUs that need not be here: registers, spilled bytes, shared memory.

    python benchmarks/triton_static.py --arch 80,90,100,120 [--only decode] [--json FILE]

Each launcher of infopt.kernels.triton is called with tensors of a model's shapes that have no memory. What it would have
launched is noted instead, with its types, constants and options, and compiled for each architecture by the assembler that
comes with Triton. So what is measured is what would run. The exit code is 1 where a kernel spills, or needs more shared
memory than one block may have.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from infopt.grid import Grid, Inputs
from infopt.kernels.packing import Packed
from infopt.kernels.pages import PAGE, Pages
from infopt.kernels.triton import attention, cache, decode, gemm, head, rows, sampling, weight
from infopt.kv_cache import CacheGrid

MODULES = (attention, cache, decode, gemm, head, rows, sampling, weight)
#: bytes of shared memory of one block at most (CUDA C++ Programming Guide, technical specifications per capability)
SHARED = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
BF16 = torch.bfloat16
_DTYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8", torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
_LINE = (
    "{case:18} {kernel:15} sm_{arch:<4} {registers:4} registers {spilled:4} spilled {shared:7} shared {warps:3} warps"
)


@dataclass(frozen=True)
class Launch:
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True)
class Measured:
    case: str
    kernel: str
    arch: int
    registers: int
    spilled: int
    shared: int
    warps: int

    @property
    def fine(self) -> bool:
        return self.spilled == 0 and self.shared <= SHARED[self.arch]


class _Noting:
    """Stands where a kernel stands while its launcher runs."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, _: Any) -> Callable[..., None]:
        return self._note

    def _note(self, *positional: Any, **named: Any) -> None:
        names = self._kernel.arg_names
        options = {name: value for name, value in named.items() if name not in names}
        arguments = dict(zip(names, positional, strict=False)) | {k: v for k, v in named.items() if k in names}
        self._launches.append(Launch(self._kernel, arguments, options))


def launches_of(call: Callable[[], Any]) -> list[Launch]:
    """What a launcher would launch."""
    launches: list[Launch] = []
    kernels: list[tuple[ModuleType, str, Any]] = [
        (module, name, value)
        for module in MODULES
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__ and name.startswith("_")
    ]
    try:
        for module, name, value in kernels:
            setattr(module, name, _Noting(value, launches))
        call()
    finally:
        for module, name, value in kernels:
            setattr(module, name, value)
    return launches


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cases() -> dict[str, Callable[[], Any]]:
    """Shapes of a Llama of 8B and of a small model, one for each way that a kernel is compiled."""
    found: dict[str, Callable[[], Any]] = {}
    x, w, given = meta(16, 4096), meta(4096), meta(1, dtype=torch.float32)
    for kind in ("none", "int8", "fp8"):
        found[f"rows.norm.{kind}"] = lambda kind=kind: rows.add_rms_norm(x, x, w, 1e-5, kind)
        found[f"rows.gated.{kind}"] = lambda kind=kind: rows.gated(meta(16, 28672), "silu", kind)
    found["rows.norm.long"] = lambda: rows.add_rms_norm(meta(4, 32768), meta(4, 32768), meta(32768), 1e-5, "int8")
    found["rows.gated.gelu"] = lambda: rows.gated(meta(16, 8192), "gelu_tanh", "fp8", 128)
    found["rows.quantize.given"] = lambda: rows.quantize(x, "int8", 0, given)
    for kind, grid in _caches().items():
        found[f"cache.{kind}"] = lambda grid=grid: _rope(grid)
        found[f"decode.{kind}"] = lambda grid=grid: _decode(grid, 128)
    found["decode.window"] = lambda: _decode(None, 256, 4096, 50.0)
    found["decode.small"] = lambda: _decode(CacheGrid("int", 8, "token"), 64)
    found["decode.fp32"] = lambda: _decode(None, 64, dtype=torch.float32)
    for width in (64, 128, 256):
        found[f"attention.{width}"] = lambda width=width: _attention(width, 2048, None, None)
    found["attention.window"] = lambda: _attention(128, 2048, 1024, 50.0)
    found["attention.fp32"] = lambda: _attention(64, 512, None, None, torch.float32)
    for tokens in (16, 64, 128):
        found[f"weight.w4.{tokens}"] = lambda tokens=tokens: _weight(tokens, Grid(4, 128))
    found["weight.w4.g32"] = lambda: _weight(32, Grid(4, 32, symmetric=False))
    found["weight.w8"] = lambda: _weight(32, Grid(8, None))
    found["weight.fp8"] = lambda: _weight(32, Grid(8, None, kind="float"))
    for tokens in (16, 128):
        found[f"gemm.int8.{tokens}"] = lambda tokens=tokens: _int8(tokens)
        found[f"gemm.fp8.{tokens}"] = lambda tokens=tokens: _fp8(tokens, True)
    found["gemm.fp8.emulated"] = lambda: _fp8(128, False)
    found["gemm.norm"] = lambda: gemm.norm_linear(
        meta(64, 768), meta(3072, 768), meta(3072, dtype=torch.float32), meta(3072, dtype=torch.float32), 1e-5, "gelu"
    )
    for width in (2048, 4096):
        found[f"head.{width}"] = lambda width=width: _head(width)
    found["head.bias"] = lambda: _head(4096, meta(128256))
    found["sampling"] = lambda: sampling.draw(
        meta(8, 128256, dtype=torch.float32), meta(8, dtype=torch.float32), meta(8, dtype=torch.float32),
        meta(8, dtype=torch.int64), meta(8, dtype=torch.int64),
    )  # fmt: skip
    return found


def _caches() -> dict[str, CacheGrid | None]:
    return {
        "bf16": None,
        "fp8": CacheGrid("float", 8, "token"),
        "int8": CacheGrid("int", 8, "token"),
        "int4": CacheGrid("int", 4, "token", symmetric=False),
        "fp8.calibrated": CacheGrid("float", 8, "tensor"),
    }


def _halves(grid: CacheGrid | None, heads: int, width: int, dtype: torch.dtype = BF16) -> tuple[Pages, Pages]:
    pages = Pages.empty(4096, heads, width, grid, dtype, "meta")
    if grid is not None and grid.strategy == "tensor":
        pages = Pages(pages.codes, meta(1, 1, dtype=torch.float32), None, grid)
    return pages, pages


def _rope(grid: CacheGrid | None) -> Any:
    keys, values = _halves(grid, 8, 128)
    slots = meta(16, dtype=torch.int64)
    return cache.rope_write(
        meta(16, 48, 128), meta(16, 128), meta(16, 128), meta(128), meta(128), 1e-6, slots, keys, values
    )


def _decode(
    grid: CacheGrid | None, width: int, window: int | None = None, cap: float | None = None, dtype: torch.dtype = BF16
) -> Any:
    keys, values = _halves(grid, 8, width, dtype)
    tables, counts = meta(4, 4096 // PAGE, dtype=torch.int64), meta(4, dtype=torch.int64)
    return decode.paged_decode(meta(4, 32, width, dtype=dtype), keys, values, tables, counts, counts, 0.1, window, cap)


def _attention(width: int, tokens: int, window: int | None, cap: float | None, dtype: torch.dtype = BF16) -> Any:
    q, k = meta(1, tokens, 32, width, dtype=dtype), meta(1, tokens, 8, width, dtype=dtype)
    return attention.attention(q.transpose(1, 2), k.transpose(1, 2), k.transpose(1, 2), 0.1, window, cap)


def _weight(tokens: int, grid: Grid) -> Any:
    groups = grid.scales(4096, 4096)[1]
    kind = "fp8" if grid.kind == "float" else f"int{grid.bits}"
    codes = meta(4096, 2048 if kind == "int4" else 4096, dtype=torch.uint8)
    zero = None if grid.symmetric else meta(4096, groups, dtype=torch.uint8)
    packed = Packed(codes, meta(4096, groups), zero, kind, min(grid.group or 128, 128), 4096)
    weight.dequantize(packed, BF16)
    return weight.multiply(meta(tokens, 4096), packed)


def _int8(tokens: int) -> Any:
    x, w = meta(tokens, 4096, dtype=torch.int8), meta(4096, 4096, dtype=torch.int8)
    return gemm.int8_linear(x, meta(tokens, 1, dtype=torch.float32), w, meta(4096, 1, dtype=torch.float32), None, BF16)


def _fp8(tokens: int, native: bool) -> Any:
    grid = Grid(8, 128, rows=128, kind="float", inputs=Inputs("float", group=128))
    x, w = (meta(n, 4096, dtype=torch.float8_e4m3fn) for n in (tokens, 4096))
    scale = meta(*grid.scales(4096, 4096), dtype=torch.float32)
    return gemm.fp8_linear(x, meta(tokens, 32, dtype=torch.float32), w, scale, 128, None, BF16, native)


def _head(width: int, bias: torch.Tensor | None = None) -> Any:
    margin = meta(128256, dtype=torch.float32)
    return head.rescore(meta(4, 128256), meta(4, width), meta(128256, width), margin, bias)


# Compiling


def source(launch: Launch) -> ASTSource:
    """The kernel with the types that its arguments have, and what a launch assumes of them: addresses and sizes that are
    multiples of 16, and ones."""
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or (type(value) is int and value == 1):
            signature[parameter.name], constants[(place,)] = "constexpr", value
            continue
        signature[parameter.name] = _type(value)
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + _DTYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def measure(case: str, launch: Launch, arch: int) -> Measured:
    if arch >= 90 and "EARLY" in launch.arguments:  # as `numeric.early` has it on such a GPU
        launch = replace(
            launch, arguments=launch.arguments | {"EARLY": True}, options=launch.options | {"launch_pdl": True}
        )
    compiled = triton.compile(source(launch), target=GPUTarget("cuda", arch, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.findall(rf"{word}:(\d+)", told)[-1]) for word in ("REG", "STACK"))
    spilled = (
        spilled_bytes(compiled.asm["ptx"]) if stack else 0
    )  # a stack may hold other things, and costs time to explain
    name, warps = launch.kernel.fn.__name__, compiled.metadata.num_warps
    return Measured(case, name, arch, registers, spilled, compiled.metadata.shared, warps)


def spilled_bytes(ptx: str) -> int:
    """What the assembler says when it is asked again."""
    target = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)[0]
    tools = triton.knobs.nvidia
    tool = tools.ptxas_blackwell if target.startswith(("sm_100", "sm_103", "sm_12")) else tools.ptxas
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [tool.path, "-v", f"-arch={target}", file.name, "-o", "/dev/null"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill stores", told)))


def runs_on(case: str, arch: int) -> bool:
    """E4M3 is multiplied from 8.9 on; earlier GPUs get the other kernel."""
    return arch >= 89 or not (case.startswith("gemm.fp8.") and case != "gemm.fp8.emulated")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="80,90,100,120")
    parser.add_argument("--only", default="", help="cases whose names begin so, several with commas")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    starts = tuple(options.only.split(","))
    chosen = {case: launches_of(call) for case, call in cases().items() if case.startswith(starts)}
    found, seen = [], set()
    for arch in map(int, options.arch.split(",")):
        for case, launches in chosen.items():
            for launch in launches:
                text = repr((arch, launch.options, source(launch).hash()))
                if not runs_on(case, arch) or text in seen:
                    continue
                seen.add(text)
                found.append(measure(case, launch, arch))
                print(_LINE.format(**asdict(found[-1])), flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in found], indent=1))
    bad = [one for one in found if not one.fine]
    print(f"{len(found)} kernels, {len(bad)} that spill or need too much shared memory")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
