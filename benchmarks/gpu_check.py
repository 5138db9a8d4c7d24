"""Everything that can only be known on a GPU, in one command: `make gpu-check`, at most nine minutes.

    python benchmarks/gpu_check.py [--budget 540] [--only w4a16] [--out benchmarks/results]

Needs torch and, for its first stage, pytest; no network, and infopt need not be installed. The stages: where and with what
it runs; the tests that need a GPU; the ceilings of this GPU, measured; every kernel on fresh random inputs with NaN
where it writes, against fp64, twice for equal bits; then times in the order of the table, each beside its anchors, as
captured graphs over more memory than the cache holds. Files are written after every stage: a run that is killed leaves
what it has, and what the budget did not reach is recorded as not run.

Exit status: 0, 1 where a result is wrong or slower than the last one, 4 without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import infopt  # noqa: E402

infopt.__path__.append(str(ROOT))  # its folders are packages of infopt where it is installed; here they lie beside it

import gpu_report  # noqa: E402
import gpu_timing  # noqa: E402
import torch  # noqa: E402
from gpu_ops import LIMITS, OPS, Case, Contender, Op, link  # noqa: E402
from gpu_step import STEP_OP  # noqa: E402
from gpu_triton_ops import TRITON_OPS  # noqa: E402

from infopt.errors import InfoptError, Unsupported  # noqa: E402
from infopt.kernels import jit  # noqa: E402

Row = dict[str, Any]
Stage = Callable[..., None]
MEASURING = 0.5  # of the budget, not to be spent on checking
LAST_CASE = 8.0  # seconds
_PYTEST = """import sys; import pytest; root = sys.argv[1]; sys.path.insert(0, root); import infopt
infopt.__path__.append(root); sys.exit(pytest.main(sys.argv[2:]))"""
#: What another kernel does not have or cannot do here is no failure of ours.
_MISSING = (ImportError, RuntimeError, AttributeError, NotImplementedError, TypeError, ValueError)
ALL = (*OPS[:1], *TRITON_OPS[:4], STEP_OP, *TRITON_OPS[4:], *OPS[1:])  # in the order in which they are measured


def main() -> int:
    options = arguments()
    start = time.monotonic()
    if not torch.cuda.is_available():
        raise Unsupported("gpu-check: not run.", "torch sees no NVIDIA GPU.", "run it where there is one")
    seed = int.from_bytes(os.urandom(4), "little")
    gpu = torch.cuda.get_device_name().replace(" ", "-")
    where = provenance(seed)
    folder = options.out / gpu
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{where['date']}-{where['commit'][:7]}"
    results: dict[str, Any] = {"schema": gpu_report.SCHEMA, "provenance": where, "tests": "not run", "rows": []}
    before = gpu_report.newest(folder, name)

    def save() -> None:
        write(folder / f"{name}.json", json.dumps(results, indent=1) + "\n")
        write(folder / f"{name}.md", gpu_report.markdown(results))

    def left() -> float:
        return options.budget - (time.monotonic() - start)

    save()
    results["tests"] = run_tests(folder / f"{name}-tests.xml")
    results["ceilings"] = gpu_timing.ceilings()
    save()
    ops = [
        op for op in ALL if not options.only or any(op.name.startswith(prefix) for prefix in options.only.split(","))
    ]
    results["rows"] = rows = [row_of(op, case) for op in ops for case in op.cases]
    pairs = [(op, case) for op in ops for case in op.cases]
    run = Run(seed, results["ceilings"])
    for stage, reserve in ((check, MEASURING * options.budget), (measure, LAST_CASE)):
        for (op, case), row in in_order(list(zip(pairs, rows, strict=True))):
            if left() > reserve:
                attempt(stage, op, case, row, run)
        save()
    gpu_report.compare(rows, before)
    save()
    print(gpu_report.markdown(results))
    wrong = results["tests"] != 0 or any(gpu_report.failures(row) for row in rows)
    return int(wrong)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--budget", type=float, default=540, help="seconds in all")
    parser.add_argument("--only", default="", help="names of ops, or how they begin, separated by commas")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


# --- stages -------------------------------------------------------------------------------------------------------


def provenance(seed: int) -> Row:
    properties = torch.cuda.get_device_properties(0)
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    smi = output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader").split("\n")[0]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": output("git", "-C", str(ROOT), "rev-parse", "HEAD") or "unknown",
        "changed": bool(output("git", "-C", str(ROOT), "status", "--porcelain")),
        "gpu": properties.name, "processors": properties.multi_processor_count, "memory": properties.total_memory,
        "capability": list(torch.cuda.get_device_capability()),
        "driver": smi.split(",")[0] or "unknown", "nvidia_smi": {"query": query, "answer": smi},
        "torch": torch.__version__, "cuda": torch.version.cuda, "nvrtc": jit.nvrtc().version,
        "python": sys.version.split()[0], "seed": seed,
    }  # fmt: skip


def output(*command: str) -> str:
    """What a command prints, nothing where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def run_tests(report: Path) -> int | str:
    """pytest's exit code. In a process of its own: the tests make Triton an interpreter, which it then is for good."""
    if importlib.util.find_spec("pytest") is None:
        return "not run: no pytest"
    files = sorted(str(path) for path in (ROOT / "tests").glob("test_gpu*.py"))
    options = ["-m", "gpu", "--maxfail=20", f"--junitxml={report}", "-p", "no:cacheprovider"]
    command = [sys.executable, "-c", _PYTEST, str(ROOT), *files, f"--rootdir={ROOT}", *options]
    return subprocess.run(command, check=False).returncode


