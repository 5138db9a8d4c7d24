"""llama.cpp through llama-cpp-python. It rounds activations to 8 bits, in blocks of 32, for every quantized layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from engine import serve
from llama_cpp import Llama


def logits(folder: Path, ids: list[int]) -> np.ndarray:
    path = folder / "model.gguf"
    if not path.exists():
        raise ValueError("it reads GGUF files")
    model = Llama(str(path), n_ctx=len(ids) + 1, n_batch=len(ids) + 1, n_threads=1, logits_all=True, verbose=False)
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


if __name__ == "__main__":
    serve(logits, "llama_cpp_python")
