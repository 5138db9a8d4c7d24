"""The compressed-tensors format: `pack-quantized` for 2, 3 and 4 bits, `int-quantized` for 8.

Layout as the library compressed-tensors 0.19 and newer writes and reads it (checked against it in the tests):

    pack-quantized   weight_packed int32 [O, ceil(I b / 32)]   codes, offset by 2^(b-1), as a dense bit stream along I
                     weight_scale [O, G]   weight_shape int64 [2] = [O, I]
                     weight_zero_point int32 [ceil(O b / 32), G]   asymmetric only, packed along O
    int-quantized    weight int8 [O, I] = codes - 128, weight_scale [O, G], weight_zero_point int8 [O, G] if asymmetric

Three traps: without `quantization_status` transformers loads garbage, an unquantized Linear that `ignore` does not list
becomes NaN, and 3-bit codes were padded to whole codes per word before 0.19.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from infopt.checkpoint import CheckpointReader
from infopt.errors import BadInput, Unsupported
from infopt.exporters.packing import pack_bits, unpack_bits
from infopt.grid import BITS, Grid
from infopt.header import TensorInfo, read_tensor
from infopt.qtensor import QTensor

_VERSION = "0.20.0"
_TRANSPOSED = "infopt_transposed"  # a key of ours, which engines ignore
_SUFFIXES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


def encode(name: str, q: QTensor) -> dict[str, torch.Tensor]:
    """The file's tensors for the op `name` ("model.layers.0.self_attn.q_proj")."""
    grid = q.grid
    tensors = {f"{name}.weight_scale": q.scale}
    if grid.bits == 8:
        tensors[f"{name}.weight"] = _signed(q.codes)
        if not grid.symmetric:
            tensors[f"{name}.weight_zero_point"] = _signed(q.zero)
        return tensors
    tensors[f"{name}.weight_packed"] = pack_bits(q.codes, grid.bits, 1)
    tensors[f"{name}.weight_shape"] = torch.tensor(q.shape, dtype=torch.int64)
    if not grid.symmetric:
        tensors[f"{name}.weight_zero_point"] = pack_bits(q.zero, grid.bits, 0)
    return tensors


def decode(get: Mapping[str, torch.Tensor], grid: Grid) -> QTensor:
    """The QTensor of an op from its tensors by their last name ("weight_packed", "weight_scale", ...)."""
    scale = get["weight_scale"]
    if grid.bits == 8:
        codes = _unsigned(get["weight"])
        zero = (
            torch.full(scale.shape, 128, dtype=torch.uint8) if grid.symmetric else _unsigned(get["weight_zero_point"])
        )
        return QTensor(codes, scale, zero, grid)
    rows, columns = (int(n) for n in get["weight_shape"])
    codes = unpack_bits(get["weight_packed"], grid.bits, columns, 1)
    if grid.symmetric:
        zero = torch.full(scale.shape, grid.middle, dtype=torch.uint8)
    else:
        zero = unpack_bits(get["weight_zero_point"], grid.bits, rows, 0)
    return QTensor(codes, scale, zero, grid)


def config(grids: Mapping[str, Grid], ignore: Iterable[str], transposed: Iterable[str] = ()) -> dict[str, Any]:
    """`quantization_config` for ops by their module path, and the paths of the linear modules that stay as they are.

    transposed: ops whose module keeps its weight as [I, O] (GPT-2's Conv1D); the packed weight is [O, I] all the same.
    """
    kinds: dict[Grid, list[str]] = {}
    for name, grid in grids.items():
        kinds.setdefault(grid, []).append(name)
    groups, formats = {}, set()
    for number, (grid, names) in enumerate(kinds.items()):
        form = "int-quantized" if grid.bits == 8 else "pack-quantized"
        formats.add(form)
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(kinds) == 1 else names,
            "weights": {
                "num_bits": grid.bits,
                "type": "int",
                "symmetric": grid.symmetric,
                "strategy": "channel" if grid.group is None else "group",
                "group_size": grid.group,
                "dynamic": False,
                "actorder": None,
            },
            "input_activations": None,
            "output_activations": None,
            "format": form,
        }
    settings: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": _VERSION,
    }
    if names := sorted(transposed):
        settings[_TRANSPOSED] = names
    return settings


