"""Weights, tokens and the comparison that the CUDA kernels must pass: on the emulator, and on a GPU where there is one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from infopt.grid import Grid
from infopt.kernels import reference
from infopt.kernels.cuda import decode
from infopt.kernels.cuda.decode import Geometry
from infopt.kernels.cuda.layout import Packed, gated_order, pack
from infopt.qtensor import QTensor

#: Rounding of the result, and fp32 sums in another order: nothing else differs from the reference.
LIMITS = {torch.float16: 1e-3, torch.bfloat16: 5e-3}
HALF, BFLOAT, SINGLE = torch.float16, torch.bfloat16, torch.float32


def random_weight(rows: int, columns: int, grid: Grid, seed: int = 0) -> QTensor:
    """Every code, scales that differ by a factor of ten, every zero point that the grid has."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256 if grid.bits == 8 else grid.levels + 1, (rows, columns), generator=generator)
    if grid.kind == "float":
        codes[codes & 0x7F == 0x7F] = 0x38  # NaN -> 1
    shape = grid.scales(rows, columns)
    scale = (torch.rand(shape, generator=generator) * 0.09 + 0.01).to(grid.scale_dtype)
    zero = torch.randint(0, grid.levels + 1, shape, generator=generator, dtype=torch.uint8)
    zero = torch.full_like(zero, grid.middle) if grid.symmetric else zero
    return QTensor(codes.to(torch.uint8), scale, zero, grid)


@dataclass(frozen=True)
class Case:
    tokens: int
    rows: int
    columns: int
    grid: Grid
    dtype: torch.dtype = HALF
    blocks: tuple[int, int, int] = (1, 1, 1)  # see `Geometry`; on the emulator: a GPU's size decides it there
    gated: bool = False
    bias: bool = False

    def __str__(self) -> str:
        grid = self.grid
        words = [f"{grid.bits}{grid.kind[0]}", str(grid.group or grid.strategy), "sym" if grid.symmetric else "asym"]
        words += ["gated"] * self.gated + ["bias"] * self.bias
        words += [str(self.dtype)[6:], "x".join(map(str, self.blocks))]
        return f"{self.tokens}x{self.rows}x{self.columns}-{'-'.join(words)}"

    @property
    def geometry(self) -> Geometry:
        return Geometry(*self.blocks)

    @property
    def weight(self) -> QTensor:
        return random_weight(self.rows, self.columns, self.grid)

    def packed(self) -> Packed:
        packed = pack(self.weight, self.gated)
        if packed is None:
            raise ValueError(f"{self} has no kernel")
        return packed

    @property
    def variant(self) -> str:
        return decode.variant(self.packed(), self.dtype, self.tokens)

    def inputs(self, seed: int = 0) -> tuple[Tensor, Tensor | None]:
        """(x, bias in the order of the weight's rows)"""
        generator = torch.Generator().manual_seed(seed + 1)
        x_TI = torch.randn(self.tokens, self.columns, generator=generator).to(self.dtype)
        return x_TI, torch.randn(self.rows, generator=generator).to(self.dtype) if self.bias else None

    def kernel_bias(self, bias: Tensor | None) -> Tensor | None:
        return bias[gated_order(self.rows)] if self.gated and bias is not None else bias

    def want(self, x_TI: Tensor, bias: Tensor | None) -> Tensor:
        """fp32"""
        y = reference.linear(x_TI, self.weight, bias)
        if not self.gated:
            return y
        gate, factor = y.chunk(2, dim=-1)
        return F.silu(gate) * factor

    def agrees(self, y: Tensor, want: Tensor) -> bool:
        """False for NaN too."""
        error = (y.double() - want.double()).norm() / want.double().norm()
        return y.shape == want.shape and bool(error < LIMITS[self.dtype])


W4, W8 = 4, 8
CASES = (
    # groups, zero points, types of scales and activations; parts of equal and other sizes, rows that end within a tile, tiles
    # that a block has no rows for, blocks in clusters and alone
    Case(1, 128, 512, Grid(W4, 128, True, HALF), HALF, (8, 1, 1)),
    Case(5, 160, 512, Grid(W4, 128, False, HALF), HALF, (3, 2, 2), bias=True),
    Case(8, 256, 384, Grid(W4, 64, True, BFLOAT), BFLOAT, (5, 1, 2)),
    Case(1, 128, 640, Grid(W4, 64, True, BFLOAT), HALF, (2, 4, 2)),
    Case(9, 256, 256, Grid(W4, 64, False, BFLOAT), BFLOAT, (2, 3, 1)),
    Case(3, 300, 256, Grid(W4, 32, False, BFLOAT), HALF, (4, 2, 2)),
    Case(15, 40, 256, Grid(W4, 32, True, SINGLE), BFLOAT, (1, 2, 1), bias=True),
    Case(16, 128, 256, Grid(W4, None, False, HALF), HALF, (7, 1, 2)),
    Case(2, 96, 64, Grid(2, None, True, HALF), BFLOAT),
    Case(11, 40, 1024, Grid(W4, 64, False, BFLOAT), BFLOAT, (1, 8, 2)),
    # 8 bits
    Case(2, 128, 256, Grid(W8, None, True, HALF), HALF, (2, 1, 2), bias=True),
    Case(7, 128, 256, Grid(W8, 128, False, BFLOAT), BFLOAT, (4, 2, 1)),
    Case(4, 128, 128, Grid(W8, 32, False, HALF), HALF, (1, 1, 2)),
    Case(16, 256, 256, Grid(W8, None, True, SINGLE, kind="float"), HALF, (1, 2, 2)),
    Case(6, 256, 256, Grid(W8, 128, True, SINGLE, kind="float", rows=128), BFLOAT, (3, 2, 1)),
    # a gate and its factor
    Case(4, 256, 256, Grid(W4, 64, True, BFLOAT), BFLOAT, (3, 2, 2), gated=True, bias=True),
)
