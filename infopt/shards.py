"""`shards.json`: which part of which tensor lies in which rank's folder, as plain and checked data.

A folder of shards belongs to no engine:

    shards.json        this description
    source/            every file of the model but its weights, byte for byte; of each weight file its header
    pp0-tp0/ ...       one folder per rank: config.json and the rank's tensors under the model's own names

A rank holds a tensor whole (`axis` is null), or the concatenation of its *pieces*: `[start, stop, pad]` are the positions
`start:stop` along the axis, then `pad` positions of padding that stand for nothing. Pieces of two ranks may overlap: that is
how shared key-value heads are replicated. `values` replaces a tensor whose content is its own layer's shape, which each
rank must see as its own; `base` is what was subtracted from a rank's group numbers (g_idx) for the same reason.

`ops` says how each layer is split: "column" by its output channels (`rows`), "row" by its input columns, after which the
ranks' outputs are added, and only then the bias.

All of it may come from a stranger: whatever is not exactly as described is BadInput before a tensor is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from infopt.checkpoint import contained
from infopt.errors import BadInput
from infopt.header import DTYPES, look, read_json, show

SHARDS = "shards.json"
SOURCE = "source"
HEADER = ".header"  # source/model.safetensors.header: the file's first bytes, up to its data
FORMAT = "infopt-shards-1"
MAX_RANKS = 1024

Piece = tuple[int, int, int]
Pieces = tuple[Piece, ...]


@dataclass(frozen=True)
class TensorCut:
    """How one stored tensor is spread. pieces: per tensor-parallel rank, () where `axis` is None."""

    dtype: str
    shape: tuple[int, ...]
    stages: tuple[int, ...]
    axis: int | None = None
    pieces: tuple[Pieces, ...] = ()
    values: tuple[int, ...] | None = None
    local_values: tuple[tuple[int, ...], ...] = ()
    base: tuple[int, ...] = ()

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """The shape of this rank's tensor."""
        if self.axis is None:
            return self.shape
        size = sum(stop - start + pad for start, stop, pad in self.pieces[rank])
        return (*self.shape[: self.axis], size, *self.shape[self.axis + 1 :])

    def padding(self) -> int:
        """Positions of padding in all ranks together."""
        return sum(pad for pieces in self.pieces for _, _, pad in pieces)


@dataclass(frozen=True)
class OpCut:
    """How one layer is split. shape: [out, in] of the whole; rows, columns: each rank's pieces, () where not cut."""

    parallel: str
    shape: tuple[int, int]
    rows: tuple[Pieces, ...] = ()
    columns: tuple[Pieces, ...] = ()


