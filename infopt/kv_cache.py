"""The key-value cache as a numeric type: what is kept of each token's keys and values, and how it is rounded.

transformers hands every layer's new keys (after the rotary embedding, as servers store them) and values to a cache object
and computes attention with what comes back. `RoundingCache` is such an object: it gives back what a quantized cache would
hold. So any model that can use a cache can be run as if its cache were quantized, without touching its code.

    tensor    one scale for a layer's keys and one for its values (what vLLM reads, in FP8)
    head      one for each key-value head
    channel   one for each channel of each head: keys have a few channels that are large for every token
    token     one for each token and head, taken from it when the model runs (KIVI, Liu et al. 2024, does so for values)

The first three come from calibration and cost no memory per token.

Legend: B windows, H key-value heads, T tokens, D channels of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from infopt.errors import Unsupported
from infopt.grid import Grid, Kind

Strategy = Literal["tensor", "head", "channel", "token"]
_REDUCED = {"tensor": (0, 1, 2, 3), "head": (0, 2, 3), "channel": (0, 2), "token": (3,)}
_PARAMETERS = ("past_key_values", "layer_past")


@dataclass(frozen=True)
class CacheGrid:
    """Integers of 4 or 8 bits, or E4M3; `strategy` says which values share a scale (see the module)."""

    kind: Kind = "float"
    bits: int = 8
    strategy: Strategy = "tensor"
    symmetric: bool = True

    @property
    def grid(self) -> Grid:
        """Scales that are stored for every token are bf16, so they are rounded to that before the first division."""
        dtype = torch.bfloat16 if self.strategy == "token" else torch.float32
        return Grid(self.bits, None, self.symmetric, dtype, kind=self.kind)

    def range(self, x_BHTD: Tensor, ratio: float = 1.0) -> tuple[Tensor, Tensor]:
        """(scale, zero) that span the values, or a part of what they span; [1, H or 1, 1 or T, 1 or D], fp32."""
        low = x_BHTD.amin(_REDUCED[self.strategy], keepdim=True).clamp_max(0)
        high = x_BHTD.amax(_REDUCED[self.strategy], keepdim=True).clamp_min(0)
        return self.grid.range(low * ratio, high * ratio)

    def round(self, x_BHTD: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """What the cache gives back for these values, fp32."""
        return self.grid.decode(self.grid.encode(x_BHTD.float(), scale, zero), scale, zero)

    def error(self, x_BHTD: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The squared error, summed over what shares a scale."""
        return (self.round(x_BHTD, scale, zero) - x_BHTD).square_().sum(_REDUCED[self.strategy], keepdim=True)

    def bytes_per_token(self, heads: int, width: int) -> float:
        """Keys and values of one token in one layer, with what is stored for it alone (a scale of 2 bytes, a zero of 1)."""
        own = (2 + (0 if self.symmetric else 1)) if self.strategy == "token" else 0
        return 2 * heads * (width * self.bits / 8 + own)


@dataclass(frozen=True)
class CacheScales:
    """One layer's static scales and zero points, by "k" and "v"; each [1, H or 1, 1, D or 1], fp32. Empty if dynamic."""

    scale: Mapping[str, Tensor]
    zero: Mapping[str, Tensor]

    @staticmethod
    def unit(grid: CacheGrid) -> CacheScales:
        """Scale 1, as a server takes it where the checkpoint has none."""
        one = torch.ones(1, 1, 1, 1)
        return CacheScales(dict.fromkeys("kv", one), dict.fromkeys("kv", one * grid.grid.middle))


class RoundingCache:
    """The part of transformers' cache that a layer calls; it keeps nothing, and rounds what passes."""

    def __init__(self, grid: CacheGrid, scales: CacheScales | None = None) -> None:
        if scales is None and grid.strategy != "token":
            raise ValueError("static scales are missing")
        self._grid, self._scales = grid, scales

    def update(self, k_BHTD: Tensor, v_BHTD: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self._round("k", k_BHTD), self._round("v", v_BHTD)

    def _round(self, which: str, x_BHTD: Tensor) -> Tensor:
        if self._scales is None or self._grid.strategy == "token":
            scale, zero = self._grid.range(x_BHTD.float())
        else:
            scale, zero = self._scales.scale[which], self._scales.zero[which]
        return self._grid.round(x_BHTD, scale, zero).to(x_BHTD.dtype)


class WatchingCache:
    """Gives everything back as it is and keeps some tokens' keys and values: `seen` by "k" and "v", [N, H, T, D]."""

    def __init__(self, stride: int = 8) -> None:
        self.seen: dict[str, list[Tensor]] = {"k": [], "v": []}
        self.stride = stride

    def update(self, k_BHTD: Tensor, v_BHTD: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        for which, x_BHTD in (("k", k_BHTD), ("v", v_BHTD)):
            self.seen[which].append(x_BHTD[:, :, :: self.stride].float().clone())
        return k_BHTD, v_BHTD


def with_cache(call: Any, block: nn.Module, cache: Any) -> Any:
    """The `BlockCall` with this cache in place of none; Unsupported for a block that takes none."""
    names = list(inspect.signature(block.forward).parameters)
    found = [name for name in _PARAMETERS if name in names]
    if not found:
        raise no_cache(type(block).__name__)
    place = names.index(found[0]) - 1  # without the hidden states
    if place < len(call.args):
        return replace(call, args=(*call.args[:place], cache, *call.args[place + 1 :]))
    return replace(call, kwargs={**call.kwargs, found[0]: cache})


def attention_path(block: nn.Module) -> str:
    """The path in the block of the module whose keys and values are cached: its tensors are named after it."""
    paths = [path for path, module in block.named_modules() if path and hasattr(module, "layer_idx")]
    if len(paths) != 1:
        raise no_cache(type(block).__name__)
    return paths[0]


def no_cache(name: str) -> Unsupported:
    return Unsupported(
        f"{name} does not keep its keys and values in one cache.",
        "infopt rounds what a layer hands to its cache, once per block.",
        "Leave --kv-cache out.",
    )
