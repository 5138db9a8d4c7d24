"""`infopt verify`: is a folder what was meant to be written, and how far is it from the original?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infopt.errors import UsageError

if TYPE_CHECKING:
    import torch


def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The quantized folder.", show_default=False)],
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original: a folder or hub id.", show_default=False)
    ] = None,
    dataset: Annotated[str, typer.Option(help="Text of the comparison: a file, a hub id, or 'builtin'.")] = "builtin",
    num_samples: Annotated[int, typer.Option(help="Windows of the comparison; 0 checks the bytes alone.")] = 8,
    seqlen: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    max_kl: Annotated[float | None, typer.Option(help="Gate: mean KL divergence, nats.")] = None,
    max_ppl_increase: Annotated[float | None, typer.Option(help="Gate: relative, 0.05 is 5 % more.")] = None,
    min_top1: Annotated[float | None, typer.Option(help="Gate: share of equal first choices, 0 to 1.")] = None,
    kernels: Annotated[bool, typer.Option(help="Check every layer's kernels against the reference.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="The verdict as JSON on stdout.")] = False,
) -> None:
    """Check a quantized folder byte by byte, run it, and compare it with its original. Exit 6: damaged. 7: a gate failed.

    Example: infopt verify ./model-w4 --reference ./model --max-kl 0.1
    """
    from infopt.checkpoint import resolve
    from infopt.cli.data import comparison_windows
    from infopt.exporters.assemble import is_shards
    from infopt.report import json_out, progress, show_verdict
    from infopt.runtime.verify import Gates, judge
    from infopt.runtime.verify_shards import judge_shards

    gates = Gates(max_kl, max_ppl_increase, min_top1)
    if num_samples == 0 and gates.any():
        raise UsageError("a gate with --num-samples 0", "it limits the distance to the original", "--num-samples 8")
    original = resolve(reference) if reference is not None else None

    def windows(folder: Path = out) -> tuple[torch.Tensor, dict[str, Any]]:
        return comparison_windows(dataset, num_samples, seqlen, original or folder)

    source = windows if num_samples else None
    if is_shards(out):
        verdict = judge_shards(out, original, source, gates, with_kernels=kernels, progress=progress)
    else:
        verdict = judge(out, original, source, gates, with_kernels=kernels, progress=progress)
    show_verdict(verdict)
    if as_json:
        json_out(verdict.to_json())
    verdict.raise_if_damaged()
    verdict.raise_for_gates()
