"""`make gpu-check` without a GPU: it says so, and what it does with results is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from infopt.errors import Unsupported
from infopt.kernels import jit
from infopt.kernels.cuda import decode
from infopt.kernels.cuda.decode import Geometry

from .emulator.build import COMPILER, Emulator

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))
import gpu_check  # noqa: E402
import gpu_report  # noqa: E402
import gpu_timing  # noqa: E402
from gpu_ops import LAYERS, OPS, Call, Case, Contender, Op, Problem  # noqa: E402
from gpu_step import STEP_OP  # noqa: E402
from gpu_triton_ops import TRITON_OPS  # noqa: E402

SMALL = Case("small", 3, ((128, 256), (48, 128)))
CEILINGS = {"read_bytes_per_s": 3e12, "copy_bytes_per_s": 3e12, "bf16_flops_per_s": 8e14, "launch_us": 1.5}

#: Runs the program with nothing installed but torch, as on a machine that has only a checkout.
BARE = """import runpy, sys
for name in ("transformers", "pydantic", "typer", "safetensors", "tokenizers", "datasets", "rich", "gguf", "yaml"):
    sys.modules[name] = None
path, sys.argv = sys.argv[1], ["program"]
runpy.run_path(path, run_name="__main__")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("name", ["gpu_check", "gpu_geometry"])
def test_without_a_gpu_and_from_a_bare_checkout_it_says_that_it_did_not_run(name) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if "site-packages" in path)}
    environment["PYTHONPATH"] += os.pathsep + sysconfig.get_path("purelib")
    done = subprocess.run(
        [sys.executable, "-S", "-c", BARE, f"benchmarks/{name}.py"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert "not run" in done.stderr
    assert "Traceback" not in done.stderr


def emulated(op: Op, emulator: Emulator, factor: float) -> Op:
    """The op with the emulator in the place of the GPU; its results times a factor."""

    def prepare(problems: list[Problem]) -> Call:
        return lambda: [emulator.multiply(p.packed, p.x_TI, geometry=Geometry(2, 2, 1)) * factor for p in problems]

    return replace(op, ours=Contender("emulated", prepare, op.ours.nbytes))


@pytest.mark.skipif(COMPILER is None, reason="no g++: the CUDA kernels were not emulated")
def test_the_check_accepts_what_is_right_and_nothing_else(tmp_path) -> None:
    problems = OPS[0].make(SMALL, torch.Generator().manual_seed(0))
    variants = {decode.variant(p.packed, p.x_TI.dtype, SMALL.tokens) for p in problems}
    emulator, run = Emulator.build(sorted(variants), tmp_path), gpu_check.Run(1, CEILINGS, "cpu")
    for factor, failing in ((1.0, False), (1.02, True), (torch.nan, True)):
        op = emulated(OPS[0], emulator, factor)
        row = gpu_check.row_of(op, SMALL)
        gpu_check.attempt(gpu_check.check, op, SMALL, row, run)
        assert row["rel_err"] is not None
        assert bool(gpu_report.failures(row)) is failing


class Clock:
    """In the place of a captured graph: every call of cuBLAS's stand-in takes 60 us, ours 20."""

    def __init__(self, calls: list) -> None:
        self.calls, self.us = len(calls), 20.0 if len(calls[0]()) == 1 else 60.0

    def time(self, replays: int) -> float:
        return self.us


def test_times_become_shares_of_the_floor_beside_the_anchors() -> None:
    run = gpu_check.Run(1, CEILINGS, "cpu", Clock)
    nothing = Contender("infopt", lambda problems: lambda: [torch.zeros(1)], OPS[0].ours.nbytes)
    op, row = replace(OPS[0], ours=nothing), gpu_check.row_of(OPS[0], SMALL)
    gpu_check.attempt(gpu_check.measure, op, SMALL, row, run)
    assert gpu_report.failures(row) == []
    assert (row["us_median"], row["us_spread"], row["anchor_us"]["cublas"]) == (20.0, 0.0, 60.0)
    assert row["anchor_us"]["tinygemm"].startswith("not run")  # a processor has it under another name
    least = row["bytes"] / 3e12 * 1e6
    assert row["floor_us"] == pytest.approx(least + 2 * 1.5)
    assert row["pct_floor"] == pytest.approx(5 * row["floor_us"])


def test_a_kernel_that_cannot_run_is_a_failure() -> None:
    row = gpu_check.row_of(OPS[0], SMALL)
    gpu_check.attempt(gpu_check.check, OPS[0], SMALL, row, gpu_check.Run(1, CEILINGS, "cpu"))
    assert "not on a GPU together" in gpu_report.failures(row)[0]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_op_of_the_table_is_whole(op) -> None:
    problems = op.make(replace(SMALL, sizes=((32, 128), (48, 256))), torch.Generator().manual_seed(0))
    wanted = [(3, 32), (3, 48)]
    assert [tuple(y.shape) for y in op.reference(problems)] == wanted
    weights = sum(p.q.codes.numel() for p in problems)
    assert weights * 0.5 < op.ours.nbytes(problems) < 3 * weights
    assert all((ROOT / source).exists() for source in op.sources)
    assert [tuple(y.shape) for y in op.anchors[0].prepare(problems)()] == wanted  # cuBLAS's place taken by the CPU
    for case in op.cases:
        assert case.sizes == LAYERS[case.label]
        assert op.flops(case) == sum(2 * case.tokens * o * i for o, i in case.sizes)


def rows() -> list[dict]:
    row = gpu_check.row_of(OPS[0], OPS[0].cases[0])
    done = dict(row, us_median=20.0, us_spread=0.01, floor_us=18.0, pct_floor=90.0, rel_err=1e-3, deterministic=True,
                anchor_us={"cublas": 60.0, "tinygemm": "not run: no such operator"})  # fmt: skip
    return [done, dict(row, tokens=16)]


def results(rows: list[dict]) -> dict:
    where = dict.fromkeys(("gpu", "date", "commit", "changed", "torch", "driver", "nvrtc", "processors"), "")
    return {"schema": 1, "provenance": where, "tests": 0, "ceilings": CEILINGS, "rows": rows}


def test_the_page_shows_times_ratios_and_what_was_not_run() -> None:
    page = gpu_report.markdown(json.loads(json.dumps(results(rows()))))
    assert "| 8B gate_up | 1 | 20.00 | 1.0% | 18.00 | 90 | 3.00 | not run | 1.0e-03 |" in page
    assert "| 8B gate_up | 16 | not run |" in page
    assert "## Failing" not in page


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rel_err": 0.1}, "relative error"),
        ({"rel_err": float("inf")}, "relative error"),
        ({"deterministic": False}, "two runs differ"),
        ({"error": "check: no"}, "check: no"),
    ],
)
def test_what_fails_is_on_top(change, words) -> None:
    bad = [dict(rows()[0], **change)]
    page = gpu_report.markdown(results(bad))
    assert words in page[page.index("## Failing") : page.index("## w4a16")]


