"""GGUF as a source of codes: Q4_0, Q4_1 and Q8_0 become compressed-tensors exactly, and infopt's own files their old bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from tokenizers import pre_tokenizers

from infopt.exporters.folder import open_model
from infopt.exporters.gguf_blocks import decode_blocks, encode_blocks
from infopt.exporters.gguf_model import open_gguf

from .test_convert import tiny_llama, write_gguf
from .test_gguf_export import bytes_tokenizer, model
from .tools import infopt

GROUP = ("--group-size", 32)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model` is at least 128 wide, so that groups may be, and its two widths tell groups from channels; `deep` has a block 10,
    which sorts before block 2."""
    home = tmp_path_factory.mktemp("codes")
    model("llama", home / "deep", num_hidden_layers=11, intermediate_size=64, tie_word_embeddings=True)
    for folder in (model("llama", home / "model", hidden_size=128, intermediate_size=256), home / "deep"):
        bytes_tokenizer(folder, pre_tokenizers.Digits(individual_digits=True))
    return home


def quantized(folder: Path, out: Path, *flags: object) -> Path:
    made = infopt("quantize", folder, "-o", out, "--method", "rtn", "--no-verify", *flags)
    assert made.code == 0, made.err
    return out


def imported(source: Path, out: Path, *flags: object) -> dict:
    done = infopt("convert", source, "-o", out, "--format", "compressed-tensors", "--json", *flags)
    assert done.code == 0, done.err
    return json.loads(done.out)


# Blocks


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_of_the_gguf_package_mean_the_same_numbers(kind: str) -> None:
    """Its Q4_0 has negative scales and a block of zeros has the scale 0; Q4_1 has codes only where offsets are multiples."""
    w_OI = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).numpy()
    w_OI[3, 32:64] = 0
    raw = gguf.quantize(w_OI, GGMLQuantizationType[kind])
    q = decode_blocks(raw, GGMLQuantizationType[kind])
    if kind == "Q4_1":
        assert q == "its offsets are no multiples of its scales"
        return
    assert not isinstance(q, str) and bool((q.scale > 0).all())
    assert q.grid.symmetric is (kind == "Q8_0") and q.zero.unique().tolist() == {"Q4_0": [7, 8], "Q8_0": [128]}[kind]
    assert np.array_equal(q.dequantize().numpy(), gguf.dequantize(raw, GGMLQuantizationType[kind]))


def test_blocks_that_have_no_codes_say_why() -> None:
    raw = gguf.quantize(np.ones((1, 32), np.float32), GGMLQuantizationType.Q8_0)
    raw[0, :2] = np.array([np.nan], np.float16).view(np.uint8)
    assert decode_blocks(raw, GGMLQuantizationType.Q8_0) == "its scales are not finite"


@pytest.mark.parametrize("offset", [-16.0, 0.5, 1.0, float("inf"), float("nan")])
def test_an_offset_that_is_no_zero_point(offset: float) -> None:
    raw = np.zeros((1, 20), np.uint8)
    raw[0, :4] = np.array([1.0, offset], np.float16).view(np.uint8)
    assert decode_blocks(raw, GGMLQuantizationType.Q4_1) == "its offsets are no multiples of its scales"
    raw[0, :2] = 0
    assert isinstance(decode_blocks(raw, GGMLQuantizationType.Q4_1), str)  # a constant block: d = 0, m is the constant


# Files


