"""Write a random Llama of any depth as a sharded Hugging Face folder, one block per shard and never more in memory.

    python benchmarks/synthetic_llama.py FOLDER BLOCKS HIDDEN INTERMEDIATE

Its tokenizer has one token per byte, so it reads any text.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HEAD_DIM = 64


def main() -> None:
    folder = Path(sys.argv[1])
    blocks, hidden, intermediate = map(int, sys.argv[2:5])
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    vocab = write_tokenizer(folder)
    heads = hidden // HEAD_DIM
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "head_dim": HEAD_DIM,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    index: dict[str, str] = {}
    size = 0
    for number in range(blocks + 1):
        tensors = outer(vocab, hidden) if number == 0 else block(number - 1, config)
        name = f"model-{number + 1:05}-of-{blocks + 1:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
        size += sum(value.nbytes for value in tensors.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def outer(vocab: int, hidden: int) -> dict[str, torch.Tensor]:
    return {"model.embed_tokens.weight": _random(vocab, hidden), "model.norm.weight": _ones(hidden)}


def block(number: int, config: dict) -> dict[str, torch.Tensor]:
    hidden, middle = config["hidden_size"], config["intermediate_size"]
    keys = config["num_key_value_heads"] * HEAD_DIM
    queries = config["num_attention_heads"] * HEAD_DIM
    shapes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (middle, hidden),
        "mlp.up_proj": (middle, hidden),
        "mlp.down_proj": (hidden, middle),
    }
    start = f"model.layers.{number}"
    tensors = {f"{start}.{name}.weight": _random(*shape) for name, shape in shapes.items()}
    norms = ("input_layernorm", "post_attention_layernorm")
    return tensors | {f"{start}.{name}.weight": _ones(hidden) for name in norms}


def write_tokenizer(folder: Path) -> int:
    """One token per byte; returns the size of the vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return len(alphabet)


def _random(*shape: int) -> torch.Tensor:
    return (torch.randn(*shape) * 0.02).to(torch.bfloat16)


def _ones(width: int) -> torch.Tensor:
    return torch.ones(width, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
