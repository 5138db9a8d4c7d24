"""NVIDIA ModelOpt: its INT4 AWQ preset (awq_lite) with the group size of the comparison, exported as it exports.

Its export does not load in plain transformers, so the weights that its quantized model computes with are saved
beside it, in `dequantized/`, one file per layer: the 4-bit weight times the scale that the layer puts on its input.
The perplexity is taken from those; the size from the export.
"""

from __future__ import annotations

import copy
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from runner import arguments, finish, stopwatch, windows
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def preset(bits: int, group_size: int) -> dict:
    """INT4_AWQ_CFG with this grid: its one entry for the weights is replaced."""
    config = copy.deepcopy(mtq.INT4_AWQ_CFG)
    entries = [entry for entry in config["quant_cfg"] if entry["quantizer_name"] == "*weight_quantizer"]
    if len(entries) != 1:
        raise SystemExit("INT4_AWQ_CFG has not one entry for the weights in this version of ModelOpt")
    entries[0]["cfg"] = {**entries[0]["cfg"], "num_bits": bits, "block_sizes": {-1: group_size, "type": "static"}}
    return config


def save_dequantized(model: torch.nn.Module, folder: Path) -> None:
    """What each quantized layer multiplies by, float32 [O, I], under its own name."""
    folder.mkdir(parents=True)
    for name, layer in model.named_modules():
        quantizer = getattr(layer, "weight_quantizer", None)
        if quantizer is None or not quantizer.is_enabled:
            continue
        w_OI = quantizer(layer.weight.float().contiguous())
        scale_I = layer.input_quantizer.pre_quant_scale
        if scale_I is not None:
            w_OI = w_OI * scale_I.float()
        save_file({f"{name}.weight": w_OI.contiguous()}, folder / f"{name}.safetensors")


def main() -> None:
    options = arguments("awq")
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.torch_dtype).eval()
    data = windows(options)

    def forward_loop(model: torch.nn.Module) -> None:
        for row in data:
            model(row[None])

    result: dict[str, object] = {}
    with torch.no_grad():
        with stopwatch(result):
            mtq.quantize(model, preset(options.bits, options.group_size), forward_loop)
        save_dequantized(model, options.out / "dequantized")
        export_hf_checkpoint(model, export_dir=str(options.out / "export"))
    finish(options, result, "nvidia-modelopt")


if __name__ == "__main__":
    main()
