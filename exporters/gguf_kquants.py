"""GGUF's K-quants: weights rounded to Q4_K or Q6_K, since no other format's codes fit them.

A block has 256 weights of one row, and its sub-blocks' own scales are integers (ggml, `block_q4_K` and `block_q6_K`):

    Q4_K   f16 d, f16 dmin, 12 bytes of eight 6-bit scales and mins, 128 bytes of codes   w = d sc q - dmin m
    Q6_K   128 + 64 bytes of low and high bits, sixteen signed 8-bit scales, f16 d         w = d sc (q - 32)

A sub-block's scale (and min) is the best of a few around max|w| by weighted squares, refitted by least squares for the codes
that it gives, as llama.cpp does; weights are |w| plus their root mean square for Q4_K and w^2 for Q6_K. Codes are chosen
last, against the scales as they are stored. Rows that are no multiple of 256 fall back to blocks of 32, as in llama.cpp.

Legend: O rows, B blocks of a row, S sub-blocks, K weights of one, X candidates.
"""

from __future__ import annotations

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType

SUPER = 256
KQUANTS = {"gguf_q4_k": GGMLQuantizationType.Q4_K, "gguf_q6_k": GGMLQuantizationType.Q6_K}
_FALLBACK = {GGMLQuantizationType.Q4_K: GGMLQuantizationType.Q5_0, GGMLQuantizationType.Q6_K: GGMLQuantizationType.Q8_0}
_ROWS = 256  # rounded at a time, which bounds the memory of the candidates


def fitting(kind: GGMLQuantizationType, columns: int) -> GGMLQuantizationType | None:
    """The type for rows of so many columns: `kind`, what stands in for it, or None where not even that fits."""
    if columns % SUPER == 0:
        return kind
    return _FALLBACK[kind] if columns % 32 == 0 else None


