"""Hugging Face's fp8 blocks and MLX's affine groups: golden bytes, carried both ways bit for bit, foreign files, damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from infopt.errors import BadInput, InfoptError, Unsupported
from infopt.exporters import hf_fp8, mlx
from infopt.exporters.folder import open_model
from infopt.exporters.quantized import QuantizedReader
from infopt.grid import FP8, Grid, Inputs
from infopt.qtensor import QTensor

from .test_formats import random_qtensor, stream
from .tools import infopt, tiny

Q = "model.layers.0.self_attn.q_proj"
BLOCKS = Grid(8, 128, True, torch.float32, kind="float", rows=128, inputs=Inputs("float", True, 128))
FEW = ("--num-samples", 1, "--seqlen", 32)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model, in blocks of floats (those of k and v are cut short at the edge), and in groups both ways."""
    home = tmp_path_factory.mktemp("fp8-mlx")
    tiny("llama", home / "model", dtype=torch.bfloat16, hidden_size=128, intermediate_size=256)
    made = {
        "fp8": ("--method", "fp8", "--scheme", "FP8_BLOCK"),
        "sym": ("--method", "rtn", "--group-size", 32),
        "mlx": ("--method", "rtn", "--group-size", 32, "--asym", "--format", "mlx"),
    }
    for name, flags in made.items():
        done = infopt("quantize", home / "model", "-o", home / name, *flags, "--no-verify")
        assert done.code == 0, done.err
    return home


def convert(source: Path, out: Path, form: str, *flags: object) -> dict:
    done = infopt("convert", source, "-o", out, "--format", form, "--json", *flags)
    assert done.code == 0, done.err
    return json.loads(done.out)


def dense(folder: Path) -> dict[str, torch.Tensor]:
    reader = open_model(folder)
    return {name: reader.get(name) for name in reader.tensors}


def same(a: Path, b: Path) -> bool:
    old, new = dense(a), dense(b)
    return old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


# Hugging Face fp8


