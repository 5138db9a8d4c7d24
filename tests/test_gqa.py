"""Fewer key-value heads: heads found and proven, merged, refitted, healed, written, read by the runtime and by transformers."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from infopt.calibration.discover import discover
from infopt.calibration.heads import exchanged, find_attention, prove_heads
from infopt.checkpoint import CheckpointReader
from infopt.heads import Attention, HeadWeights, Part, put, take
from infopt.model import Skeleton
from infopt.rewriters import gqa
from infopt.rewriters.heal import checkpointed
from infopt.runtime.model import RuntimeModel

from .families import make
from .tools import Result, infopt, text, tiny

HEADS, WIDTH, INPUTS = 4, 8, 24
ROTARY = tuple((d, d + WIDTH // 2) for d in range(WIDTH // 2))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text(tmp_path_factory.mktemp("text"), 8000)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("llama"), num_key_value_heads=4)


def rewrite(model: Path, out: Path, words: Path, *flags: object) -> Result:
    return infopt("rewrite", model, "-o", out, "--dataset", words, "--num-samples", 24, "--seqlen", 64,
                  "--steps", 6, "--verify-samples", 1, *flags)  # fmt: skip


def attention(kv_heads: int, turns: tuple[tuple[int, int], ...] | None = ROTARY) -> Attention:
    """Four query heads in a layout of its own, with biases in the last input."""
    query = Part("q", np.arange(HEADS * WIDTH).reshape(HEADS, WIDTH))
    part = Part("k", np.arange(kv_heads * WIDTH).reshape(kv_heads, WIDTH))
    return Attention(query, part, part, "o", tuple(h * kv_heads // HEADS for h in range(HEADS)), turns)


def random_weights(generator: torch.Generator) -> HeadWeights:
    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return HeadWeights(
        rows(HEADS, WIDTH, INPUTS), rows(HEADS, WIDTH, INPUTS), rows(HEADS, WIDTH, INPUTS), rows(HEADS, 20, WIDTH)
    )


def correlated(generator: torch.Generator, tokens: int) -> Tensor:
    x_TI = torch.randn(tokens, INPUTS, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 2, INPUTS)
    x_TI[:, -1] = 1
    return x_TI


# Finding the heads


@pytest.mark.parametrize(
    ("family", "kv_heads", "pair"),
    [("llama", 2, (0, 8)), ("qwen2", 2, (0, 8)), ("phi3", 2, (0, 8)), ("gemma2", 2, (0, 8)), ("cohere", 2, (0, 1)),
     ("phi", 4, (0, 4)), ("gpt_neox", 4, (0, 2)), ("falcon_new", 2, (0, 8)), ("qwen3", 2, None), ("gemma3", 2, None)],
)  # fmt: skip
def test_heads_are_found_and_proven(family: str, kv_heads: int, pair: tuple[int, int] | None, tmp_path: Path) -> None:
    """Exchanging the heads that were found must not change the answer, whatever the layout; a wrong exchange must."""
    make(family, tmp_path)
    reader = CheckpointReader(tmp_path)
    skeleton = Skeleton(reader.config, reader)
    block = skeleton.load_block(1)
    found = find_attention(skeleton, 1, discover(skeleton, 1))
    assert found is not None and found.kv_heads == kv_heads
    proven = prove_heads(skeleton, 1, found)
    assert (proven.turns or (None,))[0] == pair
    hidden_BTC = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(3))
    call = skeleton.calls(2, 8)[1]
    before, weights = call.run(block, hidden_BTC), take(block, found)
    put(block, found, exchanged(weights, found, list(reversed(range(kv_heads)))))
    torch.testing.assert_close(call.run(block, hidden_BTC), before, rtol=1e-5, atol=1e-5)
    wrong = HeadWeights(weights.q_HDI, weights.k_GDI.flip(0), weights.v_GDI, weights.o_HCD)
    put(block, found, wrong)
    assert float((call.run(block, hidden_BTC) - before).detach().abs().max()) > 1e-3


# Merging, against slow twins


def key_error(weights: HeadWeights, made: gqa.Regrouped, old: Attention, new: Attention, x_TI: Tensor) -> float:
    """The squared error of every score q_t . k_u between a query head and its key, where queries and keys come from the
    same inputs but are independent of one another; written out token by token."""
    total = 0.0
    for head in range(HEADS):  # by position: query heads keep their order
        q_old, q_new = x_TI @ weights.q_HDI[head].T, x_TI @ made.weights.q_HDI[head].T
        k_old = x_TI @ weights.k_GDI[old.group[head]].T
        k_new = x_TI @ made.weights.k_GDI[new.group[head]].T
        for pair in ROTARY:  # rotary turns the pairs apart: each one counts for itself
            z_old = torch.complex(*(k_old[:, d] for d in pair))
            z_new = torch.complex(*(k_new[:, d] for d in pair))
            w_old = torch.complex(*(q_old[:, d] for d in pair))
            w_new = torch.complex(*(q_new[:, d] for d in pair))
            score = w_old.conj()[:, None] * z_old[None] - w_new.conj()[:, None] * z_new[None]
            total += float(score.abs().square().mean())
    return total


def value_error(weights: HeadWeights, made: gqa.Regrouped, old: Attention, new: Attention, x_TI: Tensor) -> float:
    """The squared error of each key-value head's part in the output."""
    total = 0.0
    for head in range(HEADS):
        was = x_TI @ weights.v_GDI[old.group[head]].T @ weights.o_HCD[head].T
        now = x_TI @ made.weights.v_GDI[new.group[head]].T @ made.weights.o_HCD[head].T
        total += float((was - now).square().mean())
    return total


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("wanted", [1, 2])
def test_least_squares_is_never_worse_than_the_mean(wanted: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights, x_TI, held_TI = random_weights(generator), correlated(generator, 200), correlated(generator, 200)
    old, new = attention(4), attention(wanted)
    moments = gqa.Moments.of(weights, x_TI.T @ x_TI / len(x_TI))
    groups = gqa.by_position(4, wanted)
    made = {name: gqa.regroup(weights, old, new, groups, name, moments) for name in ("lstsq", "mean", "first")}
    for data in (x_TI, held_TI):
        for error in (key_error, value_error):
            errors = {name: error(weights, one, old, new, data) for name, one in made.items()}
            assert errors["lstsq"] <= errors["mean"] and errors["lstsq"] <= errors["first"], (error.__name__, errors)
    lost_values = value_error(weights, made["lstsq"], old, new, x_TI)
    whole = sum(float((x_TI @ weights.v_GDI[h].T @ weights.o_HCD[h].T).square().mean()) for h in range(HEADS))
    assert made["lstsq"].lost_values == pytest.approx(lost_values / whole, rel=1e-4)


def test_equal_heads_lose_nothing() -> None:
    """Keys that differ by a turn and values that differ by a matrix are one head: the least squares finds that."""
    generator = torch.Generator().manual_seed(1)
    weights, x_TI = random_weights(generator), correlated(generator, 100)
    mixed = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    k_GDI, v_GDI = weights.k_GDI.clone(), weights.v_GDI.clone()
    angle = torch.tensor(0.7)
    for a, b in ROTARY:
        k_GDI[1, a] = angle.cos() * k_GDI[0, a] - angle.sin() * k_GDI[0, b]
        k_GDI[1, b] = angle.sin() * k_GDI[0, a] + angle.cos() * k_GDI[0, b]
    v_GDI[1] = mixed @ v_GDI[0]
    weights = HeadWeights(weights.q_HDI, k_GDI, v_GDI, weights.o_HCD)
    moments = gqa.Moments.of(weights, x_TI.T @ x_TI / len(x_TI))
    made = gqa.regroup(weights, attention(4), attention(2), ((0, 1), (2, 3)), "lstsq", moments)
    alone = gqa.regroup(weights, attention(4), attention(2), ((0, 1), (2, 3)), "mean", moments)
    for error in (key_error, value_error):
        of_mean = error(weights, alone, attention(4), attention(2), x_TI)
        assert error(weights, made, attention(4), attention(2), x_TI) < of_mean
    q, k = x_TI @ made.weights.q_HDI[1].T, x_TI @ made.weights.k_GDI[0].T
    for a, b in ROTARY:  # head 1 meets the shared key as it met its own
        was = torch.complex(*((x_TI @ weights.q_HDI[1].T)[:, d] for d in (a, b))).conj()[:, None] * torch.complex(
            *((x_TI @ k_GDI[1].T)[:, d] for d in (a, b))
        )
        now = torch.complex(q[:, a], q[:, b]).conj()[:, None] * torch.complex(k[:, a], k[:, b])
        torch.testing.assert_close(now, was, rtol=1e-6, atol=1e-6)


def test_similarity_is_never_worse_than_position() -> None:
    for seed in range(20):
        raw = torch.rand(8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        distance_GG = (raw + raw.T).fill_diagonal_(0)
        for wanted in (1, 2, 4, 8):
            position, similar = gqa.by_position(8, wanted), gqa.by_similarity(distance_GG, wanted)
            assert sorted(head for group in similar for head in group) == list(range(8))
            assert {len(group) for group in similar} == {8 // wanted}
            assert gqa.spread(distance_GG, similar) <= gqa.spread(distance_GG, position) + 1e-12
    far_GG = torch.tensor([[abs(a % 2 - b % 2) for b in range(4)] for a in range(4)], dtype=torch.float64)
    assert gqa.by_similarity(far_GG, 2) == ((0, 2), (1, 3))


def test_refit_is_never_worse_on_its_data() -> None:
    generator = torch.Generator().manual_seed(0)
    z_TX, w_CX = torch.randn(300, 12, generator=generator), torch.randn(5, 12, generator=generator)
    y_TC = z_TX @ w_CX.T + 0.1 * torch.randn(300, 5, generator=generator)
    start_CX = w_CX + 0.5 * torch.randn(5, 12, generator=generator)
    fit = gqa.OutputFit(12, 5)
    for part in range(0, 300, 100):
        fit.add(z_TX[None, part : part + 100], y_TC[None, part : part + 100])

    def error(w: Tensor) -> float:
        return float(((z_TX @ w.T - y_TC).norm(dim=1) / y_TC.norm(dim=1)).square().sum())

    assert error(fit.solve(start_CX)) < 0.2 * error(start_CX)
    assert error(fit.solve(fit.solve(start_CX))) <= error(fit.solve(start_CX))


# The command


def test_the_same_number_of_heads_is_the_identity(llama: Path, words: Path, tmp_path: Path) -> None:
    for number, flags in enumerate(
        [("--group", "similarity"), ("--group", "position", "--merge", "mean", "--no-heal")]
    ):
        out = tmp_path / str(number)
        done = rewrite(llama, out, words, "--kv-heads", 4, *flags)
        assert done.code == 0, done.err
        ours, theirs = load_file(out / "model.safetensors"), load_file(llama / "model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert json.loads((out / "config.json").read_text()) == json.loads((llama / "config.json").read_text())


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {"num_key_value_heads": 4}), ("qwen2", {}), ("qwen3", {}), ("phi3", {}), ("falcon_new", {}), ("gemma3", {}),
     ("cohere", {}), ("phi", {})],
)  # fmt: skip
def test_the_result_is_an_ordinary_model(family: str, options: dict, words: Path, tmp_path: Path) -> None:
    """transformers loads it without a complaint, and answers what the runtime answers."""
    model, out = tiny(family, tmp_path / "model", **options), tmp_path / "out"
    done = rewrite(model, out, words, "--kv-heads", 1, "--no-curve")
    assert done.code == 0, done.err
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, dtype=torch.float32)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids_BT = torch.arange(40)[None] % 90 + 5
    runtime = RuntimeModel(out)
    hidden_TC = runtime.last_hidden(ids_BT)[0]
    runtime.load_outer()
    torch.testing.assert_close(loaded.eval()(ids_BT).logits[0], runtime.logits(hidden_TC), rtol=1e-4, atol=1e-4)
    report = json.loads((out / "infopt.json").read_text())
    cache = report["measured"]["cache"]["bytes_per_token"]
    assert cache["before"] == (4 if family in ("llama", "phi") else 2) * cache["after"]


