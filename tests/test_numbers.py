"""Weights that are no ordinary numbers, and models that are no ordinary models: each ends in a sound result or in a message.

The cases of bad weights and of degenerate statistics, one by one; what a file must look like to be read at all is in
test_checkpoint.py and test_model.py, bad data in test_data.py, scales of
finished folders in test_lint.py and test_verify.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from infopt.exporters.folder import open_model

from .tools import Result, infopt, text, tiny

FIRST, SECOND = "model.layers.0.", "model.layers.1."
NAN, INF = float("nan"), float("inf")
Change = Callable[[dict[str, Tensor]], None]


def changed(folder: Path, change: Change, family: str = "llama", **options: object) -> Path:
    model = tiny(family, folder, **options)
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


def put(key: str, value: float) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[key].view(-1)[5] = value

    return change


def times(key: str, factor: float) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[key] *= factor

    return change


def quantize(model: Path, out: Path, *flags: object) -> Result:
    sizes = ("--num-samples", 8, "--seqlen", 32, "--verify-samples", 2)
    return infopt("quantize", model, "-o", out, "--dataset", text(out.parent), *sizes, *flags)


def awkward(tensors: dict[str, Tensor]) -> None:
    """Everything at once that a method must live with."""
    tensors[f"{FIRST}self_attn.q_proj.weight"].zero_()  # a whole tensor: attention is even
    tensors[f"{FIRST}mlp.gate_proj.weight"].fill_(0.03)  # constant
    tensors[f"{FIRST}mlp.up_proj.weight"][7] = 0  # a dead channel of what down_proj reads
    tensors[f"{FIRST}mlp.up_proj.weight"][8] = -0.25
    tensors[f"{FIRST}mlp.down_proj.weight"][:, 3] = 0  # a column that nothing comes from
    tensors[f"{FIRST}input_layernorm.weight"][3] = 0  # a dead channel of the stream
    tensors[f"{SECOND}self_attn.k_proj.weight"][:16] = 1e-40  # denormal
    tensors[f"{SECOND}self_attn.v_proj.weight"][0] *= -1e-30
    tensors[f"{SECOND}mlp.down_proj.weight"][1, 1] = 5.0  # sixty times the others
    tensors[f"{SECOND}post_attention_layernorm.weight"][4] = 300.0  # a massive channel


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--method", "rtn", "--bits", 8, "--group-size", 32), marks=pytest.mark.slow),
        pytest.param(("--method", "awq", "--bits", 8, "--group-size", 32, "--asym"), marks=pytest.mark.slow),
        ("--method", "gptq", "--bits", 8, "--group-size", 32, "--kv-cache", "int8"),
        ("--method", "best-4bit", "--bits", 8, "--group-size", 32),
        ("--method", "best-fp8"),
        ("--method", "smoothquant", "--scheme", "W8A8"),
        pytest.param(("--method", "fp8", "--scheme", "FP8_BLOCK"), marks=pytest.mark.slow),
        pytest.param(
            ("--method", "awq+gptq", "--bits", 8, "--group-size", 32, "--format", "gptq"), marks=pytest.mark.slow
        ),
    ],
    ids=lambda flags: " ".join(map(str, flags[1:4])),
)
def test_every_method_lives_with_awkward_weights(flags: tuple, tmp_path: Path) -> None:
    model = changed(tmp_path / "m", awkward)
    done = quantize(model, tmp_path / "o", *flags)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "o" / "verification.json").read_text())["quality"]["kl_mean"] < 0.05
    stored = load_file(tmp_path / "o" / "model.safetensors")
    assert all(bool(torch.isfinite(tensor.float()).all()) for tensor in stored.values() if tensor.is_floating_point())
    zeros = open_model(tmp_path / "o").qtensor(f"{FIRST}self_attn.q_proj")
    assert bool((zeros.dequantize() == 0).all()) and bool((zeros.scale.float() > 0).all())


@pytest.mark.parametrize(
    ("key", "value", "method", "code", "says"),
    [
        (f"{FIRST}mlp.up_proj.weight", NAN, "rtn", 3, "mlp.up_proj.weight holds 1 values that are NaN or infinite"),
        (f"{SECOND}self_attn.q_proj.weight", INF, "gptq", 3, "layers.1.self_attn.q_proj.weight holds 1 values"),
        (f"{FIRST}input_layernorm.weight", -INF, "rtn", 3, "input_layernorm.weight holds 1 values"),
        (f"{FIRST}mlp.up_proj.weight", 1e30, "gptq", 3, "mlp.down_proj receives NaN or infinite activations"),
        ("lm_head.weight", INF, "rtn", 6, "answers with logits that are not finite"),
    ],
)
def test_what_no_method_can_use(key: str, value: float, method: str, code: int, says: str, tmp_path: Path) -> None:
    """Refused by name, and nothing is left that looks like a result. An outer part is not worked on: verifying finds it."""
    done = quantize(changed(tmp_path / "m", put(key, value)), tmp_path / "o", "--method", method, "--group-size", 32)
    assert done.code == code and says in done.err, done.err
    assert not (tmp_path / "o").exists()


def test_an_embedding_that_is_not_finite_is_found_by_what_it_does(tmp_path: Path) -> None:
    model = changed(tmp_path / "m", times("model.embed_tokens.weight", NAN))
    done = quantize(model, tmp_path / "o", "--method", "gptq", "--group-size", 32)
    assert done.code == 3 and "receives NaN or infinite activations" in done.err


def test_an_outlier_of_1e30_costs_its_group_alone(tmp_path: Path) -> None:
    """Plain rounding needs no activations, so it works; the other groups are as they were."""
    key = f"{FIRST}mlp.up_proj"
    flags = ("--method", "rtn", "--bits", 8, "--group-size", 32, "--no-verify")
    for name, value in (("m", 0.01), ("n", 1e30)):
        assert quantize(changed(tmp_path / name, put(f"{key}.weight", value)), tmp_path / f"{name}o", *flags).code == 0
    one, other = (open_model(tmp_path / name).qtensor(key).dequantize().view(-1, 32) for name in ("mo", "no"))
    assert bool(torch.isfinite(other).all()) and torch.equal(one[1:], other[1:]) and float(other[0, 5]) > 0.9e30


@pytest.mark.parametrize(
    ("factor", "form", "code"),
    [(1e8, "gptq", 4), (1e8, "compressed-tensors", 0), (1e-9, "gptq", 0)],
)
def test_scales_beyond_float16(factor: float, form: str, code: int, tmp_path: Path) -> None:
    """Too large: refused with the layer's name, not written as infinity. Too small: the smallest scale, and weights of zero."""
    model = changed(tmp_path / "m", times(f"{SECOND}mlp.down_proj.weight", factor))
    done = quantize(model, tmp_path / "o", "--method", "rtn", "--group-size", 32, "--format", form, "--no-verify")
    assert done.code == code, done.err
    if code:
        assert "layers.1.mlp.down_proj: its weights need a scale larger than float16" in done.err
        assert not (tmp_path / "o").exists()
    else:
        scale = open_model(tmp_path / "o").qtensor(f"{SECOND}mlp.down_proj").scale.float()
        assert bool(torch.isfinite(scale).all()) and bool((scale > 0).all())


