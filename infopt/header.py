"""Bytes that nobody has vouched for: regular files, JSON and the headers of safetensors files.

A checkpoint comes from a stranger. All that is read from one passes through this file first, and meets three rules:

* **Look before opening.** A path is opened only when `stat` calls it a regular file: opening a FIFO blocks for ever and
  reading a device may never end.
* **Bound before allocating.** A size is compared with the file and with a limit before a byte of it is read, and the
  number of values in a JSON text is bounded before it is parsed. A file of 8 bytes that claims 2^63 costs nothing.
* **Check every claim.** Each tensor's dtype, shape and place is checked, and all places together must tile the data: no
  hole, no overlap, no bytes left over. The safetensors package checks most of this too, but its messages name no file,
  and of a name that appears twice it silently keeps one.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian length n, n bytes of JSON
`{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}`, then the data.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from infopt.errors import BadInput, OutOfResources

MIB = 2**20
MAX_HEADER = 100_000_000  # the safetensors package's own limit
MAX_VALUES = 4_000_000  # values in one JSON text; 500,000 tensors in a header
MAX_DEPTH = 64
MAX_DIMS = 64  # torch's own limit
ONE_READ = 2**30  # Linux reads at most 2 GiB at once

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a stored tensor lies: `nbytes` bytes at the absolute `offset` of `file`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def show(text: object, limit: int = 120) -> str:
    """A name from a file, made fit for a message: control characters escaped, cut at `limit` characters."""
    shown = repr(text)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def look(path: Path) -> str:
    """The command that shows a path, for the end of an error message."""
    return f"ls -l {quote(str(path))}"


@contextmanager
def open_regular(path: Path) -> Iterator[int]:
    """A read-only file descriptor of a regular file; BadInput for anything else (links are followed)."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadInput(
                f"{path} is not a regular file", "A folder, pipe, socket or device is never read.", look(path)
            )
        # O_NONBLOCK: had the file been swapped for a pipe since, this open would not wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as err:  # ValueError: a NUL in the path
        reason = err.strerror if isinstance(err, OSError) else str(err)
        raise BadInput(f"{show(str(path), 400)} cannot be opened", f"{reason}.", look(path.parent)) from err
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise BadInput(f"{path} is not a regular file", "It changed while it was being opened.", look(path))
        yield fd
    finally:
        os.close(fd)


