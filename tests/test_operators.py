"""The operators of torch: what torch itself checks of one, that they are the reference, and that GPUs get a kernel."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from infopt import kernels
from infopt.grid import FP8, Grid, Inputs
from infopt.kernels import operators, reference, sampling
from infopt.kernels.cuda.layout import pack
from infopt.kernels.cuda.linear import CudaLinear
from infopt.kernels.packing import Packed
from infopt.kernels.pages import Pages
from infopt.kv_cache import CacheGrid
from tests.test_kernels import random_q


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cache_parts(grid: CacheGrid | None) -> tuple[Any, ...]:
    keys, values = (Pages.empty(64, 2, 16, grid) for _ in range(2))
    for half, seed in ((keys, 1), (values, 2)):
        half.write(torch.arange(64), random(64, 2, 16, seed=seed))
    return keys.codes, keys.scale, keys.zero, values.codes, values.scale, values.zero


def packed() -> Packed:
    return Packed.of(random_q(32, 64, Grid(4, 32, symmetric=False)))


FP8_PER_TOKEN = CacheGrid("float", 8, "token")
INT4 = CacheGrid("int", 4, "token", symmetric=False)
X, W = random(3, 64), random(64, seed=1)
CODES, SCALE = reference.quantize(X, Inputs("int"))
W_CODES, W_SCALE = reference.quantize(random(32, 64, seed=2), Inputs("int"))
FP8_CODES, FP8_SCALE = reference.quantize(X, Inputs("float"))
FP8_W, FP8_W_SCALE = reference.quantize(random(32, 64, seed=2), Inputs("float"))
TABLES = torch.tensor([[1, 0], [3, 2]])
TEXTS = (TABLES, torch.tensor([2, 2]), torch.tensor([20, 7]), 0.25)
ONE = torch.ones(3)
PACKED = packed()
TILES = pack(random_q(32, 64, Grid(4, 32, symmetric=False)))
GATED = pack(random_q(32, 64, Grid(4, 32, symmetric=False)), gated=True)
assert TILES is not None
assert GATED is not None
CASES: list[tuple[Any, tuple[Any, ...]]] = [
    (operators.add_rms_norm, (X, X.flip(0), W, 1e-5)),
    (operators.add_rms_norm, (X.bfloat16(), X.bfloat16(), W, 1e-5, "fp8", 32)),
    (operators.rms_norm, (X, W, 1e-5, "int8")),
    (operators.gated, (X, "silu")),
    (operators.gated, (X, "gelu", "int8", 0, torch.tensor([0.02]))),
    (operators.quantize, (X, "fp8", 32)),
    (operators.packed_linear, (X, PACKED.codes, PACKED.scale_OG, PACKED.zero_OG, "int4", PACKED.part, 64, W[:32], "silu")),
    (
        operators.tile_linear,
        (X.half(), TILES.weight, TILES.scales, TILES.arrived, TILES.shape, TILES.codes, TILES.scale_dtype, TILES.group,
         TILES.zeros, TILES.zero, W[:32]),
    ),
    (
        operators.tile_linear,
        (X.half(), GATED.weight, GATED.scales, GATED.arrived, GATED.shape, GATED.codes, GATED.scale_dtype, GATED.group,
         GATED.zeros, GATED.zero, W[:32], True),
    ),
    (operators.int8_linear, (CODES, SCALE, W_CODES, W_SCALE, W[:32], torch.bfloat16)),
    (operators.fp8_linear, (FP8_CODES, FP8_SCALE, FP8_W, FP8_W_SCALE, 1, None, torch.float32)),
    (operators.norm_linear, (X, random(32, 64), random(32), W[:32], 1e-5, "gelu")),
    (operators.norm_linear, (X, random(32, 64), None, W[:32], 1e-5)),
    (operators.rescore, (random(3, 32).bfloat16(), X.bfloat16(), random(32, 64).bfloat16(), random(32).abs(), W[:32])),
    (
        operators.rope_write,
        (random(3, 8, 16), random(3, 16), random(3, 16), W[:16], W[16:32], 1e-5, torch.tensor([5, 1, 40]),
         *cache_parts(INT4), "int4"),
    ),
    (
        operators.paged_decode,
        (random(2, 4, 16), *cache_parts(FP8_PER_TOKEN), "fp8", *TEXTS),
    ),
    (operators.paged_decode, (random(2, 4, 16), *cache_parts(None), "none", *TEXTS, 4, 9.0)),
    (operators.attention, (random(1, 4, 5, 16), random(1, 2, 9, 16), random(1, 2, 9, 16), 0.25, 3)),
    (operators.sample, (X, ONE, ONE.long() * 9, ONE * 0.9, ONE * 0, ONE.long(), ONE.long())),
]  # fmt: skip
IDS = [f"{operator._name.removeprefix('infopt::')}{i}" for i, (operator, _) in enumerate(CASES)]


@pytest.mark.parametrize(("operator", "arguments"), CASES, ids=IDS)
def test_what_torch_asks_of_an_operator(operator, arguments) -> None:
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if any(isinstance(part, torch.Tensor) and part.dtype == FP8 for part in arguments):
        checks.remove("test_schema")  # it multiplies arguments, which torch cannot do with E4M3
    done = torch.library.opcheck(operator, arguments, test_utils=checks)
    assert set(done.values()) == {"SUCCESS"}


def test_every_operator_is_checked_and_has_a_kernel_for_gpus() -> None:
    defined = {
        name for name, value in vars(operators).items() if isinstance(value, torch._library.custom_ops.CustomOpDef)
    }
    assert {operator._name.removeprefix("infopt::") for operator, _ in CASES} == defined
    for name in defined:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"infopt::{name}", "CUDA"), name


def test_operators_are_the_reference() -> None:
    ops = torch.ops.infopt
    y, h = reference.add_rms_norm(X, X.flip(0), W, 1e-5)
    found, _, found_h = ops.add_rms_norm(X, X.flip(0), W, 1e-5)
    assert torch.equal(found, y)
    assert torch.equal(found_h, h)
    codes, scale = reference.quantize(y, Inputs("int"))
    found, found_scale, _ = ops.add_rms_norm(X, X.flip(0), W, 1e-5, "int8")
    assert torch.equal(found, codes)
    assert torch.equal(found_scale, scale)
    q = random_q(32, 64, Grid(4, 32, symmetric=False))
    found = ops.packed_linear(X, PACKED.codes, PACKED.scale_OG, PACKED.zero_OG, "int4", PACKED.part, 64)
    torch.testing.assert_close(found, reference.linear(X, q))
    shape, kind = TILES.shape, (TILES.codes, TILES.scale_dtype, TILES.group, TILES.zeros, TILES.zero)
    found = ops.tile_linear(X, TILES.weight, TILES.scales, TILES.arrived, shape, *kind)
    torch.testing.assert_close(found, reference.linear(X, q))
    found = CudaLinear(GATED)(X, W[:32])
    gate, up = reference.linear(X.bfloat16(), q, W[:32]).chunk(2, dim=-1)
    torch.testing.assert_close(found, torch.nn.functional.silu(gate) * up, rtol=2e-2, atol=2e-2)
    drawn = ops.sample(X, ONE, ONE.long() * 9, ONE * 0.9, ONE * 0, ONE.long(), ONE.long())
    assert torch.equal(drawn, sampling.sample(X, ONE, ONE.long() * 9, ONE * 0.9, ONE * 0, ONE.long(), ONE.long()))


def test_what_is_written_can_be_read() -> None:
    """Through the operators alone: a text's keys and values, then one token over them."""
    parts = [None if part is None else torch.zeros_like(part) for part in cache_parts(INT4)]
    qkv, angle = random(20, 8, 16), random(20, 8).repeat(1, 2)
    slots = TABLES[0].repeat_interleave(16)[:20] * 16 + torch.arange(20) % 16
    q = torch.ops.infopt.rope_write(qkv, angle.cos(), angle.sin(), None, None, 1e-5, slots, *parts, "int4")
    lengths, pages = torch.tensor([20]), torch.tensor([2])
    found = torch.ops.infopt.paged_decode(q[-1:], *parts, "int4", TABLES[:1], pages, lengths, 0.25)
    k = reference.rope(qkv[:, 4:6], angle.cos(), angle.sin()).transpose(0, 1)[None]
    wanted = reference.attention(q[None, -1:].transpose(1, 2), k, qkv[None, :, 6:].transpose(1, 2), 0.25)[:, :, 0]
    assert (found - wanted).norm() / wanted.norm() < 0.2  # 4 bits


