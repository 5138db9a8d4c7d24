"""`infopt convert`: a model in one format becomes the same model in another."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infopt.errors import UsageError

if TYPE_CHECKING:
    from infopt.exporters.carry import Loss
    from infopt.exporters.convert import Converted


class WeightType(StrEnum):
    """How dequantized weights are stored."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def convert(
    model: Annotated[str, typer.Argument(help="A quantized folder, a hub id, or a GGUF file.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.", show_default=False)],
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="compressed-tensors, gptq, gptq_v2, awq, fp8, mlx, gguf, gguf_q8_0, gguf_q4_k and gguf_q6_k (rounded again), "
            "or safetensors (plain).",
        ),
    ] = None,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Round layers again that the format cannot hold.")
    ] = False,
    dequantize: Annotated[bool, typer.Option("--dequantize", help="Store such layers as floating numbers.")] = False,
    dtype: Annotated[
        WeightType | None, typer.Option(help="Of dequantized weights; the model's own, bfloat16 for GGUF files.")
    ] = None,
    tokenizer: Annotated[bool, typer.Option(help="Put the tokenizer into a GGUF file.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON on stdout.")] = False,
) -> None:
    """Convert a model to another format. Codes are carried over bit for bit; nothing is rounded unless you say so.

    Example: infopt convert ./model-w4 --format gptq -o ./model-gptq
    Example: infopt convert SmolLM2-135M-Instruct.Q4_1.gguf -o SmolLM2-135M-Instruct
    Example: infopt convert model-Q4_0.gguf --format compressed-tensors --dequantize -o ./model-w4
    """
    if Path(model).suffix.lower() == ".gguf":
        if form not in (None, "safetensors", "compressed-tensors") or requantize:
            why = "a GGUF file becomes plain safetensors, or compressed-tensors with its codes"
            fix = f"infopt convert {model} --format compressed-tensors -o DIR, then infopt convert DIR"
            raise UsageError(f"{model} --format {form}{' --requantize' if requantize else ''}", why, fix)
        codes = form == "compressed-tensors"
        _from_gguf(Path(model), output, dtype or WeightType.bfloat16, overwrite, (codes, dequantize), as_json)
        return
    if form is None:
        raise UsageError("--format is missing", "it says what the folder is to become", "--format gptq")
    if requantize and dequantize:
        raise UsageError("--requantize and --dequantize", "they contradict each other", "drop one")
    _from_folder(model, output, form, (requantize, dequantize), dtype, (overwrite, tokenizer), as_json)


def _from_gguf(
    path: Path, output: Path, dtype: WeightType, overwrite: bool, codes: tuple[bool, bool], as_json: bool
) -> None:
    import torch

    from infopt.exporters.gguf_import import convert_gguf
    from infopt.report import json_out, note

    done = convert_gguf(path, output, getattr(torch, dtype.value), overwrite, *codes)
    if as_json:
        json_out(dataclasses.asdict(done))
        return
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(done.stored_as.items()))
    note(f"{path.name}: {done.architecture}, {done.parameters / 1e6:.1f} M parameters, tensors: {kinds}")
    note(f"{output}: {done.bytes_written / 1e6:.0f} MB as {dtype.value}, {done.tensors} tensors")
    if done.carried:
        note(f"{len(done.carried)} layers carried over bit for bit, {len(done.dequantized)} tensors dequantized")
    if not done.tokenizer:
        note("The file has no tokenizer: copy one into the folder before you quantize or evaluate.", "yellow")
    if done.unused:
        note(f"Not used, the model has no place for them: {', '.join(done.unused)}", "yellow")


def _from_folder(
    model: str,
    output: Path,
    form: str,
    losses: tuple[bool, bool],
    dtype: WeightType | None,
    switches: tuple[bool, bool],
    as_json: bool,
) -> None:
    import torch

    from infopt.checkpoint import resolve
    from infopt.exporters.convert import convert_folder, convert_to_gguf
    from infopt.exporters.formats import FORMATS, GGUF_FORMATS, PLAIN, named
    from infopt.exporters.gguf_kquants import KQUANTS
    from infopt.report import json_out

    known = ", ".join((*FORMATS, *GGUF_FORMATS, *KQUANTS, PLAIN))
    if form not in known.split(", "):
        raise UsageError(f"--format {form}", f"known: {known}", "--format compressed-tensors")
    loss: Loss | None = "requantize" if losses[0] else "dequantize" if losses[1] else None
    stored = getattr(torch, dtype.value) if dtype else None
    overwrite, tokenizer = switches
    if form in GGUF_FORMATS or form in KQUANTS:
        target = form if form in KQUANTS else named(form)
        done = convert_to_gguf(resolve(model), output, target, loss, stored, overwrite, tokenizer)
    else:
        done = convert_folder(resolve(model), output, None if form == PLAIN else named(form), loss, stored, overwrite)
    if as_json:
        json_out(dataclasses.asdict(done))
    else:
        _tell(done)


def _tell(done: Converted) -> None:
    from infopt.report import note

    note(f"{done.output}: {done.source_format} to {done.format}")
    note(
        f"{len(done.carried)} layers carried over bit for bit, {len(done.requantized)} requantized, "
        f"{len(done.dequantized)} dequantized; {done.copied} other tensors copied"
    )
    if done.left_out:
        note(
            f"{len(done.left_out)} scales of the key-value cache left out: {done.format} has no place for them",
            "yellow",
        )
