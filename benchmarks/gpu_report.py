"""The results of `gpu_check.py` as a page: what fails first, then a table for each op.

    python benchmarks/gpu_report.py

writes docs/performance.md: of each GPU in `results/` and each row the newest time there is, with a mark where the kernel has
changed since.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = 1
INTRODUCTION = (
    "Made by `python benchmarks/gpu_report.py` of what `make gpu-check` wrote to `benchmarks/results/`; not to be edited.",
    "Times are of captured graphs over more memory than the cache holds. The floor is the time in which this GPU reads the",
    "bytes (or multiplies, if that is longer), as measured in the same run, and an empty kernel for each that cannot be",
    "spared. Products of few tokens know, as in a model, the weight that comes next. A number above 1 under a name is how many",
    "times longer that one takes. `changed since`: the kernel is another one now, and its time was not taken again.",
)
#: Slower than the last results of the same GPU by more than this, and by more than three times the spread.
TOLERATED = 0.05


def markdown(results: dict[str, Any]) -> str:
    return "\n".join(_lines(results)) + "\n"


def _lines(results: dict[str, Any]) -> Iterator[str]:
    where = results["provenance"]
    yield f"# {where['gpu']}, {where['date']}, {where['commit'][:7]}{' (changed)' if where['changed'] else ''}"
    yield ""
    yield f"torch {where['torch']}, driver {where['driver']}, NVRTC {where['nvrtc']}, {where['processors']} processors."
    tests = results["tests"]
    yield f"Tests on the GPU: {tests}." if isinstance(tests, str) else f"Tests on the GPU: exit code {tests}."
    if limits := results.get("ceilings"):
        yield (
            f"Measured ceilings: read {limits['read_bytes_per_s'] / 1e12:.2f} TB/s, copy "
            f"{limits['copy_bytes_per_s'] / 1e12:.2f} TB/s, bf16 {limits['bf16_flops_per_s'] / 1e12:.0f} TFLOP/s, "
            f"an empty kernel {limits['launch_us']:.2f} us."
        )
    yield ""
    if failing := [row for row in results["rows"] if failures(row)]:
        yield "## Failing"
        yield ""
        yield from (
            f"- {row['op']} {row['shape']}, {row['tokens']} tokens: {'; '.join(failures(row))}" for row in failing
        )
        yield ""
    for op in dict.fromkeys(row["op"] for row in results["rows"]):
        yield from _table(op, [row for row in results["rows"] if row["op"] == op])


def failures(row: dict[str, Any]) -> list[str]:
    """In words; nothing where all is well."""
    found = [row["error"]] if row.get("error") else []
    if row.get("rel_err") is not None and not row["rel_err"] <= row["limit"]:
        found.append(f"relative error {row['rel_err']:.2g} (limit {row['limit']:g})")
    if row.get("deterministic") is False:
        found.append("two runs differ")
    if row.get("regression"):
        found.append(f"regression: {row['regression']}")
    return found


def _table(op: str, rows: list[dict[str, Any]], root: Path | None = None) -> Iterator[str]:
    """root: of the sources that a row's kernel is compared with, None for no such column."""
    anchors = list(dict.fromkeys(name for row in rows for name in row.get("anchor_us", {})))
    head = [
        "shape",
        "tokens",
        "us",
        "spread",
        "floor us",
        "% of floor",
        *(f"{name} / ours" for name in anchors),
        "error",
        *(["kernel"] if root else []),
    ]
    yield f"## {op}"
    yield ""
    yield "| " + " | ".join(head) + " |"
    yield "| " + " | ".join(["---"] * len(head)) + " |"
    for row in rows:
        error = "not run" if row.get("rel_err") is None else f"{row['rel_err']:.1e}"
        if row.get("us_median") is None:
            cells = ["not run", "", "", "", *("" for _ in anchors)]
        else:
            cells = [
                f"{row['us_median']:.2f}",
                f"{row['us_spread']:.1%}",
                f"{row['floor_us']:.2f}",
                f"{row['pct_floor']:.0f}",
            ]
            cells += [_ratio(row["anchor_us"].get(name), row["us_median"]) for name in anchors]
        state = (
            []
            if root is None
            else ["as it is" if kernel_sha(root, row["sources"]) == row["kernel_sha"] else "changed since"]
        )
        yield "| " + " | ".join([row["shape"], str(row["tokens"]), *cells, error, *state]) + " |"
    yield ""


def _ratio(anchor: float | str | None, ours: float) -> str:
    return f"{anchor / ours:.2f}" if isinstance(anchor, float) else "not run"


def compare(rows: list[dict[str, Any]], before: list[dict[str, Any]]) -> None:
    """Marks the rows that are slower than they were."""
    old = {(row["op"], row["shape"], row["tokens"]): row.get("us_median") for row in before}
    for row in rows:
        past, now = old.get((row["op"], row["shape"], row["tokens"])), row.get("us_median")
        if past and now and now / past - 1 > max(TOLERATED, 3 * row["us_spread"]):
            row["regression"] = f"{now:.2f} us, was {past:.2f}"


# --- docs/performance.md ------------------------------------------------------------------------------------------


def kernel_sha(root: Path, sources: Sequence[str]) -> str:
    """Of what decides a kernel: its sources without comments and the way they are laid out."""
    texts = []
    for name in sources:
        comment = r"#.*" if name.endswith(".py") else r"//.*"
        texts.append(" ".join(re.sub(comment, "", (root / name).read_text()).split()))
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def newest(folder: Path, without: str = "") -> list[dict[str, Any]]:
    """Of each row of a GPU's results the newest that has a time, else the newest. without: a file of that name."""
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for path in sorted(path for path in folder.glob("*.json") if path.stem != without):
        for row in json.loads(path.read_text())["rows"]:
            key = row["op"], row["shape"], row["tokens"]
            if key not in found or row.get("us_median") is not None or found[key].get("us_median") is None:
                found[key] = row
    return list(found.values())


def performance(results: Path, root: Path) -> str:
    """docs/performance.md"""
    return "\n".join(_performance(results, root)) + "\n"


def _performance(results: Path, root: Path) -> Iterator[str]:
    yield "# Measured on GPUs"
    yield ""
    yield from INTRODUCTION
    yield ""
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
        yield f"# {runs[-1]['provenance']['gpu']}"
        yield ""
        for run in runs:
            where, limits = run["provenance"], run.get("ceilings", {})
            ceilings = (
                f"read {limits['read_bytes_per_s'] / 1e12:.2f} TB/s, copy {limits['copy_bytes_per_s'] / 1e12:.2f} TB/s, bf16 "
                f"{limits['bf16_flops_per_s'] / 1e12:.0f} TFLOP/s, an empty kernel {limits['launch_us']:.2f} us"
            )
            timed = sum(row.get("us_median") is not None for row in run["rows"])
            changes = " and changes" if where["changed"] else ""
            yield f"- {where['date']}, {where['commit'][:7]}{changes}: torch {where['torch']}, driver {where['driver']};"
            yield f"  {ceilings}; {timed} of {len(run['rows'])} rows timed"
        yield ""
        rows = newest(folder)
        for op in dict.fromkeys(row["op"] for row in rows):
            yield from _table(op, [row for row in rows if row["op"] == op], root)


if __name__ == "__main__":
    (ROOT / "docs" / "performance.md").write_text(performance(ROOT / "benchmarks" / "results", ROOT))
