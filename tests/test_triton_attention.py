"""Rotary angles, the cache and attention, by Triton's interpreter, against `kernels.reference`."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch

from infopt.kernels import reference
from infopt.kernels.pages import PAGE, Pages
from infopt.kernels.triton import attention, cache, decode, numeric
from infopt.kv_cache import CacheGrid, CacheScales
from infopt.runtime import store
from tests.triton_tools import assert_caught, assert_close, planted, poisoned

OWN = {
    "none": None,
    "fp8": CacheGrid("float", 8, "token"),
    "int8": CacheGrid("int", 8, "token"),
    "int8 with zeros": CacheGrid("int", 8, "token", symmetric=False),
    "int4": CacheGrid("int", 4, "token"),
    "int4 with zeros": CacheGrid("int", 4, "token", symmetric=False),
}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def static_pages(slots: int, heads: int, width: int, grid: CacheGrid, seed: int) -> Pages:
    """A cache with the scales of a calibration."""
    sizes = {"tensor": (1, 1), "head": (heads, 1), "channel": (heads, width)}[grid.strategy]
    scale = random(*sizes, seed=seed).abs() * 0.02 + (0.3 if grid.bits == 4 else 0.02)
    zero = (
        None if grid.symmetric else torch.randint(2, 14, sizes, generator=torch.Generator().manual_seed(seed)).float()
    )
    return replace(Pages.empty(slots, heads, width, grid), scale=scale, zero=zero)


def halves(slots: int, heads: int, width: int, grid: CacheGrid | None) -> tuple[Pages, Pages]:
    if grid is None or grid.strategy == "token":
        return Pages.empty(slots, heads, width, grid), Pages.empty(slots, heads, width, grid)
    return static_pages(slots, heads, width, grid, 1), static_pages(slots, heads, width, grid, 2)


def copies(pair: tuple[Pages, ...]) -> tuple[Pages, ...]:
    fields = ("codes", "scale", "zero")
    return tuple(
        replace(half, **{name: part.clone() for name in fields if (part := getattr(half, name)) is not None})
        for half in pair
    )


def check_rope(
    module: ModuleType, shape: tuple[int, int, int], turned: int, grid: CacheGrid | None, norm: bool
) -> None:
    """The rotated queries, and every byte of the cache."""
    queries, heads, width = shape
    qkv = random(2, queries + 2 * heads, width)
    angle = random(2, turned // 2, seed=1).repeat(1, 2)
    weights = (random(width, seed=2), random(width, seed=3)) if norm else (None, None)
    slots = torch.tensor([40, 3])
    wanted_cache = halves(48, heads, width, grid)
    found_cache = copies(wanted_cache)
    wanted = reference.rope_write(qkv, angle.cos(), angle.sin(), *weights, 1e-5, slots, *wanted_cache)
    with poisoned():
        found = module.rope_write(qkv, angle.cos(), angle.sin(), *weights, 1e-5, slots, *found_cache)
    assert_close(found, wanted, 1e-6, "the queries")
    for half, wanted_half in zip(found_cache, wanted_cache, strict=True):
        if grid is None:
            assert_close(half.codes, wanted_half.codes, 1e-6, "the cache")
            continue
        wrong = (half.codes != wanted_half.codes).float().mean().item()
        assert wrong < 2e-3, f"the codes are off by {wrong:.1%}"
        assert_close(half.scale, wanted_half.scale, 1e-2, "the scales")
        if wanted_half.zero is not None:
            assert_close(half.zero, wanted_half.zero, 0.0, "the zero points")


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize(("shape", "turned", "norm"), [((2, 1, 16), 16, True), ((1, 1, 20), 8, False)])
def test_rope_and_cache(kind, shape, turned, norm) -> None:
    check_rope(cache, shape, turned, OWN[kind], norm)


@pytest.mark.parametrize(
    ("kind", "bits", "symmetric", "strategy"),
    [
        ("float", 8, True, "tensor"),
        ("int", 8, True, "head"),
        ("int", 8, False, "channel"),
        ("int", 4, False, "channel"),
    ],
)
def test_rope_and_cache_with_scales_of_a_calibration(kind, bits, symmetric, strategy) -> None:
    check_rope(cache, (2, 2, 16), 16, CacheGrid(kind, bits, strategy, symmetric), False)


def test_the_runtime_hands_the_scales_of_a_calibration_to_its_pages() -> None:
    x, slots, grid = random(6, 2, 16), torch.tensor([4, 3, 7, 8, 0, 5]), CacheGrid("int", 4, "channel", symmetric=False)
    ours = static_pages(48, 2, 16, grid, 1)
    assert ours.scale is not None
    assert ours.zero is not None
    scales = CacheScales({"k": ours.scale[None, :, None]}, {"k": ours.zero[None, :, None]})
    kept = store.Half(store.LayerKind(grid=grid, scales=scales), "k", 48, x)
    kept.write(slots, x)
    ours.write(slots, x)
    assert torch.equal(ours.codes, next(kept.parts()))
    assert torch.equal(ours.read(slots), kept.read(slots))


ROPE_BUGS = [
    ("tl.where(low, -other, other)", "tl.where(low, other, -other)", "none"),
    ("partner = tl.where(low, c + R // 2, c - R // 2)", "partner = c ^ 1", "none"),  # interleaved pairs
    ("value * r * tl.load(weight + c", "value * tl.load(weight + c", "none"),
    ("else 255.0 if KIND == \"int8\" else 15.0\n    if ZERO:", "else 127.0 if KIND == \"int8\" else 7.0\n    if ZERO:", "int8"),
    ("tl.store(codes + at * D + c, _code(", "tl.store(codes + at * D + (c ^ 1), _code(", "fp8"),
    ("_code(even, s, z, KIND) | _code(odd, s, z, KIND) << 4", "_code(odd, s, z, KIND) | _code(even, s, z, KIND) << 4", "int4"),
    ("v_codes, v_scale, v_zero, slot * H + head", "v_codes, k_scale, v_zero, slot * H + head", "int8"),  # swapped scales
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "kind"), ROPE_BUGS)
def test_planted_bugs_in_rope_are_caught(old, new, kind, tmp_path) -> None:
    assert_caught(check_rope, planted(cache, tmp_path, old, new), (2, 2, 16), 16, OWN[kind], True)


# Decoding


def check_decode(
    module: ModuleType, shape: tuple[int, int, int], grid: CacheGrid | None, window: int | None = None,
    cap: float | None = None, splits: int = 3, dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """Texts of several lengths, one of a single token, in pages in any order; a ring of pages where there is a window."""
    queries, heads, width = shape
    lengths = torch.tensor([1, 131])
    count = torch.tensor([9, 9] if window is None else [5, 5])
    tables = torch.randperm(20, generator=torch.Generator().manual_seed(5))[:18].view(2, 9)
    keys, values = halves(20 * PAGE, heads, width, grid)
    everything = torch.arange(20 * PAGE)
    keys.write(everything, random(20 * PAGE, heads, width, seed=6) * 2)
    values.write(everything, random(20 * PAGE, heads, width, seed=7))
    q = random(2, queries, width, seed=8, dtype=dtype)
    arguments = (tables, count, lengths, width**-0.5, window, cap)
    wanted = reference.paged_decode(q, keys, values, *arguments)
    with poisoned():
        found = module.paged_decode(q, keys, values, *arguments, splits=splits)
    assert found.dtype == dtype
    assert_close(found, wanted, TOLERANCE[dtype], "the result")


@pytest.mark.parametrize(("kind", "splits"), [("none", 1), *((kind, 3) for kind in OWN)])
def test_decode(kind, splits) -> None:
    check_decode(decode, (8, 2, 32), OWN[kind], splits=splits)


@pytest.mark.parametrize("kind", ["none", "fp8", "int4 with zeros"])
def test_decode_with_a_window_in_a_ring_and_a_cap(kind) -> None:
    check_decode(decode, (6, 2, 40), OWN[kind], window=50, cap=3.0)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("none", torch.bfloat16), ("int8", torch.float16), ("fp8", torch.bfloat16)]
)
def test_decode_in_16_bits(kind, dtype) -> None:
    check_decode(decode, (2, 1, 64), OWN[kind], splits=1, dtype=dtype)


@pytest.mark.parametrize(
    ("kind", "bits", "symmetric", "strategy"),
    [
        ("float", 8, True, "tensor"),
        ("int", 8, True, "head"),
        ("int", 8, False, "channel"),
        ("int", 4, False, "channel"),
    ],
)
def test_decode_with_scales_of_a_calibration(kind, bits, symmetric, strategy) -> None:
    check_decode(decode, (8, 2, 32), CacheGrid(kind, bits, strategy, symmetric))


DECODE_BUGS = [
    ("there = position < length", "there = position <= length", "none"),  # one token too many
    ("place = place % count", "place = place % (count - 1)", "none"),
    ("total = total * shrink + tl.sum(weight, axis=1)", "total = total + tl.sum(weight, axis=1)", "none"),
    ("seen & (position >= length - WINDOW)", "seen & (position > length - WINDOW)", "none"),
    ("score *= tl.load(k_scale + at,", "score *= tl.load(v_scale + at,", "int8"),  # swapped scales
    ("sum1 * shrink[:, None]", "sum1", "int4"),
    ("x = ((byte >> 4).to(tl.float32) - 8.0)", "x = (byte >> 4).to(tl.float32)", "int4"),
    ("below = below * shrink", "below = below", "int4 with zeros"),  # of the values
    ("score -= from_zero[:, None] * ", "score -= ", "int4 with zeros"),  # of the keys
    ("(query * S + s)[:, None] * D", "(query * SPLITS + s)[:, None] * D", "none"),  # the wrong stride
    ("tl.sum(sums_SD * weight_S[:, None], axis=0)", "tl.sum(sums_SD, axis=0)", "none"),  # no rescaling at the merge
]


@pytest.mark.parametrize(("old", "new", "kind"), DECODE_BUGS)
def test_planted_bugs_in_decode_are_caught(old, new, kind, tmp_path) -> None:
    window = 50 if "WINDOW" in old or "place" in old else None
    assert_caught(check_decode, planted(decode, tmp_path, old, new), (4, 2, 32), OWN[kind], window)


def test_a_wrong_e4m3_is_caught(tmp_path) -> None:
    broken = planted(decode, tmp_path, "(code & 0x80) << 8", "(code & 0x80) << 7", numeric)
    assert_caught(check_decode, broken, (8, 2, 32), OWN["fp8"])


# Many tokens


def check_attention(
    module: ModuleType, heads: tuple[int, int], queries: int, tokens: int, width: int, window: int | None = None,
    cap: float | None = None, dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    q, k, v = (
        random(2 if queries < 50 else 1, count, n, width, seed=n + i, dtype=dtype)
        for i, (n, count) in enumerate(((heads[0], queries), (heads[1], tokens), (heads[1], tokens)))
    )
    q, k, v = (x.transpose(1, 2) for x in (q * 2, k * 2, v))
    wanted = reference.attention(q, k, v, width**-0.5, window, cap)
    with poisoned():
        found = module.attention(q, k, v, width**-0.5, window, cap)
    assert found.dtype == dtype
    assert_close(found, wanted, TOLERANCE[dtype], "the result")


@pytest.mark.parametrize(
    ("heads", "queries", "tokens", "width"),
    [((4, 2), 70, 70, 32), ((3, 1), 37, 90, 20), ((2, 2), 1, 33, 16), ((1, 1), 1, 1, 16)],
)
@pytest.mark.parametrize(("window", "cap"), [(None, None), (24, None), (None, 2.0)])
def test_attention(heads, queries, tokens, width, window, cap) -> None:
    check_attention(attention, heads, queries, tokens, width, window, cap)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_16_bits(dtype) -> None:
    check_attention(attention, (2, 1), 130, 150, 32, 70, None, dtype)


def test_the_reference_agrees_with_torch() -> None:
    q, k, v = random(1, 4, 9, 16), random(1, 2, 9, 16, seed=1), random(1, 2, 9, 16, seed=2)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    assert_close(reference.attention(q, k, v, 0.3), wanted, 1e-6)


ATTENTION_BUGS = [
    ("(j[None, :] <= place[:, None]) & ", ""),  # not causal
    ("place = i + K - Q", "place = i"),
    ("place[:, None] - j[None, :] < WINDOW", "place[:, None] - j[None, :] <= WINDOW"),
    ("h // GROUP * k_h", "h % GROUP * k_h"),
    ("sum_QD * shrink[:, None]", "sum_QD"),
    ("mask=mask_q)\n\n", "mask=mask_q & (i < Q - 1)[:, None])\n\n"),  # the last query is not written
    ("- WINDOW + 1, 0) // KEYS * KEYS", "- WINDOW + 1 + KEYS, 0) // KEYS * KEYS"),  # begins a tile too late
]


@pytest.mark.parametrize(("old", "new"), ATTENTION_BUGS)
def test_planted_bugs_in_attention_are_caught(old, new, tmp_path) -> None:
    assert_caught(check_attention, planted(attention, tmp_path, old, new), (4, 2), 37, 90, 20, 24)
