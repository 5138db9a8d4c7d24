"""The key-value cache as a numeric type: what is kept of each token's keys and values, and how it is rounded.

transformers hands every layer's new keys (after the rotary embedding, as servers store them) and values to a cache object
and computes attention with what comes back. `RoundingCache` is such an object: it gives back what a quantized cache would
hold. So any model that can use a cache can be run as if its cache were quantized, without touching its code.

    tensor    one scale for a layer's keys and one for its values (what vLLM reads, in FP8)
    head      one for each key-value head
    channel   one for each channel of each head: keys have a few channels that are large for every token
    token     one for each token and head, taken from it when the model runs (KIVI, Liu et al. 2024, does so for values)

The first three come from calibration and cost no memory per token.

Two things bring four bits near to the float cache. A *balanced* cache keeps each head's keys and values in coordinates of its
own (`Frame`), in which all channels vary alike and an error in any of them does equal harm (`quantizers/kv_cache.py` chooses
them). And the first tokens of a text, its *sinks*, which every later one looks at (Xiao et al. 2023, arXiv:2309.17453), may be
kept as they are, as KVQuant does (Hooper et al. 2024, arXiv:2401.18079), which costs nothing per token.

Legend: B windows, H key-value heads, T tokens, D channels of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
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
    """Integers of 4 or 8 bits, or E4M3; `strategy` says which values share a scale. balanced: kept in calibrated coordinates.
    sinks: so many tokens at the start of a text are kept as they are. See the module."""

    kind: Kind = "float"
    bits: int = 8
    strategy: Strategy = "tensor"
    symmetric: bool = True
    balanced: bool = False
    sinks: int = 0

    @property
    def static(self) -> bool:
        """Whether scales come from calibration."""
        return self.strategy != "token"

    @property
    def plain(self) -> bool:
        """Whether pages hold what a layer hands over, every token of it."""
        return not self.balanced and not self.sinks

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
class Frame:
    """Coordinates of each head's keys, or values: y = (x - center) into, x = y back + center. into [H, D, D] can be inverted;
    center [H, D]; fp32."""

    into_HDD: Tensor
    center_HD: Tensor

    @cached_property
    def back_HDD(self) -> Tensor:
        return torch.linalg.inv(self.into_HDD.double()).float()

    def enter(self, x_BHTD: Tensor) -> Tensor:
        return (x_BHTD - self.center_HD[:, None]) @ self.into_HDD

    def leave(self, y_BHTD: Tensor) -> Tensor:
        return y_BHTD @ self.back_HDD + self.center_HD[:, None]


@dataclass(frozen=True)
class CacheScales:
    """What calibration says of one layer's cache, by "k" and "v": scales and zero points, each [1, H or 1, 1, D or 1], fp32,
    empty where scales are dynamic; frames, empty where the cache is not balanced."""

    scale: Mapping[str, Tensor] = field(default_factory=dict)
    zero: Mapping[str, Tensor] = field(default_factory=dict)
    frames: Mapping[str, Frame] = field(default_factory=dict)

    @staticmethod
    def unit(grid: CacheGrid) -> CacheScales:
        """Scale 1, as a server takes it where the checkpoint has none."""
        one = torch.ones(1, 1, 1, 1)
        return CacheScales(dict.fromkeys("kv", one), dict.fromkeys("kv", one * grid.grid.middle))


class RoundingCache:
    """The part of transformers' cache that a layer calls; it keeps nothing, and rounds what passes: texts from their start."""

    def __init__(self, grid: CacheGrid, scales: CacheScales | None = None) -> None:
        self._grid, self._scales = grid, scales or CacheScales()
        if grid.static and not self._scales.scale:
            raise ValueError("static scales are missing")

    def update(self, k_BHTD: Tensor, v_BHTD: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self._round("k", k_BHTD), self._round("v", v_BHTD)

    def _round(self, which: str, x_BHTD: Tensor) -> Tensor:
        frame, sinks = self._scales.frames.get(which), self._grid.sinks
        y_BHTD = frame.enter(x_BHTD.float()) if frame else x_BHTD.float()
        if self._grid.static:
            scale, zero = self._scales.scale[which], self._scales.zero[which]
        else:
            scale, zero = self._grid.range(y_BHTD)
        y_BHTD = self._grid.round(y_BHTD, scale, zero)
        y_BHTD = (frame.leave(y_BHTD) if frame else y_BHTD).to(x_BHTD.dtype)
        return torch.cat((x_BHTD[:, :, :sinks], y_BHTD[:, :, sinks:]), dim=2) if sinks else y_BHTD


class WatchingCache:
    """Gives everything back as it is and keeps some tokens' keys and values: `seen` by "k" and "v", [N, H, T, D]. first: the
    token to begin with."""

    def __init__(self, stride: int = 8, first: int = 0) -> None:
        self.seen: dict[str, list[Tensor]] = {"k": [], "v": []}
        self.some = slice(first, None, stride)

    def update(self, k_BHTD: Tensor, v_BHTD: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        for which, x_BHTD in (("k", k_BHTD), ("v", v_BHTD)):
            self.seen[which].append(x_BHTD[:, :, self.some].float().clone())
        return k_BHTD, v_BHTD


class LeafCache:
    """Gives keys and values back as leaves of the graph that autograd builds: `leaves` by "k" and "v", of the last call."""

    def __init__(self) -> None:
        self.leaves: dict[str, Tensor] = {}

    def update(self, k_BHTD: Tensor, v_BHTD: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        k_BHTD, v_BHTD = (x.detach().requires_grad_() for x in (k_BHTD, v_BHTD))
        self.leaves = {"k": k_BHTD, "v": v_BHTD}
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