class QuantizedReader(CheckpointReader):
    """A compressed-tensors folder seen as the dense checkpoint that it stands for.

    `tensors` lists the logical tensors ("X.weight", in the scales' dtype); `get` dequantizes; `qtensor` gives the codes.
    `quantized` maps each quantized op's path to its grid. Raises BadInput for tensors that are missing or of a wrong
    shape, Unsupported for schemes that infopt does not read.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.stored = self.tensors
        self._schemes = _schemes(self.config.get("quantization_config", {}))
        self.quantized = {name: self._grid(name) for name in self._names()}
        hidden = {f"{name}.{suffix}" for name in self.quantized for suffix in (*_SUFFIXES, "weight")}
        logical = {key: info for key, info in self.stored.items() if key not in hidden}
        self._transposed = _conv1d_names(self.config, self.quantized)
        for name in self.quantized:
            logical[f"{name}.weight"] = self._logical(name)
        self.tensors = dict(sorted(logical.items()))

    def qtensor(self, name: str) -> QTensor:
        """The op's codes as they are in the file."""
        parts = {part: read_tensor(self.stored[f"{name}.{part}"]) for part in self._parts(name)}
        return decode(parts, self.quantized[name])

    def get(self, name: str) -> torch.Tensor:
        op = name.removesuffix(".weight")
        if op == name or op not in self.quantized:
            return super().get(name)
        w_OI = self.qtensor(op).dequantize()
        return w_OI.T.contiguous() if op in self._transposed else w_OI

    def _names(self) -> list[str]:
        names = [key.removesuffix(".weight_scale") for key in self.stored if key.endswith(".weight_scale")]
        packed = {key.removesuffix(".weight_packed") for key in self.stored if key.endswith(".weight_packed")}
        for name in sorted(packed.difference(names)):
            file = self.stored[f"{name}.weight_packed"].file
            raise _damaged(f"{file.name}: {name}.weight_scale is missing", "the packed weight means nothing without it")
        return names

    def _parts(self, name: str) -> list[str]:
        grid = self.quantized[name]
        parts = ["weight", "weight_scale"] if grid.bits == 8 else ["weight_packed", "weight_scale", "weight_shape"]
        return parts if grid.symmetric else [*parts, "weight_zero_point"]

    def _grid(self, name: str) -> Grid:
        scheme = _scheme_of(name, self._schemes)
        group = None if scheme["strategy"] == "channel" else scheme["group_size"]
        return Grid(scheme["num_bits"], group, scheme.get("symmetric", True), self.stored[f"{name}.weight_scale"].dtype)

    def _logical(self, name: str) -> TensorInfo:
        """The dense weight that the op's tensors stand for, after checking every one of their types and shapes."""
        grid = self.quantized[name]
        infos = {part: self.stored.get(f"{name}.{part}") for part in self._parts(name)}
        file = self.stored[f"{name}.weight_scale"].file
        if missing := [part for part, info in infos.items() if info is None]:
            raise _damaged(f"{file.name}: {name}.{missing[0]} is missing", "the scheme in config.json needs it")
        have = {part: (info.dtype, info.shape) for part, info in infos.items() if info is not None}
        if grid.bits == 8:
            rows, columns = have["weight"][1] if len(have["weight"][1]) == 2 else (0, 0)
        elif have["weight_shape"] != (torch.int64, (2,)):
            raise _damaged(
                f"{file.name}: {name}.weight_shape is {have['weight_shape']}", "it must be two int64 numbers"
            )
        else:
            rows, columns = (int(n) for n in read_tensor(self.stored[f"{name}.weight_shape"]))
        if rows < 1 or columns < 1 or not grid.fits(columns):
            raise _damaged(f"{file.name}: {name} claims to be [{rows}, {columns}]", f"{grid} cannot hold that")
        groups, word = columns // grid.width(columns), lambda count: -(-count * grid.bits // 32)
        want = {"weight_scale": (grid.scale_dtype, (rows, groups))}
        if grid.bits == 8:
            want |= {"weight": (torch.int8, (rows, columns)), "weight_zero_point": (torch.int8, (rows, groups))}
        else:
            want |= {
                "weight_packed": (torch.int32, (rows, word(columns))),
                "weight_zero_point": (torch.int32, (word(rows), groups)),
            }
        for part, expected in want.items():
            if part in have and have[part] != expected:
                raise _damaged(f"{file.name}: {name}.{part} is {have[part]}", f"config.json makes it {expected}")
        if grid.scale_dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise _damaged(f"{file.name}: {name}.weight_scale is {grid.scale_dtype}", "scales are floating numbers")
        shape = (columns, rows) if name in self._transposed else (rows, columns)
        return replace(self.stored[f"{name}.weight_scale"], name=f"{name}.weight", shape=shape)


def _damaged(what: str, why: str) -> BadInput:
    return BadInput(what, why, "download or quantize the model again")


def _schemes(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The config groups, checked for what infopt reads: weight-only integers."""
    groups = config.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise _damaged("config.json: quantization_config.config_groups", "it must be a table of groups")
    for name, group in groups.items():
        weights, targets = group.get("weights"), group.get("targets")
        if not (isinstance(weights, dict) and isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
            raise _damaged(f"config.json: config_groups.{name}", "it must have `weights` and a list of `targets`")
        bits, size, strategy = weights.get("num_bits"), weights.get("group_size"), weights.get("strategy")
        integer = weights.get("type", "int") == "int" and strategy in ("group", "channel") and bits in BITS
        if not integer or group.get("input_activations"):
            raise Unsupported(
                f"config.json: quantization_config.config_groups.{name}",
                "infopt reads weight-only integers of 2, 3, 4 or 8 bits in groups or channels",
                "use a checkpoint made by `infopt quantize`",
            )
        sized = strategy == "channel" or (type(size) is int and size > 0)
        if type(bits) is not int or not sized or type(weights.get("symmetric", True)) is not bool:
            raise _damaged(
                f"config.json: config_groups.{name}.weights", "num_bits, group_size or symmetric is no such thing"
            )
    return list(groups.values())


def _scheme_of(name: str, schemes: list[dict[str, Any]]) -> dict[str, Any]:
    for scheme in schemes:
        if name in scheme.get("targets", ()):
            return scheme["weights"]
    for scheme in schemes:
        if "Linear" in scheme.get("targets", ()):
            return scheme["weights"]
    raise _damaged(f"config.json: no config group covers {name}", "its tensors are quantized, but nothing says how")


def _conv1d_names(config: dict[str, Any], names: Iterable[str]) -> set[str]:
    listed = (config.get("quantization_config") or {}).get(_TRANSPOSED)
    return {name for name in names if isinstance(listed, list) and name in listed}


def _signed(codes: torch.Tensor) -> torch.Tensor:
    return (codes.to(torch.int16) - 128).to(torch.int8)


def _unsigned(codes: torch.Tensor) -> torch.Tensor:
    return (codes.to(torch.int16) + 128).to(torch.uint8)
