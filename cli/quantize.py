"""`infopt quantize`: read a model, run a recipe on it block by block, write the folder, verify it."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infopt.errors import UsageError

if TYPE_CHECKING:
    from infopt.calibration.recorded import Recorded
    from infopt.recipe import Recipe
    from infopt.recipes.run import BlockReport, Run
    from infopt.runtime.verify import Gates, Verdict
    from infopt.team import Team

Text = str | None
_OF_WEIGHTS = ("bits", "scheme", "target_bits", "target_size")  # who gives these expects smaller weights


def quantize(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.")],
    method: Annotated[
        Text, typer.Option(help="rtn, awq, gptq, smoothquant, fp8, ...; see `infopt recipe list`.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe file instead of --method.")] = None,
    scheme: Annotated[
        Text,
        typer.Option(help="W2A16, W3A16, W4A16, W8A16, W8A8, W8A8_STATIC, W4A8, W4AFP8, FP8, FP8_DYNAMIC, FP8_BLOCK."),
    ] = None,
    bits: Annotated[int | None, typer.Option(help="2, 3, 4 or 8.")] = None,
    group_size: Annotated[
        Text, typer.Option(help="32, 64, 128, channel, tensor or block: what shares a scale.")
    ] = None,
    symmetric: Annotated[bool | None, typer.Option("--sym/--asym", help="Without or with zero points.")] = None,
    act_order: Annotated[
        bool | None, typer.Option("--act-order/--no-act-order", help="GPTQ: important columns first, or in order.")
    ] = None,
    rotate: Annotated[
        bool | None,
        typer.Option("--rotate/--no-rotate", help="First turn residual stream and values by Hadamard matrices."),
    ] = None,
    sequential: Annotated[
        Text,
        typer.Option(
            help="A layer's inputs have passed the quantized layers (space) or blocks (block) before it, or nothing "
            "quantized (none)."
        ),
    ] = None,
    target_bits: Annotated[
        float | None, typer.Option(help="Mixed precision: average bits of a weight; layers get 3, 4 or 8.")
    ] = None,
    target_size: Annotated[Text, typer.Option(help="Mixed precision: size of the result, such as 3GB.")] = None,
    kv_cache: Annotated[
        Text,
        typer.Option(
            help="Quantize the cache: fp8, int8, int4, or one of these with -balanced; int8-token or int4-token."
        ),
    ] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Layers to leave alone: a glob or re:REGEX.")] = None,
    group_fallback: Annotated[
        Text, typer.Option(help="Groups that do not divide a layer: error, adjust or skip.")
    ] = None,
    min_expert_tokens: Annotated[
        int | None, typer.Option(help="Experts that fewer calibration tokens reach are shown the whole batch.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Statistics of `infopt calibrate` in place of data: much faster, every layer's inputs those of the "
            "original model (--sequential none)."
        ),
    ] = None,
    dataset: Annotated[Text, typer.Option(help="Calibration text: a file, a hub id, or 'builtin'.")] = None,
    num_samples: Annotated[int | None, typer.Option(help="Calibration windows.")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens of a window.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of a rotation's signs; other than 0: sample the windows at random.")
    ] = None,
    split: Annotated[Text, typer.Option(help="The split of a data set of the hub.")] = None,
    column: Annotated[Text, typer.Option(help="The column that holds the text.")] = None,
    pad: Annotated[
        bool | None,
        typer.Option("--pad/--pack", help="Each row a window of its own, padded, or all rows joined and cut."),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="compressed-tensors, gptq, gptq_v2 (with zero points), awq, fp8 (blocks), mlx, gguf, gguf_q8_0.",
        ),
    ] = "compressed-tensors",
    tokenizer: Annotated[bool, typer.Option(help="Put the tokenizer into a GGUF file.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of infopt.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on after the last finished block of a killed run.")] = True,
    verify: Annotated[bool, typer.Option(help="Verify the written bytes and compare with the original.")] = True,
    verify_samples: Annotated[int, typer.Option(min=1, help="Windows of the comparison.")] = 8,
    verify_dataset: Annotated[
        Text, typer.Option(help="Text of the comparison; held-out builtin text if absent.")
    ] = None,
    max_kl: Annotated[float | None, typer.Option(help="Gate: mean KL divergence, nats.")] = None,
    max_ppl_increase: Annotated[float | None, typer.Option(help="Gate: relative increase of perplexity.")] = None,
    min_top1: Annotated[float | None, typer.Option(help="Gate: share of equal first choices, 0 to 1.")] = None,
    max_ram: Annotated[
        Text, typer.Option(help="Refuse to start if the run needs more; use what is left. Such as 8GB.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, do nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON on stdout.")] = False,
) -> None:
    """Quantize a model: one block in memory at a time, resumable, verified.

    Example: infopt quantize ./model --method gptq --bits 4 --group-size 64 --dataset text.txt -o ./model-w4
    """
    from infopt.cli.data import asked_comparison
    from infopt.memory import one_heap

    one_heap()
    flags = {
        "bits": bits, "group_size": group_size, "symmetric": symmetric, "act_order": act_order, "ignore": ignore,
        "rotate": rotate, "sequential": sequential, "kv_cache": kv_cache, "min_expert_tokens": min_expert_tokens,
        "target_bits": target_bits, "target_size": target_size,
        "group_fallback": group_fallback, "scheme": scheme, "dataset": dataset, "num_samples": num_samples,
        "seqlen": seqlen, "seed": seed, "split": split, "column": column, "padding": pad,
    }  # fmt: skip
    recorded = open_calibration(calibration, flags) if calibration else None
    settings = build_recipe(method, recipe, flags)
    comparison, gates = asked_comparison(verify, verify_dataset, verify_samples, (max_kl, max_ppl_increase, min_top1))
    report = _run(
        model, output, settings, overwrite, resume, comparison, gates, max_ram, dry_run, (form, tokenizer), recorded
    )
    if as_json and report:
        print(json.dumps(report, indent=2))


def open_calibration(folder: Path, flags: dict[str, Any]) -> Recorded:
    """The statistics in the folder; the flags then say what their data was and how they are used.

    UsageError for a flag that asks for other data.
    """
    from infopt.calibration.recorded import Recorded

    recorded = Recorded(folder)
    data = recorded.about.calibration.model_dump()
    for key, value in data.items():
        if flags[key] not in (None, value):
            flag = "pad" if key == "padding" else key.replace("_", "-")
            raise UsageError(
                f"--{flag} {flags[key]} with --calibration {folder}", f"there it was {value}", "drop one of them"
            )
    flags |= data
    flags["sequential"] = flags["sequential"] or "none"
    return recorded


def build_recipe(method: str | None, path: Path | None, flags: dict[str, Any]) -> Recipe:
    """The recipe that the flags describe: a named method or a file, with what was said on the command line over it."""
    from infopt import recipes
    from infopt.recipe import CACHES, load_recipe, parse_recipe, with_scheme

    if (method is None) == (path is None):
        raise UsageError("give either --method or --recipe", "one of them says what to do", "--method awq")
    base = recipes.named(method) if method else load_recipe(path)  # type: ignore[arg-type]
    data = base.model_dump(mode="json")
    if scheme := flags["scheme"]:
        data = with_scheme(data, scheme)
        if flags["bits"] not in (None, data["weights"]["bits"]):
            raise UsageError(f"--scheme {scheme} with --bits {flags['bits']}", "they contradict each other", "drop one")
    size = flags["group_size"]
    given = {**flags, "group_size": int(size) if size and size.isdigit() else size}
    for section, keys in {"weights": ("bits", "group_size", "symmetric"),
                          "calibration": tuple(data["calibration"])}.items():  # fmt: skip
        data[section].update({key: given[key] for key in keys if given.get(key) is not None})
    data.update({key: flags[key] for key in ("ignore", "group_fallback", "sequential") if flags[key]})
    data.update({key: flags[key] for key in ("min_expert_tokens", "rotate") if flags.get(key) is not None})
    if name := flags["kv_cache"]:
        if name not in CACHES:
            raise UsageError(f"--kv-cache {name}", f"known: {', '.join(CACHES)}", "--kv-cache fp8")
        data["kv_cache"] = CACHES[name]
    if flags["target_bits"] is not None or flags["target_size"]:
        data["target"] = {"bits": flags["target_bits"], "size": flags["target_size"]}
    if flags["act_order"] is not None:
        rows = [row for row in data["steps"] if "gptq" in row]
        if not rows:
            raise UsageError("--act-order", f"{method or path} has no gptq step", "--method gptq --act-order")
        for row in rows:
            row["gptq"] = {**(row["gptq"] or {}), "act_order": flags["act_order"]}
    _check_weights(data, [f"--{key.replace('_', '-')}" for key in _OF_WEIGHTS if flags[key] is not None])
    return parse_recipe(data, "command line")


def _check_weights(data: dict[str, Any], given: list[str]) -> None:
    """UsageError for flags about the weights' numbers that would have no effect, or are decided by a budget."""
    if given and not data["steps"]:
        raise UsageError(
            f"{given[0]} with {data['name']}", "it leaves the weights as they are", "--method awq --kv-cache fp8"
        )
    decided = [flag for flag in given if flag in ("--bits", "--scheme")]
    if decided and data["target"]:
        raise UsageError(f"{decided[0]} with a budget", "--target-bits or --target-size decides the bits", "drop one")


