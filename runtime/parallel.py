"""Run a folder of shards: one process per rank, gloo between them, pipeline stages one after another.

The processes of a stage meet through a file and talk over the loopback interface. Between stages the hidden states lie in a
safetensors file, as the windows and the answers do: nothing is pickled but names. A rank that fails writes
down why; the others, which may wait for it in the middle of a sum, are ended, and the parent raises that error.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from infopt import errors
from infopt.errors import InfoptError, OutOfResources
from infopt.header import read_header, read_json, read_tensor
from infopt.runtime.rank import RankModel
from infopt.shards import read_shards
from infopt.writer import write_json, write_safetensors

POLL = 0.02
_PATIENCE = datetime.timedelta(minutes=30)
Work = Callable[[Path, Path, int, int], None]  # what a rank does: the shards, the place to meet, stage and rank
TAIL = 16  # last tokens of each window whose logits are compared


def run_shards(folder: Path, windows_NT: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden_NTC after the last block, logits_NTV of each window's last 16 tokens), from one process per rank.

    Raises what a rank raised; OutOfResources where a process died.
    """
    described = read_shards(folder)
    with tempfile.TemporaryDirectory(prefix="infopt-ranks-") as name:
        place = Path(name)
        write_safetensors(place / "in.safetensors", {"windows": windows_NT})
        for stage in range(described.pp):
            _run_stage(folder, place, stage, described.tp)
        found = _read(place / f"out-{described.pp - 1}.safetensors")
    return found["hidden"], found["logits"]


def _run_stage(folder: Path, place: Path, stage: int, tp: int) -> None:
    for _ in running(_work, folder, place, stage, tp):
        time.sleep(POLL)


def running(work: Work, folder: Path, place: Path, stage: int, tp: int) -> Iterator[None]:
    """Start the stage's ranks, and yield until all of them are done. Raises what a rank raised."""
    spawn = multiprocessing.get_context("spawn")  # a fork would copy torch's threads in an unknown state
    threads = max(1, torch.get_num_threads() // tp)
    ranks = [
        spawn.Process(target=_rank, args=(work, str(folder), str(place), stage, rank, threads), daemon=True)
        for rank in range(tp)
    ]
    try:
        for process in ranks:
            process.start()
        while any(process.exitcode is None for process in ranks):
            if any(process.exitcode not in (None, 0) for process in ranks):
                break
            yield
    finally:
        for process in ranks:
            _end(process)
    failed = [rank for rank, process in enumerate(ranks) if process.exitcode != 0]
    if failed:
        raise _failure(place, stage, failed, [ranks[rank].exitcode for rank in failed])


def _end(process: BaseProcess) -> None:
    if process.pid is None:
        return
    if process.exitcode is None:
        process.terminate()
    process.join(timeout=10)
    if process.exitcode is None:
        process.kill()
        process.join()


def _failure(place: Path, stage: int, failed: list[int], codes: list[int | None]) -> InfoptError:
    """The error that a rank wrote down; those that were ended because of it wrote none."""
    for rank in failed:
        path = place / f"error-{stage}-{rank}.json"
        if path.exists():
            said = read_json(path)
            kind = getattr(errors, said["kind"], InfoptError)
            return kind(f"stage {stage}, rank {rank}: {said['what']}", said["why"], said["fix"])
    why = f"Its exit code is {codes[0]}; -9 means that the system ended it, mostly for want of memory."
    return OutOfResources(
        f"stage {stage}, rank {failed[0]} died", why, "free memory, or use fewer ranks or shorter windows"
    )


def _rank(work: Work, folder: str, place_name: str, stage: int, rank: int, threads: int) -> None:
    """The main function of a rank's process."""
    place = Path(place_name)
    try:
        torch.set_num_threads(threads)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        tp = read_shards(Path(folder)).tp
        store = dist.FileStore(str(place / f"store-{stage}"), tp)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=tp, timeout=_PATIENCE)
        work(Path(folder), place, stage, rank)
        dist.destroy_process_group()
    except InfoptError as error:
        said = {"kind": type(error).__name__, "what": error.what, "why": error.why, "fix": error.fix}
        write_json(place / f"error-{stage}-{rank}.json", said)
        raise SystemExit(1) from error
    except RankLost as error:  # the one that was lost says why
        raise SystemExit(1) from error


class RankLost(Exception):
    """Another rank of the stage is gone."""


def add_up(tensor: Tensor) -> None:
    """The sum over the stage's ranks, in place, in one of them."""
    try:
        dist.all_reduce(tensor)
    except RuntimeError as error:
        raise RankLost from error


def _work(folder: Path, place: Path, stage: int, rank: int) -> None:
    model = RankModel(folder, stage, rank, add_up)
    if stage == 0:
        hidden_NTC = model.embed(_read(place / "in.safetensors")["windows"])
    else:
        hidden_NTC = _read(place / f"out-{stage - 1}.safetensors")["hidden"]
    found = {"hidden": model.advance(hidden_NTC)}
    if stage == model.described.pp - 1:
        found["logits"] = model.logits(found["hidden"][:, -TAIL:].contiguous())
    if rank == 0:
        write_safetensors(place / f"out-{stage}.safetensors", found)


def _read(path: Path) -> dict[str, Tensor]:
    return {name: read_tensor(info) for name, info in read_header(path)[0].items()}
