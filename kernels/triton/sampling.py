"""Drawing a token: one pass over the logits, with the noise made where it is added. See `kernels/sampling.py`.

Each program takes a part of a text's vocabulary and keeps the best token of it; the best of the parts is found by torch,
which is a few numbers. Equal scores go to the first token, within a part and between parts.

Legend: B texts, V vocabulary, S parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infopt.kernels.sampling import cut

PART = 2048
_BLOCK = 1024


@triton.jit
def _best(logits, temperature, lowest, seed, position, values, tokens, V, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    b, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    t = tl.load(temperature + b)
    drawn = t > 0
    t = tl.where(drawn, t, 1.0)
    low = tl.load(lowest + b)
    key, place = tl.load(seed + b), tl.load(position + b).to(tl.int32)
    best = tl.full((), -float("inf"), tl.float32)
    token = tl.full((), 0, tl.int32)
    for step in range(STEPS):
        v = (part * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        score = tl.load(logits + b.to(tl.int64) * V + v, mask=v < V, other=-float("inf")).to(tl.float32)
        score = tl.div_rn(score, t + tl.zeros_like(score))
        none = tl.zeros_like(v)
        bits, _, _, _ = tl.philox(key, v, none + place, none, none)
        u = ((bits >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08
        noisy = score - tl.log(-tl.log(u))
        noisy = tl.where((score >= low) & (v < V), noisy, -float("inf"))
        score = tl.where(drawn, noisy, score)
        most = tl.max(score, axis=0)
        first = tl.min(tl.where(score == most, v, 2147483647), axis=0)
        token = tl.where(most > best, first, token)
        best = tl.maximum(most, best)
    tl.store(values + b * parts + part, best)
    tl.store(tokens + b * parts + part, token)


def sample(
    logits_BV: Tensor, temperature_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, min_p_B: Tensor, seed_B: Tensor,
    position_B: Tensor,
) -> Tensor:  # fmt: skip
    """int64 [B]; see `infopt.kernels.sampling.sample`. Only a cut sorts; where nothing is cut, use `draw`."""
    scores_BV = logits_BV.float() / torch.where(temperature_B > 0, temperature_B, 1.0)[:, None]
    return draw(logits_BV, temperature_B, cut(scores_BV, top_k_B, top_p_B, min_p_B), seed_B, position_B)


def draw(logits_BV: Tensor, temperature_B: Tensor, lowest_B: Tensor, seed_B: Tensor, position_B: Tensor) -> Tensor:
    """int64 [B]: the same for given smallest scores, minus infinity for none."""
    texts, vocabulary = logits_BV.shape
    parts = triton.cdiv(vocabulary, PART)
    values_BS = torch.empty(texts, parts, dtype=torch.float32, device=logits_BV.device)
    tokens_BS = torch.empty(texts, parts, dtype=torch.int32, device=logits_BV.device)
    if texts:
        _best[(texts, parts)](
            logits_BV.contiguous(), temperature_B.float(), lowest_B, seed_B, position_B, values_BS, tokens_BS,
            vocabulary, STEPS=PART // _BLOCK, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return tokens_BS.gather(1, values_BS.argmax(1, keepdim=True))[:, 0].long()
