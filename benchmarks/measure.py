"""Run one command in a process of its own and say what it cost: wall and CPU seconds, peak memory, the load around it.

The kernel keeps the figures per process and hands them over once, when the process is waited for (`wait4`), so they
belong to that command alone. One trap: a new process inherits the high-water mark of the one that started it, so the
starter must stay small. This module and the scripts that use it therefore import nothing but the standard library.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """What a finished process used. `code` is its exit status, negative for a signal."""

    code: int
    wall_s: float
    cpu_s: float
    peak_rss_mb: float
    load_before: float
    load_after: float
    timed_out: bool


def run_measured(
    command: Sequence[str], log: Path, *, env: Mapping[str, str] | None = None, timeout: float | None = None,
    cwd: Path | None = None,
) -> Cost:  # fmt: skip
    """Run `command` with its output in `log` (stdout and stderr together), and measure it and the children it waited for.

    After `timeout` seconds the command and everything it started is killed. `env` is laid over this environment.
    """
    before, began = os.getloadavg()[0], time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            process_group=0,  # a group of its own can be killed as a whole
        )
        try:
            status, usage, timed_out = _wait(process.pid, began, timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    wall = time.monotonic() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    unit = 1e6 if sys.platform == "darwin" else 1e6 / 1024  # ru_maxrss counts bytes there and KiB elsewhere
    return Cost(
        code=process.returncode,
        wall_s=wall,
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_rss_mb=usage.ru_maxrss / unit,
        load_before=before,
        load_after=os.getloadavg()[0],
        timed_out=timed_out,
    )


def _wait(pid: int, began: float, timeout: float | None) -> tuple[int, resource.struct_rusage, bool]:
    """(wait status, resource usage, killed for time) of a child that leads its own process group."""
    if timeout is None:
        return *os.wait4(pid, 0)[1:], False
    killed = False
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return status, usage, killed
        if not killed and time.monotonic() - began > timeout:
            os.killpg(pid, signal.SIGKILL)
            killed = True
        time.sleep(0.05)


def tail(log: Path, lines: int = 8, characters: int = 1200) -> str:
    """The end of a log: what a failed command said last."""
    text = log.read_text(errors="replace")[-20_000:]
    return "\n".join(text.splitlines()[-lines:])[-characters:]
