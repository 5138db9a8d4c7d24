"""What calibration remembers of a space: sums over tokens, never the tokens.

Every solver of infopt measures a candidate weight by the same number, the output error of a linear layer on the
calibration inputs, ||X dW^T||^2 = tr(dW H dW^T) with H = X^T X (GPTQ, Frantar et al. 2022, eq. 1). So one Gram matrix per
space serves all readers of the space and every candidate, and no search needs another forward pass. The sums are
mergeable: statistics of two halves of the data add up to those of the whole.

Legend: T tokens, C channels of the space.
"""

from __future__ import annotations

import torch

_PANEL = 256  # columns of one panel of the Gram matrix: full speed, and near half of the matrix is skipped


class InputStats:
    """Sums over the calibration inputs x_TC of one space, all fp32.

    gram: X^T X [C, C]. mean_abs: mean |x| per channel [C], unless it was said that nobody needs it. tokens: rows seen.
    routed: for a space inside an expert, the tokens that the router sent there; where these are fewer than `tokens`, the
    expert was shown the whole batch.
    """

    def __init__(self, width: int, absolute: bool = True) -> None:
        self._upper_CC = torch.zeros(width, width)
        self._abs_C = torch.zeros(width) if absolute else None
        self.tokens = 0
        self.routed: int | None = None

    def add(self, x: torch.Tensor) -> None:
        """Count activations [..., C]."""
        x_TC = x.reshape(-1, x.shape[-1]).float()
        for start in range(0, x_TC.shape[1], _PANEL):  # the matrix is symmetric: only panels right of the diagonal
            self._upper_CC[start : start + _PANEL, start:].addmm_(x_TC[:, start : start + _PANEL].T, x_TC[:, start:])
        if self._abs_C is not None:
            self._abs_C += x_TC.abs().sum(0)
        self.tokens += x_TC.shape[0]

    def merge(self, other: InputStats) -> None:
        self._upper_CC += other._upper_CC
        if self._abs_C is not None and other._abs_C is not None:
            self._abs_C += other._abs_C
        self.tokens += other.tokens
        if self.routed is not None and other.routed is not None:
            self.routed += other.routed

    def finite(self) -> bool:
        """Whether every input was a number, and small enough to be squared."""
        return bool(torch.isfinite(self._upper_CC.diagonal()).all())

    @property
    def gram(self) -> torch.Tensor:
        upper = self._upper_CC.triu()
        return upper + upper.triu(1).T

    @property
    def mean_abs(self) -> torch.Tensor:
        if self._abs_C is None:
            raise ValueError("mean |x| was not gathered")
        return self._abs_C / max(self.tokens, 1)
