"""The stream: calibration activations flow through the model one block at a time, from file to file.

The hidden states between two blocks lie in a plain file that is read and written batch by batch. Memory therefore holds
one batch, whatever the number of samples; the operating system's page cache keeps the file in spare memory and gives it
up when something else needs it, which is what an in-memory buffer with a spill to disk would have to imitate. And a run
that was killed goes on from the file of the last finished block.

A file is named after the block that reads it. It is trusted on resume only if its sha256 is the recorded one.

Legend: N windows, T tokens of a window, C hidden width, B windows of a batch.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn

from infopt.calibration.experts import spaces_of
from infopt.calibration.paused import Arrival, Paused, stops
from infopt.calibration.routed import RoutedLayer
from infopt.calibration.stats import InputStats
from infopt.errors import BadInput, Unsupported
from infopt.experts import experts_in
from infopt.memory import memory_of, release
from infopt.model import BlockCall, Skeleton
from infopt.topology import Space, Topology

_BATCH_TOKENS = 1024
_FREED = 32 << 20  # bytes given up by stopped passes, after which the gaps that they leave go back to the system


class Stream:
    """The hidden states of `windows_NT` on their way through the blocks of `skeleton`; files go into `folder`.

    hold: bytes of activations that may stay in memory while a pass through a block is stopped. min_expert_tokens: experts
    that fewer tokens reach are shown the whole batch.
    """

    def __init__(self, skeleton: Skeleton, windows_NT: torch.Tensor, folder: Path) -> None:
        self._skeleton, self._windows_NT, self._folder = skeleton, windows_NT, folder
        self.hold = 0
        self.min_expert_tokens = 0
        count, length = windows_NT.shape
        size = max(1, _BATCH_TOKENS // length)
        self._batches = [range(start, min(start + size, count)) for start in range(0, count, size)]

    @property
    def batch_tokens(self) -> int:
        """Tokens of the largest batch."""
        return max(map(len, self._batches)) * self._windows_NT.shape[1]

    @torch.no_grad()
    def start(self) -> str:
        """Embed every window; returns the digest of block 0's input. Loads and frees the outer parts."""
        self._skeleton.load_outer()
        try:
            return self._write(0, (self._skeleton.embed(self._windows_NT[b.start : b.stop]) for b in self._batches))
        finally:
            self._skeleton.free_outer()
            release()

    def holds(self, i: int, digest: str) -> bool:
        """Whether the input of block i is on disk, whole and unchanged."""
        return self._path(i).is_file() and _digest(self._path(i)) == digest

    @torch.no_grad()
    def gather(self, i: int, block: nn.Module, topology: Topology) -> dict[str, InputStats]:
        """The statistics of every space of block i, by the space's name, from one forward pass; from two, where there are
        experts that too few tokens reach.

        Raises BadInput if activations are not finite: nothing could be learnt from them.
        """
        stats = {space.name: InputStats(space.width) for space in topology.spaces}
        with _muted(block, topology), _observed(block, topology, stats):
            for _ in self._outputs(i, block):
                pass
        self._show_everything(i, block, topology, stats)
        for space in topology.spaces:
            self._check_finite(i, space, stats[space.name])
        return stats

    def _show_everything(self, i: int, block: nn.Module, topology: Topology, stats: dict[str, InputStats]) -> None:
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
        for space in again:
            counted = stats[space.name].routed
            stats[space.name] = InputStats(space.width)
            stats[space.name].routed = counted
        try:
            if again:
                with _observed(block, replace(topology, spaces=tuple(again)), stats):
                    for _ in self._outputs(i, block):
                        pass
        finally:
            for experts in layers.values():
                experts.whole = frozenset()

    @torch.no_grad()
    def walk(
        self, i: int, block: nn.Module, topology: Topology, at_space: Callable[[Space, InputStats], None]
    ) -> str | None:
        """Gather and advance in one forward pass: `at_space` gets a space's statistics before any reader of it has run,
        and may change the readers' weights. Returns the digest of block i+1's input; None after the last block.

        A space that no token reaches is handed over with empty statistics.
        """
        last = i + 1 == len(self._skeleton.blocks)
        stats: dict[str, InputStats] = {}
        waiting: dict[int, str] = {}
        held: dict[str, int] = defaultdict(int)
        freed = [0]
        layers = self._layers(block)

        def go_on(batch: int, forward: Paused, output: BinaryIO, given: torch.Tensor | None = None) -> None:
            answer = forward.resume(given)
            if isinstance(answer, torch.Tensor):
                output.seek(self._batches[batch].start * self._window_bytes)
                answer = answer.float().contiguous()
                output.write(memory_of(answer))
                return
            if isinstance(answer, Arrival):
                waiting[batch] = place = answer.path
                layers[place].arrive(batch, self._batches[batch].start * self._windows_NT.shape[1], answer)
            else:
                space, x = answer
                waiting[batch] = place = space.name
                if place not in stats:
                    stats[place] = InputStats(space.width, absolute=False)
                stats[place].add(x)
                del x
            del answer
            size = forward.nbytes
            if held[place] + size <= self.hold:
                held[place] += size
                return
            forward.park()
            freed[0] += size
            if freed[0] > _FREED:
                freed[0] = 0
                release()

        def checked(space: Space, found: InputStats) -> None:
            self._check_finite(i, space, found)
            at_space(space, found)

        with (
            stops(block, topology),
            self._path(i).open("rb") as file,
            Path(os.devnull if last else self._path(i + 1)).open("wb") as output,
        ):
            forwards = []
            for batch, windows in enumerate(self._batches):
                run = partial(self._call(i, windows).run, block)
                forwards.append(Paused(run, self._read(file, len(windows)), self._folder))
                go_on(batch, forwards[batch], output)
            places = _places(topology, list(layers))
            for place, spaces in places.items():
                if place in layers:
                    layers[place].serve(spaces_of(topology, place), checked, self.min_expert_tokens)
                else:
                    nothing = InputStats(spaces[0].width, absolute=False)
                    checked(spaces[0], stats.pop(place, nothing))
                for batch in [batch for batch, name in waiting.items() if name == place]:
                    if last and place == list(places)[-1]:
                        break  # nobody reads what comes out of the model here
                    del waiting[batch]
                    go_on(batch, forwards[batch], output, layers[place].output(batch) if place in layers else None)
        if waiting and not last:
            raise Unsupported(
                f"{self._skeleton.blocks[i]} reads {min(waiting.values())} more than once or out of order.",
                "Its layers cannot be quantized one space after another.",
                "Use `--sequential block`.",
            )
        return None if last else _digest(self._path(i + 1))

    @torch.no_grad()
    def advance(self, i: int, block: nn.Module) -> str:
        """Run block i as it is now; returns the digest of block i+1's input."""
        return self._write(i + 1, self._outputs(i, block))

    def forget(self, i: int) -> None:
        """Delete the input of block i."""
        self._path(i).unlink(missing_ok=True)

    def _layers(self, block: nn.Module) -> dict[str, RoutedLayer]:
        tokens = self._windows_NT.numel()
        return {path: RoutedLayer(experts, tokens, self._folder) for path, experts in experts_in(block).items()}

    def _outputs(self, i: int, block: nn.Module) -> Iterator[torch.Tensor]:
        with self._path(i).open("rb") as file:
            for windows in self._batches:
                yield self._call(i, windows).run(block, self._read(file, len(windows)))

    def _call(self, i: int, windows: range) -> BlockCall:
        return self._skeleton.calls(len(windows), self._windows_NT.shape[1])[i]

    def _read(self, file: BufferedReader, windows: int) -> torch.Tensor:
        hidden_BTC = torch.empty(windows, self._windows_NT.shape[1], self._width)
        file.readinto(memory_of(hidden_BTC))
        return hidden_BTC

    def _write(self, i: int, hidden: Iterator[torch.Tensor]) -> str:
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._path(i).open("wb") as file:
            for hidden_BTC in hidden:
                hidden_BTC = hidden_BTC.float().contiguous()
                file.write(memory_of(hidden_BTC))
        return _digest(self._path(i))

    def _check_finite(self, i: int, space: Space, stats: InputStats) -> None:
        if not stats.finite():
            raise BadInput(
                f"{self._skeleton.blocks[i]}.{space.readers[0]} receives NaN or infinite activations",
                "the model overflows or its weights are damaged",
                "check it with `infopt eval MODEL`",
            )

    @property
    def _width(self) -> int:
        return self._skeleton.config.get_text_config().hidden_size

    @property
    def _window_bytes(self) -> int:
        return 4 * self._windows_NT.shape[1] * self._width

    def _path(self, i: int) -> Path:
        return self._folder / f"hidden-{i:05d}.f32"