def _run(
    model: str,
    output: Path,
    recipe: Recipe,
    overwrite: bool,
    resume: bool,
    comparison: tuple[str, int] | None,
    gates: Gates,
    max_ram: str | None,
    dry_run: bool,
    target: tuple[str, bool],
    recorded: Recorded | None,
) -> dict[str, Any]:
    from infopt import recipes
    from infopt.calibration.data import DataSpec
    from infopt.checkpoint import CheckpointReader, resolve
    from infopt.cli.data import calibration_windows, comparison_windows, told
    from infopt.errors import Unsupported
    from infopt.exporters.convert import replace_by_gguf
    from infopt.exporters.formats import GGUF_FORMATS, named
    from infopt.exporters.gguf_export import check_gguf
    from infopt.memory import release
    from infopt.output import OutputFolder
    from infopt.recipes.compose import note_lineage, rewrite_first, rewrite_options
    from infopt.recipes.rotation import tell
    from infopt.recipes.run import Run, needs_data
    from infopt.report import BlockLines, note
    from infopt.runtime.verify import assist
    from infopt.team import Team

    team = Team.from_environment()
    stage = OutputFolder(output).stage  # of the process that writes
    if not team.writes:  # this process helps: its files go away when the first one is done
        output = output.with_name(f"{output.name}.rank{team.rank}")
    started = time.monotonic()
    form, tokenizer = named(target[0]), target[1]
    source = resolve(model)
    reader = CheckpointReader(source)
    if reader.config.get("quantization_config"):
        raise Unsupported(
            f"{source}: the model is quantized already",
            "quantizing codes again would lose twice",
            "give the original model",
        )
    if form.name in GGUF_FORMATS:
        check_gguf(reader, tokenizer)
    steps, rewriting = recipes.build_steps(recipe), rewrite_options(recipe)
    if rewriting and team.size > 1:
        raise UsageError("a recipe with a rewrite", "it runs in one process", "run it without torchrun")
    windows, data_report = None, None
    if recorded:
        if rewriting:
            raise UsageError(
                "--calibration with a rewrite", "the statistics are the original model's", "drop --calibration"
            )
        recorded.check_model(reader)
        data_report = {**recorded.about.data, "statistics": recorded.about.fingerprint()}
        note(f"statistics of the original model's inputs: {recorded.folder}")
    elif needs_data(recipe, steps) or (rewriting and rewriting.needs_data):
        spec = DataSpec(**recipe.calibration.model_dump())
        windows, data_report = calibration_windows(spec, source, reader.config, team.writes)
        release()  # the tokenizer's tables
    if data_report and team.writes:
        note(told(data_report))
    compared = None
    if comparison:  # read before the work: a typing mistake must not show after an hour
        compared = comparison_windows(*comparison, recipe.calibration.seqlen, source, team.writes)[0]
    with OutputFolder(output, overwrite=overwrite, source=source) as out:
        first = None
        if rewriting and not dry_run:
            note("rewriting first")
            shown = BlockLines(reader.config.get("num_hidden_layers") or 0, _said)
            first = rewrite_first(reader, rewriting, out, windows, data_report, compared, resume, shown)
            reader = CheckpointReader(first.folder)
        run = Run(reader, recipe, steps, out, windows, data_report, form, team=team, recorded=recorded)
        for line in tell(run.reader):
            note(line)
        if recipe.target and not dry_run:
            run = _allocate(run, windows)
        run.hold(_spare_memory(run, max_ram))
        if dry_run:
            return _plan_report(run)
        if not team.writes:
            run(resume, lambda report, resumed: None)
            if compared is not None:
                team.wait()  # until the stage is complete
                assist(stage, source, compared, team)
            team.wait()
            out.discard()
            return {}
        note(f"{run.blocks} blocks, {len(run.plan.grids)} layers to quantize, method {recipe.name}")
        run(resume, BlockLines(run.blocks, _said))
        quantized = time.monotonic()
        lineage = note_lineage(out.stage, first, recipe, compared) if first else {}
        verdict = None
        if compared is not None:
            team.wait()
            verdict = replace(_verify(out.stage, source, compared, gates, team), folder=str(output))  # its name soon
        if form.name in GGUF_FORMATS:
            replace_by_gguf(out, form, tokenizer)
        out.commit()
        team.wait()
    note(f"wrote {output} in {time.monotonic() - started:.1f} s ({quantized - started:.1f} s quantizing)")
    report = {
        "output": str(output),
        "seconds_quantizing": quantized - started,
        "verdict": verdict and verdict.to_json(),
        **lineage,
    }
    if verdict:
        verdict.raise_for_gates()
    elif form.name not in GGUF_FORMATS:
        note(f"not verified: `infopt verify {output} --reference {model}`")
    return report


