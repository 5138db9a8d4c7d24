"""A mixture of experts as ordinary linear layers: one per expert and projection.

transformers keeps all experts of a layer in stacked parameters and computes with slices of them, so nothing can watch,
scale or quantize one expert. Checkpoints store an expert's projections one by one. Where both are true, the experts'
module is replaced by `Experts`, which is made of linear layers under the checkpoint's own names; all that infopt does to
linear layers then applies to experts.

No table says which projection is the gate. Small random tensors under the checkpoint's names go through transformers' own
conversion into a small twin of its module; `Experts` gets the same tensors, and every arrangement of the projections is
tried: one that computes what the twin computes, with experts that no token reaches and for inputs of every size, is
right. A module that none fits (clamped or interleaved gates, biases, other arguments) and experts that are stored
stacked stay as they are, and the reason is kept.

Legend: T tokens, H hidden width, I inner width, E experts, K experts of a token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor, nn

TOLERANCE = 1e-5
_ARGUMENTS = ["hidden_states", "top_k_index", "top_k_weights"]
_SMALL = (16, 24)  # widths of the twin: different, so that a transposed matrix cannot fit
_SIZES = (0.1, 1.0, 30.0)  # of the inputs of the proof: a gate that is clamped shows it on the largest
_NOBODY = -1  # the index of no expert
_RUN_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)


@dataclass(frozen=True)
class Roles:
    """Which projection does what: down(act(gate(x)) * up(x)), or down(act(up(x))) where there is no gate."""

    up: str
    down: str
    gate: str | None = None


class Expert(nn.Module):
    """One expert. Its linear layers carry the names that the checkpoint gives them."""

    def __init__(self, weights: Mapping[str, Tensor], roles: Roles, activation: nn.Module) -> None:
        super().__init__()
        for name, weight_OI in weights.items():
            linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight_OI, requires_grad=False)
            self.add_module(name, linear)
        self.activation = activation
        self.roles = roles

    def inner(self, x_TH: Tensor) -> Tensor:
        """What the last projection reads: [T, I]."""
        up = self.get_submodule(self.roles.up)
        if self.roles.gate is None:
            return self.activation(up(x_TH))
        return self.activation(self.get_submodule(self.roles.gate)(x_TH)) * up(x_TH)

    def down(self, x_TI: Tensor) -> Tensor:
        return self.get_submodule(self.roles.down)(x_TI)

    def forward(self, x_TH: Tensor) -> Tensor:
        return self.down(self.inner(x_TH))


class Experts(nn.ModuleList):
    """All experts of a layer. Called as the module that it replaces: (hidden [T, H], index [T, K], weights [T, K]).

    whole: experts that compute on every token, so that calibration sees them; only their own tokens take the answer.
    real: tells which tokens are some, bool, where others only fill a batch; these reach no expert and are answered with zeros.
    delegate: computes in place of `forward` while it is set; calibration then works expert by expert.
    """

    def __init__(self, experts: list[Expert]) -> None:
        super().__init__(experts)
        self.whole: frozenset[int] = frozenset()
        self.real: Callable[[], Tensor | None] | None = None
        self.delegate: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def each(self) -> list[Expert]:
        """The experts in order."""
        return [module for module in self if isinstance(module, Expert)]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        real = self.real() if self.real is not None else None
        if real is not None:
            top_k_index = top_k_index.masked_fill(~real.view(*top_k_index.shape[:-1], 1), _NOBODY)
        if self.delegate is not None:
            return self.delegate(hidden_states, top_k_index, top_k_weights)
        hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        out_TH = torch.zeros_like(hidden_TH)
        for expert, module in enumerate(self.each()):
            token_N, weight_N = routed(expert, top_k_index, top_k_weights)
            if expert in self.whole:
                all_TH = torch.zeros_like(hidden_TH)
                seen_T = somebody(top_k_index)
                all_TH[seen_T] = module(hidden_TH[seen_T])
                add(out_TH, token_N, all_TH[token_N], weight_N)
            elif len(token_N):
                add(out_TH, token_N, module(hidden_TH[token_N]), weight_N)
        return out_TH.view_as(hidden_states)


def routed(expert: int, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(the tokens [N] that the router sends to an expert, their weights [N])."""
    token_N, slot_N = (index.reshape(-1, index.shape[-1]) == expert).nonzero(as_tuple=True)
    return token_N, weights.reshape(-1, weights.shape[-1])[token_N, slot_N]


def somebody(index: Tensor) -> Tensor:
    """Which tokens a router sends anywhere at all, bool [T]: not those that only fill a batch."""
    return (index.reshape(-1, index.shape[-1]) != _NOBODY).all(-1)


def add(out_TH: Tensor, token_N: Tensor, y_NH: Tensor, weight_N: Tensor) -> None:
    """Add an expert's weighted answers to the tokens that asked for them."""
    out_TH.index_add_(0, token_N, (y_NH * weight_N[:, None]).to(out_TH.dtype))


def experts_in(block: nn.Module) -> dict[str, Experts]:
    """The block's `Experts` by their path."""
    return {path: module for path, module in block.named_modules() if isinstance(module, Experts)}


# Finding and proving


def is_stack(module: nn.Module) -> bool:
    """Whether a module looks like experts: several stacked matrices of its own with one leading size above one."""
    stacks = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() == 3]
    return len(stacks) > 1 and len({len(stack) for stack in stacks}) == 1 and len(stacks[0]) > 1


