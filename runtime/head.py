"""The output head on a processor: all tokens roughly in 8 bits, the likely ones exactly.

For a small model the head is the largest matrix, and reading it is most of the time of a token. What matters of its
answer is the top. So `packed` computes all logits with 8-bit weights (a scale per token of the vocabulary) and 7-bit
activations (a scale per row, by torch's own dynamic kernel), takes the `CANDIDATES` largest, and computes those again from
the stored weight in fp32. The most likely token, and a draw among so many or fewer, is that of the stored head. For a draw
from all tokens (`fine`) what the activations lost in 7 bits is multiplied too, in a second pass: of SmolLM2's distribution
the KL divergence is 2e-3 without it.

The stored weight stays in the 16 bits that it has in the file where that loses nothing, which also halves the embedding
that is tied to it.

Legend: T tokens, V vocabulary, C width, K candidates.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

CANDIDATES = 128
_ROWS = 4096


class PackedHead(nn.Module):
    """In place of a head's nn.Linear: logits [..., V] fp32 of hidden states [..., C]. weight_VC: as `halved` gives it.

    packed: the 8-bit weight with two more columns of zeros. torch's kernel takes one scale for all rows that it is given;
    each row is divided by its own largest value and gets a 1 and a -1 for these columns, so the scale is always the same and
    no row depends on others.
    """

    def __init__(self, weight_VC: Tensor, bias_V: Tensor | None, packed: Any) -> None:
        super().__init__()
        self.weight_VC, self.bias_V, self._packed = weight_VC, bias_V, packed
        self._ends_2 = torch.tensor([1.0, -1.0])
        self._scale, self._zero = torch._choose_qparams_per_tensor(self._ends_2, True)
        self.fine = False

    @property
    def packed_bytes(self) -> int:
        """What a token reads: 8 bits of everything."""
        return self.weight_VC.numel()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        x_TC = x.reshape(-1, x.shape[-1]).float()
        logits_TV = self._rough(x_TC)
        ids_TK = logits_TV.topk(CANDIDATES, sorted=False).indices
        for ids_K, logits_V, x_C in zip(ids_TK.split(1), logits_TV.split(1), x_TC, strict=True):
            weight_KC = self.weight_VC.index_select(0, ids_K[0])  # several times faster than indexing
            logits_V.scatter_(1, ids_K, (weight_KC.float() @ x_C)[None])
        if self.bias_V is not None:
            logits_TV += self.bias_V
        return logits_TV.view(*x.shape[:-1], -1)

    def _rough(self, x_TC: Tensor) -> Tensor:
        largest_T1 = x_TC.abs().amax(-1, keepdim=True).clamp_min(2.0**-40)
        rows_TC = torch.cat((x_TC / largest_T1, self._ends_2.expand(len(x_TC), 2)), dim=-1)
        logits_TV = torch.ops.quantized.linear_dynamic(rows_TC, self._packed, True)
        if self.fine:
            codes_TC = (rows_TC / self._scale).round_().add_(self._zero).clamp_(0, 127)
            lost_TC = rows_TC - (codes_TC - self._zero) * self._scale
            # as large as the rows were, for the same scale; half a step is the most that is lost
            lost_TC = torch.cat((lost_TC[:, :-2] * (2 / self._scale), rows_TC[:, -2:]), dim=-1)
            logits_TV += torch.ops.quantized.linear_dynamic(lost_TC, self._packed, True) * (self._scale / 2)
        return logits_TV.mul_(largest_T1)


def pack_head(head: nn.Module, weight_VC: Tensor) -> PackedHead | None:
    """The packed form of a head, None where it is no plain linear layer, is small, or torch has no such kernel here."""
    if type(head) is not nn.Linear or weight_VC.shape[0] <= CANDIDATES or not _has_kernel():
        return None
    rows, columns = weight_VC.shape
    scale_V, codes_VC = torch.empty(rows), torch.zeros(rows, columns + 2, dtype=torch.int8)
    for some in torch.arange(rows).split(_ROWS):  # a part at a time, as it is wide in fp32
        wide_VC = weight_VC[some].float()
        scale_V[some] = (wide_VC.abs().amax(1) / 127).clamp_min(2.0**-40)
        codes_VC[some, :columns] = (wide_VC / scale_V[some, None]).round_().clamp_(-127, 127).to(torch.int8)
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
        if all(map(_equal, half.split(_ROWS), weight.split(_ROWS))):
            return half
    return weight


def _equal(one: Tensor, two: Tensor) -> bool:
    return torch.equal(one.to(two.dtype), two)


class HalfEmbedding(nn.Module):
    """In place of an nn.Embedding: fp32 rows of a weight in 16 bits."""

    def __init__(self, weight_VC: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_VC, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids].float()
