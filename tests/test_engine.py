"""The engine: the tokens of transformers and of full recomputation, whatever the pages, pieces, neighbours and cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from infopt.errors import BadInput, OutOfResources, Unsupported, UsageError
from infopt.memory import release
from infopt.runtime.bench import forget_peak, peak
from infopt.runtime.engine import GRIDS, Engine
from infopt.runtime.model import RuntimeModel
from infopt.runtime.paged import PAGE, PagedCache
from infopt.runtime.sampling import Sampler, Sampling
from infopt.runtime.scheduler import Scheduler, Text

from .tools import every_second, infopt, text, tiny

NEW = 24
WINDOWED = ("gemma2", "gemma3", "mistral")


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]


def answers(engine: Engine, asked: list[list[int]], chunk: int = 512, at_once: int | None = None) -> list[list[int]]:
    """Greedy tokens, through the scheduler, with places for `at_once` texts."""
    texts = [Text(prompt, NEW) for prompt in asked]
    longest = max(map(len, asked)) + NEW
    scheduler = Scheduler(engine, engine.cache(longest, at_once or len(asked), chunk))
    for one in texts:
        scheduler.submit(one)
    said: dict[int, list[int]] = {id(one): [] for one in texts}
    for one, token in scheduler.run():
        said[id(one)].append(token)
    assert [said[id(one)] for one in texts] == [one.tokens for one in texts]
    assert {one.finish for one in texts} == {"length"}
    assert all(len(ring.free) * PAGE + PAGE == ring.slots for ring in scheduler.cache.rings.values())  # all given back
    return [one.tokens for one in texts]


@pytest.mark.parametrize("family", every_second(0))
def test_greedy_tokens_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """Alone, in pieces of 3 tokens (shorter than the window and across pages), together, and waiting for a place."""
    folder = tiny(family, tmp_path / "m")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    asked = prompts(5, 19, 11)
    wanted = []
    for prompt in asked:
        ids = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        wanted.append(ids[0, len(prompt) :].tolist())
    engine = Engine(folder)
    assert [answers(engine, [prompt])[0] for prompt in asked] == wanted
    assert answers(engine, asked) == wanted
    assert answers(engine, asked, chunk=3) == wanted
    assert answers(engine, asked, chunk=4, at_once=2) == wanted


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text(tmp_path_factory.mktemp("text"))


def quantized(family: str, folder: Path, words: Path, *flags: object, **options: object) -> Path:
    model = tiny(family, folder / "m", dtype=torch.bfloat16, **options)
    done = infopt("quantize", model, "-o", folder / "o", "--group-size", 32, "--dataset", words, "--num-samples", 4,
                  "--seqlen", 32, "--no-verify", *flags)  # fmt: skip
    assert done.code == 0, done.err
    return folder / "o"


def recomputed(folder: Path, prompt: list[int], new: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens without a cache: the whole text is read again for each; and the last logits."""
    model, ids = RuntimeModel(folder), list(prompt)
    logits_V = torch.empty(0)
    for _ in range(new):
        hidden_NTC = model.last_hidden(torch.tensor([ids]))
        model.load_outer()
        logits_V = model.logits(hidden_NTC[0, -1:])[0]
        model.free_outer()
        ids.append(int(logits_V.argmax()))
    return ids[len(prompt) :], logits_V


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "gpt2", "falcon_new"])
def test_quantized_folders_against_full_recomputation(family: str, words: Path, tmp_path: Path) -> None:
    folder = quantized(family, tmp_path, words, "--method", "rtn")
    prompt = prompts(21)[0]
    engine = Engine(folder)
    wanted, logits_V = recomputed(folder, prompt, 6)
    cache = engine.cache(64, chunk=8)
    place = cache.admit(64)
    engine.prefill(cache, place, prompt)
    got, last_V = [wanted[0]], torch.empty(0)
    for token in wanted[:-1]:
        last_V = engine.advance(cache, [place], torch.tensor([[token]]))[0]
        got.append(int(last_V.argmax()))
    assert got == wanted
    torch.testing.assert_close(last_V, logits_V, rtol=1e-4, atol=1e-4)


FEWER = {
    "fp8": 2,
    "int8": 2,
    "int4": 4,
    "fp8-balanced": 2,
    "int8-balanced": 16 / (8 + 1),
    "int4-balanced": 16 / (4 + 1.5),
}


