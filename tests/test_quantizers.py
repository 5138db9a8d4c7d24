"""The solvers against their definitions, and the laws that every one of them keeps."""

from __future__ import annotations

import compressed_tensors.compressors.pack_quantized.helpers as theirs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infopt.calibration.stats import InputStats
from infopt.exporters.compressed_tensors import decode, encode
from infopt.exporters.packing import pack_bits, unpack_bits
from infopt.grid import Grid
from infopt.quantizers import awq, gptq
from infopt.quantizers.correction import corrected
from infopt.quantizers.rounding import choose_range, group_forms, round_nearest

GRIDS = [Grid(bits, group, symmetric) for bits in (2, 3, 4, 8) for group in (32, None) for symmetric in (True, False)]


def layer(rows: int = 24, columns: int = 96, tokens: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and inputs whose channels are correlated and of very different size, as in real models."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    sizes = torch.exp(torch.randn(columns, generator=generator))
    x_TC = (torch.randn(tokens, columns, generator=generator) @ mix) * sizes
    return torch.randn(rows, columns, generator=generator), x_TC


def slow_gptq(w_OI: torch.Tensor, h_CC: torch.Tensor, grid: Grid, damp: float) -> torch.Tensor:
    """Frantar et al. 2022, one column at a time, in double precision but for the grid's own arithmetic."""
    h = h_CC.double() + damp * h_CC.double().diagonal().mean() * torch.eye(len(h_CC), dtype=torch.float64)
    u_CC = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    w = w_OI.double().clone()
    codes, width = torch.zeros_like(w), grid.width(w.shape[1])
    for j in range(w.shape[1]):
        if j % width == 0:
            group = w[:, j : j + width].float()
            cost_K = (u_CC.diagonal()[j : j + width] ** -2).float()
            scale, zero = choose_range(group, grid, cost_K, gptq._RATIOS)
        codes[:, j] = grid.encode(w[:, j : j + 1].float(), scale, zero)[:, 0]
        error = (w[:, j] - grid.decode(codes[:, j : j + 1], scale, zero)[:, 0]) / u_CC[j, j]
        w[:, j:] -= error[:, None] * u_CC[j, j:]
    return codes


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gptq_is_its_definition(grid: Grid) -> None:
    """The blocked, recursive solver gives the definition's codes; single codes may differ where a value lies half-way."""
    w_OI, x_TC = layer(columns=160)
    h_CC = x_TC.T @ x_TC
    q, damp = gptq.solve(w_OI, h_CC, grid, 0.01)
    differ = (q.codes != slow_gptq(w_OI, h_CC, grid, 0.01)).double().mean()
    assert damp == 0.01 and differ < 0.005
    plain = round_nearest(w_OI, grid, *choose_range(w_OI, grid, h_CC.diagonal()))
    assert awq.output_error(q.dequantize() - w_OI, h_CC) < awq.output_error(plain.dequantize() - w_OI, h_CC)


def test_act_order_on_ordered_columns_changes_nothing_but_the_ranges() -> None:
    """Columns that already fall in importance keep their place, so act-order is plain GPTQ on static ranges."""
    w_OI, x_TC = layer()
    x_TC = x_TC[:, x_TC.square().sum(0).argsort(descending=True)]
    h_CC = x_TC.T @ x_TC
    grid = Grid(4, None, False)
    assert torch.equal(gptq.solve(w_OI, h_CC, grid)[0].codes, gptq.solve(w_OI, h_CC, grid, act_order=True)[0].codes)


def test_act_order_restores_the_columns() -> None:
    """With a diagonal Hessian nothing is compensated, so any order of columns must give plain rounding."""
    w_OI, _ = layer()
    h_CC = torch.diag(torch.rand(96) + 0.5)
    grid = Grid(4, 32, False)
    cost_C = h_CC.diagonal() + 0.01 * h_CC.diagonal().mean()
    plain = round_nearest(w_OI, grid, *choose_range(w_OI, grid, cost_C, gptq._RATIOS))
    for act_order in (False, True):
        q, _ = gptq.solve(w_OI, h_CC, grid, 0.01, act_order)
        assert torch.equal(q.codes, plain.codes) and torch.equal(q.scale, plain.scale)


def test_feedback() -> None:
    _, x_TC = layer()
    h_CC = x_TC.T @ x_TC
    feed_CC, cost_C, damp = gptq.feedback(h_CC, 0.05)
    damped = (h_CC + 0.05 * h_CC.diagonal().mean() * torch.eye(96)).double()
    product = (feed_CC.double() * cost_C) @ feed_CC.double().T
    assert damp == 0.05 and torch.allclose(product, damped, rtol=1e-5, atol=1e-5 * damped.max().item())
    assert torch.equal(feed_CC, feed_CC.triu())


@pytest.mark.parametrize("act_order", [False, True])
def test_a_pass_of_descent_is_its_definition(act_order: bool) -> None:
    """Each column in turn takes, of all codes, those with the least error of the whole row, then each group in turn, of the
    scales that can be stored, the best; and no pass makes the error larger."""
    w_OI, x_TC = layer(rows=6, columns=64)
    h_CC, grid = x_TC.T @ x_TC, Grid(3, 32, False)
    damped = h_CC + 0.05 * h_CC.diagonal().mean() * torch.eye(64)
    order = h_CC.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(64)
    q, _ = gptq.solve(w_OI, h_CC, grid, 0.05, act_order)
    codes, scale, zero = (part.double() for part in (q.codes, q.scale, q.zero))
    errors = []
    for passes in range(3):
        found = gptq.solve(w_OI, h_CC, grid, 0.05, act_order, passes)[0]
        assert (found.codes != codes).double().mean() < 0.01  # where two codes are equally good
        assert (found.scale.double() != scale).double().mean() < 0.1
        errors.append(awq.output_error(found.dequantize() - w_OI, damped))

        def best(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            d = (codes - zero.repeat_interleave(32, 1)) * scale.repeat_interleave(32, -1) - w_OI
            return torch.einsum("noi,ij,noj->no", d, damped.double(), d).argmin(0)

        for j in order.tolist():
            tried = codes.repeat(8, 1, 1)
            tried[:, :, j] = torch.arange(8)[:, None]
            codes[:, j] = best(tried, scale).double()
        for g in range(2):
            tried = scale.repeat(128, 1, 1)
            steps = torch.arange(-64, 64, dtype=torch.int16)[:, None]
            tried[:, :, g] = (scale[:, g].bfloat16().view(torch.int16) + steps).view(torch.bfloat16).double()
            scale[:, g] = tried[best(codes, tried), torch.arange(6), g]
    assert errors[0] > errors[1] >= errors[2]


def test_singular_hessian_raises_damping() -> None:
    w_OI, x_TC = layer(tokens=3)
    q, damp = gptq.solve(w_OI, x_TC.T @ x_TC, Grid(4, 32), damp=0.0)
    assert damp > 0 and bool(torch.isfinite(q.scale).all())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("kind", ["zeros", "constant", "outlier", "negative", "tiny"])
def test_awkward_weights_get_finite_scales(grid: Grid, kind: str) -> None:
    w_OI, x_TC = layer()
    w_OI = {
        "zeros": torch.zeros_like(w_OI),
        "constant": torch.full_like(w_OI, 0.25),
        "outlier": w_OI.clone().index_put_((torch.tensor([3]), torch.tensor([5])), torch.tensor(1e30)),
        "negative": -w_OI.abs() - 1,
        "tiny": w_OI * 1e-30,
    }[kind]
    for q in (
        round_nearest(w_OI, grid, *choose_range(w_OI, grid)),
        gptq.solve(w_OI, x_TC.T @ x_TC, grid, passes=1)[0],
    ):
        assert bool(torch.isfinite(q.scale).all()) and bool((q.scale > 0).all())
        assert bool(torch.isfinite(q.dequantize()).all())
        if kind == "zeros":
            assert bool((q.dequantize() == 0).all())


def test_range_search_is_never_worse_than_the_extremes() -> None:
    w_OI, x_TC = layer()
    h_CC = x_TC.T @ x_TC
    for grid in GRIDS:
        forms = group_forms(h_CC, grid.width(96))
        ends = round_nearest(w_OI, grid, *choose_range(w_OI, grid, ratios=(1.0,))).dequantize() - w_OI
        found = round_nearest(w_OI, grid, *choose_range(w_OI, grid, forms)).dequantize() - w_OI
        block_diagonal = torch.block_diag(*forms)
        assert awq.output_error(found, block_diagonal) <= awq.output_error(ends, block_diagonal) * (1 + 1e-6)


def test_output_error_is_the_output_error() -> None:
    """The quadratic form is the squared error of the layer's output on the very inputs that were counted."""
    w_OI, x_TC = layer()
    stats = InputStats(96)
    stats.add(x_TC[:100]), stats.add(x_TC[100:])
    d_OI = 0.01 * w_OI
    direct = float((x_TC.double() @ d_OI.double().T).square().sum())
    assert awq.output_error(d_OI, stats.gram) == pytest.approx(direct, rel=1e-4)
    assert torch.allclose(stats.mean_abs, x_TC.abs().mean(0), rtol=1e-5)


def test_wide_gram_and_merge() -> None:
    """More channels than one panel, and two halves merged."""
    x_TC = torch.randn(50, 900, generator=torch.Generator().manual_seed(3))
    whole, left, right = InputStats(900), InputStats(900), InputStats(900)
    whole.add(x_TC), left.add(x_TC[:20]), right.add(x_TC[20:])
    left.merge(right)
    assert torch.allclose(whole.gram, x_TC.T @ x_TC, atol=1e-3)
    assert torch.allclose(whole.gram, left.gram, atol=1e-3) and left.tokens == 50


def test_awq_search_beats_no_scale_and_finds_the_grid_minimum() -> None:
    w_OI, x_TC = layer()
    h_CC, mean_abs_C = x_TC.T @ x_TC, x_TC.abs().mean(0)
    weights = [(w_OI, Grid(3, 32))]
    alpha, least, plain = awq.search(weights, h_CC, mean_abs_C)
    grid_of_twenty = [
        awq._rounding_error(w_OI, Grid(3, 32), awq.scale_for(mean_abs_C, a / 20), h_CC) for a in range(21)
    ]
    assert least < plain and 0 < alpha <= 1
    assert least <= min(grid_of_twenty) * 1.05


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from([2, 3, 4, 8]), rows=st.integers(1, 9), columns=st.integers(1, 70), axis=st.integers(0, 1))
def test_packing_round_trip(bits: int, rows: int, columns: int, axis: int) -> None:
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    words = pack_bits(codes, bits, axis)
    assert torch.equal(unpack_bits(words, bits, codes.shape[axis], axis), codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("axis", [0, 1])
def test_golden_bytes(bits: int, axis: int) -> None:
    """Our words are those of compressed-tensors' own packer."""
    signed = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (24, 40), dtype=torch.int8)
    unsigned = (signed.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    assert torch.equal(pack_bits(unsigned, bits, axis), theirs.pack_to_int32(signed, bits, packed_dim=axis))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_decode_is_the_inverse_of_encode(grid: Grid) -> None:
    w_OI, _ = layer()
    q = round_nearest(w_OI, grid, *choose_range(w_OI, grid))
    tensors = {name.removeprefix("layer."): tensor for name, tensor in encode("layer", q).items()}
    assert decode(tensors, grid).digest() == q.digest()
    again = round_nearest(q.dequantize(), grid, q.scale.float(), q.zero.float())
    assert again.digest() == q.digest()


def test_correction_is_least_squares() -> None:
    """W* is what an exact solver finds for min ||X' W^T - X W0^T||, and it does better than the weights that it replaces."""
    generator = torch.Generator().manual_seed(7)
    w_OC, x_TC = layer()
    seen_TC = x_TC + 0.1 * torch.randn(x_TC.shape, generator=generator)
    h_CC, d_CC = seen_TC.T @ seen_TC, (x_TC - seen_TC).T @ seen_TC
    wanted_TO = x_TC @ w_OC.T
    exact_OC = torch.linalg.lstsq(seen_TC.double(), wanted_TO.double()).solution.T.float()
    torch.testing.assert_close(corrected(w_OC, h_CC, d_CC, 1.0, 0.0), exact_OC, rtol=1e-3, atol=1e-3)
    errors = [
        float((seen_TC @ corrected(w_OC, h_CC, d_CC, strength, 0.0).T - wanted_TO).square().sum())
        for strength in (0.0, 0.5, 1.0)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert torch.equal(corrected(w_OC, torch.full((96, 96), float("nan")), d_CC, 1.0, 0.0), w_OC)