def test_a_block_means_its_number_times_its_scale() -> None:
    """The published rule by hand: W[o, i] = weight[o, i] * weight_scale_inv[o // 128, i // 128], also at cut edges."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 160, generator=generator).to(FP8)
    scale = torch.rand(2, 2, generator=generator) + 0.1
    q = QTensor(weight.view(torch.uint8), scale, torch.zeros(2, 2, dtype=torch.uint8), BLOCKS)
    tensors = hf_fp8.encode("x", q)
    assert tensors.keys() == {"x.weight", "x.weight_scale_inv"} and tensors["x.weight"].dtype == FP8
    want = torch.empty(200, 160)
    for row in range(200):
        for column in range(160):
            want[row, column] = weight[row, column].float() * scale[row // 128, column // 128]
    back = hf_fp8.decode({name.removeprefix("x."): tensor for name, tensor in tensors.items()}, BLOCKS)
    assert torch.equal(back.dequantize(), want) and back.digest() == q.digest()


def test_blocks_go_there_and_back(home: Path, tmp_path: Path) -> None:
    done = convert(home / "fp8", tmp_path / "there", "fp8")
    assert len(done["carried"]) == 14 and same(home / "fp8", tmp_path / "there")
    section = json.loads((tmp_path / "there" / "config.json").read_text())["quantization_config"]
    assert section == {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
                       "modules_to_not_convert": ["lm_head"]}  # fmt: skip
    tensors = load_file(tmp_path / "there" / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight_scale_inv"].shape == (2, 1)
    assert tensors["model.layers.0.mlp.up_proj.weight_scale_inv"].dtype == torch.float32
    convert(tmp_path / "there", tmp_path / "back", "compressed-tensors")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (home / "fp8" / name).read_bytes(), name
    checked = infopt("verify", tmp_path / "there", "--reference", home / "model", *FEW)
    assert checked.code == 0, checked.err
    assert infopt("lint", tmp_path / "there", "--level", "warning").code == 0


def test_quantize_writes_fp8_and_refuses_what_it_cannot_hold(home: Path, tmp_path: Path) -> None:
    flags = ("--method", "fp8", "--no-verify")
    made = infopt("quantize", home / "model", "-o", tmp_path / "a", *flags, "--scheme", "FP8_BLOCK", "--format", "fp8")
    assert made.code == 0, made.err
    old, new = (dense(folder)[f"{Q}.weight"] for folder in (home / "fp8", tmp_path / "a"))
    assert new.dtype == torch.float32  # as are its scales, which compressed-tensors keeps in the model's bfloat16
    assert (old - new).square().mean() < 0.001 * old.square().mean()
    refused = infopt(
        "quantize", home / "model", "-o", tmp_path / "b", *flags, "--scheme", "FP8_DYNAMIC", "--format", "fp8"
    )
    assert refused.code == 4 and "blocks of 128 x 128" in refused.err
    refused = infopt("convert", home / "sym", "-o", tmp_path / "b", "--format", "fp8")
    assert refused.code == 4 and "whole numbers" in refused.err
    narrow = tiny("llama", tmp_path / "narrow", intermediate_size=160)
    refused = infopt("quantize", narrow, "-o", tmp_path / "b", *flags, "--scheme", "FP8_BLOCK", "--format", "fp8")
    assert refused.code == 4 and "128 columns at a time" in refused.err
    refused = infopt("convert", home / "sym", "-o", tmp_path / "b", "--format", "fp8", "--requantize")
    assert refused.code == 4 and not (tmp_path / "b").exists()


@pytest.mark.parametrize("form", ["gptq", "awq", "mlx", "gguf"])
def test_floats_are_never_taken_for_codes(home: Path, tmp_path: Path, form: str) -> None:
    """The bits of an 8-bit float are no whole number; rounding them again must say so and work."""
    flags = ("--no-tokenizer",) if form == "gguf" else ()
    refused = infopt("convert", home / "fp8", "-o", tmp_path / "out", "--format", form, *flags)
    assert refused.code == 4 and "floating numbers of 8 bits" in refused.err, refused.err
    done = convert(home / "fp8", tmp_path / "out", form, "--requantize", *flags)
    assert len(done["requantized"]) == 14
    if form != "gguf":
        q = open_model(tmp_path / "out").qtensor(Q)
        assert q.grid.kind == "int" and q.grid.inputs is None
        assert (q.dequantize() - open_model(home / "fp8").get(f"{Q}.weight")).abs().max() < 0.03


@pytest.mark.parametrize(
    ("section", "error"),
    [
        ({"weight_block_size": None}, Unsupported),
        ({"activation_scheme": "static"}, Unsupported),
        ({"scale_fmt": "ue8m0"}, Unsupported),
        ({"weight_block_size": [64, 128]}, BadInput),
        ({"weight_block_size": [0, 128]}, BadInput),
        ({"weight_block_size": [128, 128, 1]}, BadInput),
        ({"weight_block_size": "128"}, BadInput),
        ({"weight_block_size": [True, 2**40]}, BadInput),
    ],
)
def test_fp8_settings_that_are_wrong(home: Path, tmp_path: Path, section: dict, error: type[InfoptError]) -> None:
    convert(home / "fp8", tmp_path / "f", "fp8")
    config = json.loads((tmp_path / "f" / "config.json").read_text())
    config["quantization_config"].update(section)
    (tmp_path / "f" / "config.json").write_text(json.dumps(config))
    with pytest.raises(error):
        open_model(tmp_path / "f")


@pytest.mark.parametrize("harm", ["gone", "short", "type", "bare"])
def test_fp8_tensors_that_are_wrong(home: Path, tmp_path: Path, harm: str) -> None:
    convert(home / "fp8", tmp_path / "f", "fp8")
    tensors = load_file(tmp_path / "f" / "model.safetensors")
    scale = tensors.pop(f"{Q}.weight_scale_inv")
    if harm == "gone":
        tensors[f"{Q}.weight_scale_inv"] = scale
        del tensors[f"{Q}.weight"]
    elif harm != "bare":
        tensors[f"{Q}.weight_scale_inv"] = scale.flatten() if harm == "short" else scale.to(torch.int32)
    save_file(tensors, tmp_path / "f" / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match="q_proj"):
        open_model(tmp_path / "f")


# MLX


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mlx_is_the_stream_of_its_codes(bits: int, dtype: torch.dtype) -> None:
    """MLX's layout by hand: codes along the input, least significant bits first; W = code * scale + bias."""
    q = random_qtensor(Grid(bits, 32, True, dtype), rows=8, columns=64)
    tensors = mlx.encode("x", q)
    assert tensors["x.weight"].dtype == torch.uint32 and tensors["x.weight"].shape == (8, 64 * bits // 32)
    for row in (0, 7):
        assert tensors["x.weight"].view(torch.int32)[row].tolist() == stream(q.codes[row].tolist(), bits)
    assert torch.equal(tensors["x.biases"].float(), -(2.0 ** (bits - 1)) * q.scale.float())
    parts = {name.removeprefix("x."): tensor for name, tensor in tensors.items()}
    assert torch.equal(mlx.dense(parts, q.grid), q.dequantize())


def test_offsets_that_would_be_rounded_are_named() -> None:
    q = random_qtensor(Grid(4, 32, False, torch.bfloat16))
    assert "no bfloat16 number" in (mlx.exact(q) or "")
    with pytest.raises(ValueError, match="zero point times scale"):
        mlx.encode("x", q)
    assert mlx.FORMAT.refuses(Grid(4, None), (64, 64)) and mlx.FORMAT.refuses(Grid(8, 32, False), (64, 64))


@pytest.mark.parametrize(("source", "form"), [("sym", "compressed-tensors"), ("mlx", "awq"), ("mlx", "gptq_v2")])
def test_mlx_goes_there_and_back(home: Path, tmp_path: Path, source: str, form: str) -> None:
    """One solution in all formats: with zero points it is solved for MLX, whose scales GGUF's Q4_1 holds as well."""
    done = convert(home / source, tmp_path / "there", "mlx" if source == "sym" else form)
    assert len(done["carried"]) == 14 and same(home / source, tmp_path / "there")
    convert(tmp_path / "there", tmp_path / "back", form if source == "sym" else "mlx")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (home / source / name).read_bytes(), name
    folder = tmp_path / ("there" if source == "sym" else "back")
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"] == {"group_size": 32, "bits": 4, "mode": "affine"}
    checked = infopt("verify", folder, "--reference", home / "model", *FEW)
    assert checked.code == 0, checked.err


def test_mlx_zero_points_fit_gguf(home: Path, tmp_path: Path) -> None:
    assert len(convert(home / "mlx", tmp_path / "gguf", "gguf", "--no-tokenizer")["carried"]) == 14


def test_scales_with_zero_points_of_other_tools_get_a_wider_type(home: Path, tmp_path: Path) -> None:
    """bfloat16 scales times zero points are no bfloat16 numbers, and are float32 ones."""
    flags = ("--method", "rtn", "--group-size", 32, "--asym", "--no-verify")
    assert infopt("quantize", home / "model", "-o", tmp_path / "ct", *flags).code == 0
    assert len(convert(tmp_path / "ct", tmp_path / "mlx", "mlx")["carried"]) == 14
    assert same(tmp_path / "ct", tmp_path / "mlx")
    convert(tmp_path / "mlx", tmp_path / "back", "compressed-tensors")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "ct/model.safetensors").read_bytes()


