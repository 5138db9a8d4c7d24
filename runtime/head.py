"""The output head on a processor: all tokens roughly in 8 bits, the likely ones exactly.

For a small model the head is the largest matrix, and reading it is most of the time of a token. What matters of its
answer is the top. So `packed` computes all logits with 8-bit weights (a scale per token of the vocabulary) and 7-bit
activations (a scale per row, by torch's own dynamic kernel), takes the `CANDIDATES` largest, and computes those again from
the stored weight in fp32. The most likely token, and a draw among so many or fewer, is that of the stored head. For a draw
from all tokens (`fine`) what the activations lost in 7 bits is multiplied too, in a second pass: of SmolLM2's distribution
the KL divergence is 1e-3 without it.

The stored weight stays in the 16 bits that it has in the file where that loses nothing, which also halves the embedding
that is tied to it.

Legend: T tokens, V vocabulary, C width, K candidates.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

CANDIDATES = 256


class PackedHead(nn.Module):
    """In place of a head's nn.Linear: logits [..., V] fp32 of hidden states [..., C]. weight_VC: as `halved` gives it."""

    def __init__(self, weight_VC: Tensor, bias_V: Tensor | None, packed: Any) -> None:
        super().__init__()
        self.weight_VC, self.bias_V, self._packed = weight_VC, bias_V, packed
        self.fine = False

    @property
    def packed_bytes(self) -> int:
        """What a token reads: 8 bits of everything."""
        return self.weight_VC.numel()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        x_TC = x.reshape(-1, x.shape[-1]).float()
        logits_TV = self._rough(x_TC)
        if self.fine:
            logits_TV += self._rough(x_TC - torch.stack([_seven_bits(x_C) for x_C in x_TC]))
        for t, x_C in enumerate(x_TC):
            ids_K = logits_TV[t].topk(CANDIDATES, sorted=False).indices
            logits_TV[t, ids_K] = self.weight_VC[ids_K].float() @ x_C
        if self.bias_V is not None:
            logits_TV += self.bias_V
        return logits_TV.view(*x.shape[:-1], -1)

    def _rough(self, x_TC: Tensor) -> Tensor:
        """One scale for each row: rows together would share one, and depend on each other."""
        rows = [torch.ops.quantized.linear_dynamic(x_1C, self._packed, True) for x_1C in x_TC.split(1)]
        return rows[0] if len(rows) == 1 else torch.cat(rows)


def _seven_bits(x_C: Tensor) -> Tensor:
    """What the kernel makes of a row: torch's own choice of scale and zero point, for integers from 0 to 127."""
    scale, zero = torch._choose_qparams_per_tensor(x_C, True)
    return ((x_C / scale).round_().add_(zero).clamp_(0, 127) - zero) * scale


def pack_head(head: nn.Module, weight_VC: Tensor) -> PackedHead | None:
    """The packed form of a head, None where it is no plain linear layer, is small, or torch has no such kernel here."""
    if type(head) is not nn.Linear or weight_VC.shape[0] <= CANDIDATES or not _has_kernel():
        return None
    wide_VC = weight_VC.float()
    scale_V = (wide_VC.abs().amax(1) / 127).clamp_min(2.0**-40)
    codes_VC = (wide_VC / scale_V[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    zero_V = torch.zeros(len(scale_V), dtype=torch.int64)
    with warnings.catch_warnings():  # torch announces that these operators may move to another package
        warnings.simplefilter("ignore")
        quantized = torch._make_per_channel_quantized_tensor(codes_VC, scale_V.double(), zero_V, 0)
        packed = torch.ops.quantized.linear_prepack(quantized, None)
    return PackedHead(weight_VC, head.bias, packed)


def _has_kernel() -> bool:
    fast = {"x86", "fbgemm"} & set(torch.backends.quantized.supported_engines)
    return (
        bool(fast) and torch.backends.quantized.engine in fast and hasattr(torch, "_make_per_channel_quantized_tensor")
    )


def halved(weight: Tensor) -> Tensor:
    """The weight in 16 bits where that loses nothing, else as it is."""
    for dtype in (torch.bfloat16, torch.float16):
        half = weight.to(dtype)
        if torch.equal(half.to(weight.dtype), weight):
            return half
    return weight


class HalfEmbedding(nn.Module):
    """In place of an nn.Embedding: fp32 rows of a weight in 16 bits."""

    def __init__(self, weight_VC: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_VC, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids].float()
