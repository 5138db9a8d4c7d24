"""`infopt eval`: perplexity of a model, quantized or not."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Kernels(StrEnum):
    """How quantized layers run: dequantized to fp32, or on packed weights in bf16."""

    exact = "exact"
    packed = "packed"


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, quantized or not, or a hub id.")],
    dataset: Annotated[str, typer.Option(help="Text: a file, a hub id, or 'builtin'.")] = "builtin",
    num_samples: Annotated[int, typer.Option(min=1, help="Windows: the first of the text, not overlapping.")] = 40,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens of a window; all but the first are predicted.")] = 512,
    kernels: Annotated[Kernels, typer.Option(help="How quantized layers run.")] = Kernels.exact,
    device: Annotated[str, typer.Option(help="cpu, cuda, or cuda:N for one of several GPUs.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON on stdout.")] = False,
) -> None:
    """Perplexity: the text is joined, tokenised once without special tokens, and cut into windows. fp32, block by block.

    Example: infopt eval ./model-w4 --dataset wikitext-2/test.raw.txt --num-samples 40 --seqlen 512
    """
    from infopt.checkpoint import resolve
    from infopt.cli.data import comparison_windows
    from infopt.report import json_out, note, progress
    from infopt.runtime.device import device_errors, find_device
    from infopt.runtime.model import RuntimeModel
    from infopt.runtime.quality import perplexity

    where = find_device(device)
    folder = resolve(model)
    runtime = RuntimeModel(folder, kernels.value, device=where)
    windows_NT, report = comparison_windows(dataset, num_samples, seqlen, folder)
    with device_errors(where), progress("running", len(runtime)) as step:
        result = perplexity(runtime, windows_NT, step)
    note(f"{model}: perplexity {result['perplexity']:.4f} over {result['tokens']:,} predicted tokens of {dataset}")
    if as_json:
        json_out({"model": model, "kernels": kernels.value, **result, "data": report})
