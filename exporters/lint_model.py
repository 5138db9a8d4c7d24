"""A checkpoint of any tool as `infopt lint` sees it: what can be read, and a finding for everything that cannot.

The readers of infopt refuse a folder at its first fault, which is right for work and wrong for a list of faults. Here each
file is read by the same careful functions (`infopt.header`), but a refusal becomes a finding and the rest is looked at.
No weight is read before a rule asks for it, and then one tensor at a time, in pieces.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from infopt.checkpoint import CONFIG, INDEX, SINGLE, contained
from infopt.errors import BadInput, InfoptError
from infopt.exporters.mlx import is_section
from infopt.header import TensorInfo, look, read_header, read_json, read_tensor, show

Level = Literal["error", "warning", "info"]
LEVELS: tuple[Level, ...] = ("error", "warning", "info")
MAX_FILES = 100_000
_PIECE = 16 * 2**20  # bytes of a tensor that are looked at together
_PACKED = ("weight_packed", "qweight", "_weight_qdata", "weight_global_scale")
_SMALL = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint32)
SCALES = ("weight_scale", "weight_scale_inv", "scales", "weight_scale_2", "weight_global_scale")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or odd. `fix` is what to do about it; `tensor` is "" where it is about a whole file."""

    level: Level
    rule: str
    file: str
    tensor: str
    message: str
    fix: str


@dataclass(frozen=True)
class Layer:
    """One module with weights: its stored tensors by the last part of their names."""

    name: str
    parts: Mapping[str, TensorInfo]

    @property
    def quantized(self) -> bool:
        if any(part in self.parts for part in _PACKED):
            return True
        weight = self.parts.get("weight")
        return weight is not None and weight.dtype in _SMALL and len(weight.shape) > 1

    @property
    def matrix(self) -> bool:
        """Whether its weight is a matrix that is stored as it is."""
        weight = self.parts.get("weight")
        return not self.quantized and weight is not None and len(weight.shape) == 2

    @property
    def last(self) -> str:
        return self.name.rpartition(".")[2]

    def info(self) -> TensorInfo:
        """Some tensor of the layer, for its file and name."""
        for part in (*_PACKED, "weight"):
            if part in self.parts:
                return self.parts[part]
        return next(iter(self.parts.values()))


@dataclass
class Model:
    """A folder, read as far as possible. quantization: config.json's section, {} where there is none or it is no table."""

    folder: Path
    files: list[str]
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    faults: list[Finding] = field(default_factory=list)
    deep: bool = False
    tp: int | None = None

    @property
    def method(self) -> str:
        """How the model says that it is quantized, "" where it does not."""
        return str(self.quantization.get("quant_method", "mlx" if is_section(self.quantization) else ""))

    @property
    def text_config(self) -> dict[str, Any]:
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @property
    def layers(self) -> dict[str, Layer]:
        """Every module that has tensors, by its path."""
        parts: dict[str, dict[str, TensorInfo]] = {}
        for name, info in self.tensors.items():
            module, _, last = name.rpartition(".")
            parts.setdefault(module, {})[last] = info
        return {name: Layer(name, found) for name, found in parts.items()}

    def json(self, name: str) -> Any:
        """A side file's content; None where it is absent or cannot be read (`faults` tells why, once)."""
        if name not in self.files:
            return None
        try:
            return read_json(contained(self.folder, name), max_values=20_000_000)
        except InfoptError as error:
            found = fault(name, error)
            if found not in self.faults:
                self.faults.append(found)
            return None


def fault(file: str, error: InfoptError, tensor: str = "") -> Finding:
    return Finding("error", "unreadable", file, tensor, f"{error.what}: {error.why}", error.fix)


