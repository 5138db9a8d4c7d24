"""The stream: calibration activations flow through the model one block at a time, from file to file.

The hidden states between two blocks lie in a plain file that is read and written batch by batch. Memory therefore holds
one batch, whatever the number of samples; the operating system's page cache keeps the file in spare memory and gives it
up when something else needs it, which is what an in-memory buffer with a spill to disk would have to imitate. And a run
that was killed goes on from the file of the last finished block (`infopt.calibration.hidden`).

Windows may be shorter than the longest (`infopt.calibration.padding`): what fills them up is in no statistic.

Legend: N windows, T tokens of a window, C hidden width, B windows of a batch.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infopt.calibration.batches import Batches
from infopt.calibration.experts import spaces_of
from infopt.calibration.felt import feel
from infopt.calibration.hidden import ORIGINAL, RUN, HiddenFiles
from infopt.calibration.lanes import LANES, Lanes
from infopt.calibration.muted import muted
from infopt.calibration.padding import check_causal, only_real, only_real_heads
from infopt.calibration.paused import ParkingFile, stops
from infopt.calibration.routed import RoutedLayer
from infopt.calibration.stats import EVERYTHING, HeadSums, InputStats, merged
from infopt.calibration.walk import Track, Walk
from infopt.errors import BadInput, Unsupported
from infopt.experts import experts_in
from infopt.kv_cache import LeafCache, WatchingCache, with_cache
from infopt.memory import release
from infopt.model import BlockCall, Skeleton
from infopt.team import ALONE, Team
from infopt.topology import Space, Topology

_WATCHED = 8  # batches whose keys and values decide the scales of the cache


class Stream:
    """The hidden states of `windows_NT` on their way through the blocks of `skeleton`; files go into `folder`.

    hold: bytes of activations that may stay in memory while a pass through a block is stopped. min_expert_tokens: experts
    that fewer tokens reach are shown the whole batch. Of a team each process has its own windows and its own folder; the
    statistics are everybody's.
    """

    def __init__(
        self, skeleton: Skeleton, windows_NT: torch.Tensor, folder: Path, twin: bool = False, team: Team = ALONE
    ) -> None:
        self._twin, self._team, self._skeleton, self._folder = twin, team, skeleton, folder
        self.batches = Batches(windows_NT)
        self.hold, self.min_expert_tokens = 0, 0
        self.cache: Any = None  # given to a block in place of no key-value cache
        self._lanes = Lanes()
        tracks = (RUN, ORIGINAL) if twin else (RUN,)
        self._hidden = HiddenFiles(folder, self.batches.length, skeleton.width, tracks)
        self._parking = {track: [ParkingFile(folder) for _ in self.batches] for track in tracks}

    @property
    def batch_tokens(self) -> int:
        """Tokens of the largest batch."""
        return max(map(len, self.batches)) * self.batches.length

    @torch.no_grad()
    def start(self) -> str:
        """Embed every window; returns the digest of block 0's input. Loads and frees the outer parts."""
        self._skeleton.load_outer()
        try:
            self._hidden.store(0, map(self._skeleton.embed, self.batches.ids()))
            self._hidden.copy(0)
            return self._hidden.digest(0)
        finally:
            self._skeleton.free_outer()
            release()

    def holds(self, i: int, digest: str) -> bool:
        """Whether the input of block i is on disk, whole and unchanged."""
        return self._hidden.holds(i, digest)

    @torch.no_grad()
    def gather(
        self, i: int, block: nn.Module, topology: Topology, needs: frozenset[str] = EVERYTHING
    ) -> dict[str, InputStats]:
        """The statistics of every space of block i, by the space's name, from one forward pass; from two, where there are
        experts that too few tokens reach.

        Raises BadInput if activations are not finite: nothing could be learnt from them.
        """
        with muted(block, topology):
            stats = self._observe(i, block, topology.spaces, needs)
        return self._complete(i, block, topology, stats, needs)

    @torch.no_grad()
    def gather_and_advance(
        self, i: int, block: nn.Module, topology: Topology, needs: frozenset[str] = EVERYTHING
    ) -> tuple[dict[str, InputStats], str | None]:
        """`gather` and `advance` in one, for a block that goes on as it is; no digest after the last block."""
        if i + 1 == len(self._skeleton.blocks):
            return self.gather(i, block, topology, needs), None
        with self._hidden.path(i + 1).open("wb") as file:
            stats = self._observe(
                i, block, topology.spaces, needs, lambda batch, out: self._hidden.write(file, self.batches[batch], out)
            )
        return self._complete(i, block, topology, stats, needs), self._hidden.digest(i + 1)

    def _complete(
        self, i: int, block: nn.Module, topology: Topology, stats: dict[str, InputStats], needs: frozenset[str]
    ) -> dict[str, InputStats]:
        self._show_everything(i, block, topology, stats, needs)
        for space in topology.spaces:
            self._check_finite(i, space, stats[space.name])
        return stats

    def _show_everything(
        self, i: int, block: nn.Module, topology: Topology, stats: dict[str, InputStats], needs: frozenset[str]
    ) -> None:
        """Gather once more for the experts that too few tokens reached, on all tokens."""
        again: list[Space] = []
        layers = experts_in(block)
        for path, experts in layers.items():
            whole = set()
            for number, spaces in enumerate(spaces_of(topology, path)):
                for space in spaces:
                    stats[space.name].routed = stats[space.name].tokens
                if stats[spaces[0].name].tokens < self.min_expert_tokens:
                    whole.add(number)
                    again += spaces
            experts.whole = frozenset(whole)
        try:
            for name, found in self._observe(i, block, tuple(again), needs).items() if again else ():
                found.routed = stats[name].routed
                stats[name] = found
        finally:
            for experts in layers.values():
                experts.whole = frozenset()

    def _observe(
        self,
        i: int,
        block: nn.Module,
        spaces: tuple[Space, ...],
        needs: frozenset[str],
        then: Callable[[int, torch.Tensor], None] = lambda batch, output: None,
    ) -> dict[str, InputStats]:
        """Each space is counted where its first reader receives it, in one forward pass of every batch."""
        inside = tuple(f"{path}." for path in experts_in(block))
        lanes = [{space.name: InputStats(space.width, needs) for space in spaces} for _ in range(LANES)]

        def count(space: Space) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
            def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                mine = space.readers[0].startswith(inside)  # an expert's own tokens, among which there is no padding
                batch = None if mine else self._lanes.number
                x = only_real(args[0], self.batches.real(batch))
                lanes[self._lanes.current][space.name].add(x, weight_T=self.batches.weight(batch))

            return hook

        self._prepare(i, block)
        with ExitStack() as stack:
            for space in spaces:
                reader = block.get_submodule(space.readers[0])
                stack.callback(reader.register_forward_pre_hook(count(space)).remove)
            self._run(i, block, then)
        return {name: stats.unite(self._team) for name, stats in merged(lanes).items()}

    @torch.no_grad()
    def watch_cache(self, i: int, block: nn.Module, first: int = 0) -> dict[str, list[torch.Tensor]]:
        """Some of the keys and values that block i would cache, by "k" and "v" [N, H, T, D], from a part of the windows; first:
        the token of a window to begin with."""
        self.cache = watching = WatchingCache(first=first)
        for _ in islice(self.outputs(i, block), _WATCHED):
            pass
        self.cache = None
        masks = map(self.batches.real, range(_WATCHED))
        real = [None if mask is None else mask[:, watching.some] for mask in masks]
        return {
            which: [self._team.gather(torch.cat([only_real_heads(*part) for part in zip(parts, real, strict=False)]))]
            for which, parts in watching.seen.items()
        }

    @torch.no_grad()
    def feel_cache(self, i: int, block: nn.Module, first: int = 0) -> dict[str, HeadSums]:
        """Sums of the same keys and values, all tokens from `first` on, and of derivatives by them (`calibration/felt.py`)."""
        self.cache = leaf = LeafCache()
        sums = feel(leaf, islice(self.outputs(i, block), _WATCHED), map(self.batches.real, range(_WATCHED)), first)
        self.cache = None
        return {which: of.unite(self._team) for which, of in sums.items()}

    @torch.no_grad()
    def walk(
        self,
        i: int,
        block: nn.Module,
        topology: Topology,
        at_space: Callable[[Space, InputStats], None],
        needs: frozenset[str] = EVERYTHING,
    ) -> str | None:
        """Gather and advance in one forward pass: `at_space` gets a space's statistics before any reader of it has run,
        and may change the readers' weights. Returns the digest of block i+1's input; None after the last block.

        A space that no token reaches is handed over with empty statistics. With a twin, a copy of the block goes along, on
        what the original model makes of the data, and is never changed.
        """
        last = i + 1 == len(self._skeleton.blocks)
        self._prepare(i, block)
        original = deepcopy(block) if self._twin else None  # before its passes are made to stop

        def checked(space: Space, found: InputStats) -> None:
            self._check_finite(i, space, found)
            at_space(space, found)

        with ExitStack() as stack:
            tracks = [self._track(stack, i, RUN, block, self.cache, topology, needs)]
            if original is not None:
                tracks.append(self._track(stack, i, ORIGINAL, original, None, topology, needs))
            layers, twins = tracks[0].layers, {} if original is None else tracks[1].layers
            walk = Walk(tracks, self.batches, self._hidden, self._lanes, needs, self.hold)
            stack.callback(walk.drop)
            walk.begin()
            places = _places(topology, list(layers))
            for place, spaces in places.items():
                if place in layers:
                    layers[place].serve(spaces_of(topology, place), checked, self.min_expert_tokens, twins.get(place))
                else:
                    checked(spaces[0], walk.statistics(spaces[0]).unite(self._team))
                if last and place == list(places)[-1]:
                    break  # nobody reads what comes out of the model here
                release()
                walk.go_on(place)
            waiting = sorted(set(walk.waiting.values()))
        if waiting and not last:
            raise Unsupported(
                f"{self._skeleton.blocks[i]} reads {waiting[0]} more than once or out of order.",
                "Its layers cannot be quantized one space after another.",
                "Use `--sequential block`.",
            )
        return None if last else self._hidden.digest(i + 1)

    @torch.no_grad()
    def advance(self, i: int, block: nn.Module) -> str:
        """Run block i as it is now; returns the digest of block i+1's input. Not for a stream with a twin."""
        self._prepare(i, block)
        with self._hidden.path(i + 1).open("wb") as file:
            self._run(i, block, lambda batch, output: self._hidden.write(file, self.batches[batch], output))
        return self._hidden.digest(i + 1)

    def inputs(self, i: int) -> Iterator[tuple[torch.Tensor, BlockCall | None]]:
        """The input of block i [B, T, C], batch by batch, each with the block's call; None beyond the last block."""
        beyond = i == len(self._skeleton.blocks)
        with self._hidden.path(i).open("rb") as file:
            for windows in self.batches:
                call = None if beyond else self._skeleton.calls(len(windows), self.batches.length)[i]
                yield self._hidden.read(file, windows), call

    def forget(self, i: int) -> None:
        """Delete the input of block i."""
        self._hidden.forget(i)

    def _track(
        self,
        stack: ExitStack,
        i: int,
        name: str,
        block: nn.Module,
        cache: Any,
        topology: Topology,
        needs: frozenset[str],
    ) -> Track:
        """The block on its way through a track's hidden states; it stops, and files are open, until the stack is left."""
        routed = partial(RoutedLayer, tokens=self.batches.tokens, folder=self._folder, needs=needs, team=self._team)
        last = i + 1 == len(self._skeleton.blocks)
        target = Path(os.devnull) if last else self._hidden.path(i + 1, name)
        stack.enter_context(stops(block, topology))
        return Track(
            run=lambda windows: partial(self._call(i, block, windows, cache).run, block),
            parking=self._parking[name],
            layers={path: routed(experts) for path, experts in experts_in(block).items()},
            input=stack.enter_context(self._hidden.path(i, name).open("rb")),
            output=stack.enter_context(target.open("wb")),
        )

    def outputs(self, i: int, block: nn.Module) -> Iterator[torch.Tensor]:
        """Block i's answer to every batch [B, T, C], as it is now."""
        with self._hidden.path(i).open("rb") as file:
            for windows in self.batches:
                yield self._call(i, block, windows, self.cache).run(block, self._hidden.read(file, windows))

    def _run(self, i: int, block: nn.Module, then: Callable[[int, torch.Tensor], None]) -> None:
        """Block i's answer to every batch [B, T, C], as it is now, on the lanes."""

        def run(batch: int) -> None:
            windows = self.batches[batch]
            then(batch, self._call(i, block, windows, self.cache).run(block, self._hidden.read(file, windows)))

        with self._hidden.path(i).open("rb") as file:
            self._lanes.over(range(len(self.batches)), run)

    def _prepare(self, i: int, block: nn.Module) -> None:
        """Calls are made here, because making one runs the model's outer parts, which are loaded and freed: not for two lanes
        at once."""
        for count in set(map(len, self.batches)):
            self._skeleton.calls(count, self.batches.length)
        if self.batches.real(0) is not None:
            hidden_BTC, call = next(self.inputs(i))
            if call is not None:
                check_causal(self._skeleton.blocks[i], block, call, hidden_BTC)
            for experts in experts_in(block).values():
                experts.real = lambda: self.batches.real(self._lanes.number)

    def _call(self, i: int, block: nn.Module, windows: range, cache: Any) -> BlockCall:
        call = self._skeleton.calls(len(windows), self.batches.length)[i]
        return with_cache(call, block, cache) if cache else call

    def _check_finite(self, i: int, space: Space, stats: InputStats) -> None:
        if not stats.finite():
            raise BadInput(
                f"{self._skeleton.blocks[i]}.{space.readers[0]} receives NaN or infinite activations",
                "the model overflows or its weights are damaged",
                "check it with `infopt eval MODEL`",
            )


def _places(topology: Topology, layers: list[str]) -> dict[str, list[Space]]:
    """Where the passes through a block stop, in order: {a space's name: [it], or the path of a layer of experts: all its
    experts' spaces}."""
    places: dict[str, list[Space]] = defaultdict(list)
    for space in topology.spaces:
        inside = [path for path in layers if space.readers[0].startswith(f"{path}.")]
        places[inside[0] if inside else space.name].append(space)
    return places
