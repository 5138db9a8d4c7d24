"""Tiny random checkpoints of many families, written to disk by transformers itself."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as hf
from torch import nn

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
WINDOWED = {**GROUPED, "head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
OPT = {
    "hidden_size": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    **SPECIAL,
}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 256, **SPECIAL}
FALCON = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_hidden_size": 128,
    "vocab_size": 128,
}

ROUTED = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True}

FAMILIES: dict[str, tuple[type, dict]] = {
    "llama": (hf.LlamaConfig, GROUPED),
    "mistral": (hf.MistralConfig, {**GROUPED, "sliding_window": 4}),
    "qwen2": (hf.Qwen2Config, GROUPED),
    "qwen3": (hf.Qwen3Config, {**GROUPED, "head_dim": 32}),
    "gemma2": (hf.Gemma2Config, WINDOWED),
    "gemma3": (hf.Gemma3TextConfig, WINDOWED),
    "phi": (hf.PhiConfig, COMMON),
    "phi3": (hf.Phi3Config, GROUPED),
    "opt": (hf.OPTConfig, {**OPT, "max_position_embeddings": 256, "word_embed_proj_dim": 64}),
    "gpt2": (hf.GPT2Config, GPT2),
    "gpt_neox": (hf.GPTNeoXConfig, COMMON),
    "cohere": (hf.CohereConfig, GROUPED),
    "olmo2": (hf.Olmo2Config, GROUPED),
    "starcoder2": (hf.Starcoder2Config, GROUPED),
    "falcon_old": (hf.FalconConfig, {**FALCON, **SPECIAL, "multi_query": True, "parallel_attn": True}),
    "falcon_alibi": (
        hf.FalconConfig,
        {**FALCON, **SPECIAL, "multi_query": False, "parallel_attn": False, "alibi": True},
    ),
    "falcon_new": (hf.FalconConfig, {**FALCON, **SPECIAL, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "granite": (hf.GraniteConfig, {**GROUPED, "residual_multiplier": 0.5, "attention_multiplier": 0.3}),
    "mixtral": (hf.MixtralConfig, {**GROUPED, "num_local_experts": 4}),
    "qwen3_moe": (hf.Qwen3MoeConfig, {**GROUPED, **ROUTED, "head_dim": 16}),
}


def make(family: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: object) -> Path:
    """Write a random checkpoint of the family to `folder`; every parameter matters to the output."""
    kind, fields = FAMILIES[family]
    model = hf.AutoModelForCausalLM.from_config(kind(**{**fields, **overrides}), dtype=dtype)
    randomise(model, seed)
    model.save_pretrained(folder)
    return folder


def randomise(model: nn.Module, seed: int = 0, std: float = 0.08) -> None:
    """Matrices around 0, norm weights around their neutral value, biases that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_scale = parameter.dim() == 1 and not name.endswith("bias")
        # A weight that starts near zero is multiplied as 1 + w; others start at one.
        centre = float(parameter.detach().float().mean().round()) if is_scale else 0.0
        parameter.data.copy_(centre + noise * (0.2 if is_scale else std))
