"""A GGUF file as a model of transformers: its config, and its tensors under their names there, one in memory at a time.

GGUF has names, a row order for rotary embeddings and a `1 + w` for some norms of its own. transformers carries
the tables that undo all this (`modeling_gguf_pytorch_utils`), and the `gguf` package dequantizes every block type.
This file joins the two as a stream, so that a 40 GB file needs the memory of its largest tensor, and the result is bit
for bit what `AutoModelForCausalLM.from_pretrained(..., gguf_file=...)` gives, dequantized and cast (a test compares).

The header is checked first (gguf_header.py); the tables come into play only for a file whose sizes are consistent.
Stacked experts keep the stacked names that transformers 5 has in memory, which its loader takes as they are.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf import dequantize
from torch import nn

from infopt.errors import BadInput, Unsupported
from infopt.exporters.gguf_codes import Codes
from infopt.exporters.gguf_header import GGUFHeader, GGUFTensorInfo, read_gguf_header, read_raw

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
class GGUFModel:
    """The file, the model on the meta device, and where each tensor of the file goes. `names` is transformers' table; `targets`
    what of it this file has; `codes` what is not to be dequantized."""

    header: GGUFHeader
    model: Any
    processor: Any
    names: dict[str, str]
    targets: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    codes: Codes | None = None

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Under their Hugging Face names; BadInput for values that are not finite in `dtype`."""
        return (pair for infos in portions(self) for pair in stream(self, infos, dtype))


def open_gguf(path: Path) -> GGUFModel:
    """Raises BadInput for a damaged file, Unsupported for an architecture that transformers cannot map."""
    header = read_gguf_header(path)
    _check_counts(header)
    model = _skeleton(header)
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
    return GGUFModel(header, model, processor, names, targets, shapes)


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


def portions(plan: GGUFModel) -> Iterator[list[GGUFTensorInfo]]:
    """The file's tensors in the order in which `infopt quantize` writes them, so that its folders can come back byte for
    byte: what is outside the blocks, then block after block, by name."""
    blocks: dict[int, list[GGUFTensorInfo]] = {}
    for name, info in plan.header.tensors.items():
        number = re.match(r"blk\.(\d+)\.", name)
        blocks.setdefault(int(number[1]) if number else -1, []).append(info)
    for _, infos in sorted(blocks.items()):
        yield sorted(infos, key=lambda info: plan.targets.get(info.name, ""))


def stream(plan: GGUFModel, infos: list[GGUFTensorInfo], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors that these of the file become, under their Hugging Face names.

    A processor may return a tensor under a GGUF name, or put it into the dict that it is handed: several GGUF tensors
    can feed one (gate and up of stacked experts), which leaves when its last source has been read.
    """
    sources = Counter(plan.targets.values())
    held: dict[str, torch.Tensor] = {}
    with plan.header.path.open("rb") as file:
        for info in infos:
            if plan.codes and info.name in plan.codes.layers:
                yield from plan.codes.tensors(file, info)
                continue
            result = _one(file, info, plan, held, dtype)
            if result is not None:
                yield _checked(plan, *result)
            if info.name in plan.targets:
                sources[plan.targets[info.name]] -= 1
            for name in [name for name in held if sources[name] <= 0]:
                yield _checked(plan, name, held.pop(name).to(dtype))


def _one(
    file: BinaryIO, info: GGUFTensorInfo, plan: GGUFModel, held: dict[str, torch.Tensor], dtype: torch.dtype
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
    shape = info.shape if len(info.shape) == 1 else (stop - start, *info.shape[1:])
    try:
        values = dequantize(read_raw(file, info, start, stop), info.kind)
    except NotImplementedError as error:
        raise Unsupported(
            f"the tensor {info.name} has the type {info.kind.name}", str(error), "pip install --upgrade gguf"
        ) from error
    return values.astype(np.float32, copy=False).reshape(shape)


def _checked(plan: GGUFModel, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    if name in plan.shapes and tuple(tensor.shape) != plan.shapes[name]:
        raise _wrong_shape(plan, name, f"{list(tensor.shape)}, and its configuration says {list(plan.shapes[name])}")
    if not bool(torch.isfinite(tensor).all()):
        raise BadInput(
            f"{plan.header.path}: {name} has values that are not finite as {str(tensor.dtype).removeprefix('torch.')}",
            "the file is damaged, or the type's range is too small",
            "Try --dtype float32; if that fails too, download the file again.",
        )
    return name, tensor


def _wrong_shape(plan: GGUFModel, name: str, why: str) -> BadInput:
    return BadInput(f"{plan.header.path}: {name} has a wrong shape", why, "Download the file again.")


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


def _tables() -> Any:
    """transformers' GGUF tables. Imported late: they and this module's readers need torch and a second to load."""
    from transformers import modeling_gguf_pytorch_utils

    return modeling_gguf_pytorch_utils


def _config(model: nn.Module) -> dict[str, Any]:
    config: Any = model.config
    return dict(config.to_dict())