def test_types_may_be_mixed(tmp_path: Path) -> None:
    """F64, F32, F16 and BF16 in one model; what is not quantized keeps its type."""

    def change(tensors: dict[str, Tensor]) -> None:
        for key in tensors:
            kind = {"mlp.": torch.bfloat16, "norm": torch.float16, "embed": torch.float64}
            tensors[key] = tensors[key].to(next((kind[part] for part in kind if part in key), torch.float32))

    model = changed(tmp_path / "m", change)
    done = quantize(model, tmp_path / "o", "--method", "awq+gptq", "--bits", 8, "--group-size", 32)
    assert done.code == 0, done.err
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "o"))
    kept = [key for key in before if key in after and after[key].dtype != torch.int8]
    assert {before[key].dtype for key in kept} == {torch.float16, torch.float32, torch.float64}
    assert all(after[key].dtype == before[key].dtype for key in kept)
    assert json.loads((tmp_path / "o" / "verification.json").read_text())["quality"]["kl_mean"] < 2e-3


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_codes_without_their_scales_are_not_taken_for_weights(kind: torch.dtype, tmp_path: Path) -> None:
    """A quantized model that lost its quantization_config."""
    key = f"{SECOND}mlp.up_proj.weight"
    model = changed(tmp_path / "m", lambda tensors: tensors.update({key: (tensors[key] * 100).to(kind)}))
    done = quantize(model, tmp_path / "o", "--method", "rtn", "--group-size", 32)
    assert done.code == 4 and f"{key} is stored as" in done.err and not (tmp_path / "o").exists()


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_odd_sizes(family: str, tmp_path: Path) -> None:
    """Widths that are prime: a scale for a channel, or the largest group that divides, which is none."""
    odd = {"llama": {"intermediate_size": 131, "hidden_size": 62, "num_attention_heads": 2, "num_key_value_heads": 1,
                     "head_dim": 14},
           "gpt2": {"n_inner": 131, "n_embd": 62, "n_head": 2}}[family]  # fmt: skip
    model = tiny(family, tmp_path / "m", **odd)
    refused = quantize(model, tmp_path / "x", "--method", "gptq", "--group-size", 32)
    assert refused.code == 2 and "--group-fallback" in refused.err
    flags = ("--bits", 8, "--group-size", 32, "--group-fallback", "adjust")
    done = quantize(model, tmp_path / "o", "--method", "awq+gptq", *flags)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "o" / "verification.json").read_text())["quality"]["kl_mean"] < 5e-3


def test_one_token_is_enough_not_to_fail(tmp_path: Path) -> None:
    """Rank 1: one token, or the same again and again."""
    (tmp_path / "one.txt").write_text("x")
    (tmp_path / "same.txt").write_text("x" * 64)
    model = tiny("llama", tmp_path / "m")
    runs = [
        ("awq+gptq", "one.txt", "--pad"),
        ("best-4bit", "one.txt", "--pad"),
        ("best-4bit", "same.txt", "--seqlen=32"),
    ]
    for method, data, flag in runs:
        out, flags = tmp_path / f"{method} {data}", ("--group-size", 32, "--no-verify", flag)
        done = infopt("quantize", model, "-o", out, "--method", method, "--dataset", tmp_path / data, *flags)
        assert done.code == 0, done.err
        assert f": {1 if flag == '--pad' else 64} tokens used" in done.err
        tensors = load_file(out / "model.safetensors").values()
        assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor.is_floating_point())


def test_a_cache_of_zeros_has_scales_above_zero(tmp_path: Path) -> None:
    model = changed(tmp_path / "m", lambda tensors: tensors[f"{FIRST}self_attn.v_proj.weight"].zero_())
    for name in ("fp8", "int8", "int4"):
        done = quantize(model, tmp_path / name, "--method", "kv-cache", "--kv-cache", name, "--no-verify")
        assert done.code == 0, done.err
        scale = load_file(tmp_path / name / "model.safetensors")[f"{FIRST}self_attn.v_scale"]
        assert bool(torch.isfinite(scale).all()) and bool((scale > 0).all())