def test_slower_than_last_time_is_a_failure_beyond_the_spread() -> None:
    for us, slower in ((20.9, False), (21.1, True), (15.0, False)):
        now = [dict(rows()[0], us_median=us)]
        gpu_report.compare(now, rows())
        assert bool(gpu_report.failures(now[0])) is slower


@pytest.mark.parametrize("source", [gpu_timing.READ, gpu_timing.NOTHING], ids=["read", "nothing"])
def test_the_kernels_that_measure_ceilings_compile(source) -> None:
    try:
        compiler = jit.nvrtc()
    except Unsupported as error:
        pytest.skip(f"not compiled: {error.what}")
    for architecture in (80, 90):
        assert compiler.compile(jit.Source(source), architecture).cubin


# The rows whose kernels are Triton's, by its interpreter

TINY = {
    "decode-attention": Case("tiny", 2, (40, 4, 2, 16)),
    "add-rms-norm": Case("tiny", 3, 64),
    "swiglu": Case("tiny", 3, 64),
    "prefill-attention": Case("tiny", 40, (4, 2, 16, 12)),
    "triton-w4a16": Case("tiny", 3, ((32, 128), (48, 256))),
    "w8a8": Case("tiny", 3, (32, 128)),
    "fp8": Case("tiny", 3, (32, 128)),
}


def checked(op: Op, case: Case, factor: float = 1.0) -> dict:
    """The row of a check whose results are multiplied by a factor."""

    def prepare(inputs):
        call = op.ours.prepare(inputs)
        return lambda: [y * factor if y.is_floating_point() else y for y in call()]

    row = gpu_check.row_of(op, case)
    changed = replace(op, ours=Contender("infopt", prepare, op.ours.nbytes))
    gpu_check.attempt(gpu_check.check, changed, case, row, gpu_check.Run(1, CEILINGS, "cpu"))
    return row


