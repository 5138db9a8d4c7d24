"""`infopt verify` and `infopt eval`: the numbers against transformers, and damage of every kind through the command."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from infopt.errors import BadInput, GateFailed, UsageError, VerificationFailed
from infopt.exporters.folder import model_config, open_model
from infopt.header import read_header
from infopt.model import Skeleton
from infopt.output import check_manifest, merge_shards, write_manifest
from infopt.runtime.linear import QuantLinear
from infopt.runtime.model import RuntimeModel
from infopt.runtime.quality import Comparison
from infopt.runtime.verify import Gates, compare, judge, perplexity, verify

from .tools import Result, infopt, text, tiny

INDEX = "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj"
BYTES_ONLY = ("--num-samples", 0, "--no-kernels")
SECONDS = 20  # for any refusal, the imports of transformers included


@dataclass(frozen=True)
class Models:
    original: Path
    quantized: Path
    sharded: Path  # the quantized one in several files
    words: Path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    home = tmp_path_factory.mktemp("verify")
    original = tiny("llama", home / "model", dtype=torch.bfloat16)
    result = infopt("quantize", original, "-o", home / "q", "--method", "rtn", "--group-size", 32, "--no-verify")
    assert result.code == 0, result.err
    sharded = shutil.copytree(home / "q", home / "sharded")
    (sharded / "model.safetensors").unlink()
    merge_shards([home / "q" / "model.safetensors"], sharded, max_shard_bytes=30_000)
    write_manifest(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    return Models(original, home / "q", sharded, text(home))


def random_windows(count: int = 3, length: int = 32) -> torch.Tensor:
    return torch.randint(3, 98, (count, length), generator=torch.Generator().manual_seed(5))


# The numbers


def test_a_model_against_itself_is_exactly_the_same(models: Models) -> None:
    for folder in (models.original, models.quantized):
        one, two = RuntimeModel(folder), RuntimeModel(folder)
        for candidate in (one, two):
            found = compare(one, candidate, random_windows())
            assert found.kl_mean == found.kl_max == found.perplexity_increase == 0.0
            assert found.top1 == 1.0


def test_comparison_is_what_transformers_gives(models: Models) -> None:
    windows = random_windows()
    found = compare(RuntimeModel(models.original), RuntimeModel(models.quantized), windows)
    logits = []
    for folder in (models.original, models.quantized):
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            logits.append(loaded(windows).logits[:, :-1].double().flatten(0, 1))
    log_p, log_q = (torch.log_softmax(each, -1) for each in logits)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    targets = windows[:, 1:].flatten()
    assert found.tokens == len(kl) == 3 * 31
    assert found.perplexity_reference == pytest.approx(F.cross_entropy(logits[0], targets).exp().item(), rel=1e-5)
    assert found.perplexity == pytest.approx(F.cross_entropy(logits[1], targets).exp().item(), rel=1e-5)
    assert found.kl_mean == pytest.approx(kl.mean().item(), rel=1e-3)
    assert found.kl_max == pytest.approx(kl.max().item(), rel=1e-3)
    assert found.top1 == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item(), abs=0.02)
    assert perplexity(RuntimeModel(models.quantized), windows)["perplexity"] == pytest.approx(found.perplexity)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi3", "falcon_new"])
def test_codes_run_as_their_dequantized_weights_do(family: str, tmp_path: Path) -> None:
    """QuantLinear in place of the linears, transposed ones too, against the skeleton with dequantized weights."""
    original = tiny(family, tmp_path / "model")
    out = tmp_path / "q"
    assert infopt("quantize", original, "-o", out, "--method", "rtn", "--group-size", 32, "--no-verify").code == 0
    windows = random_windows()
    model, packed = RuntimeModel(out), RuntimeModel(out, "packed")
    reader = open_model(out)
    skeleton = Skeleton(model_config(reader.config), reader)
    skeleton.load_outer()
    want = skeleton.embed(windows)
    for i, call in enumerate(skeleton.calls(*windows.shape)):
        with torch.no_grad():
            want = call.run(skeleton.load_block(i), want)
    exact_error = (model.last_hidden(windows) - want).abs().max() / want.abs().max()
    packed_error = (packed.last_hidden(windows) - want).abs().max() / want.abs().max()
    assert exact_error < 1e-5
    assert 0 < packed_error < 0.05


def test_one_block_is_in_memory_at_a_time(models: Models) -> None:
    model = RuntimeModel(models.quantized)
    block = model.load_block(0)
    assert sum(isinstance(module, QuantLinear) for module in block.modules()) == 7
    model.free_block(0)
    for i, _ in model.stream(random_windows()):
        for name in model.skeleton.blocks:
            block = model.skeleton.model.get_submodule(name)
            assert not any(isinstance(module, QuantLinear) for module in block.modules()), (i, name)
            assert all(parameter.is_meta for parameter in block.parameters()), (i, name)
    assert all(parameter.is_meta for parameter in model.skeleton.model.parameters())


def test_windows_that_the_model_cannot_read(models: Models) -> None:
    model = RuntimeModel(models.original)
    with pytest.raises(UsageError, match="256 positions"):
        model.embed(torch.zeros(1, 300, dtype=torch.long))
    with pytest.raises(BadInput, match="128 tokens"):
        model.embed(torch.full((1, 8), 128))


# The command


def test_verdict_of_a_good_folder(models: Models, tmp_path: Path) -> None:
    folder = shutil.copytree(models.quantized, tmp_path / "q")
    flags = ("--reference", models.original, "--dataset", models.words, "--num-samples", 3, "--seqlen", 32, "--json")
    first = infopt("verify", folder, *flags, "--max-kl", 1, "--max-ppl-increase", 0.5, "--min-top1", 0.1)
    assert first.code == 0, first.err
    said = json.loads(first.out)
    assert said == json.loads((folder / "verification.json").read_text())
    assert said["passed"] and all(check["ok"] for check in [*said["checks"], *said["gates"]])
    assert len(said["gates"]) == 3 and said["quality"]["tokens"] == 3 * 31
    assert 4.5 <= said["size"]["bits_per_quantized_weight"] <= 5.1  # 4 bits, a bf16 scale per 32, the shape
    assert said["size"]["bytes"] < said["size"]["bytes_reference"]
    check_manifest(folder)
    again = infopt("verify", folder, *flags, "--max-kl", 1, "--max-ppl-increase", 0.5, "--min-top1", 0.1)
    assert (again.code, again.out) == (0, first.out)


@pytest.mark.parametrize(
    ("gate", "value", "word"),
    [("--max-kl", 1e-9, "KL"), ("--max-ppl-increase", -0.9, "perplexity"), ("--min-top1", 1, "top-1")],
)
def test_a_missed_gate_exits_7(models: Models, gate: str, value: float, word: str, tmp_path: Path) -> None:
    folder = shutil.copytree(models.quantized, tmp_path / "q")
    result = infopt(
        "verify",
        folder,
        "--reference",
        models.original,
        "--num-samples",
        2,
        "--seqlen",
        32,
        gate,
        value,
        "--no-kernels",
    )
    assert result.code == 7 and word in result.err and "error:" in result.err
    assert json.loads((folder / "verification.json").read_text())["passed"] is False


def test_a_gate_needs_a_reference(models: Models) -> None:
    result = infopt("verify", models.quantized, "--max-kl", 0.1)
    assert result.code == 2 and "--reference" in result.err
    result = infopt("verify", models.quantized, "--reference", models.original, "--max-kl", 0.1, "--num-samples", 0)
    assert result.code == 2


def test_gates_let_nothing_unordered_through() -> None:
    quality = Comparison(1, 1.0, 1.0, float("nan"), 0.0, 0.0, 0.0, 1.0)
    assert [check.ok for check in Gates(max_kl=1.0).checks(quality)] == [False]


def test_without_a_reference_perplexity_is_measured(models: Models, tmp_path: Path) -> None:
    folder = shutil.copytree(models.quantized, tmp_path / "q")
    data = ("--dataset", models.words, "--num-samples", 3, "--seqlen", 32, "--json")
    verified, evaluated = infopt("verify", folder, *data), infopt("eval", folder, *data)
    assert (verified.code, evaluated.code) == (0, 0), verified.err + evaluated.err
    assert json.loads(verified.out)["quality"]["perplexity"] == json.loads(evaluated.out)["perplexity"]


def test_eval_follows_the_protocol(models: Models) -> None:
    """The text joined, no special tokens, the first windows, not overlapping, all but the first token predicted."""
    flags = ("--dataset", models.words, "--num-samples", 5, "--seqlen", 40, "--json")
    result = infopt("eval", models.original, *flags)
    assert result.code == 0, result.err
    said = json.loads(result.out)
    ids = torch.tensor([ord(letter) - 29 for letter in models.words.read_text()[: 5 * 40]]).view(5, 40)
    loaded = AutoModelForCausalLM.from_pretrained(models.original, dtype=torch.float32)
    with torch.no_grad():
        logits = loaded(ids).logits[:, :-1].flatten(0, 1)
    assert said["tokens"] == 5 * 39
    assert said["perplexity"] == pytest.approx(F.cross_entropy(logits, ids[:, 1:].flatten()).exp().item(), rel=1e-5)
    packed = infopt("eval", models.quantized, *flags, "--kernels", "packed")
    exact = infopt("eval", models.quantized, *flags)
    assert json.loads(packed.out)["perplexity"] == pytest.approx(json.loads(exact.out)["perplexity"], rel=0.02)


# Damage


def flip(folder: Path, tensor: str) -> None:
    """Invert one bit in the middle of a tensor's bytes."""
    for path in folder.glob("*.safetensors"):
        info = read_header(path)[0].get(tensor)
        if info is not None:
            data = bytearray(path.read_bytes())
            data[info.offset + info.nbytes // 2] ^= 1
            path.write_bytes(data)
            return
    raise AssertionError(tensor)


def change(folder: Path, tensor: str, new: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Rewrite the file that holds the tensor with another one in its place, or with none."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if tensor in tensors:
            made = new(tensors.pop(tensor))
            save_file(tensors if made is None else {**tensors, tensor: made}, path, {"format": "pt"})
            return
    raise AssertionError(tensor)


def set_first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def new(old: torch.Tensor) -> torch.Tensor:
        made = old.clone()
        made.view(-1)[0] = value
        return made

    return new


def shard_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def edit(path: Path, change_it: Callable[[dict], None]) -> None:
    data = json.loads(path.read_text())
    change_it(data)
    path.write_text(json.dumps(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def point_outside(folder: Path) -> None:
    edit(folder / INDEX, lambda index: index["weight_map"].update({f"{UP}.weight_scale": "../../secret.safetensors"}))


PACKED, SCALE = f"{UP}.weight_packed", f"{UP}.weight_scale"

# name: (what happens, exit code where the manifest is gone, what the message then names)
DAMAGE: dict[str, tuple[Callable[[Path], None], int, tuple[str, ...]]] = {
    "flipped byte": (lambda f: flip(f, PACKED), 6, (UP, "model-0000")),
    "flipped scale": (lambda f: flip(f, SCALE), 6, (UP, "model-0000")),
    "scale NaN": (lambda f: change(f, SCALE, set_first(float("nan"))), 6, (UP, "model-0000", "finite")),
    "scale infinite": (lambda f: change(f, SCALE, set_first(float("inf"))), 6, (UP, "model-0000", "finite")),
    "scale zero": (lambda f: change(f, SCALE, set_first(0.0)), 6, (UP, "model-0000", "positive")),
    "scale missing": (lambda f: change(f, SCALE, lambda _: None), 3, (SCALE,)),
    "codes too short": (lambda f: change(f, PACKED, lambda old: old[:, 1:].contiguous()), 3, (UP,)),
    "codes of another type": (lambda f: change(f, PACKED, lambda old: old.float()), 3, (UP,)),
    "scales of another type": (lambda f: change(f, SCALE, lambda old: old.to(torch.int32)), 3, (UP,)),
    "shape huge": (lambda f: change(f, f"{UP}.weight_shape", set_first(2**40)), 3, (UP,)),
    "shape of one number": (lambda f: change(f, f"{UP}.weight_shape", lambda old: old[:1].clone()), 3, (UP,)),
    "shard missing": (lambda f: shard_of(f, SCALE).unlink(), 3, ("model-0000",)),
    "shard truncated": (lambda f: truncate(shard_of(f, SCALE)), 3, ("model-0000",)),
    "shard empty": (lambda f: shard_of(f, SCALE).write_bytes(b""), 3, ("model-0000",)),
    "index points outside": (point_outside, 3, (INDEX, SCALE, "secret")),
    "a billion layers": (
        lambda f: edit(f / "config.json", lambda c: c.update(num_hidden_layers=10**9)),
        3,
        ("config.json",),
    ),
    "a layer fewer": (
        lambda f: edit(f / "config.json", lambda c: c.update(num_hidden_layers=1)),
        3,
        ("model.layers.1",),
    ),
    "a scheme of 5 bits": (
        lambda f: edit(f / "config.json", lambda c: scheme(c).update(num_bits=5)),
        4,
        ("config.json", "config_groups"),
    ),
    "a scheme of words": (
        lambda f: edit(f / "config.json", lambda c: scheme(c).update(group_size="all")),
        3,
        ("config_groups",),
    ),
    "report without layers": (lambda f: edit(f / "infopt.json", lambda r: r.update(layers=7)), 6, ("infopt.json",)),
    "report of other layers": (
        lambda f: edit(f / "infopt.json", lambda r: r["layers"].update({"model.layers.7.x": {"digest": "00"}})),
        6,
        ("model.layers.7.x",),
    ),
}


def scheme(config: dict) -> dict:
    return config["quantization_config"]["config_groups"]["group_0"]["weights"]


def timed(*arguments: object) -> Result:
    began = time.monotonic()
    result = infopt(*arguments)
    assert time.monotonic() - began < SECONDS
    return result


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_that_the_manifest_knows_of(models: Models, name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(models.sharded, tmp_path / "q")
    DAMAGE[name][0](folder)
    result = timed("verify", folder, "--reference", models.original, *BYTES_ONLY)
    assert result.code == 6, result.err
    assert "error:" in result.err and str(folder) in result.err
    if name.startswith(("flipped", "scale", "shard m", "codes", "shape")):
        assert UP in result.err or "model.layers" in result.err, result.err
    assert json.loads((folder / "verification.json").read_text())["passed"] is False


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_without_a_manifest(models: Models, name: str, tmp_path: Path) -> None:
    """Nobody says what the files were: each must give itself away."""
    folder = shutil.copytree(models.sharded, tmp_path / "q")
    harm, code, words = DAMAGE[name]
    harm(folder)
    (folder / "manifest.json").unlink()
    result = timed("verify", folder, "--reference", models.original, *BYTES_ONLY)
    assert result.code == code, result.err
    assert all(word in result.err for word in words), result.err


def test_damage_under_a_forged_manifest(models: Models, tmp_path: Path) -> None:
    folder = shutil.copytree(models.sharded, tmp_path / "q")
    flip(folder, PACKED)
    write_manifest(folder)
    result = timed("verify", folder, *BYTES_ONLY)
    assert result.code == 6 and UP in result.err and "codes as solved" in result.err


def test_a_copied_tensor_that_changed(models: Models, tmp_path: Path) -> None:
    norm = "model.layers.0.input_layernorm.weight"
    folder = shutil.copytree(models.quantized, tmp_path / "q")
    flip(folder, norm)
    (folder / "manifest.json").unlink()
    result = timed("verify", folder, "--reference", models.original, *BYTES_ONLY)
    assert result.code == 6 and norm in result.err and "model.safetensors" in result.err
    edit(folder / "infopt.json", lambda report: report.update(rewritten=[norm]))
    assert timed("verify", folder, "--reference", models.original, *BYTES_ONLY).code == 0


def test_answers_that_are_not_finite(models: Models, tmp_path: Path) -> None:
    folder = shutil.copytree(models.quantized, tmp_path / "q")
    change(folder, "model.norm.weight", set_first(float("nan")))
    (folder / "manifest.json").unlink()
    with pytest.raises(VerificationFailed, match="not finite"):
        verify(folder, None, random_windows())
    said = json.loads((folder / "verification.json").read_text())
    assert said["passed"] is False and said["checks"][-1]["name"] == "answers"
    assert infopt("eval", folder, "--num-samples", 2, "--seqlen", 32).code == 6


def test_a_folder_that_is_put_right_verifies_again(models: Models, tmp_path: Path) -> None:
    folder = shutil.copytree(models.sharded, tmp_path / "q")
    lost = shard_of(folder, SCALE)
    lost.rename(tmp_path / "aside")
    assert infopt("verify", folder, *BYTES_ONLY).code == 6
    (tmp_path / "aside").rename(lost)
    assert infopt("verify", folder, *BYTES_ONLY).code == 0


def test_missing_side_files(models: Models, tmp_path: Path) -> None:
    folder = shutil.copytree(models.quantized, tmp_path / "q")
    (folder / "tokenizer.json").unlink()
    (folder / "manifest.json").unlink()
    result = infopt("verify", folder, "--reference", models.original, *BYTES_ONLY)
    assert result.code == 6 and "tokenizer.json is missing" in result.err


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda f: truncate(f / "model.safetensors"), ("model.safetensors",)),
        (lambda f: (f / "model.safetensors").unlink(), ("model.safetensors",)),
        (lambda f: edit(f / "config.json", lambda c: c.update(num_hidden_layers=10**9)), ("config.json",)),
        (lambda f: change(f, f"{UP}.weight", lambda _: None), (f"{UP}.weight",)),
        (lambda f: change(f, f"{UP}.weight", lambda old: old[1:].clone()), ("model.safetensors", f"{UP}.weight")),
    ],
)
@pytest.mark.parametrize("command", ["quantize", "eval", "verify"])
def test_damaged_original(models: Models, command: str, harm, words: tuple[str, ...], tmp_path: Path) -> None:
    model = shutil.copytree(models.original, tmp_path / "model")
    harm(model)
    data = ("--dataset", models.words, "--num-samples", 2, "--seqlen", 32)
    flags: dict[str, tuple[object, ...]] = {
        "quantize": (model, "-o", tmp_path / "out", "--method", "rtn", "--group-size", 32),
        "eval": (model, *data),
        "verify": (shutil.copytree(models.quantized, tmp_path / "q"), "--reference", model, *data),
    }
    result = timed(command, *flags[command])
    assert result.code == 3, result.err
    assert all(word in result.err for word in words), result.err
    assert not (tmp_path / "out").exists()


def test_judge_tells_and_does_not_raise(models: Models, tmp_path: Path) -> None:
    folder = shutil.copytree(models.quantized, tmp_path / "q")
    good = judge(folder, models.original, random_windows(), Gates(max_kl=1e-9))
    assert good.intact and not good.passed
    good.raise_if_damaged()
    with pytest.raises(GateFailed, match="gate"):
        good.raise_for_gates()
    flip(folder, PACKED)
    bad = judge(folder, models.original, random_windows())
    assert not bad.intact and asdict(bad.checks[0])["ok"] is False
    with pytest.raises(VerificationFailed, match=UP):
        bad.raise_if_damaged()