def table_of(keys: list[str], count: int) -> dict[str, list[str]] | None:
    """{projection: its checkpoint keys, by expert} if the keys differ in the expert's number and the projection's name."""
    parts = [key.split(".") for key in keys]
    if not parts or {len(part) for part in parts} != {len(parts[0])} or {part[-1] for part in parts} != {"weight"}:
        return None
    varying = [at for at in range(len(parts[0])) if len({part[at] for part in parts}) > 1]
    numbers = [at for at in varying if all(part[at].isdecimal() and len(part[at]) < 10 for part in parts)]
    if len(varying) != 2 or len(numbers) != 1:
        return None
    (number,), (name,) = numbers, [at for at in varying if at not in numbers]
    found: dict[str, dict[int, str]] = {}
    for part, key in zip(parts, keys, strict=True):
        found.setdefault(part[name], {})[int(part[number])] = key
    if any(len(by_expert) != count or max(by_expert) != count - 1 for by_expert in found.values()):
        return None
    if any(hasattr(Expert, projection) or projection == "activation" for projection in found):
        return None
    return {projection: [found[projection][e] for e in range(count)] for projection in sorted(found)}


@dataclass(frozen=True)
class Proof:
    """What the proof needs: the table of keys, the shapes [O, I] of the projections, transformers' small twin of the
    module for given widths, and its conversion {key: tensor} -> {the module's parameter: tensor}."""

    table: Mapping[str, list[str]]
    shapes: Mapping[str, tuple[int, int]]
    twin: Callable[[Mapping[int, int]], nn.Module]
    convert: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]

    def roles(self) -> tuple[Roles | None, str]:
        """The proven arrangement, or None and why there is none."""
        closest = "no arrangement of them has matching shapes"
        least = float("inf")
        for roles in self._arrangements():
            try:
                change = self._difference(roles)
            except _RUN_ERRORS as error:
                return None, f"its twin could not be run: {type(error).__name__}: {str(error)[:100]}"
            if change <= TOLERANCE:
                return roles, ""
            if change < least:
                least, closest = change, f"no arrangement of them computes what it computes (closest: {change:.0e})"
        return None, f"its projections are {', '.join(self.shapes)}, and {closest}"

    def _arrangements(self) -> Iterator[Roles]:
        for names in permutations(self.shapes) if len(self.shapes) in (2, 3) else ():
            up, down, gate = names[0], names[1], names[2] if len(names) == 3 else None
            widths = {self.shapes[name] for name in (up, gate) if name is not None}
            if widths == {self.shapes[down][::-1]}:
                yield Roles(up, down, gate)

    @torch.no_grad()
    def _difference(self, roles: Roles) -> float:
        """The largest relative difference of the outputs, over inputs of several sizes and routings."""
        inner, hidden = self.shapes[roles.up]
        count = len(self.table[roles.up])
        small = _small(hidden, inner, count)
        generator = torch.Generator().manual_seed(0)
        tensors = {
            key: torch.randn(small[rows], small[columns], generator=generator) / small[columns] ** 0.5
            for name, (rows, columns) in self.shapes.items()
            for key in self.table[name]
        }
        twin = self.twin({**small, 2 * inner: 2 * small[inner], **small, count: count})
        for path, tensor in self.convert(tensors).items():
            setattr(twin, path, nn.Parameter(tensor, requires_grad=False))
        activation = activation_of(twin) or nn.Identity()  # a wrong one proves nothing
        ours = Experts([
            Expert({name: tensors[keys[e]] for name, keys in self.table.items()}, roles, activation)
            for e in range(count)
        ])  # fmt: skip
        worst = 0.0
        for size in _SIZES:
            for used in (count, (count + 1) // 2):  # every expert, and only some
                x_TH = size * torch.randn(count, small[hidden], generator=generator)
                index_TK = (2 * torch.arange(count)[:, None] + torch.arange(2)) % max(used, 2)
                weights_TK = torch.rand(count, 2, generator=generator)
                worst = max(worst, _relative(twin(x_TH, index_TK, weights_TK), ours(x_TH, index_TK, weights_TK)))
        return worst


def obstacle(module: nn.Module) -> str:
    """Why a stack of experts is none that `Experts` could stand for, as far as its outside tells; "" if it may be."""
    odd = [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() != 3]
    if odd:
        return f"it has parameters besides matrices ({', '.join(odd)})"
    if list(inspect.signature(module.forward).parameters) != _ARGUMENTS:
        return "it is called in a way of its own"
    if activation_of(module) is None:
        return "it is not one activation between matrices"
    return ""


def activation_of(module: nn.Module) -> nn.Module | None:
    """The module's only child, if that has no parameters."""
    children = list(module.children())
    return children[0] if len(children) == 1 and not list(children[0].parameters()) else None


def _small(hidden: int, inner: int, count: int) -> dict[int, int]:
    """{width: the twin's width}; true widths where they are small already or could be taken for the number of experts."""
    if count in (hidden, inner, 2 * inner) or min(hidden, inner) < 2 * max(_SMALL):
        return {hidden: hidden, inner: inner}
    return {inner: _SMALL[1], hidden: _SMALL[0]}


def _relative(wanted: Tensor, found: Tensor) -> float:
    if wanted.shape != found.shape or not bool(torch.isfinite(wanted).all()):
        return float("inf")
    return float((wanted - found).norm() / wanted.norm().clamp(min=1e-30))
