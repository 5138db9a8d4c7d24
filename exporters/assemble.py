"""Put a folder of shards back together, byte for byte.

Each weight file is written from its own header, tensor after tensor in the order of the file; a tensor is made of its
pieces, and where two ranks hold the same positions they must hold the same bytes. The sha256 of every file was recorded
when the model was cut: a file that does not have it is never handed out.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from infopt.checkpoint import CheckpointReader, contained
from infopt.errors import BadInput, VerificationFailed
from infopt.exporters.shard import file_digest
from infopt.header import (
    DTYPES,
    MAX_HEADER,
    TensorInfo,
    look,
    parse_json,
    read_bytes,
    read_header,
    read_tensor,
    show,
)
from infopt.memory import bytes_of
from infopt.output import MANIFEST, check_manifest, free_space_check
from infopt.shards import HEADER, SHARDS, SOURCE, ShardSet, TensorCut, read_shards
from infopt.writer import atomic_file, os_errors


@dataclass(frozen=True)
class OpenShards:
    """A folder of shards whose ranks were checked against shards.json. ranks[stage][rank]: name -> where it lies."""

    folder: Path
    described: ShardSet
    ranks: tuple[tuple[dict[str, TensorInfo], ...], ...]


def is_shards(folder: Path) -> bool:
    return (folder / SHARDS).is_file()


def open_shards(folder: Path) -> OpenShards:
    """Read shards.json and every rank's headers; BadInput where a rank does not hold what is described."""
    folder = Path(folder)
    if not is_shards(folder):
        raise BadInput(f"{folder} has no {SHARDS}", "So it is no folder of shards.", look(folder))
    described = read_shards(folder)
    ranks: list[list[dict[str, TensorInfo]]] = [[{} for _ in range(described.tp)] for _ in range(described.pp)]
    for stage, rank, name in described.rank_names():
        contained(folder, name)
        held = CheckpointReader(folder / name).tensors
        expected = {key: cut for key, cut in described.tensors.items() if stage in cut.stages}
        for key in sorted(held.keys() ^ expected.keys()):
            where = "is not described" if key in held else "is missing"
            raise BadInput(
                f"{folder / name}: tensor {show(key)} {where}", f"{SHARDS} and the rank disagree.", look(folder)
            )
        for key, cut in expected.items():
            wanted = (DTYPES[cut.dtype], cut.local_shape(rank))
            if (held[key].dtype, held[key].shape) != wanted:
                why = (
                    f"It is {held[key].dtype} {list(held[key].shape)}; {SHARDS} makes it {wanted[0]} {list(wanted[1])}."
                )
                raise BadInput(f"{folder / name}: tensor {show(key)} has another shape", why, look(folder / name))
        ranks[stage][rank] = held
    return OpenShards(folder, described, tuple(tuple(stage) for stage in ranks))


def assemble(shards: OpenShards, stage: Path, on_tensor: Callable[[], None] = lambda: None) -> None:
    """Write the model that was cut into the empty folder `stage`.

    `on_tensor` is called once per tensor. Raises BadInput (files that cannot be), VerificationFailed (other bytes than
    were cut), OutOfResources (disk).
    """
    folder, described = shards.folder, shards.described
    if (folder / MANIFEST).exists():
        check_manifest(folder)
    free_space_check(stage, sum(size for size, _ in described.files.values()))
    seen: set[str] = set()
    with os_errors(stage):
        for name in described.files:
            target = stage / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if name in described.weights:
                _write_weights(shards, name, target, seen, on_tensor)
            else:
                source = contained(folder, f"{SOURCE}/{name}")
                _check_digest(source, described.files[name])
                shutil.copyfile(source, target)
    if absent := sorted(described.tensors.keys() - seen):
        raise BadInput(
            f"{folder}: tensor {show(absent[0])} is in no file of the model", "A header lacks it.", look(folder)
        )


def _write_weights(shards: OpenShards, name: str, target: Path, seen: set[str], on_tensor: Callable[[], None]) -> None:
    path = contained(shards.folder, f"{SOURCE}/{name}{HEADER}")
    header = read_bytes(path, MAX_HEADER + 8)
    with atomic_file(target) as file:
        file.write(header)
        for key in _in_order(header, path):
            cut = shards.described.tensors.get(key)
            if cut is None or key in seen:
                raise BadInput(f"{path}: tensor {show(key)} is not described, or in two files", "", look(path))
            seen.add(key)
            whole = join(shards, key, cut)
            file.write(bytes_of(whole).numpy().data)
            on_tensor()
    read_header(target)
    _check_digest(target, shards.described.files[name])


