"""The ranks of a folder of shards answer as the whole model does: in one process for every family, and as real processes."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from infopt.errors import BadInput
from infopt.output import update_manifest
from infopt.runtime.model import RuntimeModel
from infopt.runtime.parallel import TAIL, run_shards
from infopt.runtime.rank import RankModel
from infopt.runtime.verify_shards import ROUNDED_TOLERANCE, TOLERANCE, difference
from infopt.shards import read_shards

from .tools import infopt, slow_unless, text, tiny


class Meeting:
    """A sum over ranks that are threads: the slow twin of gloo's all-reduce."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=60)
        self.parts: list[Tensor | None] = [None] * ranks

    def reduce(self, rank: int) -> Callable[[Tensor], None]:
        def add(tensor: Tensor) -> None:
            self.parts[rank] = tensor.clone()
            self.barrier.wait()
            tensor.copy_(sum(self.parts))
            self.barrier.wait()

        return add


def run_in_threads(folder: Path, windows_NT: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden, logits) of rank 0, every stage's ranks in step with each other."""
    described, hidden, answers = read_shards(folder), None, {}
    for stage in range(described.pp):
        meeting = Meeting(described.tp)
        # Made one after another: building a definition on meta is not safe beside another thread's loading.
        models = [RankModel(folder, stage, rank, meeting.reduce(rank)) for rank in range(described.tp)]
        before = hidden

        def work(rank: int, models=models, before=before, meeting=meeting, stage=stage) -> None:
            try:
                out = models[rank].advance(models[rank].embed(windows_NT) if stage == 0 else before.clone())
                answers[rank] = out, models[rank].logits(out) if stage + 1 == described.pp else None
            except BaseException:
                meeting.barrier.abort()
                raise

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(described.tp)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        hidden = answers[0][0]
    return answers.pop(0)


def whole(folder: Path, windows_NT: Tensor) -> tuple[Tensor, Tensor]:
    model = RuntimeModel(folder)
    hidden = model.last_hidden(windows_NT)
    model.load_outer()
    return hidden, torch.stack([model.logits(some) for some in hidden])


def windows() -> Tensor:
    return torch.randint(3, 120, (3, 20), generator=torch.Generator().manual_seed(0))


def assert_same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    assert difference(found[0], wanted[0]) < TOLERANCE / 10 and difference(found[1], wanted[1]) < TOLERANCE / 10


FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "opt", "phi", "phi3", "gpt_neox", "falcon_new",
            "falcon_old", "falcon_alibi", "olmo2", "cohere", "starcoder2", "granite", "mixtral"]  # fmt: skip


QUANTIZED = [["--bits", 4], ["--bits", 4, "--asym"], ["--bits", 8], ["--bits", 3]]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_over_four_ranks(tmp_path, family):
    """Fused, interleaved, shared and biased projections; norms over heads; soft caps; ALiBi; stacked experts."""
    model = tiny(family, tmp_path / "m")
    assert infopt("shard", model, "--tp", 4, "--pp", 2, "-o", tmp_path / "s").code == 0
    assert_same(run_in_threads(tmp_path / "s", windows()), whole(model, windows()))


@pytest.mark.parametrize(
    ("family", "flags"), [slow_unless(family == "llama" or flags == QUANTIZED[1], family, flags)
                          for family in ("llama", "gpt2", "phi3") for flags in QUANTIZED]
)  # fmt: skip
def test_quantized_layers_over_two_ranks(tmp_path, family, flags):
    model = tiny(family, tmp_path / "m")
    asked = ["--method", "rtn", "--group-size", 32, *flags, "--no-verify", "-o", tmp_path / "q"]
    assert infopt("quantize", model, *asked).code == 0
    done = infopt("shard", tmp_path / "q", "--tp", 2, "-o", tmp_path / "s")
    assert done.code == 0, done.err
    assert_same(run_in_threads(tmp_path / "s", windows()), whole(tmp_path / "q", windows()))


