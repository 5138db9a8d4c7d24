"""GPTQModel: gptq and awq folders through its own loader, computed by its plain torch kernel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from engine import serve
from gptqmodel import BACKEND, GPTQModel


def logits(folder: Path, ids: list[int]) -> np.ndarray:
    model = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
    with torch.no_grad():
        return model.model(torch.tensor([ids])).logits[0].float().numpy()


if __name__ == "__main__":
    serve(logits, "gptqmodel", "transformers", "torch")
