"""What a checkpoint format is, and the one reader for folders in any of them.

A format is a value: five functions that rename, pack and unpack, and never round. `layouts` looks at headers only and
says for each quantized op what it is (grid, shape) and which tensors hold it; `decode` makes the QTensor from those.
Everything that a reader does with that is the same for every format, and stands here once.

Some folders hold what a QTensor cannot say: groups that are not runs of neighbouring columns (GPTQ's activation order), offsets
that are no multiples of scales (MLX). Such an op has a `Layout.order`, or a `Layout.dense` that says why, and is read as the
dense weight that it means: right everywhere, but its codes cannot travel.

Legend: O output channels, I input columns, G groups of columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from infopt.checkpoint import CheckpointReader
from infopt.errors import BadInput, Unsupported
from infopt.grid import Grid
from infopt.header import TensorInfo, read_tensor
from infopt.qtensor import QTensor

TRANSPOSED = "infopt_transposed"  # a key of ours in quantization_config, which engines ignore
SCALES = (torch.bfloat16, torch.float16, torch.float32)
CACHE_SUFFIXES = tuple(f"{which}_{part}" for which in "kv" for part in ("scale", "zero_point", "frame", "center"))
Shape = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """One quantized op of a folder. shape: [O, I]; parts: the last names of its tensors ("weight_packed", ...).

    order: int64 [I] where the columns must be sorted by group first: column order[i] of the weight is column i of the codes.
    dense: why no QTensor holds the op, which `Format.dense` then reads; None where one does.
    """

    grid: Grid
    shape: Shape
    parts: tuple[str, ...]
    order: torch.Tensor | None = None
    dense: str | None = None

    @property
    def as_floats(self) -> str | None:
        """Why the op can only be read as floating numbers, None where it has codes."""
        return "its groups are in activation order" if self.order is not None else self.dense


@dataclass(frozen=True, kw_only=True)
class Holder:
    """What can be asked of a format before any work. name: as `--format` spells it. scales: dtypes that a scale may have, the
    preferred one first. mixed: whether ops may have different grids. weight_only: it holds integer weights in groups or
    channels, and nothing about a layer's inputs. objection: what else keeps an op of this grid and shape from being
    held; `refuses` asks for both. `exact`: the same of a weight's own numbers, for a format that cannot hold them all,
    and `scale_bits`: significant bits of scales of the preferred dtype that it can always hold beside zero points."""

    name: str
    scales: tuple[torch.dtype, ...]
    mixed: bool
    weight_only: bool = True
    objection: Callable[[Grid, Shape], str | None]
    exact: Callable[[QTensor], str | None] | None = None
    scale_bits: int | None = None

    def refuses(self, grid: Grid, shape: Shape) -> str | None:
        """Why an op of this grid and shape cannot be held, None if it can."""
        if self.weight_only:
            if grid.kind == "float":
                return "its weights are floating numbers of 8 bits"
            if grid.inputs:
                return "its inputs are rounded"
            if grid.rows != 1:
                return f"its scales are per {grid.strategy}"
        return self.objection(grid, shape)

    def settled(self, grid: Grid) -> Grid:
        """The grid with scales that this format stores."""
        narrowed = self.scale_bits is not None and not grid.symmetric
        dtype = self.scales[0] if narrowed or grid.scale_dtype not in self.scales else grid.scale_dtype
        return replace(grid, scale_dtype=dtype, scale_bits=self.scale_bits if narrowed else None)


@dataclass(frozen=True, kw_only=True)
class Format(Holder):
    """A format of tensors in a Hugging Face folder; see the module. dense: W of an op whose layout says `dense`."""

    encode: Callable[[str, QTensor], dict[str, torch.Tensor]]
    decode: Callable[[Mapping[str, torch.Tensor], Grid], QTensor]
    config: Callable[[Mapping[str, Grid], Iterable[str], Iterable[str]], dict[str, Any]]
    layouts: Callable[[dict[str, Any], Mapping[str, TensorInfo]], dict[str, Layout]]
    dense: Callable[[Mapping[str, torch.Tensor], Grid], torch.Tensor] | None = None


class QuantizedReader(CheckpointReader):
    """A quantized folder seen as the dense checkpoint that it stands for.

    `tensors` lists the logical tensors ("X.weight", in the scales' dtype); `get` dequantizes; `qtensor` gives the codes.
    `quantized` maps each quantized op's path to its grid; `ordered` does so for ops that can only be read dense (most often
    because they are in activation order), for a reason that `why_dense` tells. `stored` are the file's own tensors. Raises
    BadInput for tensors that are missing or of a wrong shape, Unsupported for schemes that infopt does not read.
    settings: the folder's quantization_config.
    """

    def __init__(self, folder: Path, form: Format, settings: dict[str, Any]) -> None:
        super().__init__(folder)
        self.form = form
        self.stored = self.tensors
        self._layouts = form.layouts(settings, self.stored)
        self.quantized = {name: lay.grid for name, lay in self._layouts.items() if not lay.as_floats}
        self.ordered = {name: lay.grid for name, lay in self._layouts.items() if lay.as_floats}
        listed = settings.get(TRANSPOSED)
        self.transposed = {name for name in self._layouts if isinstance(listed, list) and name in listed}
        hidden = {f"{name}.{part}" for name, lay in self._layouts.items() for part in (*lay.parts, "weight")}
        logical = {key: info for key, info in self.stored.items() if key not in hidden and not is_cache_tensor(key)}
        logical |= {f"{name}.weight": self._logical(name, lay) for name, lay in self._layouts.items()}
        self.tensors = dict(sorted(logical.items()))

    def qtensor(self, name: str) -> QTensor:
        """The op's codes as they are in the file; only for names in `quantized`."""
        if name not in self.quantized:
            raise ValueError(f"{name} has no codes that a QTensor can hold")
        return self._decoded(name)

    def shape(self, name: str) -> Shape:
        """[O, I] of a quantized op, whichever way its module keeps the weight."""
        return self._layouts[name].shape

    def why_dense(self, name: str) -> str:
        """Why an op of `ordered` has no codes that a QTensor can hold."""
        return self._layouts[name].as_floats or ""

    def get(self, name: str) -> torch.Tensor:
        op = name.removesuffix(".weight")
        if op == name or op not in self._layouts:
            return super().get(name)
        layout = self._layouts[op]
        if layout.dense and self.form.dense:
            w_OI = self.form.dense(self._parts(op), layout.grid)
        else:
            w_OI = self._decoded(op).dequantize()
        order = layout.order
        if order is not None:
            w_OI = torch.empty_like(w_OI).index_copy_(1, order, w_OI)
        return w_OI.T.contiguous() if op in self.transposed else w_OI

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name.removesuffix(".weight") in self._layouts and name.endswith(".weight"):
            return self.get(name)[start:stop]
        return super().rows(name, start, stop)

    def _decoded(self, name: str) -> QTensor:
        layout = self._layouts[name]
        q = self.form.decode(self._parts(name), layout.grid)
        if layout.grid.symmetric and not bool((q.zero == layout.grid.middle).all()):
            raise damaged(
                f"{self.folder.name}: {name} has zero points other than {layout.grid.middle}",
                "config.json calls the quantization symmetric",
            )
        return q

    def _parts(self, name: str) -> dict[str, torch.Tensor]:
        return {part: read_tensor(self.stored[f"{name}.{part}"]) for part in self._layouts[name].parts}

    def _logical(self, name: str, layout: Layout) -> TensorInfo:
        first = self.stored[f"{name}.{layout.parts[0]}"]
        shape = layout.shape[::-1] if name in self.transposed else layout.shape
        return replace(first, name=f"{name}.weight", shape=shape, dtype=layout.grid.scale_dtype)


