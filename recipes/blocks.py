"""The blocks of a model as a run meets them: loaded, sound, and with their topology."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from infopt.calibration.discover import discover, structure_key
from infopt.errors import BadInput
from infopt.model import Skeleton
from infopt.recipes.marks import BlockReport, Marks
from infopt.topology import Topology


class Blocks:
    """The blocks of `skeleton`. A topology is discovered once for each distinct structure, named in the order in which they
    are met, and left with the marks."""

    def __init__(self, skeleton: Skeleton, marks: Marks) -> None:
        self.topologies: dict[str, Topology] = {}
        self._skeleton, self._marks = skeleton, marks
        self._structures: dict[Any, str] = {}

    def go_on(self, reports: Iterable[BlockReport], topologies: dict[str, Topology]) -> None:
        """Take over what an earlier run has found, with its names."""
        self.topologies = topologies
        for i, report in enumerate(reports):
            self._structures.setdefault(self._key(i), report.structure)

    def load(self, i: int) -> tuple[nn.Module, str, Topology]:
        """(block i with its parameters, the name of its structure, its topology). Raises BadInput for parameters that are
        not finite."""
        block = self._skeleton.load_block(i)
        _check_finite(block, self._skeleton.blocks[i])
        key = self._key(i)
        if key not in self._structures:
            name = f"topology-{len(self._structures)}"
            self._structures[key] = name
            if name not in self.topologies:
                self.topologies[name] = discover(self._skeleton, i)
                self._marks.write_topology(name, self.topologies[name])
        name = self._structures[key]
        return block, name, self.topologies[name]

    def _key(self, i: int) -> Any:
        return structure_key(self._skeleton.model.get_submodule(self._skeleton.blocks[i]))


def _check_finite(block: nn.Module, name: str) -> None:
    for path, parameter in block.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            bad = int((~torch.isfinite(parameter)).sum())
            raise BadInput(
                f"{name}.{path} holds {bad} values that are NaN or infinite",
                "a scale made from them would spoil its whole group",
                "repair or download the model again",
            )
