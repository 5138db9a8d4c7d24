"""Tokens per second of infopt's packed kernels beside llama.cpp on the same codes and transformers in fp32.

The three read the same random tokens in turns, in one process with the same threads, so whatever else the machine does falls on
all of them; the table has the median and the fastest tenth of all steps. Needs llama-cpp-python for its column.

    infopt quantize ./smollm2 --method rtn --group-size 32 -o smollm2-w4
    infopt convert ./smollm2-w4 --format gguf -o smollm2-gguf
    python benchmarks/cpu_decode.py smollm2-w4 --gguf smollm2-gguf/model.gguf --reference ./smollm2
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from infopt.runtime.engine import Engine
from infopt.runtime.sampling import most_likely

Run = Callable[[list[int], int], Iterator[float]]  # a prompt, steps -> seconds of the prompt, then of each step
STEPS, CONTEXT, PREFILL = 32, 128, 512


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    engine = Engine(options.model, "packed")
    runs: dict[str, tuple[Run, int]] = {"infopt": (ours(engine, 1), 1)}
    runs[f"infopt x {options.batch}"] = ours(engine, options.batch), options.batch
    if options.gguf:
        runs["llama.cpp"] = llama(options.gguf, options.threads), 1
    if options.reference:
        runs["transformers fp32"] = transformers(options.reference), 1
    ids = torch.randint(5, engine.config.vocab_size, (PREFILL,), generator=torch.Generator().manual_seed(0)).tolist()
    prefill: dict[str, list[float]] = {name: [] for name in runs}
    steps: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(options.rounds + 1):
        for name, (run, batch) in runs.items():
            first = next(run(ids, 0)) / batch
            times = list(run(ids[:CONTEXT], STEPS))[1:]
            if round_:  # the first is a warm-up
                prefill[name].append(first)
                steps[name] += times
    said = {name: figures(prefill[name], steps[name], batch) for name, (_, batch) in runs.items()}
    for name, row in said.items():
        print(f"{name:18}", *(f"{key} {value:8.1f}" for key, value in row.items()), sep="   ")
    if options.json:
        options.json.write_text(json.dumps(said, indent=1) + "\n")
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder with 4-bit weights")
    parser.add_argument("--gguf", type=Path, help="the same codes for llama.cpp")
    parser.add_argument("--reference", type=Path, help="the float model for transformers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="texts at once in the second row")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def figures(prefill: list[float], steps: list[float], batch: int) -> dict[str, float]:
    tenth = statistics.quantiles(steps, n=10)[0]
    return {
        f"prefill {PREFILL}, tokens/s": PREFILL / min(prefill),
        "decode, tokens/s, median": batch / statistics.median(steps),
        "fastest tenth": batch / tenth,
    }


def timed(act: Callable[[], Any]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def ours(engine: Engine, batch: int) -> Run:
    def run(prompt: list[int], count: int) -> Iterator[float]:
        cache = engine.cache(len(prompt) + count, batch)
        places = [place for _ in range(batch) if (place := cache.admit(len(prompt) + count)) is not None]
        yield timed(lambda: [engine.prefill(cache, place, prompt) for place in places])
        for _ in range(count):
            yield timed(lambda: most_likely(engine.advance(cache, places, torch.full((batch, 1), 7), fine=False)))

    return run


def llama(path: Path, threads: int) -> Run:
    from llama_cpp import Llama

    model = Llama(
        str(path),
        n_ctx=1024,
        n_threads=threads,
        n_threads_batch=threads,
        n_batch=PREFILL,
        n_ubatch=PREFILL,
        verbose=False,
    )

    def run(prompt: list[int], count: int) -> Iterator[float]:
        model.reset()
        yield timed(lambda: model.eval(prompt))
        for _ in range(count):
            yield timed(lambda: model.eval([7]))

    return run


def transformers(path: Path) -> Run:
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def run(prompt: list[int], count: int) -> Iterator[float]:
        cache = DynamicCache()
        with torch.inference_mode():
            yield timed(lambda: model(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1))
            for _ in range(count):
                yield timed(lambda: model(torch.tensor([[7]]), past_key_values=cache).logits.argmax(-1))

    return run


if __name__ == "__main__":
    sys.exit(main())
