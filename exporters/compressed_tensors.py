"""The compressed-tensors format: `pack-quantized` for 2, 3 and 4 bits, `int-quantized` for 8, `float-quantized` for FP8.

Layout as the library compressed-tensors 0.19 and newer writes and reads it (checked against it in the tests):

    pack-quantized   weight_packed int32 [O, ceil(I b / 32)]   codes, offset by 2^(b-1), as a dense bit stream along I
                     weight_scale [O, G]   weight_shape int64 [2] = [O, I]
                     weight_zero_point int32 [ceil(O b / 32), G]   asymmetric only, packed along O
    int-quantized    weight int8 [O, I] = codes - 128, weight_scale [O, G], weight_zero_point int8 [O, G] if asymmetric
    float-quantized  weight float8_e4m3fn [O, I], weight_scale [O, 1] per channel, [R, G] per block
    all of them      weight_scale [1] where a whole tensor has one scale; input_scale [1] where inputs have a static one

Three traps: without `quantization_status` transformers loads garbage, an unquantized Linear that `ignore` does not list
becomes NaN, and 3-bit codes were padded to whole codes per word before 0.19.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from infopt.exporters.packing import pack_bits, unpack_bits
from infopt.exporters.quantized import SCALES, TRANSPOSED, Format, Layout, Shape, damaged, require, unreadable
from infopt.grid import FP8, Grid, Inputs
from infopt.header import TensorInfo, read_tensor
from infopt.qtensor import QTensor

_VERSION = "0.20.0"


def encode(name: str, q: QTensor) -> dict[str, torch.Tensor]:
    """The file's tensors for the op `name` ("model.layers.0.self_attn.q_proj")."""
    grid = q.grid
    tensors = {f"{name}.weight_scale": q.scale.view(1) if grid.strategy == "tensor" else q.scale}
    if q.input_scale is not None:
        tensors[f"{name}.input_scale"] = q.input_scale
    if grid.kind == "float":
        tensors[f"{name}.weight"] = q.codes.view(FP8)
        return tensors
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
    scale = scale.view(1, 1) if grid.strategy == "tensor" else scale
    middle = torch.full(scale.shape, grid.middle, dtype=torch.uint8)
    inputs = get.get("input_scale")
    if grid.kind == "float":
        return QTensor(get["weight"].view(torch.uint8), scale, middle, grid, inputs)
    if grid.bits == 8:
        zero = middle if grid.symmetric else _unsigned(get["weight_zero_point"])
        return QTensor(_unsigned(get["weight"]), scale, zero, grid, inputs)
    rows, columns = (int(n) for n in get["weight_shape"])
    codes = unpack_bits(get["weight_packed"], grid.bits, columns, 1)
    zero = middle if grid.symmetric else unpack_bits(get["weight_zero_point"], grid.bits, rows, 0)
    return QTensor(codes, scale, zero, grid, inputs)


def config(grids: Mapping[str, Grid], ignore: Iterable[str], transposed: Iterable[str] = ()) -> dict[str, Any]:
    """`quantization_config` for ops by their module path, and the paths of the linear modules that stay as they are.

    transposed: ops whose module keeps its weight as [I, O] (GPT-2's Conv1D); the packed weight is [O, I] all the same.
    """
    kinds: dict[Grid, list[str]] = {}
    for name, grid in grids.items():
        kinds.setdefault(grid, []).append(name)
    groups = {
        f"group_{number}": {
            "targets": ["Linear"] if len(kinds) == 1 else names,
            "weights": _weight_arguments(grid),
            "input_activations": _input_arguments(grid.inputs) if grid.inputs else None,
            "output_activations": None,
            "format": _form(grid),
        }
        for number, (grid, names) in enumerate(kinds.items())
    }
    formats = {_form(grid) for grid in kinds}
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
        settings[TRANSPOSED] = names
    return settings


def _form(grid: Grid) -> str:
    if grid.kind == "float":
        return "float-quantized"
    return "int-quantized" if grid.bits == 8 else "pack-quantized"


