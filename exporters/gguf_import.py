"""A GGUF file becomes a Hugging Face folder, one tensor in memory at a time.

GGUF has names, a row order for rotary embeddings and a `1 + w` for some norms of its own. transformers carries
the tables that undo all this (`modeling_gguf_pytorch_utils`), and the `gguf` package dequantizes every block type.
This file joins the two as a stream, so that a 40 GB file needs the memory of its largest tensor, and the result is bit
for bit what `AutoModelForCausalLM.from_pretrained(..., gguf_file=...)` gives, dequantized and cast (a test compares).

The weights are *dequantized*: what the GGUF's own quantization lost stays lost, and a model made from a 4-bit file is a
16-bit file with 4-bit content. Say so when you report numbers about it.

The header is checked first (gguf_header.py); the tables come into play only for a file whose sizes are consistent.
Stacked experts keep the stacked names that transformers 5 has in memory, which its loader takes as they are.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf import dequantize
from torch import nn

from infopt.errors import BadInput, InfoptError, Unsupported
from infopt.exporters.gguf_header import GGUFHeader, GGUFTensorInfo, read_gguf_header
from infopt.exporters.gguf_tokenizer import with_rules
from infopt.output import OutputFolder, merge_shards, write_safetensors

_PART_BYTES = 256 * 2**20
_CHUNK_VALUES = 16 * 2**20
_BY_ROWS = ("token_embd.weight", "output.weight")  # by far the largest tensors, and stored row by row as they are
_EXPENDABLE = ("rope_freqs.", "rope_factors_")  # tables for long contexts; the command names them when it drops them
_MODEL_FAILURES = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    ZeroDivisionError,
    RuntimeError,
    OSError,
)


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


def convert_gguf(path: Path, output: Path, dtype: torch.dtype = torch.bfloat16, overwrite: bool = False) -> Converted:
    """Write `output` (config, weights as `dtype`, tokenizer, chat template, generation config, manifest).

    Raises BadInput for a damaged file or values that are not finite in `dtype`, Unsupported for an architecture that
    transformers cannot map.
    """
    header = read_gguf_header(path)
    _check_counts(header)
    with OutputFolder(output, overwrite=overwrite, source=path) as folder:
        for left in (*folder.stage.iterdir(), *folder.work.glob("part-*")):
            left.unlink()  # of an interrupted run, perhaps of another file
        try:
            model = _skeleton(header)
            plan = _plan(header, model)
            _write_side_files(model, dtype, folder.stage)
            tokenizer = _write_tokenizer(header, folder.stage)
            written = _write_weights(_stream(plan, dtype), folder)
            _check_complete(header, model, set(written))
        except InfoptError:
            folder.discard()  # there is nothing to go on from
            raise
        folder.commit()
    parameters = sum(written.values())
    return Converted(
        output=str(output),
        architecture=header.architecture,
        tensors=len(written),
        parameters=parameters,
        bytes_read=path.stat().st_size,
        bytes_written=parameters * dtype.itemsize,
        stored_as=dict(Counter(info.kind.name for info in header.tensors.values())),
        unused=sorted(header.tensors.keys() - plan.targets.keys()),
        tokenizer=tokenizer,
    )


def gguf_tensors(path: Path, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The file's tensors under their Hugging Face names, dequantized, in the order of the file. Raises as `convert_gguf`."""
    header = read_gguf_header(path)
    _check_counts(header)
    return _stream(_plan(header, _skeleton(header)), dtype)


def gguf_config(path: Path) -> Any:
    """The transformers config that the file describes. Raises as `convert_gguf`."""
    header = read_gguf_header(path)
    _check_counts(header)
    return _skeleton(header).config


def gguf_processor(architecture: str, model: nn.Module) -> Any:
    """transformers' undoing of what GGUF changes in this architecture's tensors."""
    return _tables().TENSOR_PROCESSORS.get(architecture, _tables().TensorProcessor)(config=_config(model))


def gguf_names(model: nn.Module, processor: Any, architecture: str | None = None) -> dict[str, str]:
    """{GGUF name: Hugging Face name} for the model's tensors; Unsupported where the gguf package does not know it.

    architecture: whose names, where they are not those of the model's own type.
    """
    try:
        return dict(_tables().get_gguf_hf_weights_map(model, processor, architecture))
    except NotImplementedError as error:
        raise Unsupported("GGUF has no names for this model", str(error), "pip install --upgrade gguf") from error


def _write_weights(stream: Iterator[tuple[str, torch.Tensor]], folder: OutputFolder) -> dict[str, int]:
    """Write the tensors as they come, then merge the parts to shards; gives the number of values of each tensor."""
    parts: list[Path] = []
    written: dict[str, int] = {}
    for batch in _batches(stream):
        parts.append(folder.work / f"part-{len(parts):05d}.safetensors")
        write_safetensors(parts[-1], batch)
        written |= {name: tensor.numel() for name, tensor in batch.items()}
    if parts:
        merge_shards(parts, folder.stage)
    return written


