"""Padded windows: what fills them up is in no statistic, no attention, no router's count; so they are the same rows alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from infopt.calibration.discover import discover
from infopt.calibration.padding import NO_TOKEN, check_causal, padded, real_tokens
from infopt.calibration.stats import InputStats
from infopt.calibration.stream import Stream
from infopt.errors import Unsupported
from infopt.recipes.sensitivity import _loss

from .tools import infopt, skeleton_of, text, tiny

LENGTHS = (40, 7, 23, 1, 40, 12, 31, 5, 9, 2, 17, 3, 11, 38)  # two batches
FAMILIES = (
    "llama",
    "gemma3",
    "mixtral",
    *(pytest.param(f, marks=pytest.mark.slow) for f in ("falcon_alibi", "gpt2", "qwen3_moe")),
)


def rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 90, (length,), generator=generator).tolist() for length in LENGTHS]


def merged(parts: list[dict[str, InputStats]]) -> dict[str, InputStats]:
    whole, *rest = parts
    for part in rest:
        for name, stats in part.items():
            whole[name].merge(stats)
    return whole


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).norm() <= 1e-5 * other.norm())


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_first_token_that_counts_thrice(family: str, tmp_path: Path) -> None:
    """By gathering and by walking: as if it were there two times more; not among an expert's tokens."""
    skeleton = skeleton_of(tiny(family, tmp_path / "m"))
    windows = {"all": padded(rows()), "thrice": padded(rows()), "firsts": torch.tensor([row[:1] for row in rows()])}
    streams = {name: Stream(skeleton, ids, tmp_path / name) for name, ids in windows.items()}
    streams["thrice"].batches.first_token = 3
    topology, block = discover(skeleton, 0), skeleton.load_block(0)
    for stream in streams.values():
        stream.start()
    walked: dict[str, InputStats] = {}
    streams["thrice"].walk(0, block, topology, lambda space, found: walked.update({space.name: found}))
    found = {name: stream.gather(0, block, topology) for name, stream in streams.items()}
    for got in (found["thrice"], walked):
        for name, stats in got.items():
            plain, times = found["all"][name], 0 if "experts." in name else 2
            assert stats.tokens == plain.tokens and close(stats.mean_abs, plain.mean_abs)
            assert close(stats.gram, plain.gram + times * found["firsts"][name].gram)


def test_a_token_that_counts_twice_is_two() -> None:
    x_TC, original_TC = torch.randn(2, 5, 8)
    which = torch.tensor([0, 0, 1, 2, 3, 3, 4])
    found, wanted = (InputStats(8, frozenset({"gram", "shift"})) for _ in range(2))
    found.add(x_TC, original_TC, torch.tensor([2.0, 1, 1, 2, 1]))
    wanted.add(x_TC[which], original_TC[which])
    assert close(found.gram, wanted.gram) and close(found.shift, wanted.shift)


