"""`infopt convert --format`: codes carried over bit for bit, there and back; what cannot be carried is said, not done."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from infopt.exporters.carry import round_nearest
from infopt.exporters.folder import open_model
from infopt.exporters.formats import FORMATS
from infopt.grid import Grid
from infopt.output import write_manifest

from .tools import infopt, tiny

Q = "model.layers.0.self_attn.q_proj"
FEW = ("--num-samples", 1, "--seqlen", 32)
RTN = ("--method", "rtn", "--group-size", 32, "--no-verify")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One quantization each: symmetric, with zero points, of 8 and of 3 bits; and GPT-2, which keeps weights as [I, O]."""
    home = tmp_path_factory.mktemp("carry")
    tiny("llama", home / "model", dtype=torch.bfloat16)
    tiny("gpt2", home / "gpt2-model", dtype=torch.bfloat16)
    made = {"sym": (), "asym": ("--asym",), "eight": ("--bits", 8), "three": ("--bits", 3)}
    for name, flags in made.items():
        assert infopt("quantize", home / "model", "-o", home / name, *RTN, *flags).code == 0
    assert infopt("quantize", home / "gpt2-model", "-o", home / "gpt2", *RTN).code == 0
    return home


def convert(source: Path, out: Path, form: str, *flags: object) -> dict:
    result = infopt("convert", source, "-o", out, "--format", form, "--json", *flags)
    assert result.code == 0, result.err
    return json.loads(result.out)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor as the dense model has it."""
    reader = open_model(folder)
    return {name: reader.get(name) for name in reader.tensors}


@pytest.mark.parametrize(
    ("source", "form"),
    [
        ("sym", "gptq"),
        ("sym", "gptq_v2"),
        ("sym", "awq"),
        ("asym", "gptq_v2"),
        ("asym", "awq"),
        ("eight", "gptq"),
        ("three", "gptq"),
        ("gpt2", "gptq"),
        ("gpt2", "awq"),
    ],
)
def test_there_and_back_gives_the_old_bytes(home: Path, tmp_path: Path, source: str, form: str) -> None:
    there = convert(home / source, tmp_path / "there", form)
    assert there["format"] == form and not there["requantized"] and not there["dequantized"]
    assert sorted(there["carried"]) == sorted(open_model(home / source).quantized)
    old, new = weights(home / source), weights(tmp_path / "there")
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    convert(tmp_path / "there", tmp_path / "back", "compressed-tensors")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (home / source / name).read_bytes(), name
    model = home / ("gpt2-model" if source == "gpt2" else "model")
    assert infopt("verify", tmp_path / "there", "--reference", model, *FEW).code == 0


ALL = ("compressed-tensors", "gptq", "gptq_v2", "awq", "mlx")


@pytest.fixture(scope="module")
def every(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The symmetric model in each format that holds it, made from compressed-tensors."""
    place = tmp_path_factory.mktemp("every")
    made = {form: place / form for form in ALL if form != "compressed-tensors"}
    for form, folder in made.items():
        convert(home / "sym", folder, form)
    return {"compressed-tensors": home / "sym", **made}


@pytest.mark.parametrize(("first", "second"), itertools.permutations(ALL, 2))
def test_every_pair_gives_the_same_bytes(every: dict[str, Path], tmp_path: Path, first: str, second: str) -> None:
    """A format's bytes do not depend on where the codes come from, so A to B to A is A for all pairs, and so is any chain."""
    convert(every[first], tmp_path / "out", second)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (every[second] / name).read_bytes(), name


def test_all_formats_hold_the_same_weights(home: Path, tmp_path: Path) -> None:
    """A chain through all formats that hold zero points ends where it began."""
    before, chain = weights(home / "asym"), ["awq", "gptq_v2", "compressed-tensors", "gptq_v2", "awq"]
    folder = home / "asym"
    for number, form in enumerate(chain):
        convert(folder, tmp_path / str(number), form)
        folder = tmp_path / str(number)
        assert all(torch.equal(before[name], tensor) for name, tensor in weights(folder).items())
    history = json.loads((folder / "infopt.json").read_text())["conversions"]
    assert [step["to"] for step in history] == chain
    assert "topologies" in json.loads((folder / "infopt.json").read_text())