def _check_counts(header: GGUFHeader) -> None:
    """Refuse sizes that the file cannot hold before a model of that size is described."""
    for key, value in header.values.items():
        is_count = isinstance(value, int) and not isinstance(value, bool)
        if is_count and key.startswith(header.architecture + ".") and not -1 <= value < 2**31:
            raise BadInput(f"{header.path}: {key} is {value}", "no model has such a size", "Download the file again.")
    blocks = header.values.get(f"{header.architecture}.block_count", 0)
    experts = header.values.get(f"{header.architecture}.expert_count", 0)
    if not isinstance(blocks, int) or not 0 < blocks <= len(header.tensors) or not isinstance(experts, int):
        raise BadInput(
            f"{header.path}: block_count is {blocks!r}",
            f"the file has {len(header.tensors)} tensors in all",
            "Download the file again.",
        )
    if experts > max(max(info.shape) for info in header.tensors.values()):
        raise BadInput(
            f"{header.path}: expert_count is {experts}", "no tensor has that size", "Download the file again."
        )


def _tables() -> Any:
    """transformers' GGUF tables. Imported late: they and this module's readers need torch and a second to load."""
    from transformers import modeling_gguf_pytorch_utils

    return modeling_gguf_pytorch_utils


def _skeleton(header: GGUFHeader) -> nn.Module:
    """The model on the meta device: its names and shapes, and nothing else."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if header.architecture not in _tables().GGUF_SUPPORTED_ARCHITECTURES:
        raise Unsupported(
            f"{header.path}: the architecture {header.architecture!r} cannot be converted",
            "the installed transformers has no GGUF table for it",
            "Use the original Hugging Face model, or a newer transformers: pip install --upgrade transformers",
        )
    try:
        config = AutoConfig.from_pretrained(str(header.path.parent), gguf_file=header.path.name, local_files_only=True)
        embedding = header.tensors.get("token_embd.weight")
        if embedding is not None:  # the file's table of texts may be shorter than its padded embedding
            config.vocab_size = embedding.shape[0]
        head = header.values.get(f"{header.architecture}.attention.key_length")
        if type(head) is int and head > 0 and hasattr(config, "head_dim"):  # transformers reads it for some types only
            config.head_dim = head
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except _MODEL_FAILURES as error:
        raise BadInput(
            f"{header.path} describes a model that transformers cannot build",
            f"{type(error).__name__}: {error}",
            "Use the original Hugging Face model, or convert the file again with a newer llama.cpp.",
        ) from error
    return model


def _write_side_files(model: Any, dtype: torch.dtype, stage: Path) -> None:
    config = model.config
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.name_or_path = ""
    config.save_pretrained(stage)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(stage)


def _write_tokenizer(header: GGUFHeader, stage: Path) -> bool:
    """Write the tokenizer with its chat template; False where the file has none."""
    from transformers import AutoTokenizer

    if not header.values.get("tokenizer.ggml.tokens"):
        return False
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(header.path.parent), gguf_file=header.path.name, local_files_only=True
        )
        tokenizer.save_pretrained(stage)
        _restore_rules(header, stage / "tokenizer.json")
    except _MODEL_FAILURES as error:
        raise Unsupported(
            f"{header.path}: its tokenizer cannot be converted",
            f"{type(error).__name__}: {error}",
            "Use the original Hugging Face model.",
        ) from error
    return True


def _restore_rules(header: GGUFHeader, path: Path) -> None:
    """How text is cut before it is merged: the file says it by name, which transformers does not read."""
    name = header.values.get("tokenizer.ggml.pre")
    if header.values.get("tokenizer.ggml.model") != "gpt2" or not isinstance(name, str) or not path.exists():
        return
    rules = with_rules(json.loads(path.read_text(encoding="utf-8")), name)
    if rules is not None:
        path.write_text(json.dumps(rules, indent=2, ensure_ascii=False), encoding="utf-8")


@dataclass(frozen=True)
class _Plan:
    """Where each tensor of the file goes. `names` is transformers' table; `targets` what of it this file has."""

    header: GGUFHeader
    processor: Any
    names: dict[str, str]
    targets: dict[str, str]
    shapes: dict[str, tuple[int, ...]]