@pytest.mark.parametrize("name", FEWER)
def test_a_calibrated_cache_holds_what_verify_measured_in_fewer_bytes(name: str, words: Path, tmp_path: Path) -> None:
    """Packed bytes, and the numbers of `RoundingCache`: 2, 2 and 4 times fewer than bf16, scales counted (of 16 channels where
    each token has its own). Of neighbours and in pieces too."""
    folder = quantized("llama", tmp_path, words, "--method", "rtn", "--kv-cache", name)
    prompt = prompts(21)[0]
    engine = Engine(folder)
    cache = engine.cache(64, chunk=512)
    place = cache.admit(64)
    ours_V = engine.prefill(cache, place, prompt)
    wanted_V = recomputed(folder, prompt, 1)[1]
    torch.testing.assert_close(ours_V, wanted_V, rtol=1e-4, atol=1e-4)
    float_V = (plain := Engine(folder, cache="float")).prefill(floats := plain.cache(64), floats.admit(64), prompt)
    assert not torch.allclose(ours_V, float_V, rtol=1e-4, atol=1e-4)
    assert cache.float_bytes_per_token / cache.bytes_per_token == pytest.approx(FEWER[name])
    assert floats.nbytes / cache.nbytes == pytest.approx(2 * FEWER[name])
    assert engine.cache(64).nbytes == 0
    asked = prompts(9, 21)
    alone = [answers(engine, [prompt])[0] for prompt in asked]
    assert answers(engine, asked) == alone
    assert answers(engine, asked, chunk=5) == alone


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_first_tokens_that_a_window_has_left(family: str, words: Path, tmp_path: Path) -> None:
    """They are kept as they are for as long as a layer sees them: the text again as a whole gives the same answer."""
    folder = quantized(family, tmp_path, words, "--method", "kv-cache", "--kv-cache", "int4-balanced")
    engine, prompt = Engine(folder), prompts(21)[0]
    wanted, logits_V = recomputed(folder, prompt, 6)
    cache = engine.cache(64, chunk=8)
    place = cache.admit(64)
    last_V = engine.prefill(cache, place, [*prompt, *wanted[:-1]])
    torch.testing.assert_close(last_V, logits_V, rtol=1e-3, atol=1e-3)
    assert place.sinks is not None and place.sinks.shape[2] == 1


@pytest.mark.parametrize("name", sorted(GRIDS))
@pytest.mark.parametrize("family", ["llama", "gemma3", "falcon_old"])
def test_a_cache_that_the_user_asks_for(family: str, name: str, tmp_path: Path) -> None:
    """The answers of neighbours, pieces and one at a time agree; the bytes are those that `CacheGrid` promises."""
    folder = tiny(family, tmp_path / "m")
    engine = Engine(folder, cache=name)
    asked = prompts(9, 21)
    alone = [answers(engine, [prompt])[0] for prompt in asked]
    assert answers(engine, asked) == alone
    assert answers(engine, asked, chunk=5) == alone
    cache = engine.cache(32)
    logits_V = engine.prefill(cache, cache.admit(32), asked[1])
    text_config = engine.config
    heads = {"llama": 2, "gemma3": 2, "falcon_old": 1}[family]
    per_layer = GRIDS[name].bytes_per_token(heads, 16)
    assert cache.bytes_per_token == per_layer * text_config.num_hidden_layers
    plain = Engine(folder)
    floats = plain.cache(32)
    float_V = plain.prefill(floats, floats.admit(32), asked[1])
    error = (logits_V - float_V).norm() / float_V.norm()
    assert 0 < error < {"fp8": 0.1, "int8": 0.05, "int4": 0.5}[name]


