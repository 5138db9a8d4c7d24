"""Calibration data for the commands that need it: the windows, and a line for the user about what was read and used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from infopt.calibration.data import DataSpec


def calibration_windows(spec: DataSpec, source: Path, config: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Windows [N, T] for the model in `source`, and the report of what was read (see `load_windows`)."""
    from infopt.calibration.data import load_tokenizer, load_windows

    vocab = (config.get("text_config") or config).get("vocab_size")
    return load_windows(
        spec, load_tokenizer(source), part="calibration", vocab_size=vocab if isinstance(vocab, int) else None
    )


def told(report: dict[str, Any]) -> str:
    """The report of `load_windows` as a line of text."""
    empty = f", {report['rows_empty']:,} of them empty" if report["rows_empty"] else ""
    cut = "; the rest was not read" if report["truncated"] else ""
    shape = "padded" if report["padding"] else "packed"
    asked = "" if report["windows"] == report["windows_asked"] else f" ({report['windows_asked']} were asked for)"
    longer = f", {report['rows_cut']:,} rows cut" if report.get("rows_cut") else ""
    return (
        f"calibration data: {report['source']}, {report['rows_read']:,} rows{empty}, {report['tokens']:,} tokens{cut}; "
        f"{report['windows']} {shape} windows{asked} of {report['seqlen']}{longer}: {report['tokens_used']:,} tokens used, "
        f"seed {report['seed']}"
    )
