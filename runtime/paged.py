"""A paged key-value cache: one pool of pages per kind of layer, a block table per request, packed bytes in the pages.

A page holds the keys and values of `PAGE` tokens. A request that is admitted gets all the pages that it can need, so it
never has to be thrown out in the middle; they go back when it is retired, for the next one. A layer with a sliding
window of W tokens gets pages for W tokens and one step, used as a ring (position p lies in page `table[p // PAGE % n]`),
so its memory does not grow with the text.

What is stored is what `infopt.kv_cache.CacheGrid` says, as bytes: floats, one byte a value (INT8, the bits of E4M3) or
half of one (INT4), with scales of the calibration, or one of bf16 for each token and head. It is given back as fp32.

`Step` is the same for one forward pass of some requests. It is what transformers calls a cache: layers hand it their new
keys and values and get those of the whole text. Requests of different lengths are padded on the left, with a page that
is always zero, and the mask hides it; so every request's tokens keep their distances, and its answer does not depend on
its neighbours. transformers offers a base class for this, which its masks look for; nothing else of it is used.

Legend: B requests of a step, Q new tokens of each, K tokens that a step reads, H key-value heads, D channels of a head,
N tokens in any order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from infopt.errors import OutOfResources, Unsupported
from infopt.kernels.pages import PAGE, Pages
from infopt.kv_cache import CacheGrid, CacheScales

_MOST_PAGES = 2**20
_MASK = 2**22


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


def half_kinds(kinds: Sequence[LayerKind]) -> list[LayerKind]:
    """The same with floats in bf16."""
    return [replace(kind, dtype=torch.bfloat16) for kind in kinds]


class PagedCache:
    """Pages for `requests` texts of `tokens` tokens at once, or more of shorter ones; `chunk` is the longest step.

    Memory is taken when a layer stores its first token, on its device; `device` is where the indices go. Raises
    OutOfResources where there is not enough.
    """

    def __init__(
        self,
        kinds: Sequence[LayerKind],
        tokens: int,
        requests: int = 1,
        chunk: int = 512,
        device: torch.device | str = "cpu",
    ) -> None:
        self.kinds = tuple(kinds)
        self.chunk, self.device = chunk, device
        self.rings = {window: _Ring(window, tokens, requests, chunk) for window in {kind.window for kind in kinds}}
        self.stores = [_Store(kind, self.rings[kind.window].slots) for kind in kinds]

    def admit(self, tokens: int) -> Request | None:
        """A place for a text of so many tokens, None where none is free now."""
        if not self.fits(tokens):
            return None
        return Request(tokens, {window: ring.take(tokens) for window, ring in self.rings.items()})

    def fits(self, tokens: int) -> bool:
        return all(len(ring.free) >= ring.pages(tokens) for ring in self.rings.values())

    def piece(self, start: int) -> int:
        """How many tokens of a prompt to read after the first `start`: fewer in a long one, so that a mask of new tokens
        times all tokens stays as large as it is."""
        return min(self.chunk, max(PAGE, _MASK // (start + self.chunk)))

    def could_fit(self, tokens: int) -> bool:
        """Whether a text of so many tokens could be admitted if nobody else were here."""
        return all((ring.pages(tokens) + 1) * PAGE <= ring.slots for ring in self.rings.values())

    def retire(self, request: Request) -> None:
        """Give a request's pages back."""
        for window, table in request.tables.items():
            self.rings[window].give(table)
        request.tables = {}

    @property
    def nbytes(self) -> int:
        """Bytes that are taken now, all pages of all layers."""
        return sum(part.nbytes for store in self.stores for part in store.parts())

    @property
    def bytes_per_token(self) -> float:
        """Stored for one token in all layers, with scales of its own; 0 before the first token."""
        return sum(part.nbytes / part.shape[0] for store in self.stores for part in store.parts())

    @property
    def float_bytes_per_token(self) -> float:
        """The same in bf16."""
        return sum(store.values_per_token() * 2.0 for store in self.stores)


@dataclass
class Request:
    """One text's place. tables: by window, the pages' numbers, int64. length: tokens stored."""

    capacity: int
    tables: dict[int | None, Tensor]
    length: int = 0