def _in_order(header: bytes, path: Path) -> list[str]:
    entries = parse_json(header[8:], path)
    if not isinstance(entries, dict):
        raise BadInput(f"{path} is no header", "It is not a JSON object.", look(path))
    placed = []
    for key, entry in entries.items():
        if key == "__metadata__":
            continue
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(at) is int for at in offsets):
            raise BadInput(f"{path} is no header", f"{show(key)} has no data_offsets.", look(path))
        placed.append((*offsets, key))
    return [key for _, _, key in sorted(placed)]


def join(shards: OpenShards, key: str, cut: TensorCut) -> torch.Tensor:
    """The whole stored tensor from its ranks' parts; VerificationFailed where copies of one position differ."""
    stages = [shards.ranks[stage] for stage in cut.stages]
    if cut.values is not None:
        return torch.tensor(cut.values, dtype=DTYPES[cut.dtype])
    whole = _join_ranks([held[key] for held in stages[0]], cut, key)
    for other in stages[1:]:  # a tied embedding lies in the first and in the last stage
        for rank, held in enumerate(other):
            if not torch.equal(_raw(read_tensor(held[key])), _raw(read_tensor(stages[0][rank][key]))):
                raise _differs(key, held[key])
    return whole


def _join_ranks(infos: list[TensorInfo], cut: TensorCut, key: str) -> torch.Tensor:
    if cut.axis is None:
        whole = read_tensor(infos[0])
        for info in infos[1:]:
            if not torch.equal(_raw(read_tensor(info)), _raw(whole)):
                raise _differs(key, info)
        return whole
    whole = torch.empty(cut.shape, dtype=DTYPES[cut.dtype])
    if whole.numel() == 0:
        return whole
    width = _raw(whole).shape[-1] // max(whole.shape[-1], 1) if whole.dim() == cut.axis + 1 else 1
    filled = torch.zeros(cut.shape[cut.axis], dtype=torch.bool)
    for rank, info in enumerate(infos):
        local = read_tensor(info)
        local = local + cut.base[rank] if cut.base else local
        for (start, stop), at in _places(cut, rank):
            theirs = _raw(local).narrow(cut.axis, at * width, (stop - start) * width)
            mine = _raw(whole).narrow(cut.axis, start * width, (stop - start) * width)
            old = filled[start:stop]
            if bool(old.any()):
                _check_copies(mine, theirs, old, cut, width, key, info)
            mine.copy_(theirs)
            old.fill_(True)
    return whole


def _check_copies(
    mine: torch.Tensor, theirs: torch.Tensor, old: torch.Tensor, cut: TensorCut, width: int, key: str, info: TensorInfo
) -> None:
    axis = cut.axis or 0
    both = old.repeat_interleave(width).nonzero()[:, 0]
    if not torch.equal(mine.index_select(axis, both), theirs.index_select(axis, both)):
        raise _differs(key, info)


def _places(cut: TensorCut, rank: int) -> Iterator[tuple[tuple[int, int], int]]:
    """Each piece's place in the whole tensor, and where it begins in the rank's."""
    at = 0
    for start, stop, pad in cut.pieces[rank]:
        yield (start, stop), at
        at += stop - start + pad


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes along the last axis: comparable whatever the dtype (NaN equals itself)."""
    return tensor.reshape(1).view(torch.uint8) if tensor.dim() == 0 else tensor.contiguous().view(torch.uint8)


def _check_digest(path: Path, expected: tuple[int, str]) -> None:
    found = file_digest(path)
    if found != expected:
        why = f"It has {found[0]} bytes with sha256 {found[1][:16]}..., not {expected[0]} with {expected[1][:16]}..."
        raise VerificationFailed(f"{path} is not what was cut", why, "Cut the model again, or fetch the shards again.")


def _differs(key: str, info: TensorInfo) -> VerificationFailed:
    why = "Ranks that hold the same positions must hold the same bytes."
    return VerificationFailed(f"{info.file}: tensor {show(key)} differs from another rank's copy", why, "Cut it again.")
