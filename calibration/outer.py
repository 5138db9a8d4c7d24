"""What lies outside the decoder blocks, sorted by when the model uses it: before the first block, after the last, or both.

A pipeline's first stage needs the embeddings, its last one the final norm and the head, and names do not tell which is which.
So the model is run with its blocks stubbed, and the last stub hands over hidden states that are all NaN: whoever reads a
NaN comes after the blocks, whoever does not comes before.

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from infopt.cells import Outer
from infopt.model import Skeleton

_TOKENS = 4


def find_outer(skeleton: Skeleton) -> Outer:
    """Run the outer parts once; they are loaded for the time of this call. A parameter that no module reads is in both."""
    own = {name: module for name, module in _outer_modules(skeleton) if any(True for _ in module.parameters(False))}
    readings: dict[str, set[bool]] = {name: set() for name in own}
    handles = [module.register_forward_pre_hook(_note(readings[name])) for name, module in own.items()]
    hidden = torch.full((1, _TOKENS, skeleton.config.get_text_config().hidden_size), float("nan"))
    try:
        with skeleton.outer_loaded():
            skeleton.logits(hidden)
    finally:
        for handle in handles:
            handle.remove()
    sources = skeleton.outer_sources()
    sides: dict[bool, set[str]] = {False: set(), True: set()}
    for name, module in own.items():
        for part, _ in module.named_parameters(recurse=False):
            for side in readings[name] or {False, True}:
                sides[side].update(_keys(skeleton.model, sources, f"{name}.{part}"))
    vocabulary = set()
    for module in (skeleton.model.get_input_embeddings(), skeleton.model.get_output_embeddings()):
        for name in (name for name, other in own.items() if other is module):
            for part, _ in module.named_parameters(recurse=False):
                vocabulary.update(_keys(skeleton.model, sources, f"{name}.{part}"))
    return Outer(frozenset(sides[False]), frozenset(sides[True]), frozenset(vocabulary))


def _note(seen: set[bool]) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.add(any(isinstance(x, Tensor) and x.is_floating_point() and bool(x.isnan().any()) for x in args))

    return hook


def _keys(model: nn.Module, sources: dict[str, list[str]], name: str) -> list[str]:
    """The checkpoint keys of a parameter; of the one that it is tied to, where it has none of its own."""
    if name in sources:
        return sources[name]
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    return sources.get(tied.get(name, ""), [])


def _outer_modules(skeleton: Skeleton) -> Iterator[tuple[str, nn.Module]]:
    inside = tuple(f"{block}." for block in skeleton.blocks)
    for name, module in skeleton.model.named_modules():
        if name not in skeleton.blocks and not name.startswith(inside):
            yield name, module
