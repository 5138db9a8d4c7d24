"""Text over tensor-parallel ranks is the same text as in one process, and each rank keeps its own heads."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from infopt.errors import BadInput
from infopt.runtime.engine import Engine, KVCache
from infopt.runtime.rank import RankModel
from infopt.runtime.scheduler import Scheduler, Text
from infopt.shards import SOURCE

from .test_engine import prompts
from .test_parallel import Meeting
from .tools import infopt, text, tiny

NEW = 12


def sharded(model: Path, folder: Path, tp: int) -> Path:
    done = infopt("shard", model, "--tp", tp, "-o", folder)
    assert done.code == 0, done.err
    return folder


def written(engine: Engine, asked: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of all texts together, their prompts read in pieces."""
    texts = [Text(prompt, NEW) for prompt in asked]
    scheduler = Scheduler(engine, engine.cache(max(map(len, asked)) + NEW, 2, chunk=8))
    for one in texts:
        scheduler.submit(one)
    for _ in scheduler.run():
        pass
    return [one.tokens for one in texts]


def in_threads(folder: Path, tp: int, asked: list[list[int]], cache: KVCache) -> list[tuple[Engine, list[list[int]]]]:
    """Each rank's engine and tokens."""
    meeting, found = Meeting(tp), {}
    parts = [RankModel(folder, 0, rank, meeting.reduce(rank)) for rank in range(tp)]
    for part in parts:  # loading is not safe beside another thread's
        part.load_outer()
        for i in part.blocks:
            part.load_block(i)

    def work(rank: int) -> None:
        try:
            engine = Engine(folder / SOURCE, "exact", cache, parts[rank])
            found[rank] = engine, written(engine, asked)
        except BaseException:
            meeting.barrier.abort()
            raise

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(tp)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(tp)]


@pytest.mark.parametrize(
    ("family", "cache"),
    [("llama", "stored"), ("gemma2", "int8"), ("phi3", "int4"), ("gpt2", "stored"), ("falcon_new", "stored"),
     ("mixtral", "stored")],
)  # fmt: skip
def test_ranks_write_what_one_process_writes(family: str, cache: KVCache, tmp_path: Path) -> None:
    """Separate, fused and interleaved projections, windows, biases, experts; texts in pieces; each rank in a thread."""
    model = tiny(family, tmp_path / "m")
    asked = prompts(5, 19, 11)
    wanted = written(Engine(model, cache=cache), asked)
    ranks = in_threads(sharded(model, tmp_path / "s", 2), 2, asked, cache)
    assert [tokens for _, tokens in ranks] == [wanted, wanted]
    heads = [[set(kind.heads or ()) for kind in engine.kinds] for engine, _ in ranks]
    for first, second in zip(*heads, strict=True):
        assert first and second
        assert not first & second or family == "falcon_new"  # heads that a rank's queries share are on both


def test_a_rank_keeps_its_heads_pages_and_no_others(tmp_path: Path) -> None:
    model = tiny("llama", tmp_path / "m")
    asked = prompts(5)
    whole = Engine(model)
    sizes = []
    for engine, _ in in_threads(sharded(model, tmp_path / "s", 2), 2, asked, "stored"):
        cache = engine.cache(16)
        for store, kind in zip(cache.stores, engine.kinds, strict=True):
            keys, _ = store.pages(len(kind.heads or ()), 16)
            assert keys.heads == 1
        sizes.append(cache.bytes_per_token)
    cache = whole.cache(16)
    whole.prefill(cache, cache.admit(16), asked[0])
    assert [2 * size for size in sizes] == [cache.bytes_per_token] * 2


# Real processes, through the command line


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 bits, with a calibrated cache of 8."""
    place = tmp_path_factory.mktemp("ranks")
    model = tiny("llama", place / "m", hidden_size=128, num_key_value_heads=4)
    asked = ["--method", "rtn", "--group-size", 32, "--kv-cache", "int8", "--dataset", text(place), "--num-samples", 2]
    done = infopt("quantize", model, *asked, "--seqlen", 32, "--no-verify", "-o", place / "q")
    assert done.code == 0, done.err
    return place / "q"


@pytest.mark.parametrize("tp", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_generate_starts_the_ranks(tp: int, quantized: Path, tmp_path: Path) -> None:
    shards = sharded(quantized, tmp_path / "s", tp)
    asked = ["--prompt", "hello there", "--prompt", "and now something longer", "--max-new-tokens", NEW, "--json"]
    wanted, found = (infopt("generate", folder, *asked) for folder in (quantized, shards))
    assert wanted.code == found.code == 0, found.err
    assert json.loads(found.out)["answers"] == json.loads(wanted.out)["answers"]


def test_what_ranks_refuse(quantized: Path, tmp_path: Path) -> None:
    assert infopt("shard", quantized, "--tp", 1, "--pp", 2, "-o", tmp_path / "pp").code == 0
    done = infopt("generate", tmp_path / "pp", "--prompt", "x")
    assert done.code == 4 and "2 pipeline stages" in done.err and "infopt assemble" in done.err
    shards = sharded(quantized, tmp_path / "s", 2)
    path = shards / "pp0-tp1" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    done = infopt("generate", shards, "--prompt", "x")
    assert done.code == 3 and "rank 1" in done.err and "Traceback" not in done.err


def test_a_rank_of_another_model_is_noticed(tmp_path: Path) -> None:
    """The comparison above can fail: ranks whose answers are not added up write another text."""
    model = tiny("llama", tmp_path / "m")
    asked = prompts(19)
    part = RankModel(sharded(model, tmp_path / "s", 2), 0, 0, lambda tensor: None)
    engine = Engine(tmp_path / "s" / SOURCE, part=part)
    assert written(engine, asked) != written(Engine(model), asked)
    with pytest.raises(BadInput, match="300 tokens"):
        engine.check_prompt([5] * 300)