def load(folder: Path, deep: bool = False, tp: int | None = None) -> Model:
    """Read configs, index and headers. BadInput for what is no model folder at all; other faults become findings."""
    if not os.path.isdir(folder):
        raise BadInput(f"{folder} is not a folder", "A model is a folder with config.json and weights.", look(folder))
    files = _files(folder)
    if CONFIG not in files and not any(name.endswith(".safetensors") for name in files):
        raise BadInput(f"{folder} is no model folder", "It has neither config.json nor safetensors.", look(folder))
    model = Model(Path(folder), files, deep=deep, tp=tp)
    config = model.json(CONFIG)
    if isinstance(config, dict):
        model.config = config
    else:
        model.faults.append(_wrong(CONFIG, "it is missing, damaged or no JSON object", "download the model again"))
    section = model.config.get("quantization_config") or model.config.get("quantization") or {}
    if isinstance(section, dict):
        model.quantization = section
    else:
        model.faults.append(_wrong(CONFIG, "quantization_config is no table", "quantize the model again"))
    _read_tensors(model)
    return model


def _files(folder: Path) -> list[str]:
    found: list[str] = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [str((Path(root) / name).relative_to(folder)) for name in sorted(files)]
        if len(found) > MAX_FILES:
            raise BadInput(f"{folder} has too many files", f"At most {MAX_FILES:,} are looked at.", look(folder))
    return found


def _read_tensors(model: Model) -> None:
    weight_map = _weight_map(model)
    present = [name for name in model.files if name.endswith(".safetensors") and "/" not in name]
    named = sorted(set(weight_map.values())) if weight_map else [SINGLE] if SINGLE in present else present
    for name in named:
        try:
            tensors = read_header(contained(model.folder, name))[0]
        except InfoptError as error:
            model.faults.append(fault(name, error))
            continue
        for key, info in tensors.items():
            if key in model.tensors:
                model.faults.append(_wrong(name, f"it is also in {model.tensors[key].file.name}", "keep one", key))
            model.tensors[key] = info
            if weight_map and weight_map.get(key) != name:
                model.faults.append(_wrong(name, f"{INDEX} does not say that it is here", "make the index anew", key))
    for key, name in weight_map.items():
        if key not in model.tensors and name in present:
            model.faults.append(_wrong(name, f"{INDEX} says that it is here, and it is not", "fetch it again", key))
    for name in sorted(set(present) - set(named)):
        fix = f"rm {name}, or name it in the index"
        model.faults.append(Finding("warning", "stray-weights", name, "", "no index names it: loaders disagree", fix))
    model.tensors = dict(sorted(model.tensors.items()))


def _weight_map(model: Model) -> dict[str, str]:
    index = model.json(INDEX)
    if index is None:
        return {}
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        model.faults.append(_wrong(INDEX, "its weight_map is no table of file names", "make the index anew"))
        return {}
    return found


def _wrong(file: str, message: str, fix: str, tensor: str = "") -> Finding:
    return Finding("error", "unreadable", file, tensor, message, fix)


def values(info: TensorInfo) -> Iterator[torch.Tensor]:
    """A tensor's numbers as fp32, in pieces of whole rows."""
    if not info.shape or not info.nbytes:
        yield read_tensor(info).float().reshape(-1)
        return
    rows = max(1, _PIECE * info.shape[0] // info.nbytes)
    for start in range(0, info.shape[0], rows):
        yield read_tensor(info, start, min(start + rows, info.shape[0])).float()


def found(rule: str, level: Level, where: TensorInfo | str, message: str, fix: str) -> Finding:
    """A finding about a tensor, or about a file by its name."""
    if isinstance(where, str):
        return Finding(level, rule, where, "", message, fix)
    return Finding(level, rule, where.file.name, where.name, message, fix)


def number_of(name: str) -> int | None:
    """The first number in a dotted name: a tensor's layer."""
    match = re.search(r"(?:^|\.)(\d{1,6})\.", name)
    return int(match[1]) if match else None


def quoted(names: list[str], limit: int = 3) -> str:
    """Some names for a message, and how many more there are."""
    rest = len(names) - limit
    return ", ".join(show(name) for name in names[:limit]) + (f" and {rest} more" if rest > 0 else "")
