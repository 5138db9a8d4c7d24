"""GGUF's K-quants, cache scales on the way to other formats, and the names of pre-tokenizers."""

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
from transformers import AutoTokenizer

from infopt.exporters.folder import open_model
from infopt.exporters.gguf_import import convert_gguf
from infopt.exporters.gguf_kquants import fitting, round_blocks

from .test_gguf_export import bytes_tokenizer, model
from .tools import infopt, text

Q4_K, Q6_K = GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K


def outliers(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(rows, columns, generator=generator) * 0.02
    w[1, 3], w[2], w[3] = 1.5, 0.0, 0.25
    w[4, ::2] = -w[4, ::2].abs() * 3
    return w


@pytest.mark.parametrize("bits", [Q4_K, Q6_K])
def test_blocks_by_their_published_layout(bits: GGMLQuantizationType) -> None:
    """Both layouts written out value by value, against the package's decoder and against the weights."""
    w = outliers(8, 512)
    blocks = round_blocks(w, bits)
    decoded = gguf.dequantize(blocks, bits)
    by_hand = q4_k if bits is Q4_K else q6_k
    size = 144 if bits is Q4_K else 210
    for row in (0, 1, 4, 7):
        for block in (0, 1):
            want = by_hand(blocks[row, block * size : (block + 1) * size])
            assert np.array_equal(np.float32(want), decoded[row, block * 256 : (block + 1) * 256])
    error = (torch.from_numpy(decoded) - w).square().mean(1) / w.square().mean(1).clamp_min(1e-30)
    assert error[[0, 5, 6, 7]].max() < (0.08**2 if bits is Q4_K else 0.02**2)
    assert not decoded[2].any() and np.allclose(decoded[3], 0.25, rtol=0.02)


def halves(block: np.ndarray, at: int) -> np.float32:
    return np.float32(block[at : at + 2].view(np.float16)[0])


def q4_k(block: np.ndarray) -> list[np.float32]:
    d, dmin, packed, codes = halves(block, 0), halves(block, 2), block[4:16].astype(int), block[16:].astype(int)
    values = []
    for j in range(256):
        s = j // 32
        if s < 4:
            scale, low = packed[s] & 63, packed[s + 4] & 63
        else:
            scale = packed[s + 4] & 15 | packed[s - 4] >> 6 << 4
            low = packed[s + 4] >> 4 | packed[s] >> 6 << 4
        code = codes[s // 2 * 32 + j % 32] >> 4 * (s % 2) & 15
        values.append(d * np.float32(scale) * np.float32(code) - dmin * np.float32(low))
    return values


def q6_k(block: np.ndarray) -> list[np.float32]:
    low, high = block[:128].astype(int), block[128:192].astype(int)
    scales, d = block[192:208].view(np.int8), halves(block, 208)
    values = []
    for j in range(256):
        half, quarter, at = j // 128, j % 128 // 32, j % 32
        nibble = low[half * 64 + quarter % 2 * 32 + at] >> 4 * (quarter // 2) & 15
        code = (nibble | (high[half * 32 + at] >> 2 * quarter & 3) << 4) - 32
        values.append(d * np.float32(scales[j // 16]) * np.float32(code))
    return values


def test_better_than_the_simple_types_and_what_stands_in() -> None:
    w = outliers(64, 512)[5:]
    error = {
        kind.name: np.square(gguf.dequantize(blocks, kind) - w.numpy()).mean()
        for kind in (Q4_K, Q6_K, GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1)
        for blocks in [round_blocks(w, kind) if kind in (Q4_K, Q6_K) else gguf.quantize(w.numpy(), kind)]
    }
    assert error["Q4_K"] < error["Q4_1"] < error["Q4_0"] and error["Q6_K"] < error["Q4_K"] / 8
    assert fitting(Q4_K, 512) is Q4_K and fitting(Q4_K, 576).name == "Q5_0" and fitting(Q6_K, 576).name == "Q8_0"
    assert fitting(Q4_K, 80) is None


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("kquants")
    folder = model("llama", home / "model", hidden_size=256, intermediate_size=288)
    bytes_tokenizer(folder, pre_tokenizers.Digits(individual_digits=True))
    for name, flags in {
        "w4": (),
        "kv": ("--kv-cache", "fp8", "--dataset", text(home), "--num-samples", 1, "--seqlen", 32),
    }.items():
        done = infopt(
            "quantize", folder, "-o", home / name, "--method", "rtn", "--group-size", 32, *flags, "--no-verify"
        )
        assert done.code == 0, done.err
    return home


@pytest.mark.parametrize(("source", "form"), [("model", "gguf_q4_k"), ("w4", "gguf_q6_k")])
def test_a_model_is_rounded_when_that_is_asked_for(home: Path, tmp_path: Path, source: str, form: str) -> None:
    flags = ("--format", form, "-o", tmp_path / "out")
    refused = infopt("convert", home / source, *flags)
    assert refused.code == 4 and "--requantize" in refused.err and not (tmp_path / "out").exists()
    done = infopt("convert", home / source, *flags, "--requantize", "--json")
    assert done.code == 0, done.err
    assert len(json.loads(done.out)["requantized"]) == 14
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    main, other = ("Q4_K", "Q5_0") if form == "gguf_q4_k" else ("Q6_K", "Q8_0")
    assert kinds["blk.0.attn_q.weight"] == main and kinds["blk.1.ffn_down.weight"] == other  # 288 columns
    assert kinds["token_embd.weight"] == "BF16" and kinds["output_norm.weight"] == "F32"
    told = json.loads((tmp_path / "out" / "infopt.json").read_text())["conversions"][-1]["requantized"]
    assert told["model.layers.0.self_attn.q_proj"] == main and len(told) == 14
    convert_gguf(tmp_path / "out" / "model.gguf", tmp_path / "back", torch.float32)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"):
        before, after = (
            open_model(f).get(f"model.layers.1.{name}.weight").float() for f in (home / source, tmp_path / "back")
        )
        assert (before - after).square().mean() < 0.01 * before.square().mean()


def test_cache_scales_are_kept_or_told(home: Path, tmp_path: Path) -> None:
    """On the way to a format without a place for them, calibrated scales of a cache are never lost in silence."""
    for form in ("gptq", "mlx", "gguf"):
        refused = infopt("convert", home / "kv", "--format", form, "-o", tmp_path / "out")
        assert refused.code == 4 and "k_scale" in refused.err and "key-value cache" in refused.err, refused.err
        assert not (tmp_path / "out").exists()
    done = infopt("convert", home / "kv", "--format", "gptq", "--requantize", "-o", tmp_path / "out", "--json")
    assert done.code == 0 and len(json.loads(done.out)["left_out"]) == 4, done.err
    assert len(json.loads(done.out)["carried"]) == 14
    same = infopt("convert", home / "kv", "--format", "compressed-tensors", "-o", tmp_path / "same")
    assert same.code == 0, same.err
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "same" / name).read_bytes() == (home / "kv" / name).read_bytes()


@pytest.mark.parametrize("steps", [(), (pre_tokenizers.Digits(individual_digits=True),)])
def test_how_text_is_cut_survives_gguf(home: Path, tmp_path: Path, steps: tuple) -> None:
    """transformers ignores the name of the pre-tokenizer; without it numbers would get other tokens."""
    folder = shutil.copytree(home / "model", tmp_path / "model")
    bytes_tokenizer(folder, *steps)
    assert infopt("convert", folder, "--format", "gguf", "-o", tmp_path / "gguf").code == 0
    convert_gguf(tmp_path / "gguf" / "model.gguf", tmp_path / "back")
    names = [part["type"] for part in steps_of(tmp_path / "back")]
    assert names == (["Digits", "ByteLevel"] if steps else ["ByteLevel"])
    ours, theirs = (AutoTokenizer.from_pretrained(place) for place in (folder, tmp_path / "back"))
    for words in ("ab a cab 1893", "a  ab\n\n12ab"):
        assert ours(words).input_ids == theirs(words).input_ids


def steps_of(folder: Path) -> list[dict]:
    found = json.loads((folder / "tokenizer.json").read_text())["pre_tokenizer"]
    return found.get("pretokenizers", [found])
