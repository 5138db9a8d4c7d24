"""Does vLLM read `infopt shard --layout vllm`? A llama in every scheme that infopt writes so, at several TP degrees.

For each scheme vLLM's CPU build loads the folder itself and its `sharded_state` files at the same degree. Both must give the
same log-probabilities, bit for bit: what vLLM fuses and cuts while loading is what infopt fused and cut. The last two columns
are the distances of those files from the folder at TP 1 (the order of sums differs, and rounded inputs amplify that) and of
that from infopt's own runtime.

    python benchmarks/interop/sharded_state.py --results results [--model ./smollm2 --tp 1,3] [--venvs DIR]

Without --model it is a tiny random llama that two ranks can divide.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from engine import difference, log_softmax
from environments import run_engine
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from infopt.runtime.model import RuntimeModel

SCHEMES = {
    "float": None,
    "W4A16": ["--bits", "4", "--group-size", "64"],
    "W4A16 asymmetric": ["--bits", "4", "--group-size", "64", "--asym"],
    "GPTQ": ["--bits", "4", "--group-size", "64", "--format", "gptq"],
    "AWQ": ["--bits", "4", "--group-size", "64", "--asym", "--format", "awq"],
    "W8A8": ["--scheme", "W8A8"],
    "W8A8_STATIC": ["--scheme", "W8A8_STATIC", "--num-samples", "8", "--seqlen", "64"],
    "FP8_DYNAMIC": ["--scheme", "FP8_DYNAMIC"],
}
IDS = list(range(5, 28))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder of a llama")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--venvs", type=Path, default=Path(".venv-interop"))
    parser.add_argument("--tp", default="1,2")
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    folders = {name: make(options, name, SCHEMES[name]) for name in options.schemes.split(",")}
    ids = options.results / "ids.json"
    ids.write_text(json.dumps(IDS))
    titles = ("scheme", "TP", "sharded_state against the folder", "against the folder at TP 1", "which against infopt")
    lines = ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
    for tp in map(int, options.tp.split(",")):
        written = {name: folder for name, folder in folders.items() if tp == 1 or name != "W8A8_STATIC"}  # else refused
        whole, cut = options.results / f"whole-tp{tp}", options.results / f"cut-tp{tp}"
        for place, load in ((whole, "auto"), (cut, "sharded_state")):
            place.mkdir(exist_ok=True)
            jobs = [
                f"{slug(name)}={folder if load == 'auto' else shards(options.results, name, folder, tp)}"
                for name, folder in written.items()
                if not list(place.glob(f"{slug(name)}.*"))  # what was asked is not asked again
            ]
            flags = ["--tp", str(tp), "--load-format", load, "--ids", str(ids), "--out", str(place), *jobs]
            if jobs:
                run_engine(options.venvs, "vllm", flags, options.results / "vllm.log", options.threads)
        lines += [row(options.results, name, folder, tp) for name, folder in written.items()]
    table = "\n".join(lines)
    (options.results / "sharded_state.md").write_text(table + "\n")
    print(table)
    return 0


def make(options: argparse.Namespace, name: str, flags: list[str] | None) -> Path:
    model, out = options.model or options.results / "float", options.results / slug(name)
    if flags is None and options.model:
        return options.model
    if out.exists():
        return out
    if not model.exists():
        torch.manual_seed(0)
        sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
        LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(torch.bfloat16).save_pretrained(model)
        letters = Tokenizer(WordLevel({chr(32 + i): i for i in range(95)}, unk_token=" "))
        letters.pre_tokenizer = Split("", "isolated")
        PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(model)
    if flags is not None:
        infopt("quantize", str(model), "--method", "rtn", *flags, "--no-verify", "-o", str(out))
    return out


def shards(results: Path, name: str, folder: Path, tp: int) -> Path:
    out = results / f"{slug(name)}-tp{tp}"
    if not out.exists():
        infopt("shard", str(folder), "--tp", str(tp), "--layout", "vllm", "-o", str(out))
    return out


def infopt(*arguments: str) -> None:
    subprocess.run([str(Path(sys.executable).parent / "infopt"), *arguments], check=True, capture_output=True)


def slug(name: str) -> str:
    return name.lower().replace(" ", "-")


def row(results: Path, name: str, folder: Path, tp: int) -> str:
    said = []
    for place in ("whole", "cut"):
        error = results / f"{place}-tp{tp}" / f"{slug(name)}.error"
        if not error.with_suffix(".npy").exists():
            said.append(f"{place}: {error.read_text()[:200] if error.exists() else 'the process ended'}")
    if said:
        return f"| {name} | {tp} | {'; '.join(said)} | | |"
    want, got = (np.load(results / f"{place}-tp{tp}" / f"{slug(name)}.npy") for place in ("whole", "cut"))
    apart = float(np.abs(want - got).max())
    one = results / "whole-tp1" / f"{slug(name)}.npy"
    from_one, from_ours = ("-", "-") if not one.exists() else (
        f"{difference(got, np.load(one)):.1e}", f"{difference(np.load(one), ours(folder)):.1e}"
    )  # fmt: skip
    return f"| {name} | {tp} | {'bit-identical' if apart == 0 else f'{apart:.1e}'} | {from_one} | {from_ours} |"


def ours(folder: Path) -> np.ndarray:
    """Log-probabilities from infopt's runtime."""
    model = RuntimeModel(folder)
    hidden_NTC = model.last_hidden(torch.tensor([IDS]))
    model.load_outer()
    return log_softmax(model.logits(hidden_NTC[0, :-1]).numpy())


if __name__ == "__main__":
    sys.exit(main())
