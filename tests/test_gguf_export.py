"""GGUF files from folders: golden bytes, the way back bit for bit, tokenizers, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from infopt.errors import Unsupported
from infopt.exporters.folder import open_model
from infopt.exporters.gguf_blocks import GGUF, GGUF_Q8_0, block_type, encode_blocks
from infopt.exporters.gguf_import import convert_gguf
from infopt.exporters.gguf_model import open_gguf
from infopt.exporters.gguf_settings import ARCHITECTURES, check_settings
from infopt.grid import Grid
from infopt.qtensor import QTensor

from . import families
from .test_formats import random_qtensor
from .tools import infopt

RTN = ("--method", "rtn", "--group-size", 32)
BARE = "--no-tokenizer"


def bytes_tokenizer(folder: Path, *steps: object) -> None:
    """A byte-level BPE tokenizer with two merges, a chat template and the given steps before ByteLevel."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet, "ab", "Ġa"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    fast.save_pretrained(folder)


def model(family: str, folder: Path, **options: object) -> Path:
    return families.make(family, folder, **{"vocab_size": 300, "dtype": torch.bfloat16, **options})


def dense(folder: Path) -> dict[str, torch.Tensor]:
    reader = open_model(folder)
    return {name: reader.get(name).float() for name in reader.tensors}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("gguf")
    bytes_tokenizer(model("llama", home / "model"), pre_tokenizers.Digits(individual_digits=True))
    for name, flags in {
        "sym": (),
        "asym": ("--asym",),
        "eight": ("--bits", 8),
        "three": ("--bits", 3, "--asym"),
    }.items():
        made = infopt("quantize", home / "model", "-o", home / name, *RTN, "--no-verify", *flags)
        assert made.code == 0, made.err
    return home


# Blocks


@pytest.mark.parametrize(
    ("grid", "kind"),
    [
        (Grid(4, 32, True), "Q4_0"),
        (Grid(4, 64, True), "Q4_0"),
        (Grid(4, None, True), "Q4_0"),
        (Grid(3, 32, False), "Q4_0"),
        (Grid(2, 32, True), "Q4_0"),
        (Grid(8, 64, True), "Q8_0"),
        (Grid(4, 32, False), "Q4_1"),
        (Grid(4, 64, False), "Q4_1"),
    ],
)
def test_blocks_are_what_the_gguf_package_decodes(grid: Grid, kind: str) -> None:
    q = representable(random_qtensor(GGUF.settled(grid)))
    assert GGUF.objection(q.grid, q.shape) is None and GGUF.exact(q) is None
    assert block_type(False, q.grid).name == kind
    blocks = encode_blocks(q, block_type(False, q.grid))
    assert np.array_equal(gguf.dequantize(blocks, GGMLQuantizationType[kind]), q.dequantize().numpy())


@pytest.mark.parametrize("grid", [Grid(4, 32, False), Grid(4, 128, True), Grid(2, 64, False), Grid(8, None, True)])
def test_q8_0_holds_all_grids_of_up_to_four_bits(grid: Grid) -> None:
    q = random_qtensor(GGUF_Q8_0.settled(grid))
    assert GGUF_Q8_0.exact is None and GGUF_Q8_0.objection(q.grid, q.shape) is None
    blocks = encode_blocks(q, block_type(True, q.grid))
    assert np.array_equal(gguf.dequantize(blocks, GGMLQuantizationType.Q8_0), q.dequantize().numpy())


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_are_the_gguf_packages_own_bytes(kind: str) -> None:
    """Weights that lie on the grid, quantized by the package and packed by us: the same bytes."""
    bits, symmetric = (8, True) if kind == "Q8_0" else (4, kind == "Q4_0")
    q = representable(random_qtensor(GGUF.settled(Grid(bits, 32, symmetric))))
    codes, zero = q.codes.clone(), q.zero.clone()
    if symmetric:  # the package takes its scale from the largest value
        codes.view(64, 4, 32)[..., 5] = 0 if bits == 4 else 255
        codes[codes == 0] = 0 if bits == 4 else 1
    else:
        codes.view(64, 4, 32)[..., 5], codes.view(64, 4, 32)[..., 6] = 0, 15
    q = QTensor(codes, q.scale, zero, q.grid)
    theirs = gguf.quantize(q.dequantize().numpy(), GGMLQuantizationType[kind])
    assert np.array_equal(theirs, encode_blocks(q, block_type(False, q.grid)))


