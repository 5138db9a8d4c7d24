"""The pages of one layer: what is kept of its keys and values, as bytes, and how it is given back.

Legend: N tokens in any order, H key-value heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from infopt.errors import OutOfResources, Unsupported
from infopt.kernels.pages import Pages
from infopt.kv_cache import CacheGrid, CacheScales, Frame


@dataclass(frozen=True)
class LayerKind:
    """What one layer caches. window: how many tokens it sees, None for all. grid: how they are stored, None as floats.

    scales: the calibrated ones, where the grid has such. heads: the only ones that are ever not zero, None for all. dtype: of
    floats."""

    window: int | None = None
    grid: CacheGrid | None = None
    scales: CacheScales | None = None
    heads: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32


class Store:
    """The pages of one layer. They are made when the first keys and values show their shape."""

    def __init__(self, kind: LayerKind, slots: int) -> None:
        self.kind, self._slots = kind, slots
        self._halves: dict[str, Half] = {}

    def write(self, where: Tensor | slice, which: str, x_NHD: Tensor) -> None:
        if which not in self._halves:
            self._halves[which] = Half(self.kind, which, self._slots, x_NHD)
        self._halves[which].write(where, x_NHD)

    def read(self, where: Tensor | slice, which: str) -> Tensor:
        return self._halves[which].read(where)

    def half(self, which: str) -> Half:
        """What has been written to."""
        return self._halves[which]

    def pages(self, heads: int, width: int, device: torch.device | str = "cpu") -> tuple[Pages, Pages]:
        """The pages of keys and of values themselves."""
        if not self._halves:
            like_NHD = torch.empty(0, heads, width, device=device)
            self._halves = {which: Half(self.kind, which, self._slots, like_NHD) for which in "kv"}
        return self._halves["k"].pages, self._halves["v"].pages

    def used(self) -> tuple[int, ...]:
        """The heads whose keys or values were ever not zero."""
        either_H = self._halves["k"].used() | self._halves["v"].used()
        return tuple(either_H.nonzero().flatten().tolist())

    def parts(self) -> Iterator[Tensor]:
        return (part for half in self._halves.values() for part in half.parts())

    def values_per_token(self) -> int:
        return sum(half.values for half in self._halves.values())


class Half:
    """The keys, or the values, of one layer, of the heads that are kept: `Pages`, with the other heads as zeros."""

    def __init__(self, kind: LayerKind, which: str, slots: int, like_NHD: Tensor) -> None:
        self._all, width = like_NHD.shape[1:]
        self._kept = None if kind.heads is None else torch.tensor(kind.heads, device=like_NHD.device)
        heads = self._all if kind.heads is None else len(kind.heads)
        self.values = heads * width
        if kind.grid is not None and kind.grid.bits == 4 and width % 2:
            raise Unsupported(f"heads of {width} channels", "Two values of 4 bits share a byte.", "--kv-cache int8")
        self.pages = _empty(slots, heads, width, kind, like_NHD.device)
        scales = kind.scales or CacheScales()
        if which in scales.scale:
            scale, zero = (self._static(part[which], like_NHD.device) for part in (scales.scale, scales.zero))
            self.pages = replace(self.pages, scale=scale, zero=zero)
        self.frame = self._kept_frame(scales.frames.get(which), like_NHD.device)

    def _static(self, part: Tensor, device: torch.device) -> Tensor:
        """[1, H or 1, 1, D or 1] of a calibration as [H or 1, D or 1], to go with [N, H, D]."""
        each = part[0, :, 0].float().to(device)
        return each if self._kept is None or len(each) == 1 else each[self._kept]

    def parts(self) -> Iterator[Tensor]:
        """What is stored for each token."""
        yield self.pages.codes
        yield from (part for part in (self.pages.scale, self.pages.zero) if part is not None and self.pages.own)

    def _kept_frame(self, frame: Frame | None, device: torch.device) -> Frame | None:
        if frame is None:
            return None
        parts = (part.to(device) for part in (frame.into_HDD, frame.center_HD))
        return Frame(*(part if self._kept is None else part[self._kept] for part in parts))

    def write(self, where: Tensor | slice, x_NHD: Tensor) -> None:
        self.pages.write(where, self.enter(x_NHD))

    def read(self, where: Tensor | slice) -> Tensor:
        """fp32 [N, H, D]; a view of the pages where they are fp32 and neighbours."""
        return self.leave(self.pages.read(where))

    def enter(self, x_NHD: Tensor) -> Tensor:
        """What the pages hold, before it is rounded: fp32, the heads that are kept."""
        x_NHD = (x_NHD if self._kept is None else x_NHD[:, self._kept]).float()
        return x_NHD if self.frame is None else self.frame.enter(x_NHD.transpose(0, 1)).transpose(0, 1)

    def leave(self, y_NHD: Tensor) -> Tensor:
        """What a layer is given of that: all heads."""
        x_NHD = y_NHD if self.frame is None else self.frame.leave(y_NHD.transpose(0, 1)).transpose(0, 1)
        if self._kept is None:
            return x_NHD
        return x_NHD.new_zeros(len(x_NHD), self._all, x_NHD.shape[2]).index_copy_(1, self._kept, x_NHD)

    def used(self) -> Tensor:
        """bool [H]: the heads of which anything but zeros was stored; of floats."""
        return self.pages.codes.ne(0).any(2).any(0)


def _empty(slots: int, heads: int, width: int, kind: LayerKind, device: torch.device) -> Pages:
    own = kind.grid is None or not kind.grid.static
    if not own and kind.scales is None:
        raise ValueError("static scales are missing")
    bits = 8 * kind.dtype.itemsize if kind.grid is None else kind.grid.bits
    try:
        if own:
            return Pages.empty(slots, heads, width, kind.grid, kind.dtype, device)
        return Pages(torch.zeros(slots, heads, width * bits // 8, dtype=torch.uint8, device=device), grid=kind.grid)
    except (RuntimeError, MemoryError) as error:
        size = slots * heads * width * bits / 8
        raise OutOfResources(
            f"no memory for {size / 1e9:.1f} GB of cache", "", "fewer tokens or requests, or --kv-cache int8"
        ) from error
