"""Recipes: those that come along, and files of strangers, refused with the place, the reason and what was probably meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from infopt import recipes
from infopt.errors import BadInput, UsageError
from infopt.recipe import load_recipe, match_layers, parse_recipe

from .tools import infopt


def test_every_recipe_is_listed_and_shown_whole() -> None:
    listed = infopt("recipe", "list")
    assert listed.code == 0 and {line.split()[0] for line in listed.out.splitlines()} == set(recipes.names())
    as_json = json.loads(infopt("recipe", "list", "--json").out)
    assert all(len(description) > 20 for description in as_json.values())
    for name in recipes.names():
        shown = infopt("recipe", "show", name)
        assert shown.code == 0
        again = parse_recipe(yaml.safe_load(shown.out), name)  # what is shown can be run, and means the same
        assert again == recipes.named(name)
        assert json.loads(infopt("recipe", "show", name, "--json").out) == again.model_dump(mode="json")
        assert recipes.build_steps(again) or again.kv_cache


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("show",), "which recipe"),
        (("show", "qptq"), "did you mean 'gptq'"),
        (("sho", "gptq"), "`list` and `show`"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], says: str) -> None:
    done = infopt("recipe", *arguments)
    assert done.code == 2 and says in done.err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("step: []", "did you mean 'steps'"),
        ("steps: [{round: {}}]\nweights: {bit: 4}", "did you mean 'bits'"),
        ("steps: [{round: {}}]\nweights: {bits: 5}", "weights.bits"),
        ("steps: [{round: {}}]\nweights: {bits: '4'}", "weights.bits"),
        ("steps: [{round: {}}]\ncalibration: {seq_len: 4}", "did you mean 'seqlen'"),
        ("steps: [{round: {}}]\ninputs: {dynamik: true}", "did you mean 'dynamic'"),
        ("steps: [{round: {}}]\noverrides: [{match: ['*'], weight: {}}]", "did you mean 'weights'"),
        ("steps: [{round: {}}]\noverrides: [{match: ['*'], weights: {bit: 4}}]", "did you mean 'bits'"),
        ("steps: [{round: {}}]\nsequential: layer", "sequential"),
        ("steps: [{round: {}}]\ncalibration: {num_samples: 0}", "calibration.num_samples"),
        ("steps: [{round: {}}]\ntarget: {bits: 4, size: 3GB}", "either bits or size"),
        ("steps: [{round: {}}]\ntarget: {size: 3 apples}", "no size"),
        ("steps: []", "nothing would be done"),
        ("", "the whole file"),
        ("- a list", "the whole file"),
    ],
)
def test_files_that_are_no_recipe(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert says in str(caught.value) and "r.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a: &a [1, 2]\nb: &b [*a, *a]\nc: [*b, *b]", "aliases"),
        (b"steps: !!python/object/apply:os.system ['touch pwned']", "python/object"),
        (b"name: one\nname: two", "stands twice"),
        (b"name: '\xff\xfe'", "not a recipe"),
        (b"[" * 100_000, "not a recipe"),
        (b"name: [unclosed", "not a recipe"),
        (b"#" * (2**20 + 1), "larger than 1 MiB"),
    ],
)
def test_hostile_files(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(BadInput) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert says in str(caught.value)
    with pytest.raises(BadInput, match="cannot be read"):
        load_recipe(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([{"gptk": {}}], "did you mean 'gptq'"),
        ([{"gptq": {"dump": 0.1}}], "did you mean 'damp'"),
        ([{"gptq": {"damp": "0.1"}}], "must be a float"),
        ([{"gptq": {"act_order": 1}}], "must be a bool"),
    ],
)
def test_steps_that_do_not_exist(steps: list, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipes.build_steps(parse_recipe({"steps": steps}, "here"))
    assert says in str(caught.value)


def test_patterns_match_something_or_are_refused() -> None:
    names = [f"model.layers.{i}.mlp.{part}_proj" for i in range(2) for part in ("up", "down")]
    assert match_layers(("*.up_proj",), names) == {names[0], names[2]}
    assert match_layers(("re:.*layers.1.*",), names) == {names[2], names[3]}
    for wrong, says in (
        ("*.up_prj", "matches no layer"),
        ("model.layers.0.mlp.upproj", "did you mean"),
        ("re:(", "not a"),
    ):
        with pytest.raises(UsageError, match=says):
            match_layers((wrong,), names)