@dataclass(frozen=True)
class ShardSet:
    """The whole description. stages: the blocks of each pipeline stage; files: {name: (size, sha256)} of the model;
    logical: the shapes of the weights that quantized tensors stand for."""

    tp: int
    stages: tuple[tuple[int, ...], ...]
    ops: Mapping[str, OpCut]
    tensors: Mapping[str, TensorCut]
    files: Mapping[str, tuple[int, str]]
    weights: tuple[str, ...]
    logical: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...] = ()

    @property
    def pp(self) -> int:
        return len(self.stages)

    def rank_names(self) -> list[tuple[int, int, str]]:
        """(stage, rank, folder name) of every rank."""
        return [(stage, rank, rank_folder(stage, rank)) for stage in range(self.pp) for rank in range(self.tp)]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `read_shards` is the inverse."""
        return {
            "format": FORMAT,
            "tp": self.tp,
            "pp": self.pp,
            "stages": [{"blocks": list(blocks)} for blocks in self.stages],
            "notes": list(self.notes),
            "ops": {name: _op_json(op) for name, op in self.ops.items()},
            "tensors": {name: _tensor_json(cut) for name, cut in self.tensors.items()},
            "logical": {name: list(shape) for name, shape in self.logical.items()},
            "source": {
                "weights": list(self.weights),
                "files": {name: {"size": size, "sha256": digest} for name, (size, digest) in self.files.items()},
            },
        }


def rank_folder(stage: int, rank: int) -> str:
    return f"pp{stage}-tp{rank}"


def read_shards(folder: Path) -> ShardSet:
    """The description in a folder of shards; BadInput, naming the entry, for anything that is not as it must be."""
    path = contained(folder, SHARDS)
    data = read_json(path)
    try:
        return _shard_set(data)
    except _Wrong as wrong:
        raise BadInput(f"{path} is not a description of shards", f"{wrong}.", look(folder)) from wrong


class _Wrong(Exception):
    """What is wrong with shards.json; never leaves this module."""


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise _Wrong(what)


def _op_json(op: OpCut) -> dict[str, Any]:
    said: dict[str, Any] = {"parallel": op.parallel, "shape": list(op.shape)}
    said |= {"rows": op.rows} if op.rows else {}
    return said | ({"columns": op.columns} if op.columns else {})


def _tensor_json(cut: TensorCut) -> dict[str, Any]:
    said: dict[str, Any] = {"dtype": cut.dtype, "shape": list(cut.shape), "stages": list(cut.stages), "axis": cut.axis}
    if cut.axis is None:
        said["replicated"] = True
    else:
        said |= {"pieces": cut.pieces, "padding": cut.padding()}
    if cut.values is not None:
        said |= {"values": list(cut.values), "local_values": cut.local_values}
    return said | ({"base": list(cut.base)} if cut.base else {})


def _shard_set(data: Any) -> ShardSet:
    _need(isinstance(data, dict) and data.get("format") == FORMAT, f"its format is not {FORMAT}")
    tp, pp = data.get("tp"), data.get("pp")
    _need(
        _natural(tp) and _natural(pp) and 1 <= tp * pp <= MAX_RANKS, f"tp {show(tp)} and pp {show(pp)} are no degrees"
    )
    stages = data.get("stages")
    _need(isinstance(stages, list) and len(stages) == pp, f"`stages` must list {pp} stages")
    blocks = tuple(_naturals(stage.get("blocks") if isinstance(stage, dict) else None, "stages") for stage in stages)
    source = data.get("source")
    _need(isinstance(source, dict), "`source` is missing")
    files = _files(source.get("files"))
    weights = source.get("weights")
    _need(isinstance(weights, list) and all(isinstance(w, str) and w in files for w in weights), "`source.weights`")
    _need(len(set(weights)) == len(weights) > 0, "`source.weights` must name each file once")
    logical = data.get("logical")
    _need(isinstance(logical, dict), "`logical` is no table")
    notes = data.get("notes", [])
    _need(isinstance(notes, list) and all(isinstance(note, str) for note in notes), "`notes` must be texts")
    return ShardSet(
        tp=tp,
        stages=blocks,
        ops={name: _op(name, op, tp) for name, op in _table(data.get("ops"), "ops").items()},
        tensors={name: _tensor(name, cut, tp, pp) for name, cut in _table(data.get("tensors"), "tensors").items()},
        files=files,
        weights=tuple(weights),
        logical={name: _naturals(shape, f"logical: {show(name)}") for name, shape in logical.items()},
        notes=tuple(notes),
    )


def _files(data: Any) -> dict[str, tuple[int, str]]:
    found: dict[str, tuple[int, str]] = {}
    for name, entry in _table(data, "source.files").items():
        parts = PurePosixPath(name).parts
        plain = parts and not set("\0\\") & set(name) and not any(part.startswith((".", "/")) for part in parts)
        _need(bool(plain) and str(PurePosixPath(name)) == name, f"{show(name)} is no plain name of a file")
        size, digest = entry.get("size", -1), str(entry.get("sha256"))
        _need(_natural(size) and len(digest) == 64, f"source.files: {show(name)}")
        found[name] = (size, digest)
    for name in found:
        above = {str(parent) for parent in PurePosixPath(name).parents}
        _need(not above & {*found, "manifest.json"}, f"{show(name)} lies in what is a file")
    return found


def _op(name: str, data: dict[str, Any], tp: int) -> OpCut:
    where = f"ops: {show(name)}"
    shape = _naturals(data.get("shape"), where)
    _need(data.get("parallel") in ("column", "row", "replicated") and len(shape) == 2, where)
    rows = _all_pieces(data["rows"], shape[0], tp, where) if "rows" in data else ()
    columns = _all_pieces(data["columns"], shape[1], tp, where) if "columns" in data else ()
    _need((data["parallel"] == "column") == bool(rows) and (data["parallel"] == "row") == bool(columns), where)
    return OpCut(data["parallel"], (shape[0], shape[1]), rows, columns)


def _tensor(name: str, data: dict[str, Any], tp: int, pp: int) -> TensorCut:
    where = f"tensors: {show(name)}"
    _need(isinstance(data.get("dtype"), str) and data["dtype"] in DTYPES, where)
    shape, stages, axis = _naturals(data.get("shape"), where), _naturals(data.get("stages"), where), data.get("axis")
    _need(len(shape) <= 64 and math.prod(max(size, 1) for size in shape) < 2**60, f"{where}: its shape")
    _need(bool(stages) and max(stages) < pp and len(set(stages)) == len(stages), f"{where}: its stages")
    pieces: tuple[Pieces, ...] = ()
    if axis is not None:
        _need(_natural(axis) and axis < len(shape), f"{where}: its axis")
        pieces = _all_pieces(data.get("pieces"), shape[axis], tp, where)
    values, local, base = data.get("values"), data.get("local_values", []), _naturals(data.get("base", []), where)
    if values is not None:
        values = _naturals(values, where)
        _need(isinstance(local, list) and len(local) == tp and len(shape) == 1 and axis is None, where)
        _need(data["dtype"] == "I64", f"{where}: values are I64")
        local = [_naturals(entry, where) for entry in local]
        _need(all(len(entry) == shape[0] for entry in [values, *local]), f"{where}: its values")
    _need(not base or (len(base) == tp and data["dtype"] == "I32" and max(base) < 2**31), f"{where}: its base")
    return TensorCut(data["dtype"], shape, stages, axis, pieces, values, tuple(local) if values else (), base)


def _all_pieces(data: Any, size: int, tp: int, where: str) -> tuple[Pieces, ...]:
    """Every rank's pieces, checked: inside the axis, ascending, together the whole axis."""
    _need(isinstance(data, list) and len(data) == tp and all(isinstance(one, list) for one in data), f"{where}: pieces")
    ranks = tuple(tuple(_piece(piece, size, where) for piece in one) for one in data)
    for pieces in ranks:
        _need(all(a[1] <= b[0] for a, b in pairwise(pieces)), f"{where}: pieces out of order")
    covered = 0
    for start, stop, _ in sorted(piece for pieces in ranks for piece in pieces):
        _need(start <= covered, f"{where}: positions {covered} to {start} are in no rank")
        covered = max(covered, stop)
    _need(covered == size, f"{where}: positions {covered} to {size} are in no rank")
    return ranks


def _piece(data: Any, size: int, where: str) -> Piece:
    start, stop, pad = piece if len(piece := _naturals(data, where)) == 3 else (1, 0, 0)
    _need(start <= stop <= size and pad < 2**40, f"{where}: piece {show(data)} of {size} positions")
    return start, stop, pad


def _table(data: Any, where: str) -> dict[str, dict[str, Any]]:
    _need(isinstance(data, dict) and all(isinstance(entry, dict) for entry in data.values()), f"`{where}` is no table")
    return data


def _naturals(data: Any, where: str) -> tuple[int, ...]:
    _need(isinstance(data, list) and all(map(_natural, data)), f"{where}: {show(data)} is no list of whole numbers")
    return tuple(data)


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**60
