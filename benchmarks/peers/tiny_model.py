"""A tiny random Llama with another model's tokenizer, to try a peer's runner on. Runs in infopt's environment."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM


def main() -> None:
    original, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=AutoConfig.from_pretrained(original).vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        if (original / name).exists():
            shutil.copy(original / name, out / name)


if __name__ == "__main__":
    main()
