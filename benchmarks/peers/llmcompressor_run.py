"""llm-compressor: round to nearest, GPTQ with its own defaults, or SmoothQuant before them; saved as compressed-tensors.

Its examples for W8A8 put SmoothQuant of strength 0.8 before GPTQ: `smoothquant+gptq` is that.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from runner import arguments, finish, stopwatch, windows
from transformers import AutoModelForCausalLM

PRESETS = ("W8A8", "FP8_DYNAMIC", "FP8", "FP8_BLOCK")
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
# Gemma's norm before gate and up. The table of llm-compressor 0.14 names the norm after the attention, which does not
# write what they read: the model would be another one.
GEMMA = [
    (["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"),
    (["re:.*gate_proj", "re:.*up_proj"], "re:.*pre_feedforward_layernorm"),
]


def main() -> None:
    options = arguments("rtn", "gptq", "smoothquant", "smoothquant+gptq", "kv-cache")
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.torch_dtype)
    recipe = steps(options, model)
    result: dict[str, object] = {}
    with stopwatch(result):
        if options.samples:
            rows = windows(options)
            ids = [row.tolist() for row in rows]
            data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
            oneshot(
                model=model,
                dataset=data,
                recipe=recipe,
                max_seq_length=len(ids[0]),
                num_calibration_samples=len(ids),
            )
        else:
            oneshot(model=model, recipe=recipe)
    with torch.no_grad():
        model.save_pretrained(options.out, save_compressed=True)
    finish(options, result, "llmcompressor")


def steps(options: argparse.Namespace, model: torch.nn.Module) -> list[Modifier]:
    """The recipe of a method and a scheme."""
    kind = GPTQModifier if options.method.endswith("gptq") else QuantizationModifier
    found: list[Modifier] = [kind(ignore=["lm_head"], **grid(options))]
    if options.method.startswith("smoothquant"):
        gemma = any(name.endswith("pre_feedforward_layernorm") for name, _ in model.named_modules())
        found.insert(0, SmoothQuantModifier(smoothing_strength=0.8, mappings=GEMMA if gemma else None))
    return found


def grid(options: argparse.Namespace) -> dict[str, Any]:
    """What weights, and inputs, are rounded to, or keys and values."""
    if options.scheme == "KV_FP8":
        cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
        return {"kv_cache_scheme": cache}
    if options.scheme == "W8A8_STATIC":
        inputs = {**INT8, "strategy": "tensor", "dynamic": False}
        both = {"weights": {**INT8, "strategy": "channel"}, "input_activations": inputs}
        return {"config_groups": {"group_0": {"targets": ["Linear"], **both}}}
    if options.scheme in PRESETS:
        return {"targets": "Linear", "scheme": options.scheme}
    weights = {
        "num_bits": options.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": options.group_size,
    }
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


if __name__ == "__main__":
    main()
