"""The output head: all tokens roughly in 8 bits, the likely ones exactly.

For a small model the head is the largest matrix, and reading it is most of the time of a token; for one of 8B parameters in 4
bits it is a fifth. What matters of its answer is the top. So `packed` computes all logits with 8-bit weights (a scale per token
of the vocabulary), and those that count again from the stored weight in fp32.

A processor rounds activations too. It takes the `CANDIDATES` largest (our own kernel also the few that lie between): the most
likely token, and a draw among so many or fewer, is that of the stored head. For a draw from all tokens (`fine`) what the
activations lost is multiplied too, in a second pass. The activations have 8 bits and a scale for 32 columns in our own kernel
(`kernels/native.py`), and 7 bits and a scale per row in torch's dynamic one, which stands in where there is no compiler: of
SmolLM2's distribution the KL divergence is then 2e-3 without the second pass.

A GPU leaves activations in bf16, and takes those that the rounding of weights may have put behind another, a handful: the
most likely token is that of the stored head; see `Cuda` and `reference.rescore`. All others, which a draw may want, stay as 8
bits and their rounding to bf16 have them. A smaller head is multiplied in the 16 bits that are stored (`Half`).

The stored weight stays in the 16 bits that it has in the file where that loses nothing, which also halves the embedding
that is tied to it.

Legend: T tokens, V vocabulary, C width, K candidates.
"""

from __future__ import annotations

import warnings
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infopt.errors import Unsupported
from infopt.grid import Grid
from infopt.kernels import operators
from infopt.kernels.cuda.decode import MOST_TOKENS
from infopt.kernels.cuda.linear import CudaLinear
from infopt.kernels.native import BLOCK, ROUNDED, Native, PackedWeight, native, rescore
from infopt.qtensor import QTensor

CANDIDATES = 128
HEAD_GRID = Grid(8, None, True, torch.float32)
#: Weights of a head that is packed on a GPU. Below, two more kernels take longer than half of the bytes; and the 8 bits lie
#: beside the 16.
LEAST_ON_GPU = 2**26
#: Of 8 bits from 16, relative to all logits of random tokens.
TOLERANCE = 5e-2
_ROWS = 4096


class PackedHead(nn.Module):
    """In place of a head's nn.Linear: logits [..., V] fp32 of hidden states [..., C]. weight_VC: as `halved` gives it.

    logits: how they are made of the same weight."""

    def __init__(self, weight_VC: Tensor, bias_V: Tensor | None, logits: Ours | Torchs | Cuda | Half) -> None:
        super().__init__()
        self.weight_VC, self.bias_V, self._logits = weight_VC, bias_V, logits
        self.fine = False

    @property
    def packed_bytes(self) -> int:
        """What a token reads: the 8 bits of everything, or what is stored."""
        return self.weight_VC.nbytes if isinstance(self._logits, Half) else self.weight_VC.numel()

    @property
    def kernel(self) -> str:
        return self._logits.kernel

    @property
    def linear(self) -> CudaLinear | None:
        """What a GPU multiplies with."""
        return self._logits.linear if isinstance(self._logits, Cuda) else None

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        logits_TV = self._logits(x.reshape(-1, x.shape[-1]), self.weight_VC, self.bias_V, self.fine)
        return logits_TV.view(*x.shape[:-1], -1)


class Ours:
    """The logits by the C++ kernel; x is rounded to 8 bits with a scale for 32 columns."""

    kernel = "w8a8"

    def __init__(self, q: QTensor, library: Native) -> None:
        self._weight = PackedWeight(library, q)

    @staticmethod
    def library(columns: int) -> Native | None:
        return native() if columns % BLOCK == 0 else None

    def __call__(self, x_TC: Tensor, weight_VC: Tensor, bias_V: Tensor | None, fine: bool) -> Tensor:
        x_TC = x_TC.float().contiguous()
        logits_TV = self._weight.multiply(x_TC)
        if fine:
            logits_TV.add_(self._weight.multiply(x_TC - ROUNDED.round(x_TC)))
        rescore(self._weight.library, weight_VC, x_TC, CANDIDATES, logits_TV)
        return logits_TV if bias_V is None else logits_TV.add_(bias_V)


