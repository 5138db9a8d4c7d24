"""A quantized key-value cache: rounded as defined, calibrated by error, written, read by the runtime and by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

from infopt.calibration.stats import HeadSums
from infopt.calibration.stream import Stream
from infopt.checkpoint import CheckpointReader
from infopt.hadamard import rotation
from infopt.kv_cache import (
    CacheGrid,
    CacheScales,
    Frame,
    LeafCache,
    RoundingCache,
    WatchingCache,
    attention_path,
    with_cache,
)
from infopt.model import Skeleton
from infopt.quantizers.kv_cache import balance, choose_frames, choose_scales
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
FIRST = 3  # sinks of the tests: they reach into a second step


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
    """Of integers; floats have room for twice the extremes, which costs them nothing."""
    x = torch.randn(4, 2, 50, 16, generator=torch.Generator().manual_seed(1))
    x[..., 3] *= 20
    scales = choose_scales(grid, {"k": [x[:2], x[2:]], "v": [x / 100]})
    for which, seen in (("k", x), ("v", x / 100)):
        chosen = grid.error(seen, scales.scale[which], scales.zero[which])
        extremes = grid.range(seen)
        if grid.kind == "int":
            assert bool((chosen <= grid.error(seen, *extremes)).all())
        else:
            assert bool((scales.scale[which] >= 2 * extremes[0]).all())
            assert bool((chosen <= 1.05 * grid.error(seen, *extremes)).all())
        unit = CacheScales.unit(grid)
        assert chosen.sum() < grid.error(seen, unit.scale[which], unit.zero[which]).sum()


def matrices(seed: int, heads: int = 2, width: int = 8) -> torch.Tensor:
    """Positive definite, float64 [H, D, D], of widely different eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    turned, _ = torch.linalg.qr(torch.randn(heads, width, width, generator=generator, dtype=torch.float64))
    return turned * torch.logspace(-1, 1, width).double() @ turned.mT


def test_balance_is_what_its_formula_says_and_never_dearer() -> None:
    """Both matrices become one diagonal; turned evenly, the cost of equal errors is below that of a turn alone."""
    c_HDD, g_HDD = matrices(0), matrices(1)
    m_HDD = balance(c_HDD, g_HDD)
    spread, felt = m_HDD.mT @ c_HDD @ m_HDD, torch.linalg.inv(m_HDD) @ g_HDD @ torch.linalg.inv(m_HDD).mT
    off = spread - torch.diag_embed(spread.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < 1e-6 and torch.allclose(spread.diagonal(dim1=1, dim2=2).mean(1), torch.ones(2).double())
    ratio = felt.diagonal(dim1=1, dim2=2) / spread.diagonal(dim1=1, dim2=2)
    assert torch.allclose(ratio, ratio.mean(1, keepdim=True).expand_as(ratio), rtol=1e-3)

    def cost(into: torch.Tensor) -> torch.Tensor:
        back = torch.linalg.inv(into)
        each = (into.mT @ c_HDD @ into).diagonal(dim1=1, dim2=2) * (back @ g_HDD @ back.mT).diagonal(dim1=1, dim2=2)
        return each.sum(1)

    turn = rotation(8, 0).matrix()
    assert bool((cost(m_HDD @ turn) <= cost(m_HDD) * (1 + 1e-9)).all())
    assert bool((cost(m_HDD @ turn) < 0.7 * cost(turn.expand(2, 8, 8))).all())


def test_derivatives_are_those_of_the_block(tmp_path: Path) -> None:
    """Against differences: a key moved a little moves the combination of the answers as the derivative says; and sums."""
    reader = CheckpointReader(tiny("llama", tmp_path / "m"))
    skeleton = Skeleton(reader.config, reader)
    windows_NT = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(2))
    stream = Stream(skeleton, windows_NT, tmp_path / "hidden")
    (tmp_path / "hidden").mkdir(exist_ok=True)
    stream.start()
    block = skeleton.load_block(0)
    sums = stream.feel_cache(0, block, FIRST)
    assert sums["k"].tokens == 2 * (12 - FIRST)
    hidden_BTC, call = next(stream.inputs(0))
    leaf = LeafCache()
    y_BTC = with_cache(call, block, leaf).run(block, hidden_BTC)
    g_BTC = torch.randn(y_BTC.shape, generator=torch.Generator().manual_seed(0))
    (felt,) = torch.autograd.grad(y_BTC, [leaf.leaves["k"]], g_BTC)
    felt_HND = felt[:, :, FIRST:].double().transpose(0, 1).flatten(1, 2)
    torch.testing.assert_close(sums["k"].felt_HDD, felt_HND.mT @ felt_HND)

    class Moved(LeafCache):
        by = 0.0

        def update(self, k_BHTD, v_BHTD, *_, **__):
            k_BHTD = k_BHTD.detach().clone()
            k_BHTD[1, 0, 5, 2] += self.by
            return k_BHTD, v_BHTD

    ends = []
    for by in (1e-2, -1e-2):
        moved = Moved()
        moved.by = by
        with torch.no_grad():
            ends.append((with_cache(call, block, moved).run(block, hidden_BTC) * g_BTC).sum().item())
    assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(felt[1, 0, 5, 2].item(), rel=1e-2, abs=1e-3)


