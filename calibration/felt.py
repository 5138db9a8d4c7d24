"""How much a block's answer feels an error in the keys and values that it caches.

The derivatives g of a random combination of all that the block answers, sum_j r_j y_j with r_j ~ N(0, 1), have on average

    E[g^T g] = sum_j (dy_j / dx)^T (dy_j / dx)

so an error d of a key or value x costs d E[g^T g] d^T in squared answers, to first order. No family has to be known for it.

Legend: B windows of a batch, H heads, T tokens, D channels of a head, C width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from infopt.calibration.padding import only_real_heads
from infopt.calibration.stats import HeadSums
from infopt.kv_cache import LeafCache


def feel(
    leaf: LeafCache, answers_BTC: Iterator[torch.Tensor], real_BT: Iterable[torch.Tensor | None], first: int
) -> dict[str, HeadSums]:
    """Sums over keys ("k") and values ("v"), of each window's tokens from `first` on. answers: of a block whose cache is
    `leaf`, batch by batch, each computed when it is asked for. real: which of a batch are tokens, None where all are."""
    sums: dict[str, HeadSums] = {}
    for batch, real in enumerate(real_BT):
        with torch.enable_grad():
            y_BTC = next(answers_BTC, None)
        if y_BTC is None:
            break
        r_BTC = torch.randn(y_BTC.shape, generator=torch.Generator().manual_seed(batch))
        r_BTC = r_BTC if real is None else r_BTC * real[..., None]
        felt = torch.autograd.grad(y_BTC, list(leaf.leaves.values()), r_BTC.to(y_BTC.dtype))
        mask = None if real is None else real[:, first:]
        for (which, x_BHTD), g_BHTD in zip(leaf.leaves.items(), felt, strict=True):
            x, g = (only_real_heads(part.detach()[:, :, first:], mask) for part in (x_BHTD, g_BHTD))
            sums.setdefault(which, HeadSums(x.shape[1], x.shape[3])).add(x, g)
    return sums
