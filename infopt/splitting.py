"""Replacing a model's stacked experts by one linear layer per expert and projection (`infopt.experts`), before any weight
is read: where the checkpoint stores them so, and where the proof succeeds. One proof serves all layers that are alike."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from infopt.definition import Converters, KeyMap, Weights, small_twin
from infopt.experts import Expert, Experts, Proof, Roles, activation_of, is_stack, obstacle, table_of


def split_experts(model: PreTrainedModel, blocks: list[str], keys: KeyMap, weights: Weights) -> dict[str, str]:
    """Put `Experts` in for the stacks of the model, and tell `keys` which tensor is which layer's weight.

    Returns the stacks that stay as they are, {module path: reason}.
    """
    converters = Converters(model)
    proven: dict[Hashable, tuple[Roles | None, str]] = {}
    ready: list[tuple[int, str, Experts, dict[str, str]]] = []
    left: dict[str, str] = {}
    for number, block in enumerate(blocks):
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            if not is_stack(module):
                continue
            stack = _Stack(name, module, keys, weights, converters)
            roles, reason = stack.roles(proven)
            if roles is None:
                left[name] = f"{type(module).__name__}: {reason}"
            else:
                ready.append((number, name, *stack.replacement(roles)))
    for number, name, experts, paths in ready:  # after the last proof: transformers' renaming looks at the whole model
        model.set_submodule(name, experts)
        keys.split[number].update(paths)
        for key, path in paths.items():
            keys.one_to_one[path].append(key)
    return left


class _Stack:
    """One module with stacked experts, and the checkpoint tensors that transformers would stack."""

    def __init__(self, path: str, module: nn.Module, keys: KeyMap, weights: Weights, converters: Converters) -> None:
        self.path, self.module, self.weights, self.converters = path, module, weights, converters
        names = [name for name, _ in module.named_parameters(recurse=False)]
        self.sources = {name: keys.converted.get(f"{path}.{name}", []) for name in names}
        count = len(next(module.parameters(recurse=False)))
        self.table = table_of([key for found in self.sources.values() for key in found], count)

    def roles(self, proven: dict[Hashable, tuple[Roles | None, str]]) -> tuple[Roles | None, str]:
        """The proven roles of the projections, or None and the reason. `proven` remembers the proofs of other layers."""
        if outside := obstacle(self.module):
            return None, outside
        if not all(self.sources.values()):
            return None, "the checkpoint stores the experts stacked, not one by one"
        if self.table is None:
            return None, "the checkpoint's tensors are not one for each expert and projection"
        shapes = {name: {tuple(self.weights.tensors[key].shape) for key in keys} for name, keys in self.table.items()}
        if any(len(found) != 1 or len(next(iter(found))) != 2 for found in shapes.values()):
            return None, "the experts' matrices differ in shape"
        flat: dict[str, tuple[int, int]] = {name: next(iter(found)) for name, found in shapes.items()}
        if not self._fills(flat):
            return None, "the experts' matrices do not fill the module's parameters"
        like = _plain(self.module), tuple(flat.items())
        if like not in proven:
            proof = Proof(self.table, flat, partial(small_twin, self.module), self._convert)
            proven[like] = proof.roles()
        return proven[like]

    def replacement(self, roles: Roles) -> tuple[Experts, dict[str, str]]:
        """(the module on meta, {checkpoint key: path of the parameter that it becomes})."""
        activation = activation_of(self.module)
        if self.table is None or activation is None:
            raise ValueError(f"{self.path} has no proven roles")
        dtype = next(self.module.parameters(recurse=False)).dtype
        experts = []
        for e in range(len(next(iter(self.table.values())))):
            shapes = {name: tuple(self.weights.tensors[keys[e]].shape) for name, keys in self.table.items()}
            empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
            experts.append(Expert(empty, roles, activation))
        paths = {
            key: f"{self.path}.{e}.{name}.weight" for name, keys in self.table.items() for e, key in enumerate(keys)
        }
        return Experts(experts).eval(), paths

    def _fills(self, shapes: Mapping[str, tuple[int, int]]) -> bool:
        """Whether the conversion of the true shapes gives the module's own: config.json and the checkpoint agree."""
        empty = {
            key: torch.empty(shapes[name], device="meta") for name, keys in (self.table or {}).items() for key in keys
        }
        wanted = {name: parameter.shape for name, parameter in self.module.named_parameters(recurse=False)}
        try:
            made = self._convert(empty)
        except (RuntimeError, ValueError):
            return False
        return {name: tensor.shape for name, tensor in made.items()} == wanted

    def _convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made = self.converters(tensors)
        return {path.removeprefix(f"{self.path}."): tensor for path, tensor in made.items()}


def _plain(module: nn.Module) -> tuple[Any, ...]:
    """Equal for two modules that compute the same from the same weights."""
    values = sorted((name, value) for name, value in vars(module).items() if isinstance(value, str | int | float))
    sizes = tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())
    return type(module), tuple(values), repr(activation_of(module)), sizes
