"""How fast a folder runs here: reading a prompt, writing tokens, and how near the machine's memory lets it come.

Prefill reads a prompt of random tokens; decode writes greedy tokens for all texts together. Each is run after a warm-up, the
median is reported. A token at batch 1 cannot be faster than the weights and the cache can be read, so the bytes that a
decode step reads, divided by its time, are set against the bandwidth that a plain sum over memory reaches here, with as
many threads: that share is what is left to gain.

Peak memory is the system's count for the process since the measurement began, so it holds what loading needed as well.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from infopt.errors import UsageError
from infopt.kernels.cpu import Precision
from infopt.kernels.native import native
from infopt.plot import COLORS, Chart, svg
from infopt.runtime.device import wait
from infopt.runtime.engine import CHUNK, Engine, KVCache
from infopt.runtime.paged import Request
from infopt.runtime.sampling import most_likely

CPU = torch.device("cpu")
_STATUS = Path("/proc/self/status")
_WARM_UP = 2
BATCHES, CONTEXTS, _STEPS = (1, 2, 4, 8), (64, 256, 1024, 2048), 5
_READ = 256 * 2**20  # bytes of the bandwidth test: beyond any cache


@dataclass(frozen=True)
class Speed:
    """One model's figures. Times in seconds, sizes in bytes; decode is of all texts together. kernels: what multiplies, and
    how many weights; compiled: for what and by whom the C++ was, None where it is not used."""

    model: str
    precision: str
    kv_cache: str
    batch: int
    prompt: int
    new_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    time_to_first_token: float
    time_per_step: float
    load_time: float
    weight_bytes: int
    weight_bytes_read_per_step: int
    cache_bytes_per_token: float
    cache_bytes_per_token_bf16: float
    cache_bytes: int
    peak_memory: int
    share_of_bandwidth: float
    kernels: dict[str, int]
    compiled: str | None
    fused_blocks: int
    compiled_blocks: int
    blocks: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Sizes:
    """Texts at once, tokens of each prompt, tokens to write for each."""

    batch: int = 1
    prompt: int = 128
    new_tokens: int = 64


def measure(
    folder: Path,
    bandwidth: float,
    sizes: Sizes,
    precision: Precision = "exact",
    cache: KVCache = "stored",
    device: torch.device = CPU,
) -> Speed:
    """Load the folder and run it. bandwidth: `read_bandwidth()`. Raises UsageError for texts that the model cannot hold."""
    batch, prompt, new_tokens = sizes.batch, sizes.prompt, sizes.new_tokens
    forget_peak(device)
    began = time.perf_counter()
    engine = Engine(folder, precision, cache, device=device)
    load_time = time.perf_counter() - began
    total = prompt + new_tokens
    if engine.positions is not None and total > engine.positions:
        what = f"--prompt {prompt} with --new-tokens {new_tokens}"
        raise UsageError(what, f"{folder} knows {engine.positions:,} positions.", "Ask for fewer.")
    ids_BT = torch.randint(engine.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0))
    warm = engine.cache(prompt + _WARM_UP, chunk=CHUNK)
    place = _place(warm.admit(prompt + _WARM_UP))
    engine.prefill(warm, place, ids_BT[0, : min(prompt, 16)].tolist())
    pages = engine.cache(total, batch)
    places = [_place(pages.admit(total)) for _ in range(batch)]
    firsts, reading = [], []
    for place, ids in zip(places, ids_BT.tolist(), strict=True):
        began = time.perf_counter()
        firsts.append(int(most_likely(engine.prefill(pages, place, ids))))
        reading.append(time.perf_counter() - began)
    steps = []
    next_B1 = torch.tensor(firsts)[:, None]
    for _ in range(new_tokens - 1):
        began = time.perf_counter()
        next_B1 = most_likely(engine.advance(pages, places, next_B1, fine=False))[:, None]
        wait(device)
        steps.append(time.perf_counter() - began)
    step = statistics.median(steps[_WARM_UP:] or steps)
    stored, read = engine.weight_bytes
    cached = pages.bytes_per_token * batch * (prompt + new_tokens // 2)
    return Speed(
        model=str(folder),
        precision=precision,
        kv_cache=engine.cache_name,
        batch=batch,
        prompt=prompt,
        new_tokens=new_tokens,
        prefill_tokens_per_s=prompt / statistics.median(reading),
        decode_tokens_per_s=batch / step,
        time_to_first_token=reading[0],
        time_per_step=step,
        load_time=load_time,
        weight_bytes=stored,
        weight_bytes_read_per_step=read,
        cache_bytes_per_token=pages.bytes_per_token,
        cache_bytes_per_token_bf16=pages.float_bytes_per_token,
        cache_bytes=pages.nbytes,
        peak_memory=peak(device),
        share_of_bandwidth=(read + cached) / step / bandwidth,
        kernels=engine.kernels,
        compiled=_compiled() if precision == "packed" and device.type == "cpu" else None,
        fused_blocks=len(engine.fused),
        compiled_blocks=len(engine.decoder.blocks) if engine.decoder is not None else 0,
        blocks=len(engine.kinds),
    )


def latencies(
    folder: Path,
    precision: Precision = "exact",
    cache: KVCache = "stored",
    batches: Sequence[int] = BATCHES,
    device: torch.device = CPU,
    contexts: Sequence[int] = CONTEXTS,
) -> dict[tuple[int, int], float]:
    """Seconds of a decode step by (texts at once, tokens before), for those contexts that the model knows (for its longest, if
    none). The texts are zeros in the cache: they take as long to read as any."""
    engine = Engine(folder, precision, cache, device=device)
    longest = (engine.positions or 2 * max(contexts)) - _STEPS
    found = {}
    for batch in batches:
        for context in [context for context in contexts if context <= longest] or [max(1, longest)]:
            pages = engine.cache(context + _STEPS, batch)
            places = [_place(pages.admit(context + _STEPS)) for _ in range(batch)]
            next_B1, steps = torch.zeros(batch, 1, dtype=torch.int64), []
            engine.advance(pages, places, next_B1, fine=False)  # which takes the memory
            for place in places:
                place.length = context
            for _ in range(_STEPS):
                began = time.perf_counter()
                engine.advance(pages, places, next_B1, fine=False)
                wait(device)
                steps.append(time.perf_counter() - began)
            found[batch, context] = statistics.median(steps)
    return found


def latency_svg(found: dict[tuple[int, int], float], title: str) -> str:
    """Two charts: the time of a step against the batch, a line for each context, and the other way round."""
    charts = []
    for axis, name, other in ((0, "texts at once", "tokens before"), (1, "tokens before", "texts at once")):
        lines, dots = [], []
        for i, fixed in enumerate(sorted({key[1 - axis] for key in found})):
            line = [(float(key[axis]), 1e3 * time) for key, time in sorted(found.items()) if key[1 - axis] == fixed]
            color = COLORS[i % len(COLORS)]
            lines.append((color, line))
            dots += [(color, f"{y:.1f} ms" if n < len(line) - 1 else f"{y:.1f} ms, {fixed} {other}", (x, y))
                     for n, (x, y) in enumerate(line)]  # fmt: skip
        keys = sorted({key[axis] for key in found})
        above = f"{title}: time of a decode step, ms"
        charts.append(Chart(lines, dots, above, f"{name}: {', '.join(map(str, keys))}"))
    return svg(charts)


def _compiled() -> str | None:
    library = native()
    return None if library is None else f"{library.target}, {library.compiler}"


def read_bandwidth(device: torch.device = CPU) -> float:
    """Bytes per second that torch reads from the device's memory, the best of a few sums over more than any cache holds."""
    x = torch.ones(_READ // 4, device=device)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        x.sum()
        wait(device)
        times.append(time.perf_counter() - began)
    return _READ / min(times)


def forget_peak(device: torch.device = CPU) -> None:
    """Linux counts the peak anew after this; elsewhere it is that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if _STATUS.exists():
        with suppress(OSError):  # not everybody may
            _STATUS.with_name("clear_refs").write_text("5")


def peak(device: torch.device = CPU) -> int:
    """Bytes; of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _place(request: Request | None) -> Request:
    if request is None:
        raise RuntimeError("a cache made for these texts has no place for them")
    return request
