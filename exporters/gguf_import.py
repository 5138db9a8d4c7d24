"""A GGUF file becomes a Hugging Face folder, one tensor in memory at a time (`gguf_model.py`).

The weights are *dequantized*, unless their codes are asked for (gguf_codes.py): what the GGUF's own quantization lost stays
lost, and a model made from a 4-bit file is a 16-bit file with 4-bit content. Say so when you report numbers about it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from infopt.errors import InfoptError, Unsupported
from infopt.exporters.folder import prove
from infopt.exporters.gguf_codes import FLOATS, Codes, plan_codes
from infopt.exporters.gguf_model import GGUFModel, open_gguf, portions, stream
from infopt.exporters.gguf_tokenizer import write_tokenizer
from infopt.header import read_json
from infopt.output import OutputFolder, merge_shards, write_json, write_safetensors

_PART_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Converted:
    """What was done: shown by the command and printed by `--json`."""

    output: str
    architecture: str
    tensors: int
    parameters: int
    bytes_read: int
    bytes_written: int
    stored_as: dict[str, int]  # GGUF type -> number of tensors
    unused: list[str]  # tensors of the file that the model has no place for
    tokenizer: bool
    carried: list[str]  # layers that kept their codes
    dequantized: list[str]


def convert_gguf(
    path: Path,
    output: Path,
    dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
    keep_codes: bool = False,
    dequantize: bool = True,
) -> Converted:
    """Write `output` (config, weights as `dtype`, tokenizer, chat template, generation config, manifest).

    keep_codes: linear layers keep theirs, as compressed-tensors; with `dequantize` what cannot becomes floats.

    Raises BadInput for a damaged file or values that are not finite in `dtype`, Unsupported for an architecture that
    transformers cannot map, and for codes that would have to be dequantized.
    """
    plan = open_gguf(path)
    header, model = plan.header, plan.model
    if keep_codes:
        plan = replace(plan, codes=plan_codes(header, plan.targets, model, plan.processor, dtype))
        _check_loss(plan, dequantize)
    with OutputFolder(output, overwrite=overwrite, source=path) as folder:
        for left in (*folder.stage.iterdir(), *folder.work.glob("part-*")):
            left.unlink()  # of an interrupted run, perhaps of another file
        try:
            _write_side_files(model, dtype, folder.stage)
            tokenizer = write_tokenizer(header, folder.stage)
            written = _write_weights(plan, dtype, folder)
            _check_complete(plan, written.keys())
            if plan.codes:
                _write_codes_report(plan.codes, folder.stage)
        except InfoptError:
            folder.discard()  # there is nothing to go on from
            raise
        folder.commit()
    quantized = {n for n, info in header.tensors.items() if info.kind not in FLOATS and n in plan.targets}
    carried = {name: layer.op for name, layer in plan.codes.layers.items()} if plan.codes else {}
    return Converted(
        output=str(output),
        architecture=header.architecture,
        tensors=len(written),
        parameters=sum(math.prod(header.tensors[name].shape) for name in plan.targets),
        bytes_read=path.stat().st_size,
        bytes_written=sum(written.values()),
        stored_as=dict(Counter(info.kind.name for info in header.tensors.values())),
        unused=sorted(header.tensors.keys() - plan.targets.keys()),
        tokenizer=tokenizer,
        carried=sorted(carried.values()),
        dequantized=sorted(plan.targets[name] for name in quantized - carried.keys()),
    )


def _check_loss(plan: GGUFModel, dequantize: bool) -> None:
    if plan.codes and plan.codes.lost and not dequantize:
        first, why = next(iter(plan.codes.lost.items()))
        total = len(plan.codes.lost) + len(plan.codes.layers)
        raise Unsupported(
            f"{len(plan.codes.lost)} of {total} quantized tensors of {plan.header.path} cannot keep their codes",
            f"{first}: {why}",
            "--dequantize (stores those as floats)",
        )


def _write_codes_report(codes: Codes, stage: Path) -> None:
    """The section of config.json and infopt.json; then every layer is read back and must be what was meant."""
    config = read_json(stage / "config.json")
    write_json(stage / "config.json", {**config, "quantization_config": codes.section()})
    write_json(stage / "infopt.json", codes.report())
    prove(stage, codes.digests)


def _write_weights(plan: GGUFModel, dtype: torch.dtype, folder: OutputFolder) -> dict[str, int]:
    """Write the tensors portion by portion, then merge the parts to shards; gives the number of bytes of each tensor."""
    parts: list[Path] = []
    written: dict[str, int] = {}
    for infos in portions(plan):
        for batch in _batches(stream(plan, infos, dtype)):
            parts.append(folder.work / f"part-{len(parts):05d}.safetensors")
            write_safetensors(parts[-1], batch)
            written |= {name: tensor.nbytes for name, tensor in batch.items()}
    if parts:
        merge_shards(parts, folder.stage)
    return written


def _write_side_files(model: Any, dtype: torch.dtype, stage: Path) -> None:
    config = model.config
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.name_or_path = ""
    config.save_pretrained(stage)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(stage)


def _batches(stream: Iterator[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """Group tensors until a part is large enough to be worth a file."""
    batch: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in stream:
        batch[name] = tensor.contiguous()
        size += tensor.nbytes
        if size >= _PART_BYTES:
            yield batch
            batch, size = {}, 0
    if batch:
        yield batch


def _check_complete(plan: GGUFModel, written: Collection[str]) -> None:
    """Each tensor of the model must have come, itself or as the tensor that it is tied to."""
    carried = {f"{layer.op}.weight" for layer in plan.codes.layers.values()} if plan.codes else set()
    wanted = plan.model.state_dict(keep_vars=True)
    there = {id(tensor) for name, tensor in wanted.items() if name in written or name in carried}
    missing = sorted(name for name, tensor in wanted.items() if id(tensor) not in there)
    if missing:
        raise Unsupported(
            f"{plan.header.path} does not give the whole model",
            f"{len(missing)} tensors are missing, the first is {missing[0]}",
            "Use the original Hugging Face model.",
        )
