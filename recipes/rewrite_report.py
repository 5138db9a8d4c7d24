"""What a rewrite did to the model, measured on the written bytes: by point of the healing, and by width of the window.

Every row is a model folder (the blocks as they were at that point; or the stage with another window in its config) that the
runtime reads and compares with the original on held-out windows, all in one pass of the original.

Legend: N windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from infopt.plot import Chart, svg
from infopt.recipes.rewrite import RewriteRun
from infopt.recipes.rewrite_block import CURVE
from infopt.runtime.bench import latencies
from infopt.runtime.model import RuntimeModel
from infopt.runtime.quality import compare_each

_NAMES = {
    "merged": "heads merged",
    "refitted": "output refitted",
    "quarter": "a quarter healed",
    "half": "half healed",
}


@dataclass(frozen=True)
class Point:
    """One row: what it is, the healing tokens that each block had seen, and the distance to the original."""

    name: str
    tokens: int
    kl: float
    perplexity: float
    top1: float


def healing_curve(run: RewriteRun, windows_NT: Tensor, on_block: Callable[[], None] | None = None) -> list[Point]:
    """The distance to the original at the points of the healing, the written model last; empty without snapshots."""
    labels = [label for label in CURVE if run.has_points(label)]
    distilled = run.distilled if run.distilled and run.distilled.kept else None
    if not labels and not distilled:
        return []
    tokens = run.tokens()
    folders = [run.folder_of(label) for label in labels]
    folders += [run.folder_before_distilling()] if distilled else []
    found = compare_each(
        RuntimeModel(run.reader.folder),
        [RuntimeModel(folder) for folder in (*folders, run.output.stage)],
        windows_NT,
        on_block,
    )
    start = {} if run.plan.regroups else {"merged": "window set"}
    names = [((_NAMES | start)[label], tokens.get(label, 0)) for label in labels] + [
        ("healed" if run.options.heal else "rewritten", tokens.get("all", 0))
    ]
    names += [("distilled", tokens.get("all", 0) + distilled.tokens)] if distilled else []
    return [Point(name, seen, c.kl_mean, c.perplexity, c.top1) for (name, seen), c in zip(names, found, strict=True)]


def window_curve(run: RewriteRun, windows_NT: Tensor, on_block: Callable[[], None] | None = None) -> list[Point]:
    """The distance to the original for windows half, twice and four times as wide; empty where none is rewritten."""
    window = run.options.window
    if window is None:
        return []
    widths = [w for w in (window // 2, window, 2 * window, 4 * window) if 0 < w < windows_NT.shape[1]]
    models = [RuntimeModel(run.folder_with({"sliding_window": w}, f"window-{w}")) for w in widths]
    found = compare_each(RuntimeModel(run.reader.folder), models, windows_NT, on_block) if models else []
    return [
        Point(f"window {width}", 0, c.kl_mean, c.perplexity, c.top1) for width, c in zip(widths, found, strict=True)
    ]


def plots(run: RewriteRun, points: list[Point]) -> dict[str, str]:
    """The report's pictures, by file name: the distance to the original and the loss of the distillation."""
    made = {}
    if points:
        line = [(float(point.tokens), point.kl) for point in points]
        dots = [("#c00", point.name, at) for point, at in zip(points, line, strict=True)]
        above = (
            f"KL to the original, nats: {max(y for _, y in line):.4f} (top) to {min(y for _, y in line):.4f} (bottom)"
        )
        made["healing.svg"] = svg([Chart([("#06c", line)], dots, above, f"healing tokens: 0 to {line[-1][0]:,.0f}")])
    if run.distilled and run.distilled.losses:
        losses = [(float(step), loss) for step, loss in enumerate(run.distilled.losses, 1)]
        held = [(0.0, run.distilled.before), (float(len(losses)), run.distilled.after)]
        above = f"KL to the original, nats: {max(y for _, y in losses + held):.4f} (top); red: on windows held out"
        made["distillation.svg"] = svg([Chart([("#06c", losses), ("#c00", held)], [], above, f"steps: {len(losses)}")])
    return made


def cache_report(run: RewriteRun, tokens: int) -> dict[str, Any]:
    """Bytes of the bf16 key-value cache before and after: for one token more, and for a context of so many tokens."""
    plan = run.plan
    return {
        "bytes_per_token": {"before": plan.cache_bytes(1, after=False), "after": plan.cache_bytes(1, after=True)},
        "context": tokens,
        "bytes_of_context": {
            "before": plan.cache_bytes(tokens, after=False),
            "after": plan.cache_bytes(tokens, after=True),
        },
    }


def speed_report(run: RewriteRun, tokens: int) -> dict[str, Any]:
    """Tokens per second of one text after so many tokens (or as many as the model knows), before and after; both models are
    loaded whole, one after the other, and computed with in float32."""
    said: dict[str, Any] = {}
    for name, folder in (("before", run.reader.folder), ("after", run.output.stage)):
        ((_, context), seconds), *_ = latencies(folder, batches=(1,), contexts=(tokens,)).items()
        said |= {"context": context, name: 1 / seconds}
    return said
