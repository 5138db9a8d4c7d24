"""Where every tensor is cut for tensor parallelism, decided and checked before anything is read or written.

The input is what was proven about the model: how each op of a block is parallel (`Topology`), which output channels each
column of an inner space needs (`Cells`), and what lies outside the blocks. The laws:

* A rank owns whole cells of every inner space: heads, and columns of an MLP. Their number must divide.
* Channels that several heads share (grouped keys and values) are split where there are enough of them, and replicated
  where there are fewer than ranks; either number must divide the other.
* Stored tensors are only cut between what belongs together: between groups of columns that share a scale, and between
  32-bit words of packed codes. Position p of L logical ones is position p * n / L of n stored ones, and must be whole.

Each refusal names the layer, shows the arithmetic and lists the degrees that would do. With `pad`, an MLP gets as many more
columns of zeros as the laws ask for, and the vocabulary as many rows; both are recorded and never come back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import torch

from infopt.cells import Cells, as_ranges
from infopt.errors import Unsupported, UsageError
from infopt.grid import Grid
from infopt.header import TensorInfo, read_tensor
from infopt.shards import OpCut, Pieces, TensorCut
from infopt.writer import DTYPE_NAMES

MAX_SHOWN = 1024  # degrees above this are not listed
#: last part of a stored name -> which logical side each stored axis is
SIDES: dict[str, tuple[str, ...]] = {
    "weight": ("rows", "columns"),
    "bias": ("rows",),
    "weight_packed": ("rows", "columns"),
    "weight_scale": ("rows", "columns"),
    "weight_scale_inv": ("rows", "columns"),
    "weight_zero_point": ("rows", "columns"),
    "qweight": ("columns", "rows"),
    "qzeros": ("columns", "rows"),
    "scales": ("columns", "rows"),
    "g_idx": ("columns",),
}
#: One entry for each group of rows and columns, as the grid says; zero points may be packed along the rows.
PER_GROUP = {"weight_scale", "weight_scale_inv", "weight_zero_point", "scales", "qzeros"}
ZEROS = {"weight_zero_point", "qzeros"}
WHOLE = {"input_scale", "input_zero_point", "input_global_scale", "weight_global_scale", "weight_scale_2"}
PADDABLE = {"weight", "bias", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"}


@dataclass(frozen=True)
class Layer:
    """One linear layer as it is stored. stored: by last part of the name; shape: logical [out, in]."""

    name: str
    shape: tuple[int, int]
    stored: Mapping[str, TensorInfo]
    transposed: bool = False
    grid: Grid | None = None

    def unit(self, suffix: str, side: str) -> tuple[int, Fraction] | None:
        """(stored axis, stored positions per logical one) of a tensor on a side; None where it is not spread over it.

        Raises Unsupported for a tensor that cannot be understood.
        """
        info = self.stored[suffix]
        sides = SIDES[suffix][::-1] if self.transposed and suffix == "weight" else SIDES[suffix]
        if side not in sides[: len(info.shape)]:
            return None
        axis = sides.index(side)
        stored, logical = info.shape[axis], self.shape[0 if side == "rows" else 1]
        bits = self.grid.bits if self.grid else 0
        if self.grid is not None and suffix in PER_GROUP and not (suffix in ZEROS and side == "rows"):
            size = self.grid.rows if side == "rows" else self.grid.group
            return None if size is None else (axis, Fraction(1, size))
        if stored == logical:
            return axis, Fraction(1)
        if bits and info.dtype in (torch.int32, torch.uint32) and stored == -(-logical * bits // 32):
            return axis, Fraction(bits, 32)
        if stored == 1:
            return None
        if logical % stored:
            why = f"{suffix} has {stored} entries for {logical} {side}"
            raise Unsupported(f"{self.name} cannot be cut", why, "shard by layers alone: --tp 1 --pp N")
        return axis, Fraction(stored, logical)

    def units(self, side: str) -> dict[str, tuple[int, Fraction]]:
        return {suffix: found for suffix in self.stored if suffix in SIDES and (found := self.unit(suffix, side))}


@dataclass(frozen=True)
class Split:
    """One inner space over `tp` ranks: its cells, the layers that write and read it, and the cells with padding."""

    cells: Cells
    writers: Mapping[str, Layer]
    readers: Mapping[str, Layer]
    tp: int
    pad: bool

    @property
    def padded(self) -> int:
        """The number of cells with padding."""
        if not self.pad or self.cells.mixes:
            return self.cells.count
        whole = [unit.denominator for layer in self.readers.values() for _, unit in layer.units("columns").values()]
        whole += [unit.denominator for layer in self.writers.values() for _, unit in layer.units("rows").values()]
        step = self.tp * math.lcm(*whole)
        return self.cells.count if self._divides(self.tp) else -(-self.cells.count // step) * step

    def check(self, block: str) -> None:
        """Raise Unsupported where a law forbids this degree."""
        if self.padded != self.cells.count:
            for layer in [*self.readers.values(), *self.writers.values()]:
                if unknown := set(layer.stored) - PADDABLE:
                    why = f"what stands for zero in {min(unknown)} depends on the format"
                    raise Unsupported(f"{layer.name} cannot be padded", why, "leave --pad out")
            for layer, side in self._sides():
                total = layer.shape[0 if side == "rows" else 1]
                if any((total * unit).denominator != 1 for _, unit in layer.units(side).values()):
                    why = f"its {total} {side} end inside a word of packed codes, where no padding can follow"
                    raise Unsupported(f"{layer.name} cannot be padded", why, "leave --pad out")
            return
        reader = next(iter(self.readers.values()))
        if self.cells.count % self.tp:
            kind = "heads" if self.cells.mixes else "columns"
            raise self._refused(reader.name, f"{self.cells.count} {kind} / {self.tp} is not whole")
        self._check_shared()
        for layer, side in self._sides():
            for suffix, (_, unit) in layer.units(side).items():
                self._check_whole(layer, side, suffix, unit)

    def _sides(self) -> Iterator[tuple[Layer, str]]:
        yield from ((layer, "columns") for layer in self.readers.values())
        yield from ((layer, "rows") for layer in self.writers.values())

    def _check_shared(self) -> None:
        for op, layer in self.writers.items():
            for groups in _shared(self.cells, op):
                if groups % self.tp and self.tp % groups:
                    why = f"{groups} key-value heads over {self.tp} ranks: neither divides the other"
                    raise self._refused(layer.name, why)

    def _check_whole(self, layer: Layer, side: str, suffix: str, unit: Fraction) -> None:
        for start, stop, _ in (piece for pieces in self.pieces(layer, side) for piece in pieces):
            if not _whole(layer, side, unit, start, stop):
                raise self._refused(layer.name, self._arithmetic(layer, side, suffix, unit, stop - start))

    def _arithmetic(self, layer: Layer, side: str, suffix: str, unit: Fraction, mine: int) -> str:
        total = layer.shape[0 if side == "rows" else 1]
        by_group = side == "columns" and suffix in ZEROS
        if layer.stored[suffix].dtype in (torch.int32, torch.uint32) and suffix != "g_idx" and not by_group:
            bits = layer.grid.bits if layer.grid else 0
            return f"{mine} {side} x {bits} bits = {mine * bits} bits ({suffix}) are not whole words of 32 bits"
        groups = total * unit
        return f"{total} {side} / {1 / unit} = {groups} groups ({suffix}), and {groups} / {self.tp} is not whole"

    def _refused(self, name: str, why: str) -> Unsupported:
        degrees = [tp for tp in range(1, min(self.cells.count, MAX_SHOWN) + 1) if self._divides(tp)]
        listed = ", ".join(map(str, degrees[:8])) + (", ..." if len(degrees) > 8 else "")
        near = max((tp for tp in degrees if tp <= self.tp), default=1)
        fix = f"--tp {near}" + ("" if self.cells.mixes else ", or --pad to add columns of zeros")
        return Unsupported(f"{name} cannot be cut for --tp {self.tp}", f"{why}: TP {listed} only", fix)

    def _divides(self, tp: int) -> bool:
        """Whether all laws allow this degree without padding."""
        if self.cells.count % tp:
            return False
        if any(groups % tp and tp % groups for op in self.writers for groups in _shared(self.cells, op)):
            return False
        plain = replace(self, tp=tp, pad=False)
        return all(
            _whole(layer, side, unit, start, stop)
            for layer, side in self._sides()
            for _, unit in layer.units(side).values()
            for pieces in plain.pieces(layer, side)
            for start, stop, _ in pieces
        )

    def pieces(self, layer: Layer, side: str) -> tuple[Pieces, ...]:
        """Each rank's logical pieces of a layer's rows or columns."""
        each = (self.padded if self.pad else self.cells.count) // self.tp
        found: list[Pieces] = []
        for rank in range(self.tp):
            start, stop = (min(edge, self.cells.count) for edge in (rank * each, (rank + 1) * each))
            pad = each - (stop - start)
            if side == "columns":
                width = self.cells.width
                found.append(((start * width, stop * width, pad * width),))
            else:
                op = next(op for op, other in self.writers.items() if other is layer)
                found.append(_rows(self.cells, op, start, stop, pad))
        return tuple(found)


def _whole(layer: Layer, side: str, unit: Fraction, *edges: int) -> bool:
    """Whether these logical positions lie between stored ones; the end of the layer does, also where a word is filled up."""
    total = layer.shape[0 if side == "rows" else 1]
    return all(edge == total or (edge * unit).denominator == 1 for edge in edges)


def _shared(cells: Cells, op: str) -> set[int]:
    """How many sets of channels there are of each kind that heads share: a fused projection has heads and shared keys."""
    if not cells.mixes:
        return set()
    _, times = np.unique(cells.channels[op], return_counts=True)
    return {cells.count // int(count) for count in np.unique(times)}


def _rows(cells: Cells, op: str, start: int, stop: int, pad: int) -> Pieces:
    if not pad:
        return tuple((a, b, 0) for a, b in cells.needed(op, start, stop))
    table = cells.channels[op]  # single columns as cells: one run of rows per part, each with its own padding
    parts = [table] if table.shape[1] > 1 and table[0, 1] == table[0, 0] + 1 else np.split(table, table.shape[1], 1)
    pieces = []
    for part in parts:
        ranges = as_ranges(part[start:stop].ravel()) or ((end := int(part.max()) + 1, end),)
        pieces.append((*ranges[0], pad * part.shape[1]))
    return tuple(pieces)


def cut_layer(layer: Layer, op: OpCut, stages: tuple[int, ...], tp: int) -> dict[str, TensorCut]:
    """The cuts of a layer's stored tensors, by their full names."""
    cuts = {}
    side, pieces = ("rows", op.rows) if op.rows else ("columns", op.columns)
    for suffix, info in layer.stored.items():
        whole = TensorCut(DTYPE_NAMES[info.dtype], info.shape, stages)
        if op.parallel == "replicated":
            cuts[info.name] = whole
        elif suffix == "weight_shape":
            cuts[info.name] = _shape_cut(whole, op, tp)
        elif suffix in WHOLE or (suffix in SIDES and layer.unit(suffix, side) is None):
            cuts[info.name] = whole
        elif suffix in SIDES:
            axis, unit = layer.unit(suffix, side) or (0, Fraction(1))
            scaled = tuple(tuple(_scaled(piece, unit) for piece in one) for one in pieces)
            cuts[info.name] = replace(whole, axis=axis, pieces=scaled)
            if suffix == "g_idx":
                cuts[info.name] = replace(cuts[info.name], base=_bases(layer, info, scaled))
        else:
            raise Unsupported(
                f"{info.name} cannot be cut", f"infopt does not know {suffix}", "shard by layers: --tp 1 --pp N"
            )
    return cuts


