"""Hugging Face's `fp8` format: E4M3 weights with a scale for each block of 128 x 128, as DeepSeek and Qwen publish them.

    weight            float8_e4m3fn [O, I]
    weight_scale_inv  float32 [ceil(O / 128), ceil(I / 128)]; W = weight * weight_scale_inv, whatever its name says

The inputs of a layer are rounded while it runs, 128 columns of a token at a time (`activation_scheme: dynamic`), so only grids
that say so are held: others would be served with another arithmetic. One scale for a whole tensor is read and written by
nobody else in one way (transformers wants `weight_scale_inv`, vLLM `weight_scale`): compressed-tensors holds that.

vLLM skips the modules that `modules_to_not_convert` names exactly, transformers those whose path contains a name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from infopt.exporters.quantized import SCALES, TRANSPOSED, Format, Layout, Shape, damaged, require, unreadable
from infopt.grid import FP8, Grid, Inputs
from infopt.header import TensorInfo
from infopt.qtensor import QTensor

BLOCK = 128


def encode(name: str, q: QTensor) -> dict[str, torch.Tensor]:
    """The file's tensors for the op `name`."""
    return {f"{name}.weight": q.codes.view(FP8), f"{name}.weight_scale_inv": q.scale}


def decode(get: Mapping[str, torch.Tensor], grid: Grid) -> QTensor:
    """The QTensor of an op from its tensors by their last name."""
    scale = get["weight_scale_inv"]
    return QTensor(get["weight"].view(torch.uint8), scale, torch.zeros(scale.shape, dtype=torch.uint8), grid)


def config(grids: Mapping[str, Grid], ignore: Iterable[str], transposed: Iterable[str] = ()) -> dict[str, Any]:
    """`quantization_config`; all grids are equal here (`Format.mixed`)."""
    settings: dict[str, Any] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": sorted(ignore),
    }
    if names := sorted(transposed):
        settings[TRANSPOSED] = names
    return settings


def layouts(settings: dict[str, Any], stored: Mapping[str, TensorInfo]) -> dict[str, Layout]:
    """The quantized ops of a folder, every type and shape checked. Raises BadInput, Unsupported."""
    size = settings.get("weight_block_size")
    scheme = settings.get("activation_scheme", "dynamic")
    if size is None or scheme != "dynamic" or settings.get("scale_fmt"):
        what = (
            f"config.json: an fp8 folder with weight_block_size {str(size)[:40]}, activation_scheme {str(scheme)[:40]}"
        )
        raise unreadable(what, "infopt reads blocks with floating scales, and inputs that are rounded dynamically")
    if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and 0 < n < 2**31 for n in size)):
        raise damaged("config.json: weight_block_size of the fp8 folder", "it must be two positive whole numbers")
    grid = Grid(8, size[1], True, torch.float32, kind="float", rows=size[0], inputs=Inputs("float", True, size[1]))
    names = {key.removesuffix(".weight_scale_inv") for key in stored if key.endswith(".weight_scale_inv")}
    bare = [key for key, info in stored.items() if info.dtype == FP8 and key.removesuffix(".weight") not in names]
    if bare:
        raise damaged(f"{stored[bare[0]].file.name}: {bare[0]} has no weight_scale_inv", "it means nothing without one")
    return {name: _layout(name, grid, stored) for name in sorted(names)}


def _layout(name: str, grid: Grid, stored: Mapping[str, TensorInfo]) -> Layout:
    scale, weight = stored[f"{name}.weight_scale_inv"], stored.get(f"{name}.weight")
    if scale.dtype not in SCALES or weight is None or len(weight.shape) != 2 or not all(weight.shape):
        raise damaged(
            f"{scale.file.name}: {name} is no matrix of 8-bit floats with floating scales", "config.json says so"
        )
    grid, shape = replace(grid, scale_dtype=scale.dtype), (weight.shape[0], weight.shape[1])
    require(name, stored, {"weight": (FP8, shape), "weight_scale_inv": (scale.dtype, grid.scales(*shape))})
    return Layout(grid, shape, ("weight_scale_inv", "weight"))


def _objection(grid: Grid, shape: Shape) -> str | None:
    if grid.kind != "float":
        return "its weights are whole numbers, and this format holds 8-bit floats"
    if (grid.rows, grid.group) != (BLOCK, BLOCK):
        return f"its scales are per {grid.strategy}, and this format has blocks of {BLOCK} x {BLOCK}"
    if grid.inputs != Inputs("float", True, BLOCK):
        return f"engines would round its inputs to 8-bit floats, {BLOCK} columns at a time"
    return f"engines round inputs {BLOCK} columns at a time, and it has {shape[1]}" if shape[1] % BLOCK else None


FORMAT = Format(
    name="fp8",
    scales=(torch.float32,),
    mixed=False,
    weight_only=False,
    objection=_objection,
    encode=encode,
    decode=decode,
    config=config,
    layouts=layouts,
)
