"""Tiny models run fastest on one thread, and two test processes on one machine then do not slow each other down."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach a network
os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported: kernels run without a GPU, on the processor

import pytest

try:  # `make gpu-check` runs tests where only torch is installed
    from hypothesis import settings
except ImportError:
    pass
else:  # `FUZZ=1 make test` looks for new failures; without it a commit passes today if it passed yesterday
    settings.register_profile("repeatable", derandomize=not os.environ.get("FUZZ"))
    settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _the_same_numbers_each_time() -> None:
    """A test that draws without a generator of its own must not pass on one day and fail on another."""
    import torch

    torch.manual_seed(0)
