"""One packer: a little-endian stream of b-bit codes in 32-bit words, along one axis.

compressed-tensors, GPTQ and MLX differ only in the axis, the offset and the zero convention; AWQ permutes columns first.
Checked against their own packers in the tests.
"""

from __future__ import annotations

import numpy as np
import torch


def pack_bits(codes: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """Codes 0..2^b-1 (any integer dtype) to int32 words along `axis`; a last word is filled with zero bits."""
    u = np.moveaxis(codes.numpy(), axis, -1)
    if 32 % bits == 0:  # whole codes per word: shifts are several times faster than single bits
        per_word = 32 // bits
        u = np.pad(u, [(0, 0)] * (u.ndim - 1) + [(0, -u.shape[-1] % per_word)])
        u = u.reshape(*u.shape[:-1], -1, per_word).astype(np.uint32)
        words = np.zeros(u.shape[:-1], np.uint32)
        for i in range(per_word):
            words |= u[..., i] << np.uint32(bits * i)
        words = words.view(np.int32)
    else:
        stream = np.unpackbits(u.astype(np.uint8)[..., None], axis=-1, bitorder="little", count=bits)
        stream = stream.reshape(*u.shape[:-1], -1)
        stream = np.pad(stream, [(0, 0)] * (u.ndim - 1) + [(0, -stream.shape[-1] % 32)])
        words = np.ascontiguousarray(np.packbits(stream, axis=-1, bitorder="little")).view("<i4")
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, -1, axis)))


def unpack_bits(words: torch.Tensor, bits: int, count: int, axis: int) -> torch.Tensor:
    """The first `count` codes along `axis`, uint8: the inverse of `pack_bits`."""
    w = np.ascontiguousarray(np.moveaxis(words.numpy(), axis, -1))
    if 32 % bits == 0:
        u = np.empty((*w.shape, 32 // bits), np.uint8)
        for i in range(32 // bits):
            u[..., i] = (w >> (bits * i)) & (2**bits - 1)
        u = u.reshape(*w.shape[:-1], -1)[..., :count]
    else:
        stream = np.unpackbits(w.view(np.uint8), axis=-1, bitorder="little")[..., : count * bits]
        u = np.packbits(stream.reshape(*w.shape[:-1], count, bits), axis=-1, bitorder="little")[..., 0]
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(u, -1, axis)))
