"""What a checkpoint format is, and the one reader for folders in any of them.

A format is a value: five functions that rename, pack and unpack, and never round. `layouts` looks at headers only and
says for each quantized op what it is (grid, shape) and which tensors hold it; `decode` makes the QTensor from those.
Everything that a reader does with that is the same for every format, and stands here once.

Some folders hold groups that are not runs of neighbouring columns (GPTQ's activation order). A QTensor cannot say that, so
such an op has a `Layout.order` and is read as the dense weight that it means: right everywhere, but its codes cannot travel.

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
Shape = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """One quantized op of a folder. shape: [O, I]; parts: the last names of its tensors ("weight_packed", ...).

    order: int64 [I] where the columns must be sorted by group first: column order[i] of the weight is column i of the codes.
    """

    grid: Grid
    shape: Shape
    parts: tuple[str, ...]
    order: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Holder:
    """What can be asked of a format before any work. name: as `--format` spells it. scales: dtypes that a scale may have, the
    preferred one first. mixed: whether ops may have different grids. weight_only: it holds integer weights in groups or
    channels, and nothing about a layer's inputs. objection: why an op of this grid and shape cannot be
    held, None if it can; `exact`: the same of a weight's own numbers, for a format that cannot hold them all, and
    `scale_bits`: significant bits of scales that it can always hold beside zero points."""

    name: str
    scales: tuple[torch.dtype, ...]
    mixed: bool
    weight_only: bool = True
    objection: Callable[[Grid, Shape], str | None]
    exact: Callable[[QTensor], str | None] | None = None
    scale_bits: int | None = None

    def settled(self, grid: Grid) -> Grid:
        """The grid with scales that this format stores."""
        dtype = grid.scale_dtype if grid.scale_dtype in self.scales else self.scales[0]
        return replace(grid, scale_dtype=dtype, scale_bits=None if grid.symmetric else self.scale_bits)


@dataclass(frozen=True, kw_only=True)
class Format(Holder):
    """A format of tensors in a Hugging Face folder; see the module."""

    encode: Callable[[str, QTensor], dict[str, torch.Tensor]]
    decode: Callable[[Mapping[str, torch.Tensor], Grid], QTensor]
    config: Callable[[Mapping[str, Grid], Iterable[str], Iterable[str]], dict[str, Any]]
    layouts: Callable[[dict[str, Any], Mapping[str, TensorInfo]], dict[str, Layout]]


class QuantizedReader(CheckpointReader):
    """A quantized folder seen as the dense checkpoint that it stands for.

    `tensors` lists the logical tensors ("X.weight", in the scales' dtype); `get` dequantizes; `qtensor` gives the codes.
    `quantized` maps each quantized op's path to its grid; `ordered` does so for ops that are stored in activation order
    and can only be read dense. `stored` are the file's own tensors. Raises BadInput for tensors that are missing or of a
    wrong shape, Unsupported for schemes that infopt does not read. settings: the folder's quantization_config.
    """

    def __init__(self, folder: Path, form: Format, settings: dict[str, Any]) -> None:
        super().__init__(folder)
        self.form = form
        self.stored = self.tensors
        self._layouts = form.layouts(settings, self.stored)
        self.quantized = {name: lay.grid for name, lay in self._layouts.items() if lay.order is None}
        self.ordered = {name: lay.grid for name, lay in self._layouts.items() if lay.order is not None}
        listed = settings.get(TRANSPOSED)
        self.transposed = {name for name in self._layouts if isinstance(listed, list) and name in listed}
        hidden = {f"{name}.{part}" for name, lay in self._layouts.items() for part in (*lay.parts, "weight")}
        logical = {key: info for key, info in self.stored.items() if key not in hidden}
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

    def get(self, name: str) -> torch.Tensor:
        op = name.removesuffix(".weight")
        if op == name or op not in self._layouts:
            return super().get(name)
        w_OI = self._decoded(op).dequantize()
        order = self._layouts[op].order
        if order is not None:
            w_OI = torch.empty_like(w_OI).index_copy_(1, order, w_OI)
        return w_OI.T.contiguous() if op in self.transposed else w_OI

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name.removesuffix(".weight") in self._layouts and name.endswith(".weight"):
            return self.get(name)[start:stop]
        return super().rows(name, start, stop)

    def _decoded(self, name: str) -> QTensor:
        layout = self._layouts[name]
        parts = {part: read_tensor(self.stored[f"{name}.{part}"]) for part in layout.parts}
        q = self.form.decode(parts, layout.grid)
        if layout.grid.symmetric and not bool((q.zero == layout.grid.middle).all()):
            raise damaged(
                f"{self.folder.name}: {name} has zero points other than {layout.grid.middle}",
                "config.json calls the quantization symmetric",
            )
        return q

    def _logical(self, name: str, layout: Layout) -> TensorInfo:
        first = self.stored[f"{name}.{layout.parts[0]}"]
        shape = layout.shape[::-1] if name in self.transposed else layout.shape
        return replace(first, name=f"{name}.weight", shape=shape, dtype=layout.grid.scale_dtype)


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
