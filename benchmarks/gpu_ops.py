"""What `gpu_check.py` measures: one table, `OPS`.

An op is its cases, how inputs are made, what they should give (fp64), who computes it (ours first, then the anchors that
run beside it), and the least that it must move and compute. A new kernel is a new row here and nothing else.

Legend: T tokens, I input columns, O output rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infopt.grid import Grid
from infopt.kernels.cuda import decode
from infopt.kernels.cuda.layout import Packed, pack
from infopt.kernels.cuda.linear import CudaLinear
from infopt.qtensor import QTensor

HALF, BFLOAT = torch.float16, torch.bfloat16
#: Rounding of the result and sums in another order.
LIMITS = {HALF: 1e-3, BFLOAT: 5e-3}
Call = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Case:
    """label: what readers know it by. sizes: what `make` needs to know."""

    label: str
    tokens: int
    sizes: Any


@dataclass(frozen=True)
class Contender:
    """prepare(inputs) gives a call on memory of its own; what it writes is NaN before. nbytes: read and written."""

    name: str
    prepare: Callable[[Any], Call]
    nbytes: Callable[[Any], int]


@dataclass(frozen=True)
class Op:
    name: str
    sources: tuple[str, ...]  # files that decide what ours does
    cases: tuple[Case, ...]
    dtype: torch.dtype
    make: Callable[[Case, torch.Generator], Any]
    reference: Callable[[Any], list[Tensor]]  # fp64
    ours: Contender
    anchors: tuple[Contender, ...]
    flops: Callable[[Case], int]
    launches: Callable[[Case], int]  # kernels that cannot be fewer, for the floor
    ceiling: str = "read_bytes_per_s"  # what its bytes are set against
    peak: float = 1.0  # of bf16's FLOP/s
    limit: float | None = None  # of the relative error, where it is not that of the type


# --- linear layers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One product x [T, I] W^T of a case."""

    q: QTensor
    packed: Packed
    x_TI: Tensor


def _weight(rows: int, columns: int, grid: Grid, generator: torch.Generator) -> QTensor:
    device, shape = generator.device, grid.scales(rows, columns)
    most = 256 if grid.bits == 8 else grid.levels + 1
    codes = torch.randint(0, most, (rows, columns), generator=generator, device=device, dtype=torch.uint8)
    if grid.kind == "float":
        codes[codes & 0x7F == 0x7F] = 0x38  # NaN -> 1
    scale = (torch.rand(shape, generator=generator, device=device) * 0.02 + 0.002).to(grid.scale_dtype)
    zero = torch.randint(0, grid.levels + 1, shape, generator=generator, device=device, dtype=torch.uint8)
    return QTensor(codes, scale, torch.full_like(zero, grid.middle) if grid.symmetric else zero, grid)


def problems_of(grid: Grid, dtype: torch.dtype) -> Callable[[Case, torch.Generator], list[Problem]]:
    def make(case: Case, generator: torch.Generator) -> list[Problem]:
        problems = []
        for rows, columns in case.sizes:
            q = _weight(rows, columns, grid, generator)
            packed = pack(q)
            if packed is None:
                raise ValueError(f"{case} has no kernel")
            x_TI = torch.randn(case.tokens, columns, generator=generator, device=generator.device).to(dtype)
            problems.append(Problem(q, packed, x_TI))
        return problems

    return make


def _reference(problems: list[Problem]) -> list[Tensor]:
    return [p.x_TI.double() @ p.q.dequantize(torch.float64).T for p in problems]


def _activations(problems: list[Problem]) -> int:
    return sum(p.x_TI.nbytes + p.x_TI.itemsize * len(p.x_TI) * p.q.shape[0] for p in problems)


def cloned_weight(packed: Packed) -> Packed:
    own = replace(packed, weight=packed.weight.clone(), scales=packed.scales.clone(), arrived=packed.arrived.clone())
    if packed.weight.is_cuda:
        torch.cuda.synchronize()  # as `pack` does
    return own


class Decoding:
    """Products one after the other, each of which knows the weight that comes next, as in a model. after: after the last."""

    def __init__(self, problems: list[Problem]) -> None:
        self.after: Tensor | None = None
        self.weights = [cloned_weight(p.packed) for p in problems]
        self._outs = [
            torch.full((len(p.x_TI), p.q.shape[0]), torch.nan, dtype=p.x_TI.dtype, device=p.x_TI.device)
            for p in problems
        ]
        self._xs = [p.x_TI for p in problems]

    def __call__(self) -> list[Tensor]:
        ahead = [*(packed.weight for packed in self.weights[1:]), self.after]
        each = zip(self.weights, self._xs, self._outs, ahead, strict=True)
        return [decode.multiply(packed, x_TI, out=out, ahead=after) for packed, x_TI, out, after in each]


def link(calls: Sequence[Call]) -> None:
    """Tell each of these, in a circle, what is multiplied with after it."""
    for one, after in zip(calls, [*calls[1:], *calls[:1]], strict=True):
        if isinstance(one, Decoding) and isinstance(after, Decoding):
            one.after = after.weights[0].weight


def _prefill(problems: list[Problem]) -> Call:
    """As a prompt goes: the weight written out, then torch's product. Its memory is torch's own and cannot be NaN before."""
    own = [(CudaLinear(cloned_weight(p.packed)), p.x_TI) for p in problems]
    return lambda: [linear(x_TI) for linear, x_TI in own]


