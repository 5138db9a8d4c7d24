"""Attention of one new token per text over a paged cache that stays packed, in splits of each text, and their merge.

Flash decoding (Dao et al. 2023): a text's tokens are cut into splits, each program finds the softmax of one split for all
queries that share a head of keys, and a second kernel puts the splits together by their largest scores and sums. The
queries of a group are the rows of a matrix product, padded to 16.

Codes are never scaled in the loop: a token's scale multiplies its score, or its weight; a channel's scale of a calibration
multiplies the query before the loop, or the result after it. Codes minus a zero point are whole numbers up to 255, which
bf16 and fp16 hold exactly. A byte of two 4-bit values is one even and one odd channel, so there are two products of half
the width and nothing is interleaved.

Legend: B texts, P pages of a text, Hq heads of queries, H heads of keys, D channels of a head, S splits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infopt.kernels.pages import PAGE, Pages
from infopt.kernels.triton.cache import parts
from infopt.kernels.triton.numeric import from_e4m3, tanh

LOG2E = tl.constexpr(1.4426950408889634)
TOKENS = 64  # of one step of a program; a split has a multiple of it
MOST_SPLITS = 64
_FILL = 264  # programs that fill a large GPU: two for each of 132 multiprocessors


@triton.jit
def _values(codes, at, c, n, LAST, zero, KIND: tl.constexpr, HIGH: tl.constexpr, TYPE: tl.constexpr):
    """Codes minus zero point of tokens `at` [N, 1], channels c [1, D], in the type of the product."""
    inside = n & (c < LAST)
    if KIND == "none":
        x = tl.load(codes + at * LAST + c, mask=inside, other=0.0).to(tl.float32)
    else:
        byte = tl.load(codes + at * LAST + c, mask=inside, other=0)
        if KIND == "fp8":
            x = from_e4m3(byte)
        elif KIND == "int8":
            x = byte.to(tl.float32) - zero
        elif HIGH:
            x = (byte >> 4).to(tl.float32) - zero
        else:
            x = (byte & 15).to(tl.float32) - zero
    return x.to(TYPE)


@triton.jit
def _zero(zero, at, c, n, LAST, head_zero, step, KIND: tl.constexpr, OWN: tl.constexpr, ZERO: tl.constexpr):
    """The zero point of tokens [N, 1] or channels [1, D]."""
    z = 128.0 if KIND == "int8" else 8.0
    if ZERO:
        if OWN:
            z = tl.load(zero + at, mask=n, other=0).to(tl.float32)
        else:
            z = tl.load(head_zero + c * step, mask=c < LAST, other=0.0)
    return z


@triton.jit
def _decode(
    q, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, tables, pages, lengths, sums, tops, totals, scaling, P, H, D,
    head_step, step, WINDOW: tl.constexpr, CAP: tl.constexpr, GROUP: tl.constexpr, PAGE_SIZE: tl.constexpr,
    KIND: tl.constexpr, OWN: tl.constexpr, ZERO: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    b, head, split, splits = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    half: tl.constexpr = KIND == "int4"
    more: tl.constexpr = 2 if half else 1  # channels of a byte
    last = D // more
    row = tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    first_query = b.to(tl.int64) * H * GROUP + head * GROUP
    at_q = q + (first_query + row)[:, None] * D + c[None, :] * more
    mask_q = (row < GROUP)[:, None] & (c < last)[None, :]
    q0 = tl.load(at_q, mask=mask_q, other=0.0).to(tl.float32)
    q1 = q0
    if half:
        q1 = tl.load(at_q + 1, mask=mask_q, other=0.0).to(tl.float32)
    if KIND != "none" and not OWN:
        at_scale = k_scale + head * head_step + c * more * step
        q0 *= tl.load(at_scale, mask=c < last, other=0.0)[None, :]
        if half:
            q1 *= tl.load(at_scale + step, mask=c < last, other=0.0)[None, :]
    q0 = q0.to(TYPE)
    q1 = q1.to(TYPE)

    length = tl.load(lengths + b)
    count = tl.load(pages + b)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0) // TOKENS * TOKENS
    steps = tl.cdiv(tl.cdiv(length - first, TOKENS), splits)
    begin = first + split * steps * TOKENS
    end = tl.minimum(begin + steps * TOKENS, length)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sum0 = tl.zeros((ROWS, BLOCK), tl.float32)
    sum1 = sum0
    for start in range(begin, end, TOKENS):
        position = start + tl.arange(0, TOKENS)
        there = position < length
        page = tl.load(tables + b * P + position // PAGE_SIZE % count, mask=there, other=0).to(tl.int64)
        at = (page * PAGE_SIZE + position % PAGE_SIZE) * H + head
        n, a, cc = there[:, None], at[:, None], c[None, :]
        hz = k_zero + head * head_step
        z = _zero(k_zero, a, cc * more, n, D, hz, step, KIND, OWN, ZERO)
        key = _values(k_codes, a, cc, n, last, z, KIND, False, TYPE)
        score = tl.dot(q0, tl.trans(key), input_precision=PRECISION)
        if half:
            z = _zero(k_zero, a, cc * more + 1, n, D, hz, step, KIND, OWN, ZERO)
            key = _values(k_codes, a, cc, n, last, z, KIND, True, TYPE)
            score += tl.dot(q1, tl.trans(key), input_precision=PRECISION)
        score *= scaling
        if OWN:
            score *= tl.load(k_scale + at, mask=there, other=0.0).to(tl.float32)[None, :]
        if CAP > 0:
            score = CAP * tanh(score / CAP)
        seen = there
        if WINDOW > 0:
            seen = seen & (position >= length - WINDOW)
        score = tl.where(seen[None, :], score * LOG2E, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, axis=1))
        weight = tl.exp2(score - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weight, axis=1)
        if OWN:
            weight *= tl.load(v_scale + at, mask=there, other=0.0).to(tl.float32)[None, :]
        weight = weight.to(TYPE)
        hz = v_zero + head * head_step
        z = _zero(v_zero, a, cc * more, n, D, hz, step, KIND, OWN, ZERO)
        value = _values(v_codes, a, cc, n, last, z, KIND, False, TYPE)
        sum0 = sum0 * shrink[:, None] + tl.dot(weight, value, input_precision=PRECISION)
        if half:
            z = _zero(v_zero, a, cc * more + 1, n, D, hz, step, KIND, OWN, ZERO)
            value = _values(v_codes, a, cc, n, last, z, KIND, True, TYPE)
            sum1 = sum1 * shrink[:, None] + tl.dot(weight, value, input_precision=PRECISION)
        top = new_top

    if KIND != "none" and not OWN:
        at_scale = v_scale + head * head_step + c * more * step
        sum0 *= tl.load(at_scale, mask=c < last, other=0.0)[None, :]
        if half:
            sum1 *= tl.load(at_scale + step, mask=c < last, other=0.0)[None, :]
    at_split = (first_query + row) * splits + split
    at_sum = sums + at_split[:, None] * D + c[None, :] * more
    tl.store(at_sum, sum0, mask=mask_q)
    if half:
        tl.store(at_sum + 1, sum1, mask=mask_q)
    tl.store(tops + at_split, top, mask=row < GROUP)
    tl.store(totals + at_split, total, mask=row < GROUP)


@triton.jit
def _merge(sums, tops, totals, y, D, S, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    query = tl.program_id(0).to(tl.int64)
    s, c = tl.arange(0, SPLITS), tl.arange(0, BLOCK)
    tops_S = tl.load(tops + query * S + s, mask=s < S, other=-float("inf"))
    weight_S = tl.exp2(tops_S - tl.max(tops_S, axis=0))  # 0 for a split without tokens
    total = tl.sum(tl.load(totals + query * S + s, mask=s < S, other=0.0) * weight_S, axis=0)
    inside = (s < S)[:, None] & (c < D)[None, :]
    sums_SD = tl.load(sums + (query * S + s)[:, None] * D + c[None, :], mask=inside, other=0.0)
    y_D = tl.sum(sums_SD * weight_S[:, None], axis=0) / total
    tl.store(y + query * D + c, y_D.to(y.dtype.element_ty), mask=c < D)


def paged_decode(
    q_BHD: Tensor, keys: Pages, values: Pages, tables_BP: Tensor, pages_B: Tensor, lengths_B: Tensor, scaling: float,
    window: int | None = None, cap: float | None = None, splits: int | None = None,
) -> Tensor:  # fmt: skip
    """[B, Hq, D] in the dtype of q; see `reference.paged_decode`. splits: of each text, chosen by the size of the tables
    where it is not given, so that it does not change from one token to the next."""
    q_BHD = q_BHD.contiguous()
    texts, queries, width = q_BHD.shape
    y_BHD = torch.empty_like(q_BHD)
    if texts == 0:
        return y_BHD
    count = splits or _splits(texts * keys.heads, tables_BP.shape[1] * PAGE if window is None else window)
    sums = torch.empty(texts, queries, count, width, dtype=torch.float32, device=q_BHD.device)
    tops = torch.empty(texts, queries, count, dtype=torch.float32, device=q_BHD.device)
    totals = torch.empty_like(tops)
    k_scale, k_zero, head_step, step = parts(keys)
    v_scale, v_zero, *_ = parts(values)
    group = queries // keys.heads
    exact = q_BHD.dtype == torch.float32
    _decode[(texts, keys.heads, count)](
        q_BHD, keys.codes, k_scale, k_zero, values.codes, v_scale, v_zero, tables_BP.contiguous(), pages_B, lengths_B,
        sums, tops, totals, scaling, tables_BP.shape[1], keys.heads, width, head_step, step, WINDOW=window or 0,
        CAP=cap or 0.0, GROUP=group, PAGE_SIZE=PAGE, KIND=keys.kind, OWN=keys.own, ZERO=keys.zero is not None,
        TYPE=TYPES[q_BHD.dtype], PRECISION="ieee" if exact else "tf32", ROWS=max(16, triton.next_power_of_2(group)),
        BLOCK=max(16, triton.next_power_of_2(width // (2 if keys.kind == "int4" else 1))),
        TOKENS=32 if exact else TOKENS, num_warps=4, num_stages=2,
    )  # fmt: skip
    _merge[(texts * queries,)](
        sums, tops, totals, y_BHD, width, count, SPLITS=triton.next_power_of_2(count),
        BLOCK=triton.next_power_of_2(width), num_warps=2,
    )  # fmt: skip
    return y_BHD


TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _splits(programs: int, tokens: int) -> int:
    """Enough programs for the GPU, of four steps or more each."""
    return max(1, min(MOST_SPLITS, -(-_FILL // programs), tokens // (4 * TOKENS)))
