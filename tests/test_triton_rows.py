"""Norms, gated activations and rounding, by Triton's interpreter, against `kernels.reference`."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from infopt.grid import FP8, Inputs
from infopt.kernels import reference
from infopt.kernels.triton import numeric, rows
from tests.triton_tools import assert_caught, assert_close, assert_codes, planted, poisoned

# The interpreter cuts bits off where a GPU rounds: up to 2^-7 of a BF16 value.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 4e-4}
KINDS = {"int8": "int", "fp8": "float"}


def tokens(rows_: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Ordinary values, a token of zeros, one of tiny and one of large values, and an outlier."""
    x = torch.randn(rows_, columns, generator=torch.Generator().manual_seed(rows_ * columns))
    x[rows_ // 2] *= 1e-3
    x[0, columns // 2] = 300
    if rows_ > 2:
        x[1] = 0
    return x.to(dtype)


def check_norm(module: ModuleType, shape: tuple[int, int], dtype: torch.dtype, added: bool) -> None:
    x, residual, weight = tokens(*shape, dtype), tokens(*shape, dtype).flip(0), torch.rand(shape[1]).to(dtype) + 0.5
    wanted, summed = reference.add_rms_norm(x, residual if added else None, weight, 1e-5)
    with poisoned():
        y, _, h = module.add_rms_norm(x, residual if added else None, weight, 1e-5)
    assert y.dtype == h.dtype == dtype
    assert_close(h, summed, 0.0, "the sum")
    assert_close(y, wanted, TOLERANCE[dtype], "the norm")


def check_norm_quantized(module: ModuleType, shape: tuple[int, int], kind: str, group: int, static: bool) -> None:
    x, residual, weight = tokens(*shape, torch.bfloat16), tokens(*shape, torch.bfloat16), torch.rand(shape[1]) + 0.5
    given = torch.tensor([0.02]) if static else None
    wanted, _ = reference.add_rms_norm(x, residual, weight, 1e-5)
    codes, scale = reference.quantize(wanted, Inputs(KINDS[kind], not static, group or None), given)
    with poisoned():
        found, found_scale, _ = module.add_rms_norm(x, residual, weight, 1e-5, kind, group, given)
    assert_close(found_scale, scale, 1e-6, "the scale")
    assert_codes(found, codes)


def check_gated(module: ModuleType, shape: tuple[int, int], act: str, kind: str, group: int) -> None:
    x = tokens(shape[0], 2 * shape[1], torch.bfloat16)
    wanted = reference.gated(x, act)
    with poisoned():
        y, scale = module.gated(x, act, kind, group)
    if kind == "none":
        assert_close(y, wanted, TOLERANCE[torch.bfloat16], "the product")
    else:
        codes, wanted_scale = reference.quantize(wanted, Inputs(KINDS[kind], True, group or None))
        assert_close(scale, wanted_scale, 1e-6, "the scale")
        assert_codes(y, codes)


def check_quantize(module: ModuleType, kind: str, group: int, scale: float | None) -> None:
    """The same codes, bit for bit: nothing is summed here."""
    x = tokens(6, 96)
    given = None if scale is None else torch.tensor([scale])
    wanted, wanted_scale = reference.quantize(x, Inputs(KINDS[kind], scale is None, group or None), given)
    with poisoned():
        codes, found_scale = module.quantize(x, kind, group, given)
    assert_close(found_scale, wanted_scale, 0.0, "the scale")
    assert_codes(codes, wanted, share=0.0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 16), (5, 100), (3, 576)])
@pytest.mark.parametrize("added", [True, False])
def test_norm(shape, dtype, added) -> None:
    check_norm(rows, shape, dtype, added)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("group", "static"), [(0, False), (32, False), (128, False), (0, True)])
def test_norm_quantized(kind, group, static) -> None:
    check_norm_quantized(rows, (7, 384), kind, group, static)


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("kind", "group"), [("none", 0), ("int8", 0), ("fp8", 0), ("fp8", 32)])
def test_gated(act, kind, group) -> None:
    check_gated(rows, (5, 96), act, kind, group)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [0, 32])
