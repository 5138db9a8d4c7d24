"""Windows cut into batches of about 512 tokens, what of them is real, and how much each token counts.

Legend: N windows, B windows of a batch, T tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from infopt.calibration.padding import only_real, real_tokens

_TOKENS = 512


class Batches:
    """`windows_NT` in order, batch by batch; first_token: how often a window's first token counts."""

    def __init__(self, windows_NT: torch.Tensor) -> None:
        self._real_NT = real_tokens(windows_NT)
        self._windows_NT = windows_NT.clamp_min(0)
        self.first_token = 1
        count, self.length = windows_NT.shape
        size = max(1, _TOKENS // self.length)
        self._ranges = [range(start, min(start + size, count)) for start in range(0, count, size)]

    def __len__(self) -> int:
        return len(self._ranges)

    def __getitem__(self, batch: int) -> range:
        """The windows of a batch."""
        return self._ranges[batch]

    def __iter__(self) -> Iterator[range]:
        return iter(self._ranges)

    @property
    def tokens(self) -> int:
        """Of all batches, padding too."""
        return self._windows_NT.numel()

    def ids(self) -> Iterator[torch.Tensor]:
        """Each batch's tokens [B, T], some token in place of padding."""
        return (self._windows_NT[windows.start : windows.stop] for windows in self._ranges)

    def real(self, batch: int | None) -> torch.Tensor | None:
        """Which entries of a batch are tokens, bool [B, T]; None where all are, and for no batch."""
        if self._real_NT is None or batch is None or batch >= len(self._ranges):
            return None
        windows = self._ranges[batch]
        return self._real_NT[windows.start : windows.stop]

    def weight(self, batch: int | None) -> torch.Tensor | None:
        """How often each token of a batch counts, fp32; None where all do once."""
        if self.first_token == 1 or batch is None:
            return None
        weight_T = torch.tensor([self.first_token, *[1.0] * (self.length - 1)])
        return only_real(weight_T.expand(len(self._ranges[batch]), -1), self.real(batch)).flatten()
