"""How much of a perplexity is luck: one model rounded to W8A8 several times, in ways that mean nothing.

Every row multiplies each channel's scale with a random number between 1 and 1.008, one step of a bf16 number: all are as
good as plain rounding, the first row, and none knows the text. What their perplexities and KL differ by, no comparison of
two tools can show. Inputs are rounded to 8 bits for each token; fp32 on the processor.

    python benchmarks/rounding_luck.py ./smollm2 --eval-dataset test.raw.txt
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from infopt.calibration.data import DataSpec, load_tokenizer, load_windows
from infopt.grid import Inputs

_BATCH = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a Hugging Face folder")
    parser.add_argument("--eval-dataset", required=True, help="text of the perplexity")
    parser.add_argument("--eval-windows", type=int, default=40)
    parser.add_argument("--rows", type=int, default=6)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    spec = DataSpec(options.eval_dataset, options.eval_windows, 512)
    windows_NT, _ = load_windows(spec, load_tokenizer(options.model), part="evaluation")
    with torch.no_grad():
        hidden_NTC = [model.model(part_BT)[0][:, :-1] for part_BT in windows_NT.split(_BATCH)]
        layers = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "layers." in name]
        weights = [layer.weight.data.clone() for layer in layers]
        for layer in layers:
            layer.register_forward_pre_hook(lambda _, args: (Inputs().round(args[0]),))
        print(
            "| rounding | perplexity | nats above the original | mean KL | same first choice |\n" + "| --- " * 5 + "|"
        )
        for row in range(options.rows):
            generator = torch.Generator().manual_seed(row)
            for layer, w_OI in zip(layers, weights, strict=True):
                luck_O1 = torch.rand(len(w_OI), 1, generator=generator) if row else torch.zeros(len(w_OI), 1)
                scale_O1 = (w_OI.abs().amax(1, keepdim=True) / 127.5 * (1 + luck_O1 / 128)).clamp_min(1e-12)
                layer.weight.data = (w_OI / scale_O1).round().clamp(-128, 127) * scale_O1
            loss, above, kl, top1 = compared(model, windows_NT, hidden_NTC)
            print(f"| {row or 'plain'} | {loss.exp():.3f} | {above:+.4f} | {kl:.5f} | {top1:.2%} |", flush=True)


def compared(model: nn.Module, windows_NT: Tensor, hidden_NTC: list[Tensor]) -> Tensor:
    """(mean loss, the same above the original's, mean KL divergence, share of equal first choices)."""
    sums = torch.zeros(4, dtype=torch.float64)
    for ids_BT, hidden_BTC in zip(windows_NT.split(_BATCH), hidden_NTC, strict=True):
        then_BTV = torch.log_softmax(model.lm_head(hidden_BTC), -1)
        now_BTV = torch.log_softmax(model.lm_head(model.model(ids_BT)[0][:, :-1]), -1)
        then, now = (-part.gather(-1, ids_BT[:, 1:, None]).sum().double() for part in (then_BTV, now_BTV))
        kl = (then_BTV.exp() * (then_BTV - now_BTV)).sum().double()
        same = (then_BTV.argmax(-1) == now_BTV.argmax(-1)).sum().double()
        sums += torch.stack([now, now - then, kl, same])
    return sums / windows_NT[:, 1:].numel()


if __name__ == "__main__":
    main()
