"""What a run leaves behind block by block, so that the next one can go on: reports, tensors, topologies.

A block's mark is written last and by rename. Nothing here is trusted: a mark of another model, recipe, data set or software
is known by the fingerprint, a damaged file of tensors by its digest, and then everything is begun again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import infopt
from infopt.errors import BadInput
from infopt.header import read_json
from infopt.output import write_json
from infopt.report import note
from infopt.topology import Topology


@dataclass(frozen=True)
class BlockReport:
    """What one finished block has to say. layers: by tensor name in the output, without ".weight"; hidden, part: sha256 of
    the next block's input and of the block's file of tensors."""

    index: int
    structure: str
    layers: dict[str, dict[str, Any]]
    rewritten: list[str]
    notes: list[str]
    hidden: str | None
    part: str

    def error(self) -> float | None:
        """The block's worst relative output error, where there was data to measure it."""
        errors = [layer["error"] for layer in self.layers.values() if layer["error"] is not None]
        return max(errors, default=None)


class Marks:
    """The folder of a run's finished blocks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def part(self, i: int) -> Path:
        """Where block i's tensors go."""
        return self.folder / f"block-{i:05d}.safetensors"

    def write(self, report: BlockReport) -> None:
        """Mark a block as finished; its file of tensors must be there."""
        write_json(self._mark(report.index), report.__dict__)

    def write_topology(self, name: str, topology: Topology) -> None:
        write_json(self.folder / f"{name}.json", topology.to_json())

    def restart(self, fingerprint: str, hidden: str | None) -> None:
        """Forget everything. hidden: the digest of block 0's input, None for a run without data."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if lost := sum(1 for _ in self.folder.glob("block-*.json")):
            kept = "they are kept for the same model, recipe, data and software"
            note(f"begun anew: {lost} finished blocks of an earlier run are dropped; {kept}")
        for path in self.folder.iterdir():
            path.unlink()
        write_json(self.folder / "start.json", {"fingerprint": fingerprint, "hidden": hidden})

    def read(
        self, fingerprint: str, holds: Callable[[int, str], bool]
    ) -> tuple[list[BlockReport], dict[str, Topology]] | None:
        """The finished blocks and the known topologies, None if there is nothing to go on from.

        holds: whether the input of a block is there with a digest, as the block after the last finished one needs it.
        """
        start = self.folder / "start.json"
        if not start.is_file():
            return None
        try:
            begun = read_json(start)
            if begun.get("fingerprint") != fingerprint:
                return None
            reports: list[BlockReport] = []
            while (mark := self._mark(len(reports))).is_file():
                reports.append(BlockReport(**read_json(mark)))
            topologies = {p.stem: Topology.from_json(read_json(p)) for p in self.folder.glob("topology-*.json")}
        except (BadInput, TypeError, AttributeError):
            return None  # a torn or foreign work folder: begin again
        if any(file_digest(self.part(i)) != report.part for i, report in enumerate(reports)):
            return None
        hidden = reports[-1].hidden if reports else begun.get("hidden")
        return (reports, topologies) if holds(len(reports), str(hidden)) else None

    def _mark(self, i: int) -> Path:
        return self.folder / f"block-{i:05d}.json"


def versions() -> dict[str, str]:
    """What must be the same for marks to be of use."""
    return {"infopt": infopt.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def file_digest(path: Path) -> str:
    """The file's sha256; nothing where there is no file."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
