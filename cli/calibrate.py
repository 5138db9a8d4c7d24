"""`infopt calibrate`: run a model on calibration data once; `infopt quantize --calibration` uses what was counted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infopt.errors import Unsupported, UsageError

if TYPE_CHECKING:
    from infopt.recipe import CalibrationData

Text = str | None


def calibrate(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.")],
    method: Annotated[Text, typer.Option(help="Keep only what this method reads; everything if absent.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="The same for a recipe file.")] = None,
    dataset: Annotated[Text, typer.Option(help="Calibration text: a file, a hub id, or 'builtin'.")] = None,
    num_samples: Annotated[int | None, typer.Option(help="Calibration windows.")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens of a window.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of a rotation's signs; other than 0: sample the windows at random.")
    ] = None,
    split: Annotated[Text, typer.Option(help="The split of a data set of the hub.")] = None,
    column: Annotated[Text, typer.Option(help="The column that holds the text.")] = None,
    padding: Annotated[
        bool | None,
        typer.Option("--pad/--pack", help="Each row a window of its own, padded, or all rows joined and cut."),
    ] = None,
    rotate: Annotated[bool, typer.Option("--rotate", help="For `quantize --rotate`.")] = False,
    min_expert_tokens: Annotated[
        int | None, typer.Option(help="Experts that fewer calibration tokens reach are shown the whole batch.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of infopt.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on after the last finished block of a killed run.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="calibration.json on stdout.")] = False,
) -> None:
    """Count what a model's layers are given on calibration data, for any number of runs of `infopt quantize --calibration`.

    The inputs are those of the original model. GPTQ by itself wants inputs that the layers quantized before have made, and
    the step `correct` (of best-4bit) cannot do without them; with --calibration, GPTQ takes the original ones.

    Example: infopt calibrate ./model --dataset text.txt -o ./stats && infopt quantize ./model --method awq
    --calibration ./stats -o ./model-w4
    """
    from infopt.memory import one_heap
    from infopt.recipe import Recipe, parse_calibration

    one_heap()
    given = {
        "dataset": dataset, "num_samples": num_samples, "seqlen": seqlen, "seed": seed, "split": split,
        "column": column, "padding": padding,
    }  # fmt: skip
    data = parse_calibration({key: value for key, value in given.items() if value is not None})
    floor = Recipe.model_fields["min_expert_tokens"].default if min_expert_tokens is None else min_expert_tokens
    if floor < 0:
        raise UsageError(f"--min-expert-tokens {floor}", "it is a number of tokens", "--min-expert-tokens 0")
    holds, cache = _what_to_keep(method, recipe)
    about = _run(model, output, data, (rotate, floor, holds, cache), overwrite, resume)
    if as_json and about:
        from infopt.report import json_out

        json_out(about)


def _what_to_keep(method: str | None, path: Path | None) -> tuple[tuple[str, ...], bool]:
    """(the parts of the statistics, whether keys and values are wanted)."""
    from infopt import recipes
    from infopt.calibration.stats import EVERYTHING
    from infopt.recipe import load_recipe
    from infopt.recipes.run import needs_of

    if method is None and path is None:
        return tuple(sorted(EVERYTHING)), True
    if method is not None and path is not None:
        raise UsageError("both --method and --recipe", "one of them says what to keep", f"--method {method}")
    recipe = recipes.named(method) if method is not None else load_recipe(path)  # type: ignore[arg-type]
    holds = needs_of(recipes.build_steps(recipe)) & EVERYTHING
    if not holds and recipe.kv_cache is None:
        raise UsageError(f"{method or path} needs no calibration data", "nothing would be kept", "leave it out")
    return tuple(sorted(holds)), recipe.kv_cache is not None


def _run(
    model: str,
    output: Path,
    data: CalibrationData,
    kept: tuple[bool, int, tuple[str, ...], bool],
    overwrite: bool,
    resume: bool,
) -> dict[str, object]:
    from infopt.calibration.data import DataSpec
    from infopt.calibration.recorded import About, model_digest
    from infopt.checkpoint import CheckpointReader, resolve
    from infopt.cli.data import calibration_windows, told
    from infopt.memory import release
    from infopt.output import OutputFolder
    from infopt.recipes.calibrate import Calibration
    from infopt.recipes.rotation import rotated, tell
    from infopt.report import BlockLines, note
    from infopt.team import Team

    team = Team.from_environment()
    if not team.writes:  # this process helps: its files go away when the first one is done
        output = output.with_name(f"{output.name}.rank{team.rank}")
    began = time.monotonic()
    source = resolve(model)
    reader = CheckpointReader(source)
    if reader.config.get("quantization_config"):
        raise Unsupported(
            f"{source}: the model is quantized already", "it cannot be quantized again", "give the original model"
        )
    spec = DataSpec(**data.model_dump())
    windows_NT, report = calibration_windows(spec, source, reader.config, team.writes)
    release()  # the tokenizer's tables
    if team.writes:
        note(told(report))
    rotate, floor, holds, cache = kept
    about = About(model_digest(reader), rotate, floor, holds, cache, data, report)
    if rotate:
        reader = rotated(reader, data.seed)
        for line in tell(reader) if team.writes else ():
            note(line)
    with OutputFolder(output, overwrite=overwrite, source=source) as out:
        run = Calibration(reader, about, out, windows_NT, team)
        run(resume, BlockLines(len(run.skeleton.blocks)) if team.writes else lambda report, resumed: None)
        if not team.writes:
            team.wait()
            out.discard()
            return {}
        out.commit()
        team.wait()
    size = sum(path.stat().st_size for path in output.iterdir())
    note(f"wrote {output} in {time.monotonic() - began:.1f} s: {size / 1e6:.1f} MB, {', '.join(holds)}"
         f"{', keys and values' if cache else ''}; fingerprint {about.fingerprint()[:16]}")  # fmt: skip
    return about.to_json()