def test_healing_and_fitting_lower_the_distance(llama: Path, words: Path, tmp_path: Path) -> None:
    distances = {}
    for name, flags in {
        "first": ("--merge", "first", "--no-refit", "--no-heal"),
        "fitted": ("--no-heal", "--speed-at", 40),
        "healed": ("--steps", 24, "--lr", 1e-3),
    }.items():
        done = rewrite(llama, tmp_path / name, words, "--kv-heads", 1, "--num-samples", 90, *flags)
        assert done.code == 0, done.err
        assert ("after 40 tokens:" in done.err) == (name == "fitted")
        distances[name] = json.loads((tmp_path / name / "verification.json").read_text())["quality"]["kl_mean"]
    assert distances["healed"] < distances["fitted"] < distances["first"]
    points = json.loads((tmp_path / "healed" / "infopt.json").read_text())["measured"]["healing"]
    assert [point["tokens"] for point in points] == sorted(point["tokens"] for point in points)
    assert points[-1]["kl"] == pytest.approx(distances["healed"]) and points[-1]["kl"] < points[0]["kl"]
    assert len(points) == 5 and points[-1]["tokens"] > 0


@pytest.mark.parametrize("merge", ["lstsq", "mean", "first"])
def test_every_merge_goes_with_every_grouping(merge: str, words: Path, tmp_path: Path) -> None:
    model = tiny("llama", tmp_path / "model", num_attention_heads=8, num_key_value_heads=8)
    spreads = {}
    for group in ("position", "similarity"):
        done = rewrite(model, tmp_path / group, words, "--kv-heads", 2, "--merge", merge, "--group", group, "--no-heal")
        assert done.code == 0, done.err
        blocks = json.loads((tmp_path / group / "infopt.json").read_text())["blocks"]
        spreads[group] = [block["spread"]["chosen"] for block in blocks]
        for block in blocks:
            assert sorted(head for heads in block["groups"] for head in heads) == list(range(8))
    assert all(b <= a for a, b in zip(spreads["position"], spreads["similarity"], strict=True))
    assert spreads["similarity"] < spreads["position"]


