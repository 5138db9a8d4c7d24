"""Files that appear whole or not at all, among them safetensors.

`atomic_file` writes under another name, syncs and renames, so a reader (or the next run, after a power cut) never sees
half a file. `merge_shards` turns the part files of a streamed run into the layout that every loader knows,
`model.safetensors`, or numbered shards and an index, without holding a tensor: headers are planned first, then bytes
are copied in chunks.

The order of tensors inside a file is by item size, largest first. The format allows no padding between tensors, and
loaders that map the file need each tensor at a multiple of its item size; this order gives that for every mixture of
dtypes. Within one item size the order is the natural one, so the same tensors give the same bytes.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any, BinaryIO

import torch

from infopt.errors import BadInput, InfoptError, OutOfResources, UsageError
from infopt.header import DTYPES, TensorInfo, look, open_regular, read_header, read_into, show
from infopt.memory import bytes_of

PARTIAL = ".infopt-partial"  # the suffix of a file that is being written
CHUNK = 8 * 2**20
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors")
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@contextmanager
def os_errors(path: Path, what: str = "") -> Iterator[None]:
    """Turn an OSError of the body into the InfoptError that tells the user what to do about `path`."""
    try:
        yield
    except InfoptError:
        raise
    except OSError as err:
        name = errno.errorcode.get(err.errno or 0, "?")
        what = what or f"{err.filename or path} cannot be written"
        if err.errno in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST, errno.ELOOP):
            raise UsageError(what, f"{err.strerror} ({name}).", "Choose another output: -o DIR") from err
        full = err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = f"df -h {quote(str(path.parent))}" if full else look(path.parent)
        raise OutOfResources(what, f"{err.strerror} ({name}).", fix) from err


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under its name when the body ends well, synced and whole, and otherwise not at all.

    OutOfResources when the disk is full or not writable.
    """
    partial = path.with_name(path.name + PARTIAL)
    with os_errors(path):
        try:
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (no NaN) atomically, keys in the given order."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_file(path) as file:
        file.write(text.encode() + b"\n")


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors of any device, layout and aliasing to one file; `metadata` is `{"format": "pt"}` unless given.

    The bytes depend only on names, values and metadata. ValueError for a dtype that the format lacks.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES or name == "__metadata__":
            raise ValueError(f"tensor {name!r} of {tensor.dtype} cannot be stored")
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header = _encode_header([(name, tensors[name].dtype, tuple(tensors[name].shape)) for name in names], metadata)
    with atomic_file(path) as file:
        file.write(header)
        for name in names:
            file.write(bytes_of(tensors[name]).numpy().data)


def merge_shards(parts: list[Path], out: Path, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write the tensors of all `parts` (safetensors files) into the folder `out`, in constant memory.

    Tensors are dealt to shards in the order of the parts, by name within a part; a shard is closed before it would pass
    `max_shard_bytes` (one larger tensor gets a shard of its own). One shard is `model.safetensors`; several are
    `model-00001-of-0000N.safetensors` with an index. Shards and index of an earlier layout in `out` are removed.
    The parts are left alone. Raises BadInput (a bad part, a tensor in two parts), OutOfResources (disk).
    """
    if max_shard_bytes < 1:
        raise UsageError(
            f"shards of {max_shard_bytes} bytes", "A shard must hold at least one byte.", "--shard-size 5GB"
        )
    shards = _deal(_gather(parts), max_shard_bytes)
    count = len(shards)
    names = (
        [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)] if count > 1 else ["model.safetensors"]
    )
    with os_errors(out):
        stale = [path for path in out.iterdir() if SHARD.fullmatch(path.name) or path.name == INDEX]
        clash = next((part for part in parts if part.resolve() in {path.resolve() for path in stale}), None)
        if clash is not None:
            raise ValueError(f"the part {clash} has the name of a shard in the output folder")
        for path in stale:  # before the first new file: no crash leaves shards of two layouts side by side
            path.unlink()
    for name, infos in zip(names, shards, strict=True):
        _copy_shard(out / name, infos)
    if count > 1:
        weight_map = {info.name: name for name, infos in zip(names, shards, strict=True) for info in infos}
        total = sum(info.nbytes for infos in shards for info in infos)
        write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def free_space_check(folder: Path, need_bytes: int) -> None:
    """OutOfResources, with both numbers, unless the filesystem of `folder` (or of its nearest parent) has the space."""
    place = Path(os.path.realpath(folder))
    while not os.path.isdir(place):
        place = place.parent
    with os_errors(place):
        free = shutil.disk_usage(place).free
    if free < need_bytes:
        why = f"It needs {need_bytes:,} bytes, and {place} has {free:,} free: {need_bytes - free:,} are missing."
        raise OutOfResources(f"The disk is too small for {folder}", why, f"df -h {quote(str(place))}")


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _gather(parts: list[Path]) -> list[TensorInfo]:
    found: dict[str, TensorInfo] = {}
    for part in parts:
        for name, info in sorted(read_header(part)[0].items()):
            if name in found:
                raise BadInput(f"tensor {show(name)} is in {found[name].file} and in {part}", "", look(part))
            found[name] = info
    if not found:
        raise BadInput("there are no tensors to merge", f"The {len(parts)} part files are empty.")
    return list(found.values())


def _deal(infos: list[TensorInfo], limit: int) -> list[list[TensorInfo]]:
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for info in infos:
        if shards[-1] and size + info.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.nbytes
    return shards


def _copy_shard(path: Path, infos: list[TensorInfo]) -> None:
    infos = sorted(infos, key=lambda info: -info.dtype.itemsize)  # stable: the natural order within an item size
    buffer = memoryview(bytearray(CHUNK))
    with atomic_file(path) as file:
        file.write(_encode_header([(info.name, info.dtype, info.shape) for info in infos], None))
        for info in infos:
            with open_regular(info.file) as fd:
                for done in range(0, info.nbytes, CHUNK):
                    chunk = buffer[: min(CHUNK, info.nbytes - done)]
                    read_into(fd, info.file, chunk, info.offset + done)
                    file.write(chunk)


def _encode_header(
    entries: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], metadata: dict[str, str] | None
) -> bytes:
    """Length and JSON, padded with spaces so that the data begins at a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} if metadata is None else metadata}
    end = 0
    for name, dtype, shape in entries:
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
