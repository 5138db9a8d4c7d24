"""End-to-end distillation of a rewritten model: it helps, it resumes to the same bytes, what does not help is not kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from infopt.checkpoint import CheckpointReader
from infopt.model import Skeleton
from infopt.recipes.rewrite_distill import Distillation

from .tools import Result, infopt, text, tiny


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text(tmp_path_factory.mktemp("text"), 8000)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("llama"), num_key_value_heads=4)


def rewrite(model: Path, out: Path, words: Path, *flags: object) -> Result:
    return infopt("rewrite", model, "-o", out, "--dataset", words, "--num-samples", 60, "--seqlen", 128,
                  "--steps", 2, "--verify-samples", 2, *flags)  # fmt: skip


def distilled(model: Path, out: Path, words: Path, *flags: object) -> Result:
    return rewrite(
        model,
        out,
        words,
        "--kv-heads",
        1,
        "--heal-steps",
        17,
        "--heal-lr",
        1e-3,
        "--merge",
        "first",
        "--no-refit",
        *flags,
    )


def test_distillation_lowers_the_distance(llama: Path, words: Path, tmp_path: Path) -> None:
    done = distilled(llama, tmp_path / "out", words, "--checkpointing", "--json")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out" / "infopt.json").read_text())
    said, points = report["distilled"], report["measured"]["healing"]
    assert said["kept"] and said["after"] < said["before"] and len(said["losses"]) == 17
    assert sum(said["losses"][-5:]) < sum(said["losses"][:5])
    assert json.loads(done.out)["verdict"]["passed"]
    assert [point["name"] for point in points[-2:]] == ["healed", "distilled"]
    assert points[-1]["kl"] < points[-2]["kl"] and points[-1]["tokens"] > points[-2]["tokens"]
    for name in ("healing.svg", "distillation.svg"):
        assert (tmp_path / "out" / name).read_text().startswith("<svg")
    plain, again = json.loads(done.out)["distillation_costs"]
    assert 0 < again["bytes"] < plain["bytes"]
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(llama / "model.safetensors")
    assert torch.equal(ours["model.embed_tokens.weight"], theirs["model.embed_tokens.weight"])


def test_a_killed_distillation_goes_on_to_the_same_bytes(
    llama: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert distilled(llama, whole, words).code == 0
    original, seen = Distillation._backward, []

    def stop(self: Distillation, *given: object) -> float:
        seen.append(1)
        if len(seen) == 17:  # the state of 16 steps is there
            raise KeyboardInterrupt
        return original(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Distillation, "_backward", stop)
        assert distilled(llama, cut, words).code == 130
    seen.clear()
    monkeypatch.setattr(Distillation, "_backward", lambda self, *given: seen.append(1) or original(self, *given))
    done = distilled(llama, cut, words)
    assert done.code == 0 and len(seen) == 1, done.err
    for path in sorted(whole.iterdir()):
        assert path.read_bytes() == (cut / path.name).read_bytes(), path.name


def test_what_does_not_help_is_not_kept(llama: Path, words: Path, tmp_path: Path) -> None:
    """A rate that breaks the model: the blocks stay as they were healed."""
    flags = ("--kv-heads", 1, "--no-curve")
    assert rewrite(llama, tmp_path / "healed", words, *flags).code == 0
    done = rewrite(llama, tmp_path / "out", words, *flags, "--heal-steps", 4, "--heal-lr", 1)
    assert done.code == 0 and "not lower" in done.err, done.err
    assert not json.loads((tmp_path / "out" / "infopt.json").read_text())["distilled"]["kept"]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("healed", "out"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_damaged_state_is_begun_anew(tmp_path: Path, llama: Path) -> None:
    reader = CheckpointReader(llama)
    models = [Skeleton(reader.config, reader) for _ in range(2)]
    for model in models:
        model.load_outer()
        for i in range(2):
            model.load_block(i)
    state, windows_NT = tmp_path / "state.safetensors", (torch.arange(512) % 120 + 3).view(4, 128)
    parameters = {"w": models[1].model.get_parameter("model.layers.0.mlp.down_proj.weight")}
    parameters["w"].data.mul_(0.5)
    found = []
    for content in (None, b"\0" * 64):
        if content is not None:
            state.write_bytes(content)
        values = {"w": parameters["w"]}
        kept = parameters["w"].detach().clone()
        found.append(Distillation(*models, windows_NT, values, state, "same")(2, 1e-3, False).losses)
        parameters["w"].data.copy_(kept)
    assert found[0] == found[1]
