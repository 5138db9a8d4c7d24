"""A sliding window written into the config: obeyed by transformers and by the runtime, beyond its width too; refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from infopt.runtime.model import RuntimeModel

from .tools import Result, infopt, text, tiny

WINDOW = 8


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text(tmp_path_factory.mktemp("text"), 9000)


def rewrite(model: Path, out: Path, words: Path, *flags: object) -> Result:
    return infopt("rewrite", model, "-o", out, "--dataset", words, "--num-samples", 60, "--seqlen", 64,
                  "--steps", 8, "--verify-samples", 2, *flags)  # fmt: skip


def seen_by_last(out: Path, length: int) -> int:
    """How many of the last tokens change the last logits, by transformers itself: a change of the others does not."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids_BT = torch.arange(length)[None] % 90 + 5
    with torch.no_grad():
        want_V = model(ids_BT).logits[0, -1]
        for first in range(length):
            other_BT = ids_BT.clone()
            other_BT[0, first] = 3
            if not torch.equal(model(other_BT).logits[0, -1], want_V):
                return length - first
    return 0


@pytest.mark.parametrize(
    ("family", "options"),
    [("mistral", {"sliding_window": None}), ("qwen2", {}), ("qwen3", {}), ("phi3", {}), ("starcoder2", {})],
)
def test_transformers_and_the_runtime_obey_the_window(family: str, options: dict, words: Path, tmp_path: Path) -> None:
    model, out = tiny(family, tmp_path / "model", **options), tmp_path / "out"
    done = rewrite(model, out, words, "--window", WINDOW, "--no-heal")
    assert done.code == 0, done.err
    assert seen_by_last(model, 24) == 24
    assert seen_by_last(out, 24) == 2 * (WINDOW - 1) + 1  # two layers, each of which sees so far
    ours, theirs = load_file(out / "model.safetensors"), load_file(model / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids_BT = torch.arange(4 * WINDOW)[None] % 90 + 5
    runtime = RuntimeModel(out)
    hidden_TC = runtime.last_hidden(ids_BT)[0]
    runtime.load_outer()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids_BT).logits[0], runtime.logits(hidden_TC), rtol=1e-4, atol=1e-4)
        at_once = loaded.generate(ids_BT, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False)
        cached = loaded.generate(ids_BT, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=True)
    assert torch.equal(at_once, cached)


def test_every_second_layer_keeps_full_attention(words: Path, tmp_path: Path) -> None:
    model, out = tiny("qwen3", tmp_path / "model", num_hidden_layers=4), tmp_path / "out"
    done = rewrite(model, out, words, "--window", WINDOW, "--every", 2, "--kv-heads", 1)
    assert done.code == 0, done.err
    config = json.loads((out / "config.json").read_text())
    assert config["layer_types"] == ["sliding_attention", "full_attention"] * 2
    assert config["num_key_value_heads"] == 1
    assert seen_by_last(out, 24) == 24
    cache = json.loads((out / "infopt.json").read_text())["measured"]["cache"]
    context = cache["context"]
    token = 2 * 2 * 32  # bytes of a bf16 key and value of one head in one layer
    assert cache["bytes_of_context"] == {"before": 4 * 2 * context * token, "after": 2 * (context + WINDOW) * token}


def test_the_report_says_what_other_windows_cost(words: Path, tmp_path: Path) -> None:
    model, out = tiny("mistral", tmp_path / "model", sliding_window=None), tmp_path / "out"
    done = rewrite(model, out, words, "--window", WINDOW, "--no-heal")
    assert done.code == 0, done.err
    points = json.loads((out / "infopt.json").read_text())["measured"]["windows"]
    assert [point["name"] for point in points] == ["window 4", "window 8", "window 16", "window 32"]
    assert points[0]["kl"] > points[1]["kl"] > points[2]["kl"] > points[3]["kl"] > 0
    quality = json.loads((out / "verification.json").read_text())["quality"]
    assert points[1]["kl"] == pytest.approx(quality["kl_mean"])


def test_nothing_is_healed_that_no_window_reaches(words: Path, tmp_path: Path) -> None:
    model, out = tiny("mistral", tmp_path / "model", sliding_window=None), tmp_path / "out"
    done = rewrite(model, out, words, "--window", 64)
    assert done.code == 0 and "nothing to heal" in done.err
    ours, theirs = load_file(out / "model.safetensors"), load_file(model / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("family", "flags", "code", "word"),
    [
        ("llama", ("--window", 8), 4, "no sliding window"),
        ("gpt2", ("--window", 8), 4, "no sliding window"),
        ("mistral", ("--window", 8), 2, "window is 4 already"),
        ("mistral", ("--window", 3, "--every", 2), 4, "one window for all layers"),
        ("qwen3", ("--window", 8, "--sinks", 4), 4, "--sinks 4"),
        ("qwen3", ("--kv-heads", 1, "--every", 2), 2, "--every without --window"),
    ],
)
def test_what_cannot_be_done_is_refused(
    family: str, flags: tuple, code: int, word: str, words: Path, tmp_path: Path
) -> None:
    model = tiny(family, tmp_path / "model")
    done = rewrite(model, tmp_path / "out", words, *flags)
    assert done.code == code and word in done.err, done.err
    assert not (tmp_path / "out").exists()
