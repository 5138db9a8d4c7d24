"""A recipe says what to do to a model: rows of steps, a numeric type, what to leave alone, and the calibration data.

The command line builds the same object from its flags, `recipe.yaml` beside every result is one, and any of them runs
again with `--recipe`. A default lives here, once. Files are untrusted: safe YAML without aliases or duplicate keys, unknown
keys refused with the nearest known one.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from infopt.errors import BadInput, UsageError

_MAX_FILE = 1 << 20


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class WeightScheme(_Strict):
    """The numeric type of the weights. group_size: columns that share a scale, or "channel"."""

    bits: Literal[2, 3, 4, 8] = 4
    group_size: Literal[32, 64, 128, "channel"] = 128
    symmetric: bool = True


class CalibrationData(_Strict):
    """Where calibration tokens come from: `num_samples` windows of `seqlen` tokens."""

    dataset: str = "builtin"
    num_samples: int = Field(default=128, ge=1)
    seqlen: int = Field(default=512, ge=8)
    seed: int = 0
    split: str | None = None
    column: str | None = None


class Recipe(_Strict):
    """steps: rows of {step name: {option: value}}, in order. ignore: glob or `re:` patterns of module paths.

    sequential: what a layer's calibration inputs have passed: the quantized layers before it (`space`), or only the
    quantized blocks before its own (`block`).
    group_fallback: what happens to a layer whose columns the group size does not divide: `error`, `adjust` (the largest
    group that divides, else the channel) or `skip` (left unquantized, in the report).
    min_expert_tokens: an expert that fewer calibration tokens reach is calibrated on the whole batch instead. 0: never; an
    expert without tokens is then rounded without data.
    """

    name: str = "custom"
    description: str = ""
    steps: tuple[dict[str, dict[str, Any]], ...] = Field(min_length=1, strict=False)
    sequential: Literal["space", "block"] = "block"
    weights: WeightScheme = WeightScheme()
    ignore: tuple[str, ...] = Field(default=(), strict=False)
    group_fallback: Literal["error", "adjust", "skip"] = "error"
    min_expert_tokens: int = Field(default=16, ge=0)
    calibration: CalibrationData = CalibrationData()

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def parse_recipe(data: Any, source: str) -> Recipe:
    """A Recipe from plain data; UsageError with the place, the reason and the nearest known key."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole file"
        reason, fix = first["msg"], "`infopt recipe show awq` prints a complete recipe"
        if first["type"] == "extra_forbidden":
            reason = "there is no such key"
            fix = did_you_mean(str(first["loc"][-1]), _fields(first["loc"][:-1])) or fix
        raise UsageError(f"{source}: {place}", reason, fix) from error


def load_recipe(path: Path) -> Recipe:
    """Read a YAML recipe file; BadInput if it is no YAML that infopt accepts, UsageError if it is no recipe."""
    try:
        if path.stat().st_size > _MAX_FILE:
            raise BadInput(f"{path}: larger than 1 MiB", "a recipe is a page of text", "give a recipe file")
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read", error.strerror or "", "see `infopt recipe list`") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise BadInput(
            f"{path}: not a recipe", str(error).replace("\n", " "), "see `infopt recipe show awq`"
        ) from error
    return parse_recipe(data, str(path))


def did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}" if known else ""


def match_ignored(patterns: tuple[str, ...], names: list[str]) -> set[str]:
    """The names that some pattern matches (a glob, a whole path, or `re:...` from the start of the path).

    A pattern that matches nothing is a UsageError: it is a typing mistake that would quantize what was to be kept.
    """
    ignored: set[str] = set()
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                compiled = re.compile(pattern[3:])
            except re.error as error:
                raise UsageError(f"--ignore {pattern}", f"not a regular expression: {error}", "") from error
            found = {name for name in names if compiled.match(name)}
        else:
            found = set(fnmatch.filter(names, pattern))
        if not found:
            fix = did_you_mean(pattern, names[:2000])
            raise UsageError(
                f"--ignore {pattern}", "it matches no layer of this model", f"{fix} (`infopt inspect MODEL`)"
            )
        ignored |= found
    return ignored


def _fields(location: tuple[Any, ...]) -> list[str]:
    models: dict[str, type[BaseModel]] = {"weights": WeightScheme, "calibration": CalibrationData}
    model = models.get(str(location[0]), Recipe) if location else Recipe
    return list(model.model_fields)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses aliases (the "billion laughs") and duplicate keys (the last would win silently)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed in a recipe")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key!r} stands twice, {node.start_mark}")
        return super().construct_mapping(node, deep)
