"""The `sharded_state` layout: the parameters that vLLM 0.32 asks for, no more and no fewer, with the right slices in them.

The names, types and shapes below were taken from vLLM's own state dict of the same model (512 tokens, width 256).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from .tools import infopt, text, tiny

SIZES = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512, "num_key_value_heads": 2}
ATTENTION = {f"self_attn.attn._{name}_scale": ("float32", []) for name in ("k", "v", "q", "prob")}
NORMS = {name: ("bfloat16", [256]) for name in ("input_layernorm.weight", "post_attention_layernorm.weight")}
EXTRA = {f"self_attn.attn.{letter}_scale": ("float32", [1]) for letter in "kvq"} | {
    f"self_attn.attn.{letter}_zero_point": ("bfloat16", [1]) for letter in "kvq"
}
PLAIN = {
    "self_attn.qkv_proj.weight": ("bfloat16", [512, 256]),
    "self_attn.o_proj.weight": ("bfloat16", [256, 256]),
    "mlp.gate_up_proj.weight": ("bfloat16", [1024, 256]),
    "mlp.down_proj.weight": ("bfloat16", [256, 512]),
}


def packed(asymmetric: bool) -> dict[str, tuple[str, list[int]]]:
    layers: dict[str, tuple[str, list[int]]] = {}
    for name, (rows, columns) in {name.removesuffix(".weight"): shape for name, (_, shape) in PLAIN.items()}.items():
        layers[f"{name}.weight_packed"] = ("int32", [rows, columns // 8])
        layers[f"{name}.weight_scale"] = ("bfloat16", [rows, columns // 64])
        layers[f"{name}.weight_shape"] = ("int64", [2])
        if asymmetric:
            layers[f"{name}.weight_zero_point"] = ("int32", [rows // 8, columns // 64])
    return layers


def make(folder: Path, flags: list[object] | None, **options: object) -> Path:
    model = tiny("llama", folder / "m", dtype=torch.bfloat16, **{**SIZES, **options})
    if flags is None:
        return model
    asked = ["--method", "rtn", "--group-size", 64, *flags, "--no-verify", "-o", folder / "q"]
    assert infopt("quantize", model, *asked).code == 0
    return folder / "q"


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[str, list[int]]]:
    return {name: (str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("flags", "layer"),
    [(None, PLAIN), (["--bits", 4], packed(False) | EXTRA), (["--bits", 4, "--asym"], packed(True) | EXTRA)],
)
def test_parameters_of_one_rank_are_those_of_vllm(tmp_path, flags, layer):
    assert infopt("shard", make(tmp_path, flags), "--layout", "vllm", "-o", tmp_path / "s").code == 0
    wanted = {f"model.layers.{i}.{name}": what for i in (0, 1) for name, what in (layer | ATTENTION | NORMS).items()}
    wanted |= {name: ("bfloat16", [512, 256]) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    wanted |= {"model.norm.weight": ("bfloat16", [256])}
    assert shapes(load_file(tmp_path / "s" / "model-rank-0-part-0.safetensors")) == wanted
    assert (tmp_path / "s" / "config.json").exists() and (tmp_path / "s" / "tokenizer.json").exists()


@pytest.mark.parametrize(("scheme", "dtype"), [("W8A8", "int8"), ("FP8_DYNAMIC", "float8_e4m3fn")])
def test_eight_bits_have_scales_in_float32_and_whole_on_both_ranks(tmp_path, scheme, dtype):
    """As vLLM's parameters are: scales per output channel, which a row-parallel layer has on every rank."""
    model = tiny("llama", tmp_path / "m", dtype=torch.bfloat16, **SIZES)
    quantize = ["--method", "rtn", "--scheme", scheme, "--no-verify", "-o", tmp_path / "q"]
    assert infopt("quantize", model, *quantize).code == 0
    assert infopt("shard", tmp_path / "q", "--tp", 2, "--layout", "vllm", "-o", tmp_path / "s").code == 0
    whole, layer = load_file(tmp_path / "q" / "model.safetensors"), "model.layers.1"
    for rank in (0, 1):
        mine = load_file(tmp_path / "s" / f"model-rank-{rank}-part-0.safetensors")
        found = {name.removeprefix(f"{layer}."): what for name, what in shapes(mine).items() if name.startswith(layer)}
        sizes = {"self_attn.qkv_proj": [256, 256], "self_attn.o_proj": [256, 128], "mlp.gate_up_proj": [512, 256],
                 "mlp.down_proj": [256, 256]}  # fmt: skip
        wanted = {f"{name}.weight": (dtype, size) for name, size in sizes.items()}
        wanted |= {f"{name}.weight_scale": ("float32", [size[0], 1]) for name, size in sizes.items()}
        assert found == wanted | EXTRA | ATTENTION | NORMS
        down = whole[f"{layer}.mlp.down_proj.weight"].view(torch.uint8).chunk(2, 1)[rank]
        assert torch.equal(mine[f"{layer}.mlp.down_proj.weight"].view(torch.uint8), down)
        parts = [whole[f"{layer}.self_attn.{name}_proj.weight_scale"].chunk(2)[rank] for name in "qkv"]
        assert torch.equal(mine[f"{layer}.self_attn.qkv_proj.weight_scale"], torch.cat(parts).float())


