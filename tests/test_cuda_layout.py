"""The packed layout of the CUDA kernels against a slow twin, and its limits."""

from __future__ import annotations

import pytest
import torch

from infopt.grid import FP8, Grid, Inputs
from infopt.kernels.cuda.layout import Packed, gated_order, pack
from infopt.qtensor import QTensor

from .emulator.cases import BFLOAT, CASES, HALF, SINGLE, random_weight


def code_at(packed: Packed, row: int, column: int) -> int:
    """The code of one weight, read off the words as `decode.cuh` and `unpack.cuh` describe them."""
    tile, half, g = row // 16, row % 16 // 8, row % 8
    chunk, inside = divmod(column, 64)
    fragment, t, pair, odd = inside // 32 * 2 + inside % 8 // 4, inside % 32 // 8, inside % 4 // 2, inside % 2
    lane = 4 * g + t
    if packed.codes == "INT4":
        word = int(packed.weight[tile, chunk, 0, lane, fragment])
        return word >> (8 * pair + 4 * half + 16 * odd) & 15
    vector, index = divmod(2 * fragment + pair, 4)
    word = int(packed.weight[tile, chunk, vector, lane, index])
    byte = 2 * half + odd if packed.codes == "INT8" else 2 * odd + 1 - half
    return word >> (8 * byte) & 255


@pytest.mark.parametrize("grid", [Grid(4, 64), Grid(8, None), Grid(8, 128, kind="float")], ids=["INT4", "INT8", "FP8"])
def test_every_code_is_where_the_kernels_look_for_it(grid) -> None:
    q = random_weight(24, 128, grid)
    packed = pack(q)
    assert packed is not None
    for row in range(24):
        for column in range(128):
            assert code_at(packed, row, column) == q.codes[row, column]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_packing_loses_and_adds_nothing(case) -> None:
    q, packed = case.weight, case.packed()
    assert torch.equal(packed.dequantize(SINGLE), q.dequantize(SINGLE))
    assert torch.equal(packed.dequantize(BFLOAT), q.dequantize(BFLOAT))
    bits = 8 if case.grid.bits == 8 else 4
    assert packed.weight.nbytes == -(-case.rows // 16) * 16 * case.columns * bits // 8


def test_a_symmetric_group_costs_two_bytes_and_an_asymmetric_one_four() -> None:
    for symmetric, size in ((True, 2), (False, 4)):
        packed = pack(random_weight(32, 256, Grid(4, 64, symmetric)))
        assert packed is not None
        assert packed.scales.nbytes == 32 * 4 * size


def test_wide_groups_are_several_of_128_columns() -> None:
    q = random_weight(16, 512, Grid(4, 256, False))
    packed = pack(q)
    assert packed is not None
    assert packed.group == 128
    assert torch.equal(packed.dequantize(SINGLE), q.dequantize(SINGLE))


def test_the_rows_of_a_gate_and_its_factor_alternate_by_eight() -> None:
    assert gated_order(32).tolist() == [*range(8), *range(16, 24), *range(8, 16), *range(24, 32)]


def nan_weight() -> QTensor:
    q = random_weight(16, 64, Grid(8, None, kind="float"))
    q.codes[3, 5] = torch.tensor([torch.nan]).to(FP8).view(torch.uint8).item()
    return q


@pytest.mark.parametrize(
    ("q", "why"),
    [
        (random_weight(16, 96, Grid(4, 32)), "columns that are no multiple of 64"),
        (random_weight(16, 192, Grid(4, 48)), "a group that is none of 32, 64, 128"),
        (random_weight(16, 64, Grid(8, None, inputs=Inputs())), "rounded inputs"),
        (random_weight(16, 64, Grid(4, 32, False, SINGLE)), "fp32 scales with zero points"),
        (random_weight(16, 320, Grid(8, 128, kind="float", rows=128)), "a block that is cut short"),
        (nan_weight(), "a weight that is no number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_kernel_reads_is_not_packed(q, why) -> None:
    assert pack(q) is None, why


def test_fp32_scales_that_fit_16_bits_are_stored_in_16() -> None:
    q = random_weight(16, 64, Grid(4, 32, False, HALF))
    wide = QTensor(q.codes, q.scale.float(), q.zero, Grid(4, 32, False, SINGLE))
    packed = pack(wide)
    assert packed is not None
    assert packed.scale_dtype == HALF
    assert torch.equal(packed.dequantize(SINGLE), q.dequantize(SINGLE))
