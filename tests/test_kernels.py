"""The kernels against `kernels.reference`, and the reference against arithmetic done by hand."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from infopt import kernels
from infopt.errors import Unsupported
from infopt.grid import Grid
from infopt.kernels import reference
from infopt.kernels.int4_dense import Int4Dense
from infopt.qtensor import QTensor
from infopt.runtime.linear import QuantLinear

EXACT, PACKED = 1e-6, 1e-2  # relative errors: fp32 in another order; bf16 activations, scales and offsets


def random_q(rows: int, columns: int, grid: Grid, seed: int = 0) -> QTensor:
    generator = torch.Generator().manual_seed(seed)
    groups = columns // grid.width(columns)
    codes = torch.randint(0, grid.levels + 1, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(rows, groups, generator=generator) * 0.1 + 0.01).to(grid.scale_dtype)
    zero = torch.randint(0, grid.levels + 1, (rows, groups), generator=generator, dtype=torch.uint8)
    return QTensor(codes, scale, torch.full_like(zero, grid.middle) if grid.symmetric else zero, grid)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def test_reference_is_the_definition() -> None:
    codes = torch.tensor([[0, 3, 2, 1]], dtype=torch.uint8)
    scale, zero = torch.tensor([[0.5, 2.0]]), torch.tensor([[1, 3]], dtype=torch.uint8)
    q = QTensor(codes, scale, zero, Grid(2, 2, symmetric=False, scale_dtype=torch.float32))
    x = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    # W = [(0 - 1) / 2, (3 - 1) / 2, (2 - 3) * 2, (1 - 3) * 2]
    assert reference.linear(x, q, torch.tensor([7.0])).item() == -0.5 + 10.0 - 200.0 - 4000.0 + 7.0


@pytest.mark.parametrize("tokens", [1, 5, 33, 100])
@pytest.mark.parametrize(
    ("rows", "columns", "bits", "group", "symmetric", "kernel"),
    [
        (32, 64, 4, 32, True, "int4pack"),
        (48, 192, 4, 64, False, "int4pack"),
        (16, 256, 4, 128, False, "int4pack"),
        (16, 512, 4, None, True, "int4pack"),  # one scale per channel, repeated for each 256 columns
        (16, 96, 4, None, False, "int4pack"),  # ... for each 32
        (32, 64, 3, 32, False, "int4pack"),
        (32, 64, 2, 64, True, "int4pack"),
        (24, 64, 4, 32, True, "fp32"),  # O % 16
        (32, 40, 4, None, True, "fp32"),  # no group of 32 columns fits
        (32, 48, 4, 16, True, "fp32"),  # a group that torch does not know
        (33, 48, 8, None, True, "int8pack"),
        (32, 40, 8, None, True, "fp32"),  # I % 16: torch itself crashes here
        (32, 64, 8, 32, True, "fp32"),
        (32, 64, 8, None, False, "fp32"),
    ],
)
def test_packed_agrees_with_the_reference(rows, columns, bits, group, symmetric, kernel, tokens) -> None:
    q = random_q(rows, columns, Grid(bits, group, symmetric))
    x, bias = torch.randn(tokens, columns), torch.randn(rows)
    want = reference.linear(x, q, bias)
    packed, exact = kernels.prepare(q, "packed", compiled=False), kernels.prepare(q, "exact")
    assert (packed.kernel, exact.kernel) == (kernel, "fp32")
    assert relative_error(exact(x, bias), want) < EXACT
    assert relative_error(packed(x, bias), want) < (EXACT if kernel == "fp32" else PACKED)


@pytest.mark.parametrize("rows", [16, 32, 48, 64, 80, 112, 192])
def test_packed_codes_can_be_read_back(rows) -> None:
    """In whole blocks and in one that is cut short, whatever a block is on this processor."""
    codes = torch.randint(0, 16, (rows, 128), generator=torch.Generator().manual_seed(rows), dtype=torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    found = Int4Dense.find(packed, codes)
    assert found is not None
    assert torch.equal(found.codes(torch.int32), codes.t())
    assert Int4Dense.find(packed, (codes + 1) % 16) is None


def test_packed_kernels_run_without_vector_instructions() -> None:
    """torch's portable code path, which is what a processor without AVX2 gets."""
    code = (
        "import torch; from test_kernels import *; q = random_q(32, 64, Grid(4, 32, False)); x = torch.randn(3, 64);"
        "assert torch.backends.cpu.get_cpu_capability() == 'DEFAULT';"
        "assert relative_error(kernels.prepare(q, 'packed', compiled=False)(x), reference.linear(x, q)) < PACKED;"
        "many = torch.randn(100, 64);"
        "assert relative_error(kernels.prepare(q, 'packed', compiled=False)(many), reference.linear(many, q)) < 2e-3"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": os.path.dirname(__file__)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (0, 64), (2, 0, 64)])
@pytest.mark.parametrize("precision", ["exact", "packed"])
def test_quant_linear_keeps_shape_and_dtype(shape, precision) -> None:
    linear = QuantLinear(random_q(32, 64, Grid(4, 32)), torch.nn.Parameter(torch.randn(32)), precision)
    for dtype in (torch.float32, torch.bfloat16):
        y = linear(torch.randn(shape).to(dtype))
        assert y.shape == (*shape[:-1], 32)
        assert y.dtype == dtype


def test_not_contiguous_input() -> None:
    q, x = random_q(32, 64, Grid(4, 32)), torch.randn(64, 5).T
    for precision in ("exact", "packed"):
        assert relative_error(kernels.prepare(q, precision)(x), reference.linear(x, q)) < PACKED


def test_other_devices_are_refused() -> None:
    q = random_q(16, 32, Grid(4, 32))
    meta = QTensor(q.codes.to("meta"), q.scale.to("meta"), q.zero.to("meta"), q.grid)
    with pytest.raises(Unsupported, match="meta"):
        kernels.prepare(meta)
