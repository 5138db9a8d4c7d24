"""The topology of a mixture of experts: what is proven for one expert holds for its twins.

All experts of a layer are `infopt.experts.Expert` modules of the same shapes, so one small twin with random weights is
discovered and proven as a block of its own (`infopt.calibration.discover`), and its ops and spaces are repeated for each
expert. Discovery thus costs the same for 8 experts and for 256, and does not depend on which experts the probes reach.

The space that an expert's first projections read has no fold, whatever wrote it: the router and the other experts read the
same activations, so one expert's scale has nowhere to go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from infopt.experts import Expert, Experts, experts_in
from infopt.model import BlockCall
from infopt.topology import Fold, Op, Space, Topology

_SMALL = 48  # width of the twin
_SHARED = "the router and the other experts read the same activations"


def add_experts(
    topology: Topology, block: nn.Module, call: BlockCall, hidden_BTH: Tensor, inner: Callable[[Expert, int], Topology]
) -> Topology:
    """The topology of a block, with its experts' ops and spaces where they run.

    topology: of everything but the experts. inner: discovers one expert of the given hidden width.
    """
    for path, experts in experts_in(block).items():
        order = _order(block, [path, *(op.name for op in topology.ops)], call, hidden_BTH)
        if path not in order:
            continue
        later = set(order[order.index(path) :])
        ops, spaces = _repeated(path, experts, inner)
        op_at = next((at for at, op in enumerate(topology.ops) if op.name in later), len(topology.ops))
        space_at = next((at for at, s in enumerate(topology.spaces) if s.readers[0] in later), len(topology.spaces))
        topology = replace(
            topology,
            ops=(*topology.ops[:op_at], *ops, *topology.ops[op_at:]),
            spaces=(*topology.spaces[:space_at], *spaces, *topology.spaces[space_at:]),
        )
    return topology


def spaces_of(topology: Topology, path: str) -> list[tuple[Space, ...]]:
    """For each expert of the module at `path` its spaces: what its first projections read, and what its last reads."""
    found: dict[int, list[Space]] = {}
    for space in topology.spaces:
        if space.readers[0].startswith(f"{path}."):
            found.setdefault(int(space.readers[0].removeprefix(f"{path}.").split(".")[0]), []).append(space)
    return [tuple(found[number]) for number in sorted(found)]


def _order(block: nn.Module, names: list[str], call: BlockCall, hidden_BTH: Tensor) -> list[str]:
    """The modules in the order in which they start to run."""
    order: list[str] = []
    handles = [
        block.get_submodule(name).register_forward_pre_hook(lambda _m, _a, name=name: order.append(name))
        for name in names
    ]
    try:
        call.run(block, hidden_BTH)
    finally:
        for handle in handles:
            handle.remove()
    return order


def _repeated(
    path: str, experts: Experts, inner: Callable[[Expert, int], Topology]
) -> tuple[tuple[Op, ...], tuple[Space, ...]]:
    one = inner(_small_twin(experts.each()[0]), _SMALL)
    ops, spaces = [], []
    for number, expert in enumerate(experts.each()):
        place = f"{path}.{number}"
        for op in one.ops:
            outputs, inputs = expert.get_parameter(f"{op.name}.weight").shape
            ops.append(Op(f"{place}.{op.name}", op.kind, outputs, inputs))
        for space in one.spaces:
            spaces.append(
                Space(
                    name=f"{place}:{space.name.replace('residual->', 'routed->')}",
                    width=expert.get_parameter(f"{space.readers[0]}.weight").shape[1],
                    readers=tuple(f"{place}.{name}" for name in space.readers),
                    fold=_placed(place, space),
                    reason=space.reason if space.fed_by else _SHARED,
                    fed_by=tuple(f"{place}.{name}" for name in space.fed_by),
                )
            )
    return tuple(ops), tuple(spaces)


def _placed(place: str, space: Space) -> Fold | None:
    """The twin's fold as an expert's. Only the identity is the same for all widths."""
    if space.fold is None:
        return None
    if space.fold.rows is not None:
        raise ValueError(f"{place}: an expert's projections are wired in an order of their own")
    return Fold(f"{place}.{space.fold.writer}", space.fold.law)


def _small_twin(expert: Expert) -> Expert:
    """An expert with the same roles and activation, small and random: a structure is proven, not a weight."""
    generator = torch.Generator().manual_seed(0)
    names = [name for name, module in expert.named_children() if isinstance(module, nn.Linear)]
    weights = {name: torch.randn(_SMALL, _SMALL, generator=generator) / _SMALL**0.5 for name in names}
    return Expert(weights, expert.roles, expert.activation)