def test_frames_for_heads_that_say_nothing() -> None:
    """No token, only zeros, or one direction: a frame that can be inverted, and gives back what entered."""
    for x in (torch.zeros(1, 2, 5, 8), torch.ones(1, 2, 5, 8), torch.zeros(1, 2, 0, 8)):
        sums = HeadSums(2, 8)
        sums.add(x, torch.zeros_like(x))
        frame = choose_frames({"k": sums})["k"]
        some = torch.randn(1, 2, 7, 8, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(frame.leave(frame.enter(some)), some, rtol=1e-3, atol=1e-3)


def test_rounding_in_a_frame_and_the_first_tokens() -> None:
    """The definition: each token into the coordinates, rounded, and back; the first ones as they are."""
    generator = torch.Generator().manual_seed(0)
    x_BHTD = torch.randn(2, 3, 6, 8, generator=generator)
    frame = Frame(torch.randn(3, 8, 8, generator=generator), torch.randn(3, 8, generator=generator))
    grid = CacheGrid("int", 8, "token", symmetric=False, balanced=True, sinks=FIRST)
    cache = RoundingCache(grid, CacheScales(frames={"k": frame, "v": frame}))
    got, _ = cache.update(x_BHTD, x_BHTD)
    assert torch.equal(got[:, :, :FIRST], x_BHTD[:, :, :FIRST])
    for b in range(2):
        for h in range(3):
            for t in range(FIRST, 6):
                y = (x_BHTD[b, h, t] - frame.center_HD[h]) @ frame.into_HDD[h]
                rounded = grid.round(y[None, None, None], *grid.range(y[None, None, None]))[0, 0, 0]
                wanted = rounded @ torch.linalg.inv(frame.into_HDD[h]) + frame.center_HD[h]
                torch.testing.assert_close(got[b, h, t], wanted, rtol=1e-3, atol=1e-3)
    assert not torch.equal(got[:, :, FIRST:], x_BHTD[:, :, FIRST:])


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


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
def test_a_balanced_cache(name: str, family: str, words: Path, tmp_path: Path) -> None:
    """Written, verified and read again; lint finds nothing in it."""
    model = tiny(family, tmp_path / "m", dtype=torch.bfloat16)
    kl = {}
    for cache in (name, f"{name}-balanced"):
        out = tmp_path / cache
        done = quantize(model, out, words, "--method", "kv-cache", "--kv-cache", cache)
        assert done.code == 0, done.err
        verdict = json.loads((out / "verification.json").read_text())
        kl[cache] = verdict["quality"]["kl_mean"]
    assert 0 < kl[f"{name}-balanced"] < 2 * kl[name] + 1e-6  # heads of random weights have no directions of their own
    tensors = load_file(out / "model.safetensors")
    assert tensors["model.layers.1.self_attn.v_frame"].shape == (2, 16, 16)
    assert ("unit" in verdict["cache"]) == (name == "fp8")
    assert infopt("verify", out, "--reference", model, "--num-samples", 1, "--seqlen", 16).code == 0
    assert infopt("lint", out).code == 0


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda t: t.pop("model.layers.1.self_attn.k_frame"), "k_frame"),
        (lambda t: t["model.layers.0.self_attn.v_frame"].zero_(), "cannot be inverted"),
        (lambda t: t["model.layers.0.self_attn.v_center"].fill_(float("nan")), "cannot be inverted"),
        (lambda t: t.update({"model.layers.0.self_attn.k_frame": torch.eye(16)}), "no frame"),
    ],
)
def test_damaged_frames(damage, says: str, words: Path, tmp_path: Path) -> None:
    model = tiny("llama", tmp_path / "m")
    done = quantize(model, tmp_path / "o", words, "--method", "kv-cache", "--kv-cache", "int4-balanced", "--no-verify")
    assert done.code == 0, done.err
    path = tmp_path / "o" / "model.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    done = infopt("eval", tmp_path / "o", "--num-samples", 1, "--seqlen", 16)
    assert done.code == 3 and says in done.err, done.err


def test_what_a_balanced_cache_cannot_be(words: Path, tmp_path: Path) -> None:
    """Under a name that servers read, or from statistics without derivatives."""
    model = tiny("llama", tmp_path / "m")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("steps: []\nkv_cache: {type: float, bits: 8, strategy: tensor, balanced: true}\n")
    done = quantize(model, tmp_path / "x", words, "--recipe", recipe)
    assert done.code == 2 and "channel" in done.err
    flags = ("--dataset", words, "--num-samples", 4, "--seqlen", 32)
    assert infopt("calibrate", model, "-o", tmp_path / "stats", "--method", "kv-cache", *flags).code == 0
    done = infopt("quantize", model, "-o", tmp_path / "x", "--method", "kv-cache", "--kv-cache", "int4-balanced",
                  "--calibration", tmp_path / "stats", "--sequential", "none")  # fmt: skip
    assert done.code == 2 and "what an error in it would do" in done.err, done.err
    assert not (tmp_path / "x").exists()


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
