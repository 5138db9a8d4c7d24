"""Rewrite a model in the stream: rotated weights, fewer key-value heads, a sliding window, and blocks healed of it.

    for each block: run the original on the original's hidden states (its answers are what is wanted); regroup its heads;
    refit the output projection and train the block, both on the hidden states that the rewritten blocks before it give;
    round to the stored type, run on, write, mark, free

With `heal_steps` the whole model is then trained on the original's predictions (`infopt.recipes.rewrite_distill`).

Two streams of activations lie on disk, the original's and the rewritten model's; one block of each is in memory. Marks and
resume are those of `infopt.recipes.run`: a killed run goes on after its last finished block, to the same bytes.

Legend: N windows, T tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import infopt
from infopt.checkpoint import CheckpointReader
from infopt.exporters.folder import model_config, write_folder
from infopt.memory import release
from infopt.model import Skeleton
from infopt.output import OutputFolder, free_space_check, merge_shards, write_json, write_manifest, write_safetensors
from infopt.recipes.marks import BlockReport, Marks, file_digest
from infopt.recipes.rewrite_block import BlockRewrite, Streams, trained
from infopt.recipes.rewrite_distill import Distillation, Distilled
from infopt.recipes.rewrite_plan import plan_rewrite
from infopt.recipes.rotation import changed_by, rotated, summary
from infopt.rewriters.heal import StepCost
from infopt.rewriters.options import RewriteOptions
from infopt.rewriters.target import changed_config


class RewriteRun:
    """One rewrite, in the work folder of `output`. windows_NT may be None where nothing needs data."""

    def __init__(
        self,
        reader: CheckpointReader,
        options: RewriteOptions,
        output: OutputFolder,
        windows_NT: Tensor | None,
        data_report: dict[str, Any] | None = None,
    ) -> None:
        reader = rotated(reader, options.seed) if options.rotate else reader
        self.reader, self.options, self.output = reader, options, output
        self.source = Skeleton(model_config(reader.config), reader)
        self.plan = plan_rewrite(reader, self.source, options)
        self.target = self.plan.target
        self.data_report = data_report
        self._marks = Marks(output.work / "parts")
        self._reports: list[BlockReport] = []
        self._streams: Streams | None = None
        self.costs: list[StepCost] = []  # of a step of a block's healing without and with checkpointing
        self.distill_costs: list[StepCost] = []  # of one window of the distillation
        self.has_effect = self.plan.regroups or (
            options.window is not None and windows_NT is not None and windows_NT.shape[1] > options.window
        )
        self._windows_NT = windows_NT if self.has_effect else None
        self.distilled: Distilled | None = None
        self._distilled_keys: set[str] = set()
        if windows_NT is not None and self.has_effect:
            self._streams = Streams(self.source, self.target, windows_NT, output.work)

    @property
    def blocks(self) -> int:
        return len(self.source.blocks)

    def __call__(
        self,
        resume: bool,
        on_block: Callable[[BlockReport, bool], None],
        on_step: Callable[[int, float], None] | None = None,
    ) -> list[BlockReport]:
        """Rewrite every block, then assemble the folder in `output.stage` with its manifest (not yet committed); on_step is
        told of every step of the distillation, and its loss."""
        free_space_check(self.output.work, sum(info.nbytes for info in self.reader.tensors.values()))
        done = self._resume() if resume else []
        if not done:
            self._marks.restart(self.fingerprint(), self._start())
        for report in done:
            on_block(report, True)
        reports = list(done)
        for i in range(len(done), self.blocks):
            reports.append(self._block(i))
            on_block(reports[-1], False)
        self._reports = reports
        self._assemble([self._marks.part(i) for i in range(self.blocks)])
        if self.options.heal_steps and self._windows_NT is not None:
            self._distill(self._windows_NT, resume, on_step)
        return reports

    def note(self, more: dict[str, Any]) -> None:
        """Add what was measured on the written model to its infopt.json."""
        write_json(self.output.stage / "infopt.json", {**self._summary(), **more})
        write_manifest(self.output.stage)

    # Resume

    def _start(self) -> str | None:
        return self._streams.start() if self._streams else None

    def fingerprint(self) -> str:
        """Everything that decides the output's bytes."""
        parts = {
            "source": self.reader.fingerprint(),
            "options": self.options.to_json(),
            "data": (self.data_report or {}).get("sha256"),
            "threads": torch.get_num_threads(),
            "versions": _versions(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _resume(self) -> list[BlockReport]:
        def holds(i: int, digests: str) -> bool:
            return self._streams is None or i == self.blocks or self._streams.holds(i, digests)

        begun = self._marks.read(self.fingerprint(), holds)
        return [] if begun is None else begun[0]

    # One block

    def _block(self, i: int) -> BlockReport:
        work = BlockRewrite(self.source, self.target, self.plan, self.options, self._streams, i)
        try:
            if self.plan.regroups or self._streams:
                work.rewrite(lambda label: self._write_part(self._curve_part(label, i), work))
            self._write_part(self._marks.part(i), work)
            hidden = work.go_on()
            self.costs += work.costs
        finally:
            work.close()
        report = BlockReport(
            index=i,
            structure=self.plan.blocks[i].structure,
            layers={self.source.blocks[i]: work.report},
            rewritten=sorted(self.source.tensor_key(i, path) for path in work.changed),
            notes=work.notes,
            hidden=hidden,
            part=file_digest(self._marks.part(i)),
        )
        self._marks.write(report)
        if self._streams:
            self._streams.forget(i)
        release()
        return report

    def _write_part(self, path: Path, work: BlockRewrite) -> None:
        """The block's tensors as they are now: those that changed in their stored type, the others as they were."""
        path.parent.mkdir(parents=True, exist_ok=True)
        changed = {self.source.tensor_key(work.index, name): name for name in work.changed}
        write_safetensors(
            path,
            {
                key: work.stored(changed[key], self.reader.tensors[key].dtype)
                if key in changed
                else self.reader.get(key)
                for key in self.source.block_keys(work.index)
            },
        )

    # The whole model

    def _distill(self, windows_NT: Tensor, resume: bool, on_step: Callable[[int, float], None] | None) -> None:
        """Train the model of the stage on the original's predictions; the stage is the result, where it is better."""
        written = CheckpointReader(self.output.stage)
        student = Skeleton(model_config(written.config), written)
        state = self.output.work / "distillation.safetensors"
        if not resume:
            state.unlink(missing_ok=True)
        try:
            for skeleton in (self.source, student):
                skeleton.load_outer()
                for i in range(self.blocks):
                    skeleton.load_block(i)
            parameters = {
                student.tensor_key(i, path): parameter
                for i, name in enumerate(student.blocks)
                for path, parameter in trained(student, i, student.model.get_submodule(name)).items()
            }
            work = Distillation(self.source, student, windows_NT, parameters, state, self.fingerprint())
            if self.options.checkpointing:
                self.distill_costs = work.costs()
            options = self.options
            self.distilled = work(options.heal_steps, options.heal_lr, options.checkpointing, on_step)
            if self.distilled.kept:
                self._distilled_keys = set(parameters)
                self._write_distilled(student, written, parameters)
        finally:
            for i in range(self.blocks):
                self.source.free_block(i)
            self.source.free_outer()
            release()

    def _write_distilled(
        self, student: Skeleton, written: CheckpointReader, parameters: dict[str, torch.nn.Parameter]
    ) -> None:
        folder = self.output.work / "distilled"
        folder.mkdir(exist_ok=True)
        parts = [folder / self._marks.part(i).name for i in range(self.blocks)]
        for i, part in enumerate(parts):
            values = {
                key: parameters[key].detach().to(written.tensors[key].dtype) if key in parameters else written.get(key)
                for key in student.block_keys(i)
            }
            write_safetensors(part, values)
        self._assemble(parts)

    # The folder

    def _curve_part(self, label: str, i: int) -> Path:
        return self.output.work / "curve" / label / f"block-{i:05d}.safetensors"

    def has_points(self, label: str) -> bool:
        """Whether every block was kept as it was at that point."""
        return all(self._curve_part(label, i).is_file() for i in range(self.blocks))

    def tokens(self) -> dict[str, int]:
        """The healing tokens that a block had seen at each point, and in `all`."""
        found: dict[str, int] = {}
        for report in self._reports:
            layer = next(iter(report.layers.values()))
            found |= layer.get("tokens", {})
            found |= {"all": layer["healed"]["tokens"]} if "healed" in layer else {}
        return found

    def folder_of(self, label: str) -> Path:
        """A model folder in the work folder with every block as it was at a point of the curve."""
        folder = self.output.work / "curve" / label / "model"
        folder.mkdir(parents=True, exist_ok=True)
        self._write_model(folder, [self._curve_part(label, i) for i in range(self.blocks)])
        return folder

    def folder_before_distilling(self) -> Path:
        """A model folder in the work folder with every block as it was healed."""
        folder = self.output.work / "curve" / "healed"
        folder.mkdir(parents=True, exist_ok=True)
        self._write_model(folder, [self._marks.part(i) for i in range(self.blocks)])
        return folder

    def folder_with(self, settings: dict[str, Any], name: str) -> Path:
        """A folder with the weights of the stage (as links to the same files) and other settings in its config."""
        folder = self.output.work / "curve" / name
        folder.mkdir(parents=True, exist_ok=True)
        for path in self.output.stage.glob("*.safetensors*"):
            link = folder / path.name
            link.unlink(missing_ok=True)
            link.hardlink_to(path)
        write_folder(folder, self.reader, None, self._settings(settings))
        return folder

    def _settings(self, more: dict[str, Any]) -> dict[str, Any]:
        return changed_config(model_config(self.reader.config), {**self.plan.settings, **more})

    def _write_model(self, folder: Path, parts: list[Path]) -> None:
        outer = self._marks.folder / "outer.safetensors"
        keys = [*self.source.outer_keys(), *self.source.extra_keys()]
        write_safetensors(outer, {key: self.reader.get(key) for key in keys})
        merge_shards([outer, *parts], folder)
        write_folder(folder, self.reader, None, self._settings({}))

    def _assemble(self, parts: list[Path]) -> None:
        stage = self.output.stage
        stage.mkdir(parents=True, exist_ok=True)
        self._write_model(stage, parts)
        write_json(stage / "infopt.json", self._summary())
        write_manifest(stage)

    def _summary(self) -> dict[str, Any]:
        """infopt.json: no times and no paths, so that the same run gives the same bytes."""
        found = {block.structure: block.topology.to_json() for block in self.plan.blocks}
        return {
            "versions": _versions(),
            "threads": torch.get_num_threads(),
            "calibration": self.data_report,
            "rewrite": {"options": self.options.to_json(), "settings": self.plan.settings},
            "topologies": {} if self.plan.regroups else found,  # of the source: a regrouped block has another
            "blocks": [
                {"structure": r.structure, "notes": r.notes, **next(iter(r.layers.values()))} for r in self._reports
            ],
            **({"distilled": asdict(self.distilled)} if self.distilled else {}),
            "rewritten": sorted(
                {*changed_by(self.reader), *(key for r in self._reports for key in r.rewritten), *self._distilled_keys}
            ),
            **summary(self.reader),
        }


def _versions() -> dict[str, str]:
    return {"infopt": infopt.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