def row_of(op: Op, case: Case) -> Row:
    return {
        "op": op.name, "backend": op.ours.name, "shape": case.label, "tokens": case.tokens,
        "dtype": str(op.dtype).removeprefix("torch."), "sources": list(op.sources),
        "kernel_sha": gpu_report.kernel_sha(ROOT, op.sources), "flops": op.flops(case),
        "us_median": None, "us_spread": None, "floor_us": None, "pct_floor": None, "anchor_us": {},
        "rel_err": None, "limit": op.limit or LIMITS[op.dtype], "deterministic": None,
    }  # fmt: skip


@dataclass(frozen=True)
class Run:
    seed: int
    ceilings: Row
    device: str = "cuda"
    capture: Callable[[list[Callable[[], object]]], Any] = gpu_timing.Graph.capture

    def inputs(self, op: Op, case: Case) -> Any:
        number = int.from_bytes(hashlib.sha256(f"{self.seed} {op.name} {case}".encode()).digest()[:6], "little")
        return op.make(case, torch.Generator(self.device).manual_seed(number))


def in_order(rows: list[Any]) -> list[Any]:
    """The first case of every op, then the second of every op, ...: a short budget leaves out some of each."""
    seen: dict[str, int] = {}
    places = []
    for (op, _), _ in rows:
        places.append(seen.get(op.name, 0))
        seen[op.name] = places[-1] + 1
    return [row for _, row in sorted(zip(places, rows, strict=True), key=lambda pair: pair[0])]


def attempt(stage: Stage, op: Op, case: Case, row: Row, run: Run) -> None:
    """A kernel that does not run is a result too."""
    try:
        stage(op, case, row, run)
    except (ImportError, RuntimeError, InfoptError) as error:
        row["error"] = f"{stage.__name__}: {str(error).splitlines()[0]}"


def check(op: Op, case: Case, row: Row, run: Run) -> None:
    """rel_err: the largest of all outputs, infinite where one is NaN."""
    inputs = run.inputs(op, case)
    call = op.ours.prepare(inputs)
    first = [y.clone() for y in call()]
    row["deterministic"] = all(torch.equal(a, b) for a, b in zip(first, call(), strict=True))
    errors = []
    for y, want in zip(first, op.reference(inputs), strict=True):
        error = float((y.double() - want).norm() / want.norm())
        errors.append(error if error == error else float("inf"))
    row["rel_err"] = max(errors)


def measure(op: Op, case: Case, row: Row, run: Run) -> None:
    inputs, ceilings = run.inputs(op, case), run.ceilings
    graphs, anchors = {}, row["anchor_us"]
    for contender in (op.ours, *op.anchors):
        try:
            graphs[contender.name] = graph_of(contender, inputs, run)
        except _MISSING as error:
            if contender is op.ours:
                raise
            anchors[contender.name] = f"not run: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    times = gpu_timing.in_turns(graphs)
    ours = times.pop(op.ours.name)
    moved, computed = op.ours.nbytes(inputs), op.flops(case)
    least = max(moved / ceilings[op.ceiling], computed / ceilings["bf16_flops_per_s"] / op.peak) * 1e6
    floor = least + op.launches(case) * ceilings["launch_us"]
    row.update(us_median=ours.us, us_spread=ours.spread, bytes=moved, floor_us=floor, pct_floor=100 * floor / ours.us)
    anchors.update({name: time.us for name, time in times.items()})


def graph_of(contender: Contender, inputs: Any, run: Run) -> Any:
    calls = [contender.prepare(inputs) for _ in range(gpu_timing.copies(contender.nbytes(inputs)))]
    link(calls)
    return run.capture(calls)


# --- files --------------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InfoptError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
