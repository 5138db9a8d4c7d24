"""The verdict on a compressed model: read the written bytes, run them, compare with the original, say it in one file.

    verdict = verify(out, original, windows_NT, Gates(max_kl=0.1))    # VerificationFailed (exit 6): bytes are wrong
    show_verdict(verdict)
    verdict.raise_for_gates()                                         # GateFailed (exit 7): a limit is passed

`judge` is `verify` without the raising, for a caller that shows the verdict first: a bad one is worth more than its
exit code. Either way it is written: `verification.json` lies beside the weights, and the manifest is told of it. Input
that cannot be read at all (a header that is no header, a path out of the folder) is an error of its own kind, as for
every command.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import version
from math import inf
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from infopt.checkpoint import CheckpointReader
from infopt.errors import GateFailed, UsageError, VerificationFailed
from infopt.exporters.quantized import QuantizedReader
from infopt.header import read_header
from infopt.output import MANIFEST, update_manifest, write_json
from infopt.runtime import integrity
from infopt.runtime.integrity import Check
from infopt.runtime.model import CacheChoice, RuntimeModel
from infopt.runtime.quality import Comparison, compare, compare_each, perplexity
from infopt.team import ALONE, Team

__all__ = [
    "VERDICT",
    "Check",
    "Comparison",
    "Gates",
    "Verdict",
    "assist",
    "compare",
    "judge",
    "perplexity",
    "verify",
    "write_verdict",
]

LoadWindows = Callable[[], tuple[torch.Tensor, dict[str, Any]]]
Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
VERDICT = "verification.json"
_FORMAT = "infopt-verification-1"


@dataclass(frozen=True)
class Gates:
    """Limits that the user sets; None is no limit. `max_ppl_increase` is relative: 0.05 allows five per cent more."""

    max_kl: float | None = None
    max_ppl_increase: float | None = None
    min_top1: float | None = None

    def __post_init__(self) -> None:
        """UsageError for a limit that no model, or every model, would pass."""
        for name, least, most in (("max_kl", 0, inf), ("max_ppl_increase", -1, inf), ("min_top1", 0, 1)):
            limit = getattr(self, name)
            if limit is not None and not (least <= limit <= most and limit < inf):
                flag = "--" + name.replace("_", "-")
                why = f"It is a number from {least} {f'to {most}' if most < inf else 'on'}."
                raise UsageError(f"{flag} {limit:g}", why, f"{flag} {0.9 if most == 1 else 0.1}")

    def checks(self, quality: Comparison) -> list[Check]:
        """One row per gate that is set. A value that is not a number passes none."""
        limits = [
            ("KL divergence, mean", quality.kl_mean, self.max_kl, 1),
            ("perplexity increase", quality.perplexity_increase, self.max_ppl_increase, 1),
            ("top-1 agreement", quality.top1, self.min_top1, -1),
        ]
        return [
            Check(
                f"gate: {name}",
                sign * value <= sign * limit,
                f"{value:.4g}, {'at most' if sign > 0 else 'at least'} {limit:g}",
            )
            for name, value, limit, sign in limits
            if limit is not None
        ]

    def any(self) -> bool:
        return any(limit is not None for limit in asdict(self).values())


@dataclass(frozen=True)
class Size:
    """Bytes of the weight files, parameters, and stored bits per weight: of all weights and of the quantized ones."""

    bytes: int
    parameters: int
    bits_per_weight: float
    bits_per_quantized_weight: float | None
    bytes_reference: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """What was found. `checks` are about the bytes, `gates` about the user's limits, `quality` about the answers."""

    folder: str
    checks: tuple[Check, ...]
    gates: tuple[Check, ...] = ()
    quality: Comparison | None = None
    candidate_only: dict[str, float | int] | None = None  # perplexity, where no reference was given
    size: Size | None = None
    cache: dict[str, Any] | None = None  # for a quantized key-value cache: the same with others, and bytes
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def intact(self) -> bool:
        return all(check.ok is not False for check in self.checks)

    @property
    def passed(self) -> bool:
        return self.intact and all(gate.ok for gate in self.gates)

    def to_json(self) -> dict[str, Any]:
        """Plain data without times or paths: the same model, data and machine give the same bytes."""
        return {
            "format": _FORMAT,
            "passed": self.passed,
            "checks": [asdict(check) for check in self.checks],
            "gates": [asdict(gate) for gate in self.gates],
            "quality": self.quality.to_json() if self.quality else self.candidate_only,
            "size": self.size.to_json() if self.size else None,
            "cache": self.cache,
            "data": self.data,
            "versions": _versions(),
        }

    def raise_if_damaged(self) -> None:
        """VerificationFailed, naming the first check that failed."""
        bad = [check for check in self.checks if check.ok is False]
        if bad:
            fix = "Quantize the model again, or fetch an undamaged copy."
            raise VerificationFailed(f"{self.folder} failed verification: {bad[0].name}", bad[0].detail, fix)

    def raise_for_gates(
        self, fix: str = "Quantize with more --bits, a smaller --group-size or another --method."
    ) -> None:
        """GateFailed, naming each gate that was missed."""
        missed = [gate for gate in self.gates if not gate.ok]
        if missed:
            why = "; ".join(f"{gate.name.removeprefix('gate: ')} is {gate.detail}" for gate in missed)
            raise GateFailed(f"{self.folder} is intact, but missed a gate", why, fix)


