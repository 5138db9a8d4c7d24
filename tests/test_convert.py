"""GGUF to Hugging Face: the weights come back exactly, and damaged files are refused at once."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from typer.testing import CliRunner

from infopt.cli.convert import convert
from infopt.errors import BadInput, Unsupported, UsageError
from infopt.exporters.gguf_header import read_gguf_header
from infopt.exporters.gguf_import import convert_gguf

from .tools import smollm2_gguf

_SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}


def tiny_llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**_SIZES, tie_word_embeddings=tied, rope_theta=5e5)).float()


def tiny_gemma() -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**_SIZES, sliding_window=32)).float()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """The row order that llama.cpp gives to q and k, written down independently of what undoes it."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: torch.nn.Module, arch: str, kind=gguf.GGMLQuantizationType.F32) -> Path:
    """What llama.cpp's converter would write for this model, with a byte-level tokenizer and a chat template."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(5e5)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + ["ab", "Ġa"] + [f"<extra{i}>" for i in range(_SIZES["vocab_size"] - len(alphabet) - 2)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_chat_template("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")
    names = gguf.get_tensor_name_map(
        next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == arch), config.num_hidden_layers
    )
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        weight = tensor.numpy()
        if arch == "llama" and "q_proj" in name:
            weight = permuted(weight, config.num_attention_heads)
        if arch == "llama" and "k_proj" in name:
            weight = permuted(weight, config.num_key_value_heads)
        if arch == "gemma3" and "norm" in name:
            weight = weight + 1
        stored = kind if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(np.ascontiguousarray(weight), stored)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_llama(tied=False), "llama")


@pytest.mark.parametrize("tied", [False, True])
def test_float_weights_come_back_bit_for_bit(tmp_path, tied):
    model = tiny_llama(tied)
    done = convert_gguf(write_gguf(tmp_path / "tiny.gguf", model, "llama"), tmp_path / "out", torch.float32)
    written = load_file(tmp_path / "out" / "model.safetensors")
    expected = {k: v for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    assert written.keys() == expected.keys() and done.tensors == len(expected)
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"] is tied
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(20)[None]
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16"])
def test_equal_to_transformers_own_loading(tmp_path, arch, kind):
    """Dequantized and cast by transformers' in-memory loader, the slow twin of the stream."""
    model = tiny_llama(tied=True) if arch == "llama" else tiny_gemma()
    path = write_gguf(tmp_path / "tiny.gguf", model, arch, gguf.GGMLQuantizationType[kind])
    convert_gguf(path, tmp_path / "out", torch.bfloat16)
    written = load_file(tmp_path / "out" / "model.safetensors")
    expected = load_with_transformers(path)
    assert all(torch.equal(written[name], expected[name]) for name in written)
    assert expected.keys() - written.keys() == {"lm_head.weight"}


def load_with_transformers(path: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    ).state_dict()


def test_the_command_writes_tokenizer_template_and_manifest(tmp_path, llama_file):
    app = typer.Typer()
    app.command()(convert)
    result = CliRunner().invoke(app, [str(llama_file), "-o", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.output
    done = json.loads(result.stdout)
    assert done["parameters"] == sum(p.numel() for p in tiny_llama(tied=False).parameters())
    assert done["unused"] == [] and done["tokenizer"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("ab a cab").input_ids) == "ab a cab"
    assert len(tokenizer("ab a cab").input_ids) == 5
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[user] hi\n"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "manifest.json", "model.safetensors"} <= names
    assert not list(tmp_path.glob("*.infopt-work"))


def test_an_existing_folder_is_left_alone(tmp_path, llama_file):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(UsageError):
        convert_gguf(llama_file, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"


def damaged(llama_file: Path, change) -> bytes:
    data = bytearray(llama_file.read_bytes())
    changed = change(data)
    return bytes(data if changed is None else changed)


def put(at: int, layout: str, value: int):
    return lambda data: struct.pack_into(layout, data, at, value)


def after(key: bytes, layout: str, value: int):
    """Overwrite the value of a key: it lies behind the key's letters and four bytes of type."""
    return lambda data: struct.pack_into(layout, data, data.index(key) + len(key) + 4, value)


def nan_in_a_norm(data: bytearray) -> None:
    data[-4:] = struct.pack("<f", float("nan"))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda data: b"", BadInput, "empty"),
        (lambda data: b"GG", BadInput, "does not begin"),
        (put(0, "<I", 0), BadInput, "does not begin"),
        (put(4, "<I", 1), Unsupported, "version 1"),
        (put(4, ">I", 3), Unsupported, "big-endian"),
        (put(8, "<Q", 2**60), BadInput, "claims"),
        (put(16, "<Q", 2**60), BadInput, "claims"),
        (put(16, "<Q", 10**4), BadInput, "at byte"),
        (put(24, "<Q", 2**63), BadInput, "text of"),
        (lambda data: data[:1000], BadInput, "not a readable GGUF"),
        (lambda data: data[:-100], BadInput, "ends at"),
        (after(b"llama.block_count", "<I", 10**9), BadInput, "block_count is 1000000000"),
        (after(b"llama.block_count", "<I", 1), Unsupported, "no place for blk.1."),
        (after(b"llama.block_count", "<I", 3), Unsupported, "tensors are missing"),
        (after(b"llama.embedding_length", "<I", 2**32 - 1), BadInput, "embedding_length is 4294967295"),
        (after(b"llama.embedding_length", "<I", 2**30), BadInput, "wrong shape"),
        (after(b"llama.feed_forward_length", "<I", 97), BadInput, "wrong shape"),
        (after(b"llama.attention.head_count", "<I", 0), BadInput, "tiny.gguf"),
        (after(b"tokenizer.ggml.tokens", "<I", 77), BadInput, "type 77"),
        (nan_in_a_norm, BadInput, "not finite"),
    ],
)
def test_damaged_files_are_refused_quickly_and_leave_nothing(tmp_path, llama_file, change, error, says):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(damaged(llama_file, change))
    start = time.monotonic()
    with pytest.raises(error) as caught:
        convert_gguf(path, tmp_path / "out")
    assert says in str(caught.value) and "tiny.gguf" in str(caught.value)
    assert time.monotonic() - start < 10
    assert [left.name for left in tmp_path.iterdir()] == ["tiny.gguf"]


def test_every_truncation_of_the_header_is_refused(tmp_path, llama_file):
    data = llama_file.read_bytes()
    start = min(info.offset for info in read_gguf_header(llama_file).tensors.values())
    path = tmp_path / "tiny.gguf"
    for end in range(0, start, 97):
        path.write_bytes(data[:end])
        with pytest.raises(BadInput):
            read_gguf_header(path)


def test_other_architectures_say_what_to_do(tmp_path, llama_file):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(llama_file.read_bytes().replace(b"llama", b"lamal"))
    with pytest.raises(Unsupported, match="'lamal' cannot be converted"):
        convert_gguf(path, tmp_path / "out")


@pytest.mark.slow
def test_smollm2_equals_transformers_own_loading(tmp_path):
    path = smollm2_gguf()
    convert_gguf(path, tmp_path / "out", torch.bfloat16)
    written = load_file(tmp_path / "out" / "model.safetensors")
    expected = load_with_transformers(path)
    assert len(written) == 272
    assert all(torch.equal(written[name], expected[name]) for name in written)
