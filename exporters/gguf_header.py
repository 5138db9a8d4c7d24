"""The header of a GGUF file, read and checked before anything else touches the file.

GGUF (docs/gguf.md in ggml's repository): magic, version, two counts; key-value pairs; a table of tensors; aligned data.
Every length in it is a claim by whoever made the file, so each is compared with the bytes that are there before it is
used: a file of 200 bytes that claims 2^60 tensors is refused at once, in constant memory. The readers that come
afterwards (the `gguf` package, transformers) trust these numbers.

Values of arrays are stepped over, not kept: a tokenizer's 250,000 strings are transformers' business.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from infopt.errors import BadInput, Unsupported

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MIN_TENSOR_BYTES = 8 + 4 + 4 + 8  # name length, rank, type, offset
_MIN_PAIR_BYTES = 8 + 4 + 1
_MAX_STRING = 16 * 2**20
_MAX_RANK = 4


@dataclass(frozen=True)
class GGUFTensorInfo:
    """One tensor of the file; `shape` is in the order of numpy and torch (GGUF writes it reversed)."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int  # absolute, in the file
    nbytes: int

    @property
    def row_bytes(self) -> int:
        return self.nbytes // math.prod(self.shape[:-1])


@dataclass(frozen=True)
class GGUFHeader:
    """`values` has every key; an array's value is its number of elements."""

    path: Path
    values: dict[str, Any]
    tensors: dict[str, GGUFTensorInfo]

    @property
    def architecture(self) -> str:
        return str(self.values["general.architecture"])


class _Cursor:
    """Reads little-endian values one after another; reading past the end is a BadInput."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.end = path, data, 0, len(data)

    def fail(self, why: str) -> BadInput:
        return _bad(self.path, f"{why} (at byte {self.at})")

    def skip(self, count: int) -> int:
        """Step over `count` bytes; gives where they start."""
        start = self.at
        if count > self.end - start:
            raise self.fail(f"{count} bytes are claimed, and {self.end - start} are left")
        self.at = start + count
        return start

    def number(self, layout: str) -> Any:
        start = self.skip(struct.calcsize(layout))
        return struct.unpack_from(layout, self.data, start)[0]

    def string(self) -> str:
        length = self.number("<Q")
        if length > _MAX_STRING:
            raise self.fail(f"a text of {length} bytes is claimed")
        start = self.skip(length)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail("a name is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        raise self.fail(f"a value has the unknown type {kind}")

    def array(self) -> int:
        """Step over an array; gives its length. Arrays of arrays are allowed by the format, and used by nobody."""
        kind, count = self.number("<I"), self.number("<Q")
        if kind in _SCALARS:
            self.skip(count * struct.calcsize(_SCALARS[kind]))
        elif kind == _STRING:
            if count > (self.end - self.at) // 8:
                raise self.fail(f"{count} texts are claimed")
            for _ in range(count):
                self.skip(self.number("<Q"))
        else:
            raise self.fail(f"an array has elements of type {kind}")
        return int(count)


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read and validate. Raises BadInput (damaged or hostile), Unsupported (big-endian, version, tensor type)."""
    if not path.is_file():
        raise _bad(path, "it is not a regular file" if path.exists() else "it does not exist")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Cursor(path, data))
    except (OSError, ValueError) as error:  # mmap says ValueError for an empty file
        raise _bad(path, str(error)) from error


def read_raw(file: BinaryIO, info: GGUFTensorInfo, start: int, stop: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of leading rows [start, stop), uint8 [rows, bytes of a row]; a vector is one row. BadInput past the end."""
    one_row = len(info.shape) == 1
    size = info.nbytes // info.shape[0] if not one_row else 0
    file.seek(info.offset + start * size)
    raw = bytearray(info.nbytes if one_row else (stop - start) * size)
    if file.readinto(raw) != len(raw):  # type: ignore[attr-defined]
        raise BadInput(f"{file.name} became shorter while it was read", "", "Run the command again.")
    return np.frombuffer(raw, dtype=np.uint8).reshape(-1, info.row_bytes)


def _read(cursor: _Cursor) -> GGUFHeader:
    if cursor.data[:4] != b"GGUF":
        raise _bad(cursor.path, "it does not begin with the letters GGUF")
    cursor.at = 4
    version = cursor.number("<I")
    if version not in (2, 3):
        what = "is big-endian" if version > 0xFFFF else f"has version {version}"
        raise Unsupported(f"{cursor.path} {what}", "GGUF 2 and 3, little-endian, are read", "Write it again as GGUF 3.")
    tensor_count, pair_count = cursor.number("<Q"), cursor.number("<Q")
    if tensor_count * _MIN_TENSOR_BYTES + pair_count * _MIN_PAIR_BYTES > cursor.end:
        raise _bad(cursor.path, f"it claims {tensor_count} tensors and {pair_count} values in {cursor.end} bytes")
    values: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.string()
        if key in values:
            raise cursor.fail(f"the key {key!r} is there twice")
        values[key] = cursor.value(cursor.number("<I"))
    architecture = values.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise _bad(cursor.path, "it does not name its architecture (general.architecture)")
    return GGUFHeader(cursor.path, values, _read_tensors(cursor, tensor_count, values.get("general.alignment", 32)))


def _read_tensors(cursor: _Cursor, count: int, alignment: Any) -> dict[str, GGUFTensorInfo]:
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
        raise cursor.fail(f"general.alignment is {alignment!r}")
    infos = [_read_tensor(cursor) for _ in range(count)]
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GGUFTensorInfo] = {}
    free = start
    for info in sorted(infos, key=lambda info: (info.offset, info.name)):
        placed = GGUFTensorInfo(info.name, info.kind, info.shape, start + info.offset, info.nbytes)
        if placed.name in tensors:
            raise _bad(cursor.path, f"the tensor {placed.name} is there twice")
        if placed.offset < free:
            raise _bad(cursor.path, f"the tensor {placed.name} overlaps another")
        if placed.offset + placed.nbytes > cursor.end:
            raise _bad(
                cursor.path,
                f"the tensor {placed.name} ends at {placed.offset + placed.nbytes}, the file at {cursor.end}",
            )
        free = placed.offset + placed.nbytes
        tensors[placed.name] = placed
    return tensors


def _read_tensor(cursor: _Cursor) -> GGUFTensorInfo:
    """One row of the table; its offset is still relative to the start of the data."""
    name, rank = cursor.string(), cursor.number("<I")
    if not 1 <= rank <= _MAX_RANK:
        raise cursor.fail(f"the tensor {name!r} has {rank} dimensions")
    shape = tuple(cursor.number("<Q") for _ in range(rank))[::-1]
    code, offset = cursor.number("<I"), cursor.number("<Q")
    if math.prod(shape) == 0 or math.prod(shape) > 2**48:
        raise cursor.fail(f"the tensor {name!r} has the shape {list(shape)}")
    try:
        kind = GGMLQuantizationType(code)
    except ValueError as error:
        raise Unsupported(
            f"{cursor.path}: the tensor {name} has the unknown type {code}",
            "the installed gguf package does not know it",
            "pip install --upgrade gguf",
        ) from error
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise cursor.fail(f"the tensor {name!r} has rows of {shape[-1]} values, and {kind.name} has blocks of {block}")
    return GGUFTensorInfo(name, kind, shape, offset, math.prod(shape) // block * block_bytes)


def _bad(path: Path, why: str) -> BadInput:
    return BadInput(f"{path} is not a readable GGUF file", why, "Copy or download it again and compare its checksum.")
