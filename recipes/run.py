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
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from infopt.calibration.lanes import enough_cores
from infopt.calibration.recorded import Recorded
from infopt.calibration.stats import InputStats
from infopt.calibration.stream import Stream
from infopt.checkpoint import CheckpointReader
from infopt.errors import Unsupported, UsageError
from infopt.experts import experts_in
from infopt.exporters import compressed_tensors
from infopt.exporters.folder import model_config
from infopt.exporters.formats import check
from infopt.exporters.quantized import Format
from infopt.kv_cache import CacheScales, RoundingCache
from infopt.memory import release
from infopt.model import Skeleton
from infopt.output import OutputFolder, free_space_check
from infopt.qtensor import QTensor
from infopt.quantizers.awq import output_error
from infopt.quantizers.kv_cache import choose_frames, choose_scales
from infopt.quantizers.work import BlockWork, Step
from infopt.recipe import Recipe
from infopt.recipes import experts
from infopt.recipes.blocks import Blocks
from infopt.recipes.marks import BlockReport, Marks, file_digest, versions
from infopt.recipes.plan import Plan, cache_grid, columns_of, out_in, plan
from infopt.recipes.result import Result
from infopt.recipes.rotation import rotated
from infopt.rewriters.rotate import Rotated
from infopt.team import ALONE, Team
from infopt.topology import Space

_ERROR_ROWS = 256  # output channels of a layer whose error is reported, evenly spread


