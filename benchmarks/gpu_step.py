"""A row of `gpu_check.py`: a decoding step of a model of the size of Llama 3 8B, in 4 bits beside the same in bf16.

The head has 8 bits beside 4. Weights are random, and four blocks' are read in turns: more than any cache holds, and less
than the memory of a whole model.

Legend: B texts, K tokens of a text, C width, D channels of a head.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from gpu_ops import BFLOAT, CUDA_SOURCES, LAYERS, Call, Case, Contender, Op, Problem, problems_of
from gpu_triton_ops import EPS, HEADS, Texts, cached, cloned, no_flops, random, source, texts
from torch import Tensor

from infopt.grid import Grid
from infopt.kernels import reference
from infopt.kernels.cuda import decode as cuda_decode
from infopt.kernels.cuda.layout import Packed, pack
from infopt.kernels.pages import PAGE, Pages
from infopt.runtime.head import Cuda, PackedHead


@dataclass(frozen=True)
class Model:
    """`layers` blocks, in turns of those whose weights are given; a head in bf16; texts with a cache in bf16."""

    blocks: list[list[Problem]]
    layers: int
    head: Tensor
    texts: Texts
    angles: tuple[Tensor, Tensor]
    weight_C: Tensor


def _model(case: Case, generator: torch.Generator) -> Model:
    layers, distinct, vocabulary, context, (queries, heads, width), shapes = case.sizes
    make = problems_of(Grid(4, 128, True, BFLOAT), BFLOAT)
    blocks = [make(Case("", case.tokens, shapes), generator) for _ in range(distinct)]
    own = texts("bf16")(Case("", case.tokens, (context, queries, heads, width)), generator)
    columns, device = shapes[0][1], generator.device
    angle = torch.rand(case.tokens, width // 2, generator=generator, device=device).repeat(1, 2)
    head = random(generator, vocabulary, columns) * columns**-0.5
    return Model(blocks, layers, head, own, (angle.cos(), angle.sin()), 1 + 0.1 * random(generator, columns))


Multiply = Callable[[int, int, Tensor], Tensor]  # which block, which layer of it


def _step(m: Model, multiply: Multiply, ops: Any, keys: Pages, values: Pages) -> list[Tensor]:
    """One token of each text; ops: `add_rms_norm`, `rope_write`, `paged_decode`, `gated`, head. Weights are so random that
    each layer's answer is scaled to the size of the stream."""
    t, (cos, sin) = m.texts, m.angles
    x = m.blocks[0][0].x_TI
    h = torch.zeros_like(x)
    slots = t.tables[torch.arange(len(x), device=x.device), (t.lengths - 1) // PAGE] * PAGE + (t.lengths - 1) % PAGE
    heads = t.q_BHD.shape[1] + 2 * keys.heads
    for layer in range(m.layers):
        block = layer % len(m.blocks)
        y, h = ops.norm(x, h, m.weight_C)
        qkv = multiply(block, 0, y).view(len(x), heads, t.q_BHD.shape[2])
        q = ops.rope_write(qkv, cos, sin, slots, keys, values)
        x = multiply(block, 1, ops.attend(q, keys, values).flatten(1))
        y, h = ops.norm(x, h, m.weight_C)
        x = multiply(block, 3, ops.gated(lambda y=y, block=block: multiply(block, 2, y)))
    return [ops.head(ops.norm(x, h, m.weight_C)[0])]


@dataclass(frozen=True)
class Ops:
    norm: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    rope_write: Callable[..., Tensor]
    attend: Callable[[Tensor, Pages, Pages], Tensor]
    gated: Callable[[Callable[[], Tensor]], Tensor]  # of what a block's third layer gives
    head: Callable[[Tensor], Tensor]


def _triton_ops(m: Model) -> Ops:
    from infopt.kernels.triton import cache, decode, rows

    t = m.texts
    pages, scaling = torch.full_like(t.lengths, t.tables.shape[1]), t.q_BHD.shape[2] ** -0.5

    def norm(x: Tensor, h: Tensor, weight_C: Tensor) -> tuple[Tensor, Tensor]:
        y, _, h = rows.add_rms_norm(x, h, weight_C, EPS)
        return y, h

    return Ops(
        norm,
        lambda qkv, cos, sin, slots, keys, values: cache.rope_write(
            qkv, cos, sin, None, None, 0.0, slots, keys, values
        ),
        lambda q, keys, values: decode.paged_decode(q, keys, values, t.tables, pages, t.lengths, scaling),
        lambda gate_up: rows.gated(gate_up(), "silu")[0],
        lambda y: F.linear(y, m.head),
    )


def _w4_step(m: Model) -> Call:
    own, keys, values = (
        [[p.packed for p in block[:2]] + [_gated(block[2])] + [block[3].packed] for block in m.blocks],
        cloned(m.texts.keys),
        cloned(m.texts.values),
    )
    rough = Cuda.of(m.head)
    if rough is None:
        raise ValueError("a head that has no kernel")
    ops = replace(  # the product's kernel does what a gate is for
        _triton_ops(m), gated=lambda gate_up: gate_up(), head=PackedHead(m.head, None, rough)
    )
    order = [own[layer % len(own)][i].weight for layer in range(m.layers) for i in range(4)] + [
        rough.linear.packed.weight
    ]
    rough.linear.ahead = order[0]
    after = itertools.cycle(order[1:])  # as the engine has it

    def multiply(block: int, i: int, y: Tensor) -> Tensor:
        return cuda_decode.multiply(own[block][i], y, ahead=next(after))

    return lambda: _step(m, multiply, ops, keys, values)


def _gated(p: Problem) -> Packed:
    packed = pack(p.q, gated=True)
    if packed is None:
        raise ValueError("a gate and a factor that have no kernel")
    return packed


def _bf16_step(m: Model) -> Call:
    own = [[p.q.dequantize(BFLOAT) for p in block] for block in m.blocks]
    keys, values, ops = cloned(m.texts.keys), cloned(m.texts.values), _triton_ops(m)
    return lambda: _step(m, lambda block, i, y: F.linear(y, own[block][i]), ops, keys, values)


def _step_reference(m: Model) -> list[Tensor]:
    """fp32 between the roundings that the cache and the residual stream have."""
    t = m.texts
    own = [[p.q.dequantize(torch.float32) for p in block] for block in m.blocks]
    pages, scaling = torch.full_like(t.lengths, t.tables.shape[1]), t.q_BHD.shape[2] ** -0.5
    ops = Ops(
        lambda x, h, weight_C: reference.add_rms_norm(x, h, weight_C, EPS),
        lambda qkv, cos, sin, slots, keys, values: reference.rope_write(
            qkv, cos, sin, None, None, 0.0, slots, keys, values
        ),
        lambda q, keys, values: reference.paged_decode(q, keys, values, t.tables, pages, t.lengths, scaling),
        lambda gate_up: reference.gated(gate_up(), "silu"),
        lambda y: F.linear(y.float(), m.head.float()),
    )
    keys, values = cloned(t.keys), cloned(t.values)
    found = _step(m, lambda block, i, y: F.linear(y.float(), own[block][i]).to(BFLOAT), ops, keys, values)
    return [y.double() for y in found]


def _step_bytes(m: Model, packed: bool) -> int:
    layer = sum(p.packed.nbytes if packed else 2 * p.q.codes.numel() for p in m.blocks[0])
    return m.layers * (layer + cached(m.texts)) + (m.head.numel() if packed else m.head.nbytes)


STEP = (32, 4, 128256, 1024, HEADS, LAYERS["8B layer"])
STEP_OP = Op(
        "8B-decode-step", (*CUDA_SOURCES, "runtime/head.py", *source("rows", "cache", "decode", "head")),
        tuple(Case("32 layers, 1024 tokens", b, STEP) for b in (1, 16)), BFLOAT, _model, _step_reference,
        Contender("infopt W4", _w4_step, lambda m: _step_bytes(m, True)),
        (Contender("the same in bf16", _bf16_step, lambda m: _step_bytes(m, False)),), no_flops,
        lambda case: 9 * case.sizes[0] + 2, limit=5e-2,
    )  # fmt: skip
