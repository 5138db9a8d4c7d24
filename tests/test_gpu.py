"""The CUDA kernels on a GPU: the emulator's cases, and what only hardware can show. Skipped without one."""

from __future__ import annotations

import pytest
import torch

from infopt import kernels
from infopt.grid import Grid
from infopt.kernels import reference
from infopt.kernels.cuda import decode
from infopt.kernels.cuda.dense import dense
from infopt.kernels.cuda.layout import Packed, pack
from infopt.kernels.cuda.linear import CudaLinear
from infopt.qtensor import QTensor
from infopt.runtime.head import Cuda, PackedHead

from .emulator.cases import BFLOAT, CASES, HALF, LIMITS, Case, random_weight

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: no NVIDIA GPU")]

DEVICE = "cuda"
SHAPES = ((4096, 4096), (6144, 4096), (4096, 14336), (576, 1536), (192, 576))


def on_gpu(q: QTensor) -> QTensor:
    return QTensor(q.codes.to(DEVICE), q.scale.to(DEVICE), q.zero.to(DEVICE), q.grid)


def multiply(packed: Packed, x_TI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """With NaN in what the kernel is to write, and in the memory that it will be given for partial sums."""
    torch.full((1 << 24,), torch.nan, device=DEVICE)
    rows = packed.shape[0] // 2 if packed.gated else packed.shape[0]
    out = torch.full((len(x_TI), rows), torch.nan, dtype=x_TI.dtype, device=DEVICE)
    return decode.multiply(packed, x_TI, bias_O, out)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_agree_with_the_reference(case) -> None:
    x_TI, bias_O = case.inputs()
    packed = pack(on_gpu(case.weight), case.gated)
    assert packed is not None
    ours = case.kernel_bias(bias_O)
    y = [multiply(packed, x_TI.to(DEVICE), None if ours is None else ours.to(DEVICE)) for _ in range(3)]
    assert case.agrees(y[0].cpu(), case.want(x_TI, bias_O))
    assert all(torch.equal(y[0], again) for again in y[1:])
    assert not packed.arrived.any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_weight_written_out_has_the_bits_that_torch_gives_it(case) -> None:
    packed = pack(on_gpu(case.weight), case.gated)
    assert packed is not None
    assert torch.equal(dense(packed, case.dtype).cpu(), case.weight.dequantize(case.dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("grid", [Grid(4, 64, False, HALF), Grid(8, None, True, BFLOAT)], ids=["W4", "W8"])
def test_a_token_gets_the_same_bits_alone_and_in_a_batch(shape, grid) -> None:
    q = on_gpu(random_weight(*shape, grid))
    packed = pack(q)
    assert packed is not None
    x_TI = torch.randn(32, shape[1], device=DEVICE).to(BFLOAT)
    together = multiply(packed, x_TI)
    want = x_TI.double() @ q.dequantize().double().T
    assert (together.double() - want).norm() / want.norm() < LIMITS[BFLOAT]
    for tokens in (1, 7, 8, 9, 16, 17):
        assert torch.equal(multiply(packed, x_TI[:tokens]), together[:tokens])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 32])
def test_what_comes_next_changes_no_result(shape, tokens) -> None:
    first, after = (pack(on_gpu(random_weight(*shape, Grid(4, 64, False, HALF), seed))) for seed in (0, 1))
    assert first is not None
    assert after is not None
    x_TI = torch.randn(tokens, shape[1], device=DEVICE).to(BFLOAT)
    alone = multiply(first, x_TI), multiply(after, x_TI)
    for _ in range(3):
        together = (
            decode.multiply(first, x_TI, ahead=after.weight),
            decode.multiply(after, x_TI, ahead=first.weight),
        )
        assert all(map(torch.equal, together, alone))


def test_a_captured_graph_gives_the_same(tokens: int = 4) -> None:
    case = Case(tokens, 512, 1024, Grid(4, 128, True, HALF), HALF)
    packed = pack(on_gpu(case.weight))
    assert packed is not None
    x_TI = case.inputs()[0].to(DEVICE)
    want = multiply(packed, x_TI)  # compiles and loads, which a capture must not
    out = torch.full_like(want, torch.nan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode.multiply(packed, x_TI, out=out)
    for _ in range(3):
        graph.replay()
        assert torch.equal(out, want)
        out.fill_(torch.nan)


@pytest.mark.parametrize("tokens", [1, 32, 33, 200])
@pytest.mark.parametrize("dtype", [HALF, BFLOAT, torch.float32], ids=str)
def test_prepare_chooses_the_kernels_for_a_weight_on_a_gpu(tokens, dtype) -> None:
    q = random_weight(96, 256, Grid(4, 64, False, HALF))
    linear = kernels.prepare(on_gpu(q), "packed")
    assert linear.kernel == "cuda-int4"
    x, bias = torch.randn(tokens, 256).to(dtype), torch.randn(96).to(dtype)
    y = linear(x.to(DEVICE)[None], bias.to(DEVICE))
    want = reference.linear(x, q, bias)
    assert y.shape == (1, tokens, 96)
    assert y.dtype == dtype
    assert (y[0].cpu().double() - want.double()).norm() / want.double().norm() < 5e-3
    exact = kernels.prepare(on_gpu(q))
    assert exact.kernel == "fp32"


@pytest.mark.parametrize("tokens", [1, 32])
def test_a_gate_and_its_factor_are_one_product(tokens) -> None:
    q, x, bias = random_weight(96, 256, Grid(4, 64, False, HALF)), torch.randn(tokens, 256), torch.randn(96)
    linear = CudaLinear.of(on_gpu(q), gated=True)
    assert linear is not None
    gate, up = reference.linear(x, q, bias).double().chunk(2, dim=-1)
    want = torch.nn.functional.silu(gate) * up
    assert (linear(x.to(DEVICE), bias.to(DEVICE)).cpu().double() - want).norm() / want.norm() < 1e-2


@pytest.mark.parametrize("tokens", [1, 5, 32, 33])
def test_the_most_likely_token_is_that_of_the_stored_head(tokens) -> None:
    """Of a vocabulary with close neighbours, among which 8 bits alone do not find it; alone and in a batch."""
    weight_VC = torch.randn(20001, 4096, device=DEVICE)
    weight_VC[10000:20000] = weight_VC[:10000] + 0.01 * torch.randn(10000, 4096, device=DEVICE)
    weight_VC, x_TC = weight_VC.to(BFLOAT), torch.randn(tokens, 4096, device=DEVICE).to(BFLOAT)
    bias_V = torch.randn(20001, device=DEVICE)
    rough = Cuda.of(weight_VC)
    assert rough is not None
    head = PackedHead(weight_VC, bias_V, rough)
    found_TV = head(x_TC)
    want_TV = x_TC.double() @ weight_VC.double().T + bias_V.double()
    assert found_TV.dtype == torch.float32
    assert (found_TV - want_TV).norm() / want_TV.norm() < 2e-2
    assert torch.equal(found_TV, head(x_TC))
    if tokens <= decode.MOST_TOKENS:
        assert torch.equal(found_TV.argmax(1), want_TV.argmax(1))
        assert torch.equal(found_TV[:1], head(x_TC[:1]))
