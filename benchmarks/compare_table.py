"""From the rows that `compare_peers.py` left to tables, as markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = (
    "scheme",
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


# without what only an idle machine can tell
ACCURACY = (
    "scheme",
    "tool",
    "method",
    "perplexity",
    "mean KL",
    "same first choice",
    "whole process, CPU s",
    "weights MB",
)
METHODS = (
    "-",
    "rtn",
    "gptq",
    "autoround",
    "awq",
    "awq+gptq",
    "smoothquant",
    "smoothquant+gptq",
    "best-4bit",
    "best-fp8",
    "kv-cache",
)


def write_tables(results: Path) -> str:
    """Write table.md, accuracy.md and table.json from the rows in `results`; returns the first."""
    rows = [json.loads(path.read_text()) for path in sorted(results.glob("*-*-*.json")) if _is_row(path)]
    rows.sort(key=_order)
    text = "\n".join([*_table(COLUMNS, rows), "", *_notes(rows)]) + "\n"
    (results / "table.md").write_text(text)
    (results / "accuracy.md").write_text("\n".join(_table(ACCURACY, rows)) + "\n")
    (results / "table.json").write_text(json.dumps(rows, indent=2))
    return text


def _table(columns: Sequence[str], rows: list[dict[str, Any]]) -> list[str]:
    """The markdown lines of these columns."""
    cells = [_cells(row, rows) for row in rows]
    return [
        "| " + " | ".join(columns) + " |",
        "|" + " --- |" * len(columns),
        *("| " + " | ".join(row[name] for name in columns) + " |" for row in cells),
    ]


def _order(row: dict[str, Any]) -> tuple[int, int, bool, str]:
    """By scheme and method; infopt after its peers."""
    schemes = ("-", "W4", "W3", "W8A8", "W8A8_STATIC", "FP8_DYNAMIC", "FP8", "FP8_BLOCK", "KV_FP8")
    method = row["method"].partition(",")[0]
    return schemes.index(scheme_of(row)), METHODS.index(method), row["tool"] == "infopt", row["tool"]


def scheme_of(row: dict[str, Any]) -> str:
    """A row without one is from before there were several."""
    return row.get("scheme", "-" if row["tool"] == "float" else "W4")


def _is_row(path: Path) -> bool:
    return not path.name.startswith("ids-") and path.name.count(".") == 1


def _cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, str]:
    """Every column's text; a row that failed says why in place of its perplexity."""
    version, process, done = row.get("versions", {}), row.get("process"), row["status"] == "done"
    return {
        "scheme": scheme_of(row),
        "tool": row["tool"] + "".join(f" {version[key]}" for key in list(version)[:1]),
        "method": row["method"],
        "samples": str(row["samples"] or "-"),
        "perplexity": f"{row['perplexity']:.3f}" if done else row["status"],
        "mean KL": f"{row['kl_mean']:.5f}" if done and "kl_mean" in row else "-",
        "same first choice": f"{row['top1']:.2%}" if done and "top1" in row else "-",
        "quantizing, wall s (x infopt)": _with_ratio(row, rows) if done else "-",
        "quantizing, CPU s": _number(row.get("quantize_cpu_s")),
        "whole process, wall / CPU s": _whole(process),
        "whole process, CPU s": _number(process["cpu_s"] if process else None),
        "peak RSS MB": _number(process["peak_rss_mb"] if process and done else None),
        "weights MB": _number(row["bytes"] / 1e6 if done else None),
        "load before / after": f"{process['load_before']:.1f} / {process['load_after']:.1f}" if process else "-",
    }


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
        and all(other[key] == row[key] for key in ("method", "samples"))
        and scheme_of(other) == scheme_of(row)
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
    notes += [
        f"- {scheme_of(row)} {row['tool']} {row['method']} failed: {row['error']}" for row in rows if "error" in row
    ]
    return notes
