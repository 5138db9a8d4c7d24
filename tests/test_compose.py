"""A rewrite and a quantization in one recipe: each step verified, the lineage kept, resumed; recipes that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from infopt.recipes import compose
from infopt.recipes.run import Run

from .tools import Result, infopt, text, tiny


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text(tmp_path_factory.mktemp("text"), 3000)


def recipe(folder: Path, words: Path, **rewrite: object) -> Path:
    path = folder / "chain.yaml"
    data = {
        "name": "mqa-w8",
        "rewrite": {"kv_heads": 1, "steps": 2, **rewrite},
        "steps": [{"gptq": {}}],
        "weights": {"bits": 8, "group_size": 32},
        "calibration": {"dataset": str(words), "num_samples": 12, "seqlen": 32},
    }
    path.write_text(yaml.safe_dump(data))
    return path


def quantize(model: Path, out: Path, chain: Path, *flags: object) -> Result:
    return infopt("quantize", model, "-o", out, "--recipe", chain, "--verify-samples", 2, *flags)


def test_each_step_is_verified_and_the_lineage_kept(words: Path, tmp_path: Path) -> None:
    model, out = tiny("llama", tmp_path / "model"), tmp_path / "out"
    done = quantize(model, out, recipe(tmp_path, words, heal_steps=2), "--json")
    assert done.code == 0, done.err
    said = json.loads((out / "infopt.json").read_text())
    first, second = said["lineage"]
    assert (first["step"], second["step"], second["recipe"]) == ("rewrite", "quantize", "mqa-w8")
    assert first["options"]["kv_heads"] == 1 and first["settings"] == {"num_key_value_heads": 1}
    assert len(second["source"]["model.safetensors"]) == 64
    together = json.loads((out / "verification.json").read_text())
    assert together["passed"]
    assert second["quality"]["kl_mean"] < first["quality"]["kl_mean"]  # 8 bits lose less than half of the heads
    assert together["quality"]["kl_mean"] == pytest.approx(first["quality"]["kl_mean"], rel=0.5)
    assert json.loads((out / "config.json").read_text())["num_key_value_heads"] == 1
    assert load_file(out / "model.safetensors")["model.layers.0.self_attn.k_proj.weight"].shape[0] == 16
    assert json.loads(done.out)["lineage"] == said["lineage"]
    assert not (tmp_path / "out.infopt-work").exists()
    again = infopt("verify", out, "--reference", model, "--dataset", words, "--seqlen", 32, "--num-samples", 2)
    assert again.code == 0, again.err


def test_a_killed_run_keeps_the_rewritten_model(words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, chain = tiny("llama", tmp_path / "model"), recipe(tmp_path, words)
    assert quantize(model, tmp_path / "whole", chain).code == 0

    def stop(self: Run, *given: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "__call__", stop)
        assert quantize(model, tmp_path / "cut", chain).code == 130
    with monkeypatch.context() as patch:
        patch.setattr(compose.RewriteRun, "__call__", stop)  # it must not run again
        done = quantize(model, tmp_path / "cut", chain)
    assert done.code == 0, done.err
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("rewrite", "code", "word"),
    [
        ({"kv_head": 1}, 2, "did you mean 'kv_heads'"),
        ({"kv_heads": "1"}, 2, "rewrite.kv_heads"),
        ({"kv_heads": True}, 2, "rewrite.kv_heads"),
        ({"merge": "median"}, 2, "lstsq"),
        ({"kv_heads": 3}, 2, "--kv-heads 1, 2"),
        ({"rotate": True}, 2, "outside"),
    ],
)
def test_what_cannot_be_done_is_refused(rewrite: dict, code: int, word: str, words: Path, tmp_path: Path) -> None:
    done = quantize(tiny("llama", tmp_path / "model"), tmp_path / "out", recipe(tmp_path, words, **rewrite))
    assert done.code == code and word in done.err, done.err
    assert not (tmp_path / "out").exists()