def _allocate(run: Run, windows: Any) -> Run:
    """The run with the bits of every layer decided, by what a part of the windows shows."""
    from infopt.recipes.run import Run
    from infopt.recipes.sensitivity import decide, measure
    from infopt.report import note

    parts = measure(run, windows, lambda i: note(f"sensitivity of block {i + 1}/{run.blocks}"))
    recipe, found = decide(run, parts)
    spread = ", ".join(f"{count} layers of {bits} bits" for bits, count in found["layers"].items())
    note(f"{found['bits']:.3f} bits on average: {spread}")
    return Run(run.reader, recipe, run.steps, run.output, windows, run.data_report, run.form, found, run.team)


def _verify(stage: Path, source: Path, windows: Any, gates: Gates, team: Team) -> Verdict:
    """Damage stops the run before the folder gets its name; a failed gate is raised after, when the folder is there."""
    from infopt.report import show_verdict
    from infopt.runtime.verify import verify

    verdict = verify(stage, source, windows, gates, team=team)
    show_verdict(verdict)
    return verdict


def _spare_memory(run: Run, limit: str | None) -> int:
    """The bytes that --max-ram leaves for activations; OutOfResources if the run cannot start at all."""
    from infopt.errors import OutOfResources
    from infopt.recipe import parse_size
    from infopt.recipes.run import memory_needed

    if limit is None:
        return 0
    try:
        most = parse_size(limit)
    except ValueError as error:
        raise UsageError(f"--max-ram {limit}", str(error), "--max-ram 8GB") from None
    need = memory_needed(run)
    if need > most:
        raise OutOfResources(
            f"this run needs about {need / 1e9:.2f} GB of memory",
            f"--max-ram allows {most / 1e9:.2f} GB; one block, its statistics and one batch must fit",
            "a shorter --seqlen or --method rtn needs less",
        )
    return int(most - need)


def _plan_report(run: Run) -> dict[str, Any]:
    from infopt.recipes.run import memory_needed
    from infopt.report import note

    layers = len(run.plan.grids)
    note(f"{run.blocks} blocks; {layers} layers would be quantized, {len(run.plan.kept)} kept; "
         f"about {memory_needed(run) / 1e9:.2f} GB of memory")  # fmt: skip
    return {
        "blocks": run.blocks,
        "layers": sorted(run.plan.grids),
        "kept": run.plan.kept,
        "memory_bytes": memory_needed(run),
    }


def _said(report: BlockReport) -> str:
    """The worst error of a block's layers, and how many they are."""
    error = report.error()
    shown = f"  worst relative error {error:.2e}" if error is not None else ""
    return f"{shown}  {len(report.layers)} layers"
