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
from typing import Any

import torch

from infopt.errors import Unsupported
from infopt.exporters.packing import pack_bits, unpack_bits
from infopt.exporters.quantized import SCALES, TRANSPOSED, Format, Layout, Shape, check_scale, damaged, require
from infopt.grid import BITS, Grid
from infopt.header import TensorInfo, read_tensor
from infopt.qtensor import QTensor

_VERSION = "0.20.0"


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
        settings[TRANSPOSED] = names
    return settings


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
    objection=_objection,
    encode=encode,
    decode=decode,
    config=config,
    layouts=layouts,
)


def _layout(name: str, scheme: dict[str, Any], stored: Mapping[str, TensorInfo]) -> Layout:
    scale = stored[f"{name}.weight_scale"]
    check_scale(scale)
    group = None if scheme["strategy"] == "channel" else scheme["group_size"]
    grid = Grid(scheme["num_bits"], group, scheme.get("symmetric", True), scale.dtype)
    rows, columns = _shape(name, grid, stored)
    if rows < 1 or columns < 1 or not grid.fits(columns):
        raise damaged(f"{scale.file.name}: {name} claims to be [{rows}, {columns}]", f"{grid} cannot hold that")
    groups = columns // grid.width(columns)
    want: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"weight_scale": (grid.scale_dtype, (rows, groups))}
    if grid.bits == 8:
        want["weight"] = (torch.int8, (rows, columns))
        zeros = (torch.int8, (rows, groups))
    else:
        want["weight_packed"] = (torch.int32, (rows, -(-columns * grid.bits // 32)))
        want["weight_shape"] = (torch.int64, (2,))
        zeros = (torch.int32, (-(-rows * grid.bits // 32), groups))
    if not grid.symmetric:
        want["weight_zero_point"] = zeros
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


def _schemes(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The config groups, checked for what infopt reads: weight-only integers."""
    groups = config.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise damaged("config.json: quantization_config.config_groups", "it must be a table of groups")
    for name, group in groups.items():
        weights, targets = group.get("weights"), group.get("targets")
        if not (isinstance(weights, dict) and isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
            raise damaged(f"config.json: config_groups.{name}", "it must have `weights` and a list of `targets`")
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
            raise damaged(
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
    raise damaged(f"config.json: no config group covers {name}", "its tensors are quantized, but nothing says how")


def _signed(codes: torch.Tensor) -> torch.Tensor:
    return (codes.to(torch.int16) - 128).to(torch.int8)


def _unsigned(codes: torch.Tensor) -> torch.Tensor:
    return (codes.to(torch.int16) + 128).to(torch.uint8)
