"""`infopt convert`: a GGUF file becomes a Hugging Face folder."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class WeightType(StrEnum):
    """How the dequantized weights are stored."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def convert(
    model: Annotated[Path, typer.Argument(metavar="MODEL.gguf", help="The GGUF file to read.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.", show_default=False)],
    dtype: Annotated[WeightType, typer.Option(help="How the weights are stored.")] = WeightType.bfloat16,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON on stdout.")] = False,
) -> None:
    """Convert a GGUF file to a Hugging Face folder (weights dequantized, tokenizer and chat template kept).

    Example: infopt convert SmolLM2-135M-Instruct.Q4_1.gguf -o SmolLM2-135M-Instruct
    """
    import torch

    from infopt.exporters.gguf_import import convert_gguf
    from infopt.report import json_out, note

    done = convert_gguf(model, output, getattr(torch, dtype.value), overwrite)
    if as_json:
        json_out(dataclasses.asdict(done))
        return
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(done.stored_as.items()))
    note(f"{model.name}: {done.architecture}, {done.parameters / 1e6:.1f} M parameters, tensors: {kinds}")
    note(f"{output}: {done.bytes_written / 1e6:.0f} MB as {dtype.value}, {done.tensors} tensors")
    if not done.tokenizer:
        note("The file has no tokenizer: copy one into the folder before you quantize or evaluate.", "yellow")
    if done.unused:
        note(f"Not used, the model has no place for them: {', '.join(done.unused)}", "yellow")