def round_blocks(w_OI: torch.Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """uint8 [O, bytes of a row]: w rounded to the type that `fitting` gave."""
    if kind in _FALLBACK.values():
        return gguf.quantize(np.ascontiguousarray(w_OI.float().numpy()), kind)
    encode = _q4_k if kind is GGMLQuantizationType.Q4_K else _q6_k
    parts = [encode(part.float().unflatten(1, (-1, SUPER))).flatten(1) for part in w_OI.split(_ROWS)]
    return torch.cat(parts).numpy()


def _q4_k(w_OBI: torch.Tensor) -> torch.Tensor:
    """uint8 [O, B, 144]."""
    w_OBSK = w_OBI.unflatten(2, (8, 32))
    scale_OBS, low_OBS = _best_affine(w_OBSK)
    d_OB, dmin_OB = (_half(part.amax(2) / 63) for part in (scale_OBS, low_OBS))
    sc_OBS, m_OBS = (_divide(part, unit) for part, unit in ((scale_OBS, d_OB), (low_OBS, dmin_OB)))
    step, low = (d_OB[..., None] * sc_OBS)[..., None], (dmin_OB[..., None] * m_OBS)[..., None]
    q_OBSK = torch.where(step > 0, ((w_OBSK + low) / step).round(), 0).clamp(0, 15).to(torch.uint8)
    sc, m = sc_OBS.to(torch.uint8), m_OBS.to(torch.uint8)
    six = [
        sc[..., :4] | (sc[..., 4:] >> 4) << 6,
        m[..., :4] | (m[..., 4:] >> 4) << 6,
        sc[..., 4:] & 15 | (m[..., 4:] & 15) << 4,
    ]
    nibbles = q_OBSK[..., 0::2, :] | q_OBSK[..., 1::2, :] << 4
    return torch.cat([_bytes(d_OB), _bytes(dmin_OB), *six, nibbles.flatten(2)], dim=2)


def _best_affine(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, low) [...], both >= 0, of w ~ scale q - low with q in 0..15."""
    weight = w.abs() + w.square().mean(-1, keepdim=True).sqrt()
    low, high = w.amin(-1).clamp_max(0), w.amax(-1).clamp_min(0)
    span = (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    best_scale, best_low = span / 15, -low
    best = _error(w, weight, best_scale, best_low)
    for tenth in range(-10, 11):
        q = ((w - low[..., None]) * ((15 + tenth / 10) / span)[..., None]).round().clamp(0, 15)
        scale, offset = _least_squares(w, weight, q)
        error = _error(w, weight, scale, offset)
        better = error < best
        best, best_scale = torch.where(better, error, best), torch.where(better, scale, best_scale)
        best_low = torch.where(better, offset, best_low)
    return best_scale, best_low


def _least_squares(w: torch.Tensor, weight: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The (scale, low) that minimise sum weight (scale q - low - w)^2 with low >= 0."""
    total, first, second = weight.sum(-1), (weight * q).sum(-1), (weight * q * q).sum(-1)
    values, mixed = (weight * w).sum(-1), (weight * q * w).sum(-1)
    determinant = (total * second - first * first).clamp_min(torch.finfo(torch.float32).tiny)
    scale, low = (total * mixed - first * values) / determinant, (first * mixed - second * values) / determinant
    alone = mixed / second.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(low < 0, alone, scale).clamp_min(0), low.clamp_min(0)


def _error(w: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    step = scale[..., None].clamp_min(torch.finfo(torch.float32).tiny)
    q = ((w + low[..., None]) / step).round().clamp(0, 15)
    return (weight * (scale[..., None] * q - low[..., None] - w).square()).sum(-1)


def _q6_k(w_OBI: torch.Tensor) -> torch.Tensor:
    """uint8 [O, B, 210]."""
    w_OBSK = w_OBI.unflatten(2, (16, 16))
    scale_OBS = _best_symmetric(w_OBSK)
    largest = scale_OBS.gather(2, scale_OBS.abs().argmax(2, keepdim=True))[..., 0]
    d_OB = _half(largest / -128)
    sc_OBS = torch.where(d_OB[..., None] == 0, 0, scale_OBS / d_OB[..., None]).round().clamp(-128, 127)
    step = (d_OB[..., None] * sc_OBS)[..., None]
    q = (torch.where(step == 0, 0, w_OBSK / step).round().clamp(-32, 31) + 32).to(torch.uint8)
    q_OBH4K = q.flatten(2).unflatten(2, (2, 4, 32))  # halves, quarters, 32 weights
    low, high = q_OBH4K & 15, q_OBH4K >> 4
    ql = torch.stack([low[..., 0, :] | low[..., 2, :] << 4, low[..., 1, :] | low[..., 3, :] << 4], dim=3)
    qh = high[..., 0, :] | high[..., 1, :] << 2 | high[..., 2, :] << 4 | high[..., 3, :] << 6
    return torch.cat([ql.flatten(2), qh.flatten(2), sc_OBS.to(torch.int8).view(torch.uint8), _bytes(d_OB)], dim=2)


def _best_symmetric(w: torch.Tensor) -> torch.Tensor:
    """The scale [...] of w ~ scale q with q in -32..31; its sign puts the largest weight on -32."""
    weight = w.square()
    largest = w.gather(-1, w.abs().argmax(-1, keepdim=True))
    safe = torch.where(largest == 0, 1, largest)
    best, found = torch.full(w.shape[:-1], -1.0), torch.zeros(w.shape[:-1])
    for tenth in range(-9, 10):
        q = (w * (-(32 + tenth / 10) / safe)).round().clamp(-32, 31)
        mixed, second = (weight * w * q).sum(-1), (weight * q * q).sum(-1)
        gain = torch.where(second > 0, mixed.square() / second.clamp_min(torch.finfo(torch.float32).tiny), 0)
        scale = torch.where(second > 0, mixed / second.clamp_min(torch.finfo(torch.float32).tiny), 0)
        best, found = torch.where(gain > best, gain, best), torch.where(gain > best, scale, found)
    return found


def _divide(part_OBS: torch.Tensor, unit_OB: torch.Tensor) -> torch.Tensor:
    return torch.where(unit_OB[..., None] > 0, part_OBS / unit_OB[..., None], 0).round().clamp(0, 63)


def _half(values: torch.Tensor) -> torch.Tensor:
    """Rounded to the float16 that is stored, fp32; the largest where it would overflow."""
    return values.clamp(-65504, 65504).half().float()


def _bytes(values_OB: torch.Tensor) -> torch.Tensor:
    return values_OB.half()[..., None].contiguous().view(torch.uint8)
