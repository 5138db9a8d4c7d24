"""What a person reads: notes, tables and progress on stderr, so that stdout stays free for `--json`.

Colours and bars only on a terminal that wants them (rich respects NO_COLOR); anywhere else the same words, plain.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

_PLAIN_WIDTH = 160  # in a file or a pipe no window sets the width, and a wrapped row cannot be searched


def console() -> Console:
    """stderr; a new one each time, since stderr may have been redirected in between."""
    wide = None if sys.stderr.isatty() else _PLAIN_WIDTH
    return Console(stderr=True, highlight=False, width=wide, soft_wrap=False)


def note(text: str, style: str = "") -> None:
    """One line (or more) on stderr. `text` is literal: brackets in file names are not markup."""
    console().print(escape(text), style=style or None, soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], styles: Sequence[str] = ()) -> None:
    """A table on stderr. `styles`: one per row ("green", "red", ""); shorter is fine. Numbers are right-aligned."""
    out = console()
    shown = [[_text(cell) for cell in row] for row in rows]
    made = Table(title=escape(title) or None, title_justify="left", box=box.SIMPLE_HEAD if out.is_terminal else None)
    for i, name in enumerate(columns):
        numeric = bool(shown) and all(_is_number(row[i]) for row in shown)
        made.add_column(escape(name), justify="right" if numeric else "left", overflow="fold")
    for i, row in enumerate(shown):
        made.add_row(*map(escape, row), style=styles[i] if i < len(styles) and styles[i] else None)
    out.print(made)


def json_out(value: object) -> None:
    """One JSON document on stdout, keys in the order given."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    sys.stdout.flush()


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, nothing elsewhere. Yields a function that advances it by one."""
    out = console()
    if not out.is_terminal:
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task(escape(label), total=total)
        yield lambda: bar.advance(task)


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


class _Reported(Protocol):
    def to_json(self) -> dict[str, Any]: ...


def show_verdict(verdict: _Reported) -> None:
    """The verdict of `infopt.runtime.verify` as tables on stderr."""
    said = verdict.to_json()
    marks = {True: ("ok", "green"), False: ("FAILED", "red"), None: ("not checked", "yellow")}
    checks = [*said["checks"], *said["gates"]]
    rows = [(marks[check["ok"]][0], check["name"], check["detail"]) for check in checks]
    table("Verification", ("", "check", "found"), rows, [marks[check["ok"]][1] for check in checks])
    quality, size = said["quality"] or {}, said["size"] or {}
    measured = [*_quality_rows(quality), *_cache_rows(said.get("cache")), *_size_rows(size)]
    if measured:
        table("", ("measure", "original", "this model"), measured)
    note("passed" if said["passed"] else "FAILED", "bold green" if said["passed"] else "bold red")


def _quality_rows(quality: dict[str, Any]) -> list[tuple[str, str, str]]:
    if "kl_mean" not in quality:
        return [("perplexity", "", f"{quality['perplexity']:.4f}")] if quality else []
    increase = f"({quality['perplexity_increase']:+.2%})"
    return [
        ("perplexity", f"{quality['perplexity_reference']:.4f}", f"{quality['perplexity']:.4f} {increase}"),
        ("KL divergence, nats: mean, median", "0", f"{quality['kl_mean']:.5f}, {quality['kl_median']:.5f}"),
        ("KL divergence: 99.9 %, largest", "0", f"{quality['kl_999']:.4f}, {quality['kl_max']:.4f}"),
        ("same most likely token", "100 %", f"{quality['top1']:.2%}"),
    ]


def _cache_rows(cache: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    if not cache:
        return []
    rows = [
        (name, "", f"perplexity {cache[key]['perplexity']:.4f}, KL {cache[key]['kl_mean']:.5f}")
        for key, name in (("float", "with a float cache"), ("unit", "with scales of 1 in the cache"))
        if key in cache
    ]
    ours, theirs = cache["bytes_per_token"], cache["bytes_per_token_bf16"]
    size = ("cache, bytes per token", f"{theirs:,.0f}", f"{ours:,.0f} ({theirs / ours:.2f} times smaller)")
    return [*rows, size]


def _size_rows(size: dict[str, Any]) -> list[tuple[str, str, str]]:
    if not size:
        return []
    before, parts = size["bytes_reference"], size["bits_per_quantized_weight"]
    quantized = f", {parts:.2f} in quantized layers" if parts else ""
    return [
        (
            "weights",
            megabytes(before) if before else "",
            megabytes(size["bytes"]) + (f" ({before / size['bytes']:.2f} times smaller)" if before else ""),
        ),
        (
            "bits per weight",
            f"{8 * before / size['parameters']:.2f}" if before else "",
            f"{size['bits_per_weight']:.2f}{quantized}",
        ),
    ]


def _text(cell: Any) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "").rstrip("%x"))
    except ValueError:
        return False
    return True


class BlockLines:
    """Called with the report of each finished block of `count`, and whether an earlier run finished it: one line, with what
    `said` tells of it and the time left, and one for each of its notes."""

    def __init__(self, count: int, said: Callable[[Any], str] = lambda _: "") -> None:
        self.count, self.said = count, said
        self.began, self.fresh = time.monotonic(), 0

    def __call__(self, report: Any, resumed: bool) -> None:
        done = report.index + 1
        if resumed:
            note(f"block {done}/{self.count}  done by an earlier run")
        else:
            self.fresh += 1
            left = (time.monotonic() - self.began) / self.fresh * (self.count - done)
            note(f"block {done}/{self.count}{self.said(report)}  {left:.0f} s left")
        for line in report.notes:
            note(f"  note: {line}")
