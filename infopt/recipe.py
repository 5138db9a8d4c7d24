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
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from infopt.errors import BadInput, UsageError

_MAX_FILE = 1 << 20


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class WeightScheme(_Strict):
    """The numeric type of the weights: integers of some bits, or floats of 8 (E4M3). group_size: columns that share a
    scale, "channel" (an output channel), "tensor" (all), or "block" (128 x 128)."""

    type: Literal["int", "float"] = "int"
    bits: Literal[2, 3, 4, 8] = 4
    group_size: Literal[32, 64, 128, "channel", "tensor", "block"] = 128
    symmetric: bool = True

    @model_validator(mode="after")
    def _one_float(self) -> WeightScheme:
        if self.type == "float" and not (self.bits == 8 and self.symmetric):
            raise ValueError("floats have 8 bits and no zero points: `bits: 8, symmetric: true`")
        return self


class InputScheme(_Strict):
    """How the inputs of every quantized layer are rounded, to 8 bits. dynamic: by each token's own maximum (or that of
    each `group_size` columns of a token) when the model runs; otherwise by one scale per layer, from calibration."""

    type: Literal["int", "float"] = "int"
    dynamic: bool = True
    group_size: Literal[128] | None = None

    @model_validator(mode="after")
    def _group_is_dynamic(self) -> InputScheme:
        if self.group_size and not self.dynamic:
            raise ValueError("a static scale is one for the whole tensor: leave group_size out")
        return self


class CacheScheme(_Strict):
    """The key-value cache: integers of 4 or 8 bits or floats of 8. strategy: what shares a scale; "token" is found while
    the model runs, the others come from calibration. balanced: kept in coordinates in which errors do little harm, also from
    calibration. sinks: so many tokens at the start of each text are kept as they are."""

    type: Literal["int", "float"] = "float"
    bits: Literal[4, 8] = 8
    strategy: Literal["tensor", "head", "channel", "token"] = "tensor"
    symmetric: bool = True
    balanced: bool = False
    sinks: int = Field(default=0, ge=0, le=16)

    @property
    def calibrated(self) -> bool:
        """Whether anything of it comes from calibration data."""
        return self.balanced or self.strategy != "token"

    @model_validator(mode="after")
    def _only_ours(self) -> CacheScheme:
        if (self.balanced or self.sinks) and self.strategy in ("tensor", "head"):
            raise ValueError(
                "servers read `strategy: tensor` and `head` as plain scales: with balanced or sinks take channel"
            )
        return self


class Override(_Strict):
    """Other weights for some layers. match: glob or `re:` patterns of module paths."""

    match: tuple[str, ...] = Field(min_length=1, strict=False)
    weights: WeightScheme


class Target(_Strict):
    """A budget that decides the bits of every layer: `bits` on average (of codes, without scales), or the `size` of all
    weight files, such as "3GB". choices: the bits to choose from."""

    bits: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    size: str | None = None
    choices: tuple[Literal[2, 3, 4, 8], ...] = Field(default=(3, 4, 8), min_length=1, strict=False)

    @model_validator(mode="after")
    def _one_budget(self) -> Target:
        if (self.bits is None) == (self.size is None):
            raise ValueError("give either bits or size")
        self.nbytes()
        return self

    def nbytes(self) -> int:
        """The size in bytes, 0 where the target is bits."""
        return parse_size(self.size) if self.size is not None else 0


class CalibrationData(_Strict):
    """Where calibration tokens come from: `num_samples` windows of `seqlen` tokens, cut from all rows joined. padding: each
    row is a window of its own instead, of `seqlen` tokens at most."""

    dataset: str = "builtin"
    num_samples: int = Field(default=128, ge=1)
    seqlen: int = Field(default=512, ge=8)
    seed: int = Field(default=0, ge=0, lt=2**63)
    split: str | None = None
    column: str | None = None
    padding: bool = False


