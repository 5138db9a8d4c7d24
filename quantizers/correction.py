"""Correct a layer's weights for the error that its quantized predecessors left in its inputs.

GPTQ makes Q X' close to W X', where X' are the inputs that the quantized layers before have made. What should be near is
the *original* output W X (GPTAQ, Li et al. 2025, arXiv:2504.02692, calls this asymmetric calibration). The objective splits:

    ||Q X' - W X||^2 = ||(Q - W*) X'||^2 + constant,   W* = W X X'^T H^-1 = W + W D H^-1,   H = X' X'^T,  D = (X - X') X'^T

so the best weights for the quantized inputs come first, in closed form, and any solver then rounds W* instead of W. GPTAQ
moves the same correction into GPTQ's loop over columns; done before the loop it serves every solver. A share of the
correction (`strength`; QEP, Arai and Ichikawa 2025, arXiv:2504.09629) keeps it from fitting the calibration text.

Legend: O output channels, C channels of a space; activations are rows here, so D = (X - X')^T X'.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from infopt.quantizers.work import BlockWork
from infopt.topology import Space


def corrected(w_OC: torch.Tensor, h_CC: torch.Tensor, d_CC: torch.Tensor, strength: float, damp: float) -> torch.Tensor:
    """W + strength * W D (H + damping)^-1; W itself where H has no inverse."""
    mean = h_CC.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    lower_CC, info = torch.linalg.cholesky_ex(h_CC + damp * mean * torch.eye(len(h_CC)))
    if info != 0:
        return w_OC
    return w_OC + strength * torch.cholesky_solve((w_OC @ d_CC).T, lower_CC).T


@dataclass(frozen=True)
class Correct:
    """Step `correct`, before the step that rounds; it needs `sequential: space`. strength: share of the correction; damp:
    fraction of the mean diagonal added to H."""

    strength: float = 0.5
    damp: float = 0.05
    needs = frozenset({"gram", "shift"})
    rewrites = False

    def __call__(self, work: BlockWork, space: Space) -> None:
        ops = [op for op, _ in work.targets(space)]
        for op in ops:
            w_OC = work.weight(op)
            w_OC.copy_(corrected(w_OC, work.gram(space), work.stats[space.name].shift, self.strength, self.damp))