class Torchs:
    """The logits by torch's kernel for dynamically quantized layers.

    The 8-bit weight has two more columns of zeros: the kernel takes one scale for all rows that it is given; each row is
    divided by its own largest value and gets a 1 and a -1 for these columns, so the scale is always the same and no row
    depends on others.
    """

    kernel = "quantized.linear_dynamic"

    def __init__(self, q: QTensor) -> None:
        self._ends_2 = torch.tensor([1.0, -1.0])
        self._scale, self._zero = torch._choose_qparams_per_tensor(self._ends_2, True)
        zero_V = torch.zeros(len(q.codes), dtype=torch.int64)
        wide_VC = F.pad((q.codes ^ HEAD_GRID.middle).view(torch.int8), (0, 2))  # minus the middle
        with warnings.catch_warnings():  # torch announces that these operators may move to another package
            warnings.simplefilter("ignore")
            quantized = torch._make_per_channel_quantized_tensor(wide_VC, q.scale[:, 0].double(), zero_V, 0)
            self._packed = torch.ops.quantized.linear_prepack(quantized, None)

    def __call__(self, x_TC: Tensor, weight_VC: Tensor, bias_V: Tensor | None, fine: bool) -> Tensor:
        x_TC = x_TC.float()
        largest_T1 = x_TC.abs().amax(-1, keepdim=True).clamp_min(2.0**-40)
        rows_TC = torch.cat((x_TC / largest_T1, self._ends_2.expand(len(x_TC), 2)), dim=-1)
        logits_TV = torch.ops.quantized.linear_dynamic(rows_TC, self._packed, True)
        if fine:
            codes_TC = (rows_TC / self._scale).round_().add_(self._zero).clamp_(0, 127)
            lost_TC = rows_TC - (codes_TC - self._zero) * self._scale
            # as large as the rows were, for the same scale; half a step is the most that is lost
            lost_TC = torch.cat((lost_TC[:, :-2] * (2 / self._scale), rows_TC[:, -2:]), dim=-1)
            logits_TV += torch.ops.quantized.linear_dynamic(lost_TC, self._packed, True) * (self._scale / 2)
        logits_TV.mul_(largest_T1)
        ids_TK = logits_TV.topk(CANDIDATES, sorted=False).indices
        for ids_K, logits_V, x_C in zip(ids_TK.split(1), logits_TV.split(1), x_TC, strict=True):
            weight_KC = weight_VC.index_select(0, ids_K[0])  # several times faster than indexing
            logits_V.scatter_(1, ids_K, (weight_KC.float() @ x_C)[None])
        return logits_TV if bias_V is None else logits_TV.add_(bias_V)


class Half:
    """The logits by torch's product in the 16 bits that are stored. What its rounding could have put before another is computed
    again, so the most likely token does not depend on the batch."""

    def __init__(self, weight_VC: Tensor) -> None:
        self.kernel = str(weight_VC.dtype).removeprefix("torch.")
        self._margin_V = torch.zeros(len(weight_VC), device=weight_VC.device)

    def __call__(self, x_TC: Tensor, weight_VC: Tensor, bias_V: Tensor | None, fine: bool) -> Tensor:
        x_TC = x_TC.to(weight_VC.dtype)
        return operators.rescore(F.linear(x_TC, weight_VC), x_TC, weight_VC, self._margin_V, bias_V)


