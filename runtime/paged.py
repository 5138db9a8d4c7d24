"""A paged key-value cache: one pool of pages per kind of layer, a block table per request, packed bytes in the pages.

A page holds the keys and values of `PAGE` tokens. A request that is admitted gets all the pages that it can need, so it
never has to be thrown out in the middle; they go back when it is retired, for the next one. A layer with a sliding
window of W tokens gets pages for W tokens and one step, used as a ring (position p lies in page `table[p // PAGE % n]`),
so its memory does not grow with the text.

What is stored is what `infopt.kv_cache.CacheGrid` says, as bytes: floats, one byte a value (INT8, the bits of E4M3) or
half of one (INT4), with scales of the calibration, or one of bf16 for each token and head. It is given back as fp32. Pages of a
balanced cache hold its own coordinates. What is kept of a text's first tokens as it is (`sinks`), in these coordinates too,
belongs to the request.

`Step` is the same for one forward pass of some requests. It is what transformers calls a cache: layers hand it their new
keys and values and get those of the whole text. Requests of different lengths are padded on the left, with a page that
is always zero, and the mask hides it; so every request's tokens keep their distances, and its answer does not depend on
its neighbours. transformers offers a base class for this, which its masks look for; nothing else of it is used.

Legend: B requests of a step, Q new tokens of each, K tokens that a step reads, H key-value heads, D channels of a head,
N tokens in any order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from infopt.errors import OutOfResources
from infopt.kernels.pages import PAGE
from infopt.runtime.store import LayerKind, Store

_MOST_PAGES = 2**20
_MASK = 2**22


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
        self.stores = [Store(kind, self.rings[kind.window].slots) for kind in kinds]

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

    @cached_property
    def sinks(self) -> int:
        """How many tokens at the start of a text are kept as they are."""
        return max((kind.grid.sinks for kind in self.kinds if kind.grid is not None), default=0)

    def sinks_of(self, request: Request, heads: int, width: int) -> Tensor:
        """Where a text's first tokens are kept."""
        if request.sinks is None:
            request.sinks = torch.zeros(len(self.stores), 2, self.sinks, heads, width, device=self.device)
        return request.sinks

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
    """One text's place. tables: by window, the pages' numbers, int64. length: tokens stored. sinks: its first tokens' keys and
    values in all layers, [L, 2, tokens, H, D] fp32, where the cache keeps them as they are."""

    capacity: int
    tables: dict[int | None, Tensor]
    length: int = 0
    sinks: Tensor | None = None


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


@dataclass
class _Plan:
    """Where the layers with one window write and read in a step. offset: the text before the first token that is read. reads:
    the same for each request alone, without padding; firsts: the first token that each reads."""

    write: Tensor | slice
    read: Tensor | slice
    length: int
    offset: int
    reads: list[Tensor | slice]
    firsts: list[int]


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
        for i, request in enumerate(self.requests):
            new = range(request.length, min(request.length + self.count, self.cache.sinks))
            for which, x_NHD in (("k", k_NHD), ("v", v_NHD)) if new else ():
                y_NHD = store.half(which).enter(x_NHD[i * self.count : i * self.count + len(new)])
                kept = self.cache.sinks_of(request, *y_NHD.shape[1:])
                kept[layer, "kv".index(which), new.start : new.stop] = y_NHD

    def each(self, layer: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Each request's own keys and values, [1, H, K of its own, D], without padding."""
        plan, store = self._plans[self.cache.kinds[layer].window], self.cache.stores[layer]
        for request, where, first in zip(self.requests, plan.reads, plan.firsts, strict=True):
            halves = (self._with_sinks(store.read(where, which), request, first, layer, which) for which in "kv")
            k_KHD, v_KHD = halves
            yield k_KHD.transpose(0, 1)[None], v_KHD.transpose(0, 1)[None]

    def places(self, window: int | None, tokens: range) -> Iterator[tuple[int, int, int, int, int]]:
        """For the layers with this window, each request and these of its new tokens: the addresses of its table and of its
        first tokens, the table's length, the first token that this one sees, and its own place."""
        for request in self.requests:
            table, kept = request.tables[window], request.sinks
            addresses = table.data_ptr(), 0 if kept is None else kept.data_ptr()
            for place in range(request.length + tokens.start, request.length + tokens.stop):
                yield *addresses, len(table), 0 if window is None else max(0, place - window + 1), place

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
        for x_KHD, request, where, first in zip(
            x_NHD.view(batch, plan.length, heads, width), self.requests, plan.reads, plan.firsts, strict=True
        ):
            self._with_sinks(x_KHD[plan.length - _count(where) :], request, first, layer, which)
        return x_NHD.view(batch, plan.length, heads, width).transpose(1, 2).to(new_BHQD.dtype)

    def _with_sinks(self, x_KHD: Tensor, request: Request, first: int, layer: int, which: str) -> Tensor:
        """A text's tokens from `first` on, those that are kept as they are in their places; in place."""
        if request.sinks is not None and first < self.cache.sinks:
            kept_NHD = request.sinks[layer, "kv".index(which), first : first + len(x_KHD)]
            x_KHD[: len(kept_NHD)] = self.cache.stores[layer].half(which).leave(kept_NHD)
        return x_KHD

    def _plan(self, window: int | None) -> _Plan:
        """Slots (page * PAGE + place in it) of what is written and read."""
        writes, reads, firsts = [], [], []
        for request in self.requests:
            first = 0 if window is None else max(0, request.length - window + 1)
            end = request.length + self.count
            firsts.append(first)
            reads.append(_slots(request.tables[window], first, end))
            writes.append(_slots(request.tables[window], request.length, end))
        offset = 0 if window is None else max(0, self.past - window + 1)
        length = self.past + self.count - offset
        here = [_on(self.cache.device, part) for part in reads]
        if len(reads) == 1:
            return _Plan(_on(self.cache.device, writes[0]), here[0], length, offset, here, firsts)
        write = torch.cat([_indices(part) for part in writes])
        read_BK = torch.zeros(len(reads), length, dtype=torch.int64)
        for row_K, part in zip(read_BK, map(_indices, reads), strict=True):
            row_K[length - len(part) :] = part
        return _Plan(write.to(self.cache.device), read_BK.flatten().to(self.cache.device), length, offset, here, firsts)


def _slots(table: Tensor, first: int, end: int) -> Tensor | slice:
    """The slots of a text's tokens first .. end - 1; a slice where they are neighbours."""
    low, high, count = first // PAGE, (end - 1) // PAGE, len(table)
    start = int(table[low % count])
    if high < count and int(table[high]) - start == high - low:  # `take` gives runs, or pages in rising order
        return slice(start * PAGE + first % PAGE, start * PAGE + end - low * PAGE)
    position_N = torch.arange(first, end)
    return table[position_N // PAGE % count] * PAGE + position_N % PAGE


def _count(slots: Tensor | slice) -> int:
    return slots.stop - slots.start if isinstance(slots, slice) else len(slots)


def _on(device: torch.device | str, slots: Tensor | slice) -> Tensor | slice:
    return slots if isinstance(slots, slice) else slots.to(device)


def _indices(slots: Tensor | slice) -> Tensor:
    return torch.arange(slots.start, slots.stop) if isinstance(slots, slice) else slots
