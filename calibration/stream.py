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
from functools import partial
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from infopt.calibration.paused import Paused, stops
from infopt.calibration.stats import EVERYTHING, InputStats
from infopt.errors import BadInput, Unsupported
from infopt.kv_cache import WatchingCache, with_cache
from infopt.memory import memory_of, release
from infopt.model import BlockCall, Skeleton
from infopt.topology import Space, Topology

_BATCH_TOKENS = 1024
_WATCHED = 8  # batches whose keys and values decide the scales of the cache
_FREED = 32 << 20  # bytes given up by stopped passes, after which the gaps that they leave go back to the system


class Stream:
    """The hidden states of `windows_NT` on their way through the blocks of `skeleton`; files go into `folder`.

    hold: bytes of activations that may stay in memory while a pass through a block is stopped.
    """

    def __init__(self, skeleton: Skeleton, windows_NT: torch.Tensor, folder: Path) -> None:
        self._skeleton, self._windows_NT, self._folder = skeleton, windows_NT, folder
        self.hold = 0
        self.cache: Any = None  # given to a block in place of no key-value cache
        count, length = windows_NT.shape
        size = max(1, _BATCH_TOKENS // length)
        self._batches = [range(start, min(start + size, count)) for start in range(0, count, size)]

    @property
    def batch_tokens(self) -> int:
        """Tokens of the largest batch."""
        return max(map(len, self._batches)) * self._windows_NT.shape[1]

    @property
    def batch_count(self) -> int:
        return len(self._batches)

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
    def gather(
        self, i: int, block: nn.Module, topology: Topology, needs: frozenset[str] = EVERYTHING
    ) -> dict[str, InputStats]:
        """The statistics of every space of block i, by the space's name, from one forward pass.

        Raises BadInput if activations are not finite: nothing could be learnt from them.
        """
        stats = {space.name: InputStats(space.width, needs) for space in topology.spaces}
        with _muted(block, topology), _observed(block, topology, stats):
            for _ in self._outputs(i, block):
                pass
        for space in topology.spaces:
            self._check_finite(i, space, stats[space.name])
        return stats

    @torch.no_grad()
    def watch_cache(self, i: int, block: nn.Module) -> dict[str, list[torch.Tensor]]:
        """Some of the keys and values that block i would cache, by "k" and "v" [N, H, T, D], from a part of the windows."""
        self.cache = WatchingCache()
        for _ in islice(self._outputs(i, block), _WATCHED):
            pass
        seen, self.cache = self.cache.seen, None
        return seen

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

        A space that no token reaches is handed over with empty statistics.
        """
        last = i + 1 == len(self._skeleton.blocks)
        stats: dict[str, InputStats] = {}
        waiting: dict[int, str] = {}
        held: dict[str, int] = defaultdict(int)
        freed = [0]

        def go_on(batch: int, forward: Paused, output: BinaryIO) -> None:
            answer = forward.resume()
            if isinstance(answer, torch.Tensor):
                output.seek(self._batches[batch].start * self._window_bytes)
                answer = answer.float().contiguous()
                output.write(memory_of(answer))
                return
            space, x = answer
            waiting[batch] = space.name
            if space.name not in stats:
                stats[space.name] = InputStats(space.width, needs)
            stats[space.name].add(x)
            del answer, x
            size = forward.nbytes
            if held[space.name] + size <= self.hold:
                held[space.name] += size
                return
            forward.park()
            freed[0] += size
            if freed[0] > _FREED:
                freed[0] = 0
                release()

        with (
            stops(block, topology),
            self._path(i).open("rb") as file,
            Path(os.devnull if last else self._path(i + 1)).open("wb") as output,
        ):
            forwards = []
            for batch, windows in enumerate(self._batches):
                run = partial(self._call(i, block, windows).run, block)
                forwards.append(Paused(run, self._read(file, len(windows)), self._folder))
                go_on(batch, forwards[batch], output)
            for space in topology.spaces:
                found = stats.pop(space.name, None) or InputStats(space.width, needs)
                self._check_finite(i, space, found)
                at_space(space, found)
                for batch in [batch for batch, name in waiting.items() if name == space.name]:
                    if last and space is topology.spaces[-1]:
                        break  # nobody reads what comes out of the model here
                    del waiting[batch]
                    go_on(batch, forwards[batch], output)
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

    def inputs(self, i: int) -> Iterator[tuple[torch.Tensor, BlockCall | None]]:
        """The input of block i [B, T, C], batch by batch, each with the block's call; None beyond the last block."""
        beyond = i == len(self._skeleton.blocks)
        with self._path(i).open("rb") as file:
            for windows in self._batches:
                call = None if beyond else self._skeleton.calls(len(windows), self._windows_NT.shape[1])[i]
                yield self._read(file, len(windows)), call

    def forget(self, i: int) -> None:
        """Delete the input of block i."""
        self._path(i).unlink(missing_ok=True)

    def _outputs(self, i: int, block: nn.Module) -> Iterator[torch.Tensor]:
        with self._path(i).open("rb") as file:
            for windows in self._batches:
                yield self._call(i, block, windows).run(block, self._read(file, len(windows)))

    def _call(self, i: int, block: nn.Module, windows: range) -> BlockCall:
        call = self._skeleton.calls(len(windows), self._windows_NT.shape[1])[i]
        return with_cache(call, block, self.cache) if self.cache else call

    def _read(self, file: BufferedReader, windows: int) -> torch.Tensor:
        hidden_BTC = torch.empty(windows, self._windows_NT.shape[1], self._skeleton.width)
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
    def _window_bytes(self) -> int:
        return 4 * self._windows_NT.shape[1] * self._skeleton.width

    def _path(self, i: int) -> Path:
        return self._folder / f"hidden-{i:05d}.f32"


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
