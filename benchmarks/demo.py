"""The end of `make demo`: the same question to the original and to the compressed model, and what was gained.

    python benchmarks/demo.py MODEL OUT

Both run on infopt's own engine: the original in fp32, the compressed one on its packed weights. Greedy, so that the same
model says the same thing.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Literal

from infopt.calibration.data import load_tokenizer
from infopt.cli.generate import encode
from infopt.runtime.engine import Engine
from infopt.runtime.scheduler import Scheduler, Text

QUESTION = "What is the capital of France, and what is it known for?"
TOKENS = 40


def answer(folder: Path, precision: Literal["exact", "packed"]) -> tuple[str, float]:
    """The model's own words, and how many tokens it wrote in a second (the first, which waits for the prompt, left out)."""
    tokenizer = load_tokenizer(folder)
    engine = Engine(folder, precision)
    text = Text(encode(tokenizer, QUESTION, chat=True), TOKENS)
    scheduler = Scheduler(engine, engine.cache(len(text.prompt) + TOKENS), engine.stop_ids())
    scheduler.submit(text)
    times = [time.perf_counter() for _ in scheduler.run()]
    words = " ".join(tokenizer.decode(text.tokens, skip_special_tokens=True).split())
    return words, (len(times) - 1) / max(times[-1] - times[0], 1e-9) if times else 0.0


def weights(folder: Path) -> float:
    """Megabytes of weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6


def main(original: Path, compressed: Path) -> None:
    print(f"\n{QUESTION}")
    for folder, precision in ((original, "exact"), (compressed, "packed")):
        words, speed = answer(folder, precision)
        print(f"  {folder.name} ({weights(folder):.0f} MB, {speed:.0f} tokens/s): {words}")
    quality = json.loads((compressed / "verification.json").read_text())
    print(
        f"\n{weights(original) / weights(compressed):.2f} times smaller. The whole verdict: {compressed}/verification.json"
    )
    if not quality.get("passed", True):
        sys.exit("the verdict says that verification failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
