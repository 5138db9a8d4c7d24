"""What tensor parallelism must know of every block: recorded by an earlier run where there is a record, else found anew.

`infopt.json` holds the topologies that were proven when the model was quantized. The file may come from a stranger, so it is
compared with the block before it is used; the cells are measured on the block in any case, and a record that lies about
which channels feed a space contradicts them.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path

from torch import nn

from infopt.calibration.cells import find_cells
from infopt.calibration.discover import discover, structure_key
from infopt.cells import BlockFacts
from infopt.errors import BadInput
from infopt.experts import experts_in
from infopt.header import read_json
from infopt.model import Skeleton
from infopt.topology import Fold, Space, Topology

REPORT = "infopt.json"


def block_facts(folder: Path, skeleton: Skeleton) -> list[BlockFacts]:
    """The facts of each block, in order; every distinct structure is looked at once.

    Raises BadInput (a record that does not fit), Unsupported (parts that cannot be told apart).
    """
    known: dict[Hashable, BlockFacts] = {}
    facts = []
    for i, name in enumerate(skeleton.blocks):
        key = structure_key(skeleton.model.get_submodule(name))
        if key not in known:
            block = skeleton.load_block(i)
            topology = without_experts(recorded_topology(folder, i, block) or discover(skeleton, i), block)
            known[key] = BlockFacts(topology, find_cells(skeleton, i, topology))
            skeleton.free_block(i)
        facts.append(known[key])
    return facts


def recorded_topology(folder: Path, i: int, block: nn.Module) -> Topology | None:
    """Block i's topology from infopt.json, checked against the block; None where there is no such file."""
    path = folder / REPORT
    if not path.is_file():
        return None
    report = read_json(path)
    try:
        topology = Topology.from_json(report["topologies"][report["blocks"][i]["structure"]])
        fits = _fits(topology, dict(block.named_modules()))
    except (KeyError, IndexError, TypeError, BadInput) as error:
        why = f"It has no usable topology of block {i} ({type(error).__name__})."
        raise BadInput(f"{path} is not a report of infopt", why, f"infopt inspect {folder}") from error
    if not fits:
        raise BadInput(
            f"{path} does not fit the model", f"Its topology is not that of block {i}.", f"infopt inspect {folder}"
        )
    return topology


def without_experts(topology: Topology, block: nn.Module) -> Topology:
    """The topology without its experts, which read a choice of the tokens: for questions about the other layers."""
    inside = tuple(f"{path}." for path in experts_in(block))
    if not inside:
        return topology
    whole = tuple(f"{op.name}.weight" for op in topology.ops if op.name.startswith(inside))
    return Topology(
        ops=tuple(op for op in topology.ops if not op.name.startswith(inside)),
        spaces=tuple(space for space in topology.spaces if not space.readers[0].startswith(inside)),
        unhandled=(*topology.unhandled, *whole),
    )


def _fits(topology: Topology, modules: dict[str, nn.Module]) -> bool:
    """Whether all that the topology names is in the block, with these sizes. May raise what odd types raise."""
    for op in topology.ops:
        weight = getattr(modules.get(op.name), "weight", None)
        sizes = (op.out_features,) if op.kind == "norm" else (op.out_features, op.in_features)
        sizes = sizes[::-1] if op.kind == "conv1d" else sizes
        if weight is None or tuple(weight.shape) != sizes:
            return False
    names = {op.name for op in topology.linears()}
    return all(_space_fits(space, topology, names) for space in topology.spaces)


def _space_fits(space: Space, topology: Topology, names: set[str]) -> bool:
    if not space.readers or not names >= {*space.readers, *space.fed_by}:
        return False
    if any(op.in_features != space.width for op in topology.readers(space)):
        return False
    return space.fold is None or _fold_fits(space.fold, space.width, topology)


def _fold_fits(fold: Fold, width: int, topology: Topology) -> bool:
    channels = topology.op(fold.writer).out_features
    if fold.rows is None:
        return channels == width
    return len(fold.rows) == width and all(type(row) is int and 0 <= row < channels for row in fold.rows)
