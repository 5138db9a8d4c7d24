"""Run a model on calibration data once and keep what was counted, for any number of runs that quantize it.

    for each block: load it, let every batch pass it, count what its layers read, write that and a mark, free it

The blocks stay as they are, so the layers' inputs are those of the original model. One block and its statistics are in memory
at a time; a killed run goes on after its last mark.

Legend: N windows, T tokens of a window.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

import torch

from infopt.calibration.recorded import ABOUT, About, part_name, to_tensors
from infopt.calibration.stream import Stream
from infopt.checkpoint import CheckpointReader
from infopt.errors import Unsupported
from infopt.exporters.folder import model_config
from infopt.memory import release
from infopt.model import Skeleton
from infopt.output import OutputFolder, free_space_check, write_json, write_manifest, write_safetensors
from infopt.recipes import experts
from infopt.recipes.blocks import Blocks
from infopt.recipes.marks import BlockReport, Marks, file_digest, versions
from infopt.team import ALONE, Team


class Calibration:
    """One run over `windows_NT`, in the work folder of `output`. reader: rotated already where `about.rotate` says so."""

    def __init__(
        self, reader: CheckpointReader, about: About, output: OutputFolder, windows_NT: torch.Tensor, team: Team = ALONE
    ) -> None:
        self.about, self.output, self.team = about, output, team
        self.skeleton = Skeleton(model_config(reader.config), reader)
        self._marks = Marks(output.work / "parts")
        self._blocks = Blocks(self.skeleton, self._marks)
        self._stream = Stream(self.skeleton, team.share(windows_NT), output.work / "hidden", team=team)
        self._stream.min_expert_tokens = about.min_expert_tokens

    def __call__(self, resume: bool, on_block: Callable[[BlockReport, bool], None]) -> None:
        """Count in every block, then put the folder together in `output.stage` (not yet committed).

        on_block is told of every finished block, and whether an earlier run had finished it.
        """
        done = self._resume() if resume else []
        if not self.team.same(len(done)) or not done:
            done = []
            self._marks.restart(self.fingerprint(), self._stream.start())
        for report in done:
            on_block(report, True)
        reports = list(done)
        for i in range(len(done), len(self.skeleton.blocks)):
            reports.append(self._block(i))
            on_block(reports[-1], False)
        if self.team.writes:
            self._assemble(reports)

    def fingerprint(self) -> str:
        """Everything that decides the output's bytes."""
        parts = [self.about.fingerprint(), torch.get_num_threads(), self.team.size, versions()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _resume(self) -> list[BlockReport]:
        begun = self._marks.read(
            self.fingerprint(), lambda i, digest: i == len(self.skeleton.blocks) or self._stream.holds(i, digest)
        )
        if not begun:
            return []
        self._blocks.go_on(*begun)
        return begun[0]

    @torch.no_grad()
    def _block(self, i: int) -> BlockReport:
        block, structure, topology = self._blocks.load(i)
        seen, notes = {}, []
        if self.about.cache:
            try:
                seen = self._stream.watch_cache(i, block)
            except Unsupported as error:
                notes = [f"no keys and values: {error.what}"]
        stats, hidden = self._stream.gather_and_advance(i, block, topology, frozenset(self.about.holds))
        if self.team.writes:
            write_safetensors(self._marks.part(i), to_tensors(stats, seen))
            if i == 0:
                size = self._marks.part(i).stat().st_size
                free_space_check(self.output.work, size * (len(self.skeleton.blocks) - 1))
        routed = {
            f"{self.skeleton.blocks[i]}.{space.readers[0]}": experts.facts(stats[space.name])
            for space in topology.spaces
        }
        layers = {name: facts for name, facts in routed.items() if facts}
        notes += experts.tell(layers)
        report = BlockReport(i, structure, layers, [], notes, hidden, file_digest(self._marks.part(i)))
        self._marks.write(report)
        self._stream.forget(i)
        self.skeleton.free_block(i)
        release()
        return report

    def _assemble(self, reports: list[BlockReport]) -> None:
        stage = self.output.stage
        for report in reports:
            os.replace(self._marks.part(report.index), stage / part_name(report.index))
        write_json(stage / ABOUT, self.about.to_json())
        write_json(stage / "infopt.json", self._summary(reports))
        write_manifest(stage)

    def _summary(self, reports: list[BlockReport]) -> dict[str, Any]:
        """infopt.json: no times and no paths, so that the same run gives the same bytes."""
        return {
            "versions": versions(),
            "threads": torch.get_num_threads(),
            **({"processes": self.team.size} if self.team.size > 1 else {}),
            "topologies": {name: t.to_json() for name, t in self._blocks.topologies.items()},
            "blocks": [{"structure": report.structure, "notes": report.notes} for report in reports],
            "experts": {name: facts for report in reports for name, facts in report.layers.items()},
        }