WIDE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 512}
OTHERS = {
    "gptq": ["--method", "rtn", "--bits", 4, "--format", "gptq"],
    "gptq v2": ["--method", "rtn", "--bits", 3, "--asym", "--format", "gptq_v2"],
    "awq": ["--method", "rtn", "--bits", 4, "--asym", "--format", "awq"],
    "W8A8": ["--method", "rtn", "--scheme", "W8A8"],
    "W8A8_STATIC": ["--method", "rtn", "--scheme", "W8A8_STATIC"],
    "W4A8": ["--method", "rtn", "--scheme", "W4A8", "--group-size", 64],
    "FP8": ["--method", "rtn", "--scheme", "FP8"],
    "FP8_DYNAMIC": ["--method", "rtn", "--scheme", "FP8_DYNAMIC"],
    "FP8_BLOCK": ["--method", "rtn", "--scheme", "FP8_BLOCK"],
}


@pytest.mark.parametrize("kind", list(OTHERS))
def test_other_formats_and_rounded_inputs(tmp_path, kind):
    model = tiny("llama", tmp_path / "m", **WIDE)
    data = ["--dataset", text(tmp_path), "--num-samples", 2, "--seqlen", 32]
    done = infopt("quantize", model, *OTHERS[kind], *data, "--no-verify", "-o", tmp_path / "q")
    assert done.code == 0, done.err
    done = infopt("shard", tmp_path / "q", "--tp", 2, "-o", tmp_path / "s")
    assert done.code == 0, done.err
    found, wanted = run_in_threads(tmp_path / "s", windows()), whole(tmp_path / "q", windows())
    most = ROUNDED_TOLERANCE if "A8" in kind or "FP8" in kind else TOLERANCE / 10
    assert difference(found[0], wanted[0]) < most and difference(found[1], wanted[1]) < most
    assert infopt("assemble", tmp_path / "s", "-o", tmp_path / "back").code == 0
    for path in (tmp_path / "q").iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("cache", ["fp8", "int8", "int4", "int4-token", "int4-balanced"])
def test_ranks_round_their_part_of_the_cache(tmp_path, cache):
    model = tiny("llama", tmp_path / "m", **WIDE)
    data = ["--dataset", text(tmp_path), "--num-samples", 2, "--seqlen", 32]
    asked = ["--method", "kv-cache", "--kv-cache", cache, *data, "--no-verify", "-o", tmp_path / "q"]
    assert infopt("quantize", model, *asked).code == 0
    assert infopt("shard", tmp_path / "q", "--tp", 2, "--pp", 2, "-o", tmp_path / "s").code == 0
    found, wanted = run_in_threads(tmp_path / "s", windows())[1], whole(tmp_path / "q", windows())[1]
    unrounded = whole(model, windows())[1]
    assert difference(found, wanted) < difference(unrounded, wanted) / 10
    done = infopt("verify", tmp_path / "s", *data[:2], "--num-samples", 1, "--seqlen", 32)
    assert done.code == 0, done.err


@pytest.mark.parametrize("flags", [None, ["--bits", 4], ["--bits", 4, "--asym"]])
def test_padding_changes_nothing(tmp_path, flags):
    model = tiny("llama", tmp_path / "m", intermediate_size=224, vocab_size=127, tie_word_embeddings=True)
    if flags:
        asked = ["--method", "rtn", "--group-size", 32, *flags, "--no-verify", "-o", tmp_path / "q"]
        assert infopt("quantize", model, *asked).code == 0
        model = tmp_path / "q"
    assert infopt("shard", model, "--tp", 2, "--pad", "-o", tmp_path / "s").code == 0
    assert_same(run_in_threads(tmp_path / "s", windows()), whole(model, windows()))


