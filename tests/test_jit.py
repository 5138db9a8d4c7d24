"""Compiling CUDA C++ without a GPU: for every architecture, what it costs, what is kept on disk, what is refused."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from infopt.errors import InfoptError, OutOfResources, Unsupported
from infopt.grid import Grid
from infopt.kernels import jit
from infopt.kernels.cuda import decode, dense

from .emulator.cases import BFLOAT, CASES, HALF, Case


def found_compiler() -> jit.Nvrtc | None:
    try:
        return jit.nvrtc()
    except Unsupported:
        return None


COMPILER = found_compiler()
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no NVRTC: the CUDA kernels were not compiled")
TINY = jit.Source('#include "number.h"\nextern "C" __global__ void kernel(const int* p) { *(int*)p = NUMBER; }',
                  (("number.h", "#define NUMBER 7\n"),))  # fmt: skip


@pytest.fixture
def compiler() -> jit.Nvrtc:
    return jit.nvrtc()


# --- what the compiler makes of the kernels -----------------------------------------------------------------------


def disassembler() -> str | None:
    """cuobjdump: of Triton's package, or of a toolkit."""
    packaged = Path(sysconfig.get_path("purelib")) / "triton" / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(packaged) if packaged.exists() else shutil.which("cuobjdump")


DISASSEMBLER = disassembler()


def resources(log: str) -> tuple[int, int]:
    """(registers, bytes spilled)"""
    (registers,) = re.findall(r"Used (\d+) registers", log)
    return int(registers), sum(map(int, re.findall(r"(\d+) bytes spill", log)))


