"""The cells of an inner space: the smallest parts into which tensor parallelism may split it, as plain data.

A rank that owns some columns of an inner space needs every output channel, of every op that writes the space, on which
those columns depend. A *cell* is a run of neighbouring columns that depend on the same channels as a whole: one attention
head, or one single column of an MLP. Which channels a cell needs is measured on the running block
(`infopt.calibration.cells`), never read off a name or a layout: separate and fused projections, interleaved heads and
grouped or shared keys and values all end up as rows of one table.

Legend: N cells of a space, K channels of one op that a cell needs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from infopt.topology import Topology

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Cells:
    """One inner space: `count` cells of `width` columns each.

    readers: the ops that read it (row-parallel). channels: for every op that writes it, an int64 array [N, K] with the
    output channels that each cell needs, ascending; cells that need the same channels (heads that share a key) have
    equal rows. mixes: whether columns depend on other tokens (attention), so that padding it needs a mask.
    """

    count: int
    width: int
    readers: tuple[str, ...]
    channels: dict[str, np.ndarray]
    mixes: bool

    def columns(self, start: int, stop: int) -> Ranges:
        """The columns of the cells `start:stop`, as half-open ranges."""
        return ((start * self.width, stop * self.width),)

    def needed(self, op: str, start: int, stop: int) -> Ranges:
        """The op's output channels that the cells `start:stop` need, as ascending half-open ranges."""
        return as_ranges(np.unique(self.channels[op][start:stop]))

    def distinct(self, op: str) -> int:
        """How many different sets of channels the cells need of this op: heads, key-value heads, columns."""
        return len(np.unique(self.channels[op], axis=0))


@dataclass(frozen=True)
class BlockFacts:
    """What was proven about one block: its topology, and the cells of its inner spaces."""

    topology: Topology
    cells: tuple[Cells, ...]


#: A block that is not cut: nothing needs to be known of it.
WHOLE = BlockFacts(Topology((), ()), ())


@dataclass(frozen=True)
class Outer:
    """Checkpoint keys used `before` the blocks, and `after` them (tied embeddings are in both); `vocabulary`: those whose
    rows are the tokens of the vocabulary (embedding, head, the head's bias)."""

    before: frozenset[str]
    after: frozenset[str]
    vocabulary: frozenset[str]


def as_ranges(numbers: Iterable[int]) -> Ranges:
    """Ascending whole numbers as half-open ranges: 0, 1, 2, 8, 9 -> (0, 3), (8, 10)."""
    found = np.asarray(numbers, np.int64)
    if not len(found):
        return ()
    breaks = np.flatnonzero(np.diff(found) != 1) + 1
    return tuple((int(run[0]), int(run[-1]) + 1) for run in np.split(found, breaks))
