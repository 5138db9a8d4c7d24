"""Attention of one new token per text over a paged cache that stays packed, in splits of each text, and their merge.

Flash decoding (Dao et al. 2023): a text's tokens are cut into splits, each program finds the softmax of one split for all
queries that share a head of keys, and a second kernel puts the splits together by their largest scores and sums. The
queries of a group are the rows of a matrix product, padded to 16.

Codes are never scaled in the loop: a token's scale multiplies its score, or its weight; a channel's scale of a calibration
multiplies the query before the loop, or the result after it. Nor do they meet their zero points: what is multiplied is a
code's distance from the middle of the grid, a whole number that bf16 and fp16 hold exactly, and what a zero point is away
from the middle, times the query or times the weights, is taken from the score or the sum. A byte of two 4-bit values is one
even and one odd channel, so there are two products of half the width and nothing is interleaved.

Legend: B texts, P pages of a text, Hq heads of queries, H heads of keys, D channels of a head, S splits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infopt.kernels.pages import PAGE, Pages
from infopt.kernels.triton.cache import parts
from infopt.kernels.triton.numeric import early, from_e4m3, tanh, to_bf16, wait_for_kernel_before

LOG2E = tl.constexpr(1.4426950408889634)
TOKENS = 128  # of one step of a program; a split has a multiple of it
MOST_SPLITS = 64
_FILL = 384  # programs that a large GPU runs at once: nearly three on each of 132 multiprocessors


@triton.jit
def _whole(codes, at, c, n, LAST, KIND: tl.constexpr, HIGH: tl.constexpr, TYPE: tl.constexpr, PAIRS: tl.constexpr):
    """What channels c [1, D] of the heads that begin at `at` [N, 1] have stored, in the type of the product: whole codes as
    their distance from the middle of the grid, E4M3 and floats as they are."""
    inside = n & (c < LAST)
    if KIND == "none":
        x = tl.load(codes + at + c, mask=inside, other=0.0)
        if codes.dtype.element_ty != TYPE:
            x = x.to(tl.float32).to(TYPE)
    else:
        byte = tl.load(codes + at + c, mask=inside, other=0)
        if PAIRS:
            x = to_bf16(byte, KIND, HIGH)
        elif KIND == "fp8":
            x = from_e4m3(byte).to(TYPE)
        elif KIND == "int8":
            x = (byte.to(tl.float32) - 128.0).to(TYPE)
        elif HIGH:
            x = ((byte >> 4).to(tl.float32) - 8.0).to(TYPE)
        else:
            x = ((byte & 15).to(tl.float32) - 8.0).to(TYPE)
    return x


@triton.jit
def _decode(
    q, k_codes, k_scale, k_zero, v_codes, v_scale, v_zero, tables, pages, lengths, sums, tops, totals, scaling, P, H, D,
    head_step, step, WINDOW: tl.constexpr, CAP: tl.constexpr, GROUP: tl.constexpr, PAGE_SIZE: tl.constexpr,
    KIND: tl.constexpr, OWN: tl.constexpr, ZERO: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    PAIRS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_kernel_before(EARLY)
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
    middle: tl.constexpr = 8.0 if half else 128.0
    from_zero = tl.zeros((ROWS,), tl.float32)  # what a zero point, or its distance from the middle, adds to a score
    if ZERO:
        z0, z1 = 1.0, 1.0
        if not OWN:
            at_zero = k_zero + head * head_step + c * more * step
            z0 = (tl.load(at_zero, mask=c < last, other=middle) - middle)[None, :]
            if half:
                z1 = (tl.load(at_zero + step, mask=c < last, other=middle) - middle)[None, :]
        from_zero = tl.sum(q0.to(tl.float32) * z0, axis=1)
        if half:
            from_zero += tl.sum(q1.to(tl.float32) * z1, axis=1)

    k_codes += head * last
    v_codes += head * last
    if OWN:
        k_scale += head
        v_scale += head
        if ZERO:
            k_zero += head
            v_zero += head
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
    below = tl.zeros((ROWS,), tl.float32)  # what zero points take from each sum, or the weights that they have
    for start in range(begin, end, TOKENS):
        position = start + tl.arange(0, TOKENS)
        there = position < length
        place = position // PAGE_SIZE
        if WINDOW > 0:  # a ring
            place = place % count
        slot = tl.load(tables + b * P + place, mask=there, other=0).to(tl.int32) * PAGE_SIZE + position % PAGE_SIZE
        at = slot.to(tl.int64) * H
        n, a, cc = there[:, None], slot.to(tl.int64)[:, None] * (H * last), c[None, :]
        score = tl.dot(
            q0, tl.trans(_whole(k_codes, a, cc, n, last, KIND, False, TYPE, PAIRS)), input_precision=PRECISION
        )
        if half:
            key = _whole(k_codes, a, cc, n, last, KIND, True, TYPE, PAIRS)
            score = tl.dot(q1, tl.trans(key), score, input_precision=PRECISION)
        if ZERO and OWN:
            score -= from_zero[:, None] * (tl.load(k_zero + at, mask=there, other=0).to(tl.float32) - middle)[None, :]
        elif ZERO:
            score -= from_zero[:, None]
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
        if ZERO:
            w = weight.to(tl.float32)
            if OWN:
                w *= (tl.load(v_zero + at, mask=there, other=0).to(tl.float32) - middle)[None, :]
            below = below * shrink + tl.sum(w, axis=1)
        value = _whole(v_codes, a, cc, n, last, KIND, False, TYPE, PAIRS)
        sum0 = tl.dot(weight, value, sum0 * shrink[:, None], input_precision=PRECISION)
        if half:
            value = _whole(v_codes, a, cc, n, last, KIND, True, TYPE, PAIRS)
            sum1 = tl.dot(weight, value, sum1 * shrink[:, None], input_precision=PRECISION)
        top = new_top

    if ZERO:
        z0, z1 = 1.0, 1.0
        if not OWN:
            at_zero = v_zero + head * head_step + c * more * step
            z0 = (tl.load(at_zero, mask=c < last, other=middle) - middle)[None, :]
            if half:
                z1 = (tl.load(at_zero + step, mask=c < last, other=middle) - middle)[None, :]
        sum0 -= below[:, None] * z0
        sum1 -= below[:, None] * z1
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
def _merge(sums, tops, totals, y, D, S, SPLITS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    wait_for_kernel_before(EARLY)
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
        TYPE=TYPES[q_BHD.dtype], PRECISION="ieee" if exact else "tf32",
        PAIRS=keys.kind != "none" and q_BHD.dtype == torch.bfloat16 and not q_BHD.is_cpu,
        ROWS=max(16, triton.next_power_of_2(group)),
        BLOCK=max(16, triton.next_power_of_2(width // (2 if keys.kind == "int4" else 1))),
        TOKENS=32 if exact else TOKENS if width <= 128 else TOKENS // 2, num_warps=4,
        num_stages=3 if width <= 128 and not exact else 2, **early(q_BHD),
    )  # fmt: skip
    _merge[(texts * queries,)](
        sums, tops, totals, y_BHD, width, count, SPLITS=triton.next_power_of_2(count),
        BLOCK=triton.next_power_of_2(width), num_warps=2, **early(q_BHD),
    )  # fmt: skip
    return y_BHD


TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _splits(programs: int, tokens: int) -> int:
    """As many programs as the GPU runs at once, of a step or more each."""
    return max(1, min(MOST_SPLITS, _FILL // programs, tokens // TOKENS))