def test_a_weight_on_a_gpu_gets_a_kernel_for_gpus() -> None:
    """As far as that can be seen without one: what no CUDA C++ kernel reads is Triton's."""
    codes, grid = SimpleNamespace(device=torch.device("cuda")), Grid(4, 32, inputs=Inputs("int"))
    there: Any = SimpleNamespace(
        codes=codes, shape=(2, 2), grid=grid, dequantize=lambda _: torch.eye(2), input_scale=None
    )
    found = kernels.prepare(there, "packed")
    assert found.multiply.__module__ == "infopt.kernels.triton.linear"


def test_without_triton_a_gpu_is_refused_and_everything_else_works() -> None:
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
from types import SimpleNamespace
import torch
import infopt.kernels.cpu, infopt.kernels.operators
from infopt.errors import Unsupported
assert "infopt.kernels.triton" not in sys.modules
print(torch.ops.infopt.gated(torch.ones(1, 4), "silu")[0].shape)
try:
    grid = SimpleNamespace(inputs=True)
    there = SimpleNamespace(codes=SimpleNamespace(device=torch.device("cuda")), shape=(2, 2), grid=grid)
    infopt.kernels.prepare(there, "packed")
except Unsupported as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 2])" in done.stdout
    assert "need Triton" in done.stdout
    assert 'pip install "infopt[gpu]"' in done.stdout
