"""What the runner scripts of the peers share: their arguments, the ids, the stopwatch, and the file they leave.

Each runner works in the peer's own virtual environment, so nothing of infopt can be imported here. A runner loads the
model, quantizes it inside `stopwatch`, saves it, and calls `finish`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch


def arguments(*methods: str) -> argparse.Namespace:
    """The command line that `compare_peers.py` gives to every runner."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--ids", required=True, help=".npy file, int64 [windows, tokens]")
    parser.add_argument("--method", choices=methods, required=True)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--scheme", default="W4", help="W4 and W3 are what --bits and --group-size say")
    parser.add_argument("--iters", type=int, default=200, help="AutoRound's")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    options = parser.parse_args()
    options.torch_dtype = getattr(torch, options.dtype)
    return options


def windows(options: argparse.Namespace) -> list[torch.Tensor]:
    """The calibration windows, each int64 [tokens]."""
    ids_NT = np.load(options.ids)
    if len(ids_NT) < options.samples:
        raise SystemExit(f"{options.ids} holds {len(ids_NT)} windows; {options.samples} were asked for")
    return [torch.from_numpy(row) for row in ids_NT[: options.samples]]


@contextmanager
def stopwatch(result: dict[str, object]) -> Iterator[None]:
    """Put the wall and CPU seconds of the block into `result`, and the peak memory at its end."""
    wall, cpu = time.perf_counter(), _cpu()
    yield
    result["quantize_wall_s"] = time.perf_counter() - wall
    result["quantize_cpu_s"] = _cpu() - cpu
    result["quantize_peak_rss_mb"] = _peak_mb()


def _cpu() -> float:
    """CPU seconds of this process, its threads, and the children it waited for."""
    return sum(os.times()[:4])


def _peak_mb() -> float | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def finish(options: argparse.Namespace, result: dict[str, object], *packages: str) -> None:
    """Write what was measured, and with which versions and how many threads."""
    names = (*packages, "torch", "transformers", "compressed-tensors")
    found = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    result["versions"] = {name: found[name] for name in names if name in found}
    result["threads"] = torch.get_num_threads()
    options.result.write_text(json.dumps(result, indent=2))