def test_a_rank_with_other_weights_is_noticed(tmp_path):
    """The comparison above can fail: two ranks that hold each other's part of one layer."""
    model = tiny("llama", tmp_path / "m")
    assert infopt("shard", model, "--tp", 2, "-o", tmp_path / "s").code == 0
    paths = [tmp_path / "s" / f"pp0-tp{rank}" / "model.safetensors" for rank in (0, 1)]
    first, second = (load_file(path) for path in paths)
    name = "model.layers.0.mlp.down_proj.weight"
    first[name], second[name] = second[name], first[name]
    for path, tensors in zip(paths, (first, second), strict=True):
        save_file(tensors, path, {"format": "pt"})
    found = run_in_threads(tmp_path / "s", windows())
    assert difference(found[1], whole(model, windows())[1]) > TOLERANCE


# Real processes


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> tuple[Path, Path, Path]:
    """(the original, in 4 bits, that on two ranks)"""
    place = tmp_path_factory.mktemp("ranks")
    model = tiny("llama", place / "m")
    asked = ["--method", "rtn", "--group-size", 32, "--asym", "--no-verify", "-o", place / "q"]
    assert infopt("quantize", model, *asked).code == 0
    assert infopt("shard", place / "q", "--tp", 2, "-o", place / "s").code == 0
    return model, place / "q", place / "s"


def test_verify_starts_the_ranks_and_compares(quantized, tmp_path):
    model, _, shards = quantized
    asked = ["--dataset", text(tmp_path), "--num-samples", 2, "--seqlen", 32, "--json"]
    done = infopt("verify", shards, "--reference", model, *asked)
    assert done.code == 0, done.err
    verdict = json.loads(done.out)
    rows = {check["name"]: check for check in verdict["checks"]}
    assert rows["2 x 1 ranks as one"]["ok"] and rows["assembled"]["ok"] and rows["files as written"]["ok"]
    assert rows["assembled: codes as solved"]["ok"] and verdict["quality"]["kl_mean"] > 0
    assert json.loads((shards / "verification.json").read_text()) == verdict
    assert infopt("verify", shards, "--num-samples", 0).code == 0  # the verdict has joined the manifest
    assert [path.name for path in shards.parent.iterdir() if path.name.startswith(".")] == []


def test_gates_hold_for_shards_too(quantized, tmp_path):
    model, _, shards = quantized
    asked = ["--dataset", text(tmp_path), "--num-samples", 1, "--seqlen", 16, "--max-kl", 0]
    assert infopt("verify", shards, "--reference", model, *asked).code == 7


@pytest.mark.slow
def test_four_ranks_in_two_stages(tmp_path):
    model = tiny("gpt2", tmp_path / "m")
    assert infopt("shard", model, "--tp", 2, "--pp", 2, "-o", tmp_path / "s").code == 0
    hidden, logits = run_shards(tmp_path / "s", windows())
    wanted = whole(model, windows())
    assert_same((hidden, logits), (wanted[0], wanted[1][:, -TAIL:]))


def test_four_ranks_of_one_stage(tmp_path):
    model = tiny("llama", tmp_path / "m")
    assert infopt("shard", model, "--tp", 4, "-o", tmp_path / "s").code == 0
    hidden, logits = run_shards(tmp_path / "s", windows())
    wanted = whole(model, windows())
    assert_same((hidden, logits), (wanted[0], wanted[1][:, -TAIL:]))


def test_damaged_shards_fail_verification(quantized, tmp_path):
    """Also where the manifest was rewritten to bless the damage."""
    copied = shutil.copytree(quantized[2], tmp_path / "s")
    path = copied / "pp0-tp1" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] += 1
    save_file(tensors, path, {"format": "pt"})
    done = infopt("verify", copied, "--num-samples", 0)
    assert done.code == 6 and "pp0-tp1/model.safetensors" in done.err
    update_manifest(copied, "pp0-tp1/model.safetensors")
    done = infopt("verify", copied, "--num-samples", 0)
    assert done.code == 6 and "is not what was cut" in done.err


def test_a_rank_that_fails_ends_the_others_and_says_why(quantized, tmp_path):
    copied = shutil.copytree(quantized[2], tmp_path / "s")
    path = copied / "pp0-tp1" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(BadInput, match=r"stage 0, rank 1: .*not a sound safetensors file"):
        run_shards(copied, windows())