@pytest.mark.parametrize(
    ("source", "form", "words"),
    [
        ("asym", "gptq", ("14 of 14", Q, "zero", "--requantize", "--dequantize", "--format gptq_v2")),
        ("eight", "awq", ("14 of 14", "4 bits, not 8", "--format gptq")),
        ("sym", "safetensors", ("14 layers", "--dequantize")),
        ("sym", "fp8", ("14 of 14", "try: --dequantize")),
    ],
)
def test_what_cannot_be_carried_says_what_would_help(
    home: Path, tmp_path: Path, source: str, form: str, words: tuple[str, ...]
) -> None:
    result = infopt("convert", home / source, "-o", tmp_path / "out", "--format", form)
    assert result.code == 4 and all(word in result.err for word in words), result.err
    assert list(tmp_path.iterdir()) == []


def test_scales_that_float16_would_round(tmp_path: Path) -> None:
    """A float32 model has float32 scales."""
    tiny("llama", tmp_path / "model")
    assert infopt("quantize", tmp_path / "model", "-o", tmp_path / "q", *RTN).code == 0
    result = infopt("convert", tmp_path / "q", "-o", tmp_path / "out", "--format", "gptq")
    assert result.code == 4 and "float32 numbers that float16 would round" in result.err
    assert "`--format mlx` carries them" in result.err  # and not the other version, which has the same scales
    done = convert(tmp_path / "q", tmp_path / "out", "gptq", "--requantize")
    assert len(done["requantized"]) == 14
    directly = infopt("quantize", tmp_path / "model", "-o", tmp_path / "direct", *RTN, "--format", "gptq")
    assert directly.code == 0, directly.err


def test_constant_zero_points_need_no_zero_points(home: Path, tmp_path: Path) -> None:
    """Zero points that are all in the middle are the symmetric grid, and gptq version 1 can hold it."""
    folder = convert_copy(home, tmp_path)
    done = convert(folder, tmp_path / "out", "gptq")
    assert len(done["carried"]) == 14
    old, new = weights(folder), weights(tmp_path / "out")
    assert all(torch.equal(old[name], new[name]) for name in old)


def convert_copy(home: Path, tmp_path: Path) -> Path:
    """The symmetric model as an awq folder that says it has zero points."""
    convert(home / "sym", tmp_path / "awq", "awq")
    config = json.loads((tmp_path / "awq" / "config.json").read_text())
    config["quantization_config"]["zero_point"] = True
    (tmp_path / "awq" / "config.json").write_text(json.dumps(config))
    for name in ("infopt.json", "manifest.json"):
        (tmp_path / "awq" / name).unlink()
    return tmp_path / "awq"


def test_requantize_and_dequantize_do_what_they_say(home: Path, tmp_path: Path) -> None:
    old = weights(home / "eight")
    done = convert(home / "eight", tmp_path / "awq", "awq", "--requantize")
    assert len(done["requantized"]) == 14 and not done["carried"]
    q = open_model(tmp_path / "awq").qtensor(Q)
    assert q.grid == Grid(4, 32, True, torch.float16)
    assert q.digest() == round_nearest(Q, old[f"{Q}.weight"], q.grid).digest()
    done = convert(home / "eight", tmp_path / "plain", "safetensors", "--dequantize", "--dtype", "float32")
    assert len(done["dequantized"]) == 14
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert plain.keys() == old.keys() and all(torch.equal(plain[name], old[name]) for name in old)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config and "float32" in (config.get("dtype"), config.get("torch_dtype"))
    for folder in ("awq", "plain"):
        result = infopt("verify", tmp_path / folder, "--reference", home / "model", *FEW)
        assert result.code == 0, result.err


