"""llm-compressor: round to nearest, or GPTQ with its own defaults, saved as compressed-tensors."""

from __future__ import annotations

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from runner import arguments, finish, stopwatch, windows
from transformers import AutoModelForCausalLM


def main() -> None:
    options = arguments("rtn", "gptq")
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.torch_dtype)
    weights = {
        "num_bits": options.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": options.group_size,
    }
    modifier = GPTQModifier if options.method == "gptq" else QuantizationModifier
    recipe = modifier(ignore=["lm_head"], config_groups={"group_0": {"targets": ["Linear"], "weights": weights}})
    result: dict[str, object] = {}
    with stopwatch(result):
        if options.method == "gptq":
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


if __name__ == "__main__":
    main()