def representable(q: QTensor) -> QTensor:
    """Scales as a solver for GGUF makes them: through the grid."""
    return QTensor(q.codes, q.grid.stored(q.scale.float()).to(q.grid.scale_dtype), q.zero, q.grid)


def test_inexact_offsets_are_named() -> None:
    q = random_qtensor(Grid(4, 32, False, torch.float16))
    assert "of 256 groups" in GGUF.exact(q)
    with pytest.raises(ValueError, match="float16"):
        encode_blocks(q, GGMLQuantizationType.Q4_1)
    assert "no multiple" in GGUF.objection(Grid(4, 16, True), (64, 128))
    assert "columns" in GGUF.objection(Grid(4, None, True), (64, 80))
    assert "nine" in GGUF.objection(Grid(8, 32, False), (64, 128))


# Files


@pytest.mark.parametrize(
    ("source", "form", "kind"),
    [("sym", "gguf", "Q4_0"), ("eight", "gguf", "Q8_0"), ("three", "gguf", "Q4_0"), ("asym", "gguf_q8_0", "Q8_0")],
)
def test_our_import_gives_the_folders_weights_bit_for_bit(
    home: Path, tmp_path: Path, source: str, form: str, kind: str
) -> None:
    result = infopt("convert", home / source, "-o", tmp_path / "out", "--format", form, "--json")
    assert result.code == 0, result.err
    assert len(json.loads(result.out)["carried"]) == 14
    kinds = [tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors]
    assert kinds.count(kind) == 14
    convert_gguf(tmp_path / "out" / "model.gguf", tmp_path / "back", torch.float32)
    back, ours = dense(tmp_path / "back"), dense(home / source)
    assert back.keys() == ours.keys() and all(torch.equal(back[name], ours[name]) for name in ours)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.gguf", "infopt.json", "recipe.yaml", "manifest.json"
    }  # fmt: skip


def test_q_and_k_are_in_llama_cpps_order(home: Path, tmp_path: Path) -> None:
    """The permutation of llama.cpp's converter, written down independently: the proof must not prove itself."""
    assert infopt("convert", home / "model", "-o", tmp_path / "out", "--format", "gguf").code == 0
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    weights = load_file(home / "model" / "model.safetensors")
    for name, key, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2), ("attn_v", "v_proj", 0)):
        w = weights[f"model.layers.1.self_attn.{key}.weight"].float().numpy()
        if heads:
            w = w.reshape(heads, 2, w.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(w.shape)
        tensor = tensors[f"blk.1.{name}.weight"]
        assert tensor.tensor_type is GGMLQuantizationType.BF16
        assert np.array_equal(gguf.dequantize(tensor.data, tensor.tensor_type), w)
    assert tensors["blk.0.attn_norm.weight"].tensor_type is GGMLQuantizationType.F32


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "mistral"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_architecture_comes_back(family: str, tied: bool, tmp_path: Path) -> None:
    options = {"gemma3": {"query_pre_attn_scalar": 16, "num_hidden_layers": 6, "layer_types": None},
               "mistral": {"sliding_window": None}}.get(family, {})  # fmt: skip
    folder = model(family, tmp_path / "model", tie_word_embeddings=tied, **options)
    made = infopt("quantize", folder, "-o", tmp_path / "out", *RTN, "--format", "gguf", BARE, "--no-verify")
    assert made.code == 0, made.err
    same = infopt("quantize", folder, "-o", tmp_path / "ct", *RTN, "--no-verify", "--format", "gptq")
    assert same.code == 0, same.err
    back, ours = dict(open_gguf(tmp_path / "out" / "model.gguf").tensors(torch.float32)), dense(tmp_path / "ct")
    assert back.keys() == ours.keys() and ("lm_head.weight" in back) is not tied
    offset = 2.0**-23 if family == "gemma3" else 0.0  # 1 + w is rounded to float32
    assert all(torch.allclose(back[name], ours[name], rtol=0, atol=offset) for name in ours)


def test_zero_points_are_exact_when_solved_for_gguf(home: Path, tmp_path: Path) -> None:
    refused = infopt("convert", home / "asym", "-o", tmp_path / "a", "--format", "gguf")
    assert refused.code == 4 and "zero point times scale" in refused.err and "gguf_q8_0" in refused.err
    again = infopt("convert", home / "asym", "-o", tmp_path / "b", "--format", "gguf", "--requantize", "--json")
    assert again.code == 0 and len(json.loads(again.out)["requantized"]) > 0
    flags = (*RTN, "--asym", "--format", "gguf", "--verify-samples", 1, "--json")
    solved = infopt("quantize", home / "model", "-o", tmp_path / "c", *flags)
    assert solved.code == 0, solved.err
    verdict = json.loads((tmp_path / "c" / "verification.json").read_text())
    assert verdict["passed"] and verdict["quality"]["kl_mean"] < 1
    kinds = [tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "c" / "model.gguf").tensors]
    assert kinds.count("Q4_1") == 14


