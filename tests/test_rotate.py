"""Rotations: the matrices, the rotated checkpoint against the original, what is refused, and what it does for rounding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from infopt.calibration.residual import find_residual, law_of
from infopt.checkpoint import CheckpointReader
from infopt.errors import Unsupported
from infopt.grid import Grid
from infopt.hadamard import paley, rotation
from infopt.model import Skeleton
from infopt.quantizers.rounding import rounded
from infopt.recipes import rotation as recipe
from infopt.recipes.rotation import rotated
from infopt.rewriters.rotate import Rotated

from .families import COMMON, GROUPED, make, randomise
from .tools import infopt, text, tiny

IDS = torch.arange(3, 27).reshape(2, 12)


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def save(config: hf.PretrainedConfig, folder: Path) -> Path:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model)
    model.save_pretrained(folder)
    return folder


# The matrices


@pytest.mark.parametrize("size", [1, 2, 3, 6, 8, 9, 12, 20, 28, 36, 64, 92, 96, 104, 576, 896, 960, 1536])
def test_orthogonal(size):
    q_NN = rotation(size, 0).matrix()
    assert torch.allclose(q_NN @ q_NN.T, torch.eye(size, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("size", [8, 12, 64, 576, 960])
def test_hadamard_entries_all_have_one_size(size):
    found = rotation(size, 0)
    assert "random" not in found.construction
    assert torch.allclose(found.matrix().abs(), torch.full((size, size), size**-0.5, dtype=torch.float64))


def test_sizes_without_a_hadamard_matrix_say_so():
    assert rotation(6, 0).construction == "Sylvester 2 x random orthogonal 3"
    assert paley(92) is None
    with pytest.raises(Unsupported, match="odd part"):
        rotation(2 * 4099, 0)


def test_factors_are_applied_like_the_whole_matrix():
    """The slow twin: the Kronecker product, multiplied out."""
    found = rotation(2**7 * 12, 3)
    whole = torch.ones(1, 1, dtype=torch.float64)
    for factor in found.factors:
        whole = torch.kron(whole, factor)
    x_XN = torch.randn(5, 2, found.size, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(found(x_XN), x_XN.double() @ (found.signs_N[:, None] * whole), atol=1e-12)


def test_the_seed_decides():
    assert torch.equal(rotation(24, 1).matrix(), rotation(24, 1).matrix())
    assert torch.equal(rotation(9, 1).matrix(), rotation(9, 1).matrix())
    assert not torch.equal(rotation(24, 1).matrix(), rotation(24, 2).matrix())


# The same function

MODELS = {
    "llama": {},
    "llama-one-head": {"num_key_value_heads": 4},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-48": {"hidden_size": 48, "head_dim": 10},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "mixtral": {},
    "qwen3_moe": {},
}


@pytest.mark.parametrize(("name", "tied"), [*((name, True) for name in MODELS), ("llama", False), ("qwen3_moe", False)])
def test_a_rotated_model_computes_the_same(name, tied, tmp_path):
    family = name.partition("-")[0]
    make(family, tmp_path / "model", **{**MODELS[name], "tie_word_embeddings": tied})
    done = infopt("rewrite", tmp_path / "model", "--rotate", "--no-verify", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert "values of" in done.err
    assert far(logits(tmp_path / "out"), logits(tmp_path / "model")) < 1e-5
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "out"))
    report = json.loads((tmp_path / "out" / "infopt.json").read_text())
    changed = {key for key in after if key not in before or not torch.equal(before[key], after[key])}
    assert changed == set(report["rewritten"])
    assert ("lm_head.weight" in report["added"]) == tied
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert all("q_norm" not in key and "k_norm" not in key for key in changed)


def test_gemma_norms_multiply_by_one_plus_their_weight(tmp_path):
    save(hf.GemmaConfig(**{**GROUPED, "head_dim": 16}), tmp_path / "model")
    done = infopt("rewrite", tmp_path / "model", "--rotate", "--no-verify", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert far(logits(tmp_path / "out"), logits(tmp_path / "model")) < 1e-5
    assert not load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].any()


def test_an_expert_without_tokens_is_rotated_too(tmp_path):
    """32 experts, 2 of them for each of 24 tokens of the search: some are reached by none."""
    make("qwen3_moe", tmp_path / "model", num_experts=32, num_hidden_layers=1)
    reader = CheckpointReader(tmp_path / "model")
    changes = rotated(reader, 0).changes
    assert sum("experts" in key for key in changes) == 3 * 32
    assert all(change.reads != change.writes for key, change in changes.items() if "experts" in key)


def test_values_that_cannot_be_found_stay(tmp_path):
    """Latent attention: the residual stream is rotated, the values are not, and it is said."""
    config = hf.DeepseekV3Config(
        **{**COMMON, "num_hidden_layers": 1}, num_key_value_heads=4, q_lora_rank=64, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=16, first_k_dense_replace=1, n_routed_experts=8, n_group=2, topk_group=1,
    )  # fmt: skip
    save(config, tmp_path / "model")
    done = infopt("rewrite", tmp_path / "model", "--rotate", "--no-verify", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert "values are not rotated" in done.err
    assert far(logits(tmp_path / "out"), logits(tmp_path / "model")) < 1e-5


def test_the_seed_decides_the_bytes(tmp_path):
    make("llama", tmp_path / "model")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        infopt("rewrite", tmp_path / "model", "--rotate", "--seed", seed, "--no-verify", "-o", tmp_path / name)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_rows_are_rows_of_the_whole(tmp_path):
    reader = rotated(CheckpointReader(make("qwen2", tmp_path)), 0)
    for name in reader.tensors:
        whole = reader.get(name)
        assert torch.equal(reader.rows(name, 3, 11), whole[3:11]), name
        assert (whole.dtype, tuple(whole.shape)) == (reader.tensors[name].dtype, reader.tensors[name].shape)


def test_with_fewer_key_value_heads(tmp_path):
    """Rewrites compose: the rotated model is what is regrouped."""
    tiny("llama", tmp_path / "model", num_key_value_heads=4)
    done = infopt("rewrite", tmp_path / "model", "--rotate", "--kv-heads", 2, "--dataset", text(tmp_path), "--num-samples",
                  8, "--seqlen", 32, "--no-heal", "--verify-samples", 1, "-o", tmp_path / "out")  # fmt: skip
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out" / "infopt.json").read_text())
    assert report["rotation"]["residual"] == {"channels": 64, "matrix": "Sylvester 64"}
    assert "passed" in done.err


@pytest.mark.parametrize("bad", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"])
def test_nan_is_not_spread(bad, tmp_path):
    folder = make("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[bad].view(-1)[3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    done = infopt("rewrite", folder, "--rotate", "--no-verify", "-o", tmp_path / "out")
    assert done.code == 3, done.err
    assert "cannot be rotated" in done.err
    assert not (tmp_path / "out").exists()


def test_layers_without_weight(tmp_path):
    """Blocks that add nothing, or next to nothing, to what they are given."""
    folder = make("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.0.{name}.weight"].zero_()
        tensors[f"model.layers.1.{name}.weight"].mul_(1e-5)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    errors = rotated(CheckpointReader(folder), 0).report["errors"]
    assert max(errors.values()) < 1e-5


# What is found


def test_readers_and_writers_of_a_block(tmp_path):
    skeleton = Skeleton(*(lambda reader: (reader.config, reader))(CheckpointReader(make("qwen3", tmp_path))))
    skeleton.load_block(0)
    found = find_residual(skeleton, 0)
    assert found.norms == {"input_layernorm": "mul", "post_attention_layernorm": "mul"}
    attention = dict.fromkeys((f"self_attn.{name}_proj" for name in "qkv"), "input_layernorm")
    mlp = dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm")
    assert found.readers == attention | mlp
    assert found.writers == ("self_attn.o_proj", "mlp.down_proj")


def test_laws_of_norms():
    weight = torch.randn(8)
    norm = hf.models.llama.modeling_llama.LlamaRMSNorm(8)
    norm.weight.data.copy_(weight)
    assert law_of(norm, 8) == "mul"
    assert torch.equal(norm.weight, weight)
    assert law_of(hf.models.gemma.modeling_gemma.GemmaRMSNorm(8), 8) == "one_plus"
    assert law_of(torch.nn.LayerNorm(8, bias=False), 8) is None
    assert law_of(torch.nn.LayerNorm(8), 8) is None


REFUSED = {
    "gemma2": "changed before it is added",
    "gemma3": "changed before it is added",
    "olmo2": "changed before it is added",
    "opt": "no RMS norm",
    "gpt2": "no RMS norm",
    "cohere": "no RMS norm",
}


@pytest.mark.parametrize("family", REFUSED)
def test_refused(family, tmp_path):
    make(family, tmp_path / "model")
    for command in (("rewrite",), ("quantize", "--method", "rtn", "--group-size", "32")):
        done = infopt(*command, tmp_path / "model", "--rotate", "--no-verify", "-o", tmp_path / "out")
        assert done.code == 4
        assert REFUSED[family] in done.err
        assert "leave --rotate out" in done.err
        assert not (tmp_path / "out").exists()


def test_a_matrix_that_the_definition_ignores_is_refused(tmp_path):
    folder = make("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "mtp.eh_proj.weight": torch.zeros(64, 64)}, folder / "model.safetensors", {"format": "pt"})
    done = infopt("rewrite", folder, "--rotate", "--no-verify", "-o", tmp_path / "out")
    assert done.code == 4
    assert "mtp.eh_proj.weight" in done.err


@pytest.mark.parametrize("wrong", ["model.layers.0.mlp.down_proj.weight", "lm_head.weight"])
def test_the_proof_finds_what_the_search_did_not(wrong, tmp_path):
    """A change left out must not get past the proof."""
    reader = CheckpointReader(make("llama", tmp_path))
    good = rotated(reader, 0)
    changes = {name: change for name, change in good.changes.items() if name != wrong}
    bad = Rotated(reader.folder, changes, good.stream, good.head, exact=True)
    with pytest.raises(Unsupported, match="computes something else"):
        recipe._prove(Skeleton(reader.config, reader), bad, {"a block": 0})


# Quantizing


def planted(folder: Path) -> Path:
    """A llama whose layers have a few columns far larger than the others, as large models have."""
    config = hf.LlamaConfig(**{**GROUPED, "intermediate_size": 128})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model)
    for name, parameter in model.named_parameters():
        if "proj" in name and "down" not in name and "o_proj" not in name:
            parameter.data[:, ::29] *= 30
    model.save_pretrained(folder)
    return folder


def test_outliers_hurt_less(tmp_path):
    """The error of 4-bit rounding, relative to the weights, falls for every layer that reads the stream."""
    reader = CheckpointReader(planted(tmp_path))
    turned = rotated(reader, 0)
    grid = Grid(4, 32, True, torch.float32)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        key = f"model.layers.0.{name}.weight"
        plain, spread = (far(rounded(w, grid), w) for w in (reader.get(key), turned.get(key)))
        assert spread < 0.8 * plain, (name, plain, spread)


def test_rotate_then_quantize_is_quantize_with_rotate(tmp_path):
    """One command, or two: the same bytes; and verified against the original model."""
    tiny("qwen2", tmp_path / "model", dtype=torch.bfloat16, tie_word_embeddings=True)
    common = ("--method", "rtn", "--group-size", 32, "--verify-samples", 1)
    one = infopt("quantize", tmp_path / "model", "--rotate", *common, "-o", tmp_path / "one")
    assert one.code == 0, one.err
    assert "passed" in one.err
    assert "was tied to the embedding" in one.err
    infopt("rewrite", tmp_path / "model", "--rotate", "--no-verify", "-o", tmp_path / "turned")
    two = infopt("quantize", tmp_path / "turned", *common, "-o", tmp_path / "two")
    assert two.code == 0, two.err
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant"])
def test_composes_with_methods(method, tmp_path):
    folder = tiny("llama", tmp_path / "model")
    size = () if method == "smoothquant" else ("--group-size", 32)
    run = ("quantize", folder, "--method", method, *size, "--rotate", "--dataset", text(tmp_path), "--num-samples", 4,
           "--seqlen", 32, "--verify-samples", 1, "-o", tmp_path / "out")  # fmt: skip
    done = infopt(*run)
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out" / "infopt.json").read_text())
    assert report["rotation"]["values"] == {"channels": 16, "matrix": "Sylvester 16"}
    assert "rotate: true" in (tmp_path / "out" / "recipe.yaml").read_text()
    again = infopt(
        "quantize", folder, "--recipe", tmp_path / "out" / "recipe.yaml", "--no-verify", "-o", tmp_path / "again"
    )
    assert again.code == 0, again.err
    weights = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert len(set(weights)) == 1
