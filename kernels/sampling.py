"""Draws that can be repeated: which token follows, as a function of logits, a seed and a position. The meaning; in torch.

A draw is the largest of logit / temperature + g, with g = -log(-log u) for a uniform u of each token (Gumbel). That
has the distribution of softmax(logits / temperature) without ever forming it, so a GPU needs one pass over the logits.
u is a function of (seed, position, token): Philox 4x32-10 (Salmon et al. 2011) with the seed as its key and (token, position)
as its counter. Neither the order of the work nor the device nor the neighbours in a batch play a part.

What may be drawn is cut first, by a smallest logit: the `top_k` most likely tokens, of these the fewest whose probabilities
reach `top_p`, and all at least `min_p` times as likely as the most likely one. Tokens with equal logits stay or go together.

Legend: B texts, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUND = (0xD2511F53, 0xCD9E8D57)
_KEY = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def cut(scores_BV: Tensor, top_k_B: Tensor, top_p_B: Tensor, min_p_B: Tensor) -> Tensor:
    """The smallest score [B] that may be drawn, of logits / temperature; 0, 1 and 0 leave all tokens in."""
    sorted_BV = scores_BV.sort(dim=-1, descending=True).values
    vocabulary = scores_BV.shape[1]
    place_V = torch.arange(vocabulary, device=scores_BV.device)
    count_B = torch.where(top_k_B > 0, top_k_B.clamp(max=vocabulary), vocabulary)
    kept_BV = sorted_BV.masked_fill(place_V >= count_B[:, None], -torch.inf)
    p_BV = kept_BV.softmax(-1)
    before_BV = p_BV.cumsum(-1) - p_BV
    enough_B = ((before_BV < top_p_B[:, None]) & (place_V < count_B[:, None])).sum(-1).clamp(min=1)
    lowest_B = sorted_BV.gather(1, enough_B[:, None] - 1)[:, 0]
    return torch.maximum(lowest_B, sorted_BV[:, 0] + min_p_B.log())  # log 0 leaves all in


def philox(seed_B: Tensor, position_B: Tensor, tokens: int) -> Tensor:
    """32 random bits as int64 [B, V]. The products of 64 bits are taken apart as if they had no sign."""
    device = seed_B.device
    c0 = torch.arange(tokens, device=device).expand(len(seed_B), -1)
    c1 = position_B.long()[:, None].expand_as(c0)
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed_B.long()[:, None] & _LOW, seed_B.long()[:, None] >> 32 & _LOW
    for _ in range(10):
        low, high = c0 * _ROUND[0], c2 * _ROUND[1]
        c0, c1, c2, c3 = high >> 32 & _LOW ^ c1 ^ k0, high & _LOW, low >> 32 & _LOW ^ c3 ^ k1, low & _LOW
        k0, k1 = k0 + _KEY[0] & _LOW, k1 + _KEY[1] & _LOW
    return c0


def gumbel(bits: Tensor) -> Tensor:
    """fp32, of the upper 24 of 32 random bits; u lies between 0 and 1 and is neither."""
    u = ((bits >> 8).float() + 0.5) * 2.0**-24
    return -torch.log(-torch.log(u))


def sample(
    logits_BV: Tensor, temperature_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, min_p_B: Tensor, seed_B: Tensor,
    position_B: Tensor,
) -> Tensor:  # fmt: skip
    """int64 [B]. Temperature 0 takes the most likely token, the first of equals."""
    scores_BV = logits_BV.float() / torch.where(temperature_B > 0, temperature_B, 1.0)[:, None]
    noise_BV = gumbel(philox(seed_B, position_B, logits_BV.shape[1]))
    noisy_BV = scores_BV + noise_BV
    kept_BV = noisy_BV.masked_fill(scores_BV < cut(scores_BV, top_k_B, top_p_B, min_p_B)[:, None], -torch.inf)
    return torch.where((temperature_B > 0)[:, None], kept_BV, scores_BV).argmax(-1)
