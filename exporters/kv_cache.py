"""The key-value cache's scales in a compressed-tensors folder: `kv_cache_scheme` in the config, tensors beside the weights.

    model.layers.N.self_attn.k_scale, v_scale     [1] per tensor, [H, 1, 1] per head, [H, 1, D] per channel
    ... k_zero_point, v_zero_point                the same shape, uint8, where the grid has zero points
    ... k_frame, v_frame [H, D, D], k_center, v_center [H, D]    fp32, of a balanced cache

vLLM reads FP8 per tensor, and per head; what else stands here only infopt's runtime reads, and says so by its strategy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from infopt.exporters.quantized import SCALES, damaged, unreadable
from infopt.header import TensorInfo, read_tensor
from infopt.kv_cache import CacheGrid, CacheScales, Frame

_STRATEGIES = {"tensor": "tensor", "head": "attn_head", "channel": "channel", "token": "token"}
_WORST = 1e7  # condition number of a frame: beyond it fp32 gives back something else than was kept


def settings(grid: CacheGrid) -> dict[str, Any]:
    """The value of `kv_cache_scheme`."""
    return {
        "num_bits": grid.bits,
        "type": grid.kind,
        "strategy": _STRATEGIES[grid.strategy],
        "symmetric": grid.symmetric,
        "dynamic": not grid.static,
        **({"balanced": True} if grid.balanced else {}),
        **({"sinks": grid.sinks} if grid.sinks else {}),
    }


def encode(path: str, grid: CacheGrid, scales: CacheScales) -> dict[str, torch.Tensor]:
    """The tensors of the attention module `path` ("model.layers.0.self_attn")."""
    tensors = {}
    for which, scale in scales.scale.items():
        shape = (1,) if grid.strategy == "tensor" else scale.shape[1:]
        tensors[f"{path}.{which}_scale"] = scale.reshape(shape).contiguous()
        if not grid.symmetric:
            tensors[f"{path}.{which}_zero_point"] = scales.zero[which].reshape(shape).to(torch.uint8)
    for which, frame in scales.frames.items():
        tensors[f"{path}.{which}_frame"], tensors[f"{path}.{which}_center"] = frame.into_HDD, frame.center_HD
    return tensors


class _Scheme(BaseModel):
    model_config = ConfigDict(strict=True)
    num_bits: Literal[4, 8]
    type: Literal["int", "float"]
    strategy: Literal["tensor", "attn_head", "channel", "token"] = "tensor"
    symmetric: bool = True
    dynamic: bool = False
    balanced: bool = False
    sinks: int = Field(default=0, ge=0, le=16)


def read_grid(config: Mapping[str, Any]) -> CacheGrid | None:
    """The cache's type by a folder's quantization_config, None for a float cache; Unsupported for others."""
    found = config.get("kv_cache_scheme")
    if found is None:
        return None
    where = "config.json: kv_cache_scheme"
    try:
        scheme = _Scheme.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        raise unreadable(f"{where}.{'.'.join(map(str, first['loc']))}", first["msg"]) from error
    if scheme.type == "float" and not (scheme.num_bits == 8 and scheme.symmetric):
        raise unreadable(where, "floats of a cache have 8 bits and no zero point")
    if scheme.dynamic != (scheme.strategy == "token"):
        raise unreadable(where, "infopt reads dynamic scales per token, and static ones per tensor, head or channel")
    strategy = next(ours for ours, theirs in _STRATEGIES.items() if theirs == scheme.strategy)
    return CacheGrid(
        scheme.type,
        scheme.num_bits,
        strategy,  # type: ignore[arg-type]
        scheme.symmetric,
        scheme.balanced,
        scheme.sinks,
    )


def read_scales(path: str, grid: CacheGrid, stored: Mapping[str, TensorInfo]) -> CacheScales | None:
    """What is stored for the attention module `path`; None where all is found while running. BadInput for damaged tensors."""
    frames = {which: _frame(f"{path}.{which}", stored) for which in "kv"} if grid.balanced else {}
    if not grid.static:
        return CacheScales(frames=frames) if frames else None
    scale = {which: _read(f"{path}.{which}_scale", stored, SCALES) for which in "kv"}
    middle = float(grid.grid.middle)
    if grid.symmetric:
        return CacheScales(scale, {which: torch.full_like(scale[which], middle) for which in "kv"}, frames)
    zero = {which: _read(f"{path}.{which}_zero_point", stored, (torch.uint8,)) for which in "kv"}
    if any(zero[which].shape != scale[which].shape for which in "kv"):
        raise damaged(f"{path}: zero points and scales of the cache differ in shape", "each scale has one")
    return CacheScales(scale, zero, frames)


def _frame(name: str, stored: Mapping[str, TensorInfo]) -> Frame:
    into, center = stored.get(f"{name}_frame"), stored.get(f"{name}_center")
    if into is None or center is None:
        raise damaged(f"{name}_frame or {name}_center is missing", "kv_cache_scheme in config.json needs both")
    if into.dtype != torch.float32 or center.dtype != torch.float32 or into.shape != (*center.shape, center.shape[-1]):
        raise damaged(f"{into.file.name}: {name}_frame is {(into.dtype, into.shape)}", "it is no frame of a cache")
    frame = Frame(read_tensor(into), read_tensor(center))
    finite = bool(torch.isfinite(frame.into_HDD).all()) and bool(torch.isfinite(frame.center_HD).all())
    if not finite or not bool((torch.linalg.cond(frame.into_HDD.double()) < _WORST).all()):
        raise damaged(f"{into.file.name}: {name}_frame cannot be inverted", "everything cached would be lost")
    return frame


def _read(name: str, stored: Mapping[str, TensorInfo], dtypes: tuple[torch.dtype, ...]) -> torch.Tensor:
    info = stored.get(name)
    if info is None:
        raise damaged(f"{name} is missing", "kv_cache_scheme in config.json needs it")
    if info.dtype not in dtypes or len(info.shape) not in (0, 1, 3) or (len(info.shape) == 1 and info.shape != (1,)):
        raise damaged(f"{info.file.name}: {name} is {(info.dtype, info.shape)}", "it is no scale of a cache")
    tensor = read_tensor(info).float()
    if info.dtype != torch.uint8 and not (bool(torch.isfinite(tensor).all()) and bool((tensor > 0).all())):
        raise damaged(f"{info.file.name}: {name} is not finite and positive", "everything cached would be lost")
    return tensor.reshape((1, 1, 1, 1) if tensor.dim() < 3 else (1, *tensor.shape))