def test_position_and_mean_need_no_data(llama: Path, tmp_path: Path) -> None:
    """Ainslie et al.: the mean of neighbours, written by hand."""
    flags = ("--group", "position", "--merge", "mean", "--no-refit", "--no-heal", "--no-verify")
    done = infopt("rewrite", llama, "-o", tmp_path / "out", "--kv-heads", 2, *flags)
    assert done.code == 0, done.err
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(llama / "model.safetensors")
    for name, was in theirs.items():
        wanted = was
        if "k_proj" in name or "v_proj" in name:
            wanted = was.view(2, 2, 16, -1).mean(1).reshape(32, -1)
        torch.testing.assert_close(ours[name], wanted, rtol=0, atol=1e-7)


def test_checkpointing_changes_memory_and_nothing_else(llama: Path, words: Path, tmp_path: Path) -> None:
    for name, flags in (("plain", ()), ("again", ("--checkpointing",))):
        done = rewrite(llama, tmp_path / name, words, "--kv-heads", 2, "--no-curve", "--json", *flags)
        assert done.code == 0, done.err
    plain, again = json.loads(done.out)["step_costs"]
    assert 0 < again["bytes"] < plain["bytes"]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "again"))
    for name in one:
        # Adam makes a step of a rounding difference in a gradient near zero; all six steps together go up to 1e-3.
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-4)