def _places(topology: Topology, layers: list[str]) -> dict[str, list[Space]]:
    """Where the passes through a block stop, in order: {a space's name: [it], or the path of a layer of experts: all its
    experts' spaces}."""
    places: dict[str, list[Space]] = defaultdict(list)
    for space in topology.spaces:
        inside = [path for path in layers if space.readers[0].startswith(f"{path}.")]
        places[inside[0] if inside else space.name].append(space)
    return places


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _observed(block: nn.Module, topology: Topology, stats: dict[str, InputStats]) -> Iterator[None]:
    """Each space is counted where its first reader receives it."""
    handles = []
    for space in topology.spaces:
        reader = block.get_submodule(space.readers[0])
        add = stats[space.name].add
        handles.append(reader.register_forward_pre_hook(lambda _, args, add=add: add(args[0])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _muted(block: nn.Module, topology: Topology) -> Iterator[None]:
    """Skip the products that only the block's output needs: the readers of the last space answer with zeros.

    Nothing observed comes after them, and for a gated MLP they are a quarter of the block's work.
    """
    last = topology.spaces[-1].readers if topology.spaces and not topology.unhandled else ()
    originals = {name: block.get_submodule(name) for name in last}
    for name in last:
        block.set_submodule(name, _Mute(topology.op(name).out_features))
    try:
        yield
    finally:
        for name, module in originals.items():
            block.set_submodule(name, module)


class _Mute(nn.Module):
    """Stands for a linear op whose output nobody needs; its input is observed like any other's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], self.width)  # not an expanded zero: a block may add to it in place
