"""Text for the commands that need it: windows for calibration and for a comparison, and a line about what was read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infopt.errors import BadInput, UsageError
from infopt.report import note

if TYPE_CHECKING:
    from torch import Tensor

    from infopt.calibration.data import DataSpec, Part
    from infopt.runtime.verify import Gates


def calibration_windows(
    spec: DataSpec, source: Path, config: dict[str, Any], aloud: bool = True
) -> tuple[Tensor, dict[str, Any]]:
    """Windows [N, T] for the model in `source`, no longer than it can read, and the report of what was read (see
    `load_windows`). aloud: tell the user where they are not as asked for."""
    return _windows(spec, source, config, "calibration", aloud)


def comparison_windows(
    dataset: str, num_samples: int, seqlen: int, source: Path, aloud: bool = True
) -> tuple[Tensor, dict[str, Any]]:
    """The same of held-out text, the first windows of it."""
    from infopt.calibration.data import DataSpec
    from infopt.checkpoint import CheckpointReader

    spec = DataSpec(dataset, num_samples, seqlen)
    windows_NT, report = _windows(spec, source, CheckpointReader(source).config, "evaluation", aloud)
    if not len(windows_NT):
        what = f"{dataset} has {report['tokens']} tokens, fewer than one window of {seqlen}"
        raise BadInput(what, "There is nothing to evaluate.", "Give more text, or a smaller --seqlen.")
    if len(windows_NT) < num_samples and aloud:
        note(f"{dataset}: {len(windows_NT)} windows of {report['seqlen']} tokens; {num_samples} were asked for")
    return windows_NT, report


def asked_comparison(
    verify: bool, dataset: str | None, num_samples: int, limits: tuple[float | None, float | None, float | None]
) -> tuple[tuple[str, int] | None, Gates]:
    """What `--verify-dataset --verify-samples --max-kl --max-ppl-increase --min-top1` ask for: (the text and how many windows
    of it, or None where nothing is compared; the gates). UsageError for a gate with --no-verify."""
    from infopt.runtime.verify import Gates

    gates = Gates(*limits)
    if gates.any() and not verify:
        raise UsageError("a quality gate needs the comparison", "--no-verify leaves it out", "drop --no-verify")
    return (dataset or "builtin", num_samples) if verify else None, gates


def _windows(
    spec: DataSpec, source: Path, config: dict[str, Any], part: Part, aloud: bool
) -> tuple[Tensor, dict[str, Any]]:
    from infopt.calibration.data import load_tokenizer, load_windows

    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    positions, vocab = text.get("max_position_embeddings", text.get("n_positions")), text.get("vocab_size")
    if isinstance(positions, int) and 1 < positions < spec.seqlen:  # what no model can have is refused when it is built
        if aloud:
            note(f"--seqlen {spec.seqlen} is more than the model's {positions} positions; using {positions}")
        spec = replace(spec, seqlen=positions)
    return load_windows(spec, load_tokenizer(source), part=part, vocab_size=vocab if isinstance(vocab, int) else None)


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
