"""What the C++ kernels compute has the same bits with any number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from infopt.grid import Grid
from infopt.kernels.native import Native, PackedWeight, native, rescore
from infopt.runtime.engine import Engine

from .test_engine import prompts, quantized, words  # noqa: F401
from .test_kernels import random_q

THREADS = (1, 2, 3)


@pytest.fixture
def library() -> Iterator[Native]:
    found, before = native(), torch.get_num_threads()
    if found is None:
        pytest.skip("no C++ compiler")
    yield found
    torch.set_num_threads(before)


def test_a_product_and_a_head(library: Native) -> None:
    """Rows and tokens that no number of threads divides."""
    x_TI, vocabulary_VC = torch.randn(11, 96), torch.randn(1000, 96).to(torch.bfloat16)
    weights = [PackedWeight(library, random_q(88, 96, grid)) for grid in (Grid(4, 32), Grid(4, 32, False), Grid(8, 96))]
    rough_TV = x_TI @ vocabulary_VC.float().T + 1e-3
    found: list[list[Tensor]] = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        logits_TV = rough_TV.clone()
        rescore(library, vocabulary_VC, x_TI, 5, logits_TV)
        found.append([logits_TV, *(weight.multiply(x_TI) for weight in weights)])
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


def test_a_model(library: Native, words: Path, tmp_path: Path) -> None:  # noqa: F811
    """A prompt, and steps of texts of several lengths: threads share one text's parts and heads."""
    engine = Engine(quantized("llama", tmp_path, words, "--method", "rtn"), "packed")
    assert engine.decoder is not None
    found = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        cache, logits = engine.cache(200, 3), []
        requests = [request for _ in range(3) if (request := cache.admit(200)) is not None]
        for request, prompt in zip(requests, prompts(3, 150, 70), strict=True):
            logits.append(engine.prefill(cache, request, prompt))
        logits += [engine.advance(cache, requests, torch.tensor([[5], [9], [7 + step]])) for step in range(3)]
        found.append(torch.cat([each.flatten() for each in logits]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