@pytest.mark.parametrize("family", WINDOWED)
def test_layers_with_a_window_hold_pages_for_the_window(family: str, tmp_path: Path) -> None:
    """Their memory does not grow with the text, and pages that were used by others are as good as new ones."""
    engine = Engine(tiny(family, tmp_path / "m"))
    sizes = {}
    for tokens in (100, 200):
        cache = engine.cache(tokens, chunk=8)
        engine.prefill(cache, cache.admit(tokens), prompts(tokens)[0])
        sizes[tokens] = [sum(part.nbytes for part in store.parts()) for store in cache.stores]
    windowed = [kind.window is not None for kind in engine.kinds]
    assert any(windowed)
    for slides, short, long in zip(windowed, sizes[100], sizes[200], strict=True):
        assert long == short if slides else long > 1.5 * short
    used = engine.cache(NEW + 19, chunk=8)
    first, again = (Scheduler(engine, used) for _ in range(2))
    told = []
    for scheduler, prompt in ((first, prompts(19)[0][::-1]), (again, prompts(19)[0])):
        scheduler.submit(Text(prompt, NEW))
        told.append([token for _, token in scheduler.run()])
    assert told[1] == answers(engine, [prompts(19)[0]])[0]
    assert told[0] != told[1]


def test_texts_come_and_go_at_every_step(tmp_path: Path) -> None:
    """Some are admitted while others are written, one ends early; nobody's tokens change."""
    engine = Engine(tiny("qwen3", tmp_path / "m"))
    asked = prompts(4, 30, 9, 17, 6)
    alone = [answers(engine, [prompt])[0] for prompt in asked]
    stop = alone[0][3]
    scheduler = Scheduler(engine, engine.cache(30 + NEW, 2, chunk=7), frozenset([stop]))
    texts = [Text(prompt, NEW) for prompt in asked]
    most = 0
    for one in texts:
        scheduler.submit(one)
        scheduler.step()
        most = max(most, len(scheduler.writing))
    for _ in scheduler.run():
        most = max(most, len(scheduler.writing))
    assert most >= 2
    for one, whole in zip(texts, alone, strict=True):
        ends = stop in whole
        assert one.tokens == (whole[: whole.index(stop)] if ends else whole)
        assert one.finish == ("stop" if ends else "length")
    assert texts[0].finish == "stop"


def test_sampling() -> None:
    logits_V = torch.tensor([0.0, 3.0, 2.0, 1.0, 3.0 - 1e-3])
    assert Sampler().choose(logits_V) == 1
    draw = lambda **options: [Sampler(Sampling(seed=s, **options)).choose(logits_V) for s in range(200)]  # noqa: E731
    assert set(draw(temperature=5.0)) == {0, 1, 2, 3, 4}
    assert set(draw(temperature=1.0, top_k=2)) == {1, 4}
    assert set(draw(temperature=1.0, top_p=0.3)) == {1}
    assert set(draw(temperature=1.0, top_p=0.75)) == {1, 4}
    assert draw(temperature=2.0) == draw(temperature=2.0)
    counts = torch.bincount(torch.tensor(draw(temperature=1.0)), minlength=5) / 200
    assert (counts - logits_V.softmax(0)).abs().max() < 0.12
    for wrong in ({"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_k": -1}, {"seed": -1}):
        with pytest.raises(UsageError):
            Sampling(**wrong)


def test_draws_do_not_depend_on_neighbours(tmp_path: Path) -> None:
    engine = Engine(tiny("llama", tmp_path / "m"))
    asked = prompts(5, 12)
    texts = [Text(prompt, NEW, Sampling(1.5, seed=i)) for i, prompt in enumerate(asked)]
    both = Scheduler(engine, engine.cache(40, 2))
    for one in texts:
        both.submit(one)
    for _ in both.run():
        pass
    for i, prompt in enumerate(asked):
        alone = Text(prompt, NEW, Sampling(1.5, seed=i))
        single = Scheduler(engine, engine.cache(40))
        single.submit(alone)
        assert [token for _, token in single.run()] == texts[i].tokens


def test_what_the_engine_refuses(tmp_path: Path) -> None:
    engine = Engine(tiny("llama", tmp_path / "m"))
    with pytest.raises(BadInput, match="256 positions"):
        engine.check_prompt([5] * 256)
    with pytest.raises(UsageError, match="empty"):
        engine.check_prompt([])
    with pytest.raises(BadInput, match="128 tokens"):
        engine.check_prompt([5, 128])
    with pytest.raises(OutOfResources, match="does not fit"):
        Scheduler(engine, engine.cache(32)).submit(Text([5] * 30, NEW))
    with pytest.raises(OutOfResources, match="keeps track"):
        PagedCache(engine.kinds, 10**12)
    with pytest.raises(OutOfResources, match="needs"):
        engine._check_memory(1000)
    engine._check_memory(10**9)
    folder = tiny("llama", tmp_path / "odd", head_dim=6)
    with pytest.raises(Unsupported):  # a state, not keys and values
        import transformers as hf

        state = hf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=128, state_size=4)
        hf.MambaForCausalLM(state).save_pretrained(tmp_path / "mamba")
        Engine(tmp_path / "mamba")
    assert Engine(folder, cache="int4").cache(16) is not None