def _scaled(piece: tuple[int, int, int], unit: Fraction) -> tuple[int, int, int]:
    start, stop, pad = (math.ceil(position * unit) for position in piece)
    return start, stop, pad


def _shape_cut(whole: TensorCut, op: OpCut, tp: int) -> TensorCut:
    def local(rank: int) -> tuple[int, int]:
        sizes = [sum(b - a + pad for a, b, pad in side[rank]) if side else 0 for side in (op.rows, op.columns)]
        return sizes[0] or op.shape[0], sizes[1] or op.shape[1]

    return replace(whole, values=op.shape, local_values=tuple(local(rank) for rank in range(tp)))


def _bases(layer: Layer, info: TensorInfo, pieces: tuple[Pieces, ...]) -> tuple[int, ...]:
    """What to subtract from each rank's group numbers; Unsupported where groups are spread over ranks (act-order)."""
    groups = read_tensor(info)
    if bool((groups[1:] < groups[:-1]).any()):
        why = "its columns are in activation order (g_idx), so every rank would need the groups of all others"
        raise Unsupported(f"{layer.name} cannot be cut by its columns", why, "quantize with static groups, or --tp 1")
    return tuple(int(groups[one[0][0]]) if one[0][0] < len(groups) else 0 for one in pieces)


def even_rows(count: int, tp: int, pad: bool) -> tuple[Pieces, ...] | None:
    """The vocabulary over the ranks; None where it does not divide and no padding was asked for."""
    if count % tp and not pad:
        return None
    each = -(-count // tp)
    edges = [(min(rank * each, count), min((rank + 1) * each, count)) for rank in range(tp)]
    return tuple(((start, stop, each - (stop - start)),) for start, stop in edges)


def split_blocks(count: int, pp: int) -> tuple[tuple[int, ...], ...]:
    """Consecutive blocks for each pipeline stage, the first stages one longer where it does not divide."""
    if not 1 <= pp <= count:
        raise UsageError(f"--pp {pp}", f"the model has {count} blocks", f"--pp {min(max(pp, 1), count)}")
    short, longer = divmod(count, pp)
    sizes: Iterable[int] = [short + (stage < longer) for stage in range(pp)]
    edges = np.cumsum([0, *sizes]).tolist()
    return tuple(tuple(range(a, b)) for a, b in pairwise(edges))