def _cublas(problems: list[Problem]) -> Call:
    own = [(p.x_TI, p.q.dequantize(p.x_TI.dtype)) for p in problems]
    return lambda: [F.linear(x_TI, w_OI) for x_TI, w_OI in own]


def _tinygemm(problems: list[Problem]) -> Call:
    """torch's own int4 kernel: w = (code - 8) * scale + offset, bf16, codes two to a byte with the first one high."""
    own = []
    for p in problems:
        pairs = (p.q.codes[:, ::2] << 4 | p.q.codes[:, 1::2]).contiguous()
        scale = p.q.scale.float()
        offset = (8 - p.q.zero.float()) * scale
        scales_GO2 = torch.stack((scale, offset), dim=-1).transpose(0, 1).contiguous().to(BFLOAT)
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
        own.append((p.x_TI.to(BFLOAT), packed, p.q.shape[1] // scale.shape[1], scales_GO2))
    return lambda: [torch.ops.aten._weight_int4pack_mm(*arguments) for arguments in own]


def _gemlite(problems: list[Problem]) -> Call:
    """gemlite's layer of the same codes, believed only where it gives the same numbers."""
    from gemlite.core import DType, GemLiteLinear

    own = []
    for p in problems:
        (rows, columns), kind = p.q.shape, DType.BF16 if p.x_TI.dtype == BFLOAT else DType.FP16
        group = columns // p.q.scale.shape[1]
        layer = GemLiteLinear(4, group, columns, rows, input_dtype=kind, output_dtype=kind)
        layer.pack(p.q.codes, p.q.scale.to(p.x_TI.dtype), p.q.zero.to(p.x_TI.dtype), None)
        want = F.linear(p.x_TI, p.q.dequantize(p.x_TI.dtype)).float()
        if not bool((layer(p.x_TI).float() - want).norm() < 2e-2 * want.norm()):
            raise ValueError("it computes something else from these arguments")
        own.append((layer, p.x_TI))
    return lambda: [layer(x_TI) for layer, x_TI in own]


OURS = Contender("infopt", Decoding, lambda ps: sum(p.packed.nbytes for p in ps) + _activations(ps))
PREFILL = Contender("infopt", _prefill, OURS.nbytes)
CUBLAS = Contender("cublas", _cublas, lambda ps: sum(2 * p.q.codes.numel() for p in ps) + _activations(ps))
TINYGEMM = Contender(
    "tinygemm", _tinygemm, lambda ps: sum(p.q.codes.numel() // 2 + 4 * p.q.scale.numel() for p in ps) + _activations(ps)
)

GEMLITE = Contender("gemlite", _gemlite, TINYGEMM.nbytes)

#: Llama 3 8B: (output rows, input columns) of what a block multiplies with.
QKV, OUT, GATE_UP, DOWN = (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)
LAYERS = {
    "8B gate_up": (GATE_UP,),
    "8B down": (DOWN,),
    "8B layer": (QKV, OUT, GATE_UP, DOWN),
    "8B qkv": (QKV,),
    "8B o": (OUT,),
    "8192x8192": ((8192, 8192),),
}
CUDA_SOURCES = (
    *(f"kernels/cuda/{name}.cuh" for name in ("device", "unpack", "decode", "dequantize")),
    "kernels/cuda/decode.py",
)


def linear_op(
    name: str, grid: Grid, dtype: torch.dtype, labels: tuple[str, ...], tokens: tuple[int, ...],
    anchors: tuple[Contender, ...], ours: Contender = OURS, sources: tuple[str, ...] = CUDA_SOURCES,
) -> Op:  # fmt: skip
    return Op(
        name, sources, tuple(Case(label, t, LAYERS[label]) for t in tokens for label in labels), dtype,
        problems_of(grid, dtype), _reference, ours, anchors,
        lambda case: sum(2 * case.tokens * rows * columns for rows, columns in case.sizes),
        lambda case: len(case.sizes),
    )  # fmt: skip


_LARGE = ("8B gate_up", "8B down", "8B layer")
OPS = (
    linear_op(
        "w4a16-g128",
        Grid(4, 128, True, BFLOAT),
        BFLOAT,
        tuple(LAYERS),
        (1, 16, 8, 4, 2, 32),
        (CUBLAS, TINYGEMM, GEMLITE),
    ),
    linear_op("w4a16-g64-zeros-fp16", Grid(4, 64, False, HALF), HALF, _LARGE, (1, 16), (CUBLAS,)),
    linear_op("w8a16-channel", Grid(8, None, True, BFLOAT), BFLOAT, _LARGE, (1, 16), (CUBLAS,)),
    linear_op("fp8a16-channel", Grid(8, None, True, BFLOAT, kind="float"), BFLOAT, _LARGE, (1, 16), (CUBLAS,)),
    linear_op("w4a16-g128-prefill", Grid(4, 128, True, BFLOAT), BFLOAT, _LARGE[:2], (2048, 256), (CUBLAS,), PREFILL),
    linear_op("w4a16-g32-zeros", Grid(4, 32, False, BFLOAT), BFLOAT, ("8B down",), (1, 16, 32), (CUBLAS, TINYGEMM)),
)
