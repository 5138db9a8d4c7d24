"""`infopt recipe list` and `infopt recipe show NAME`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from infopt.errors import UsageError


def recipe(
    action: Annotated[str, typer.Argument(help="list or show")] = "list",
    name: Annotated[str | None, typer.Argument(help="The recipe to show.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """List the recipes that come with infopt, or show one with every default written out.

    Example: infopt recipe show awq > my.yaml && infopt quantize ./model --recipe my.yaml -o ./out
    """
    from infopt import recipes

    if action == "list":
        found = {known: recipes.named(known).description for known in recipes.names()}
        print(json.dumps(found, indent=2) if as_json else "\n".join(f"{k:10} {v}" for k, v in found.items()))
    elif action == "show":
        if name is None:
            raise UsageError("which recipe?", "`show` needs a name", "infopt recipe show awq")
        shown = recipes.named(name)
        print(json.dumps(shown.model_dump(mode="json"), indent=2) if as_json else shown.to_yaml(), end="")
    else:
        raise UsageError(f"infopt recipe {action}", "it knows `list` and `show`", "infopt recipe list")
