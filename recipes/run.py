"""Run a recipe on a model: the loop that the rest of infopt serves.

    for each block: load it, gather what the steps need, let every step work on it, run the calibration activations
    through the quantized block, write its tensors and a mark, free it

One block is in memory at a time. A block's mark is written last and by rename, so a killed run goes on after the last mark
and its output is byte for byte that of an uninterrupted one; marks of another model, recipe, data set or software are
recognised by their fingerprint and thrown away.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import infopt
from infopt.calibration.discover import discover, structure_key
from infopt.calibration.stats import InputStats
from infopt.calibration.stream import Stream
from infopt.checkpoint import CheckpointReader
from infopt.errors import BadInput
from infopt.exporters import compressed_tensors
from infopt.exporters.folder import model_config, write_folder
from infopt.header import read_json
from infopt.memory import release
from infopt.model import Skeleton
from infopt.output import OutputFolder, free_space_check, merge_shards, write_json, write_manifest, write_safetensors
from infopt.qtensor import QTensor
from infopt.quantizers.awq import output_error
from infopt.quantizers.work import BlockWork, Step
from infopt.recipe import Recipe
from infopt.recipes import experts
from infopt.recipes.plan import columns_of, plan
from infopt.topology import Space, Topology


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


class Run:
    """One run of a recipe, in the work folder of `output`. `windows_NT` may be None if no step needs data."""

    def __init__(
        self,
        reader: CheckpointReader,
        recipe: Recipe,
        steps: list[Step],
        output: OutputFolder,
        windows_NT: torch.Tensor | None,
        data_report: dict[str, Any] | None = None,
    ) -> None:
        self.reader, self.recipe, self.steps, self.output = reader, recipe, steps, output
        self.skeleton = Skeleton(model_config(reader.config), reader)
        self.plan = plan(self.skeleton, recipe)
        self.data_report = data_report
        self._parts = output.work / "parts"
        self._stream = None
        if any(step.needs_stats for step in steps):
            if windows_NT is None:
                raise ValueError("a step needs calibration data")
            self._stream = Stream(self.skeleton, windows_NT, output.work / "hidden")
            self._stream.min_expert_tokens = recipe.min_expert_tokens
        self._topologies: dict[str, Topology] = {}
        self._structures: dict[Any, str] = {}

    @property
    def blocks(self) -> int:
        return len(self.skeleton.blocks)

    @property
    def needs_data(self) -> bool:
        return self._stream is not None

    @property
    def _walks(self) -> bool:
        """Whether rounding stops at every space."""
        data = any(step.needs_stats for step in self.steps if not step.rewrites)
        return self.recipe.sequential == "space" and data

    @property
    def gathers(self) -> bool:
        """Whether the statistics of a whole block are held at once."""
        return self.needs_data and (not self._walks or any(step.rewrites for step in self.steps))

    @property
    def batch_tokens(self) -> int:
        return self._stream.batch_tokens if self._stream else 0

    def hold(self, nbytes: int) -> None:
        """Let so many bytes of activations stay in memory while the passes through a block are stopped."""
        if self._stream:
            self._stream.hold = nbytes

    def __call__(self, resume: bool, on_block: Callable[[BlockReport, bool], None]) -> list[BlockReport]:
        """Quantize every block, then assemble the folder in `output.stage` with its manifest (not yet committed).

        on_block is told of every finished block, and whether an earlier run had finished it.
        """
        free_space_check(self.output.work, 2 * sum(info.nbytes for info in self.reader.tensors.values()) // 3)
        self._parts.mkdir(parents=True, exist_ok=True)
        done = self._resume() if resume else []
        if not done:
            self._restart()
        for report in done:
            on_block(report, True)
        reports = list(done)
        for i in range(len(done), self.blocks):
            reports.append(self._block(i))
            on_block(reports[-1], False)
        self._assemble(reports)
        return reports

    # Marks and resume

    def fingerprint(self) -> str:
        """Everything that decides the output's bytes."""
        parts = {
            "source": self.reader.fingerprint(),
            "recipe": self.recipe.model_dump(mode="json"),
            "data": (self.data_report or {}).get("sha256"),
            "threads": torch.get_num_threads(),
            "versions": _versions(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _restart(self) -> None:
        for path in self._parts.iterdir():
            path.unlink()
        digest = self._stream.start() if self._stream else None
        write_json(self._parts / "start.json", {"fingerprint": self.fingerprint(), "hidden": digest})

    def _resume(self) -> list[BlockReport]:
        """The reports of the blocks that need no more work; empty if there is nothing usable."""
        start = self._parts / "start.json"
        if not start.is_file():
            return []
        try:
            begun = read_json(start)
            if begun.get("fingerprint") != self.fingerprint():
                return []
            marks: list[BlockReport] = []
            while (mark := self._mark_path(len(marks))).is_file():
                marks.append(BlockReport(**read_json(mark)))
            self._topologies = {p.stem: Topology.from_json(read_json(p)) for p in self._parts.glob("topology-*.json")}
        except (BadInput, TypeError, AttributeError):
            return []  # a torn or foreign work folder: begin again
        for i, mark_report in enumerate(marks):
            if _file_digest(self._part_path(i)) != mark_report.part:
                return []
        # A crash between a mark and the next leaves the last mark's hidden states; they are needed unless all is done.
        if self._stream and len(marks) < self.blocks:
            needed = marks[-1].hidden if marks else begun.get("hidden")
            if not needed or not self._stream.holds(len(marks), needed):
                return []
        for i, mark_report in enumerate(marks):  # structures are numbered as they are met: go on with the same numbers
            key = structure_key(self.skeleton.model.get_submodule(self.skeleton.blocks[i]))
            self._structures.setdefault(key, mark_report.structure)
        return marks

    def _mark_path(self, i: int) -> Path:
        return self._parts / f"block-{i:05d}.json"

    def _part_path(self, i: int) -> Path:
        return self._parts / f"block-{i:05d}.safetensors"

    # One block

    @torch.no_grad()
    def _block(self, i: int) -> BlockReport:
        block = self.skeleton.load_block(i)
        _check_finite(block, self.skeleton, i)
        structure, topology = self._topology(i, block)
        name = self.skeleton.blocks[i]
        work = BlockWork(
            block=block,
            topology=topology,
            grids={
                op.name: self.plan.grids[p]
                for op in topology.linears()
                if (p := f"{name}.{op.name}") in self.plan.grids
            },
            stats={},
            stored={f"{op.name}.weight": self._stored_dtype(i, op.name) for op in topology.ops if op.kind == "norm"},
        )
        layers, hidden = self._quantize(i, work)
        missed = [op for op in self._planned(i) if op not in work.results]
        if missed:
            raise RuntimeError(f"{name}: the recipe's steps left {missed} unquantized")
        self._write_part(i, work)
        notes = [*self._left_alone(i), *experts.merged(work.notes, block), *experts.tell(layers)]
        report = BlockReport(i, structure, layers, sorted(work.rewritten - _weights(work.results)), notes, hidden,
                             _file_digest(self._part_path(i)))  # fmt: skip
        write_json(self._mark_path(i), report.__dict__)
        if self._stream:
            self._stream.forget(i)
        self.skeleton.free_block(i)
        release()
        return report

    def _quantize(self, i: int, work: BlockWork) -> tuple[dict[str, dict[str, Any]], str | None]:
        """Let every step work on the block and run it on: (each layer's report, the digest of the next block's input)."""
        rewriting = [step for step in self.steps if step.rewrites]
        rounding = [step for step in self.steps if not step.rewrites]
        layers: dict[str, dict[str, Any]] = {}

        def round_space(space: Space, found: InputStats | None = None) -> None:
            if found is not None:
                work.observe(space, found)
            for step in rounding:
                step(work, space)
            layers.update(self._install(i, work, space))
            work.forget(space)  # a space is done when its readers are

        if self._stream and self.gathers:
            work.stats.update(self._stream.gather(i, work.block, work.topology))
        for step in rewriting:
            for space in work.topology.spaces:
                step(work, space)
        if self._stream and self._walks:
            return layers, self._stream.walk(i, work.block, work.topology, round_space)
        for space in work.topology.spaces:
            round_space(space)
        last = i + 1 == self.blocks
        return layers, self._stream.advance(i, work.block) if self._stream and not last else None

    def _left_alone(self, i: int) -> list[str]:
        """Notes on the block's experts that could not be taken apart."""
        prefix = f"{self.skeleton.blocks[i]}."
        stacked = self.skeleton.stacked.items()
        return [f"{path.removeprefix(prefix)} stays float: {why}" for path, why in stacked if path.startswith(prefix)]

    def _planned(self, i: int) -> list[str]:
        prefix = f"{self.skeleton.blocks[i]}."
        return [name.removeprefix(prefix) for name in self.plan.grids if name.startswith(prefix)]

    def _topology(self, i: int, block: nn.Module) -> tuple[str, Topology]:
        """The block's topology, discovered once per structure, and the structure's name in the reports."""
        key = structure_key(block)
        if key not in self._structures:
            name = f"topology-{len(self._structures)}"
            self._structures[key] = name
            if name not in self._topologies:
                self._topologies[name] = discover(self.skeleton, i)
                write_json(self._parts / f"{name}.json", self._topologies[name].to_json())
        name = self._structures[key]
        return name, self._topologies[name]

    def _stored_dtype(self, i: int, op_name: str) -> torch.dtype:
        return self.reader.tensors[self.skeleton.weight_key(i, op_name)].dtype

    def _install(self, i: int, work: BlockWork, space: Space) -> dict[str, dict[str, Any]]:
        """Put the dequantized weights of a space's readers into the block; what the reports and `verify` need to know."""
        layers = {}
        for op in work.topology.readers(space):
            if op.name not in work.results:
                continue
            q = work.results[op.name]
            w_OI, q_OI = work.weight(op), q.dequantize()
            error = None
            if space.name in work.stats:
                gram = work.gram(space)
                error = output_error(q_OI - w_OI, gram) / max(output_error(w_OI, gram), 1e-30)
            layers[self.skeleton.weight_key(i, op.name).removesuffix(".weight")] = {
                "bits": q.grid.bits,
                "group_size": q.grid.group or "channel",
                "symmetric": q.grid.symmetric,
                "error": error,
                "digest": q.digest(),
                **experts.facts(work.stats.get(space.name)),
            }
            w_OI.copy_(q_OI)
        return layers

    def _write_part(self, i: int, work: BlockWork) -> None:
        replaced: dict[str, dict[str, torch.Tensor]] = {}
        for op, q in work.results.items():
            key = self.skeleton.weight_key(i, op)
            replaced[key] = compressed_tensors.encode(key.removesuffix(".weight"), q)
        for path in work.rewritten - _weights(work.results):
            key = self.skeleton.tensor_key(i, path)
            value = work.block.get_parameter(path).data.to(self.reader.tensors[key].dtype)
            replaced[key] = {key: value}
        tensors: dict[str, torch.Tensor] = {}
        for key in self.skeleton.block_keys(i):
            tensors.update(replaced[key] if key in replaced else {key: self.reader.get(key)})
        write_safetensors(self._part_path(i), tensors)

    # The folder

    def _assemble(self, reports: list[BlockReport]) -> None:
        stage = self.output.stage
        stage.mkdir(parents=True, exist_ok=True)
        outer = self._parts / "outer.safetensors"
        keys = [*self.skeleton.outer_keys(), *self.skeleton.extra_keys()]
        write_safetensors(outer, {key: self.reader.get(key) for key in keys})
        merge_shards([outer, *(self._part_path(i) for i in range(self.blocks))], stage)
        ignored = experts.ignored_names(self.skeleton, self.plan.kept)
        stored = experts.names_in_file(self.skeleton, experts.split_names(self.skeleton, self.plan.grids))
        grids = {stored.get(name, name): grid for name, grid in self.plan.grids.items()}
        settings = compressed_tensors.config(grids, ignored, self._file_names(self.plan.transposed))
        write_folder(stage, self.reader, settings)
        (stage / "recipe.yaml").write_text(self.recipe.to_yaml(), encoding="utf-8")
        write_json(stage / "infopt.json", self._summary(reports))
        write_manifest(stage)

    def _file_names(self, names: frozenset[str]) -> Iterator[str]:
        for i, block in enumerate(self.skeleton.blocks):
            for name in names:
                if name.startswith(f"{block}."):
                    yield self.skeleton.weight_key(i, name.removeprefix(f"{block}.")).removesuffix(".weight")

    def _summary(self, reports: list[BlockReport]) -> dict[str, Any]:
        """infopt.json: no times and no paths, so that the same run gives the same bytes."""
        return {
            "versions": _versions(),
            "threads": torch.get_num_threads(),
            "calibration": self.data_report,
            "topologies": {name: t.to_json() for name, t in self._topologies.items()},
            "blocks": [{"structure": r.structure, "notes": r.notes} for r in reports],
            "layers": {name: layer for r in reports for name, layer in r.layers.items()},
            "rewritten": [self.skeleton.tensor_key(r.index, path) for r in reports for path in r.rewritten],
            "kept": self.plan.kept,
        }


def _check_finite(block: nn.Module, skeleton: Skeleton, i: int) -> None:
    for path, parameter in block.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            bad = int((~torch.isfinite(parameter)).sum())
            raise BadInput(
                f"{skeleton.blocks[i]}.{path} holds {bad} values that are NaN or infinite",
                "a scale made from them would spoil its whole group",
                "repair or download the model again",
            )


def _weights(results: dict[str, QTensor]) -> set[str]:
    return {f"{op}.weight" for op in results}


def _file_digest(path: Path) -> str:
    """The file's sha256; nothing where there is no file."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    return {"infopt": infopt.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def memory_needed(run: Run) -> int:
    """An upper estimate, in bytes, of the run's peak memory: the interpreter and its libraries, and the larger of the outer
    parts and of one block with its codes, statistics and one batch; all in fp32 as they are worked on."""
    meta = run.skeleton.model
    blocks = [sum(p.numel() for p in meta.get_submodule(name).parameters()) for name in run.skeleton.blocks]
    outer = sum(p.numel() for p in meta.parameters()) - sum(blocks)
    columns = {columns_of(meta.get_submodule(name)) for name in run.plan.grids}
    statistics = 5 * sum(4 * width * width for width in columns) if run.needs_data else 0
    if run.gathers:
        statistics += experts.statistics_bytes(run.skeleton)
    batch = 12 * 4 * max(columns) * run.batch_tokens
    return int(400e6 + max(4 * outer, 3 * 4 * max(blocks) + statistics + batch))
