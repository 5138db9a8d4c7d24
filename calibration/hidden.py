"""The files in which hidden states lie between two blocks, read and written batch by batch.

A file is named after the block that reads it, and after its track: a stream with a twin has two of each. A file is trusted on
resume only if its sha256 is the recorded one.

Legend: N windows, T tokens of a window, C hidden width, B windows of a batch.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import torch

from infopt.memory import memory_of

RUN, ORIGINAL = "hidden", "original"  # tracks: what the quantized model makes of the data, and what the original does


class HiddenFiles:
    """Hidden states fp32 [N, T, C] in `folder`: one file for each block and track."""

    def __init__(self, folder: Path, tokens: int, width: int, tracks: tuple[str, ...]) -> None:
        self._folder, self._tokens, self._width, self._tracks = folder, tokens, width, tracks

    def path(self, i: int, track: str = RUN) -> Path:
        """The input of block i."""
        return self._folder / f"{track}-{i:05d}.f32"

    def store(self, i: int, hidden: Iterable[torch.Tensor]) -> None:
        """Make these batches [B, T, C], in order, the input of block i on the first track."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with self.path(i).open("wb") as file:
            for hidden_BTC in hidden:
                hidden_BTC = hidden_BTC.float().contiguous()
                file.write(memory_of(hidden_BTC))

    def copy(self, i: int) -> None:
        """Give every other track the first one's input of block i."""
        for track in self._tracks[1:]:
            shutil.copyfile(self.path(i), self.path(i, track))

    def read(self, file: BufferedReader, windows: range) -> torch.Tensor:
        hidden_BTC = torch.empty(len(windows), self._tokens, self._width)
        os.preadv(file.fileno(), [memory_of(hidden_BTC)], windows.start * self._window_bytes)
        return hidden_BTC

    def write(self, file: BinaryIO, windows: range, hidden_BTC: torch.Tensor) -> None:
        hidden_BTC = hidden_BTC.float().contiguous()
        offset = windows.start * self._window_bytes
        if os.pwrite(file.fileno(), memory_of(hidden_BTC), offset) != hidden_BTC.nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder))

    def digest(self, i: int) -> str:
        """What is in the files of block i's input."""
        digests = []
        for path in self._files(i):
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        return " ".join(digests)

    def holds(self, i: int, digest: str) -> bool:
        """Whether the input of block i is on disk, whole and unchanged."""
        return all(path.is_file() for path in self._files(i)) and self.digest(i) == digest

    def forget(self, i: int) -> None:
        """Delete the input of block i."""
        for path in self._files(i):
            path.unlink(missing_ok=True)

    def _files(self, i: int) -> list[Path]:
        return [self.path(i, track) for track in self._tracks]

    @property
    def _window_bytes(self) -> int:
        return 4 * self._tokens * self._width