def test_no_step_is_longer_than_a_chunk(tmp_path: Path) -> None:
    """Which is what keeps a mask from growing with the square of a text."""
    engine = Engine(tiny("llama", tmp_path / "m"))
    cache = engine.cache(64, chunk=8)
    place = cache.admit(64)
    with pytest.raises(ValueError, match="more tokens"):
        engine.advance(cache, [place], torch.full((1, 9), 5))
    engine.prefill(cache, place, [5] * 60)
    assert place.length == 60
    with pytest.raises(ValueError, match="more tokens"):
        engine.advance(cache, [place], torch.full((1, 5), 5))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["exact", "packed"])
def test_the_memory_of_a_long_prompt_grows_with_its_length(precision: str, tmp_path: Path) -> None:
    engine = Engine(tiny("llama", tmp_path / "m", max_position_embeddings=16384), precision)
    grown = []
    for tokens in (8192, 16384):
        cache = engine.cache(tokens)
        place = cache.admit(tokens)
        release()
        forget_peak()
        before = peak()
        engine.prefill(cache, place, prompts(tokens)[0])
        grown.append(peak() - before)
    assert grown[1] < 2.2 * grown[0]


def test_generate_streams_what_json_tells(words: Path, tmp_path: Path) -> None:
    folder = quantized("llama", tmp_path, words, "--method", "rtn")
    flags = ("--prompt", "hello there", "--max-new-tokens", 12)
    said = infopt("generate", folder, *flags)
    assert said.code == 0, said.err
    told = json.loads(infopt("generate", folder, *flags, "--json").out)
    answer = told["answers"][0]
    assert said.out == answer["text"] + "\n"
    assert answer["prompt_tokens"] == len("hello there")
    assert len(answer["tokens"]) <= 12
    drawn = [infopt("generate", folder, *flags, "--temperature", 3, "--seed", seed).out for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    several = infopt("generate", folder, *flags, "--prompt", "and now this", "--precision", "packed")
    assert several.code == 0 and "> and now this" in several.out
    both = json.loads(infopt("generate", folder, *flags, "--prompt", "and now this", "--json").out)["answers"]
    assert both[0] == answer


def test_generate_stops_at_the_end_of_the_context(tmp_path: Path) -> None:
    folder = tiny("llama", tmp_path / "m", max_position_embeddings=16, eos_token_id=None)
    done = infopt("generate", folder, "--prompt", "0123456789", "--max-new-tokens", 50, "--json")
    answer = json.loads(done.out)["answers"][0]
    assert answer["finish"] == "context" and len(answer["tokens"]) == 7  # the last one is not read again
    assert "16 positions" in done.err


def test_generate_refusals(tmp_path: Path) -> None:
    folder = tiny("llama", tmp_path / "m")
    cases = [
        (3, ("--prompt", "x" * 300)),
        (2, ("--prompt", "")),
        (2, ()),
        (2, ("--prompt", "x", "--max-new-tokens", 0)),
        (2, ("--prompt", "x", "--top-p", 2)),
        (2, ("--prompt", "x", "--kv-cache", "int3")),
        (3, ("--prompt", "x", "--chat")),
    ]
    for code, flags in cases:
        done = infopt("generate", folder, *flags)
        assert done.code == code, (flags, done.err)
        assert "Traceback" not in done.err and not done.out
    (folder / "chat_template.jinja").write_text("{{ messages[0].missing.attribute() }}")
    assert infopt("generate", folder, "--prompt", "x", "--chat").code == 3
    assert infopt("shard", folder, "--tp", 2, "-o", tmp_path / "shards").code == 0
    done = infopt("bench", tmp_path / "shards")
    assert done.code == 2 and "infopt assemble" in done.err
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    done = infopt("generate", folder, "--prompt", "x")
    assert done.code == 6 and "not finite" in done.err
    assert infopt("generate", tmp_path / "nowhere", "--prompt", "x").code in (3, 4)
