"""Does vLLM read `infopt shard --layout vllm`? A tiny llama in every scheme that infopt writes so, at TP 1 and 2.

For each scheme vLLM's CPU build loads the folder itself and its `sharded_state` files at the same degree. Both must give the
same log-probabilities, bit for bit: what vLLM fuses and cuts while loading is what infopt fused and cut. The last column is
the distance between vLLM, unsharded, and infopt's own runtime.

    python benchmarks/interop/sharded_state.py --results results [--venvs DIR] [--tp 1,2]
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
from transformers import LlamaConfig, LlamaForCausalLM

from infopt.runtime.model import RuntimeModel

SCHEMES = {
    "float": None,
    "W4A16": ["--bits", "4", "--group-size", "64"],
    "W4A16 asymmetric": ["--bits", "4", "--group-size", "64", "--asym"],
    "GPTQ": ["--bits", "4", "--group-size", "64", "--format", "gptq"],
    "AWQ": ["--bits", "4", "--group-size", "64", "--asym", "--format", "awq"],
    "W8A8": ["--scheme", "W8A8"],
    "FP8_DYNAMIC": ["--scheme", "FP8_DYNAMIC"],
}
IDS = list(range(5, 28))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--venvs", type=Path, default=Path(".venv-interop"))
    parser.add_argument("--tp", default="1,2")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    folders = {name: make(options.results, name, flags) for name, flags in SCHEMES.items()}
    ids = options.results / "ids.json"
    ids.write_text(json.dumps(IDS))
    lines = ["| scheme | TP | sharded_state against the folder | vLLM against infopt |", "| --- | --- | --- | --- |"]
    for tp in map(int, options.tp.split(",")):
        whole, cut = options.results / f"whole-tp{tp}", options.results / f"cut-tp{tp}"
        for place, load in ((whole, "auto"), (cut, "sharded_state")):
            place.mkdir(exist_ok=True)
            jobs = [
                f"{slug(name)}={folder if load == 'auto' else shards(folder, tp)}" for name, folder in folders.items()
            ]
            flags = ["--tp", str(tp), "--load-format", load, "--ids", str(ids), "--out", str(place), *jobs]
            run_engine(options.venvs, "vllm", flags, options.results / "vllm.log", options.threads)
        lines += [row(name, folder, tp, whole, cut) for name, folder in folders.items()]
    table = "\n".join(lines)
    (options.results / "sharded_state.md").write_text(table + "\n")
    print(table)
    return 0


def make(results: Path, name: str, flags: list[str] | None) -> Path:
    model, out = results / "float", results / slug(name)
    if out.exists():
        return out
    if flags is None:
        torch.manual_seed(0)
        sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
        LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(torch.bfloat16).save_pretrained(out)
    else:
        infopt("quantize", str(model), "--method", "rtn", *flags, "--no-verify", "-o", str(out))
    return out


def shards(folder: Path, tp: int) -> Path:
    out = folder.with_name(f"{folder.name}-tp{tp}")
    if not out.exists():
        infopt("shard", str(folder), "--tp", str(tp), "--layout", "vllm", "-o", str(out))
    return out


def infopt(*arguments: str) -> None:
    subprocess.run([str(Path(sys.executable).parent / "infopt"), *arguments], check=True, capture_output=True)


def slug(name: str) -> str:
    return name.lower().replace(" ", "-")


def row(name: str, folder: Path, tp: int, whole: Path, cut: Path) -> str:
    said = []
    for place in (whole, cut):
        error = place / f"{slug(name)}.error"
        if not (place / f"{slug(name)}.npy").exists():
            said.append(error.read_text()[:120] if error.exists() else "the process ended")
    if said:
        return f"| {name} | {tp} | {'; '.join(said)} | |"
    want, got = (np.load(place / f"{slug(name)}.npy") for place in (whole, cut))
    apart = float(np.abs(want - got).max())
    return f"| {name} | {tp} | {'bit-identical' if apart == 0 else f'{apart:.1e}'} | {difference(want, ours(folder)):.1e} |"


def ours(folder: Path) -> np.ndarray:
    """Log-probabilities from infopt's runtime."""
    model = RuntimeModel(folder)
    hidden_NTC = model.last_hidden(torch.tensor([IDS]))
    model.load_outer()
    return log_softmax(model.logits(hidden_NTC[0, :-1]).numpy())


if __name__ == "__main__":
    sys.exit(main())
