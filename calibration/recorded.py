"""Statistics of a model's calibration inputs in a folder: made once by `infopt calibrate`, used by any number of runs.

A folder holds one safetensors file for each block, and `calibration.json`: what they were made from and what they hold. Of
every space (and of every expert) the file has what `InputStats` counts; of the cache, keys and values of some tokens.
The largest part are the Gram matrices, half of each, 2 bytes for a pair of a space's channels: 7 MB a block for SmolLM2-135M,
350 MB for a model of 7 billion weights; then the samples, 1024 tokens at most.

The inputs are those of the *original* model. What a run changes before a layer (quantized predecessors) is not in them, so
`Recorded` stands for a stream in runs with `sequential: none` alone, in which no run of calibration data is left.

Nothing of a folder is trusted: its manifest is checked when it is opened, each tensor when it is read; and the model must be
the one that was calibrated, byte for byte, which its digest tells.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from infopt.calibration.stats import EVERYTHING, InputStats
from infopt.checkpoint import CheckpointReader
from infopt.errors import BadInput, UsageError
from infopt.header import read_header, read_json, read_tensor
from infopt.memory import bytes_of
from infopt.output import MANIFEST, check_manifest
from infopt.recipe import CalibrationData, Recipe
from infopt.topology import Topology

ABOUT = "calibration.json"
FORMAT = "infopt-calibration-1"
_AGAIN = "make them again: `infopt calibrate MODEL -o STATS`"
_WITHOUT = "leave --calibration out"


def part_name(i: int) -> str:
    """The file of block i."""
    return f"block-{i:05d}.safetensors"


def to_tensors(stats: dict[str, InputStats], cache: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What is stored of a block. cache: its keys and values as `Stream.watch_cache` gives them, empty for a block without."""
    found = {f"{name}/{part}": x for name, found in stats.items() for part, x in found.to_tensors().items()}
    return found | {f"cache/{which}": torch.cat(parts) for which, parts in cache.items()}


