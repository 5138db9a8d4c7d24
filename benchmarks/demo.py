"""The end of `make demo`: the same question to the original and to the compressed model, and what was gained.

    python benchmarks/demo.py MODEL OUT

Both are loaded by transformers, the compressed one through the compressed-tensors library: what infopt wrote is answered
for by an engine that is not infopt. Greedy, so that the same model says the same thing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

QUESTION = "What is the capital of France, and what is it known for?"
TOKENS = 40


def answer(folder: Path) -> str:
    """The model's own words, greedily, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=TOKENS, do_sample=False)
    return " ".join(tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).split())


def weights(folder: Path) -> float:
    """Megabytes of weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6


def main(original: Path, compressed: Path) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(f"\n{QUESTION}")
    for folder in (original, compressed):
        print(f"  {folder.name} ({weights(folder):.0f} MB): {answer(folder)}")
    quality = json.loads((compressed / "verification.json").read_text())
    print(
        f"\n{weights(original) / weights(compressed):.2f} times smaller. The whole verdict: {compressed}/verification.json"
    )
    if not quality.get("passed", True):
        sys.exit("the verdict says that verification failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
