"""What a recipe's run has to know and to say about mixtures of experts: what stays float, how many tokens each expert saw,
and which experts were calibrated on something else than their own tokens. Nothing of it happens silently."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from infopt.calibration.stats import InputStats
from infopt.errors import Unsupported
from infopt.experts import Experts, experts_in, is_stack
from infopt.header import read_json
from infopt.model import Skeleton

WHOLE_BATCH, NO_DATA = "whole batch", "no data"


def float_parts(skeleton: Skeleton) -> dict[str, str]:
    """What stays float around experts, {module path: reason}: stacks that could not be split, routers, gates."""
    kept = dict(skeleton.stacked)
    for block in skeleton.blocks:
        for path, module in skeleton.model.get_submodule(block).named_modules(prefix=block):
            if isinstance(module, Experts) or is_stack(module):
                count = len(module) if isinstance(module, Experts) else len(next(module.parameters(recurse=False)))
                kept.update(_routers(skeleton, path, count))
    return kept


def _routers(skeleton: Skeleton, experts: str, count: int) -> dict[str, str]:
    """The matrices beside a layer of experts with one output for each expert, or with a single one."""
    parent = experts.rpartition(".")[0]
    found = {}
    for path, module in skeleton.model.get_submodule(parent).named_modules(prefix=parent):
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is None or weight.dim() != 2 or path.startswith(f"{experts}."):
            continue
        outputs = weight.shape[1] if isinstance(module, Conv1D) else weight.shape[0]
        if outputs == count:
            found[path] = "a router: it chooses among the experts"
        elif outputs == 1:
            found[path] = "a gate with a single output"
    return found


def names_in_file(skeleton: Skeleton, names: Iterable[str]) -> dict[str, str]:
    """{module path: the name that the checkpoint gives it}, for modules whose weight is stored as one tensor."""
    found = {}
    for name in names:
        block = max((b for b in skeleton.blocks if name.startswith(f"{b}.")), key=len, default="")
        if not block:
            continue
        with suppress(Unsupported):
            key = skeleton.weight_key(skeleton.blocks.index(block), name.removeprefix(f"{block}."))
            found[name] = key.removesuffix(".weight")
    return found


def split_names(skeleton: Skeleton, names: Iterable[str]) -> list[str]:
    """Those of the names that are projections of single experts."""
    inside = tuple(f"{path}." for path in experts_in(skeleton.model))
    return [name for name in names if name.startswith(inside)]


def ignored_names(skeleton: Skeleton, kept: Iterable[str]) -> list[str]:
    """The names under which an engine may meet what stays float: the definition's own, and the checkpoint's."""
    inside = set(split_names(skeleton, kept))
    beside = float_parts(skeleton)
    own = [name for name in kept if name not in inside and _is_matrix(skeleton.model.get_submodule(name))]
    stored = names_in_file(skeleton, [name for name in kept if name in inside or name in beside])
    return sorted({*own, *stored.values(), *skeleton.stacked})


def _is_matrix(module: nn.Module) -> bool:
    """Whether an engine may take the module for a linear layer: it is one, or it has a matrix as a router has."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return weight is not None and weight.dim() == 2 and not isinstance(module, Conv1D)


def statistics_bytes(skeleton: Skeleton) -> int:
    """The memory for the statistics of all experts of a block at once, of the block where it is largest."""
    return max(
        sum(4 * linear.in_features**2 for linear in _readers(skeleton.model.get_submodule(block)))
        for block in skeleton.blocks
    )


def _readers(block: nn.Module) -> list[nn.Linear]:
    """One linear layer for each space inside the block's experts."""
    one_each = [
        (expert.get_submodule(expert.roles.up), expert.get_submodule(expert.roles.down))
        for experts in experts_in(block).values()
        for expert in experts.each()
    ]
    return [linear for pair in one_each for linear in pair if isinstance(linear, nn.Linear)]


# What a run has seen


def facts(stats: InputStats | None) -> dict[str, Any]:
    """For infopt.json: the tokens that the router sent to an expert, and what stood in where they were too few."""
    if stats is None or stats.routed is None:
        return {}
    shown = WHOLE_BATCH if stats.tokens > stats.routed else NO_DATA if stats.tokens == 0 else None
    return {"tokens": stats.routed, "fallback": shown}


def tell(layers: Mapping[str, Any]) -> list[str]:
    """One line for each layer of experts. layers: as in infopt.json, by the checkpoint's names."""
    groups: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for name, layer in layers.items():
        path, _, _ = name.rpartition(".")
        experts, _, number = path.rpartition(".")
        if isinstance(layer, Mapping) and isinstance(layer.get("tokens"), int) and _is_number(number):
            groups[experts][int(number)] = dict(layer)
    return [f"{path}: {_sentence(found)}" for path, found in groups.items()]


def expert_lines(folder: Path) -> list[str]:
    """`tell` for a folder that infopt made; nothing for another folder. BadInput if its infopt.json is no JSON."""
    path = folder / "infopt.json"
    report = read_json(path) if path.is_file() else None
    layers = report.get("layers") if isinstance(report, dict) else None
    return tell(layers) if isinstance(layers, dict) else []


def _sentence(experts: dict[int, dict[str, Any]]) -> str:
    tokens = sorted(expert["tokens"] for expert in experts.values())
    said = f"{tokens[0]} to {tokens[-1]} calibration tokens an expert, median {tokens[len(tokens) // 2]}"
    for fallback, what in ((WHOLE_BATCH, "calibrated on the whole batch"), (NO_DATA, "rounded without data")):
        which = [number for number, expert in sorted(experts.items()) if expert.get("fallback") == fallback]
        if which:
            said += f"; {len(which)} of {len(tokens)} {what}, for lack of tokens: {_some(which)}"
    return said


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) < 10


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:16])) + (", ..." if len(numbers) > 16 else "")


def merged(notes: list[str], block: nn.Module) -> list[str]:
    """The same note for many experts, once."""
    paths = [re.escape(path) for path in experts_in(block)]
    if not paths:
        return notes
    number = re.compile(rf"(?<=\b)({'|'.join(paths)})\.\d+")
    alike: dict[str, list[str]] = defaultdict(list)
    for note in notes:
        alike[number.sub(r"\1.*", note)].append(note)
    return [f"{text} ({len(same)} experts)" if len(same) > 1 else same[0] for text, same in alike.items()]