def test_quantize(kind, group) -> None:
    check_quantize(rows, kind, group, None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.02, 1e-6, 3.0])
def test_quantize_by_a_given_scale(kind, scale) -> None:
    check_quantize(rows, kind, 0, scale)


def test_every_e4m3_value_and_edge() -> None:
    """All values, the middles between them, their neighbours in fp32, and what is too large."""
    values = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    values = values[values.isfinite()].unique()
    middles = (values[1:] + values[:-1]) / 2
    x = torch.cat((values, middles, torch.nextafter(middles, middles + 1), torch.nextafter(middles, middles - 1)))
    x = torch.cat((x, torch.tensor([449.0, 465.0, -1e30, 1e-12, -0.0])))
    codes, _ = rows.quantize(x[None], "fp8", 0, torch.ones(1))
    assert torch.equal(codes.view(torch.uint8)[0], x.clamp(-448, 448).to(FP8).view(torch.uint8))


def test_no_tokens() -> None:
    y, scale, h = rows.add_rms_norm(torch.empty(0, 64), torch.empty(0, 64), torch.ones(64), 1e-5, "int8")
    assert (y.shape, scale.shape, h.shape) == ((0, 64), (0, 1), (0, 64))


NORM_BUGS = [
    ("h += tl.load(residual", "h -= tl.load(residual"),
    ("tl.sum(tl.sum(h * h, axis=1), axis=0) / C", "tl.sum(tl.sum(h * h, axis=1), axis=0) / BLOCK"),
    ("h.to(y.dtype.element_ty), mask=inside)", "h.to(y.dtype.element_ty), mask=c < C - 1)"),
]


@pytest.mark.parametrize(("old", "new"), NORM_BUGS)
def test_planted_bugs_in_the_norm_are_caught(old, new, tmp_path) -> None:
    assert_caught(check_norm, planted(rows, tmp_path, old, new), (5, 100), torch.float32, True)


@pytest.mark.parametrize(
    ("old", "new", "inside"),
    [
        ("s = s[:, None]", "s = tl.max(s, axis=0)", None),  # one scale for all groups
        ('127.0 if KIND == "int8" else 448.0', '127.0 if KIND == "fp8" else 448.0', None),
        ("ratio = tl.div_rn(h, s + tl.zeros_like(h))", "ratio = h * (s + tl.zeros_like(h))", None),
        ("return (x + MAGIC) - MAGIC", "return tl.floor(x)", numeric),
    ],
)
def test_planted_bugs_in_rounding_are_caught(old, new, inside, tmp_path) -> None:
    assert_caught(check_norm_quantized, planted(rows, tmp_path, old, new, inside), (7, 384), "int8", 128, False)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0x7FFFF + ((size >> 20) & 1)", "0x7FFFF"),  # halves go down and not to the even value
        ("(120 << 3)", "(121 << 3)"),
        ("tl.abs(x) * 512.0", "tl.abs(x) * 256.0"),
    ],
)
def test_planted_bugs_in_e4m3_are_caught(old, new, tmp_path) -> None:
    broken = planted(rows, tmp_path, old, new, numeric)
    with pytest.raises(AssertionError, match="off by"):
        for scale in (0.02, 1.0, 3.0, 2.0**20):
            check_quantize(broken, "fp8", 0, scale)
            x = torch.arange(0, 448, 0.25)[None]
            assert_codes(broken.quantize(x, "fp8", 0, torch.ones(1))[0], x.to(FP8), 0.0)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tl.load(x + t * 2 * C + C + c", "tl.load(x + t * 2 * C + c"),  # the gate twice
        ("activate(gate, ACT, GPU) * up", "gate * activate(up, ACT, GPU)"),
        ("tl.load(x + t * 2 * C + c, mask=c < C", "tl.load(x + t * C + c, mask=c < C"),  # the wrong stride
    ],
)
def test_planted_bugs_in_the_gate_are_caught(old, new, tmp_path) -> None:
    assert_caught(check_gated, planted(rows, tmp_path, old, new), (5, 96), "silu", "none", 0)
