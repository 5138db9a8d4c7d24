"""transformers: any folder that its quantizers know, and GGUF files; float32 where the layers allow it.

A model counts as loaded only if no tensor was missing or left over: transformers fills gaps with random numbers and says so
in a log line alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from engine import serve
from transformers import AutoModelForCausalLM


def logits(folder: Path, ids: list[int]) -> np.ndarray:
    gguf = {"gguf_file": "model.gguf"} if (folder / "model.gguf").exists() else {}
    problems = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        try:
            model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **gguf)
            check(report)
            with torch.no_grad():
                return model.eval()(torch.tensor([ids])).logits[0].float().numpy()
        except (ValueError, RuntimeError, NotImplementedError, TypeError, AssertionError) as error:
            problems.append(f"{str(dtype).removeprefix('torch.')}: {type(error).__name__}: {error}")
    raise RuntimeError(problems[0])


def check(report: dict[str, object]) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report.get(kind) or ())):  # type: ignore[call-overload]
            raise RuntimeError(f"{len(names)} {kind}, the first is {names[0]}")


if __name__ == "__main__":
    serve(logits, "transformers", "torch")