def _plan(header: GGUFHeader, model: nn.Module) -> _Plan:
    processor = gguf_processor(header.architecture, model)
    names = gguf_names(model, processor)
    targets = {}
    for name in header.tensors:
        key = name if name in names else name.removesuffix(".weight")  # stacked experts are listed without it
        if key in names:
            targets[name] = names[key]
    homeless = sorted(name for name in header.tensors if name not in targets and not name.startswith(_EXPENDABLE))
    if homeless:
        raise Unsupported(
            f"{header.path} cannot be converted",
            f"the model has no place for {homeless[0]} ({len(homeless)} such tensors)",
            "Use the original Hugging Face model.",
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return _Plan(header, processor, names, targets, shapes)


def _config(model: nn.Module) -> dict[str, Any]:
    config: Any = model.config
    return dict(config.to_dict())


def _stream(plan: _Plan, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors under their Hugging Face names, in the order of the file.

    A processor may return a tensor under a GGUF name, or put it into the dict that it is handed: several GGUF tensors
    can feed one (gate and up of stacked experts), which leaves when its last source has been read.
    """
    sources = Counter(plan.targets.values())
    held: dict[str, torch.Tensor] = {}
    with plan.header.path.open("rb") as file:
        for info in plan.header.tensors.values():
            result = _one(file, info, plan, held, dtype)
            if result is not None:
                yield _checked(plan, *result)
            if info.name in plan.targets:
                sources[plan.targets[info.name]] -= 1
            for name in [name for name in held if sources[name] <= 0]:
                yield _checked(plan, name, held.pop(name).to(dtype))


def _one(
    file: BinaryIO, info: GGUFTensorInfo, plan: _Plan, held: dict[str, torch.Tensor], dtype: torch.dtype
) -> tuple[str, torch.Tensor] | None:
    """Read, dequantize and undo the changes of one tensor. None: it is in `held`, or the model has no place for it."""
    if info.name not in plan.targets:
        return None
    if info.name in _BY_ROWS and _is_plain(plan.processor, info.name):
        out = torch.empty(info.shape, dtype=dtype)
        for start, stop in _row_ranges(info):
            out[start:stop] = torch.from_numpy(_read_rows(file, info, start, stop)).to(dtype)
        return plan.targets[info.name], out
    weights = np.concatenate([_read_rows(file, info, start, stop) for start, stop in _row_ranges(info)])
    try:
        result = plan.processor.process(
            weights=weights, name=info.name, tensor_key_mapping=plan.names, parsed_parameters={"tensors": held}
        )
    except (ValueError, RuntimeError, IndexError, KeyError) as error:
        raise _wrong_shape(plan, info.name, f"{list(info.shape)} does not fit: {error}") from error
    if result.name not in plan.names:
        return None
    return plan.names[result.name], torch.from_numpy(np.ascontiguousarray(result.weights)).to(dtype)


def _is_plain(processor: Any, name: str) -> bool:
    """Whether the processor hands this tensor on as it came (tried on one value)."""
    probe = np.full((1, 1), 0.5, dtype=np.float32)
    result = processor.process(weights=probe, name=name, tensor_key_mapping={}, parsed_parameters={"tensors": {}})
    return bool(result.name == name and result.weights.shape == (1, 1) and result.weights[0, 0] == 0.5)


def _row_ranges(info: GGUFTensorInfo) -> Iterator[tuple[int, int]]:
    """Leading-dimension ranges of a bounded number of values each."""
    values = max(1, math.prod(info.shape[1:]))
    step = max(1, _CHUNK_VALUES // values) if len(info.shape) > 1 else info.shape[0]
    for start in range(0, info.shape[0], step):
        yield start, min(start + step, info.shape[0])


def _read_rows(file: BinaryIO, info: GGUFTensorInfo, start: int, stop: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Leading rows [start, stop) as float32, in the tensor's shape."""
    one_row = len(info.shape) == 1
    size = info.nbytes // info.shape[0] if not one_row else 0
    file.seek(info.offset + start * size)
    raw = bytearray(info.nbytes if one_row else (stop - start) * size)
    if file.readinto(raw) != len(raw):  # type: ignore[attr-defined]
        raise BadInput(f"{file.name} became shorter while it was read", "", "Run the command again.")
    shape = info.shape if one_row else (stop - start, *info.shape[1:])
    try:
        values = dequantize(np.frombuffer(raw, dtype=np.uint8).reshape(-1, info.row_bytes), info.kind)
    except NotImplementedError as error:
        raise Unsupported(
            f"the tensor {info.name} has the type {info.kind.name}", str(error), "pip install --upgrade gguf"
        ) from error
    return values.astype(np.float32, copy=False).reshape(shape)


def _checked(plan: _Plan, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    if name in plan.shapes and tuple(tensor.shape) != plan.shapes[name]:
        raise _wrong_shape(plan, name, f"{list(tensor.shape)}, and its configuration says {list(plan.shapes[name])}")
    if not bool(torch.isfinite(tensor).all()):
        raise BadInput(
            f"{plan.header.path}: {name} has values that are not finite as {str(tensor.dtype).removeprefix('torch.')}",
            "the file is damaged, or the type's range is too small",
            "Try --dtype float32; if that fails too, download the file again.",
        )
    return name, tensor


def _wrong_shape(plan: _Plan, name: str, why: str) -> BadInput:
    return BadInput(f"{plan.header.path}: {name} has a wrong shape", why, "Download the file again.")


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


def _check_complete(header: GGUFHeader, model: nn.Module, written: set[str]) -> None:
    """Each tensor of the model must have come, itself or as the tensor that it is tied to."""
    wanted = model.state_dict(keep_vars=True)
    there = {id(tensor) for name, tensor in wanted.items() if name in written}
    missing = sorted(name for name, tensor in wanted.items() if id(tensor) not in there)
    if missing:
        raise Unsupported(
            f"{header.path} does not give the whole model",
            f"{len(missing)} tensors are missing, the first is {missing[0]}",
            "Use the original Hugging Face model.",
        )
