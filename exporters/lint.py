"""What is wrong with a checkpoint, whichever tool made it: every rule in one list, each a function that yields findings.

A rule sees one `Model` (`infopt.exporters.lint_model`) and nothing of the other rules. To add one, write the function
and put it into RULES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from infopt.errors import InfoptError
from infopt.exporters import lint_files, lint_layers, lint_scheme
from infopt.exporters.lint_model import LEVELS, Finding, Level, Model, fault, load

Rule = Callable[[Model], Iterator[Finding]]

RULES: tuple[Rule, ...] = (
    lint_files.unsafe_files,
    lint_files.remote_code,
    lint_files.tokenizer,
    lint_files.chat_template,
    lint_files.generation_config,
    lint_files.ties,
    lint_files.missing_layers,
    lint_files.missing_experts,
    lint_files.leftovers,
    lint_scheme.required_keys,
    lint_scheme.unmatched_names,
    lint_scheme.uncovered_layers,
    lint_scheme.numbers,
    lint_layers.scales,
    lint_layers.numbers_in_weights,
    lint_layers.fused_siblings,
    lint_layers.kv_scales,
    lint_layers.act_order,
    lint_layers.group_degrees,
    lint_layers.head_degrees,
    lint_layers.block_degrees,
    lint_layers.shapes,
    lint_layers.quantized_head,
)
MOST = 20  # findings of one rule and level that are spelled out


def lint(
    folder: Path, deep: bool = False, tp: int | None = None, on_rule: Callable[[], None] | None = None
) -> list[Finding]:
    """Every finding, the worst first. deep: read all weights, not only the small ones; tp: a degree that must do.

    Raises BadInput for what is no model folder at all; whatever is wrong inside one is a finding.
    """
    model = load(folder, deep, tp)
    findings: list[Finding] = []
    for rule in RULES:
        try:
            findings += rule(model)
        except InfoptError as error:  # a tensor that ends before its header says, a disk that fails
            findings.append(fault(rule.__name__, error))
        if on_rule:
            on_rule()
    return _ordered([*model.faults, *findings])


def at_least(findings: list[Finding], level: Level) -> list[Finding]:
    """The findings of this level or a worse one."""
    return [finding for finding in findings if LEVELS.index(finding.level) <= LEVELS.index(level)]


def _ordered(findings: list[Finding]) -> list[Finding]:
    """Sorted by level, without doubles; a rule that speaks of hundreds of tensors is cut short, and says so."""
    kept: list[Finding] = []
    counts: dict[tuple[str, str], int] = {}
    for finding in sorted(set(findings), key=lambda f: (LEVELS.index(f.level), f.rule, f.file, f.tensor, f.message)):
        kind = (finding.level, finding.rule)
        counts[kind] = counts.get(kind, 0) + 1
        if counts[kind] <= MOST:
            kept.append(finding)
    for (level, rule), count in counts.items():
        if count > MOST:
            last = max(i for i, finding in enumerate(kept) if (finding.level, finding.rule) == (level, rule))
            message = f"{count - MOST} more of this kind"
            kept.insert(last + 1, Finding(level, rule, "", "", message, "see the ones above"))  # type: ignore[arg-type]
    return kept