class Recipe(_Strict):
    """steps: rows of {step name: {option: value}}, in order. ignore: glob or `re:` patterns of module paths. inputs: how
    the inputs of quantized layers are rounded, None if they are not. kv_cache: how the cache is, None for a float one.
    overrides: layers with other weights, the first that matches counts. target: a budget from which overrides are made.
    Without steps the weights stay as they are, and only the cache is quantized. rotate: before anything else, turn the residual
    stream and the values of every head by Hadamard matrices whose signs come from the calibration's seed. rewrite: before that,
    fewer key-value heads or a sliding window, by the options of `infopt rewrite`: {kv_heads: 4, heal_steps: 64}.

    sequential: what a layer's calibration inputs have passed: the quantized layers before it (`space`), only the
    quantized blocks before its own (`block`), or nothing quantized (`none`: they are the original model's, as statistics
    that were stored by `infopt calibrate` are).

    group_fallback: what happens to a layer whose columns the group size does not divide: `error`, `adjust` (the largest
    group that divides, else the channel) or `skip` (left unquantized, in the report).
    min_expert_tokens: an expert that fewer calibration tokens reach is calibrated on the whole batch instead. 0: never; an
    expert without tokens is then rounded without data.
    first_token: how often the token that the tokenizer puts before every text counts in the statistics of a layer's inputs.
    All tokens of a text attend to it, and of a window it is one of 512. Without effect where there is none.
    """

    name: str = "custom"
    description: str = ""
    steps: tuple[dict[str, dict[str, Any]], ...] = Field(default=(), strict=False)
    rotate: bool = False
    rewrite: dict[str, Any] | None = None
    sequential: Literal["space", "block", "none"] = "block"
    weights: WeightScheme = WeightScheme()
    inputs: InputScheme | None = None
    kv_cache: CacheScheme | None = None
    overrides: tuple[Override, ...] = Field(default=(), strict=False)
    target: Target | None = None
    ignore: tuple[str, ...] = Field(default=(), strict=False)
    group_fallback: Literal["error", "adjust", "skip"] = "error"
    min_expert_tokens: int = Field(default=16, ge=0)
    first_token: int = Field(default=1, ge=1, le=1024)
    calibration: CalibrationData = CalibrationData()

    @model_validator(mode="after")
    def _does_something(self) -> Recipe:
        if not self.steps and self.kv_cache is None:
            raise ValueError("it has neither steps nor a kv_cache: nothing would be done")
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


_CHANNELS = {"type": "int", "bits": 8, "group_size": "channel", "symmetric": True}
_FLOATS = {**_CHANNELS, "type": "float"}
#: The names that servers use for pairs of weight and input types; what a scheme leaves open stays as the recipe has it.
SCHEMES: dict[str, dict[str, Any]] = {
    **{f"W{bits}A16": {"weights": {"type": "int", "bits": bits}, "inputs": None} for bits in (2, 3, 4, 8)},
    "W8A8": {"weights": _CHANNELS, "inputs": {"type": "int"}},
    "W8A8_STATIC": {"weights": _CHANNELS, "inputs": {"type": "int", "dynamic": False}},
    "FP8": {"weights": {**_FLOATS, "group_size": "tensor"}, "inputs": {"type": "float", "dynamic": False}},
    "FP8_DYNAMIC": {"weights": _FLOATS, "inputs": {"type": "float"}},
    "FP8_BLOCK": {"weights": {**_FLOATS, "group_size": "block"}, "inputs": {"type": "float", "group_size": 128}},
    "W4A8": {"weights": {"type": "int", "bits": 4}, "inputs": {"type": "int"}},
    "W4AFP8": {"weights": {"type": "int", "bits": 4}, "inputs": {"type": "float"}},
}


