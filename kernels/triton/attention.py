"""Attention of many new tokens: tiles of queries over tiles of keys, with the softmax kept up as it goes.

FlashAttention-2 (Dao 2023): memory is that of the result. Causal, grouped heads, an optional sliding window and soft cap.
Plain causal attention is served as well by torch's own kernels on a GPU; the window and the cap are not.

Legend: B texts, Hq heads of queries, H heads of keys, Q queries, K tokens, D channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infopt.kernels.triton.decode import LOG2E, TYPES
from infopt.kernels.triton.numeric import tanh


@triton.jit
def _attention(
    q, k, v, y, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, y_b, y_h, y_t, scaling, HQ, Q, K, D, WINDOW: tl.constexpr,
    CAP: tl.constexpr, GROUP: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    b, h = (tl.program_id(1) // HQ).to(tl.int64), tl.program_id(1) % HQ
    i = tile * QUERIES + tl.arange(0, QUERIES)
    c = tl.arange(0, BLOCK)
    at_q = q + b * q_b + h * q_h + i[:, None].to(tl.int64) * q_t + c[None, :]
    mask_q = (i < Q)[:, None] & (c < D)[None, :]
    q_QD = tl.load(at_q, mask=mask_q, other=0.0).to(tl.float32).to(TYPE)
    k += b * k_b + h // GROUP * k_h
    v += b * v_b + h // GROUP * v_h
    place = i + K - Q  # of each query in the text
    end = tl.minimum(K - Q + (tile + 1) * QUERIES, K)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(K - Q + tile * QUERIES - WINDOW + 1, 0) // KEYS * KEYS
    top = tl.full((QUERIES,), -1e30, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sum_QD = tl.zeros((QUERIES, BLOCK), tl.float32)
    for start in range(begin, end, KEYS):
        j = start + tl.arange(0, KEYS)
        mask_k = (j < K)[:, None] & (c < D)[None, :]
        key = tl.load(k + j[:, None].to(tl.int64) * k_t + c[None, :], mask=mask_k, other=0.0).to(tl.float32).to(TYPE)
        score = tl.dot(q_QD, tl.trans(key), input_precision=PRECISION) * scaling
        if CAP > 0:
            score = CAP * tanh(score / CAP)
        seen = (j[None, :] <= place[:, None]) & (j < K)[None, :]
        if WINDOW > 0:
            seen = seen & (place[:, None] - j[None, :] < WINDOW)
        # not infinite: a row may see nothing of a tile, and what such a row adds is multiplied by 0 by the next tile
        score = tl.where(seen, score * LOG2E, -1e30)
        new_top = tl.maximum(top, tl.max(score, axis=1))
        weight = tl.exp2(score - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weight, axis=1)
        value = tl.load(v + j[:, None].to(tl.int64) * v_t + c[None, :], mask=mask_k, other=0.0).to(tl.float32).to(TYPE)
        sum_QD = sum_QD * shrink[:, None] + tl.dot(weight.to(TYPE), value, input_precision=PRECISION)
        top = new_top
    y_QD = sum_QD / total[:, None]
    at_y = y + b * y_b + h * y_h + i[:, None].to(tl.int64) * y_t + c[None, :]
    tl.store(at_y, y_QD.to(y.dtype.element_ty), mask=mask_q)


def attention(
    q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, scaling: float, window: int | None = None, cap: float | None = None
) -> Tensor:
    """[B, Hq, Q, D] in the dtype of q, laid out as [B, Q, Hq, D]; see `reference.attention`. Any strides of tokens."""
    q_BHQD, k_BHKD, v_BHKD = (x if x.stride(3) == 1 else x.contiguous() for x in (q_BHQD, k_BHKD, v_BHKD))
    texts, heads, queries, width = q_BHQD.shape
    y_BHQD = torch.empty(texts, queries, heads, width, dtype=q_BHQD.dtype, device=q_BHQD.device).transpose(1, 2)
    if y_BHQD.numel() == 0:
        return y_BHQD
    exact = q_BHQD.dtype == torch.float32
    rows = 32 if exact or queries <= 32 else 64 if width > 128 else 128
    strides = [stride for x in (q_BHQD, k_BHKD, v_BHKD, y_BHQD) for stride in x.stride()[:3]]
    _attention[(triton.cdiv(queries, rows), texts * heads)](
        q_BHQD, k_BHKD, v_BHKD, y_BHQD, *strides, scaling, heads, queries, k_BHKD.shape[2], width, WINDOW=window or 0,
        CAP=cap or 0.0, GROUP=heads // k_BHKD.shape[1], TYPE=TYPES[q_BHQD.dtype],
        PRECISION="ieee" if exact else "tf32", QUERIES=rows, KEYS=32 if exact or width > 128 else 64,
        BLOCK=max(16, triton.next_power_of_2(width)), num_warps=4 if rows <= 64 and width <= 128 else 8, num_stages=2,
    )  # fmt: skip
    return y_BHQD