def test_static_inputs_share_one_scale(tmp_path):
    model = tiny("llama", tmp_path / "m", dtype=torch.bfloat16, **SIZES)
    quantize = ["--method", "rtn", "--scheme", "W8A8_STATIC", "--dataset", text(tmp_path), "--num-samples", 2]
    assert infopt("quantize", model, *quantize, "--seqlen", 32, "--no-verify", "-o", tmp_path / "q").code == 0
    refused = infopt("shard", tmp_path / "q", "--tp", 2, "--layout", "vllm", "-o", tmp_path / "s")
    assert refused.code == 4 and "at TP 1 only" in refused.err and not (tmp_path / "s").exists()
    assert infopt("shard", tmp_path / "q", "--layout", "vllm", "-o", tmp_path / "s").code == 0
    whole = load_file(tmp_path / "q" / "model.safetensors")
    mine = load_file(tmp_path / "s" / "model-rank-0-part-0.safetensors")
    for fused, part in (("self_attn.qkv_proj", "self_attn.k_proj"), ("mlp.gate_up_proj", "mlp.up_proj")):
        held = mine[f"model.layers.0.{fused}.input_scale"]
        assert held.shape == (1,) and torch.equal(held, whole[f"model.layers.0.{part}.input_scale"].float())
    whole["model.layers.0.self_attn.k_proj.input_scale"] *= 2
    save_file(whole, tmp_path / "q" / "model.safetensors", {"format": "pt"})
    (tmp_path / "q" / "manifest.json").unlink()
    refused = infopt("shard", tmp_path / "q", "--layout", "vllm", "-o", tmp_path / "t")
    assert refused.code == 4 and "different static scales" in refused.err and not (tmp_path / "t").exists()


@pytest.mark.parametrize("flags", [None, ["--bits", 4, "--asym"]])
def test_two_ranks_hold_their_slices_side_by_side(tmp_path, flags):
    model = make(tmp_path, flags, vocab_size=500)
    assert infopt("shard", model, "--tp", 2, "--layout", "vllm", "-o", tmp_path / "s").code == 0
    whole = load_file(model / "model.safetensors")
    layer = "model.layers.0"
    for rank in (0, 1):
        mine = load_file(tmp_path / "s" / f"model-rank-{rank}-part-0.safetensors")
        for suffix in ("weight",) if flags is None else ("weight_packed", "weight_scale", "weight_zero_point"):
            parts = [whole[f"{layer}.self_attn.{name}_proj.{suffix}"].chunk(2)[rank] for name in "qkv"]
            assert torch.equal(mine[f"{layer}.self_attn.qkv_proj.{suffix}"], torch.cat(parts)), suffix
            parts = [whole[f"{layer}.mlp.{name}_proj.{suffix}"].chunk(2)[rank] for name in ("gate", "up")]
            assert torch.equal(mine[f"{layer}.mlp.gate_up_proj.{suffix}"], torch.cat(parts)), suffix
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                part = whole[f"{layer}.{name}.{suffix}"].chunk(2, 1)[rank]
                assert torch.equal(mine[f"{layer}.{name}.{suffix}"], part), name
        for name in ("model.embed_tokens.weight", "lm_head.weight"):  # 500 rows are padded to 512, then halved
            rows = torch.cat([whole[name], torch.zeros(12, 256, dtype=torch.bfloat16)]).chunk(2)[rank]
            assert torch.equal(mine[name], rows), name


def test_a_tied_embedding_is_the_head(tmp_path):
    model = make(tmp_path, None, tie_word_embeddings=True)
    assert infopt("shard", model, "--layout", "vllm", "-o", tmp_path / "s").code == 0
    held = load_file(tmp_path / "s" / "model-rank-0-part-0.safetensors")
    assert "model.embed_tokens.weight" not in held
    assert torch.equal(held["lm_head.weight"], load_file(model / "model.safetensors")["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("family", "flags", "asked", "says"),
    [
        ("gpt2", None, [], "only llama"),
        ("llama", None, ["--pp", 2], "only tensor parallelism"),
        ("llama", ["--bits", 8], [], "no kernel for weights of 8 bits"),
        ("llama", ["--bits", 3], [], "no kernel for weights of 3 bits"),
        ("llama", ["--bits", 4, "--asym", "--format", "gptq_v2"], [], "vLLM refuses sym: false"),
        ("llama", ["--scheme", "W4A8"], [], "4-bit weights with rounded inputs"),
        ("llama", ["--scheme", "FP8_BLOCK"], [], "AMX only"),
        ("llama", ["--scheme", "FP8_BLOCK", "--format", "fp8"], [], "only awq, compressed-tensors, gptq were loaded"),
    ],
)
def test_what_vllm_would_get_wrong_is_refused(tmp_path, family, flags, asked, says):
    model = tiny(family, tmp_path / "m", **(SIZES if family == "llama" else {}))
    if flags:
        groups = [] if "--scheme" in flags else ["--group-size", 32]
        quantize = ["--method", "rtn", *groups, *flags, "--no-verify", "-o", tmp_path / "q"]
        assert infopt("quantize", model, *quantize).code == 0
        model = tmp_path / "q"
    done = infopt("shard", model, "--layout", "vllm", *asked, "-o", tmp_path / "s")
    assert done.code == 4 and says in done.err and not list(tmp_path.glob("s*")), done.err