class Run:
    """One run of a recipe, in the work folder of `output`. `windows_NT` may be None if no step needs data, or where
    `recorded` statistics take its place."""

    def __init__(
        self,
        reader: CheckpointReader,
        recipe: Recipe,
        steps: list[Step],
        output: OutputFolder,
        windows_NT: torch.Tensor | None,
        data_report: dict[str, Any] | None = None,
        form: Format = compressed_tensors.FORMAT,
        allocation: dict[str, Any] | None = None,
        team: Team = ALONE,
        recorded: Recorded | None = None,
    ) -> None:
        self.team = team
        if recipe.rotate and not isinstance(reader, Rotated):
            reader = rotated(reader, recipe.calibration.seed)
        self.reader, self.recipe, self.steps, self.output = reader, recipe, steps, output
        self.skeleton = Skeleton(model_config(reader.config), reader)
        self.form = form
        self.plan = self._held(plan(self.skeleton, recipe))
        self.data_report = data_report
        self._marks = Marks(output.work / "parts")
        self._blocks = Blocks(self.skeleton, self._marks)
        self._stream: Stream | Recorded | None = None
        self.cache = cache_grid(recipe)
        self._result = Result(
            reader, self.skeleton, recipe, self.plan, form, self.cache, data_report, allocation, team.size
        )
        if "shift" in needs_of(steps) and recipe.sequential != "space":
            raise UsageError(
                "the step `correct` compares quantized inputs with original ones, space by space",
                f"the recipe says sequential: {recipe.sequential}",
                "--sequential space, without --calibration",
            )
        if recorded and needs_data(recipe, steps):
            rewrites = any(step.rewrites for step in steps)
            recorded.check_recipe(recipe, needs_of(steps), rewrites, bool(experts_in(self.skeleton.model)))
            self._stream = recorded
        elif needs_data(recipe, steps):
            if windows_NT is None:
                raise ValueError("a step needs calibration data")
            self._stream = self.stream(team.share(windows_NT), "hidden", "shift" in needs_of(steps), team)

    def stream(self, windows_NT: torch.Tensor, folder: str, twin: bool = False, team: Team = ALONE) -> Stream:
        """Windows on their way through the model, counted as the recipe says; files go into this folder of the work folder."""
        stream = Stream(self.skeleton, windows_NT, self.output.work / folder, twin, team)
        begun = (self.data_report or {}).get("beginning")
        stream.min_expert_tokens, stream.batches.first_token = (
            self.recipe.min_expert_tokens,
            self.recipe.first_token if begun else 1,
        )
        return stream

    def _held(self, made: Plan) -> Plan:
        """The plan with scales as the format stores them; Unsupported, before any work, where it cannot hold the plan."""
        grids = {name: self.form.settled(grid) for name, grid in made.grids.items()}
        modules = {name: self.skeleton.model.get_submodule(name) for name in grids}
        held = {name: (grid, out_in(modules[name])) for name, grid in grids.items()}
        if self.recipe.target:  # any layer may be given any of these
            held = {
                f"{name} with {bits} bits": (replace(grid, bits=bits), shape)
                for name, (grid, shape) in held.items()
                for bits in self.recipe.target.choices
            }
        check(self.form, held)
        if self.recipe.kv_cache and self.form.weight_only:
            raise Unsupported(
                f"the format {self.form.name} says nothing about a key-value cache",
                "its scales would be lost",
                "--format compressed-tensors",
            )
        return replace(made, grids=grids)

    @property
    def blocks(self) -> int:
        return len(self.skeleton.blocks)

    @property
    def needs_data(self) -> bool:
        return self._stream is not None

    @property
    def _walks(self) -> bool:
        """Whether rounding stops at every space."""
        return self.recipe.sequential == "space" and any(step.needs for step in self.steps if not step.rewrites)

    @property
    def _float_inputs(self) -> bool:
        """Whether layers are given what the original model's layers are."""
        return self.recipe.sequential == "none"

    @property
    def gathers(self) -> bool:
        """Whether the statistics of a whole block are held at once."""
        steps = [step for step in self.steps if step.rewrites or not self._walks]
        return self.needs_data and any(step.needs for step in steps)

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
        done = self._resume() if resume else []
        if not self.team.same(len(done)) or not done:  # processes may have died between each other's marks
            done = []
            self._marks.restart(self.fingerprint(), self._stream.start() if self._stream else None)
        for report in done:
            on_block(report, True)
        reports = list(done)
        for i in range(len(done), self.blocks):
            reports.append(self._block(i))
            on_block(reports[-1], False)
        if self.team.writes:
            outer, parts = self._marks.folder / "outer.safetensors", [self._marks.part(i) for i in range(self.blocks)]
            self._result.write_folder(self.output.stage, outer, parts, reports, self._blocks.topologies)
        return reports

    def fingerprint(self) -> str:
        """Everything that decides the output's bytes."""
        parts = {
            "source": self.reader.fingerprint(),
            "recipe": self.recipe.model_dump(mode="json"),
            "format": self.form.name,
            "data": [(self.data_report or {}).get(key) for key in ("sha256", "statistics")],
            "threads": torch.get_num_threads(),
            "processes": self.team.size,
            "versions": versions(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _resume(self) -> list[BlockReport]:
        """The reports of the blocks that need no more work; empty if there is nothing usable."""
        # A crash between a mark and the next leaves the last mark's hidden states; they are needed unless all is done.
        begun = self._marks.read(self.fingerprint(), lambda i, digest: self._stream is None or i == self.blocks or
                                 self._stream.holds(i, digest))  # fmt: skip
        if not begun:
            return []
        self._blocks.go_on(*begun)
        return begun[0]

    # One block

    @torch.no_grad()
    def _block(self, i: int) -> BlockReport:
        block, structure, topology = self._blocks.load(i)
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
            team=self.team,
        )
        try:
            layers, hidden, scales = self._quantize(i, work)
        finally:
            work.close()
        if missed := [op for op in self._planned(i) if op not in work.results]:
            raise RuntimeError(f"{name}: the recipe's steps left {missed} unquantized")
        if self.team.writes:
            self._result.write_block(self._marks.part(i), i, work, scales)
        notes = [*self._left_alone(i), *experts.merged(work.notes, block), *experts.tell(layers)]
        report = BlockReport(i, structure, layers, sorted(work.carried), notes, hidden,
                             file_digest(self._marks.part(i)))  # fmt: skip
        self._marks.write(report)
        if self._stream:
            self._stream.forget(i)
        self.skeleton.free_block(i)
        release()
        return report

    def _quantize(self, i: int, work: BlockWork) -> tuple[dict[str, dict[str, Any]], str | None, CacheScales | None]:
        """Let every step work on the block and run it on: (each layer's report, the digest of the next block's input, the
        scales of its cache)."""
        rewriting = [step for step in self.steps if step.rewrites]
        rounding = [step for step in self.steps if not step.rewrites]
        layers: dict[str, dict[str, Any]] = {}

        def round_space(space: Space, found: InputStats | None = None) -> None:
            if found is not None:
                work.observe(space, found)
            with enough_cores(sum(op.out_features * op.in_features for op in work.topology.readers(space))):
                for step in rounding:
                    step(work, space)
                layers.update(self._install(i, work, space))
            work.forget(space)  # a space is done when its readers are

        if self._stream:
            self._stream.cache = None
        onward = None
        if self._stream and self._float_inputs:
            found, onward = self._stream.gather_and_advance(i, work.block, work.topology, needs_of(self.steps))
            work.stats.update(found)
        elif isinstance(self._stream, Stream) and self.gathers:
            needs = needs_of(rewriting if self._walks else self.steps)
            work.stats.update(self._stream.gather(i, work.block, work.topology, needs))
        for step in rewriting:
            for space in work.topology.spaces:
                step(work, space)
        scales = self._cache_scales(i, work.block)
        if self._stream:
            self._stream.cache = RoundingCache(self.cache, scales) if self.cache else None
        if isinstance(self._stream, Stream) and self._walks:
            return layers, self._stream.walk(i, work.block, work.topology, round_space, needs_of(rounding)), scales
        for space in work.topology.spaces:
            round_space(space)
        if isinstance(self._stream, Stream) and not self._float_inputs and i + 1 < self.blocks:
            onward = self._stream.advance(i, work.block)
        return layers, onward, scales

    def _cache_scales(self, i: int, block: nn.Module) -> CacheScales | None:
        if self.cache is None or self._stream is None:
            return None
        first, frames = self.cache.sinks, None
        if self.cache.balanced and isinstance(self._stream, Stream):
            frames = choose_frames(self._stream.feel_cache(i, block, first))
        if self.cache.static:
            return choose_scales(self.cache, self._stream.watch_cache(i, block, first), frames)
        return CacheScales(frames=frames) if frames else None

    def stored_key(self, name: str) -> str:
        """The checkpoint's key of a planned layer's weight, by the layer's module path."""
        i, block = max(
            enumerate(self.skeleton.blocks), key=lambda at: len(at[1]) if name.startswith(f"{at[1]}.") else 0
        )
        return self.skeleton.weight_key(i, name.removeprefix(f"{block}."))

    def _left_alone(self, i: int) -> list[str]:
        """Notes on the block's experts that could not be taken apart."""
        prefix = f"{self.skeleton.blocks[i]}."
        stacked = self.skeleton.stacked.items()
        return [f"{path.removeprefix(prefix)} stays float: {why}" for path, why in stacked if path.startswith(prefix)]

    def _planned(self, i: int) -> list[str]:
        prefix = f"{self.skeleton.blocks[i]}."
        return [name.removeprefix(prefix) for name in self.plan.grids if name.startswith(prefix)]

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
            self._check_scales(i, op.name, q)
            error = None
            if space.name in work.stats and "gram" in work.stats[space.name].needs:
                some = slice(None, None, -(-len(w_OI) // _ERROR_ROWS))
                gram = work.gram(space)
                error = output_error((q_OI - w_OI)[some], gram) / max(output_error(w_OI[some], gram), 1e-30)
            layers[self.skeleton.weight_key(i, op.name).removesuffix(".weight")] = {
                "type": q.grid.kind,
                "bits": q.grid.bits,
                "group_size": q.grid.group if q.grid.strategy == "group" else q.grid.strategy,
                "symmetric": q.grid.symmetric,
                "error": error,
                "digest": q.digest(),
                **experts.facts(work.stats.get(space.name)),
            }
            work.install(op)
        return layers

    def _check_scales(self, i: int, op_name: str, q: QTensor) -> None:
        if not bool(torch.isfinite(q.scale.float()).all()):
            dtype = str(q.grid.scale_dtype).removeprefix("torch.")
            raise Unsupported(
                f"{self.skeleton.blocks[i]}.{op_name}: its weights need a scale larger than {dtype} can hold",
                f"the largest is {float(torch.finfo(q.grid.scale_dtype).max):.0f}",
                f"--format compressed-tensors --ignore '*.{op_name}'",
            )


def needs_data(recipe: Recipe, steps: list[Step]) -> bool:
    """Whether calibration data must be read: for a step, for static scales of the cache, or to choose bits."""
    if recipe.target is not None:
        return True
    return any(step.needs for step in steps) or (recipe.kv_cache is not None and recipe.kv_cache.calibrated)


def needs_of(steps: list[Step]) -> frozenset[str]:
    """The statistics that some of the steps read."""
    return frozenset().union(*(step.needs for step in steps))


def memory_needed(run: Run) -> int:
    """An upper estimate, in bytes, of the run's peak memory: the interpreter and its libraries, and the larger of the outer
    parts and of one block with its codes, statistics and one batch; all in fp32 as they are worked on."""
    meta = run.skeleton.model
    blocks = [sum(p.numel() for p in meta.get_submodule(name).parameters()) for name in run.skeleton.blocks]
    outer = sum(p.numel() for p in meta.parameters()) - sum(blocks)
    columns = {columns_of(meta.get_submodule(name)) for name in run.plan.grids} or {run.skeleton.width}
    statistics = 5 * sum(4 * width * width for width in columns) if run.needs_data else 0
    if run.gathers:
        statistics += experts.statistics_bytes(run.skeleton)
    batch = 12 * 4 * max(columns) * run.batch_tokens
    return int(400e6 + max(4 * outer, 3 * 4 * max(blocks) + statistics + batch))