def model_digest(reader: CheckpointReader) -> str:
    """A sha256 of the config and of every tensor's bytes, in whatever files they are."""
    digest = hashlib.sha256(json.dumps(reader.config, sort_keys=True).encode())
    for name, info in sorted(reader.tensors.items()):
        digest.update(f"\n{name!r} {info.dtype} {info.shape}\n".encode())
        digest.update(bytes_of(reader.get(name)).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class About:
    """`calibration.json`. model: see `model_digest`. holds: parts of the statistics. data: the report of what was read."""

    model: str
    rotate: bool
    min_expert_tokens: int
    holds: tuple[str, ...]
    cache: bool
    calibration: CalibrationData
    data: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        plain = {**self.__dict__, "holds": list(self.holds), "calibration": self.calibration.model_dump(mode="json")}
        return {"format": FORMAT, "fingerprint": self.fingerprint(), **plain}

    def fingerprint(self) -> str:
        """Of all that decides what the statistics are: model, text, tokens, their choice, and what was counted of them."""
        plain = {**self.__dict__, "calibration": self.calibration.model_dump(mode="json"), "data": self.data["sha256"]}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

    @classmethod
    def read(cls, folder: Path) -> About:
        """Raises BadInput for anything but what infopt wrote."""
        if not (folder / ABOUT).is_file():
            raise BadInput(f"{folder} holds no statistics", f"there is no {ABOUT} in it", _AGAIN)
        found = read_json(folder / ABOUT)
        try:
            if found.pop("format") != FORMAT:
                raise BadInput(f"{folder / ABOUT}: an unknown format", f"this version reads {FORMAT}", _AGAIN)
            fingerprint = found.pop("fingerprint")
            found["calibration"] = CalibrationData.model_validate(found["calibration"])
            found["holds"] = tuple(found["holds"])
            about = cls(**found)
            same = about.fingerprint() == fingerprint
        except (KeyError, TypeError, AttributeError, ValidationError) as error:
            raise BadInput(f"{folder / ABOUT} is not what infopt writes", str(error)[:200], _AGAIN) from error
        if not same:
            raise BadInput(f"{folder / ABOUT} was changed", "its fingerprint is not that of what it says", _AGAIN)
        return about


class Recorded:
    """The statistics in `folder`, in the place of a `Stream`. cache, hold, min_expert_tokens: as there, and without effect.

    Raises BadInput (no statistics, damaged ones) and VerificationFailed (files that are not those of the manifest).
    """

    batch_tokens = 0

    def __init__(self, folder: Path) -> None:
        self.folder, self.about = folder, About.read(folder)
        check_manifest(folder)
        self.cache: Any = None
        self.hold = 0
        self.min_expert_tokens = self.about.min_expert_tokens
        self.digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()

    def check_model(self, reader: CheckpointReader) -> None:
        """BadInput if the statistics are of another model. Reads all of it."""
        if model_digest(reader) != self.about.model:
            raise BadInput(
                f"{self.folder} does not belong to {reader.folder}",
                "the statistics were made from other weights or another config.json",
                _AGAIN,
            )

    def check_recipe(self, recipe: Recipe, needs: frozenset[str], rewrites: bool, experts: bool) -> None:
        """UsageError for what a recipe asks and the statistics do not have. needs: of its steps; rewrites: whether a step
        changes what other layers are given; experts: whether the model has some."""
        about, what = self.about, f"the statistics in {self.folder}"
        if recipe.target is not None:
            raise UsageError(
                f"{what} cannot decide the bits of layers",
                "what a layer suffers from fewer bits is found by running its block on the text",
                _WITHOUT,
            )
        if recipe.sequential != "none":
            raise UsageError(
                f"{what} are those of the original model's inputs",
                f"the recipe says sequential: {recipe.sequential}, so layers want inputs that quantized ones have made",
                f"--sequential none, or {_WITHOUT}",
            )
        if missing := needs - set(about.holds):
            raise UsageError(
                f"{what} lack {', '.join(sorted(missing))}, which the recipe reads",
                f"they hold {', '.join(about.holds)}",
                "make them without --method, or for this one: `infopt calibrate MODEL --method NAME -o STATS`",
            )
        if recipe.first_token != 1:
            raise UsageError(
                f"{what} count every token once",
                f"the recipe says first_token: {recipe.first_token}",
                f"first_token: 1, or {_WITHOUT}",
            )
        if recipe.rotate != about.rotate:
            raise UsageError(
                f"{what} are those of the {'rotated' if about.rotate else 'original'} model",
                "a rotation changes what every layer is given",
                "--rotate" if about.rotate else "`infopt calibrate MODEL --rotate -o STATS`",
            )
        if experts and recipe.min_expert_tokens != about.min_expert_tokens:
            raise UsageError(
                f"{what} were made with --min-expert-tokens {about.min_expert_tokens}",
                f"the recipe says {recipe.min_expert_tokens}, by which other experts would have seen the whole batch",
                f"--min-expert-tokens {about.min_expert_tokens}",
            )
        cache = recipe.kv_cache
        if cache and cache.calibrated and (rewrites or cache.balanced or not about.cache):
            raise UsageError(
                f"{what} cannot give scales for this cache",
                "steps of the recipe change the values that are kept in it"
                if rewrites
                else "they do not say what an error in it would do"
                if cache.balanced
                else "they hold no keys and values",
                _WITHOUT,
            )

    def start(self) -> str:
        return self.digest

    def holds(self, i: int, digest: str) -> bool:
        return digest == self.digest

    def forget(self, i: int) -> None:
        """Nothing: other runs will read it."""

    def gather_and_advance(
        self, i: int, block: nn.Module, topology: Topology, needs: frozenset[str] = EVERYTHING
    ) -> tuple[dict[str, InputStats], str]:
        """The statistics of every space of block i, by the space's name. Raises BadInput."""
        infos = self._infos(i)
        stats = {}
        for space in topology.spaces:
            parts = {
                part: read_tensor(info)
                for part in ("counts", *needs)
                if (info := infos.get(f"{space.name}/{part}")) is not None
            }
            try:
                stats[space.name] = InputStats.from_tensors(space.width, needs, parts)
            except ValueError as error:
                raise BadInput(f"{self.folder / part_name(i)}: {space.name}", str(error), _AGAIN) from error
        return stats, self.digest

    def watch_cache(self, i: int, block: nn.Module, first: int = 0) -> dict[str, list[torch.Tensor]]:
        """Keys and values as `Stream.watch_cache` gives them, of all tokens whatever `first` is. Raises BadInput."""
        infos = self._infos(i)
        try:
            seen = {which: [read_tensor(infos[f"cache/{which}"])] for which in "kv"}
        except KeyError as error:
            raise BadInput(f"{self.folder / part_name(i)}", "it has no keys and values", _AGAIN) from error
        if any(x.dim() != 4 or not x.is_floating_point() or not x.isfinite().all() for (x,) in seen.values()):
            raise BadInput(f"{self.folder / part_name(i)}", "its keys and values are none", _AGAIN)
        return seen

    def _infos(self, i: int) -> dict[str, Any]:
        path = self.folder / part_name(i)
        if not path.is_file():
            raise BadInput(f"{path} is missing", "the statistics are of a model with fewer blocks", _AGAIN)
        return read_header(path)[0]