def test_checkpointing_gives_the_same_gradients(llama: Path) -> None:
    reader = CheckpointReader(llama)
    skeleton = Skeleton(reader.config, reader)
    block, call = skeleton.load_block(0), skeleton.calls(3, 10)[0]
    hidden_BTC = torch.randn(3, 10, 64, generator=torch.Generator().manual_seed(0))
    parameters, found = dict(block.named_parameters()), []
    for context in (nullcontext(), checkpointed(block)):
        for parameter in parameters.values():
            parameter.requires_grad_(True)
            parameter.grad = None
        with context:
            call.run(block, hidden_BTC).square().mean().backward()
        found.append({name: parameter.grad for name, parameter in parameters.items()})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 9
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-7)


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    llama: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert rewrite(llama, whole, words, "--kv-heads", 2).code == 0
    original = Skeleton.load_block

    def stop(self: Skeleton, i: int) -> torch.nn.Module:
        if i == 1 and (tmp_path / "cut.infopt-work" / "parts" / "block-00000.json").exists():
            raise KeyboardInterrupt
        return original(self, i)

    with monkeypatch.context() as patch:
        patch.setattr(Skeleton, "load_block", stop)
        assert rewrite(llama, cut, words, "--kv-heads", 2).code == 130
    assert not cut.exists()
    done = rewrite(llama, cut, words, "--kv-heads", 2)
    assert done.code == 0 and "done by an earlier run" in done.err
    for path in sorted(whole.iterdir()):
        assert path.read_bytes() == (cut / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (
            hf.DeepseekV3Config(
                hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2, vocab_size=128,
                num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8,
                qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
                first_k_dense_replace=2, pad_token_id=0,
            ),
            "MLA",
        ),
        (hf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=128, state_size=4), "no attention heads"),
    ],
    ids=["latent", "none"],
)  # fmt: skip
def test_other_attention_is_refused(config: hf.PreTrainedConfig, word: str, words: Path, tmp_path: Path) -> None:
    tiny("llama", tmp_path / "tokenizer")
    model = hf.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tmp_path / "tokenizer" / name, tmp_path / "model" / name)
    done = rewrite(tmp_path / "model", tmp_path / "out", words, "--kv-heads", 1)
    assert done.code == 4 and word in done.err, done.err


