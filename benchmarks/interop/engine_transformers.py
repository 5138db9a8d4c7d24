"""transformers: any folder that its quantizers know, and GGUF files; float32 where the layers allow it.

A model counts as loaded only if no tensor was missing or left over: transformers fills gaps with random numbers and says so
in a log line alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from engine import Answer, serve
from transformers import AutoModelForCausalLM, CompressedTensorsConfig


def logits(folder: Path, ids: list[int]) -> Answer:
    gguf = {"gguf_file": "model.gguf"} if (folder / "model.gguf").exists() else {}
    tries: list[tuple[torch.dtype, dict[str, object]]] = [
        (dtype, gguf) for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ]
    if not gguf and "compressed-tensors" in (folder / "config.json").read_text():
        tries.append((torch.float32, {"quantization_config": CompressedTensorsConfig(dequantize=True)}))
    problems = []
    for dtype, options in tries:
        try:
            values = run(folder, ids, dtype, options)
        except (ValueError, RuntimeError, NotImplementedError, TypeError, AssertionError) as error:
            problems.append(f"{str(dtype).removeprefix('torch.')}: {type(error).__name__}: {error}")
        else:
            if "quantization_config" in options:
                return values, f"with CompressedTensorsConfig(dequantize=True); else {problems[0]}"
            return values
    raise RuntimeError(problems[0])


def run(folder: Path, ids: list[int], dtype: torch.dtype, options: dict[str, object]) -> np.ndarray:
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    check(report)
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0].float().numpy()


def check(report: dict[str, object]) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report.get(kind) or ())):  # type: ignore[call-overload]
            raise RuntimeError(f"{len(names)} {kind}, the first is {names[0]}")


if __name__ == "__main__":
    serve(logits, "transformers", "torch")
