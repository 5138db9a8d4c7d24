"""What a recipe will do to a model, decided from shapes before any weight is read: refusals come first, not after an hour."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from infopt.errors import Unsupported, UsageError
from infopt.grid import GROUPS, Grid, Inputs
from infopt.kv_cache import CacheGrid
from infopt.model import Skeleton
from infopt.recipe import Recipe, WeightScheme, match_layers
from infopt.recipes.experts import float_parts

_SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_WEIGHT_DTYPES = (*_SCALE_DTYPES, torch.float64)


@dataclass(frozen=True)
class Plan:
    """What will be quantized how, decided from shapes before any work. grids: by module path ("model.layers.0.mlp.up_proj").
    kept: linear modules, routers and stacked experts that stay as they are, with the reason. transposed: targets that
    are Conv1D modules."""

    grids: dict[str, Grid]
    kept: dict[str, str]
    transposed: frozenset[str]


def plan(skeleton: Skeleton, recipe: Recipe) -> Plan:
    """Raises UsageError for ignore patterns that match nothing and for groups that do not divide a layer's columns;
    Unsupported for weights that are codes."""
    linears = {name: m for name, m in skeleton.model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    inside = {name for name in linears if any(name.startswith(f"{block}.") for block in skeleton.blocks)}
    if not recipe.steps:  # only the cache is quantized
        return Plan({}, dict.fromkeys(linears, "the recipe has no steps"), frozenset())
    ignored = match_layers(recipe.ignore, list(linears))
    schemes = _schemes(recipe, [name for name in linears if name in inside])
    grids: dict[str, Grid] = {}
    kept: dict[str, str] = {name: "outside the decoder blocks" for name in linears if name not in inside}
    kept.update(float_parts(skeleton))
    unfit: list[str] = []
    for name in linears:
        if name not in inside or name in kept:
            continue
        columns = columns_of(linears[name])
        grid = None if name in ignored else _grid(skeleton, name, columns, recipe, schemes[name])
        if grid is None:
            kept[name] = (
                "ignored by the recipe" if name in ignored else f"{columns} columns, {schemes[name].group_size} a group"
            )
        elif not grid.fits(columns):
            unfit.append(f"{name} ({columns} columns)")
        else:
            grids[name] = grid
    if unfit:
        listed = ", ".join(unfit[:7]) + (f", ... {len(unfit)} in all" if len(unfit) > 7 else "")
        fits = [size for size in GROUPS if all(columns_of(linears[n]) % size == 0 for n in inside - ignored)]
        hint = f"`--group-size {fits[-1]}` divides all of them; or " if fits else ""
        raise UsageError(
            f"group size {recipe.weights.group_size} does not divide the columns of {listed}",
            "a group of columns shares a scale and cannot be cut",
            f"{hint}`--group-fallback adjust` or `skip`",
        )
    if not grids:
        raise UsageError(
            "nothing is left to quantize", "every layer is ignored or skipped", "see `infopt inspect MODEL`"
        )
    transposed = frozenset(name for name in grids if isinstance(linears[name], Conv1D))
    return Plan(grids, kept, transposed)


def columns_of(module: nn.Module) -> int:
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight.shape[0] if isinstance(module, Conv1D) else weight.shape[1]


def out_in(module: nn.Module) -> tuple[int, int]:
    """[O, I] of a linear module, whichever way it keeps its weight."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    rows, columns = weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _schemes(recipe: Recipe, names: list[str]) -> dict[str, WeightScheme]:
    """Each layer's weights; UsageError for an override that matches nothing."""
    schemes = dict.fromkeys(names, recipe.weights)
    for override in reversed(recipe.overrides):  # the first one counts, so it comes last
        for name in match_layers(override.match, names, "overrides: match"):
            schemes[name] = override.weights
    return schemes


def _grid(skeleton: Skeleton, name: str, columns: int, recipe: Recipe, weights: WeightScheme) -> Grid | None:
    block = max((b for b in skeleton.blocks if name.startswith(f"{b}.")), key=len)
    key = skeleton.weight_key(skeleton.blocks.index(block), name.removeprefix(f"{block}."))
    stored = skeleton.weights.tensors[key].dtype
    if stored not in _WEIGHT_DTYPES:
        raise Unsupported(
            f"{key} is stored as {str(stored).removeprefix('torch.')}",
            "such numbers are codes, and config.json has no quantization_config that says of what",
            "give the original model",
        )
    size = weights.group_size
    words: dict[int | str, tuple[int | None, int | None]] = {
        "channel": (None, 1),
        "tensor": (None, None),
        "block": (128, 128),
    }
    group, rows = words[size] if isinstance(size, str) else (size, 1)
    grid = Grid(
        weights.bits,
        group,
        weights.symmetric,
        stored if stored in _SCALE_DTYPES else torch.float32,
        kind=weights.type,
        rows=rows,
        inputs=_inputs(recipe),
    )
    if grid.fits(columns) or recipe.group_fallback == "error":
        return grid
    if recipe.group_fallback == "skip":
        return None
    fitting = [size for size in GROUPS if size < grid.width(columns) and columns % size == 0]
    return replace(grid, group=max(fitting, default=None))


def _inputs(recipe: Recipe) -> Inputs | None:
    if recipe.inputs is None:
        return None
    return Inputs(recipe.inputs.type, recipe.inputs.dynamic, recipe.inputs.group_size)


def cache_grid(recipe: Recipe) -> CacheGrid | None:
    """The type of the key-value cache, None for a float one."""
    cache = recipe.kv_cache
    if cache is None:
        return None
    return CacheGrid(cache.type, cache.bits, cache.strategy, cache.symmetric, cache.balanced, cache.sinks)