class Cuda:
    """The logits on a GPU, of a weight in 8 bits and x in bf16, rounded to bf16; `fine` changes nothing.

    How far the rounding of a row put it off, e, is known. Scales by least squares leave nothing of e along the row, along
    which an x with a large logit lies, and to what is left x is as good as random: a logit is off by a number whose standard
    deviation is |e| |x| / sqrt(C), and by more than six of these once in 5e8. Where it is, the token may be another one.
    """

    def __init__(self, linear: CudaLinear, off_V: Tensor, half: Half) -> None:
        self.linear, self._half = linear, half
        self._margin_V = off_V * (6 / linear.packed.shape[1] ** 0.5)

    @classmethod
    def of(cls, weight_VC: Tensor) -> Cuda | None:
        """None where the kernel does not read such a weight, or, as a few tokens show, gives something else."""
        q, off_V = _rounded(weight_VC)
        linear, half = CudaLinear.of(q), Half(weight_VC)
        if linear is None:
            return None
        made, generator = cls(linear, off_V, half), torch.Generator().manual_seed(0)
        x_TC = torch.randn(4, weight_VC.shape[1], generator=generator).to(weight_VC.device)
        wanted_TV = half(x_TC, weight_VC, None, False)
        found = linear(x_TC.to(torch.bfloat16)), made(x_TC, weight_VC, None, False)
        same = (bool((logits_TV - wanted_TV).norm() < TOLERANCE * wanted_TV.norm()) for logits_TV in found)
        return made if all(same) else None

    @property
    def kernel(self) -> str:
        return self.linear.kernel

    def __call__(self, x_TC: Tensor, weight_VC: Tensor, bias_V: Tensor | None, fine: bool) -> Tensor:
        if len(x_TC) > MOST_TOKENS:  # for which the kernel would first write its weight out in 16 bits
            return self._half(x_TC, weight_VC, bias_V, fine)
        x_TC = x_TC.to(torch.bfloat16)
        return operators.rescore(self.linear(x_TC), x_TC, weight_VC, self._margin_V, bias_V)


def pack_head(head: nn.Linear, weight_VC: Tensor, compiled: bool = True) -> PackedHead | None:
    """The packed form of a head; on a processor None where it is small, or there is no kernel for it here. compiled: whether
    the C++ may be used."""
    logits: Ours | Torchs | Cuda | Half | None = None
    if weight_VC.device.type != "cpu":
        with suppress(Unsupported):
            logits = Cuda.of(weight_VC) if weight_VC.numel() >= LEAST_ON_GPU else None
        logits = logits or Half(weight_VC)
    elif len(weight_VC) > CANDIDATES:
        library = Ours.library(weight_VC.shape[1]) if compiled else None
        if library or _has_kernel():
            q, _ = _rounded(weight_VC)
            logits = Ours(q, library) if library else Torchs(q)
    return None if logits is None else PackedHead(weight_VC, head.bias, logits)


def _rounded(weight_VC: Tensor) -> tuple[QTensor, Tensor]:
    """(the weight in 8 bits, its scales by least squares; how far each row is off [V])."""
    scale_V1, off_V = (torch.empty(shape, device=weight_VC.device) for shape in ((len(weight_VC), 1), len(weight_VC)))
    codes_VC = torch.empty_like(weight_VC, dtype=torch.uint8)
    for first in range(0, len(weight_VC), _ROWS):  # a part at a time, as it is wide in fp32
        some = slice(first, first + _ROWS)
        wide_VC = weight_VC[some].float()
        step_V1 = (wide_VC.abs().amax(1, keepdim=True) / 127).clamp_min(2.0**-40)
        steps_VC = (wide_VC / step_V1).round_().clamp_(-127, 127)
        scale_V1[some] = (wide_VC * steps_VC).sum(1, keepdim=True) / steps_VC.square().sum(1, keepdim=True).clamp_min_(
            1.0
        )
        scale_V1[some] = scale_V1[some].clamp_min(2.0**-40)
        off_V[some] = (wide_VC - steps_VC * scale_V1[some]).norm(dim=1)
        codes_VC[some] = steps_VC.add_(HEAD_GRID.middle).to(torch.uint8)
    zero_V1 = torch.full_like(scale_V1, HEAD_GRID.middle, dtype=torch.uint8)
    return QTensor(codes_VC, scale_V1, zero_V1, HEAD_GRID), off_V


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
