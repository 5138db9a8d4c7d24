"""The results of `gpu_check.py` as a page: what fails first, then a table for each op."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

SCHEMA = 1
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


def _table(op: str, rows: list[dict[str, Any]]) -> Iterator[str]:
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
        yield "| " + " | ".join([row["shape"], str(row["tokens"]), *cells, error]) + " |"
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
