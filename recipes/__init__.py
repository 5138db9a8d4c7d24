"""The methods: YAML files of steps beside this module, and the one table where step names meet classes."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

from infopt.errors import UsageError
from infopt.quantizers.activations import InputScale
from infopt.quantizers.awq import AWQScale
from infopt.quantizers.correction import Correct
from infopt.quantizers.gptq import GPTQ
from infopt.quantizers.rounding import Round
from infopt.quantizers.smoothquant import Smooth
from infopt.quantizers.work import Step
from infopt.recipe import Recipe, did_you_mean, load_recipe

STEPS: dict[str, type] = {
    "awq_scale": AWQScale,
    "correct": Correct,
    "gptq": GPTQ,
    "input_scale": InputScale,
    "round": Round,
    "smooth": Smooth,
}


def build_steps(recipe: Recipe) -> list[Step]:
    """The recipe's rows as callables; UsageError for a step or an option that does not exist."""
    return [_build(name, options or {}) for row in recipe.steps for name, options in row.items()]


@cache
def names() -> tuple[str, ...]:
    """The recipes that come with infopt: the values of --method."""
    return tuple(sorted(path.stem for path in Path(__file__).parent.glob("*.yaml")))


def named(name: str) -> Recipe:
    """The recipe of a method; UsageError with the nearest name if there is none."""
    if name not in names():
        raise UsageError(f"there is no method {name!r}", did_you_mean(name, list(names())), "see `infopt recipe list`")
    return load_recipe(Path(__file__).parent / f"{name}.yaml")


def _build(name: str, options: dict[str, Any]) -> Step:
    if name not in STEPS:
        raise UsageError(
            f"recipe: there is no step {name!r}", did_you_mean(name, list(STEPS)), "see `infopt recipe list`"
        )
    fields = {field.name: field for field in dataclasses.fields(STEPS[name])}
    for option, value in options.items():
        if option not in fields:
            raise UsageError(f"recipe: step {name} has no option {option!r}", did_you_mean(option, list(fields)), "")
        wanted = type(fields[option].default)
        if not (type(value) is wanted or (wanted is float and type(value) is int)):
            raise UsageError(f"recipe: {name}.{option} is {value!r}", f"it must be a {wanted.__name__}", "")
    return STEPS[name](**options)
