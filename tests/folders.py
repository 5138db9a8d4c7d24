"""Small model folders, sound or not, and the check that a complaint about one is what it should be."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

from infopt.errors import InfoptError

CONFIG = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(4, 3, generator=generator) for name in ("model.b", "model.a", "lm_head.c")}


def make(folder: Path, shards: dict[str, dict[str, torch.Tensor]] | None = None, index: Any = None) -> Path:
    """A small model folder: one file, or the given shards with a right index or the given one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name, content in (shards or {"model.safetensors": tensors()}).items():
        save_file(content, folder / name, metadata={"format": "pt"})
    if shards:
        weight_map = {key: name for name, content in shards.items() for key in content}
        written = {"metadata": {"total_size": 1}, "weight_map": weight_map} if index is None else index
        (folder / "model.safetensors.index.json").write_text(json.dumps(written))
    return folder


def two_shards() -> dict[str, dict[str, torch.Tensor]]:
    return {"a.safetensors": {"x": torch.ones(2)}, "b.safetensors": {"y": torch.zeros(3, 1)}}


def complaint(error: type[InfoptError], act: Callable[[], Any], *words: str) -> InfoptError:
    """The error of `act`: of exactly this type, with these words, and in bounded time and memory."""
    began = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(InfoptError) as caught:
            act()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert type(caught.value) is error, str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert time.monotonic() - began < 10  # a loaded machine; it takes milliseconds
    assert peak < 64 * 2**20
    return caught.value


def hub_cache(cache: Path, repo: str = "models--org--tiny") -> Path:
    """A snapshot as huggingface_hub lays it out: links into the repository's own blobs."""
    made = make(cache / "made")
    snapshot, blobs = cache / repo / "snapshots" / ("c" * 40), cache / repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(made.iterdir())):
        path.rename(blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    (cache / repo / "refs").mkdir()
    (cache / repo / "refs" / "main").write_text("c" * 40)
    return snapshot


def everything(folder: Path) -> list[str]:
    """The names in a folder, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())
