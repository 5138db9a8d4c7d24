"""What a run of a recipe writes: each block's tensors as it is done, and the folder of the quantized model in the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infopt.checkpoint import CheckpointReader
from infopt.exporters import kv_cache
from infopt.exporters.folder import write_folder
from infopt.exporters.quantized import Format
from infopt.kv_cache import CacheGrid, CacheScales, attention_path
from infopt.model import Skeleton
from infopt.output import merge_shards, write_json, write_manifest, write_safetensors
from infopt.quantizers.work import BlockWork
from infopt.recipe import Recipe
from infopt.recipes import experts
from infopt.recipes.marks import BlockReport, versions
from infopt.recipes.pareto import pareto_svg
from infopt.recipes.plan import Plan
from infopt.recipes.rotation import changed_by, summary
from infopt.topology import Topology


@dataclass(frozen=True)
class Result:
    """The model of `reader` quantized as `plan` says, in the words of `form`. data_report, allocation: where there were
    calibration data, and bits to choose. processes: how many made it."""

    reader: CheckpointReader
    skeleton: Skeleton
    recipe: Recipe
    plan: Plan
    form: Format
    cache: CacheGrid | None
    data_report: dict[str, Any] | None
    allocation: dict[str, Any] | None
    processes: int

    def write_block(self, path: Path, i: int, work: BlockWork, scales: CacheScales | None) -> None:
        """All tensors of block i: codes, what was rewritten, the rest as it was, the scales of its cache."""
        replaced: dict[str, dict[str, torch.Tensor]] = {}
        for op, q in work.results.items():
            key = self.skeleton.weight_key(i, op)
            replaced[key] = self.form.encode(key.removesuffix(".weight"), q)
        for parameter in work.carried:
            key = self.skeleton.tensor_key(i, parameter)
            value = work.block.get_parameter(parameter).data.to(self.reader.tensors[key].dtype)
            replaced[key] = {key: value}
        tensors: dict[str, torch.Tensor] = {}
        for key in self.skeleton.block_keys(i):
            tensors.update(replaced[key] if key in replaced else {key: self.reader.get(key)})
        if self.cache and scales:
            tensors |= kv_cache.encode(self.skeleton.stored_path(i, attention_path(work.block)), self.cache, scales)
        write_safetensors(path, tensors)

    def write_folder(
        self,
        stage: Path,
        outer: Path,
        blocks: list[Path],
        reports: list[BlockReport],
        topologies: Mapping[str, Topology],
    ) -> None:
        """The folder with its manifest, from the files of the blocks, which it uses up. outer: where the other tensors go."""
        stage.mkdir(parents=True, exist_ok=True)
        keys = [*self.skeleton.outer_keys(), *self.skeleton.extra_keys()]
        write_safetensors(outer, {key: self.reader.get(key) for key in keys})
        merge_shards([outer, *blocks], stage)
        ignored = experts.ignored_names(self.skeleton, self.plan.kept)
        stored = experts.names_in_file(self.skeleton, experts.split_names(self.skeleton, self.plan.grids))
        grids = {stored.get(name, name): grid for name, grid in self.plan.grids.items()}
        settings = self.form.config(grids, ignored, self._file_names(self.plan.transposed))
        if self.cache:
            settings["kv_cache_scheme"] = kv_cache.settings(self.cache)
        write_folder(stage, self.reader, settings)
        (stage / "recipe.yaml").write_text(self.recipe.to_yaml(), encoding="utf-8")
        write_json(stage / "infopt.json", self._summary(reports, topologies))
        if self.allocation:
            (stage / "pareto.svg").write_text(pareto_svg(self.allocation), encoding="utf-8")
        write_manifest(stage)

    def _file_names(self, names: frozenset[str]) -> Iterator[str]:
        for i, block in enumerate(self.skeleton.blocks):
            for name in names:
                if name.startswith(f"{block}."):
                    yield self.skeleton.weight_key(i, name.removeprefix(f"{block}.")).removesuffix(".weight")

    def _summary(self, reports: list[BlockReport], topologies: Mapping[str, Topology]) -> dict[str, Any]:
        """infopt.json: no times and no paths, so that the same run gives the same bytes."""
        return {
            "versions": versions(),
            "threads": torch.get_num_threads(),
            **({"processes": self.processes} if self.processes > 1 else {}),
            "calibration": self.data_report,
            "topologies": {name: t.to_json() for name, t in topologies.items()},
            "blocks": [{"structure": r.structure, "notes": r.notes} for r in reports],
            "layers": {name: layer for r in reports for name, layer in r.layers.items()},
            "rewritten": changed_by(self.reader)
            + [self.skeleton.tensor_key(r.index, path) for r in reports for path in r.rewritten],
            "kept": self.plan.kept,
            **({"allocation": self.allocation} if self.allocation else {}),
            **summary(self.reader),
        }