def _weight_arguments(grid: Grid) -> dict[str, Any]:
    arguments = {
        "num_bits": grid.bits,
        "type": grid.kind,
        "symmetric": grid.symmetric,
        "strategy": grid.strategy,
        "group_size": grid.group if grid.strategy == "group" else None,
        "dynamic": False,
        "actorder": None,
    }
    return arguments | ({"block_structure": [grid.rows, grid.group]} if grid.strategy == "block" else {})


def _input_arguments(inputs: Inputs) -> dict[str, Any]:
    dynamic = "token" if inputs.group is None else "group"
    return {
        "num_bits": 8,
        "type": inputs.kind,
        "symmetric": True,
        "strategy": dynamic if inputs.dynamic else "tensor",
        "group_size": inputs.group,
        "dynamic": inputs.dynamic,
    }


def layouts(settings: dict[str, Any], stored: Mapping[str, TensorInfo]) -> dict[str, Layout]:
    """The quantized ops of a folder, every type and shape checked. Raises BadInput, Unsupported."""
    schemes = _schemes(settings)
    names = [key.removesuffix(".weight_scale") for key in stored if key.endswith(".weight_scale")]
    packed = {key.removesuffix(".weight_packed") for key in stored if key.endswith(".weight_packed")}
    for name in sorted(packed.difference(names)):
        file = stored[f"{name}.weight_packed"].file
        raise damaged(f"{file.name}: {name}.weight_scale is missing", "the packed weight means nothing without it")
    return {name: _layout(name, _scheme_of(name, schemes), stored) for name in names}


def _objection(grid: Grid, shape: Shape) -> str | None:
    return None if grid.fits(shape[1]) else f"{shape[1]} columns are no whole number of groups of {grid.group}"


FORMAT = Format(
    name="compressed-tensors",
    scales=SCALES,
    mixed=True,
    weight_only=False,
    objection=_objection,
    encode=encode,
    decode=decode,
    config=config,
    layouts=layouts,
)


