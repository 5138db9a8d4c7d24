"""What one decoder block is made of, as plain data: ops (weights), spaces (activation tensors), and folds between them.

A *space* is an activation tensor that one or more linear ops read. A *fold* says that some op writes that space in
such a way that a per-channel scale may travel: multiplying the writer's channel r by s and dividing the readers' columns that
r feeds by s leaves the block's function as it was. Folds are never assumed from a layer's name or a family's layout;
`infopt.calibration.discover` finds and proves each one numerically. This module only stores and answers questions,
so a topology can be printed, written to a report and read again without a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from infopt.errors import BadInput

OpKind = Literal["linear", "conv1d", "norm"]
Law = Literal["linear", "mul", "one_plus"]
Parallel = Literal["column", "row", "replicated"]


@dataclass(frozen=True)
class Op:
    """A leaf module with weights. `name` is its path inside the block; a norm has `in_features == out_features`.

    kind "linear" stores its weight [O, I]; "conv1d" is the same map stored [I, O]; "norm" is a 1-D weight (and bias).
    """

    name: str
    kind: OpKind
    out_features: int
    in_features: int


@dataclass(frozen=True)
class Fold:
    """A proven way to move a per-channel scale from a space's readers into `writer`.

    law "linear": the writer's rows (weight and bias) are multiplied by s; "mul": a norm's weight and bias are;
    "one_plus": the norm multiplies by 1 + w, so w becomes (1 + w) * s - 1 (and the bias, if any, is multiplied by s).
    rows: for every column c of the space, the writer's output channel that feeds it; None is the identity. Several
    columns may name one channel (grouped heads are repeated): they must share one scale. Channels that feed no column
    keep theirs.
    """

    writer: str
    law: Law
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Space:
    """An activation tensor [..., width] and the linear ops that read it, in execution order.

    fold is None when no writer was proven, and `reason` then says why. `fed_by` names the linear ops whose channels
    reach single columns of this space, linearly or not (GELU between two linears): the space is an inner one, and
    splitting it by columns splits those ops by rows.
    """

    name: str
    width: int
    readers: tuple[str, ...]
    fold: Fold | None
    reason: str = ""
    fed_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Topology:
    """The ops and spaces of one block structure. `unhandled` lists parameters that belong to no op (stacked experts)."""

    ops: tuple[Op, ...]
    spaces: tuple[Space, ...]
    unhandled: tuple[str, ...] = ()

    def op(self, name: str) -> Op:
        """The op of that name; KeyError if there is none."""
        for op in self.ops:
            if op.name == name:
                return op
        raise KeyError(name)

    def space_of(self, op_name: str) -> Space:
        """The space that this linear op reads; KeyError for a norm or an unknown name."""
        for space in self.spaces:
            if op_name in space.readers:
                return space
        raise KeyError(op_name)

    def readers(self, space: Space) -> tuple[Op, ...]:
        """The ops that read the space, in execution order."""
        return tuple(self.op(name) for name in space.readers)

    def linears(self) -> tuple[Op, ...]:
        """The ops whose weight is a matrix, in execution order."""
        return tuple(op for op in self.ops if op.kind != "norm")

    def parallel(self, op_name: str) -> Parallel:
        """How tensor parallelism splits the op: readers of an inner space by their columns ("row"-parallel), other
        linears by their output channels ("column"-parallel), norms not at all."""
        op = self.op(op_name)
        if op.kind == "norm":
            return "replicated"
        return "row" if self.space_of(op_name).fed_by else "column"

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values; `from_json` is its inverse."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Topology:
        """Read what `to_json` wrote (after a trip through a JSON file); BadInput if it is something else."""
        try:
            return Topology(
                ops=tuple(Op(**op) for op in data["ops"]),
                spaces=tuple(_space(space) for space in data["spaces"]),
                unhandled=tuple(data.get("unhandled", ())),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise BadInput(
                "This is not a block topology.", f"{type(error).__name__}: {error}", "Run `infopt inspect MODEL` again."
            ) from error


def _space(data: Mapping[str, Any]) -> Space:
    fold = data["fold"]
    if fold is not None:
        rows = fold["rows"]
        fold = Fold(fold["writer"], fold["law"], None if rows is None else tuple(rows))
    return Space(
        name=data["name"],
        width=data["width"],
        readers=tuple(data["readers"]),
        fold=fold,
        reason=data["reason"],
        fed_by=tuple(data["fed_by"]),
    )
