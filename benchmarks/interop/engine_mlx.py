"""mlx-lm: MLX folders (its CPU build runs on Linux)."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
from engine import serve
from mlx_lm.utils import load_model


def logits(folder: Path, ids: list[int]) -> np.ndarray:
    model, _ = load_model(folder)
    return np.array(model(mx.array([ids]))[0].astype(mx.float32))


if __name__ == "__main__":
    serve(logits, "mlx-lm", "mlx")