def test_tokenizer_and_settings(home: Path, tmp_path: Path) -> None:
    assert infopt("convert", home / "sym", "-o", tmp_path / "out", "--format", "gguf").code == 0
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    read = {name: field.contents() for name, field in fields.items()}
    config = json.loads((home / "model" / "config.json").read_text())
    assert read["general.architecture"] == "llama" and read["llama.block_count"] == config["num_hidden_layers"]
    assert read["llama.attention.head_count_kv"] == config["num_key_value_heads"]
    assert read["llama.attention.key_length"] == 16 and read["general.file_type"] == 2
    assert read["tokenizer.ggml.pre"] == "smollm" and read["tokenizer.ggml.model"] == "gpt2"
    assert len(read["tokenizer.ggml.tokens"]) == config["vocab_size"] == len(read["tokenizer.ggml.token_type"])
    assert read["tokenizer.ggml.merges"] == ["a b", "Ġ a"] and read["tokenizer.ggml.bos_token_id"] == 1
    assert read["tokenizer.ggml.token_type"][1] == gguf.TokenType.CONTROL
    assert read["tokenizer.ggml.token_type"][-1] == gguf.TokenType.UNUSED
    assert "messages" in read["tokenizer.chat_template"]
    convert_gguf(tmp_path / "out" / "model.gguf", tmp_path / "back")
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (home / "model", tmp_path / "back"))
    assert ours("ab a cab").input_ids == theirs("ab a cab").input_ids


# Refusals


def test_tokenizers_that_gguf_cannot_name(tmp_path: Path) -> None:
    folder = model("llama", tmp_path / "model")
    bytes_tokenizer(folder, pre_tokenizers.Punctuation())
    for flags in (("convert", folder), ("quantize", folder, *RTN)):
        result = infopt(*flags, "-o", tmp_path / "out", "--format", "gguf")
        assert result.code == 4 and "unknown pre-tokenizer" in result.err and "--no-tokenizer" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert infopt("convert", folder, "-o", tmp_path / "out", "--format", "gguf", BARE).code == 0


@pytest.mark.parametrize(
    ("family", "changes", "word"),
    [
        ("opt", {}, "opt"),
        ("gpt2", {}, "gpt2"),
        ("mistral", {}, "sliding"),
        ("gemma3", {}, "five to one"),
        ("llama", {"hidden_act": "relu"}, "hidden_act"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "scaled"),
    ],
)
def test_models_that_gguf_cannot_say(tmp_path: Path, family: str, changes: dict, word: str) -> None:
    folder = model(family, tmp_path / "model", **changes)
    for command in (("convert",), ("quantize", *RTN)):
        result = infopt(command[0], folder, "-o", tmp_path / "out", *command[1:], "--format", "gguf", BARE)
        assert result.code == 4 and word in result.err, result.err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_table_of_architectures_is_checked() -> None:
    with pytest.raises(Unsupported, match="llama, mistral"):
        check_settings(type("Config", (), {"model_type": "nothing"}), Path("x"))
    assert {a.arch for a in ARCHITECTURES.values()} <= set(gguf.MODEL_ARCH_NAMES.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none(home: Path, tmp_path: Path, bad: float) -> None:
    folder = shutil.copytree(home / "model", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = bad
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    result = infopt("convert", folder, "-o", tmp_path / "out", "--format", "gguf")
    assert result.code == 3 and "up_proj" in result.err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.infopt-work").exists()