def judge(
    folder: Path,
    reference: Path | None = None,
    windows_NT: torch.Tensor | LoadWindows | None = None,
    gates: Gates | None = None,
    *,
    with_kernels: bool = True,
    data: dict[str, Any] | None = None,
    progress: Progress | None = None,
    team: Team = ALONE,
) -> Verdict:
    """Check the folder, compare with `reference` on `windows_NT`, and write `verification.json` into the folder.

    reference: the original model's folder; without it only perplexity is measured. windows_NT: int64 [N, T]; or a
    function that gives them and their report, called once the bytes are known to be good; or None to check the bytes
    alone. data: the report of `load_windows`, kept in the verdict. progress: see `infopt.report.progress`. team: the others
    of it are in `assist`.
    Raises UsageError (gates without a comparison), BadInput and Unsupported (unreadable files), OutOfResources.
    """
    gates = gates or Gates()
    if gates.any() and (reference is None or windows_NT is None):
        fix = f"infopt verify {quote(str(folder))} --reference MODEL"
        raise UsageError("a gate needs something to compare with", "It limits the distance to the original model.", fix)
    start = progress or _silent
    first = integrity.manifest(folder)
    if first.ok is False:
        verdict = Verdict(str(folder), (first,))
    else:
        verdict = _judge_intact(folder, reference, windows_NT, gates, first, with_kernels, data or {}, start, team)
    write_verdict(folder, verdict)
    return verdict


def verify(
    folder: Path,
    reference: Path | None = None,
    windows_NT: torch.Tensor | LoadWindows | None = None,
    gates: Gates | None = None,
    **options: Any,
) -> Verdict:
    """`judge`, and VerificationFailed where a check of the bytes failed; gates are left to `raise_for_gates`."""
    verdict = judge(folder, reference, windows_NT, gates, **options)
    verdict.raise_if_damaged()
    return verdict


def assist(folder: Path, reference: Path, windows_NT: torch.Tensor, team: Team) -> None:
    """Run this process's share of the windows for the one of the team that is in `judge`, once that one has found the bytes
    good."""
    models = RuntimeModel(folder), RuntimeModel(reference)
    _with_quality(Verdict(str(folder), ()), *models, windows_NT, Gates(), _silent, team)


def _silent(label: str, total: int) -> AbstractContextManager[Callable[[], None]]:
    return nullcontext(lambda: None)


def _judge_intact(
    folder: Path,
    reference: Path | None,
    windows_NT: torch.Tensor | LoadWindows | None,
    gates: Gates,
    first: Check,
    with_kernels: bool,
    data: dict[str, Any],
    start: Progress,
    team: Team,
) -> Verdict:
    candidate = RuntimeModel(folder)
    original = RuntimeModel(reference) if reference is not None else None
    source = original.reader if original else None
    checks = [
        first,
        Check("headers, index, shapes", True, f"{len(candidate.reader.tensors)} tensors, as config.json says"),
    ]
    if isinstance(candidate.reader, QuantizedReader):
        precisions = ("exact", "packed") if with_kernels else ()
        with start("checking layers", len(candidate.quantized)) as step:
            checks += integrity.layers(candidate.reader, precisions, step)
    if source is not None:
        checks.append(integrity.passed_through(candidate.reader, source))
    checks.append(integrity.side_files(candidate.reader, source))
    size = _size(candidate.reader, source)
    verdict = Verdict(str(folder), tuple(checks), size=size, data=data)
    if windows_NT is None or not verdict.intact:
        return verdict
    if not isinstance(windows_NT, torch.Tensor):
        windows_NT, data = windows_NT()
        verdict = replace(verdict, data=data)
    return _with_quality(verdict, candidate, original, windows_NT, gates, start, team)


