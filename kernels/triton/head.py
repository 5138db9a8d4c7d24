"""The most likely tokens of an output head, from the stored weight: which they may be is found among rough logits; see
`reference.rescore`.

Two kernels, both of one slice of the vocabulary and one token per program. The first finds the largest lower bound of its
slice. The second, which looks at those of all slices, writes every logit: as it roughly is, or, where its upper bound is not
below all lower bounds, from the stored row, which is read whole. Usually these are a few rows of a hundred thousand, so a
program takes them one by one; a sort for a fixed number of them would take longer than everything here. A head that tells all
tokens apart by less than its rounding is read whole, for each text.

Legend: T tokens, V vocabulary, C width, S slices.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infopt.kernels.reference import ROUGH
from infopt.kernels.triton.numeric import early, wait_for_kernel_before

SLICE = 1024
_COLUMNS = 4096  # of a row at once


@triton.jit
def _dot(one, two, C, BLOCK: tl.constexpr):
    """Of C numbers each, in an order that depends on nothing else."""
    c = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, C, BLOCK):
        inside = start + c < C
        left = tl.load(one + start + c, mask=inside, other=0.0).to(tl.float32)
        sums += left * tl.load(two + start + c, mask=inside, other=0.0).to(tl.float32)
    return tl.sum(sums, axis=0)


@triton.jit
def _bounds(rough, x, margin, bias, t, v, V, C, BIAS: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr):
    """(rough logits of tokens v, how far off they may be)."""
    logit = tl.load(rough + t * V + v, mask=v < V, other=0.0).to(tl.float32)
    length = tl.sqrt(_dot(x + t * C, x + t * C, C, BLOCK))
    off = tl.load(margin + v, mask=v < V, other=0.0) * length + tl.abs(logit) * ROUND
    if BIAS:
        logit += tl.load(bias + v, mask=v < V, other=0.0).to(tl.float32)
    return logit, off


@triton.jit
def _lowest(
    rough, x, margin, bias, lowest, V, C, BIAS: tl.constexpr, ROUND: tl.constexpr, PART: tl.constexpr,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_kernel_before(EARLY)
    part, parts, t = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    v = part * PART + tl.arange(0, PART)
    logit, off = _bounds(rough, x, margin, bias, t, v, V, C, BIAS, ROUND, BLOCK)
    tl.store(lowest + t * parts + part, tl.max(tl.where(v < V, logit - off, -float("inf")), axis=0))


@triton.jit
def _rescore(
    rough, x, weight, margin, bias, lowest, y, V, C, BIAS: tl.constexpr, ROUND: tl.constexpr, PART: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_kernel_before(EARLY)
    part, parts, t = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    v, s = part * PART + tl.arange(0, PART), tl.arange(0, PARTS)
    logit, off = _bounds(rough, x, margin, bias, t, v, V, C, BIAS, ROUND, BLOCK)
    least = tl.max(tl.load(lowest + t * parts + s, mask=s < parts, other=-float("inf")), axis=0)
    likely = (off > 0) & (logit + off >= least)  # it is 0 where the logit is known, as for x of zeros, and beyond V
    one = tl.min(tl.where(likely, v, V), axis=0)
    while one < V:
        exact = _dot(weight + one.to(tl.int64) * C, x + t * C, C, BLOCK)
        if BIAS:
            exact += tl.load(bias + one).to(tl.float32)
        logit = tl.where(v == one, exact, logit)
        one = tl.min(tl.where(likely & (v > one), v, V), axis=0)
    tl.store(y + t * V + v, logit, mask=v < V)


def rescore(
    rough_TV: Tensor, x_TC: Tensor, weight_VC: Tensor, margin_V: Tensor, bias_V: Tensor | None = None
) -> Tensor:
    """logits [T, V], fp32. Deterministic, and the same for a token whatever else is in the batch."""
    rough_TV, x_TC, weight_VC = rough_TV.contiguous(), x_TC.contiguous(), weight_VC.contiguous()
    (tokens, vocabulary), width = rough_TV.shape, x_TC.shape[1]
    parts = triton.cdiv(vocabulary, SLICE)
    lowest_TS = torch.empty(tokens, parts, dtype=torch.float32, device=x_TC.device)
    y_TV = torch.empty(tokens, vocabulary, dtype=torch.float32, device=x_TC.device)
    if tokens:
        bias = margin_V if bias_V is None else bias_V
        launch = {
            "BIAS": bias_V is not None, "ROUND": ROUGH, "PART": SLICE,
            "BLOCK": min(triton.next_power_of_2(width), _COLUMNS), "num_warps": 4, **early(x_TC),
        }  # fmt: skip
        _lowest[(parts, tokens)](rough_TV, x_TC, margin_V, bias, lowest_TS, vocabulary, width, **launch)
        _rescore[(parts, tokens)](
            rough_TV, x_TC, weight_VC, margin_V, bias, lowest_TS, y_TV, vocabulary, width,
            PARTS=triton.next_power_of_2(parts), **launch,
        )  # fmt: skip
    return y_TV
