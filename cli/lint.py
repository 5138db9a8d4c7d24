"""`infopt lint`: what is wrong with a checkpoint, whichever tool made it."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from typing import Annotated

import typer

from infopt.errors import GateFailed


class Worst(StrEnum):
    """The mildest level that makes the command fail."""

    error = "error"
    warning = "warning"
    info = "info"


def lint(
    model: Annotated[str, typer.Argument(help="A model of any tool: a folder or hub id.", show_default=False)],
    level: Annotated[
        Worst, typer.Option(help="Fail (exit 7) on findings of this level or a worse one.")
    ] = Worst.warning,
    tp: Annotated[int | None, typer.Option(min=1, help="A tensor-parallel degree that the model must allow.")] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read every weight for NaN and infinity, not only small ones.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The findings as JSON on stdout.")] = False,
) -> None:
    """Look for what engines would not tell: names that match nothing, broken scales, dropped KV scales, missing files.

    Example: infopt lint ./model-w4 --tp 2
    """
    from infopt.checkpoint import resolve
    from infopt.exporters.lint import RULES, at_least
    from infopt.exporters.lint import lint as find
    from infopt.report import json_out, note, progress, table

    folder = resolve(model)
    with progress("looking", len(RULES)) as step:
        findings = find(folder, deep, tp, step)
    bad = at_least(findings, level.value)
    if findings:
        colours = {"error": "red", "warning": "yellow", "info": ""}
        rows = [(f.level, f.rule, " ".join(filter(None, (f.file, f.tensor))), f.message, f.fix) for f in findings]
        table("", ("level", "rule", "where", "found", "fix"), rows, [colours[f.level] for f in findings])
    if as_json:
        json_out({"passed": not bad, "findings": [dataclasses.asdict(f) for f in findings]})
    if bad:
        worst = ", ".join(sorted({f.rule for f in bad}))
        what = f"{folder}: {len(bad)} findings of level {level.value} or worse"
        raise GateFailed(what, worst, "see the fix of each; --level error lets warnings pass")
    note(f"{folder}: {'nothing found' if not findings else 'nothing above the level'}", "green")
