"""The model that a rewrite leads to: its config, and its definition with the tensors that get another shape.

The changed shapes are those of transformers' own definition for the changed config; nothing is computed from head counts here.
A `Reshaped` stands for the checkpoint: it gives every tensor of the source, and random numbers of the new shape where that has
changed. They are overwritten by the rewrite, and good enough to measure which rows make which head.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from infopt.definition import Weights, build_config, build_model
from infopt.errors import Unsupported
from infopt.model import Skeleton

_KV_FIELDS = ("num_key_value_heads", "num_kv_heads")


class Reshaped:
    """`source` with some tensors in another shape, random ones."""

    def __init__(self, source: Weights, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._source, self._shapes = source, shapes
        self.tensors = {
            name: replace(info, shape=shapes[name]) if name in shapes else info for name, info in source.tensors.items()
        }

    def get(self, name: str) -> Tensor:
        if name not in self._shapes:
            return self._source.get(name)
        shape = self._shapes[name]
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.randn(shape, generator=generator) / max(shape[-1], 1) ** 0.5


def kv_settings(skeleton: Skeleton, wanted: int) -> dict[str, Any]:
    """The key of config.json that says how many key-value heads there are, with its new value.

    Raises Unsupported for latent attention, for models without heads, and for types that have no such key.
    """
    text = skeleton.config.get_text_config()
    what = f"--kv-heads {wanted}: {text.model_type}"
    if getattr(text, "kv_lora_rank", None):
        why = "its keys and values come from one latent vector (MLA), which is smaller than grouped heads already"
        raise Unsupported(f"{what} has no key-value heads of its own", why, "leave --kv-heads out")
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise Unsupported(f"{what} has no attention heads", "there is nothing to group", "leave --kv-heads out")
    for name in _KV_FIELDS:
        if isinstance(getattr(text, name, None), int):
            return {type(text).attribute_map.get(name, name): wanted}
    raise Unsupported(
        f"{what} cannot have fewer key-value heads than heads",
        "its config has no field for their number, so no engine would load the result",
        "use a type with grouped heads: llama, mistral, qwen2, qwen3, gemma, phi, phi3, starcoder2, falcon",
    )


def changed_config(config: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """config.json's dict with other settings: in its text part, where it has one."""
    if isinstance(config.get("text_config"), dict):
        return {**config, "text_config": {**config["text_config"], **settings}}
    return {**config, **settings}


def target_skeleton(skeleton: Skeleton, config: dict[str, Any]) -> tuple[Skeleton, dict[str, tuple[int, ...]]]:
    """(the model of `config` over the same checkpoint, the new shapes by checkpoint key).

    Raises Unsupported where other parameters than the blocks' would change, or a changed one is no tensor of its own.
    """
    model = build_model(build_config(config, skeleton.weights), skeleton.dtype)
    # With duplicates: tied parameters are one until the outer parts have been loaded and freed.
    new = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    plain = build_model(skeleton.config, skeleton.dtype)  # with stacked experts, as the new one has them
    old = {name: tuple(parameter.shape) for name, parameter in plain.named_parameters(remove_duplicate=False)}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in new.keys() | old.keys():
        if new.get(name) == old.get(name):
            continue
        place = next((i for i, block in enumerate(skeleton.blocks) if name.startswith(f"{block}.")), None)
        if place is None or name not in new or name not in old:
            raise Unsupported(
                f"the change would reach {name}", "infopt rewrites the decoder blocks alone", "use another model"
            )
        shapes[skeleton.tensor_key(place, name.removeprefix(f"{skeleton.blocks[place]}."))] = new[name]
    return Skeleton(config, Reshaped(skeleton.weights, shapes), skeleton.dtype), shapes
