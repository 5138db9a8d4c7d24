"""Exact candidates of an output head: the kernels by Triton's interpreter against the meaning, and the head that uses them."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from infopt.kernels import reference
from infopt.kernels.cuda.linear import CudaLinear
from infopt.kernels.triton import head
from infopt.runtime.head import LEAST_ON_GPU, Cuda, Half, PackedHead, _rounded, pack_head
from tests.triton_tools import assert_caught, assert_close, planted, poisoned


def check(module: ModuleType, tokens: int, shape: tuple[int, int], dtype: torch.dtype, biased: bool) -> None:
    """Rough logits of a weight in 8 bits, with bounds so wide that there are dozens of candidates; three tokens have one of
    zeros, whose logits are all known."""
    generator = torch.Generator().manual_seed(tokens)
    weight_VC = torch.randn(shape, generator=generator).to(dtype)
    x_TC = torch.randn(tokens, shape[1], generator=generator).bfloat16()
    x_TC[2:] = 0
    scale_V = weight_VC.float().abs().amax(1) / 127
    codes_VC = (weight_VC.float() / scale_V[:, None]).round()
    rough_TV = (x_TC.float() @ (codes_VC * scale_V[:, None]).T).bfloat16()
    bias_V = torch.randn(shape[0], generator=generator) * 5 if biased else None
    wanted = reference.rescore(rough_TV, x_TC, weight_VC, 20 * scale_V, bias_V)
    with poisoned():
        found = module.rescore(rough_TV, x_TC, weight_VC, 20 * scale_V, bias_V)
    assert found.dtype == torch.float32
    assert_close(found, wanted, 1e-6)
    exact = x_TC.float() @ weight_VC.float().T + (0 if bias_V is None else bias_V)
    assert torch.equal(found.argmax(1), exact.argmax(1)), "the most likely token is off by one"
    assert not torch.equal(found[0], exact[0])
    assert torch.equal(module.rescore(rough_TV[:1], x_TC[:1], weight_VC, 20 * scale_V, bias_V), found[:1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("tokens", "shape"), [(1, (1100, 64)), (3, (2050, 100)), (2, (700, 4160))])
def test_the_kernels_find_and_compute_the_candidates(tokens, shape, dtype, biased) -> None:
    check(head, tokens, shape, dtype, biased)


def trap(module: ModuleType, share: float) -> int:
    """The most likely token, which is the second, of two whose rough logits are a share too high and too low."""
    x_TC, weight_VC = torch.ones(1, 64).bfloat16(), torch.zeros(1500, 64).bfloat16()
    weight_VC[3], weight_VC[1300] = 1.0, 1.0078125  # of different slices
    rough_TV, margin_V = torch.zeros(1, 1500), torch.full((1500,), share * 8)
    rough_TV[0, 3], rough_TV[0, 1300] = 64 * 1.03, 64 * 0.97
    return int(module.rescore(rough_TV.bfloat16(), x_TC, weight_VC, margin_V).argmax())


@pytest.mark.parametrize("module", [head, reference], ids=["kernel", "meaning"])
def test_a_token_that_is_roughly_the_second_is_found_by_its_bound_alone(module) -> None:
    assert trap(module, 0.03) == 1300
    assert trap(module, 0.0) == 3


@pytest.mark.parametrize("module", [head, reference], ids=["kernel", "meaning"])
def test_what_is_no_number_shows_and_ends(module) -> None:
    x_TC, weight_VC = torch.randn(3, 64).bfloat16(), torch.randn(1500, 64).bfloat16()
    rough_TV, margin_V = x_TC.float() @ weight_VC.float().T, torch.full((1500,), 0.01)
    rough_TV[0] = x_TC[0] = torch.nan
    rough_TV[1, 700] = torch.nan
    found_TV = module.rescore(rough_TV, x_TC, weight_VC, margin_V)
    assert found_TV[0].isnan().all()
    assert found_TV[1, 700].isnan()
    assert torch.isfinite(found_TV[2]).all()
    assert found_TV[2].argmax() == rough_TV[2].argmax()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("& (logit + off >= least)", "& (logit >= least)"),
        ("tl.where(v < V, logit - off,", "tl.where(v < V, logit + off,"),
        ("mask=s < parts, other", "mask=s < 1, other"),  # the first slice alone
        ("logit += tl.load(bias", "logit -= tl.load(bias"),
        ("exact += tl.load(bias", "exact -= tl.load(bias"),
        ("likely & (v > one)", "likely & (v > one + 1100)"),
        ("weight + one.to(tl.int64) * C", "weight + one.to(tl.int64) * (C - 1)"),
        ("margin + v, mask=v < V, other=0.0) * length", "margin + v, mask=v < V, other=0.0)"),
        ("tl.store(y + t * V + v, logit, mask=v < V)", "tl.store(y + t * V + v, logit, mask=v < V - 1)"),
    ],
)
def test_planted_bugs_are_caught(old, new, tmp_path) -> None:
    assert_caught(check, planted(head, tmp_path, old, new), 2, (2050, 100), torch.bfloat16, True)


def close_rows(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A weight whose rows are nearly the same, so that 8 bits do not tell them apart; tokens; a bias that is no help."""
    generator = torch.Generator().manual_seed(1)
    weight_VC = torch.randn(128, generator=generator) + 0.02 * torch.randn(301, 128, generator=generator)
    x_BTC, bias_V = torch.randn(2, 4, 128, generator=generator), 0.01 * torch.randn(301, generator=generator)
    return weight_VC.to(dtype), x_BTC, bias_V


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_the_packed_head_of_a_gpu_has_the_most_likely_token_of_the_stored_one(dtype, biased) -> None:
    weight_VC, x_BTC, bias_V = close_rows(dtype)
    rough = Cuda.of(weight_VC)
    assert rough is not None
    packed = PackedHead(weight_VC, bias_V if biased else None, rough)
    found = packed(x_BTC)
    wanted = x_BTC.bfloat16().float() @ weight_VC.float().T + (bias_V if biased else 0)
    assert found.shape == wanted.shape and found.dtype == torch.float32
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))
    assert not torch.equal(rough.linear(x_BTC.bfloat16()).argmax(-1), wanted.argmax(-1))  # else this shows nothing
    assert packed.kernel == "cuda-int8" and packed.packed_bytes == weight_VC.numel()
    packed.fine = True
    assert torch.equal(packed(x_BTC), found)


