"""The output head on a processor: all tokens roughly in 8 bits, the likely ones exactly.

For a small model the head is the largest matrix, and reading it is most of the time of a token. What matters of its
answer is the top. So `packed` computes all logits with 8-bit weights (a scale per token of the vocabulary) and rounded
activations, takes the `CANDIDATES` largest (our own kernel also the few that lie between), and computes those again from the
stored weight in fp32. The most likely token, and a draw among so many or fewer, is that of the stored head. For a draw from
all tokens (`fine`) what the activations lost is multiplied too, in a second pass.

The activations have 8 bits and a scale for 32 columns in our own kernel (`kernels/native.py`), and 7 bits and a scale per row
in torch's dynamic one, which stands in where there is no compiler: of SmolLM2's distribution the KL divergence is then 2e-3
without the second pass.

The stored weight stays in the 16 bits that it has in the file where that loses nothing, which also halves the embedding
that is tied to it.

Legend: T tokens, V vocabulary, C width, K candidates.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from infopt.grid import Grid
from infopt.kernels.native import BLOCK, ROUNDED, Native, PackedWeight, native, rescore
from infopt.qtensor import QTensor

CANDIDATES = 128
HEAD_GRID = Grid(8, None, True, torch.float32)
_ROWS = 4096


class PackedHead(nn.Module):
    """In place of a head's nn.Linear: logits [..., V] fp32 of hidden states [..., C]. weight_VC: as `halved` gives it.

    rough: `Ours` or `Torchs`, all logits of x [T, C], roughly or, if `fine`, better."""

    def __init__(self, weight_VC: Tensor, bias_V: Tensor | None, rough: Ours | Torchs) -> None:
        super().__init__()
        self.weight_VC, self.bias_V, self._rough = weight_VC, bias_V, rough
        self.fine = False

    @property
    def packed_bytes(self) -> int:
        """What a token reads: 8 bits of everything."""
        return self.weight_VC.numel()

    @property
    def kernel(self) -> str:
        return self._rough.kernel

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        x_TC = x.reshape(-1, x.shape[-1]).float()
        logits_TV = self._rough(x_TC, self.fine)
        self._rough.rescore(self.weight_VC, x_TC, logits_TV)
        if self.bias_V is not None:
            logits_TV += self.bias_V
        return logits_TV.view(*x.shape[:-1], -1)


class Ours:
    """The logits by the C++ kernel; x is rounded to 8 bits with a scale for 32 columns."""

    kernel = "w8a8"

    def __init__(self, codes_VC: Tensor, scale_V: Tensor, library: Native) -> None:
        zero_V1 = torch.full((len(scale_V), 1), HEAD_GRID.middle, dtype=torch.uint8)
        q = QTensor((codes_VC + HEAD_GRID.middle).to(torch.uint8), scale_V[:, None], zero_V1, HEAD_GRID)
        self._weight = PackedWeight(library, q)

    @staticmethod
    def library(columns: int) -> Native | None:
        return native() if columns % BLOCK == 0 else None

    def __call__(self, x_TC: Tensor, fine: bool) -> Tensor:
        logits_TV = self._weight.multiply(x_TC)
        return logits_TV.add_(self._weight.multiply(x_TC - ROUNDED.round(x_TC))) if fine else logits_TV

    def rescore(self, weight_VC: Tensor, x_TC: Tensor, logits_TV: Tensor) -> None:
        rescore(self._weight.library, weight_VC, x_TC.contiguous(), CANDIDATES, logits_TV)


class Torchs:
    """The logits by torch's kernel for dynamically quantized layers.

    The 8-bit weight has two more columns of zeros: the kernel takes one scale for all rows that it is given; each row is
    divided by its own largest value and gets a 1 and a -1 for these columns, so the scale is always the same and no row
    depends on others.
    """

    kernel = "quantized.linear_dynamic"

    def __init__(self, codes_VC: Tensor, scale_V: Tensor) -> None:
        self._ends_2 = torch.tensor([1.0, -1.0])
        self._scale, self._zero = torch._choose_qparams_per_tensor(self._ends_2, True)
        zero_V = torch.zeros(len(scale_V), dtype=torch.int64)
        wide_VC = nn.functional.pad(codes_VC, (0, 2)).to(torch.int8)
        with warnings.catch_warnings():  # torch announces that these operators may move to another package
            warnings.simplefilter("ignore")
            quantized = torch._make_per_channel_quantized_tensor(wide_VC, scale_V.double(), zero_V, 0)
            self._packed = torch.ops.quantized.linear_prepack(quantized, None)

    def __call__(self, x_TC: Tensor, fine: bool) -> Tensor:
        largest_T1 = x_TC.abs().amax(-1, keepdim=True).clamp_min(2.0**-40)
        rows_TC = torch.cat((x_TC / largest_T1, self._ends_2.expand(len(x_TC), 2)), dim=-1)
        logits_TV = torch.ops.quantized.linear_dynamic(rows_TC, self._packed, True)
        if fine:
            codes_TC = (rows_TC / self._scale).round_().add_(self._zero).clamp_(0, 127)
            lost_TC = rows_TC - (codes_TC - self._zero) * self._scale
            # as large as the rows were, for the same scale; half a step is the most that is lost
            lost_TC = torch.cat((lost_TC[:, :-2] * (2 / self._scale), rows_TC[:, -2:]), dim=-1)
            logits_TV += torch.ops.quantized.linear_dynamic(lost_TC, self._packed, True) * (self._scale / 2)
        return logits_TV.mul_(largest_T1)

    def rescore(self, weight_VC: Tensor, x_TC: Tensor, logits_TV: Tensor) -> None:
        ids_TK = logits_TV.topk(CANDIDATES, sorted=False).indices
        for ids_K, logits_V, x_C in zip(ids_TK.split(1), logits_TV.split(1), x_TC, strict=True):
            weight_KC = weight_VC.index_select(0, ids_K[0])  # several times faster than indexing
            logits_V.scatter_(1, ids_K, (weight_KC.float() @ x_C)[None])


def pack_head(head: nn.Module, weight_VC: Tensor, compiled: bool = True) -> PackedHead | None:
    """The packed form of a head, None where it is no plain linear layer, is small, or there is no kernel for it here.
    compiled: whether the C++ may be used."""
    rows, columns = weight_VC.shape
    library = Ours.library(columns) if compiled else None
    if type(head) is not nn.Linear or rows <= CANDIDATES or not (library or _has_kernel()):
        return None
    scale_V, codes_VC = torch.empty(rows), torch.empty(rows, columns, dtype=torch.int16)
    for some in torch.arange(rows).split(_ROWS):  # a part at a time, as it is wide in fp32
        wide_VC = weight_VC[some].float()
        scale_V[some] = (wide_VC.abs().amax(1) / 127).clamp_min(2.0**-40)
        codes_VC[some] = (wide_VC / scale_V[some, None]).round_().clamp_(-127, 127).to(torch.int16)
    rough = Ours(codes_VC, scale_V, library) if library else Torchs(codes_VC, scale_V)
    return PackedHead(weight_VC, head.bias, rough)


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