def test_layers_that_must_be_alike(tmp_path: Path) -> None:
    """awq has one grid for all layers: what differs is requantized, and the rest still carried."""
    model = tiny("llama", tmp_path / "model", intermediate_size=160, dtype=torch.bfloat16)
    flags = ("--method", "rtn", "--group-size", 64, "--group-fallback", "adjust", "--no-verify")
    assert infopt("quantize", model, "-o", tmp_path / "q", *flags).code == 0
    refused = infopt("convert", tmp_path / "q", "-o", tmp_path / "awq", "--format", "awq")
    assert refused.code == 4 and "2 of 14 layers" in refused.err and "all layers alike" in refused.err
    mixed = convert(tmp_path / "q", tmp_path / "mixed", "awq", "--dequantize")
    assert len(mixed["carried"]) == 12 and all("down_proj" in name for name in mixed["dequantized"])
    kept = open_model(tmp_path / "mixed").config["quantization_config"]["modules_to_not_convert"]
    assert "model.layers.0.mlp.down_proj" in kept
    done = convert(tmp_path / "q", tmp_path / "awq", "awq", "--requantize")
    assert not done["carried"] and len(done["requantized"]) == 14  # groups of 64 do not divide 160 columns
    assert {grid.group for grid in open_model(tmp_path / "awq").quantized.values()} == {32}


def test_activation_order_cannot_be_carried(home: Path, tmp_path: Path) -> None:
    convert(home / "sym", tmp_path / "gptq", "gptq")
    tensors = load_file(tmp_path / "gptq" / "model.safetensors")
    tensors[f"{Q}.g_idx"] = tensors[f"{Q}.g_idx"].flip(0).contiguous()
    save_file(tensors, tmp_path / "gptq" / "model.safetensors", {"format": "pt"})
    for name in ("infopt.json", "manifest.json"):
        (tmp_path / "gptq" / name).unlink()
    refused = infopt("convert", tmp_path / "gptq", "-o", tmp_path / "out", "--format", "awq")
    assert refused.code == 4 and "1 of 14" in refused.err and "activation order" in refused.err
    done = convert(tmp_path / "gptq", tmp_path / "out", "awq", "--requantize")
    assert done["requantized"] == [Q] and len(done["carried"]) == 13
    before, after = (open_model(tmp_path / name).get(f"{Q}.weight") for name in ("gptq", "out"))
    assert (before - after).abs().max() < 0.05


# Sources that are damaged


def test_a_damaged_source_is_not_blessed_with_new_digests(home: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(home / "sym", tmp_path / "sym")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{Q}.weight_packed"][2, 1] ^= 64
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    changed = infopt("convert", folder, "-o", tmp_path / "out", "--format", "gptq")
    assert changed.code == 6 and "model.safetensors" in changed.err
    write_manifest(folder)
    changed = infopt("convert", folder, "-o", tmp_path / "out", "--format", "gptq")
    assert changed.code == 6 and Q in changed.err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.infopt-work").exists()


@pytest.mark.parametrize("form", ["gptq", "safetensors"])
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_scales_that_are_no_numbers(home: Path, tmp_path: Path, form: str, bad: str) -> None:
    folder = shutil.copytree(home / "sym", tmp_path / "sym")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{Q}.weight_scale"][0, 0] = float(bad)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for name in ("infopt.json", "manifest.json"):
        (folder / name).unlink()
    for flags in ((), ("--dequantize",), ("--requantize",)):
        result = infopt("convert", folder, "-o", tmp_path / "out", "--format", form, *flags)
        assert result.code in (3, 4), result.err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("report", ["[]", '{"layers": 3}', '{"layers": {"a": 1}}', '{"conversions": {}}', "{"])
def test_a_report_that_is_none(home: Path, tmp_path: Path, report: str) -> None:
    folder = shutil.copytree(home / "sym", tmp_path / "sym")
    (folder / "infopt.json").write_text(report)
    (folder / "manifest.json").unlink()
    assert infopt("convert", folder, "-o", tmp_path / "out", "--format", "gptq").code == 3


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("sym",), 2),
        (("sym", "--format", "gguff"), 2),
        (("sym", "--format", "gptq", "--requantize", "--dequantize"), 2),
        (("x.gguf", "--format", "gptq"), 2),
        (("nothing-here/at/all", "--format", "gptq"), 3),
        (("model", "--format", "gptq"), 4),
    ],
)
def test_usage(home: Path, tmp_path: Path, arguments: tuple[str, ...], code: int) -> None:
    result = infopt("convert", home / arguments[0], "-o", tmp_path / "out", *arguments[1:])
    assert result.code == code, result.err
    assert list(tmp_path.iterdir()) == []


def test_every_format_of_the_table_is_offered() -> None:
    shown = infopt("convert", "--help").out
    assert all(name in shown for name in (*FORMATS, "safetensors"))