def main_loop(binary: jit.Binary, folder: Path) -> list[str]:
    """The instructions of the innermost loop that multiplies: the smallest one with tensor-core instructions in it."""
    (folder / "kernel.cubin").write_bytes(binary.cubin)
    command = [str(DISASSEMBLER), "-sass", str(folder / "kernel.cubin")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", text)]
    return min(loops(found), key=len)


def loops(instructions: list[tuple[int, str]]) -> Iterator[list[str]]:
    for end, what in instructions:
        back = re.search(r"BRA.*?\b0x([0-9a-f]+)", what)
        if back and int(back[1], 16) < end:
            body = [other for at, other in instructions if int(back[1], 16) <= at <= end]
            if any("HMMA" in other for other in body):
                yield body


def weights_per_lane(body: list[str], eights: int) -> int:
    """Each tensor-core instruction multiplies eight weights of a lane with eight tokens."""
    return sum("HMMA" in what for what in body) * 8 // eights


#: (weight, activations, tokens, most instructions per weight in the main loop). With 4 bits and 8 tokens an H100 can start
#: 5.2 instructions in the time in which a weight arrives, with 8 bits twice as many; half of that is the aim.
BUDGETS = (
    (Grid(4, 128, True, HALF), HALF, 8, 1.8),
    (Grid(4, 128, True, BFLOAT), BFLOAT, 8, 2.0),
    (Grid(4, 128, False, HALF), HALF, 8, 1.9),
    (Grid(4, 32, True, HALF), HALF, 8, 2.6),
    (Grid(4, 128, True, BFLOAT), BFLOAT, 16, 2.3),
    (Grid(8, None, True, BFLOAT), BFLOAT, 16, 4.0),
    (Grid(8, None, True, HALF, kind="float"), HALF, 16, 4.0),
)


#: All budgets for one architecture, and the largest and the smallest kernel for the others.
COMPILED = tuple((90, *budget) for budget in BUDGETS) + tuple(
    (arch, *BUDGETS[i]) for arch in (80, 100, 120) for i in (0, 5)
)


@needs_compiler
@pytest.mark.parametrize(
    ("architecture", "grid", "dtype", "tokens", "budget"),
    COMPILED,
    ids=lambda value: value.strategy if isinstance(value, Grid) else None,
)
def test_no_kernel_spills_and_the_main_loop_keeps_its_budget(
    architecture, grid, dtype, tokens, budget, compiler, tmp_path
) -> None:
    case = Case(tokens, 128, 256, grid, dtype)
    binary = jit.compiled(decode.source(case.variant), architecture, tmp_path, compiler)
    registers, spilled = resources(binary.log)
    assert registers <= 128  # two blocks of 256 threads share 65536
    assert spilled == 0
    if architecture == 90 and DISASSEMBLER is not None:
        body = main_loop(binary, tmp_path)
        assert not any(what.startswith(("LDL", "STL")) for what in body)
        assert len(body) / weights_per_lane(body, -(-tokens // 8)) <= budget


@needs_compiler
@pytest.mark.parametrize("case", [case for case in CASES if case.bias or case.gated or case.grid.rows != 1], ids=str)
def test_what_the_budgets_leave_out_compiles_too(case, compiler, tmp_path) -> None:
    binary = jit.compiled(decode.source(case.variant), 90, tmp_path, compiler)
    assert binary.cubin[:4] == b"\x7fELF"
    assert resources(binary.log)[1] == 0
    written_out = jit.compiled(dense.source(case.variant), 90, tmp_path, compiler)
    assert resources(written_out.log)[1] == 0


# --- on disk ------------------------------------------------------------------------------------------------------


@needs_compiler
def test_what_was_compiled_is_taken_from_the_disk(compiler, tmp_path) -> None:
    first = jit.compiled(TINY, 90, tmp_path, compiler)
    (stored,) = tmp_path.iterdir()
    assert first.log
    second = jit.compiled(TINY, 90, tmp_path, compiler)
    assert (second.cubin, second.log) == (first.cubin, "")  # no log: nothing was compiled
    stored.write_bytes(stored.read_bytes()[:-1])
    again = jit.compiled(TINY, 90, tmp_path, compiler)
    assert again.log  # a file that was cut short is made again
    assert jit.compiled(TINY, 90, tmp_path, compiler).cubin == again.cubin == first.cubin
    assert [path.name for path in tmp_path.iterdir()] == [stored.name]


@needs_compiler
def test_everything_that_decides_the_machine_code_is_in_its_name(compiler, tmp_path) -> None:
    jit.compiled(TINY, 90, tmp_path, compiler)
    jit.compiled(TINY, 80, tmp_path, compiler)
    jit.compiled(jit.Source(TINY.text, (("number.h", "#define NUMBER 8\n"),)), 90, tmp_path, compiler)
    assert len(list(tmp_path.iterdir())) == 3


@needs_compiler
def test_a_folder_that_cannot_be_written_costs_only_time(compiler, tmp_path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert jit.compiled(TINY, 90, blocked / "cache", compiler).cubin


@needs_compiler
def test_a_source_that_does_not_compile_shows_the_compilers_words(compiler) -> None:
    with pytest.raises(RuntimeError, match=r"sm_90(.|\n)*nonsense"):
        compiler.compile(jit.Source('extern "C" __global__ void kernel() { nonsense; }'), 90)


# --- what is refused ----------------------------------------------------------------------------------------------


def test_the_architecture_is_the_newest_that_the_gpu_runs() -> None:
    known = (75, 80, 86, 90, 100, 120)
    assert jit.supported((9, 0), known) == 90
    assert jit.supported((8, 9), known) == 86
    assert jit.supported((8, 0), known) == 80
    with pytest.raises(Unsupported, match=r"7\.5"):
        jit.supported((7, 5), known)
    with pytest.raises(Unsupported, match="newer torch"):
        jit.supported((13, 0), known)


class FakeDriver:
    @staticmethod
    def cuGetErrorString(status, text) -> None:
        text._obj.value = b"words of the driver"


@pytest.mark.parametrize(
    ("status", "error"),
    [(2, OutOfResources), (701, OutOfResources), (209, Unsupported), (222, Unsupported), (700, RuntimeError)],
)
def test_the_drivers_errors_are_ours(status, error) -> None:
    with pytest.raises(error, match="words of the driver"):
        jit.check(status, FakeDriver(), "a kernel does not start")  # type: ignore[arg-type]
    jit.check(0, FakeDriver(), "a kernel does not start")  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver here")
def test_no_driver_is_an_error_with_an_exit_code() -> None:
    with pytest.raises(InfoptError) as caught:
        jit.driver()
    assert caught.value.exit_code == 4


def test_nvrtc_is_looked_for_in_the_packages_that_torch_brings(tmp_path) -> None:
    packaged = tmp_path / "nvidia" / "cu13" / "lib" / "libnvrtc.so.13"
    packaged.parent.mkdir(parents=True)
    packaged.touch()
    (packaged.parent / "libnvrtc-builtins.so.13.0").touch()
    assert list(jit.find_nvrtc([str(tmp_path)])) == [str(packaged), "libnvrtc.so.13", "libnvrtc.so.12"]
