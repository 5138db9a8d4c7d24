"""Sampling: the meaning in torch against what it should be, and the kernel by Triton's interpreter against the meaning."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from infopt.kernels import sampling as meaning
from infopt.kernels.triton import sampling
from tests.triton_tools import assert_caught, planted, poisoned

TEXTS, VOCABULARY = 6, 2100


def arguments(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Greedy with equals, everything, each kind of cut alone, and all of them."""
    logits = (torch.randn(TEXTS, VOCABULARY, generator=torch.Generator().manual_seed(3)) * 2).to(dtype)
    logits[0, 17:2080:7] = 50.0
    return (
        logits,
        torch.tensor([0.0, 1.0, 0.7, 0.8, 1.3, 0.9]),
        torch.tensor([0, 0, 5, 0, 0, 40]),
        torch.tensor([1.0, 1.0, 1.0, 0.5, 1.0, 0.9]),
        torch.tensor([0.0, 0.0, 0.0, 0.0, 0.3, 0.01]),
        torch.tensor([1, 2, 2**40 + 5, 4, 5, 2**63 - 1]),
        torch.tensor([0, 1, 2, 3, 4, 100_000]),
    )


def check_sample(module: ModuleType, steps: int = 1) -> None:
    logits, *rest, position = arguments()
    for step in range(steps):
        wanted = meaning.sample(logits, *rest, position + step)
        with poisoned():
            found = module.sample(logits, *rest, position + step)
        assert torch.equal(found, wanted), f"tokens are off by {(found - wanted).tolist()}"


def test_the_kernel_draws_the_same_tokens() -> None:
    check_sample(sampling, steps=3)


BUGS = [
    ("tl.where((score >= low) & (v < V)", "tl.where((v < V)"),
    ("none + place", "none"),  # the same noise at every position
    ("tl.philox(key,", "tl.philox(key & 0xFFFFFFFF,"),  # half of the seed
    ("tl.where(drawn, noisy, score)", "noisy"),
    ("tl.where(most > best, first, token)", "first"),
    ("tl.min(tl.where(score == most, v, 2147483647), axis=0)", "tl.max(tl.where(score == most, v, 0), axis=0) + 1"),
]


@pytest.mark.parametrize(("old", "new"), BUGS)
def test_planted_bugs_are_caught(old, new, tmp_path) -> None:
    assert_caught(check_sample, planted(sampling, tmp_path, old, new))


def test_philox_is_philox() -> None:
    """Known answers of the authors' Random123 (kat_vectors, philox4x32 10): counter and key of zeros."""
    assert meaning.philox(torch.tensor([0]), torch.tensor([0]), 1).item() == 0x6627E8D5


def test_what_is_cut() -> None:
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    cases = [
        ((0, 1.0, 0.0), 4),
        ((2, 1.0, 0.0), 2),
        ((0, 0.6, 0.0), 2),
        ((0, 0.5, 0.0), 1),
        ((0, 1.0, 0.2), 3),
        ((3, 0.9, 0.5), 2),
    ]
    for (top_k, top_p, min_p), kept in cases:
        lowest = meaning.cut(scores, torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([min_p]))
        assert (scores >= lowest[:, None] - 1e-6).sum() == kept, (top_k, top_p, min_p)


def test_draws_have_the_distribution_of_the_softmax() -> None:
    """Chi squared of 4000 draws from 8 tokens, 7 degrees of freedom: 24.3 is passed by chance once in a thousand times."""
    count, p = 4000, torch.tensor([0.3, 0.2, 0.15, 0.1, 0.1, 0.08, 0.05, 0.02])
    one, zero = torch.ones(count), torch.zeros(count)
    logits = (p.log() * 0.5).expand(count, -1)
    drawn = meaning.sample(logits, one * 0.5, zero.long(), one, zero, torch.full((count,), 7), torch.arange(count))
    seen = drawn.bincount(minlength=8)
    assert ((seen - p * count).square() / (p * count)).sum() < 24.3
    twice = (drawn[1:] == drawn[:-1]).float().mean()
    assert abs(twice - p.square().sum()) < 0.03  # neighbours are independent


def test_a_text_does_not_depend_on_its_neighbours() -> None:
    inputs = arguments()
    whole = meaning.sample(*inputs)
    assert torch.equal(torch.cat([meaning.sample(*(part[i : i + 1] for part in inputs)) for i in range(TEXTS)]), whole)
