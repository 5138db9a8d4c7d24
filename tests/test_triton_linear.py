"""Products with quantized weights, by Triton's interpreter, against `kernels.reference`."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from infopt.grid import FP8, Grid, Inputs
from infopt.kernels import reference
from infopt.kernels.packing import Packed
from infopt.kernels.triton import gemm, linear, numeric, weight
from infopt.qtensor import QTensor
from tests.triton_tools import assert_caught, assert_close, planted, poisoned

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_q(rows: int, columns: int, grid: Grid, input_scale: float | None = None) -> QTensor:
    generator = torch.Generator().manual_seed(rows + columns)
    shape = grid.scales(rows, columns)
    if grid.kind == "float":
        codes = grid.pack((random(rows, columns) * 100).clamp(-448, 448))
    else:
        codes = torch.randint(0, grid.levels + 1, (rows, columns), generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, grid.levels + 1, shape, generator=generator, dtype=torch.uint8)
    zero = torch.full_like(zero, grid.middle) if grid.symmetric else zero
    scale = (torch.rand(shape, generator=generator) + 0.1).to(grid.scale_dtype)
    return QTensor(codes, scale, zero, grid, None if input_scale is None else torch.tensor([input_scale]))


WEIGHTS = [
    (Grid(4, 32), (70, 96)),
    (Grid(4, 64, symmetric=False), (64, 128)),
    (Grid(4, None), (33, 80)),  # a row that ends in the middle of a part
    (Grid(3, 32, symmetric=False), (16, 64)),
    (Grid(2, 32), (16, 64)),  # a middle that is not that of 4 bits
    (Grid(8, None), (70, 100)),
    (Grid(8, 64, symmetric=False), (20, 128)),
    (Grid(8, None, kind="float"), (20, 72)),
]


def check_weight(module: ModuleType, grid: Grid, shape: tuple[int, int], tokens: int, dtype: torch.dtype) -> None:
    q = random_q(*shape, grid)
    x, bias = random(tokens, shape[1], dtype=dtype), random(shape[0], seed=1)
    packed = Packed.of(q)
    with poisoned():
        y = module.multiply(x, packed, bias)
        w = module.dequantize(packed, torch.float32)
    assert y.dtype == dtype
    assert_close(packed.dequantize(), q.dequantize(), 0.0, "the packed weight")
    assert_close(w, q.dequantize(), 0.0, "the weight")
    assert_close(y, reference.linear(x, q, bias), TOLERANCE[dtype], "the product")


@pytest.mark.parametrize(("grid", "shape"), WEIGHTS)
def test_packed_weights(grid, shape) -> None:
    check_weight(weight, grid, shape, 5, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 35])
def test_packed_weights_in_16_bits(tokens, dtype) -> None:
    check_weight(weight, Grid(4, 32), (70, 96), tokens, dtype)


WEIGHT_BUGS = [
    ("w = (byte >> 4).to(tl.float32) - zero", "w = (byte & 15).to(tl.float32) - zero"),
    ("tl.load(at_x + column[:, None] + HALF,", "tl.load(at_x + column[:, None],"),
    (
        "total += product * tl.load(scale + o * G + g",
        "total += product * tl.load(scale + o * G",
    ),  # the first scale only
    ("tl.dot(w, some, product,", "tl.dot(w, some, total,"),
    ("mask=(o < O)[:, None] & (t < T)[None, :])", "mask=(o < O - 1)[:, None] & (t < T)[None, :])"),
    ("tl.store(at_w + HALF, value", "tl.store(at_w + HALF + 0 * o[:, None], -value"),
]


@pytest.mark.parametrize(("old", "new"), WEIGHT_BUGS)
def test_planted_bugs_in_packed_weights_are_caught(old, new, tmp_path) -> None:
    broken = planted(weight, tmp_path, old, new)
    assert_caught(check_weight, broken, Grid(4, 32, symmetric=False), (70, 96), 5, torch.float32)


# Codes on both sides


def codes(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    if dtype == torch.int8:
        return torch.randint(-128, 128, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(dtype)
    return (random(rows, columns, seed=seed) * 100).clamp(-448, 448).to(dtype)


def check_int8(module: ModuleType, tokens: int, columns: int, rows: int, static: bool) -> None:
    x, w = codes(tokens, columns, torch.int8, 0), codes(rows, columns, torch.int8, 1)
    x_scale = torch.tensor([0.03]) if static else random(tokens, 1).abs() + 0.1
    w_scale, bias = random(rows, 1, seed=1).abs() + 0.1, random(rows, seed=2)
    wanted = reference.codes_linear(x, x_scale.expand(tokens, 1), w, w_scale, 1, bias)
    with poisoned():
        y = module.int8_linear(x, x_scale, w, w_scale, bias, torch.float32)
    assert_close(y, wanted, 1e-6, "the product")


@pytest.mark.parametrize(("tokens", "columns", "rows"), [(1, 64, 16), (5, 200, 70), (130, 40, 65)])
@pytest.mark.parametrize("static", [False, True])
def test_int8(tokens, columns, rows, static) -> None:
    check_int8(gemm, tokens, columns, rows, static)


def test_int8_sums_are_exact() -> None:
    x, w = codes(3, 300, torch.int8, 0), codes(20, 300, torch.int8, 1)
    y = gemm.int8_linear(x, torch.ones(1), w, torch.ones(1, 1), None, torch.float32)
    assert torch.equal(y.long(), x.long() @ w.long().T)


INT8_BUGS = [
    ("tl.dot(some_x, some_w, total, out_dtype", "tl.dot(some_x, some_w, out_dtype"),
    ("total.to(tl.float32) * scale_x[:, None] *", "total.to(tl.float32) *"),
    ("x_scale + t * x_step", "x_scale + 0 * t"),
]


@pytest.mark.parametrize(("old", "new"), INT8_BUGS)
def test_planted_bugs_in_int8_are_caught(old, new, tmp_path) -> None:
    assert_caught(check_int8, planted(gemm, tmp_path, old, new), 5, 200, 70, False)


def check_fp8(module: ModuleType, tokens: int, columns: int, rows: int, block: bool, native: bool) -> None:
    x, w = codes(tokens, columns, FP8, 0), codes(rows, columns, FP8, 1)
    groups = columns // 128 if block else 1
    x_scale, bias = random(tokens, groups).abs() + 0.1, random(rows, seed=2)
    each = 128 if block else 1
    w_scale = random(-(-rows // each), -(-columns // 128) if block else 1, seed=1).abs() + 0.1
    wanted = reference.codes_linear(x, x_scale, w, w_scale, each, bias)
    with poisoned():
        y = module.fp8_linear(x, x_scale, w, w_scale, each, bias, torch.float32, native)
    assert_close(y, wanted, 2e-6, "the product")


@pytest.mark.parametrize(("shape", "block"), [((5, 256, 150), True), ((1, 100, 70), False)])
@pytest.mark.parametrize("native", [True, False])
def test_fp8(shape, block, native) -> None:
    check_fp8(gemm, *shape, block, native)


FP8_BUGS = [
    ("o // w_rows * w_r", "o // w_rows // 2 * w_r"),
    ("t * x_t + g * x_g", "t * x_t"),
    ("total += tl.dot(some_x, some_w) *", "total = tl.dot(some_x, some_w) *"),
]


@pytest.mark.parametrize(("old", "new"), FP8_BUGS)
def test_planted_bugs_in_fp8_are_caught(old, new, tmp_path) -> None:
    assert_caught(check_fp8, planted(gemm, tmp_path, old, new), 5, 256, 150, True, True)


# LayerNorm and GeLU


def check_norm_linear(module: ModuleType, dtype: torch.dtype, act: str, tokens: int = 5) -> None:
    x = (random(tokens, 100) * 2 + 1).to(dtype)
    gamma, beta = random(100, seed=1).abs() + 0.5, random(100, seed=2)
    w, bias = random(70, 100, seed=3, dtype=dtype), random(70, seed=4)
    folded = module.fold_norm(gamma, beta, w, bias)
    with poisoned():
        y = module.norm_linear(x, *folded, 1e-5, act)
        z = module.norm_linear(x, w, None, bias, 0.0, act)
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 8e-3}[dtype]
    assert_close(y, reference.norm_linear(x, gamma, beta, 1e-5, w, bias, act), tolerance, "the normed product")
    assert_close(z, reference.ACTIVATIONS[act](x.float() @ w.float().T + bias), tolerance, "the product")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ["none", "gelu", "gelu_tanh"])
def test_norm_and_linear(dtype, act) -> None:
    check_norm_linear(gemm, dtype, act)


NORM_BUGS = [
    ("apart = tl.where(inside[None, :], some_x - shift[:, None], 0.0)", "apart = some_x - shift[:, None]"),
    ("(mean + shift)[:, None] * column_sums", "mean[:, None] * column_sums"),
    ("second / I - mean * mean", "second / I"),
]


@pytest.mark.parametrize(("old", "new"), NORM_BUGS)
def test_planted_bugs_in_the_norm_are_caught(old, new, tmp_path) -> None:
    assert_caught(check_norm_linear, planted(gemm, tmp_path, old, new), torch.float32, "gelu")


def test_a_wrong_gelu_is_caught(tmp_path) -> None:
    broken = planted(gemm, tmp_path, "0.7071067811865476", "1.7071067811865476", numeric)
    assert_caught(check_norm_linear, broken, torch.float32, "gelu")


# What a weight is prepared to


PREPARED = [
    (Grid(4, 32), None, "triton-w4a16", 6e-3),
    (Grid(8, None), None, "triton-w8a16", 6e-3),
    (Grid(8, None, kind="float"), None, "triton-fp8a16", 6e-3),
    (Grid(8, None, inputs=Inputs("int")), None, "triton-w8a8", 2e-6),
    (Grid(8, None, inputs=Inputs("int", dynamic=False)), 0.02, "triton-w8a8", 2e-6),
    (Grid(8, None, kind="float", rows=None, inputs=Inputs("float", dynamic=False)), 0.01, "triton-fp8", 2e-6),
    (Grid(8, 128, kind="float", rows=128, inputs=Inputs("float", group=128)), None, "triton-fp8", 2e-6),
    (Grid(4, 32, inputs=Inputs("int")), None, "fp32", 1e-6),
    (Grid(4, 16), None, "fp32", 1e-6),
]


@pytest.mark.parametrize(("grid", "input_scale", "kernel", "tolerance"), PREPARED)
def test_what_a_weight_is_prepared_to(grid, input_scale, kernel, tolerance) -> None:
    q = random_q(40, 256, grid, input_scale)
    x, bias = random(2, 3, 256), random(40, seed=1)
    prepared, exact = linear.prepare(q, "packed"), linear.prepare(q, "exact")
    assert (prepared.kernel, exact.kernel) == (kernel, "fp32")
    with poisoned():
        assert_close(prepared(x, bias), reference.linear(x, q, bias), tolerance, "the layer")
    assert_close(exact(x, bias), reference.linear(x, q, bias), 1e-6, "the exact layer")


def test_many_tokens_are_multiplied_by_the_weight_written_out() -> None:
    q, x = random_q(16, 64, Grid(4, 32)), random(linear.MANY, 64)
    assert_close(linear.prepare(q, "packed")(x), reference.linear(x, q), 8e-3)
