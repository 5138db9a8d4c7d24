"""The sizes in config.json against the tensors that are really there, before anything is built from them.

A model definition allocates and loops by the numbers in its config: a file that says 10^9 layers would keep
transformers busy for hours, and a vocabulary of 2^62 overflows. Every such number has a witness in the headers of the
weights, which are already validated against the file sizes, so a lie is found in milliseconds by comparing the two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from infopt.errors import BadInput

WIDTHS = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
MAX_POSITIONS = 2**25  # some definitions build [positions, head_dim] tables as buffers; no model is near this
FIX = "Download the model again, or correct that field in config.json."


def layer_indices(names: Iterator[str] | list[str]) -> dict[str, set[int]]:
    """{prefix: indices} for the first numeric part of each dotted name: "model.layers.3.x" -> {"model.layers": {3}}."""
    found: dict[str, set[int]] = defaultdict(set)
    for name in names:
        parts = name.split(".")
        for at, part in enumerate(parts):
            if part.isdecimal() and len(part) < 10:
                found[".".join(parts[:at])].add(int(part))
                break
    return found


def check_sizes(config: Mapping[str, Any], attribute_map: Mapping[str, str], tensors: Mapping[str, Any]) -> None:
    """Raise BadInput, naming config.json and the field, where a size cannot be true of these tensors.

    config: the raw dict of config.json. attribute_map: the config class's own spelling of the common names
    ({"hidden_size": "n_embd"}). tensors: name -> anything with `.shape`.
    """
    if not tensors:
        raise BadInput("The checkpoint has no tensors.", "Nothing can be read from it.", "Download the model again.")
    largest = max((size for info in tensors.values() for size in info.shape), default=1)
    indices = layer_indices(list(tensors))
    for section in _sections(config):
        fields = _Fields(section, attribute_map)
        _check_layers(fields, indices)
        for name in WIDTHS:
            spelled, value = fields.positive(name)
            if value is not None and value > largest:
                raise _bad(spelled, value, f"The largest dimension of any tensor in the checkpoint is {largest}.")
        spelled, value = fields.positive("max_position_embeddings")
        if value is not None and value > max(MAX_POSITIONS, largest):
            raise _bad(spelled, value, f"More than {MAX_POSITIONS} positions are not believable.")
        _check_heads(fields)
        _check_experts(section, largest)


def _sections(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The config itself, and the text part of a composite one."""
    text = config.get("text_config")
    return [config, text] if isinstance(text, Mapping) else [config]


class _Fields:
    """One section of the config, asked by the common names."""

    def __init__(self, section: Mapping[str, Any], attribute_map: Mapping[str, str]) -> None:
        self.section, self.attribute_map = section, attribute_map

    def positive(self, name: str) -> tuple[str, int | None]:
        """(the name as spelled in the file, its value or None); BadInput unless the value is a positive integer.

        Values of other shapes (a list with one size per layer) are left to the config class, which knows its own types.
        """
        spelled = name if name in self.section else self.attribute_map.get(name, name)
        value = self.section.get(spelled)
        if value is None or isinstance(value, list | dict):
            return spelled, None
        if isinstance(value, bool) or not isinstance(value, int):
            raise _bad(spelled, value, "It must be a whole number.")
        if value <= 0:
            raise _bad(spelled, value, "It must be positive.")
        return spelled, value


def _check_layers(fields: _Fields, indices: Mapping[str, set[int]]) -> None:
    spelled, count = fields.positive("num_hidden_layers")
    if count is None:
        return
    prefix = max(indices, key=lambda name: len(indices[name]), default="")
    present = len(indices.get(prefix, ()))
    if count > present:
        raise _bad(spelled, count, f"The checkpoint has tensors for {present} layers ({prefix or 'none numbered'}).")


def _check_heads(fields: _Fields) -> None:
    _, hidden = fields.positive("hidden_size")
    head_name, heads = fields.positive("num_attention_heads")
    group_name, groups = fields.positive("num_key_value_heads")
    if heads is None:
        return
    if groups is not None and (groups > heads or heads % groups):
        raise _bad(group_name, groups, f"It must divide {head_name}, which is {heads}.")
    own_head_dim = any("head_dim" in key for key in fields.section)
    if hidden is not None and hidden % heads and not own_head_dim:
        raise _bad(head_name, heads, f"It does not divide the hidden size {hidden}, and no head_dim is given.")


def _check_experts(section: Mapping[str, Any], largest: int) -> None:
    """A router has a row for each expert; a model may say that it has none."""
    for name in EXPERTS:
        count, chosen = section.get(name), section.get("num_experts_per_tok")
        if type(count) is not int or count == 0:
            continue
        if not 0 < count <= largest:
            raise _bad(name, count, f"The largest dimension of any tensor in the checkpoint is {largest}.")
        if type(chosen) is int and not 0 < chosen <= count:
            raise _bad("num_experts_per_tok", chosen, f"{name} is {count}.")


def _bad(field: str, value: object, why: str) -> BadInput:
    return BadInput(f"config.json: {field} is {str(value)[:40]}.", why, FIX)
