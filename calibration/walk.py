"""All batches on their way through one block, stopped at every space until its readers are quantized.

Each batch runs to the first reader of a space and waits there (`infopt.calibration.paused`). Once all have come, the space's
statistics are whole; its readers are quantized in place, and the batches go on through them. With a twin, a second track
takes the original block along, on what the original model makes of the data; its batches stop at the same places.

Legend: B windows of a batch, T tokens of a window, C hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from io import BufferedReader
from typing import BinaryIO

import torch

from infopt.calibration.batches import Batches
from infopt.calibration.hidden import HiddenFiles
from infopt.calibration.lanes import LANES, Lanes
from infopt.calibration.padding import only_real
from infopt.calibration.paused import Arrival, Held, ParkingFile, Paused
from infopt.calibration.routed import RoutedLayer
from infopt.calibration.stats import InputStats, merged
from infopt.topology import Space


@dataclass
class Track:
    """A block as it becomes, or as it was. run: how it answers so many windows' hidden states. parking: a file for
    each batch. layers: its layers of experts, by path. input, output: the files that it reads and writes."""

    run: Callable[[range], Callable[[torch.Tensor], torch.Tensor]]
    parking: list[ParkingFile]
    layers: dict[str, RoutedLayer]
    input: BufferedReader
    output: BinaryIO
    forwards: dict[int, Paused] = field(default_factory=dict)


class Walk:
    """The batches' passes. tracks: the block, and its twin if there is one. limit: bytes that stopped passes may keep in
    memory."""

    def __init__(
        self,
        tracks: list[Track],
        batches: Batches,
        hidden: HiddenFiles,
        lanes: Lanes,
        needs: frozenset[str],
        limit: int,
    ) -> None:
        self._tracks, self._batches, self._hidden, self._lanes, self._needs = tracks, batches, hidden, lanes, needs
        self._held = [Held(limit // LANES) for _ in range(LANES)]
        self._stats: list[dict[str, InputStats]] = [{} for _ in range(LANES)]
        self.waiting: dict[int, str] = {}  # by batch: the space, or the layer of experts, where it stands

    def begin(self) -> None:
        """Every batch, to its first stop."""
        self._lanes.over(range(len(self._batches)), self._begin)

    def go_on(self, place: str) -> None:
        """Every batch that stands at `place`, to its next stop or to the end of the block."""
        stopped = sorted(batch for batch, name in self.waiting.items() if name == place)
        for batch in stopped:
            del self.waiting[batch]
        self._lanes.over(stopped, partial(self._go_on, place=place))

    def drop(self) -> None:
        """Take stopped passes down, each in the thread where it stands."""
        self._lanes.over(range(len(self._batches)), self._drop)

    def statistics(self, space: Space) -> InputStats:
        """Of the space where the batches stand; handed over once. Empty where no token reached it."""
        lanes = [{space.name: lane.pop(space.name)} for lane in self._stats if space.name in lane]
        return merged(lanes).get(space.name) or InputStats(space.width, self._needs)

    def _begin(self, batch: int) -> None:
        windows = self._batches[batch]
        for track in self._tracks:
            hidden_BTC = self._hidden.read(track.input, windows)
            track.forwards[batch] = Paused(track.run(windows), hidden_BTC, track.parking[batch])
        del hidden_BTC
        self._go_on(batch)

    def _drop(self, batch: int) -> None:
        for track in self._tracks:
            track.forwards.pop(batch, None)

    def _go_on(self, batch: int, place: str = "") -> None:
        inputs = [x for track in self._tracks for x in self._step(track, batch, place)]
        if inputs:
            lane, place = self._stats[batch % LANES], self.waiting[batch]
            if place not in lane:
                lane[place] = InputStats(inputs[0].shape[-1], self._needs)
            lane[place].add(inputs[0], next(iter(inputs[1:]), None), self._batches.weight(batch))
        del inputs
        for track in self._tracks:
            self._held[batch % LANES].park(self.waiting.get(batch, ""), track.forwards[batch])

    def _step(self, track: Track, batch: int, place: str) -> list[torch.Tensor]:
        """A batch to its next stop on one track; [what the space there receives], or [] where no space is read."""
        given = track.layers[place].output(batch) if place in track.layers else None
        answer = track.forwards[batch].resume(given)
        if isinstance(answer, torch.Tensor):
            self._hidden.write(track.output, self._batches[batch], answer)
            return []
        if isinstance(answer, Arrival):
            self.waiting[batch] = answer.path
            track.layers[answer.path].arrive(batch, self._batches[batch].start * self._batches.length, answer)
            return []
        space, x = answer
        self.waiting[batch] = space.name
        return [only_real(x, self._batches.real(batch))]
