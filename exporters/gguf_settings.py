"""A model's settings as GGUF metadata, for the architectures where transformers and llama.cpp compute the same.

Each architecture lists what its config must say for that to hold: llama.cpp fixes what has no key. Keys as in gguf's
constants (github.com/ggml-org/llama.cpp, gguf-py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from infopt.errors import Unsupported

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "vocab_size",
    "max_position_embeddings",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class Architecture:
    """arch: GGUF's name. objection: why a config means something else than llama.cpp computes, None if it does not.

    compared: the settings that transformers must read back from the file as they were.
    """

    arch: str
    objection: Callable[[Any], str | None]
    compared: tuple[str, ...] = _SIZES


def _plain(config: Any) -> str | None:
    """What all architectures here need: gated SiLU, full attention, rotary embeddings without scaling."""
    if config.hidden_act != "silu":
        return f"hidden_act is {config.hidden_act!r}"
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return "some layers have sliding windows"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return f"sliding_window is {config.sliding_window}"
    return _rope(config.rope_parameters)


def _gemma3(config: Any) -> str | None:
    kinds = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(config.num_hidden_layers)]
    if list(config.layer_types) != kinds:
        return "its sliding and full layers are not five to one"
    if config.hidden_activation != "gelu_pytorch_tanh":
        return f"hidden_activation is {config.hidden_activation!r}"
    if config.query_pre_attn_scalar != config.head_dim:
        return f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, and llama.cpp takes the head size"
    if config.attn_logit_softcapping or config.final_logit_softcapping:
        return "its logits are capped"
    return _rope(config.rope_parameters["full_attention"]) or _rope(config.rope_parameters["sliding_attention"])


def _rope(rope: dict[str, Any]) -> str | None:
    if rope.get("rope_type", "default") != "default":
        return f"its rotary embeddings are scaled ({rope['rope_type']})"
    return "its rotary embeddings are partial" if rope.get("partial_rotary_factor", 1.0) != 1.0 else None


#: transformers' model_type -> what GGUF makes of it. Mistral without sliding windows is Llama to llama.cpp.
ARCHITECTURES = {
    "llama": Architecture("llama", _plain),
    "mistral": Architecture("llama", _plain),
    "qwen2": Architecture("qwen2", _plain),
    "qwen3": Architecture("qwen3", _plain),
    "gemma3_text": Architecture("gemma3", _gemma3, (*_SIZES, "head_dim", "sliding_window")),
}


def check_settings(config: Any, folder: Path) -> str:
    """GGUF's name of the architecture; Unsupported, with the reason, for a config that GGUF cannot say."""
    known = ARCHITECTURES.get(config.model_type)
    if known is None:
        why = f"infopt writes GGUF for {', '.join(ARCHITECTURES)}, and this is {config.model_type}"
    elif (objection := known.objection(config)) is None:
        return known.arch
    else:
        why = objection
    raise Unsupported(f"{folder} cannot become a GGUF file", why, "use llama.cpp's own converter on the original model")


def add_settings(writer: GGUFWriter, config: Any) -> None:
    """Add the architecture's keys; the writer knows its name already."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    if "full_attention" in rope:
        writer.add_rope_freq_base(rope["full_attention"]["rope_theta"])
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        writer.add_sliding_window(config.sliding_window)
    else:
        writer.add_rope_freq_base(rope["rope_theta"])
