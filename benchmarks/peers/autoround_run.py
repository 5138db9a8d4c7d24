"""AutoRound: its default tuning (sign descent on the rounding, `--iters` steps for each block), saved in the GPTQ format.

It gets the ids as batches of one window each, in place of a data set's name; all else but the grid is its default.
"""

from __future__ import annotations

from auto_round import AutoRound
from runner import arguments, finish, stopwatch, windows
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    options = arguments("autoround")
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.torch_dtype)
    rows = windows(options)
    tuner = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(options.model),
        bits=options.bits,
        group_size=options.group_size,
        sym=True,
        iters=options.iters,
        dataset=[row[None] for row in rows],
        nsamples=len(rows),
        seqlen=len(rows[0]),
        device_map="cpu",
    )
    result: dict[str, object] = {}
    with stopwatch(result):
        tuner.quantize()
    tuner.save_quantized(str(options.out), format="auto_gptq", inplace=True)
    finish(options, result, "auto-round")


if __name__ == "__main__":
    main()