def _with_quality(
    verdict: Verdict,
    candidate: RuntimeModel,
    original: RuntimeModel | None,
    windows_NT: torch.Tensor,
    gates: Gates,
    start: Progress,
    team: Team,
) -> Verdict:
    blocks = len(candidate) + (len(original) if original else 0)
    try:
        if original is None:
            with start("running", blocks) as step:
                alone = perplexity(candidate, windows_NT, step)
            answers = Check("answers", True, f"{alone['tokens']:,} predicted tokens; no reference to compare with")
            return replace(verdict, checks=(*verdict.checks, answers), candidate_only=alone)
        if candidate.cache is not None:
            return _with_cache(verdict, candidate, original, windows_NT, gates, start, team)
        with start("comparing", blocks) as step:
            quality = compare(original, candidate, windows_NT, step, team)
    except VerificationFailed as error:
        return replace(verdict, checks=(*verdict.checks, Check("answers", False, error.what)))
    return _answered(verdict, quality, gates)


def _with_cache(
    verdict: Verdict,
    candidate: RuntimeModel,
    original: RuntimeModel,
    windows_NT: torch.Tensor,
    gates: Gates,
    start: Progress,
    team: Team,
) -> Verdict:
    """The comparison with the cache as it is, with a float cache, and, where scales are stored, with scales of 1 (what is
    served without them)."""
    stored = candidate.cache is not None and candidate.cache.static
    choices: list[CacheChoice] = ["float", "unit"] if stored else ["float"]
    models = [candidate, *(RuntimeModel(candidate.folder, cache=choice) for choice in choices)]
    with start("comparing", len(original) + len(models) * len(candidate)) as step:
        quality, *others = compare_each(original, models, windows_NT, step, team)
    ours, theirs = candidate.cache_bytes()
    report: dict[str, Any] = {
        **{choice: other.to_json() for choice, other in zip(choices, others, strict=True)},
        "bytes_per_token": ours,
        "bytes_per_token_bf16": theirs,
    }
    return replace(_answered(verdict, quality, gates), cache=report)


def _answered(verdict: Verdict, quality: Comparison, gates: Gates) -> Verdict:
    answers = Check("answers", True, f"{quality.tokens:,} predicted tokens, all finite")
    return replace(verdict, checks=(*verdict.checks, answers), gates=tuple(gates.checks(quality)), quality=quality)


def _size(reader: CheckpointReader, original: CheckpointReader | None) -> Size:
    stored = _stored_bytes(reader)
    parameters = sum(_count(info.shape) for info in reader.tensors.values())
    per_quantized = None
    if isinstance(reader, QuantizedReader) and reader.quantized:
        ours = sum(
            n for key, n in stored.items() if key.rpartition(".")[0] in reader.quantized and not key.endswith(".bias")
        )
        per_quantized = 8 * ours / sum(_count(reader.tensors[f"{name}.weight"].shape) for name in reader.quantized)
    total = sum(stored.values())
    return Size(
        bytes=total,
        parameters=parameters,
        bits_per_weight=8 * total / parameters,
        bits_per_quantized_weight=per_quantized,
        bytes_reference=sum(_stored_bytes(original).values()) if original else None,
    )


def _stored_bytes(reader: CheckpointReader) -> dict[str, int]:
    files = sorted({info.file for info in reader.tensors.values()})
    return {name: info.nbytes for file in files for name, info in read_header(file)[0].items()}


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def write_verdict(folder: Path, verdict: Verdict) -> None:
    """The verdict beside the weights. The manifest learns of it even where another file is damaged: once that file is
    put right, the folder is right again."""
    write_json(folder / VERDICT, verdict.to_json())
    if (folder / MANIFEST).exists():
        with suppress(VerificationFailed):  # the manifest itself is damaged: the verdict says so already
            update_manifest(folder, VERDICT)


@cache  # finding a version reads a package's whole description
def _versions() -> dict[str, str]:
    names = ("infopt", "torch", "transformers")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
