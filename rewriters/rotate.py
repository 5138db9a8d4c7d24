"""A checkpoint seen through a rotation of its residual stream and of its values: the same function, other weights.

Ashkboos et al. 2024 (QuaRot, arXiv:2404.00456). With hidden states as rows, x becomes x Q, and

    embedding       E Q                      reader     W diag(g) Q     (g: the weight of the norm before it)
    writer          Q^T W, and bias b Q      norm       its neutral weight: x / rms(x) commutes with Q
    head            as a reader, with the final norm's g; a head that was tied to the embedding becomes a tensor of its own

    values (R2)     each head's rows of the value projection R^T V, the columns of the output projection that read it O R:
                    attention mixes tokens and never a head's channels, and grouped heads share one R

so nothing is left to do when the model runs. An outlier channel of the residual stream becomes a part of every channel, and
groups of weights that shared a scale with it no longer do.

What is lost: where a norm's small weights hold massive channels down, plain rounding left small errors in just those columns.
After the rotation the error is even over all channels and meets the massive ones at full size, so the output error of layers
behind such a norm can grow while the error of their weights falls.

Left out: QuaRot's rotations at run time (of what the last projection of an MLP reads, of queries and keys), since no server
would compute them.

`Rotated` is a reader, so whatever reads a checkpoint (a rewrite, every method of quantization) reads a rotated one without
knowing. Products are made in float64, in pieces, and rounded once to the stored type.

Legend: O output channels, I input channels, C hidden width, D channels of a head, V vocabulary, R rows of a piece.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infopt.checkpoint import CheckpointReader
from infopt.errors import BadInput
from infopt.hadamard import Rotation
from infopt.residual import NEUTRAL
from infopt.rewriters.target import changed_config
from infopt.topology import Law

_PIECE = 1 << 22  # numbers that are float64 at one time
TIED = "tie_word_embeddings"


@dataclass(frozen=True)
class Change:
    """What becomes of one tensor, in this order. neutral: a norm whose weight goes elsewhere, by its law. norm: the tensor
    of the norm (and its law) that goes into the columns. reads, writes: columns, rows (or a bias) are turned with the residual
    stream. values: rows [heads, D] of each head's values. heads: the columns are so many heads' values.
    source: another tensor that this one is made of."""

    neutral: Law | None = None
    norm: tuple[str, Law] | None = None
    reads: bool = False
    writes: bool = False
    values: np.ndarray | None = None
    heads: int = 0
    source: str | None = None

    @property
    def by_rows(self) -> bool:
        """Whether a row of the result depends on that row alone."""
        return not self.writes and self.values is None


class Rotated(CheckpointReader):
    """The checkpoint of `folder` with the changes made to its tensors, by their names; the others come as they are.

    stream, head: the rotations of the residual stream and of each head's values. exact: tensors come in float32, not
    rounded to the stored type; for proofs. report: what goes into infopt.json. `get` raises BadInput for values that are not
    finite: they would spread over the whole tensor.
    """

    def __init__(
        self,
        folder: Path,
        changes: Mapping[str, Change],
        stream: Rotation,
        head: Rotation | None,
        exact: bool = False,
        report: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(folder)
        self.changes, self.stream, self.head, self.exact = dict(changes), stream, head, exact
        self.report = report or {}
        made = {name: change.source for name, change in self.changes.items() if change.source is not None}
        self.added = sorted(name for name in made if name not in self.tensors)
        new = {name: replace(self.tensors[source], name=name) for name, source in made.items()}
        self.tensors = dict(sorted({**self.tensors, **new}.items()))
        if made:
            untied = changed_config(self.config, {TIED: False})
            self.config = {**untied, TIED: False} if TIED in untied else untied

    def get(self, name: str) -> Tensor:
        change = self.changes.get(name)
        if change is None:
            return super().get(name)
        turned = self._turned(change, name)
        if not bool(torch.isfinite(turned).all()):
            raise BadInput(
                f"{self.folder}: {name} cannot be rotated",
                "it, or the norm before it, holds values that are NaN, infinite or near the largest of their type",
                "repair or download the model again",
            )
        return turned

    def _turned(self, change: Change, name: str) -> Tensor:
        info = self.tensors[name]
        dtype = torch.float32 if self.exact else info.dtype
        if change.neutral is not None:
            return torch.full(info.shape, NEUTRAL[change.neutral], dtype=dtype)
        if change.by_rows:
            return self._by_rows(change, name, 0, info.shape[0], dtype)
        w = super().get(name)
        if change.norm or change.reads or change.heads:
            w = self._by_rows(change, name, 0, info.shape[0], torch.float32)
        if change.values is not None and self.head is not None:
            w = _turn_heads(w.double(), change.values, self.head)
        if change.writes:
            w = self._by_columns(w)
        return w.to(dtype)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        change = self.changes.get(name)
        if change is None:
            return super().rows(name, start, stop)
        if change.neutral is None and change.by_rows:
            return self._by_rows(change, name, start, stop, torch.float32 if self.exact else self.tensors[name].dtype)
        return self.get(name)[start:stop]

    def fingerprint(self) -> str:
        digest = hashlib.sha256(super().fingerprint().encode())
        for rotation in (self.stream, self.head):
            if rotation is not None:
                digest.update(rotation.construction.encode() + rotation.signs_N.numpy().tobytes())
        digest.update(repr(sorted(self.changes)).encode())
        return digest.hexdigest()

    def _by_rows(self, change: Change, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """What is done to each row of a matrix: the norm, the stream's channels, the columns of heads."""
        columns = self.tensors[name].shape[1]
        g_I = self._norm(change.norm) if change.norm else None
        out = torch.empty(stop - start, columns, dtype=dtype)
        step = max(1, _PIECE // columns)
        for at in range(start, stop, step):
            w_RI = super().rows(change.source or name, at, min(at + step, stop)).double()
            if g_I is not None:
                w_RI = w_RI * g_I
            if change.reads:
                w_RI = self.stream(w_RI)
            if change.heads and self.head is not None:
                w_RI = self.head(w_RI.reshape(len(w_RI), change.heads, -1)).reshape(w_RI.shape)
            out[at - start : at - start + len(w_RI)] = w_RI.to(dtype)
        return out

    def _by_columns(self, w: Tensor) -> Tensor:
        """Q^T W for a matrix [C, I], b Q for a bias [C]."""
        if w.dim() == 1:
            return self.stream(w)
        out = torch.empty(w.shape, dtype=torch.float32)
        step = max(1, _PIECE // len(w))
        for at in range(0, w.shape[1], step):
            out[:, at : at + step] = self.stream(w[:, at : at + step].T.double()).T.float()
        return out

    def _norm(self, norm: tuple[str, Law]) -> Tensor:
        key, law = norm
        return super().get(key).double() + (1.0 if law == "one_plus" else 0.0)


def _turn_heads(w: Tensor, rows_GD: np.ndarray, head: Rotation) -> Tensor:
    """R^T V for each head's rows of a matrix, v R for its part of a bias."""
    rows = torch.from_numpy(rows_GD)
    turned = w.clone()
    if w.dim() == 1:
        turned[rows] = head(w[rows])
    else:
        turned[rows] = head(w[rows].transpose(1, 2)).transpose(1, 2)
    return turned
