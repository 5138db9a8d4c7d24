"""From the rows that `compare_peers.py` left to one table, as markdown and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COLUMNS = (
    "tool",
    "method",
    "samples",
    "perplexity",
    "mean KL",
    "same first choice",
    "quantizing, wall s (x infopt)",
    "quantizing, CPU s",
    "whole process, wall / CPU s",
    "peak RSS MB",
    "weights MB",
    "load before / after",
)


def write_tables(results: Path) -> str:
    """Write table.md and table.json from the rows in `results`; returns the markdown."""
    rows = [json.loads(path.read_text()) for path in sorted(results.glob("*-*-*.json")) if _is_row(path)]
    order = {"-": 0, "rtn": 1, "gptq": 2, "awq": 3, "awq+gptq": 4}
    rows.sort(key=lambda row: (order[row["method"]], row["samples"], row["tool"] == "infopt", row["tool"]))
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(_cells(row, rows)) + " |" for row in rows]
    lines += ["", *_notes(rows)]
    text = "\n".join(lines) + "\n"
    (results / "table.md").write_text(text)
    (results / "table.json").write_text(json.dumps(rows, indent=2))
    return text


def _is_row(path: Path) -> bool:
    return not path.name.startswith("ids-") and path.name.count(".") == 1


def _cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    version = row.get("versions", {})
    name = row["tool"] + "".join(f" {version[key]}" for key in list(version)[:1])
    head = [name, row["method"], str(row["samples"] or "-")]
    process = row.get("process")
    load = f"{process['load_before']:.1f} / {process['load_after']:.1f}" if process else "-"
    if row["status"] != "done":
        return [*head, row["status"], "-", "-", "-", "-", _whole(process), "-", "-", load]
    return [
        *head,
        f"{row['perplexity']:.2f}",
        f"{row['kl_mean']:.4f}" if "kl_mean" in row else "-",
        f"{row['top1']:.1%}" if "top1" in row else "-",
        _with_ratio(row, rows),
        _number(row.get("quantize_cpu_s")),
        _whole(process),
        _number(process["peak_rss_mb"] if process else None),
        _number(row["bytes"] / 1e6),
        load,
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _whole(process: dict[str, Any] | None) -> str:
    return f"{_number(process['wall_s'])} / {_number(process['cpu_s'])}" if process else "-"


def _with_ratio(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Seconds, and how many times infopt's with the same method and samples."""
    seconds = row.get("quantize_wall_s")
    ours = [
        other["quantize_wall_s"]
        for other in rows
        if other["tool"] == "infopt"
        and other["status"] == "done"
        and (other["method"], other["samples"]) == (row["method"], row["samples"])
    ]
    if seconds is None or not ours:
        return _number(seconds)
    return f"{_number(seconds)} (x{seconds / ours[0]:.1f})"


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    """What the numbers mean, and what was the same and what was not."""
    notes = []
    for key in ("model", "machine", "bits", "group_size", "seqlen", "threads", "windows"):
        values = sorted({str(row[key]) for row in rows if key in row})
        notes.append(f"- {key}: {', '.join(values)}" + ("  (not the same in every row)" if len(values) > 1 else ""))
    dtypes = sorted({f"{row['tool']} {row['dtype']}" for row in rows})
    notes.append(f"- model loaded as: {', '.join(dtypes)}")
    notes.append("- infopt's quantizing seconds contain reading the text and writing the output, the peers' do not; "
                 "its CPU seconds are the whole process's")  # fmt: skip
    notes += [f"- {row['tool']} {row['method']} failed: {row['error']}" for row in rows if "error" in row]
    return notes