#: The words of --kv-cache. "-token": a scale for each token and head, found while the model runs. "-balanced": in coordinates
#: from calibration, the first token as it is.
CACHES: dict[str, dict[str, Any]] = {
    "fp8": {"type": "float", "bits": 8, "strategy": "tensor", "symmetric": True},
    "int8": {"type": "int", "bits": 8, "strategy": "head", "symmetric": True},
    "int4": {"type": "int", "bits": 4, "strategy": "channel", "symmetric": False},
    "int8-token": {"type": "int", "bits": 8, "strategy": "token", "symmetric": True},
    "int4-token": {"type": "int", "bits": 4, "strategy": "token", "symmetric": False},
    "fp8-balanced": {"type": "float", "bits": 8, "strategy": "channel", "balanced": True, "sinks": 1},
    "int8-balanced": {"type": "int", "bits": 8, "strategy": "token", "balanced": True, "sinks": 1},
    "int4-balanced": {"type": "int", "bits": 4, "strategy": "token", "symmetric": False, "balanced": True, "sinks": 1},
}


def with_scheme(data: dict[str, Any], name: str) -> dict[str, Any]:
    """A recipe's plain data with the types of the scheme, and the step that static inputs need; UsageError for others."""
    scheme = SCHEMES.get(name.upper())
    if scheme is None:
        raise UsageError(f"--scheme {name}", f"known: {', '.join(SCHEMES)}", "--scheme W4A16")
    steps = [row for row in data["steps"] if "input_scale" not in row]
    if scheme["inputs"] and scheme["inputs"].get("dynamic") is False:
        steps = [*steps, {"input_scale": {}}]
    return {**data, "weights": {**data["weights"], **scheme["weights"]}, "inputs": scheme["inputs"], "steps": steps}


def parse_recipe(data: Any, source: str) -> Recipe:
    """A Recipe from plain data; UsageError with the place, the reason and the nearest known key."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise _refusal(error, source) from error


def parse_calibration(data: dict[str, Any]) -> CalibrationData:
    """The same for the calibration data alone, as the command line gives it."""
    try:
        return CalibrationData.model_validate(data)
    except ValidationError as error:
        raise _refusal(error, "command line") from error


def _refusal(error: ValidationError, source: str) -> UsageError:
    errors = error.errors()  # a key that nobody knows explains another one that is missing
    first = next((found for found in errors if found["type"] == "extra_forbidden"), errors[0])
    place = ".".join(str(part) for part in first["loc"]) or "the whole file"
    reason, fix = first["msg"], "`infopt recipe show awq` prints a complete recipe"
    if first["type"] == "extra_forbidden":
        reason = "there is no such key"
        fix = did_you_mean(str(first["loc"][-1]), _fields(first["loc"][:-1])) or fix
    return UsageError(f"{source}: {place}", reason, fix)


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


def parse_size(text: str) -> int:
    """Bytes of "3GB", "512MiB"; ValueError with a sentence for anything else."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]+)", text.strip())
    if not found or found[2].upper() not in units:
        raise ValueError(f"{text[:40]!r} is no size; write it like 8GB or 512MiB")
    return int(float(found[1]) * units[found[2].upper()])


def match_layers(patterns: tuple[str, ...], names: list[str], what: str = "--ignore") -> set[str]:
    """The names that some pattern matches (a glob, a whole path, or `re:...` from the start of the path).

    A pattern that matches nothing is a UsageError: it is a typing mistake that would quantize what was to be kept.
    """
    ignored: set[str] = set()
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                compiled = re.compile(pattern[3:])
            except re.error as error:
                raise UsageError(f"{what} {pattern}", f"not a regular expression: {error}", "") from error
            found = {name for name in names if compiled.match(name)}
        else:
            found = set(fnmatch.filter(names, pattern))
        if not found:
            fix = did_you_mean(pattern, names[:2000])
            raise UsageError(
                f"{what} {pattern}", "it matches no layer of this model", f"{fix} (`infopt inspect MODEL`)"
            )
        ignored |= found
    return ignored


def _fields(location: tuple[Any, ...]) -> list[str]:
    models: dict[str, type[BaseModel]] = {
        "weights": WeightScheme,
        "inputs": InputScheme,
        "kv_cache": CacheScheme,
        "overrides": Override,
        "target": Target,
        "calibration": CalibrationData,
    }
    known = [models[part] for part in location if part in models]  # the last one is where the key stands
    return list((known[-1] if known else Recipe).model_fields)


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
