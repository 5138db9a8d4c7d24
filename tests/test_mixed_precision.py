"""Bits allocated exactly under a budget, from sensitivities measured once; per-pattern schemes."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
import yaml

from infopt.calibration.stream import Stream
from infopt.errors import UsageError
from infopt.quantizers.search import allocate
from infopt.recipes.sensitivity import _loss, at_the_end, before

from .tools import infopt, skeleton_of, text, tiny

CALIBRATION = ("--num-samples", "8", "--seqlen", "32", "--verify-samples", "2", "--group-size", "32")


@pytest.mark.parametrize("seed", range(40))
def test_allocation_is_what_trying_everything_finds(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.choice((64, 96, 256, 512)) for _ in range(draw.randint(1, 6))]
    costs = [[bits * size for bits in (2, 3, 4, 8)] for size in sizes]
    errors = [sorted((draw.random() ** 3 for _ in range(4)), reverse=True) for _ in sizes]
    budget = draw.randint(2 * sum(sizes), 8 * sum(sizes))
    found = allocate(costs, errors, budget)
    best = min(
        sum(row[c] for row, c in zip(errors, pick, strict=True))
        for pick in itertools.product(range(4), repeat=len(sizes))
        if sum(row[c] for row, c in zip(costs, pick, strict=True)) <= budget
    )
    assert found.error == pytest.approx(best) and found.cost <= budget
    assert [error for _, error in found.front] == sorted((error for _, error in found.front), reverse=True)
    assert found.front[0][0] == 2 * sum(sizes) and found.front[-1][1] == pytest.approx(best)


def test_a_budget_that_nothing_fits_is_refused() -> None:
    with pytest.raises(UsageError, match="smallest choices"):
        allocate([[300, 400]], [[1.0, 0.5]], 299)


def test_target_bits(tmp_path: Path) -> None:
    model = tiny("llama", tmp_path / "m")
    data = ("--dataset", text(tmp_path))
    done = infopt(
        "quantize", model, "-o", tmp_path / "o", "--method", "gptq", "--target-bits", 4.5, *CALIBRATION, *data
    )
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "o" / "infopt.json").read_text())
    assert 3.0 <= report["allocation"]["bits"] <= 4.5
    bits = {name: layer["bits"] for name, layer in report["layers"].items()}
    assert len(set(bits.values())) > 1
    for i in range(2):  # what servers fuse is alike
        for fused in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({bits[f"model.layers.{i}.{name}"] for name in fused}) == 1
    assert (tmp_path / "o" / "pareto.svg").read_text().startswith("<svg")
    again = infopt(
        "quantize", model, "-o", tmp_path / "p", "--recipe", tmp_path / "o" / "recipe.yaml", "--no-verify", *data
    )
    assert again.code == 0, again.err
    weights = "model.safetensors"
    assert (tmp_path / "o" / weights).read_bytes() == (tmp_path / "p" / weights).read_bytes()


def test_target_size(tmp_path: Path) -> None:
    model = tiny("llama", tmp_path / "m")
    data = ("--dataset", text(tmp_path), "--no-verify")
    limit = 140_000
    done = infopt(
        "quantize", model, "-o", tmp_path / "o", "--method", "rtn", "--target-size", "140KB", *CALIBRATION, *data
    )
    assert done.code == 0, done.err
    assert (tmp_path / "o" / "model.safetensors").stat().st_size <= limit * 1.1  # with the header and shapes
    small = infopt(
        "quantize", model, "-o", tmp_path / "p", "--method", "rtn", "--target-size", "1KB", *CALIBRATION, *data
    )
    assert small.code == 2 and "--target-size" in small.err
    assert infopt("quantize", model, "-o", tmp_path / "p", "--method", "rtn", "--target-size", "tiny").code == 2


def test_overrides_by_pattern(tmp_path: Path) -> None:
    model = tiny("llama", tmp_path / "m")
    recipe = {
        "steps": [{"round": {"search": False}}],
        "weights": {"bits": 4, "group_size": 32},
        "overrides": [
            {"match": ["*.0.mlp.down_proj"], "weights": {"bits": 3, "group_size": 64}},
            {"match": ["*.down_proj"], "weights": {"bits": 8, "group_size": "channel"}},
        ],
    }
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe))
    done = infopt("quantize", model, "-o", tmp_path / "o", "--recipe", path, "--verify-samples", 2)
    assert done.code == 0, done.err
    layers = json.loads((tmp_path / "o" / "infopt.json").read_text())["layers"]
    assert layers["model.layers.0.mlp.down_proj"]["bits"] == 3
    assert layers["model.layers.1.mlp.down_proj"]["bits"] == 8
    assert layers["model.layers.1.mlp.up_proj"]["bits"] == 4
    recipe["overrides"][0]["match"] = ["*.dwn_proj"]
    path.write_text(yaml.safe_dump(recipe))
    wrong = infopt("quantize", model, "-o", tmp_path / "p", "--recipe", path)
    assert wrong.code == 2 and "dwn_proj" in wrong.err


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_derivatives_that_travel_block_by_block(family: str, tmp_path: Path) -> None:
    """By every block's output, the same as autograd's through the whole model at once."""
    skeleton = skeleton_of(tiny(family, tmp_path / "m"))
    stream = Stream(skeleton, torch.randint(5, 60, (3, 16), generator=torch.Generator().manual_seed(1)), tmp_path / "s")
    stream.start()
    blocks = [skeleton.load_block(i) for i in range(len(skeleton.blocks))]
    for i, block in enumerate(blocks):
        stream.advance(i, block)
    gradients = at_the_end(skeleton, stream)
    ((hidden_BTC, _),) = stream.inputs(0)
    answers = [hidden_BTC.requires_grad_()]
    for block, call in zip(blocks, skeleton.calls(*hidden_BTC.shape[:2]), strict=True):
        answers.append(call.run(block, answers[-1]))
    draw = torch.Generator().manual_seed(0)
    with skeleton.outer_loaded():
        log_p_KV = torch.log_softmax(skeleton.tail(answers[-1]).flatten(0, 1), -1)
        some = log_p_KV.detach().exp().split(skeleton.logits_at_once)
        drawn_K1 = torch.cat([torch.multinomial(p_KV, 1, generator=draw) for p_KV in some])
        wanted = torch.autograd.grad(-log_p_KV.gather(1, drawn_K1).sum(), answers)
    for i in reversed(range(len(blocks))):
        torch.testing.assert_close(gradients[0], wanted[i + 1], rtol=1e-3, atol=1e-5)
        gradients = before(stream, i, blocks[i], gradients)
    torch.testing.assert_close(gradients[0], wanted[0], rtol=1e-3, atol=1e-5)


def test_the_expected_loss_is_the_divergence_that_follows(tmp_path: Path) -> None:
    """Nats, over many tokens: of the last block that divergence itself; of an earlier one without what tokens do to others."""
    skeleton = skeleton_of(tiny("llama", tmp_path / "m"))
    stream = Stream(
        skeleton, torch.randint(5, 60, (256, 32), generator=torch.Generator().manual_seed(1)), tmp_path / "s"
    )
    stream.start()
    blocks = [skeleton.load_block(i) for i in range(len(skeleton.blocks))]
    for i, block in enumerate(blocks):
        stream.advance(i, block)
    gradients = at_the_end(skeleton, stream)
    with torch.no_grad(), skeleton.outer_loaded():
        for i in reversed(range(len(blocks))):
            outputs = list(stream.outputs(i, blocks[i]))
            weight = blocks[i].get_submodule("mlp.down_proj").weight
            kept = weight.clone()
            weight += 0.02 * kept.abs().mean() * torch.randn(kept.shape, generator=torch.Generator().manual_seed(i))
            expected = _loss(stream, i, blocks[i], outputs, gradients)
            found = []
            for (hidden_BTC, _), old_BTC in zip(stream.inputs(len(blocks)), stream.outputs(i, blocks[i]), strict=True):
                for block, call in list(zip(blocks, skeleton.calls(*old_BTC.shape[:2]), strict=True))[i + 1 :]:
                    old_BTC = call.run(block, old_BTC)
                log_p, log_q = (skeleton.tail(x).log_softmax(-1).double() for x in (hidden_BTC, old_BTC))
                found.append((log_p.exp() * (log_p - log_q)).sum(-1).flatten())
            share = expected / torch.cat(found).mean().item()
            assert 0.95 < share < 1.05 if i + 1 == len(blocks) else 0.5 < share < 1.05
            weight.copy_(kept)
            gradients = before(stream, i, blocks[i], gradients)


def test_parts_are_rounded_as_the_recipe_rounds(tmp_path: Path) -> None:
    """What GPTQ is expected to lose is less than plain rounding; every step that rounds takes part, on experts too."""
    model, data = tiny("mixtral", tmp_path / "m"), ("--dataset", text(tmp_path), "--target-bits", 4.5, "--no-verify")
    lost = {}
    for method in ("rtn", "gptq", "best-4bit"):  # the last one in other groups, so it only has to run
        done = infopt("quantize", model, "-o", tmp_path / method, "--method", method, *CALIBRATION, *data)
        assert done.code == 0, done.err
        lost[method] = json.loads((tmp_path / method / "infopt.json").read_text())["allocation"]["uniform"]
    for bits in ("3", "4"):
        assert lost["gptq"][bits] < 0.9 * lost["rtn"][bits]