def is_cache_tensor(name: str) -> bool:
    """Whether a tensor belongs to a key-value cache, and so is no part of the dense model."""
    return name.rpartition(".")[2] in CACHE_SUFFIXES


def damaged(what: str, why: str) -> BadInput:
    """The error for tensors or a config that cannot be what they claim."""
    return BadInput(what, why, "download or quantize the model again")


def require(
    name: str, stored: Mapping[str, TensorInfo], want: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> None:
    """BadInput unless the op `name` has each part with exactly the wanted dtype and shape."""
    for part, expected in want.items():
        info = stored.get(f"{name}.{part}")
        if info is None:
            raise damaged(f"{name}.{part} is missing", "the scheme in config.json needs it")
        if (info.dtype, info.shape) != expected:
            raise damaged(
                f"{info.file.name}: {name}.{part} is {(info.dtype, info.shape)}", f"config.json makes it {expected}"
            )


def check_scale(info: TensorInfo) -> None:
    """BadInput unless scales have a floating dtype that infopt computes with, and two dimensions."""
    if info.dtype not in SCALES or len(info.shape) != 2:
        raise damaged(f"{info.file.name}: {info.name} is {(info.dtype, info.shape)}", "scales are a floating matrix")


def unreadable(what: str, why: str) -> Unsupported:
    """The error for a valid scheme that infopt does not read."""
    return Unsupported(what, why, "give the original model, or a folder that `infopt quantize` wrote")
