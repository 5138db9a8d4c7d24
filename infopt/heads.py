"""The heads of one attention, as plain data: which rows of which weights make each head's queries, keys and values.

`infopt.calibration.heads` measures and proves it on the running block; nothing here knows a family's layout, so separate and
fused projections look the same. A projection's bias is kept as one more input column, which is always 1.

Legend: H query heads, G key-value heads, D channels of a head, I input columns and the bias, C hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Part:
    """One of queries, keys, values: for each head, the output channels of `op` that make it, an int64 array [heads, D]."""

    op: str
    channels: np.ndarray


@dataclass(frozen=True)
class Attention:
    """One attention: its parts, the op that reads what they make, and the key-value head that each query head uses.

    turns: the changes of a key head that its query heads can undo, as pairs of its channels. A pair (a, b) is a complex
    number k_a + i k_b that may be multiplied by any other (rotary embeddings turn such pairs and commute with it); (a, a) may
    be multiplied by a real one. None where nothing of the kind holds: a norm lies between the projection and the scores.
    """

    query: Part
    key: Part
    value: Part
    out: str
    group: tuple[int, ...]
    turns: tuple[tuple[int, int], ...] | None = None

    @property
    def kv_heads(self) -> int:
        return len(self.key.channels)

    def queries_of(self, kv_head: int) -> list[int]:
        """The query heads that use this key-value head."""
        return [head for head, used in enumerate(self.group) if used == kv_head]


@dataclass(frozen=True)
class HeadWeights:
    """The weights of an attention by heads: q [H, D, I], k [G, D, I], v [G, D, I] with the bias as last column, and the
    columns of the output projection o [H, C, D]. float64, copies."""

    q_HDI: Tensor
    k_GDI: Tensor
    v_GDI: Tensor
    o_HCD: Tensor


def take(block: nn.Module, attention: Attention) -> HeadWeights:
    """The weights of the block's attention, by heads."""
    o_CX = block.get_submodule(attention.out).get_parameter("weight").detach().double()
    o_HCD = o_CX.view(len(o_CX), len(attention.group), -1).transpose(0, 1).clone()
    return HeadWeights(_read(block, attention.query), _read(block, attention.key), _read(block, attention.value), o_HCD)


@torch.no_grad()
def put(block: nn.Module, attention: Attention, weights: HeadWeights) -> None:
    """Write the weights into the block; ValueError for a bias where the block has none."""
    _write(block, attention.query, weights.q_HDI)
    _write(block, attention.key, weights.k_GDI)
    _write(block, attention.value, weights.v_GDI)
    o_CX = block.get_submodule(attention.out).get_parameter("weight")
    o_CX.copy_(weights.o_HCD.transpose(0, 1).reshape(o_CX.shape))


def turned(rows_XDI: Tensor, turns: tuple[tuple[int, int], ...], factor_XF: Tensor) -> Tensor:
    """The rows [..., D, I] with each of their pairs, as complex numbers, multiplied by its complex factor [..., F]."""
    a_F, b_F = torch.tensor(turns).T
    real, imag = factor_XF.real[..., None].to(rows_XDI.dtype), factor_XF.imag[..., None].to(rows_XDI.dtype)
    at_a, at_b = rows_XDI[..., a_F, :], rows_XDI[..., b_F, :]
    out = rows_XDI.clone()
    out[..., b_F, :] = imag * at_a + real * at_b
    single = (a_F == b_F)[:, None]
    out[..., a_F, :] = torch.where(single, real * at_a, real * at_a - imag * at_b)
    return out


def _read(block: nn.Module, part: Part) -> Tensor:
    module = block.get_submodule(part.op)
    rows = torch.from_numpy(part.channels)
    w_OI = module.get_parameter("weight").detach().double()
    bias = dict(module.named_parameters(recurse=False)).get("bias")
    b_O = torch.zeros(len(w_OI), dtype=torch.float64) if bias is None else bias.detach().double()
    return torch.cat([w_OI, b_O[:, None]], 1)[rows]


def _write(block: nn.Module, part: Part, rows_XDI: Tensor) -> None:
    module = block.get_submodule(part.op)
    channels = torch.from_numpy(part.channels).reshape(-1)
    flat = rows_XDI.reshape(len(channels), -1)
    weight = module.get_parameter("weight")
    weight[channels] = flat[:, :-1].to(weight.dtype)
    bias = dict(module.named_parameters(recurse=False)).get("bias")
    if bias is not None:
        bias[channels] = flat[:, -1].to(bias.dtype)
    elif bool(flat[:, -1].any()):
        raise ValueError(f"{part.op} has no bias")