def read_into(fd: int, path: Path, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` (bytes) from `offset` of the open file; BadInput when the file ends early or the disk fails."""
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(fd, [buffer[done : done + ONE_READ]], offset + done)
        except OSError as err:
            raise BadInput(f"{path} cannot be read at byte {offset + done}", f"{err.strerror}.", look(path)) from err
        if count == 0:
            raise BadInput(
                f"{path} ends at byte {offset + done}", "It was longer when its header was read.", look(path)
            )
        done += count


def read_bytes(path: Path, limit: int) -> bytes:
    """A whole regular file of at most `limit` bytes; BadInput when it is longer."""
    with open_regular(path) as fd:
        size = os.fstat(fd).st_size
        if size > limit:
            raise BadInput(f"{path} is too large", f"It has {size:,} bytes; at most {limit:,} are read.", look(path))
        data = bytearray(size)
        read_into(fd, path, memoryview(data), 0)
    return bytes(data)


def parse_json(data: bytes | bytearray, path: Path, max_values: int = MAX_VALUES) -> Any:
    """Strict JSON: UTF-8 without a byte order mark, no duplicate keys, no NaN or infinity, bounded depth and size.

    Raises BadInput that names `path`.
    """
    if data.startswith(b"\xef\xbb\xbf"):
        fix = f"sed -i '1s/^\\xEF\\xBB\\xBF//' {quote(str(path))}"
        raise BadInput(f"{path} begins with a byte order mark", "JSON files must not.", fix)
    if sum(map(data.count, (b",", b"[", b"{"))) > max_values:
        raise BadInput(f"{path} holds too many values", f"At most {max_values:,} are read.", look(path))
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
        if re.search(rb"\\u[dD]", data):  # maybe half a surrogate pair: a string that cannot be printed or written
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        _check_depth(value)
    except RecursionError as err:
        raise BadInput(f"{path} is nested too deeply", f"At most {MAX_DEPTH} levels are read.", look(path)) from err
    except ValueError as err:  # JSONDecodeError and UnicodeError are ValueErrors
        reason = "It is empty." if not data.strip() else f"{str(err)[:200]}."
        raise BadInput(f"{path} is not valid JSON", reason, f"python -m json.tool {quote(str(path))}") from err
    return value


def read_json(path: Path, limit: int = 64 * MIB, max_values: int = MAX_VALUES) -> Any:
    """Parse a JSON file strictly (see `parse_json`); BadInput when it is unsafe, malformed or over `limit` bytes."""
    return parse_json(read_bytes(path, limit), path, max_values)


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read and check the header of a safetensors file; the tensors' bytes are not read.

    Returns the tensors in the order of their bytes, and the metadata. Raises BadInput naming the file and the tensor.
    """
    with open_regular(path) as fd:
        size = os.fstat(fd).st_size
        prefix = bytearray(8)
        if size < 8:
            raise _bad(path, f"It has {size} bytes; the format begins with 8 bytes of length.")
        read_into(fd, path, memoryview(prefix), 0)
        length = int.from_bytes(prefix, "little")
        if length > min(MAX_HEADER, size - 8):
            raise _bad(
                path, f"Its header claims {length:,} bytes; the file has {size:,} and the limit is {MAX_HEADER:,}."
            )
        raw = bytearray(length)
        read_into(fd, path, memoryview(raw), 8)
    if not raw.startswith(b"{"):
        raise _bad(path, "Its header is not a JSON object.")
    header = parse_json(raw, path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(path, "Its __metadata__ is not an object of strings.")
    infos = [_tensor(path, name, entry, 8 + length) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    _check_tiling(path, infos, 8 + length, size)
    return {info.name: info for info in infos}, metadata


def read_tensor(info: TensorInfo, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Read a tensor, or its leading rows `start:stop`, into fresh memory in its storage dtype.

    Plain reads, no memory mapping: the resident size of the process is then what the caller holds, and a file that is
    cut short while it is mapped cannot kill the process. Raises BadInput (file shorter than its header said).
    """
    shape, offset, nbytes = info.shape, info.offset, info.nbytes
    if stop is not None:
        if not shape or not 0 <= start <= stop <= shape[0]:
            raise ValueError(f"rows {start}:{stop} of {info.name}, shape {list(shape)}")
        row = nbytes // shape[0] if shape[0] else 0
        shape, offset, nbytes = (stop - start, *shape[1:]), offset + start * row, (stop - start) * row
    if nbytes == 0:
        return torch.empty(shape, dtype=info.dtype)
    try:
        raw = torch.empty(nbytes, dtype=torch.uint8)
    except RuntimeError as err:
        raise OutOfResources(f"tensor {show(info.name)} needs {nbytes:,} bytes", "The allocation failed.") from err
    with open_regular(info.file) as fd:
        read_into(fd, info.file, raw.numpy().data, offset)
    if info.dtype is torch.bool:
        return raw.ne(0).reshape(shape)  # a byte 2 viewed as bool would be undefined
    return raw.view(info.dtype).reshape(shape)


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    where = f"tensor {show(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, f"{where}: an entry must have exactly dtype, shape and data_offsets.")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise _bad(path, f"{where}: dtype {show(kind)} is none of {', '.join(DTYPES)}.")
    if not _naturals(shape) or len(shape) > MAX_DIMS:
        raise _bad(path, f"{where}: shape {show(shape)} is not a list of at most {MAX_DIMS} natural numbers.")
    dtype = DTYPES[kind]
    # A dimension of 0 hides the others from the size, yet torch multiplies them for the strides.
    if math.prod(max(dim, 1) for dim in shape) * dtype.itemsize >= 2**63:
        raise _bad(path, f"{where}: shape {show(shape)} overflows.")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(path, f"{where}: data_offsets {show(offsets)} is not [begin, end].")
    begin, end = offsets
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        raise _bad(path, f"{where}: {kind} {show(shape)} needs {nbytes:,} bytes, its place has {end - begin:,}.")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + begin, nbytes)


def _check_tiling(path: Path, infos: list[TensorInfo], data_start: int, size: int) -> None:
    expected = data_start
    for info in infos:
        if info.offset != expected:
            kind = "overlaps the tensor before it" if info.offset < expected else "leaves a hole before it"
            raise _bad(path, f"tensor {show(info.name)} {kind}.")
        expected += info.nbytes
    if expected > size:
        raise _bad(path, f"It is truncated: its header describes {expected:,} bytes, the file has {size:,}.")
    if expected < size:
        raise _bad(path, f"{size - expected:,} bytes after the last tensor belong to nothing.")


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"The key {show(twice)} appears twice")
    return result


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"The number {show(text, 40)} is too large")
    return value


def _check_depth(value: Any) -> None:
    level, depth = [value] if isinstance(value, (dict, list)) else [], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise RecursionError
        inner = (child for item in level for child in (item.values() if isinstance(item, dict) else item))
        level = [child for child in inner if isinstance(child, (dict, list))]


def _bad(path: Path, why: str) -> BadInput:
    return BadInput(
        f"{path} is not a sound safetensors file",
        why,
        f"Fetch the file again, then compare: sha256sum {quote(str(path))}",
    )
