"""Experts one after another, when a block is quantized space by space.

All passes through a block stop where a layer of experts begins (`infopt.calibration.paused`). Then one expert at a time is
served: the tokens that the router sends to it, from all batches, are its calibration data; its projections are quantized;
its answers are added to the output of those tokens. So every expert's last projection sees its first ones quantized, an
expert without tokens simply has none, and memory holds the statistics of one space.

Where the original model goes along (`Stream.walk`, a twin), each expert is compared with the original expert on the original
model's inputs of the same tokens: the two routers need not agree.

An expert that fewer than `floor` tokens reach is shown all of them: the layer's whole input is a better guess of what it
will read than a handful of tokens, from which a solver would learn noise, and much better than none.

The layer's input and output lie in files without a name, mapped into memory: they are as large as the calibration set, and
the process holds only the pages of one expert's tokens.

Legend: N tokens of all batches, T tokens of a batch, H hidden width, I inner width.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from infopt.calibration.lanes import LANES
from infopt.calibration.paused import Arrival
from infopt.calibration.stats import EVERYTHING, InputStats
from infopt.experts import Expert, Experts, add, routed, somebody
from infopt.team import ALONE, Team
from infopt.topology import Space
from infopt.writer import os_errors

AtSpace = Callable[[Space, InputStats], None]


@dataclass(frozen=True)
class _Route:
    """What one batch has for one expert: the batch's lane, its rows of the layer's input, the tokens among them, their
    weights; and which of the rows are tokens at all."""

    lane: int
    rows: slice
    token: torch.Tensor
    weight: torch.Tensor
    real: torch.Tensor


class RoutedLayer:
    """All batches at one layer of experts. `tokens` is their number in all batches; files go into `folder`."""

    def __init__(
        self, experts: Experts, tokens: int, folder: Path, needs: frozenset[str] = EVERYTHING, team: Team = ALONE
    ) -> None:
        self._experts, self._tokens, self._folder, self._needs = experts, tokens, folder, needs
        self._team = team
        self._arrivals: dict[int, tuple[slice, Arrival]] = {}
        self._lock = threading.Lock()
        self._files: tuple[Rows, ...] = ()  # the layer's input and output, from the first batch on

    def arrive(self, batch: int, start: int, arrival: Arrival) -> None:
        """Take a batch's input, whose first token is token `start` of all."""
        x_TH = arrival.hidden.reshape(-1, arrival.hidden.shape[-1])
        with self._lock:
            if not self._files:
                self._files = tuple(Rows(self._folder, self._tokens, x_TH.shape[1]) for _ in range(2))
        rows = slice(start, start + len(x_TH))
        self._files[0].x[rows] = x_TH
        self._files[0].release()
        self._arrivals[batch] = rows, arrival

    def serve(
        self, spaces: list[tuple[Space, ...]], at_space: AtSpace, floor: int, twin: RoutedLayer | None = None
    ) -> None:
        """Hand each expert's spaces to `at_space`, in order, and compute the layer's output with what it leaves.

        twin: the same layer of the original model, at which all batches have arrived too. Its output is computed as well.
        """
        originals = twin._experts.each() if twin else [None] * len(spaces)
        for number, (expert, original) in enumerate(zip(self._experts.each(), originals, strict=True)):
            routes = self._routes(number)
            count = self._team.total(sum(len(route.token) for route in routes))
            if count >= floor:
                routes = [route for route in routes if len(route.token)]
            first, last = spaces[number]
            shown = _Shown(self, expert, twin, original, everyone=count < floor)
            self._serve_one(shown, routes, first, last, at_space, count)
            for file in self._files:
                file.release()
        if twin:
            twin._answer()

    def _answer(self) -> None:
        """Compute the layer's output with the experts as they are."""
        for number, expert in enumerate(self._experts.each()):
            for route in self._routes(number):
                if len(route.token):
                    y_NH = expert(self.input(route)[route.token])
                    add(self._files[1].x[route.rows], route.token, y_NH, route.weight)
            for file in self._files:
                file.release()

    def _routes(self, number: int) -> list[_Route]:
        return [
            _Route(batch % LANES, rows, *routed(number, arrival.index, arrival.weights), somebody(arrival.index))
            for batch, (rows, arrival) in sorted(self._arrivals.items())
        ]

    def output(self, batch: int) -> torch.Tensor:
        """What the layer answers to a batch, in the shape of its input."""
        rows, arrival = self._arrivals[batch]
        answer = self._files[1].x[rows].clone().view(arrival.hidden.shape)
        self._files[1].release()
        return answer

    def input(self, route: _Route) -> torch.Tensor:
        """The layer's input [T, H] of a batch."""
        return self._files[0].x[route.rows]

    def _serve_one(
        self, shown: _Shown, routes: list[_Route], first: Space, last: Space, at_space: AtSpace, count: int
    ) -> None:
        lanes = [InputStats(first.width, self._needs) for _ in range(LANES)]
        for route in routes:
            lanes[route.lane].add(*shown.inputs(route))
        at_space(first, self._whole(lanes, count))

        lanes = [InputStats(last.width, self._needs) for _ in range(LANES)]
        inner_NI = Rows(self._folder, sum(len(route.token) for route in routes), last.width)
        for route, inner in zip(routes, inner_NI.x.split([len(route.token) for route in routes]), strict=True):
            inner.copy_(shown.expert.inner(self.input(route)[route.token]))
            lanes[route.lane].add(*shown.inner(route, inner))
        inner_NI.release()
        at_space(last, self._whole(lanes, count))

        for route, inner in zip(routes, inner_NI.x.split([len(route.token) for route in routes]), strict=True):
            add(self._files[1].x[route.rows], route.token, shown.expert.down(inner), route.weight)

    def _whole(self, lanes: list[InputStats], routed_tokens: int) -> InputStats:
        stats = lanes[0]
        for lane in lanes[1:]:
            stats.merge(lane)
        stats.routed = routed_tokens
        return stats.unite(self._team)


@dataclass(frozen=True)
class _Shown:
    """What an expert is calibrated on: its own tokens, or everyone's; and, with a twin, what the original expert would be given
    for the same tokens, wherever the original model's router sends them."""

    layer: RoutedLayer
    expert: Expert
    twin: RoutedLayer | None
    original: Expert | None
    everyone: bool

    def inputs(self, route: _Route) -> list[torch.Tensor]:
        which = route.real if self.everyone else route.token
        return [layer.input(route)[which] for layer in (self.layer, self.twin) if layer]

    def inner(self, route: _Route, known: torch.Tensor) -> list[torch.Tensor]:
        """known: what the expert's last projection reads of its own tokens."""
        x_NH, *y_NH = self.inputs(route)
        mine = self.expert.inner(x_NH) if self.everyone else known
        return [mine, *(self.original.inner(y) for y in y_NH if self.original)]


class Rows:
    """Zeros [rows, columns], fp32, in a file without a name that goes away with them."""

    def __init__(self, folder: Path, rows: int, columns: int) -> None:
        size = max(4 * rows * columns, 4)
        with os_errors(folder), tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk shows here, not as a signal in the middle of a sum
            self._map = mmap.mmap(file.fileno(), size)
        self.x = torch.frombuffer(self._map, dtype=torch.float32)[: rows * columns].view(rows, columns)

    def release(self) -> None:
        """Keep the file's pages out of this process until they are touched again."""
        self._map.madvise(mmap.MADV_DONTNEED)