@pytest.mark.parametrize(
    ("family", "options", "flags", "code", "word"),
    [
        ("llama", {"num_key_value_heads": 1}, ("--kv-heads", 1), 4, "multi-query"),
        ("falcon_old", {}, ("--kv-heads", 1), 4, "one key-value head"),
        ("falcon_alibi", {}, ("--kv-heads", 1), 4, ""),
        ("gpt2", {}, ("--kv-heads", 1), 4, "no field"),
        ("gpt_neox", {}, ("--kv-heads", 1), 4, "no field"),
        ("olmo2", {}, ("--kv-heads", 1), 4, "heads"),
        ("llama", {}, ("--kv-heads", 3), 2, "--kv-heads 1, 2"),
        ("llama", {}, ("--kv-heads", 4), 2, "--kv-heads 1, 2"),
        ("llama", {}, (), 2, "--kv-heads"),
        ("llama", {}, ("--kv-heads", 1, "--merge", "median"), 2, "lstsq"),
        ("llama", {}, ("--kv-heads", 1, "--lr", 0), 2, "--lr"),
    ],
)
def test_what_cannot_be_done_is_refused(
    family: str, options: dict, flags: tuple, code: int, word: str, words: Path, tmp_path: Path
) -> None:
    model = tiny(family, tmp_path / "model", **options)
    done = rewrite(model, tmp_path / "out", words, *flags)
    assert done.code == code and word in done.err, done.err
    assert not (tmp_path / "out").exists()
