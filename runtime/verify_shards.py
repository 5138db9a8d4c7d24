"""The verdict on a folder of shards: assembled it is the model byte for byte, and its ranks answer as one does.

The shards are put together beside themselves for the time of the check. The result goes through `infopt.runtime.verify` as
any folder does, so a reference and gates mean the same; then the ranks run, one process each, and their last hidden states
and logits are compared with those of the whole model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from infopt.exporters.assemble import assemble, open_shards
from infopt.runtime import integrity
from infopt.runtime.integrity import Check
from infopt.runtime.model import RuntimeModel
from infopt.runtime.parallel import TAIL, run_shards
from infopt.runtime.verify import Gates, Progress, Verdict, judge, write_verdict
from infopt.writer import os_errors

#: Largest relative difference between N ranks and one: fp32 summed in another order.
TOLERANCE = 1e-4
#: Where layers round their inputs, or a cache its keys and values: a last bit may push one over a rounding edge, to the next
#: of 255 steps.
ROUNDED_TOLERANCE = 5e-2
LoadFor = Callable[[Path], tuple[torch.Tensor, dict[str, Any]]]


def judge_shards(
    folder: Path,
    reference: Path | None,
    load_windows: LoadFor | None,
    gates: Gates | None = None,
    *,
    with_kernels: bool = True,
    progress: Progress | None = None,
) -> Verdict:
    """Check, assemble, run and compare; `verification.json` is written into the folder.

    load_windows: gives windows for the model in a folder and their report; None checks the bytes alone. The rest is as for
    `infopt.runtime.verify.judge`.
    """
    start = progress or (lambda label, total: nullcontext(lambda: None))
    first = integrity.manifest(folder)
    if first.ok is False:
        verdict = Verdict(str(folder), (first,))
        write_verdict(folder, verdict)
        return verdict
    shards = open_shards(folder)
    with os_errors(folder.parent), tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as name:
        whole = Path(name)
        with start("assembling", len(shards.described.tensors)) as step:
            assemble(shards, whole, step)
        files = f"{len(shards.described.files)} files with the sha256 that they had before they were cut"
        checks = [first, Check("assembled", True, files)]
        loaded = load_windows(whole) if load_windows else None
        windows_NT, data = loaded or (None, None)
        judged = judge(whole, reference, windows_NT, gates, with_kernels=with_kernels, data=data, progress=progress)
        checks += [replace(check, name=f"assembled: {check.name}") for check in judged.checks]
        if windows_NT is not None and judged.intact:
            checks.append(_same_answers(folder, whole, windows_NT, shards.described.tp, shards.described.pp))
    verdict = replace(judged, folder=str(folder), checks=tuple(checks))
    write_verdict(folder, verdict)
    return verdict


def _same_answers(folder: Path, whole: Path, windows_NT: torch.Tensor, tp: int, pp: int) -> Check:
    name = f"{tp} x {pp} ranks as one"
    hidden_NTC, logits_NTV = run_shards(folder, windows_NT)
    model = RuntimeModel(whole)
    wanted_NTC = model.last_hidden(windows_NT)
    model.load_outer()
    wanted_NTV = torch.stack([model.logits(hidden_TC) for hidden_TC in wanted_NTC[:, -TAIL:]])
    model.free_outer()
    errors = {"hidden states": difference(hidden_NTC, wanted_NTC), "logits": difference(logits_NTV, wanted_NTV)}
    said = ", ".join(f"{what} differ by {error:.1e}" for what, error in errors.items())
    rounded = model.cache is not None or any(grid.inputs is not None for grid in model.quantized.values())
    most = ROUNDED_TOLERANCE if rounded else TOLERANCE
    fine = all(error <= most for error in errors.values())  # also False for NaN
    return Check(
        name, fine, f"{said} (relative; at most {most:.0e}{', values are rounded on the way' if rounded else ''})"
    )


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, relative to the largest value that was wanted; infinite for other shapes."""
    if found.shape != wanted.shape:
        return float("inf")
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