@pytest.mark.parametrize("op", TRITON_OPS, ids=lambda op: op.name)
def test_the_rows_of_triton_are_right_and_notice_what_is_not(op) -> None:
    pytest.importorskip("triton")
    from . import triton_tools  # noqa: F401  which repairs the interpreter

    case = next(case for name, case in TINY.items() if op.name.startswith(name))
    assert gpu_report.failures(checked(op, case)) == []
    assert gpu_report.failures(checked(op, case, 1.02))
    assert all((ROOT / source).exists() for source in op.sources)
    inputs = op.make(case, torch.Generator().manual_seed(0))
    assert op.ours.nbytes(inputs) > 0 and op.launches(case) > 0
    for anchor in op.anchors:
        if anchor.name not in ("_scaled_mm", "SDPA"):  # which need a GPU, or have no window
            found, wanted = anchor.prepare(inputs)(), op.reference(inputs)
            same = (found[0].double() - wanted[0]).norm() < 0.02 * wanted[0].norm()
            assert same or op.name.endswith("-int8")  # ours rounds, torch does not


def test_a_step_of_a_whole_model_is_right() -> None:
    """By Triton's interpreter, with the weights of the anchor: the CUDA kernel's product has rows of its own."""
    pytest.importorskip("triton")
    from . import triton_tools  # noqa: F401

    op = STEP_OP
    shapes = ((256, 128), (128, 128), (256, 128), (128, 128))
    model = op.make(Case("tiny", 2, (3, 2, 96, 20, (4, 2, 32), shapes)), torch.Generator().manual_seed(0))
    wanted = op.reference(model)[0]
    found = op.anchors[0].prepare(model)()[0].double()
    assert (found - wanted).norm() < op.limit * wanted.norm()
    assert 0 < op.ours.nbytes(model) < op.anchors[0].nbytes(model)


# --- docs/performance.md ------------------------------------------------------------------------------------------


def test_the_page_of_the_repository_is_what_its_results_make() -> None:
    made = gpu_report.performance(ROOT / "benchmarks" / "results", ROOT)
    assert (ROOT / "docs" / "performance.md").read_text() == made, "run benchmarks/gpu_report.py"


def test_results_are_of_this_schema_and_name_their_sources() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*/*.json"):
        found = json.loads(path.read_text())
        assert found["schema"] == gpu_report.SCHEMA
        assert all((ROOT / source).exists() for row in found["rows"] for source in row["sources"])
        assert not any(gpu_report.failures(row) for row in found["rows"]), path


def test_the_newest_time_of_each_row_is_shown_and_a_kernel_that_changed_is_marked(tmp_path) -> None:
    root, folder = tmp_path / "root", tmp_path / "results" / "gpu"
    (root / "kernels" / "cuda").mkdir(parents=True)
    folder.mkdir(parents=True)
    for name in OPS[0].sources:
        (root / name).write_text("int one; // a remark\n")
    as_it_is = gpu_report.kernel_sha(root, OPS[0].sources)
    first, second = (dict(row, kernel_sha=as_it_is) for row in rows())
    first, second = dict(first, sources=list(OPS[0].sources)), dict(second, sources=list(OPS[0].sources))
    (folder / "2026-01-01.json").write_text(json.dumps(results([first, dict(second, us_median=30.0, us_spread=0.0,
                                                                            floor_us=18.0, pct_floor=60.0)])))  # fmt: skip
    (folder / "2026-01-02.json").write_text(json.dumps(results([dict(first, us_median=19.0), second])))
    page = gpu_report.performance(tmp_path / "results", root)
    assert "| 8B gate_up | 1 | 19.00 |" in page  # the newer one
    assert "| 8B gate_up | 16 | 30.00 |" in page  # the one that has a time
    assert "changed since |" not in page
    (root / OPS[0].sources[0]).write_text("int one;   // another\n")
    assert gpu_report.performance(tmp_path / "results", root) == page
    (root / OPS[0].sources[0]).write_text("int two;\n")
    assert gpu_report.performance(tmp_path / "results", root).count("changed since |") == 2


def test_a_short_budget_leaves_out_some_of_each_op() -> None:
    pairs = [((op, case), {}) for op in OPS[:2] for case in op.cases]
    names = [op.name for (op, _), _ in gpu_check.in_order(pairs)]
    assert names[:4] == [OPS[0].name, OPS[1].name] * 2
    assert len(names) == len(pairs)