def test_it_counts_where_the_tokenizer_puts_one(tmp_path: Path) -> None:
    """Through the command line; elsewhere the recipe's number changes nothing."""
    model, words = tiny("llama", tmp_path / "m"), text(tmp_path)

    def weights(name: str, times: int) -> bytes:
        recipe, out = tmp_path / f"{name}.yaml", tmp_path / name
        recipe.write_text(f"steps: [gptq: {{}}]\nweights: {{group_size: 32}}\nfirst_token: {times}\n")
        flags = ("--recipe", recipe, "--dataset", words, "--num-samples", 8, "--seqlen", 32, "--no-verify", "-o", out)
        assert infopt("quantize", model, *flags).code == 0
        return (out / "model.safetensors").read_bytes()

    assert weights("once", 1) == weights("often", 64)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.backend_tokenizer.post_processor = begin
    tokenizer.save_pretrained(model)
    assert weights("begun-once", 1) != weights("begun-often", 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_the_rows_one_by_one(family: str, tmp_path: Path) -> None:
    """Both blocks, by gathering and by walking: sums, maxima, samples, counts of experts, keys and values."""
    skeleton = skeleton_of(tiny(family, tmp_path / "m"))
    together = Stream(skeleton, padded(rows()), tmp_path / "all")
    alone = [Stream(skeleton, torch.tensor([row]), tmp_path / str(n)) for n, row in enumerate(rows())]
    for stream in (together, *alone):
        stream.start()
    for i in range(2):
        block = skeleton.load_block(i)
        topology = discover(skeleton, i)
        block = skeleton.load_block(i)
        caches = [together.watch_cache(i, block), *(stream.watch_cache(i, block) for stream in alone)]
        for which in "kv":
            one, *others = (cache[which][0].transpose(1, 2).flatten(0, 1) for cache in caches)
            assert close(one, torch.cat(others))
        walked: dict[str, InputStats] = {}
        if i == 0:
            together.walk(i, block, topology, lambda space, found: walked.update({space.name: found}))  # noqa: B023
        wanted = merged([stream.gather_and_advance(i, block, topology)[0] for stream in alone])
        for got in (together.gather_and_advance(i, block, topology)[0], walked):
            for name, stats in got.items():
                assert stats.tokens == wanted[name].tokens and stats.routed == wanted[name].routed
                assert close(stats.gram, wanted[name].gram)
                assert close(stats.mean_abs, wanted[name].mean_abs) and close(stats.max_abs, wanted[name].max_abs)
    dense = wanted[topology.spaces[0].name]
    assert dense.tokens == sum(LENGTHS)


def test_a_sample_holds_no_padding(tmp_path: Path) -> None:
    skeleton = skeleton_of(tiny("llama", tmp_path / "m"))
    block = skeleton.load_block(0)
    topology = discover(skeleton, 0)
    block = skeleton.load_block(0)
    stream = Stream(skeleton, padded(rows()), tmp_path / "h")
    stream.start()
    seen: list[torch.Tensor] = []
    reader = block.get_submodule(topology.spaces[0].readers[0])
    handle = reader.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    stats = stream.gather(0, block, topology)[topology.spaces[0].name]
    handle.remove()
    batches = sorted(seen[-2:], key=len, reverse=True)  # before them the proof that the block looks at no later token
    real = torch.cat(batches)[padded(rows()) != NO_TOKEN]
    assert len(stats.sample) > 1
    assert all(bool((row == real).all(1).any()) for row in stats.sample)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_starved_expert_is_shown_tokens_only(family: str, tmp_path: Path) -> None:
    skeleton = skeleton_of(tiny(family, tmp_path / "m"))
    topology = discover(skeleton, 0)
    block = skeleton.load_block(0)
    stream = Stream(skeleton, padded(rows()), tmp_path / "h")
    stream.min_expert_tokens = 10**6
    stream.start()
    walked: dict[str, InputStats] = {}
    gathered = stream.gather(0, block, topology)
    stream.walk(0, block, topology, lambda space, found: walked.update({space.name: found}))
    for stats in (gathered, walked):
        routed = [stats[s.name] for s in topology.spaces if ".experts." in s.readers[0]]
        assert {found.tokens for found in routed} == {sum(LENGTHS)}
        assert sum(found.routed or 0 for found in routed) == 2 * 2 * sum(
            LENGTHS
        )  # two experts a token, two spaces each


def test_windows_are_filled_up_at_their_end() -> None:
    windows_NT = padded([[5, 6, 7], [8]])
    assert windows_NT.tolist() == [[5, 6, 7], [8, NO_TOKEN, NO_TOKEN]]
    assert real_tokens(torch.tensor([[1, 2], [3, 4]])) is None
    with pytest.raises(ValueError, match="end"):
        real_tokens(torch.tensor([[NO_TOKEN, 2], [3, 4]]))


def test_blocks_that_look_ahead_are_refused(tmp_path: Path) -> None:
    skeleton = skeleton_of(tiny("llama", tmp_path / "m"))
    block, call = skeleton.load_block(0), skeleton.calls(1, 8)[0]
    hidden_BTC = torch.randn(1, 8, skeleton.width, generator=torch.Generator().manual_seed(1))
    check_causal("layer", block, call, hidden_BTC)
    call.kwargs["attention_mask"] = torch.zeros(1, 1, 8, 8)  # everyone sees everyone
    with pytest.raises(Unsupported, match="later tokens"):
        check_causal("layer", block, call, hidden_BTC)


def test_the_search_of_bits_does_not_look_at_padding(tmp_path: Path) -> None:
    """What the change of a block's output costs is the mean over tokens, each row's by its length."""
    skeleton = skeleton_of(tiny("llama", tmp_path / "m"))
    streams = [Stream(skeleton, padded(rows()), tmp_path / "all")]
    streams += [Stream(skeleton, torch.tensor([row]), tmp_path / str(n)) for n, row in enumerate(rows())]
    for stream in streams:
        stream.start()
    block = skeleton.load_block(0)
    with torch.no_grad():
        outputs = [list(stream.outputs(0, block)) for stream in streams]
        block.get_submodule("mlp.down_proj").weight.mul_(1.1)
        gradients = [[torch.where(out > 0, 1.0, out) for out in before] for before in outputs]
        found = zip(streams, outputs, gradients, strict=True)
        whole, *parts = (_loss(stream, 0, block, before, felt) for stream, before, felt in found)
    assert whole == pytest.approx(
        sum(n * part for n, part in zip(LENGTHS, parts, strict=True)) / sum(LENGTHS), rel=1e-5
    )