def _layout(name: str, scheme: _Scheme, stored: Mapping[str, TensorInfo]) -> Layout:
    scale = stored[f"{name}.weight_scale"]
    if scale.dtype not in SCALES:
        raise damaged(f"{scale.file.name}: {scale.name} is {scale.dtype}", "scales are floating numbers")
    grid = replace(scheme.grid, scale_dtype=scale.dtype)
    rows, columns = _shape(name, grid, stored)
    if rows < 1 or columns < 1 or not grid.fits(columns):
        raise damaged(f"{scale.file.name}: {name} claims to be [{rows}, {columns}]", f"{grid} cannot hold that")
    scales = grid.scales(rows, columns)
    shape = (1,) if grid.strategy == "tensor" and len(scale.shape) < 2 else scales
    want: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"weight_scale": (grid.scale_dtype, shape)}
    if grid.bits == 8:
        want["weight"] = (FP8 if grid.kind == "float" else torch.int8, (rows, columns))
        zeros = (torch.int8, scales)
    else:
        want["weight_packed"] = (torch.int32, (rows, -(-columns * grid.bits // 32)))
        want["weight_shape"] = (torch.int64, (2,))
        zeros = (torch.int32, (-(-rows * grid.bits // 32), scales[1]))
    if not grid.symmetric:
        want["weight_zero_point"] = zeros
    if grid.inputs and not grid.inputs.dynamic:
        found = stored.get(f"{name}.input_scale")
        want["input_scale"] = (found.dtype if found and found.dtype in SCALES else torch.float32, (1,))
    require(name, stored, want)
    return Layout(grid, (rows, columns), tuple(want))


def _shape(name: str, grid: Grid, stored: Mapping[str, TensorInfo]) -> Shape:
    """[O, I] as the folder claims it; (0, 0) where the weight is no matrix."""
    if grid.bits == 8:
        info = stored.get(f"{name}.weight")
        if info is None:
            raise damaged(f"{name}.weight is missing", "the scheme in config.json needs it")
        return (info.shape[0], info.shape[1]) if len(info.shape) == 2 else (0, 0)
    require(name, stored, {"weight_shape": (torch.int64, (2,))})
    rows, columns = (int(n) for n in read_tensor(stored[f"{name}.weight_shape"]))
    return rows, columns


@dataclass(frozen=True)
class _Scheme:
    """A config group: which ops, and their grid with a scale type that only the tensors tell."""

    targets: tuple[str, ...]
    grid: Grid


class _Weights(BaseModel):
    """`weights` of a config group, as far as infopt reads it; strict, because "4" is no number of bits."""

    model_config = ConfigDict(strict=True)
    num_bits: Literal[2, 3, 4, 8]
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    strategy: Literal["group", "channel", "tensor", "block"]
    group_size: int | None = Field(default=None, ge=1)
    block_structure: tuple[int, int] | None = Field(default=None, strict=False)
    dynamic: Literal[False] = False


class _Inputs(BaseModel):
    """`input_activations` of a config group, as far as infopt reads it."""

    model_config = ConfigDict(strict=True)
    num_bits: Literal[8]
    type: Literal["int", "float"] = "int"
    symmetric: Literal[True] = True
    strategy: Literal["token", "tensor", "group"]
    group_size: int | None = Field(default=None, ge=1)
    dynamic: bool = False


def _schemes(config: dict[str, Any]) -> list[_Scheme]:
    """The config groups. BadInput for what is no group, Unsupported for what infopt does not read."""
    groups = config.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise damaged("config.json: quantization_config.config_groups", "it must be a table of groups")
    schemes = []
    for name, group in groups.items():
        weights, targets = group.get("weights"), group.get("targets")
        if not (isinstance(weights, dict) and isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
            raise damaged(f"config.json: config_groups.{name}", "it must have `weights` and a list of `targets`")
        schemes.append(_Scheme(tuple(targets), _grid(f"config.json: config_groups.{name}", group)))
    return schemes


def _grid(where: str, group: dict[str, Any]) -> Grid:
    try:
        weights = _Weights.model_validate(group["weights"])
        found = group.get("input_activations")
        inputs = _Inputs.model_validate(found) if found else None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] in ("literal_error", "missing"):
            raise unreadable(f"{where}: {field} is {str(first['input'])[:60]!r}", first["msg"]) from error
        raise damaged(f"{where}: {field}", first["msg"]) from error
    size: tuple[int | None, int | None] = {
        "group": (weights.group_size, 1),
        "channel": (None, 1),
        "tensor": (None, None),
        "block": (weights.block_structure or (None, None))[::-1],
    }[weights.strategy]
    if weights.strategy in ("group", "block") and (size[0] is None or min(n or 1 for n in size) < 1):
        raise damaged(f"{where}: weights", f"strategy {weights.strategy} needs its size")
    if inputs and inputs.dynamic != (inputs.strategy != "tensor"):
        raise unreadable(f"{where}: input_activations", "infopt reads dynamic tokens or groups, and static tensors")
    rounding = Inputs(inputs.type, inputs.dynamic, inputs.group_size) if inputs else None
    if weights.type == "float" and not (weights.num_bits == 8 and weights.symmetric):
        raise unreadable(f"{where}: floats of {weights.num_bits} bits", "infopt reads E4M3 without zero points")
    return Grid(weights.num_bits, size[0], weights.symmetric, kind=weights.type, rows=size[1], inputs=rounding)


def _scheme_of(name: str, schemes: list[_Scheme]) -> _Scheme:
    for target in (name, "Linear"):
        for scheme in schemes:
            if target in scheme.targets:
                return scheme
    raise damaged(f"config.json: no config group covers {name}", "its tensors are quantized, but nothing says how")


def _signed(codes: torch.Tensor) -> torch.Tensor:
    return (codes.to(torch.int16) - 128).to(torch.int8)


def _unsigned(codes: torch.Tensor) -> torch.Tensor:
    return (codes.to(torch.int16) + 128).to(torch.uint8)