class _Ring:
    """The pages of all layers with one window. Page 0 stays zero: padding is read from it."""

    def __init__(self, window: int | None, tokens: int, requests: int, chunk: int) -> None:
        self.window, self._chunk = window, chunk
        count = requests * self.pages(tokens)
        if count > _MOST_PAGES:
            why = f"infopt keeps track of {_MOST_PAGES * PAGE:,} tokens."
            raise OutOfResources(f"a cache for {requests} texts of {tokens:,} tokens", why, "--max-new-tokens 512")
        self.free = list(range(1, count + 1))
        self.slots = (count + 1) * PAGE

    def pages(self, tokens: int) -> int:
        whole = -(-tokens // PAGE)
        return whole if self.window is None else min(whole, -(-(self.window - 1 + self._chunk) // PAGE) + 1)

    def take(self, tokens: int) -> Tensor:
        """Neighbouring pages where there are any: they can be read without being copied."""
        count = self.pages(tokens)
        start = next((i for i in range(len(self.free) - count + 1) if self._run(i, count)), 0)
        taken = self.free[start : start + count]
        del self.free[start : start + count]
        return torch.tensor(taken)

    def give(self, table: Tensor) -> None:
        self.free = sorted(self.free + table.tolist())

    def _run(self, start: int, count: int) -> bool:
        return self.free[start + count - 1] - self.free[start] == count - 1


class _Store:
    """The pages of one layer. They are made when the first keys and values show their shape."""

    def __init__(self, kind: LayerKind, slots: int) -> None:
        self.kind, self._slots = kind, slots
        self._halves: dict[str, _Half] = {}

    def write(self, where: Tensor | slice, which: str, x_NHD: Tensor) -> None:
        if which not in self._halves:
            self._halves[which] = _Half(self.kind, which, self._slots, x_NHD)
        self._halves[which].write(where, x_NHD)

    def read(self, where: Tensor | slice, which: str) -> Tensor:
        return self._halves[which].read(where)

    def pages(self, heads: int, width: int, device: torch.device | str = "cpu") -> tuple[Pages, Pages]:
        """The pages of keys and of values themselves."""
        if not self._halves:
            like_NHD = torch.empty(0, heads, width, device=device)
            self._halves = {which: _Half(self.kind, which, self._slots, like_NHD) for which in "kv"}
        return self._halves["k"].pages, self._halves["v"].pages

    def used(self) -> tuple[int, ...]:
        """The heads whose keys or values were ever not zero."""
        either_H = self._halves["k"].used() | self._halves["v"].used()
        return tuple(either_H.nonzero().flatten().tolist())

    def parts(self) -> Iterator[Tensor]:
        return (part for half in self._halves.values() for part in half.parts())

    def values_per_token(self) -> int:
        return sum(half.values for half in self._halves.values())


class _Half:
    """The keys, or the values, of one layer, of the heads that are kept: `Pages`, with the other heads as zeros."""

    def __init__(self, kind: LayerKind, which: str, slots: int, like_NHD: Tensor) -> None:
        self._all, width = like_NHD.shape[1:]
        self._kept = None if kind.heads is None else torch.tensor(kind.heads, device=like_NHD.device)
        heads = self._all if kind.heads is None else len(kind.heads)
        self.values = heads * width
        if kind.grid is not None and kind.grid.bits == 4 and width % 2:
            raise Unsupported(f"heads of {width} channels", "Two values of 4 bits share a byte.", "--kv-cache int8")
        self.pages = _empty(slots, heads, width, kind, like_NHD.device)
        if kind.scales is not None:
            scale, zero = (self._static(part[which], like_NHD.device) for part in (kind.scales.scale, kind.scales.zero))
            self.pages = replace(self.pages, scale=scale, zero=zero)

    def _static(self, part: Tensor, device: torch.device) -> Tensor:
        """[1, H or 1, 1, D or 1] of a calibration as [H or 1, D or 1], to go with [N, H, D]."""
        each = part[0, :, 0].float().to(device)
        return each if self._kept is None or len(each) == 1 else each[self._kept]

    def parts(self) -> Iterator[Tensor]:
        """What is stored for each token."""
        yield self.pages.codes
        yield from (part for part in (self.pages.scale, self.pages.zero) if part is not None and self.pages.own)

    def write(self, where: Tensor | slice, x_NHD: Tensor) -> None:
        self.pages.write(where, (x_NHD if self._kept is None else x_NHD[:, self._kept]).float())

    def read(self, where: Tensor | slice) -> Tensor:
        """fp32 [N, H, D]; a view of the pages where they are fp32 and neighbours."""
        x_NHD = self.pages.read(where)
        if self._kept is None:
            return x_NHD
        return x_NHD.new_zeros(len(x_NHD), self._all, x_NHD.shape[2]).index_copy_(1, self._kept, x_NHD)

    def used(self) -> Tensor:
        """bool [H]: the heads of which anything but zeros was stored; of floats."""
        return self.pages.codes.ne(0).any(2).any(0)


def _empty(slots: int, heads: int, width: int, kind: LayerKind, device: torch.device) -> Pages:
    own = kind.grid is None or kind.grid.strategy == "token"
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


@dataclass
class _Plan:
    """Where the layers with one window write and read in a step. offset: the text before the first token that is read."""

    write: Tensor | slice
    read: Tensor | slice
    length: int
    offset: int
    reads: list[Tensor | slice] = field(default_factory=list)  # the same for each request alone, without padding


class Step(Cache):
    """One forward pass of `requests`, `count` new tokens each. `commit` it when the pass is done."""

    def __init__(self, cache: PagedCache, requests: Sequence[Request], count: int) -> None:
        if count > cache.chunk or any(request.length + count > request.capacity for request in requests):
            raise ValueError("more tokens than there are pages for")
        self.cache, self.requests, self.count = cache, requests, count
        self.past = max(request.length for request in requests)
        self._sliding = [kind.window is not None for kind in cache.kinds]

    @cached_property
    def _plans(self) -> dict[int | None, _Plan]:
        return {window: self._plan(window) for window in self.cache.rings}

    def commit(self) -> None:
        for request in self.requests:
            request.length += self.count

    def positions(self) -> Tensor:
        """int64 [B, Q]: each new token's place in its text."""
        starts = torch.tensor([request.length for request in self.requests])
        return (starts[:, None] + torch.arange(self.count)).to(self.cache.device)

    def mask(self) -> Tensor | None:
        """int64 [B, K], 1 where a request has a token, right-aligned; None where all have the same length."""
        lengths = [request.length + self.count for request in self.requests]
        if min(lengths) == max(lengths):
            return None
        total = max(lengths)
        return (torch.arange(total) >= total - torch.tensor(lengths)[:, None]).long().to(self.cache.device)

    # What transformers asks of a cache

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new keys and values, [B, H, Q, D]; those of the whole text, [B, H, K, D]."""
        k_BHQD, v_BHQD, layer = key_states, value_states, layer_idx
        if k_BHQD.shape[0] != len(self.requests) or k_BHQD.shape[2] != self.count:
            raise ValueError("the keys and values of other tokens")
        self.store(k_BHQD.transpose(1, 2).flatten(0, 1), v_BHQD.transpose(1, 2).flatten(0, 1), layer)
        plan = self._plans[self.cache.kinds[layer].window]
        return self._read(layer, "k", plan, k_BHQD), self._read(layer, "v", plan, v_BHQD)

    def store(self, k_NHD: Tensor, v_NHD: Tensor, layer: int) -> None:
        """Store the new keys and values, N = B * Q."""
        plan, store = self._plans[self.cache.kinds[layer].window], self.cache.stores[layer]
        store.write(plan.write, "k", k_NHD)
        store.write(plan.write, "v", v_NHD)

    def each(self, layer: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Each request's own keys and values, [1, H, K of its own, D], without padding."""
        plan, store = self._plans[self.cache.kinds[layer].window], self.cache.stores[layer]
        for where in plan.reads:
            yield store.read(where, "k").transpose(0, 1)[None], store.read(where, "v").transpose(0, 1)[None]

    def places(self, window: int | None, tokens: range) -> Iterator[tuple[int, int, int, int]]:
        """For the layers with this window, each request and these of its new tokens: its table's address and length, the first
        token that this one sees, and its own place."""
        for request in self.requests:
            address, pages = request.tables[window].data_ptr(), len(request.tables[window])
            for place in range(request.length + tokens.start, request.length + tokens.stop):
                yield address, pages, 0 if window is None else max(0, place - window + 1), place

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.past

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.past

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        plan = self._plans[self.cache.kinds[layer_idx].window]
        return plan.length, plan.offset

    def __len__(self) -> int:
        return len(self._sliding)

    @property
    def is_sliding(self) -> list[bool]:
        return self._sliding

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self)

    @property
    def is_dummy(self) -> list[bool]:
        return [False] * len(self)

    @property
    def is_compileable(self) -> bool:
        return False

    def _read(self, layer: int, which: str, plan: _Plan, new_BHQD: Tensor) -> Tensor:
        batch, heads, _, width = new_BHQD.shape
        x_NHD = self.cache.stores[layer].read(plan.read, which)
        return x_NHD.view(batch, plan.length, heads, width).transpose(1, 2).to(new_BHQD.dtype)

    def _plan(self, window: int | None) -> _Plan:
        """Slots (page * PAGE + place in it) of what is written and read."""
        writes, reads = [], []
        for request in self.requests:
            first = 0 if window is None else max(0, request.length - window + 1)
            end = request.length + self.count
            reads.append(_slots(request.tables[window], first, end))
            writes.append(_slots(request.tables[window], request.length, end))
        offset = 0 if window is None else max(0, self.past - window + 1)
        length = self.past + self.count - offset
        here = [_on(self.cache.device, part) for part in reads]
        if len(reads) == 1:
            return _Plan(_on(self.cache.device, writes[0]), here[0], length, offset, here)
        write = torch.cat([_indices(part) for part in writes])
        read_BK = torch.zeros(len(reads), length, dtype=torch.int64)
        for row_K, part in zip(read_BK, map(_indices, reads), strict=True):
            row_K[length - len(part) :] = part
        return _Plan(write.to(self.cache.device), read_BK.flatten().to(self.cache.device), length, offset, here)


def _slots(table: Tensor, first: int, end: int) -> Tensor | slice:
    """The slots of a text's tokens first .. end - 1; a slice where they are neighbours."""
    low, high, count = first // PAGE, (end - 1) // PAGE, len(table)
    start = int(table[low % count])
    if high < count and int(table[high]) - start == high - low:  # `take` gives runs, or pages in rising order
        return slice(start * PAGE + first % PAGE, start * PAGE + end - low * PAGE)
    position_N = torch.arange(first, end)
    return table[position_N // PAGE % count] * PAGE + position_N % PAGE


def _on(device: torch.device | str, slots: Tensor | slice) -> Tensor | slice:
    return slots if isinstance(slots, slice) else slots.to(device)


def _indices(slots: Tensor | slice) -> Tensor:
    return torch.arange(slots.start, slots.stop) if isinstance(slots, slice) else slots