@pytest.fixture
def foreign(home: Path, tmp_path: Path) -> Path:
    """As mlx-lm writes it: scales and offsets rounded apart, negative scales, the embedding quantized, one layer wider."""
    folder = shutil.copytree(home / "mlx", tmp_path / "foreign")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{Q}.biases"] += tensors[f"{Q}.scales"] * 0.3
    tensors["model.layers.1.mlp.up_proj.scales"] *= -1
    table = tensors.pop("model.embed_tokens.weight").float()
    low, step = table.amin(1, keepdim=True), (table.amax(1, keepdim=True) - table.amin(1, keepdim=True)) / 255
    codes = ((table - low) / step).round().to(torch.uint8)
    tensors["model.embed_tokens.weight"] = codes.view(torch.int32).view(torch.uint32)
    tensors |= {"model.embed_tokens.scales": step.half(), "model.embed_tokens.biases": low.half()}
    save_file(tensors, folder / "model.safetensors", {"format": "mlx"})
    config = json.loads((folder / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        config[key]["model.embed_tokens"] = {"group_size": 128, "bits": 8}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("infopt.json", "manifest.json"):
        (folder / name).unlink()
    return folder


def test_what_mlx_lm_writes_is_read_by_its_own_formula(home: Path, foreign: Path, tmp_path: Path) -> None:
    reader = open_model(foreign)
    assert isinstance(reader, QuantizedReader)
    assert set(reader.ordered) == {Q, "model.layers.1.mlp.up_proj", "model.embed_tokens"}
    tensors = load_file(foreign / "model.safetensors")
    codes = torch.tensor(
        [[int(word) >> 4 * i & 15 for word in row for i in range(8)] for row in tensors[f"{Q}.weight"]]
    )
    want = codes.float().view(128, 4, 32) * tensors[f"{Q}.scales"].float()[..., None]
    want += tensors[f"{Q}.biases"].float()[..., None]
    assert torch.equal(reader.get(f"{Q}.weight"), want.view(128, 128))
    table = open_model(home / "mlx").get("model.embed_tokens.weight").float()
    assert (reader.get("model.embed_tokens.weight") - table).abs().max() < 0.02
    checked = infopt("verify", foreign, "--num-samples", 1, "--seqlen", 32)
    assert checked.code == 0 and "no multiples" in checked.err, checked.err
    refused = infopt("convert", foreign, "-o", tmp_path / "out", "--format", "gptq_v2")
    assert refused.code == 4 and "3 of 15 layers" in refused.err, refused.err
    done = convert(foreign, tmp_path / "out", "gptq_v2", "--dequantize")
    assert len(done["carried"]) == 12 and "model.embed_tokens" in done["dequantized"]
    rounded = convert(foreign, tmp_path / "round", "gptq_v2", "--requantize")
    assert "model.embed_tokens" in rounded["dequantized"] and len(rounded["requantized"]) == 2


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"mode": "mxfp4"}, Unsupported),
        ({"bits": 5}, Unsupported),
        ({"bits": "4"}, Unsupported),
        ({"group_size": 0}, Unsupported),
        ({"group_size": 48}, BadInput),
        ({"group_size": 64}, BadInput),
        ({"bits": 8}, BadInput),
        ({Q: {"bits": 3}}, BadInput),
        ({Q: {"bits": [4]}}, Unsupported),
    ],
)
def test_mlx_settings_that_are_wrong(home: Path, tmp_path: Path, settings: dict, error: type[InfoptError]) -> None:
    folder = shutil.copytree(home / "mlx", tmp_path / "f")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(settings)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(error):
        open_model(folder)


@pytest.mark.parametrize("part", ["weight", "biases", "scales"])
@pytest.mark.parametrize("harm", ["gone", "short", "type"])
def test_mlx_tensors_that_are_wrong(home: Path, tmp_path: Path, part: str, harm: str) -> None:
    if (part, harm) == ("scales", "gone"):
        return  # then nothing says that it is quantized, and the model's shape does not fit
    folder = shutil.copytree(home / "mlx", tmp_path / "f")
    tensors = load_file(folder / "model.safetensors")
    old = tensors.pop(f"{Q}.{part}")
    if harm != "gone":
        tensors[f"{Q}.{part}"] = old[1:].clone() if harm == "short" else old.to(torch.int64)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match="q_proj"):
        open_model(folder)
