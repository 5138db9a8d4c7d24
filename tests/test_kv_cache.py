"""A quantized key-value cache: rounded as defined, calibrated by error, written, read by the runtime and by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

from infopt.checkpoint import CheckpointReader
from infopt.kv_cache import CacheGrid, CacheScales, RoundingCache, WatchingCache, attention_path, with_cache
from infopt.model import Skeleton
from infopt.quantizers.kv_cache import choose_scales
from infopt.runtime.model import RuntimeModel

from .families import FAMILIES
from .tools import infopt, text, tiny

TOKENS = [CacheGrid("int", 8, "token"), CacheGrid("int", 4, "token", symmetric=False)]
STATIC = [
    CacheGrid("float"),
    CacheGrid("float", 8, "head"),
    CacheGrid("int", 8, "head"),
    CacheGrid("int", 4, "head"),
    CacheGrid("int", 4, "channel", symmetric=False),
]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text(tmp_path_factory.mktemp("text"))


def quantize(model: Path, out: Path, words: Path, *flags: object):
    return infopt("quantize", model, "-o", out, "--dataset", words, "--num-samples", 8, "--seqlen", 32,
                  "--verify-samples", 2, *flags)  # fmt: skip


@pytest.mark.parametrize("grid", STATIC + TOKENS, ids=str)
def test_rounding_against_the_definition(grid: CacheGrid) -> None:
    """Value by value, with the scale of whatever shares one."""
    x_BHTD = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0)) + 0.3
    scale, zero = grid.range(x_BHTD)
    got = grid.round(x_BHTD, scale, zero)
    for b in range(2):
        for h in range(3):
            for t in range(5):
                for d in range(8):
                    part = {"tensor": x_BHTD, "head": x_BHTD[:, h], "channel": x_BHTD[:, h, :, d],
                            "token": x_BHTD[b, h, t]}[grid.strategy]  # fmt: skip
                    x = x_BHTD[b, h, t, d]
                    stored = torch.bfloat16 if grid.strategy == "token" else torch.float32
                    if grid.kind == "float":
                        s = (part.abs().max() / 448).to(stored).float()
                        wanted = (x / s).clamp(-448, 448).to(torch.float8_e4m3fn).float() * s
                    elif grid.symmetric:
                        s = (2 * part.abs().max() / (2**grid.bits - 1)).to(stored).float()
                        wanted = (x / s).round().clamp(-(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1) * s
                    else:
                        low, high = part.min().clamp_max(0), part.max().clamp_min(0)
                        s = ((high - low) / (2**grid.bits - 1)).to(stored).float()
                        z = (-low / s).round()
                        wanted = (((x / s).round() + z).clamp(0, 2**grid.bits - 1) - z) * s
                    torch.testing.assert_close(got[b, h, t, d], wanted)


@pytest.mark.parametrize("grid", STATIC, ids=str)
def test_calibrated_scales_are_never_worse_than_the_extremes(grid: CacheGrid) -> None:
    x = torch.randn(4, 2, 50, 16, generator=torch.Generator().manual_seed(1))
    x[..., 3] *= 20
    scales = choose_scales(grid, {"k": [x[:2], x[2:]], "v": [x / 100]})
    for which, seen in (("k", x), ("v", x / 100)):
        chosen = grid.error(seen, scales.scale[which], scales.zero[which])
        assert bool((chosen <= grid.error(seen, *grid.range(seen))).all())
        unit = CacheScales.unit(grid)
        assert chosen.sum() < grid.error(seen, unit.scale[which], unit.zero[which]).sum()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_cache_that_rounds_nothing_changes_nothing(family: str, tmp_path: Path) -> None:
    """The layer really sends its keys and values through, and its answer is the one that it gives without a cache."""
    reader = CheckpointReader(tiny(family, tmp_path / "m"))
    skeleton = Skeleton(reader.config, reader)
    hidden_BTC = torch.randn(2, 12, skeleton.width, generator=torch.Generator().manual_seed(2))
    for i in range(2):
        block, call, cache = skeleton.load_block(i), skeleton.calls(2, 12)[i], WatchingCache(stride=1)
        plain = call.run(block, hidden_BTC)
        assert torch.equal(with_cache(call, block, cache).run(block, hidden_BTC), plain)
        assert len(cache.seen["k"]) == len(cache.seen["v"]) == 1
        assert cache.seen["k"][0].shape[2] == 12
        rounded = with_cache(call, block, RoundingCache(CacheGrid("int", 4, "token"))).run(block, hidden_BTC)
        assert not torch.equal(rounded, plain)
        assert skeleton.stored_path(i, attention_path(block)).endswith(attention_path(block))


@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("method", ["kv-cache", "rtn"])
def test_written_scales_are_what_runs(name: str, method: str, words: Path, tmp_path: Path) -> None:
    model = tiny("llama", tmp_path / "m", dtype=torch.bfloat16)
    extra = ("--bits", "8", "--group-size", "32") if method == "rtn" else ()
    done = quantize(model, tmp_path / "o", words, "--method", method, "--kv-cache", name, *extra)
    assert done.code == 0, done.err
    tensors = load_file(tmp_path / "o" / "model.safetensors")
    shape = {"fp8": (1,), "int8": (2, 1, 1), "int4": (2, 1, 16)}[name]
    assert tensors["model.layers.1.self_attn.k_scale"].shape == shape
    stored, plain = RuntimeModel(tmp_path / "o"), RuntimeModel(tmp_path / "o", cache="float")
    ids_NT = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(3))
    assert not torch.equal(stored.last_hidden(ids_NT), plain.last_hidden(ids_NT))
    verdict = json.loads((tmp_path / "o" / "verification.json").read_text())
    assert verdict["cache"].keys() == {"float", "unit", "bytes_per_token", "bytes_per_token_bf16"}
    assert verdict["quality"]["kl_mean"] < 0.05
    ratio = verdict["cache"]["bytes_per_token_bf16"] / verdict["cache"]["bytes_per_token"]
    assert ratio == {"fp8": 2, "int8": 2, "int4": 4}[name]


@pytest.mark.parametrize(("name", "fewer"), [("int8-token", 16 / (8 + 1)), ("int4-token", 16 / (4 + 1.5))])
def test_a_scale_for_each_token(name: str, fewer: float, words: Path, tmp_path: Path) -> None:
    """Found while the model runs, so nothing of it is stored; its bytes, for heads of 16 channels, are counted."""
    model = tiny("llama", tmp_path / "m", dtype=torch.bfloat16)
    done = quantize(model, tmp_path / "o", words, "--method", "kv-cache", "--kv-cache", name)
    assert done.code == 0, done.err
    assert not any("_scale" in key for key in load_file(tmp_path / "o" / "model.safetensors"))
    verdict = json.loads((tmp_path / "o" / "verification.json").read_text())
    assert 0 < verdict["quality"]["kl_mean"] < 0.05
    cache = verdict["cache"]
    assert cache["bytes_per_token_bf16"] / cache["bytes_per_token"] == pytest.approx(fewer)


def test_transformers_reads_the_fp8_cache(words: Path, tmp_path: Path) -> None:
    """With compressed-tensors, and a cache in use, it gives our logits."""
    model = tiny("llama", tmp_path / "m", dtype=torch.bfloat16)
    assert quantize(model, tmp_path / "o", words, "--method", "kv-cache", "--no-verify").code == 0
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "o", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids_BT = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        theirs = loaded(ids_BT, past_key_values=DynamicCache(config=loaded.config), use_cache=True).logits
    ours = RuntimeModel(tmp_path / "o")
    hidden = ours.last_hidden(ids_BT)
    ours.load_outer()
    logits = torch.stack([ours.logits(h_TC) for h_TC in hidden])
    assert (theirs - logits).abs().max() <= 1e-3 * logits.abs().max()


def test_a_cache_of_tokens_needs_no_data(tmp_path: Path) -> None:
    model = tiny("llama", tmp_path / "m")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "steps: []\nkv_cache: {type: int, bits: 8, strategy: token}\ncalibration: {dataset: nowhere.txt}\n"
    )
    done = infopt("quantize", model, "-o", tmp_path / "o", "--recipe", recipe, "--verify-samples", 2)
    assert done.code == 0, done.err
    assert not any("k_scale" in name for name in load_file(tmp_path / "o" / "model.safetensors"))


def test_refusals(words: Path, tmp_path: Path) -> None:
    model = tiny("llama", tmp_path / "m")
    assert quantize(model, tmp_path / "x", words, "--method", "rtn", "--kv-cache", "int2").code == 2
    gptq = quantize(
        model, tmp_path / "x", words, "--method", "rtn", "--group-size", 32, "--kv-cache", "fp8", "--format", "gptq"
    )
    assert gptq.code == 4 and "compressed-tensors" in gptq.err
    assert quantize(model, tmp_path / "o", words, "--method", "kv-cache", "--no-verify").code == 0
    config = tmp_path / "o" / "config.json"
    config.write_text(config.read_text().replace('"attn', '"attn').replace('"num_bits": 8', '"num_bits": 5'))
    assert infopt("eval", tmp_path / "o", "--num-samples", 1, "--seqlen", 16).code == 4
