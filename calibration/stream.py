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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from infopt.calibration.stats import InputStats
from infopt.errors import BadInput
from infopt.memory import release
from infopt.model import Skeleton
from infopt.topology import Topology

_BATCH_TOKENS = 2048


class Stream:
    """The hidden states of `windows_NT` on their way through the blocks of `skeleton`; files go into `folder`."""

    def __init__(self, skeleton: Skeleton, windows_NT: torch.Tensor, folder: Path) -> None:
        self._skeleton, self._windows_NT, self._folder = skeleton, windows_NT, folder
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
        path = self._path(i)
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == digest

    @torch.no_grad()
    def gather(self, i: int, block: nn.Module, topology: Topology) -> dict[str, InputStats]:
        """The statistics of every space of block i, by the space's name, from one forward pass.

        Raises BadInput if activations are not finite: nothing could be learnt from them.
        """
        stats = {space.name: InputStats(space.width) for space in topology.spaces}
        with _muted(block, topology), _observed(block, topology, stats):
            for _ in self._outputs(i, block):
                pass
        for space in topology.spaces:
            if not bool(torch.isfinite(stats[space.name].mean_abs).all()):
                name = f"{self._skeleton.blocks[i]}.{space.readers[0]}"
                raise BadInput(
                    f"{name} receives NaN or infinite activations",
                    "the model overflows or its weights are damaged",
                    "check it with `infopt eval MODEL`",
                )
        return stats

    @torch.no_grad()
    def advance(self, i: int, block: nn.Module) -> str:
        """Run block i as it is now; returns the digest of block i+1's input."""
        return self._write(i + 1, self._outputs(i, block))

    def forget(self, i: int) -> None:
        """Delete the input of block i."""
        self._path(i).unlink(missing_ok=True)

    def _outputs(self, i: int, block: nn.Module) -> Iterator[torch.Tensor]:
        with self._path(i).open("rb") as file:
            for batch in self._batches:
                call = self._skeleton.calls(len(batch), self._windows_NT.shape[1])[i]
                yield call.run(block, self._read(file, len(batch)))

    def _read(self, file, windows: int) -> torch.Tensor:
        length = self._windows_NT.shape[1]
        width = self._width
        data = np.fromfile(file, np.float32, windows * length * width)
        return torch.from_numpy(data).view(windows, length, width)

    def _write(self, i: int, hidden: Iterator[torch.Tensor]) -> str:
        digest = hashlib.sha256()
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._path(i).open("wb") as file:
            for hidden_BTC in hidden:
                data = hidden_BTC.float().contiguous().numpy().data
                digest.update(data)
                file.write(data)
        return digest.hexdigest()

    @property
    def _width(self) -> int:
        return self._skeleton.config.get_text_config().hidden_size

    def _path(self, i: int) -> Path:
        return self._folder / f"hidden-{i:05d}.f32"


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
