"""`infopt rewrite`: rotated weights, fewer key-value heads, a sliding window, and the blocks healed of it."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infopt.rewriters.options import RewriteOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from infopt.recipes.marks import BlockReport
    from infopt.recipes.rewrite import RewriteRun
    from infopt.runtime.verify import Gates, Verdict

_CONTEXT = (
    32768  # tokens for which the report gives the size of the cache, or fewer where the model has fewer positions
)


def rewrite(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or hub id.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.", show_default=False)],
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Key-value heads of the result; 1 is MQA.")] = None,
    group: Annotated[
        str, typer.Option(help="Which heads share one: position (neighbours) or similarity.")
    ] = RewriteOptions.grouping,
    merge: Annotated[str, typer.Option(help="What they share: lstsq, mean or first.")] = RewriteOptions.merge,
    refit: Annotated[bool, typer.Option(help="Fit the output projection to what now reaches it.")] = True,
    window: Annotated[int | None, typer.Option(min=2, help="A token attends to so many, itself included.")] = None,
    every: Annotated[int | None, typer.Option(min=2, help="Every so many layers, one keeps full attention.")] = None,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens that stay visible (no model type has them).")] = 0,
    rotate: Annotated[
        bool,
        typer.Option("--rotate", help="Hadamard rotation of the residual stream and the values; easier to quantize."),
    ] = False,
    heal: Annotated[bool, typer.Option(help="Train each block towards the original block's answers.")] = True,
    steps: Annotated[int, typer.Option(min=1, help="Healing: steps a block.")] = RewriteOptions.steps,
    lr: Annotated[float, typer.Option(help="Healing: the learning rate.")] = RewriteOptions.lr,
    heal_steps: Annotated[
        int, typer.Option(min=0, help="Then train the whole model on the original's predictions, so many steps.")
    ] = RewriteOptions.heal_steps,
    heal_lr: Annotated[float, typer.Option(help="The learning rate of these steps.")] = RewriteOptions.heal_lr,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Less memory for the steps, more time; both are reported.")
    ] = False,
    curve: Annotated[bool, typer.Option(help="Keep points of the healing, and report the distance at each.")] = True,
    dataset: Annotated[str, typer.Option(help="Calibration text: a file, a hub id, or 'builtin'.")] = "builtin",
    num_samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 128,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Of a rotation's signs; other than 0: draw the windows.")
    ] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of infopt.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on after the last finished block of a killed run.")] = True,
    verify: Annotated[bool, typer.Option(help="Verify the written bytes and compare with the original.")] = True,
    verify_samples: Annotated[int, typer.Option(min=1, help="Windows of the comparison.")] = 8,
    verify_dataset: Annotated[
        str | None, typer.Option(help="Text of the comparison; held-out builtin text if absent.")
    ] = None,
    speed_at: Annotated[
        int | None,
        typer.Option(min=1, help="Time the next token after so many, before and after; loads both models whole."),
    ] = None,
    max_kl: Annotated[float | None, typer.Option(help="Gate: mean KL divergence, nats.")] = None,
    max_ppl_increase: Annotated[float | None, typer.Option(help="Gate: relative increase of perplexity.")] = None,
    min_top1: Annotated[float | None, typer.Option(help="Gate: share of equal first choices, 0 to 1.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON on stdout.")] = False,
) -> None:
    """Rewrite a model: rotated weights, MHA to GQA or MQA, a sliding window. One block at a time, resumable, verified.

    Example: infopt rewrite ./model --kv-heads 4 --dataset text.txt -o ./model-gqa
    """
    from infopt.cli.data import asked_comparison
    from infopt.report import json_out

    options = RewriteOptions(
        kv_heads=kv_heads, grouping=group, merge=merge, refit=refit, heal=heal, steps=steps, lr=lr,
        heal_steps=heal_steps, heal_lr=heal_lr, checkpointing=checkpointing, curve=curve and heal and verify,
        window=window, every=every, sinks=sinks, rotate=rotate, seed=seed if rotate else 0,
    )  # fmt: skip
    data = (dataset, num_samples, seqlen, seed)
    comparison, gates = asked_comparison(verify, verify_dataset, verify_samples, (max_kl, max_ppl_increase, min_top1))
    report, verdict = _run(model, output, options, data, (overwrite, resume), comparison, speed_at, gates)
    if as_json:
        json_out(report)
    if verdict:
        verdict.raise_for_gates("Try more --kv-heads, a wider --window, or more --steps and --heal-steps.")


def _run(
    model: str,
    output: Path,
    options: RewriteOptions,
    data: tuple[str, int, int, int],
    switches: tuple[bool, bool],
    comparison: tuple[str, int] | None,
    speed_at: int | None,
    gates: Gates,
) -> tuple[dict[str, Any], Verdict | None]:
    from infopt.calibration.data import DataSpec
    from infopt.checkpoint import CheckpointReader, resolve
    from infopt.cli.data import calibration_windows, comparison_windows, told
    from infopt.errors import Unsupported
    from infopt.memory import release
    from infopt.output import OutputFolder
    from infopt.recipes.rewrite import RewriteRun
    from infopt.recipes.rewrite_report import speed_report
    from infopt.report import BlockLines, note

    source = resolve(model)
    reader = CheckpointReader(source)
    if reader.config.get("quantization_config"):
        raise Unsupported(
            f"{source}: the model is quantized",
            "its codes would be lost: heads are merged as floating numbers",
            "rewrite the original model, then quantize the result",
        )
    windows, data_report = None, None
    if options.needs_data:
        windows, data_report = calibration_windows(DataSpec(*data), source, reader.config)
        note(told(data_report))
    release()
    compared = comparison_windows(*comparison, data[2], source) if comparison else None
    began = time.monotonic()
    with OutputFolder(output, overwrite=switches[0], source=source) as out:
        run = RewriteRun(reader, options, out, windows, data_report)
        _tell_plan(run)
        run(switches[1], BlockLines(run.blocks, _said), _tell_step(options.heal_steps))
        seconds = time.monotonic() - began
        verdict, measured = None, _cache(run) if options.attention else {}
        if compared is not None:
            verdict, curves = _verify(run, source, compared, gates)
            verdict = dataclasses.replace(verdict, folder=str(output))  # its name from now on
            measured |= curves
        run.note({"measured": measured})
        if speed_at is not None:  # a time: not for infopt.json
            measured["speed"] = speed_report(run, speed_at)
        out.commit()
    _tell(run, measured)
    note(f"wrote {output}; rewritten in {seconds:.1f} s")
    costs = [dataclasses.asdict(cost) for cost in run.costs]
    more = [dataclasses.asdict(cost) for cost in run.distill_costs]
    report = {"output": str(output), "seconds": seconds, "settings": run.plan.settings, **measured}
    return {
        **report,
        "step_costs": costs,
        "distillation_costs": more,
        "verdict": verdict and verdict.to_json(),
    }, verdict


def _verify(
    run: RewriteRun, source: Path, compared: tuple[Tensor, dict[str, Any]], gates: Gates
) -> tuple[Verdict, dict[str, Any]]:
    """Damage stops the run before the folder gets its name; a failed gate is raised after, when the folder is there."""
    from infopt.recipes.rewrite_report import healing_curve, plots, window_curve
    from infopt.report import progress, show_verdict
    from infopt.runtime.verify import verify

    windows_NT, data = compared
    verdict = verify(run.output.stage, source, windows_NT, gates, data=data, progress=progress)
    show_verdict(verdict)
    healing = healing_curve(run, windows_NT)
    for name, picture in plots(run, healing).items():
        (run.output.stage / name).write_text(picture, encoding="utf-8")
    curves = {
        "healing": [dataclasses.asdict(point) for point in healing],
        "windows": [dataclasses.asdict(point) for point in window_curve(run, windows_NT)],
    }
    return verdict, curves


def _cache(run: RewriteRun) -> dict[str, Any]:
    from infopt.recipes.rewrite_report import cache_report

    positions = getattr(run.source.config.get_text_config(), "max_position_embeddings", None)
    return {"cache": cache_report(run, min(_CONTEXT, positions) if isinstance(positions, int) else _CONTEXT)}


def _tell_plan(run: RewriteRun) -> None:
    from infopt.recipes.rotation import tell
    from infopt.report import note

    for line in tell(run.reader):
        note(line)
    if not run.options.attention:
        return
    if not run.plan.changes:
        note("the model is already so: every tensor is copied as it is")
        return
    said = ", ".join(f"{key} {value}" for key, value in run.plan.settings.items() if not isinstance(value, list))
    note(f"{run.blocks} blocks; config: {said}; {len(run.plan.shapes)} tensors get another shape")
    if run.options.heal and not run.has_effect:
        note("nothing to heal: no calibration window is longer than the sliding window (--seqlen)")


def _tell(run: RewriteRun, measured: dict[str, Any]) -> None:
    from infopt.report import note, table

    for name, key in (("Healing", "healing"), ("Window", "windows")):
        if measured.get(key):
            rows = [
                (
                    point["name"],
                    point["tokens"],
                    f"{point['kl']:.5f}",
                    f"{point['perplexity']:.4f}",
                    f"{point['top1']:.2%}",
                )
                for point in measured[key]
            ]
            table(name, ("state", "tokens a block", "KL", "perplexity", "same first choice"), rows)
    if speed := measured.get("speed"):
        note(
            f"after {speed['context']:,} tokens: {speed['before']:.1f} to {speed['after']:.1f} tokens a second, float32"
        )
    if "cache" not in measured:
        return
    cache = measured["cache"]
    one, whole = cache["bytes_per_token"], cache["bytes_of_context"]
    note(
        f"cache, bf16: {one['before']:,} to {one['after']:,} bytes a token; "
        f"{whole['before'] / 1e6:,.1f} to {whole['after'] / 1e6:,.1f} MB for {cache['context']:,} tokens"
    )
    for what, costs in (("a step of a block", run.costs), ("a window of the distillation", run.distill_costs)):
        if costs:
            plain, again = costs
            note(
                f"checkpointing, {what}: {again.bytes / 1e6:.1f} MB and {again.seconds:.3f} s; without "
                f"{plain.bytes / 1e6:.1f} MB and {plain.seconds:.3f} s "
                f"({plain.bytes / again.bytes:.1f} times smaller, {again.seconds / plain.seconds - 1:+.0%} time)"
            )
    if run.distilled:
        done = run.distilled
        kept = "" if done.kept else ": not lower, so the blocks stay as they were healed"
        note(f"distilled: {done.tokens:,} tokens; KL on held-out windows {done.before:.4f} to {done.after:.4f}{kept}")


def _tell_step(steps: int) -> Callable[[int, float], None]:
    """A line for every eighth step of the distillation, with the time left at the pace since the first."""
    from infopt.report import note

    first: list[tuple[int, float]] = []

    def tell(step: int, loss: float) -> None:
        first[:] = first or [(step, time.monotonic())]
        pace = (time.monotonic() - first[0][1]) / max(step - first[0][0], 1)
        if step % 8 == 0 or step == steps:
            note(f"distillation {step}/{steps}  KL {loss:.4f}  {pace * (steps - step):.0f} s left")

    return tell


def _said(report: BlockReport) -> str:
    """The error of a block's answers: merged, refitted and healed."""
    said = next(iter(report.layers.values()))
    errors = [f"{name} {said[name]:.2e}" for name in ("merged", "refitted") if name in said]
    errors += [f"healed {said['healed']['after']:.2e}"] if "healed" in said else []
    return f"  error {', '.join(errors)}" if errors else ""
