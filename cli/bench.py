"""`infopt bench`: how fast a model runs on this machine, quantized or not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infopt.cli.evaluate import Kernels
from infopt.cli.generate import KVCache

if TYPE_CHECKING:
    from infopt.runtime.bench import Speed


def bench(
    out: Annotated[str, typer.Argument(metavar="OUT", help="A folder, quantized or not, or a hub id.")],
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Measured too, in fp32: the original.", show_default=False)
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Texts that are written at once.")] = 1,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to write.")] = 64,
    precision: Annotated[Kernels, typer.Option(help="How quantized layers run.")] = Kernels.packed,
    kv_cache: Annotated[
        KVCache,
        typer.Option(help="Type of the cache; stored: as the folder says. int4 without calibration is rough."),
    ] = KVCache.stored,
    device: Annotated[str, typer.Option(help="cpu, cuda, or cuda:N for one of several GPUs.")] = "cpu",
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="An SVG of latency against batch and context.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The figures as JSON on stdout.")] = False,
) -> None:
    """Tokens per second, time to the first token, memory, and the share of the machine's bandwidth.

    Example: infopt bench ./model-w4 --reference ./model --prompt 512
    """
    import torch

    from infopt.checkpoint import resolve
    from infopt.errors import UsageError
    from infopt.report import json_out, note, table
    from infopt.runtime.bench import Sizes, latencies, latency_svg, measure, read_bandwidth
    from infopt.runtime.device import device_errors, find_device
    from infopt.writer import atomic_file

    if plot is not None and (plot.is_dir() or not plot.absolute().parent.is_dir()):
        why = "It is a folder." if plot.is_dir() else "There is no such folder."
        raise UsageError(f"--plot {plot}", why, "Name a file in a folder that is there: --plot latency.svg")
    where, sizes = find_device(device), Sizes(batch, prompt, new_tokens)
    with device_errors(where):
        bandwidth = read_bandwidth(where)
        speeds = [measure(resolve(out), bandwidth, sizes, precision.value, kv_cache.value, where)]
        if reference is not None:
            speeds.append(measure(resolve(reference), bandwidth, sizes, device=where))
    title = f"batch {batch}, prompt {prompt}, {new_tokens} new tokens; {where}, {torch.get_num_threads()} threads, " \
            f"memory read at {bandwidth / 1e9:.1f} GB/s"  # fmt: skip
    table(title, ["measure", *(speed.model for speed in speeds)], rows(speeds))
    if plot is not None:
        title = f"{out}, {precision.value}, {torch.get_num_threads()} threads"
        with device_errors(where):
            found = latencies(resolve(out), precision.value, kv_cache.value, device=where)
        with atomic_file(plot) as file:
            file.write(latency_svg(found, title).encode())
        note(f"wrote {plot}")
    if as_json:
        ours, theirs = speeds[0].to_json(), speeds[1].to_json() if reference is not None else None
        machine = {"device": str(where), "threads": torch.get_num_threads(), "bandwidth": bandwidth}
        json_out({**ours, "reference": theirs, "machine": machine})


def _times(speed: Speed) -> float:
    return speed.cache_bytes_per_token_bf16 / max(speed.cache_bytes_per_token, 1e-9)


def rows(speeds: list[Speed]) -> list[tuple[str, ...]]:
    """The table's rows: a name and each model's figure."""
    from infopt.report import megabytes

    shown = [
        ("precision, cache", lambda s: f"{s.precision}, {s.kv_cache}"),
        ("prefill, tokens/s", lambda s: f"{s.prefill_tokens_per_s:.1f}"),
        ("decode, tokens/s", lambda s: f"{s.decode_tokens_per_s:.1f}"),
        ("time to first token, s", lambda s: f"{s.time_to_first_token:.3f}"),
        ("time of a decode step, ms", lambda s: f"{1e3 * s.time_per_step:.1f}"),
        ("share of the bandwidth", lambda s: f"{s.share_of_bandwidth:.0%}"),
        ("weights in files", lambda s: megabytes(s.weight_bytes)),
        ("weights read for a token", lambda s: megabytes(s.weight_bytes_read_per_step)),
        ("cache, bytes per token", lambda s: f"{s.cache_bytes_per_token:,.0f}"),
        ("the same in bf16", lambda s: f"{s.cache_bytes_per_token_bf16:,.0f}, {_times(s):.2f} times"),
        ("cache", lambda s: megabytes(s.cache_bytes)),
        ("peak memory", lambda s: megabytes(s.peak_memory)),
        ("time to load, s", lambda s: f"{s.load_time:.1f}"),
        ("kernels", lambda s: ", ".join(f"{name} x {count}" for name, count in s.kernels.items()) or "torch, fp32"),
        ("C++", lambda s: s.compiled or "none"),
        ("fused blocks", lambda s: f"{s.fused_blocks} of {s.blocks}"),
        ("blocks in C++", lambda s: f"{s.compiled_blocks} of {s.blocks}"),
    ]
    return [(name, *(say(speed) for speed in speeds)) for name, say in shown]
