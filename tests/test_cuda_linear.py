"""`kernels.prepare` for a weight on a GPU, as far as that can be followed without one."""

from __future__ import annotations

import pytest
import torch

from infopt.grid import Grid
from infopt.kernels import reference
from infopt.kernels.cuda.linear import CudaLinear, follow

from .emulator.cases import BFLOAT, HALF, LIMITS, random_weight


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, torch.float32], ids=str)
@pytest.mark.parametrize("grid", [Grid(4, 64, False, HALF), Grid(8, None), Grid(8, None, kind="float")], ids=str)
def test_many_tokens_meet_the_weight_written_out(grid, dtype) -> None:
    q = random_weight(40, 128, grid)
    prepared = CudaLinear.of(q)
    assert prepared is not None
    assert prepared.kernel.startswith("cuda-")
    assert prepared.nbytes < 48 * 128 * grid.bits / 8 * 1.2
    x, bias = torch.randn(3, 11, 128).to(dtype), torch.randn(40).to(dtype)  # 33 tokens
    y, want = prepared(x, bias), reference.linear(x, q, bias)
    assert (y.dtype, y.shape) == (dtype, want.shape)
    assert (y.double() - want.double()).norm() / want.double().norm() < LIMITS[BFLOAT if dtype != HALF else HALF]


def test_each_weight_is_told_which_comes_next() -> None:
    one, two, three = (CudaLinear.of(random_weight(16, 64, Grid(4, 64), seed)) for seed in range(3))
    assert one is not None
    assert two is not None
    assert three is not None
    follow([one, two, None, three])
    assert one.ahead is two.packed.weight
    assert two.ahead is None  # something else comes between
    assert three.ahead is one.packed.weight
    x = torch.randn(2, 64)
    assert torch.equal(one(x), CudaLinear(one.packed)(x))


def test_what_the_kernel_does_not_read_is_left_to_others() -> None:
    assert CudaLinear.of(random_weight(16, 96, Grid(4, 32))) is None