@pytest.mark.parametrize(
    ("name", "flags", "kind"),
    [
        ("deep", GROUP, "Q4_0"),
        ("model", ("--group-size", 128), "Q4_0"),
        ("model", ("--group-size", "channel"), "Q4_0"),
        ("model", (*GROUP, "--asym", "--format", "mlx"), "Q4_1"),
        ("model", ("--bits", 8, "--group-size", 64), "Q8_0"),
    ],
)
def test_there_and_back_gives_the_old_bytes(
    home: Path, tmp_path: Path, name: str, flags: tuple[object, ...], kind: str
) -> None:
    """compressed-tensors to GGUF to compressed-tensors. GGUF has no config.json: its section alone comes back as it was."""
    first = quantized(home / name, tmp_path / "first", *flags)
    if "mlx" in flags:
        imported(first, tmp_path / "ct")
        first = tmp_path / "ct"
    assert infopt("convert", first, "-o", tmp_path / "gguf", "--format", "gguf").code == 0
    file = tmp_path / "gguf" / "model.gguf"
    kinds = [tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors]
    done = imported(file, tmp_path / "back")
    assert kinds.count(kind) == len(done["carried"]) == 7 * {"deep": 11, "model": 2}[name] and not done["dequantized"]
    assert (tmp_path / "back/model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (first, tmp_path / "back"))
    assert old["quantization_config"] == new["quantization_config"]
    again = infopt("convert", tmp_path / "back", "-o", tmp_path / "again", "--format", "gguf", "--no-tokenizer")
    assert again.code == 0, again.err
    blocks = [tensor.data.tobytes() for tensor in gguf.GGUFReader(file).tensors]
    assert blocks == [tensor.data.tobytes() for tensor in gguf.GGUFReader(tmp_path / "again" / "model.gguf").tensors]


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_a_file_of_llama_cpp_keeps_its_codes_in_every_format(tmp_path: Path, kind: str) -> None:
    """Written with the gguf package: q and k in llama.cpp's row order, float16 scales of both signs, a quantized embedding."""
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=False), "llama", GGMLQuantizationType[kind])
    refused = infopt("convert", path, "-o", tmp_path / "no", "--format", "compressed-tensors")
    assert refused.code == 4 and "2 of 16 quantized tensors" in refused.err and "--dequantize" in refused.err
    assert sorted(found.name for found in tmp_path.iterdir()) == ["tiny.gguf"]
    done = imported(path, tmp_path / "ct", "--dequantize")
    assert len(done["carried"]) == 14 and done["dequantized"] == ["lm_head.weight", "model.embed_tokens.weight"]
    meant = dict(open_gguf(path).tensors(torch.float32))
    reader = open_model(tmp_path / "ct")
    assert all(torch.equal(reader.get(f"{name}.weight").float(), meant[f"{name}.weight"]) for name in done["carried"])
    checked = infopt("verify", tmp_path / "ct")
    assert checked.code == 0, checked.err
    other = "awq" if kind == "Q4_0" else "gptq"
    assert infopt("convert", tmp_path / "ct", "-o", tmp_path / other, "--format", other).code == 0
    reader = open_model(tmp_path / other)
    assert all(torch.equal(reader.get(f"{name}.weight").float(), meant[f"{name}.weight"]) for name in done["carried"])


def test_files_without_codes_that_can_be_carried(home: Path, tmp_path: Path) -> None:
    assert infopt("convert", home / "model", "-o", tmp_path / "f", "--format", "gguf").code == 0
    convert = ("convert", "--format", "compressed-tensors", "-o", tmp_path / "out")
    floats = infopt(*convert, tmp_path / "f" / "model.gguf", "--dequantize")
    assert floats.code == 4 and "all its tensors are floats" in floats.err
    requantized = ("--requantize", "--format", "gguf_q4_k")
    assert infopt("convert", home / "model", "-o", tmp_path / "k", *requantized).code == 0
    blocks = infopt(*convert, tmp_path / "k" / "model.gguf", "--dequantize")
    assert blocks.code == 4 and "scales of its own kind" in blocks.err
    assert infopt(*convert, tmp_path / "k" / "model.gguf", "--requantize").code == 2
    assert not (tmp_path / "out").exists()


def test_a_file_that_was_cut_leaves_nothing(home: Path, tmp_path: Path) -> None:
    first = quantized(home / "model", tmp_path / "first", *GROUP, "--format", "gguf")
    data = (first / "model.gguf").read_bytes()
    shutil.rmtree(first)
    (tmp_path / "cut.gguf").write_bytes(data[:-100])
    done = infopt("convert", tmp_path / "cut.gguf", "-o", tmp_path / "out", "--format", "compressed-tensors")
    assert done.code == 3 and [found.name for found in tmp_path.iterdir()] == ["cut.gguf"]


def test_layers_of_four_and_of_eight_bits_get_a_group_each(home: Path, tmp_path: Path) -> None:
    recipe = {"steps": [{"round": {}}], "weights": {"bits": 4, "group_size": 32},
              "overrides": [{"match": ["*.down_proj"], "weights": {"bits": 8, "group_size": "channel"}}]}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    flags = ("--recipe", tmp_path / "recipe.yaml", "--no-verify")
    assert infopt("quantize", home / "model", "-o", tmp_path / "q", *flags).code == 0
    assert infopt("convert", tmp_path / "q", "-o", tmp_path / "g", "--format", "gguf").code == 0
    assert len(imported(tmp_path / "g" / "model.gguf", tmp_path / "back")["carried"]) == 14
    assert (tmp_path / "q/model.safetensors").read_bytes() == (tmp_path / "back/model.safetensors").read_bytes()
    assert {grid.bits for grid in open_model(tmp_path / "back").quantized.values()} == {4, 8}


def test_encoding_again_gives_the_blocks(tmp_path: Path) -> None:
    """decode and encode are each other's inverse where llama.cpp's own scales are positive."""
    w_OI = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).numpy()
    raw = gguf.quantize(w_OI, GGMLQuantizationType.Q8_0)
    q = decode_blocks(raw, GGMLQuantizationType.Q8_0)
    assert not isinstance(q, str) and np.array_equal(encode_blocks(q, GGMLQuantizationType.Q8_0), raw)
