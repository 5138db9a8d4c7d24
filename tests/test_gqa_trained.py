"""Every merge and grouping on models that were trained: a tiny one made here, and SmolLM2-135M (9 heads over 3, to 1)."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from infopt.calibration.stream import Stream
from infopt.checkpoint import CheckpointReader
from infopt.exporters.gguf_import import convert_gguf
from infopt.heads import take
from infopt.model import Skeleton
from infopt.recipes.rewrite_plan import plan_rewrite
from infopt.rewriters import gqa
from infopt.rewriters.options import RewriteOptions

from .tools import infopt, smollm2_gguf, tiny

pytestmark = pytest.mark.slow
SENTENCES = (
    "the cat sat on the mat. ",
    "a dog ran over the hill. ",
    "two birds sang in a tree. ",
    "rain fell all day long. ",
)


def sentences(length: int, seed: int) -> str:
    picked = torch.randint(len(SENTENCES), (length,), generator=torch.Generator().manual_seed(seed))
    return "".join(SENTENCES[i] for i in picked)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MHA: 4 heads of keys and values, 150 steps of training on sentences."""
    folder = tiny("llama", tmp_path_factory.mktemp("trained") / "model", num_key_value_heads=4)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids_T = torch.tensor(PreTrainedTokenizerFast.from_pretrained(folder).encode(sentences(400, 1)))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(150):
        starts = torch.randint(len(ids_T) - 64, (8,), generator=torch.Generator().manual_seed(step))
        batch_BT = torch.stack([ids_T[start : start + 64] for start in starts.tolist()])
        loss = model(batch_BT, labels=batch_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.detach()) < 1  # it has learnt the sentences
    model.save_pretrained(folder)
    return folder


def rewritten(model: Path, out: Path, words: Path, wanted: int, *flags: object) -> tuple[list[gqa.Groups], float]:
    """(each block's groups of heads, KL on text that calibration has not seen)."""
    held = words.with_name("held.txt")
    done = infopt("rewrite", model, "-o", out, "--kv-heads", wanted, "--dataset", words, "--verify-dataset", held,
                  "--seqlen", 64, "--verify-samples", 8, "--no-heal", *flags)  # fmt: skip
    assert done.code == 0, done.err
    kl = json.loads((out / "verification.json").read_text())["quality"]["kl_mean"]
    return [block["groups"] for block in json.loads((out / "infopt.json").read_text())["blocks"]], kl


def spreads(model: Path, text: Path, folder: Path, merge: str, wanted: int, chosen: list[gqa.Groups]) -> Tensor:
    """What groupings of heads leave apart in each block on a text [blocks, 2]: by position, and as chosen."""
    reader = CheckpointReader(model)
    skeleton = Skeleton(reader.config, reader)
    plan = plan_rewrite(reader, skeleton, RewriteOptions(kv_heads=wanted, merge=merge))
    ids_T = torch.tensor(PreTrainedTokenizerFast.from_pretrained(model).encode(text.read_text()[:30_000])[: 64 * 64])
    stream = Stream(skeleton, ids_T[: len(ids_T) // 64 * 64].view(-1, 64), folder)
    stream.start()
    found = []
    for i, groups in enumerate(chosen):
        block, attention = skeleton.load_block(i), plan.blocks[i].before
        key = block.get_submodule(attention.key.op)
        gram = gqa.InputGram(key.in_features)
        with key.register_forward_pre_hook(lambda _, args, gram=gram: gram.add(args[0])):
            stream.advance(i, block)
        weights = take(block, attention)
        distance_GG = gqa.distances(weights, gqa.Moments.of(weights, gram.matrix), attention, merge)
        found.append([gqa.spread(distance_GG, each) for each in (gqa.by_position(attention.kv_heads, wanted), groups)])
        skeleton.free_block(i)
    return torch.tensor(found)


def goes_through_all(model: Path, folder: Path, words: Path, wanted: int, samples: int) -> None:
    """On text that nobody has seen, the closed form is nearer to the original than the mean, by both groupings; and heads
    grouped by similarity are nearer to each other than neighbours, as each merge measures it, in all blocks together."""
    distance = {}
    for merge, group in itertools.product(("lstsq", "mean", "first"), ("position", "similarity")):
        flags = ("--merge", merge, "--group", group, "--no-refit", "--num-samples", samples)
        groups, distance[merge, group] = rewritten(model, folder / f"{merge}-{group}", words, wanted, *flags)
        if group == "similarity":
            apart = spreads(model, words.with_name("held.txt"), folder / f"{merge}-hidden", merge, wanted, groups)
            position, similarity = apart.sum(0).tolist()
            assert similarity <= position * (1 + 1e-9), (merge, apart)
            if wanted > 1:
                assert similarity < position, (merge, apart)
    for group in ("position", "similarity"):
        assert distance["lstsq", group] <= distance["mean", group], distance


@pytest.mark.parametrize("wanted", [2, 1])
def test_a_trained_model_goes_through_every_merge_and_grouping(wanted: int, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text(sentences(300, 2))
    (tmp_path / "held.txt").write_text(sentences(300, 3))
    goes_through_all(trained, tmp_path, tmp_path / "words.txt", wanted, 60)


def test_smollm2_goes_through_every_merge_and_grouping(tmp_path: Path) -> None:
    """On the built-in text, which both parts of are written to files."""
    convert_gguf(smollm2_gguf(), tmp_path / "model", torch.bfloat16)
    from pydoc_data.topics import topics

    text = "\n".join(topics.values())
    (tmp_path / "words.txt").write_text(text[:200_000])
    (tmp_path / "held.txt").write_text(text[200_000:])
    goes_through_all(tmp_path / "model", tmp_path, tmp_path / "words.txt", 1, 16)
