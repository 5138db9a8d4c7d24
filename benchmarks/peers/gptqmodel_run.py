"""GPTQModel: GPTQ with its own defaults, saved in the GPTQ format.

On a machine with few cores it stops unless GPTQMODEL_CPU_WORKERS is set; `compare_peers.py` sets it.
"""

from __future__ import annotations

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from runner import arguments, finish, stopwatch, windows


def main() -> None:
    options = arguments("gptq")
    config = QuantizeConfig(bits=options.bits, group_size=options.group_size, sym=True)
    model = GPTQModel.load(options.model, config, device="cpu", dtype=options.torch_dtype)
    data = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in windows(options)]
    result: dict[str, object] = {}
    with stopwatch(result):
        model.quantize(data, batch_size=1)
    model.save(str(options.out))
    finish(options, result, "gptqmodel")


if __name__ == "__main__":
    main()
