"""`infopt quantize` from end to end: every method and family, the written bytes in other hands, resume, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from infopt.exporters.folder import model_config, open_model
from infopt.model import Skeleton

from .families import FAMILIES
from .tools import infopt, slow_unless, text, tiny

SMALL = ("--num-samples", 8, "--seqlen", 32, "--verify-samples", 2)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("llama") / "model", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text(tmp_path_factory.mktemp("text"))


def quantize(model: Path, out: Path, *flags: object):
    return infopt("quantize", model, "-o", out, *SMALL, *flags)


def our_logits(folder: Path, ids_BT: torch.Tensor) -> torch.Tensor:
    reader = open_model(folder)
    skeleton = Skeleton(model_config(reader.config), reader)
    skeleton.load_outer()
    hidden = skeleton.embed(ids_BT)
    with torch.no_grad():
        for i, call in enumerate(skeleton.calls(*ids_BT.shape)):
            hidden = call.run(skeleton.load_block(i), hidden)
    return skeleton.logits(hidden)


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("rtn", ("--group-size", 64)),
        ("rtn", ("--group-size", "channel", "--bits", 8)),
        ("awq", ("--group-size", 32)),
        ("awq", ("--group-size", 32, "--asym")),
        ("gptq", ("--group-size", 64)),
        ("gptq", ("--group-size", 32, "--act-order", "--asym")),
        ("gptq", ("--group-size", 32, "--bits", 8, "--asym")),
        ("gptq", ("--group-size", "channel", "--bits", 2)),
        ("awq+gptq", ("--group-size", 32, "--bits", 3)),
    ],
)
def test_transformers_reads_what_we_wrote(words: Path, tmp_path: Path, method: str, flags: tuple) -> None:
    """transformers + compressed-tensors load the folder completely, and compute our logits."""
    # Packed zero points: transformers 5.23 with compressed-tensors 0.20 expects a wrong shape unless it dequantizes
    # on loading, and then it computes in the scales' dtype; hence the model in fp32.
    packed_zeros = "--asym" in flags and 8 not in flags
    model = tiny("llama", tmp_path / "model", dtype=torch.float32 if packed_zeros else torch.bfloat16)
    result = quantize(model, tmp_path / "out", "--method", method, "--dataset", words, *flags)
    assert result.code == 0, result.err
    extra = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if packed_zeros else {}
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True, **extra
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids_BT = torch.randint(3, 98, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = loaded(ids_BT).logits
    ours = our_logits(tmp_path / "out", ids_BT)
    assert (theirs - ours).abs().max() <= 1e-3 * ours.abs().max()


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize(
    "method", [slow_unless(method == "awq+gptq", method) for method in ("awq+gptq", "awq", "gptq")]
)
def test_every_family(family: str, method: str, words: Path, tmp_path: Path) -> None:
    """Quantized, verified, and close to the original: 8 bits leave next to no error wherever a fold was applied."""
    model = tiny(family, tmp_path / "model")
    result = quantize(model, tmp_path / "out", "--method", method, "--bits", 8, "--group-size", 32, "--dataset", words)
    assert result.code == 0, result.err
    verdict = json.loads((tmp_path / "out" / "verification.json").read_text())
    # A router that is near a tie sends a token elsewhere at the smallest change, and a few such tokens rule the mean.
    measure = "kl_median" if family in ("mixtral", "qwen3_moe") else "kl_mean"
    assert verdict["quality"][measure] < 2e-3
    again = infopt("verify", tmp_path / "out", "--reference", model, "--num-samples", 2, "--seqlen", 32)
    assert again.code == 0, again.err


def test_folds_keep_the_function(llama: Path, words: Path, tmp_path: Path) -> None:
    """AWQ rewrites norms and says so; what the rewritten model computes differs only by the rounding of codes."""
    quantize(llama, tmp_path / "out", "--method", "awq", "--bits", 8, "--group-size", 32, "--dataset", words)
    report = json.loads((tmp_path / "out" / "infopt.json").read_text())
    assert "model.layers.0.input_layernorm.weight" in report["rewritten"]
    before = load_file(llama / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    kept = [name for name in before if name in after and after[name].dtype != torch.int8]
    changed = {name for name in kept if not torch.equal(before[name], after[name])}
    assert changed == set(report["rewritten"])


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_killed_run_goes_on(family: str, words: Path, tmp_path: Path) -> None:
    """kill -9 after the first block; the same command then gives the bytes of an undisturbed run.

    Gemma's second block has another structure than its first: a resumed run must not take one for the other.
    """
    model = tiny(family, tmp_path / "model", dtype=torch.bfloat16)
    flags = ("--method", "awq+gptq", "--group-size", "32", "--dataset", str(words), "--no-verify")
    common = ["--num-samples", "8", "--seqlen", "32"]
    assert infopt("quantize", model, "-o", tmp_path / "whole", *common, *flags).code == 0
    code = "from infopt.cli.main import main; main()"
    command = [sys.executable, "-c", code, "quantize", str(model), "-o", str(tmp_path / "cut"), *common, *flags]
    work = tmp_path / "cut.infopt-work" / "parts"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    run = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
    mark = work / "block-00000.json"
    deadline = time.monotonic() + 120
    while not mark.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert mark.exists() and not (tmp_path / "cut").exists()
    resumed = infopt("quantize", model, "-o", tmp_path / "cut", *common, *flags)
    assert resumed.code == 0, resumed.err
    assert "block 1/2  done by an earlier run" in resumed.err
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes(), path.name


def test_marks_of_another_recipe_are_not_used(llama: Path, words: Path, tmp_path: Path) -> None:
    flags = ("--dataset", words, "--no-verify", "--method", "gptq")
    parts = tmp_path / "out.infopt-work" / "parts"
    assert infopt("quantize", llama, "-o", tmp_path / "whole", *SMALL, *flags, "--group-size", 32).code == 0
    parts.mkdir(parents=True)
    (parts / "start.json").write_text('{"fingerprint": "another run", "hidden": null}')
    (parts / "block-00000.json").write_text("{}")
    assert infopt("quantize", llama, "-o", tmp_path / "out", *SMALL, *flags, "--group-size", 32).code == 0
    left, right = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert left.read_bytes() == right.read_bytes()


def test_group_that_does_not_divide(llama: Path, tmp_path: Path) -> None:
    refused = quantize(llama, tmp_path / "a", "--method", "rtn", "--group-size", 128)
    assert refused.code == 2 and "model.layers.0.self_attn.q_proj (64 columns)" in refused.err
    assert not (tmp_path / "a").exists()
    adjusted = quantize(llama, tmp_path / "b", "--method", "rtn", "--group-size", 128, "--group-fallback", "adjust")
    assert adjusted.code == 0, adjusted.err
    assert open_model(tmp_path / "b").quantized["model.layers.0.self_attn.q_proj"].group == 64
    skipped = quantize(llama, tmp_path / "c", "--method", "rtn", "--group-size", 128, "--group-fallback", "skip")
    assert skipped.code == 0, skipped.err
    assert "model.layers.1.mlp.up_proj" in json.loads((tmp_path / "c" / "infopt.json").read_text())["kept"]


def test_ignore(llama: Path, tmp_path: Path) -> None:
    wrong = quantize(llama, tmp_path / "a", "--method", "rtn", "--group-size", 32, "--ignore", "*.down_prj")
    assert wrong.code == 2 and "matches no layer" in wrong.err
    right = quantize(llama, tmp_path / "b", "--method", "rtn", "--group-size", 32, "--ignore", "re:.*down_proj$")
    assert right.code == 0, right.err
    assert not any(name.endswith("down_proj") for name in open_model(tmp_path / "b").quantized)


def test_singular_hessian_raises_the_damping_and_says_so(llama: Path, tmp_path: Path) -> None:
    """One short window: fewer tokens than channels."""
    flags = ("--method", "gptq", "--group-size", 32, "--num-samples", 1, "--seqlen", 8, "--dataset", text(tmp_path, 64))
    recipe = tmp_path / "undamped.yaml"
    recipe.write_text("steps: [{gptq: {damp: 0.0}}]\nweights: {group_size: 32}\n")
    result = infopt("quantize", llama, "--recipe", recipe, "-o", tmp_path / "out", "--no-verify", *flags[2:])
    assert result.code == 0, result.err
    assert "damping raised from 0 to" in result.err


def test_unseen_channels_and_constant_weights(words: Path, tmp_path: Path) -> None:
    """A dead norm channel, a row of zeros and a constant row: finite scales, sane output."""
    from safetensors.torch import save_file

    model = tiny("llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][3] = 0
    tensors["model.layers.0.self_attn.q_proj.weight"][5] = 0
    tensors["model.layers.0.mlp.up_proj.weight"][7] = 0.25
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    for method in ("awq", "gptq", "awq+gptq", "best-4bit"):
        flags = ("--method", method, "--group-size", 32, "--bits", 8, "--dataset", words)
        result = quantize(model, tmp_path / method, *flags)
        assert result.code == 0, result.err
        assert "damping raised" not in result.err
        assert json.loads((tmp_path / method / "verification.json").read_text())["quality"]["kl_mean"] < 2e-3


def test_nan_weights_are_refused(words: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = tiny("llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    result = quantize(model, tmp_path / "out", "--method", "gptq", "--group-size", 32, "--dataset", words)
    assert result.code == 3 and "model.layers.1.mlp.up_proj.weight" in result.err
    assert not (tmp_path / "out").exists()


def test_quality_gates(llama: Path, words: Path, tmp_path: Path) -> None:
    flags = ("--method", "rtn", "--group-size", 32, "--bits", 2)
    result = quantize(llama, tmp_path / "out", *flags, "--max-kl", "1e-9")
    assert result.code == 7 and "kl" in result.err.lower()
    assert json.loads((tmp_path / "out" / "verification.json").read_text())["passed"] is False


def test_already_quantized_is_refused(llama: Path, tmp_path: Path) -> None:
    assert quantize(llama, tmp_path / "a", "--method", "rtn", "--group-size", 32, "--no-verify").code == 0
    twice = quantize(tmp_path / "a", tmp_path / "b", "--method", "rtn", "--group-size", 32)
    assert twice.code == 4 and "quantized already" in twice.err


def test_dry_run_and_memory_limit(llama: Path, tmp_path: Path) -> None:
    planned = quantize(llama, tmp_path / "out", "--method", "rtn", "--group-size", 32, "--dry-run", "--json")
    assert planned.code == 0 and len(json.loads(planned.out)["layers"]) == 14
    refused = quantize(llama, tmp_path / "out", "--method", "rtn", "--group-size", 32, "--max-ram", "100MB")
    assert refused.code == 5 and "GB of memory" in refused.err
    assert list(tmp_path.iterdir()) == []