@pytest.mark.parametrize("make", [Half, Cuda.of])
def test_the_most_likely_token_does_not_depend_on_the_number_of_texts(make) -> None:
    """More than 32 meet the stored weight in torch's product, which rounds logits to bf16: ties and wrong orders."""
    weight_VC, x_BTC, bias_V = close_rows(torch.bfloat16)
    many_TC = x_BTC.flatten(0, 1).repeat(9, 1)
    found = PackedHead(weight_VC, bias_V, make(weight_VC))(many_TC)
    wanted = many_TC.bfloat16().float() @ weight_VC.float().T + bias_V
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))
    assert not torch.equal((many_TC.bfloat16() @ weight_VC.T + bias_V).argmax(-1), wanted.argmax(-1))


def test_rows_that_rounding_puts_off_along_themselves_keep_to_their_bound() -> None:
    """Rows of seven values on each side, whose roundings to 8 bits all have the sign of the weight, and tokens along rows."""
    generator = torch.Generator().manual_seed(0)
    weight_VC = torch.randint(-7, 8, (200, 4096), generator=generator).float()
    towards_TC = weight_VC[:50] / weight_VC[:50].norm(dim=1, keepdim=True)
    x_TC = 0.3 * towards_TC + torch.randn(50, 4096, generator=generator) / 64
    q, off_V = _rounded(weight_VC)
    plain_VC = (weight_VC / (7 / 127)).round() * (7 / 127)
    bound_TV = off_V * 6 / 64 * x_TC.norm(dim=1, keepdim=True)
    for rounded_VC, within in ((q.dequantize(), True), (plain_VC, False)):
        assert bool(((x_TC @ (rounded_VC - weight_VC).T).abs() <= bound_TV).all()) is within


def test_a_weight_that_8_bits_do_not_hold_stays_in_16() -> None:
    weight_VC = 0.15 * torch.randint(-1, 2, (500, 1024), generator=torch.Generator().manual_seed(0)).float()
    weight_VC[:, 0] = 13.0  # and 0.15 is one and a half of its 127 steps
    assert Cuda.of(weight_VC.bfloat16()) is None


def test_a_small_head_on_a_gpu_and_one_without_a_kernel_stay_in_16_bits(monkeypatch) -> None:
    assert Cuda.of(torch.ones(300, 96)) is None
    weight_VC = torch.zeros(1000, 64, device="meta")
    assert weight_VC.numel() < LEAST_ON_GPU
    packed = pack_head(nn.Linear(64, 1000), weight_VC)
    assert packed is not None
    assert packed.kernel == "float32" and packed.packed_bytes == weight_VC.nbytes and packed.linear is None


def test_a_kernel_that_gives_something_else_is_not_taken(monkeypatch) -> None:
    weight_VC, *_ = close_rows(torch.bfloat16)
    monkeypatch.setattr(CudaLinear, "__call__", lambda self, x: torch.zeros(len(x), 301, dtype=x.dtype))
    assert Cuda.of(weight_VC) is None
