"""Which layers of a GGUF file keep their codes on the way to a folder, and on which grids.

A linear layer inside a block whose rows GGUF at most reorders keeps them (gguf_blocks.py says for which blocks codes mean the
same numbers); everything else that is quantized can only be dequantized. compressed-tensors is the format that holds them
all: any group, symmetric or not, layer by layer. Every other format is one more `infopt convert` away.

What GGUF repeats is put together again: if the blocks of all layers of a type repeat their scales, groups are wider than 32,
and scales that are numbers of the model's own dtype get that dtype. So a model that was written to GGUF comes back with its
old bytes.

Legend: O output channels, N blocks of 32 columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import nn

import infopt
from infopt.errors import Unsupported
from infopt.exporters.compressed_tensors import config, encode
from infopt.exporters.gguf_blocks import BLOCK, CODES, decode_blocks
from infopt.exporters.gguf_header import GGUFHeader, GGUFTensorInfo, read_raw
from infopt.grid import GROUPS, Grid
from infopt.qtensor import QTensor

FLOATS = {GGMLQuantizationType[name] for name in ("F64", "F32", "F16", "BF16")}


@dataclass(frozen=True)
class Carried:
    """One layer that keeps its codes. rows: the folder's row r is the file's row rows[r]; None for the file's order."""

    op: str
    grid: Grid
    rows: np.ndarray | None


@dataclass
class Codes:
    """What `plan_codes` found. layers: by GGUF name; lost: {GGUF name: why it can only be dequantized}; kept: linear layers
    that the folder has as floats; digests: of the layers that `tensors` has read."""

    layers: dict[str, Carried]
    lost: dict[str, str]
    kept: list[str]
    digests: dict[str, str] = field(default_factory=dict)

    def tensors(self, file: BinaryIO, info: GGUFTensorInfo) -> Iterator[tuple[str, torch.Tensor]]:
        """The folder's tensors of one layer."""
        layer = self.layers[info.name]
        q = _read(file, info)
        if isinstance(q, str):
            raise RuntimeError(f"{info.name}: {q}, and the plan did not see it")
        q = _regrouped(q, layer.grid)
        if layer.rows is not None:
            rows = torch.from_numpy(layer.rows)
            q = replace(q, codes=q.codes[rows], scale=q.scale[rows], zero=q.zero[rows])
        self.digests[layer.op] = q.digest()
        yield from encode(layer.op, q).items()

    def section(self) -> dict[str, Any]:
        """`quantization_config` of the folder."""
        return config({layer.op: layer.grid for layer in self.layers.values()}, self.kept)

    def report(self) -> dict[str, Any]:
        """infopt.json of the folder, after all layers were read."""
        layers = {
            layer.op: {"error": None, "bits": layer.grid.bits, "group_size": layer.grid.group or "channel",
                       "symmetric": layer.grid.symmetric, "digest": self.digests[layer.op]}
            for layer in self.layers.values()
        }  # fmt: skip
        record = {"from": "gguf", "to": "compressed-tensors", "infopt": infopt.__version__, "requantized": []}
        return {"layers": layers, "conversions": [{**record, "dequantized": sorted(self.lost)}]}


def plan_codes(
    header: GGUFHeader, targets: Mapping[str, str], model: nn.Module, processor: Any, dtype: torch.dtype
) -> Codes:
    """Read every quantized tensor once. targets: {GGUF name: Hugging Face name}; dtype: the folder's.

    Raises Unsupported where no layer has codes that can be carried."""
    linears = {f"{path}.weight": path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    found: dict[str, _Facts] = {}
    rows: dict[str, np.ndarray | None] = {}
    lost: dict[str, str] = {}
    with header.path.open("rb") as file:
        for name, info in header.tensors.items():
            if info.kind in FLOATS or name not in targets:
                continue
            if targets[name] not in linears or not name.startswith("blk."):
                lost[name] = "it is no linear layer of a block"
                continue
            try:
                rows[name] = _inverse(row_order(processor, name, info.shape)[0])
                q = _read(file, info)
            except Unsupported as error:
                q = error.what
            if isinstance(q, str):
                lost[name] = q
            else:
                found[name] = _facts(q, dtype)
    kinds = {facts.bits for facts in found.values()}
    grids = {bits: _settled([facts for facts in found.values() if facts.bits == bits], dtype) for bits in kinds}
    layers = {name: Carried(linears[targets[name]], grids[facts.bits], rows[name]) for name, facts in found.items()}
    if not layers:
        why = f"{next(iter(lost))}: {next(iter(lost.values()))}" if lost else "all its tensors are floats"
        raise Unsupported(f"{header.path} has no codes to carry over", why, f"infopt convert {header.path} -o DIR")
    taken = {layer.op for layer in layers.values()}
    return Codes(layers, lost, [path for path in linears.values() if path not in taken])


def row_order(processor: Any, name: str, shape: tuple[int, ...]) -> tuple[np.ndarray | None, float]:
    """(the row order, the offset) with file = folder[rows] - offset, from what transformers' undoing does to row numbers.

    Unsupported for a tensor that GGUF changes in another way."""
    numbers = np.arange(shape[0], dtype=np.float32)
    probe = numbers if len(shape) == 1 else np.repeat(numbers[:, None], 2, axis=1)
    result = processor.process(
        weights=probe.copy(), name=name, tensor_key_mapping={}, parsed_parameters={"tensors": {}}
    )
    got = result.weights
    other = Unsupported(f"{name} is changed by GGUF in a way that infopt cannot write", "", "use llama.cpp's converter")
    if result.name != name or got.shape != probe.shape:
        raise other
    offset = float(got.min())
    column = (got if got.ndim == 1 else got[:, 0]) - offset
    if (got.ndim == 2 and not np.array_equal(got[:, 0], got[:, 1])) or not np.array_equal(np.sort(column), numbers):
        raise other
    # The folder's row i is the file's row column[i]; so the file's row r is the folder's row argsort(column)[r].
    order = None if np.array_equal(column, numbers) else np.argsort(column)
    return order, offset


def _inverse(rows: np.ndarray | None) -> np.ndarray | None:
    return None if rows is None else np.argsort(rows)


def _read(file: BinaryIO, info: GGUFTensorInfo) -> QTensor | str:
    if info.kind not in CODES:
        return f"{info.kind.name} has scales of its own kind, which no other format holds"
    return decode_blocks(read_raw(file, info, 0, info.shape[0]), info.kind)


@dataclass(frozen=True)
class _Facts:
    """What one layer allows. groups: widths that share a scale and a zero point; own: its scales are the model's dtype's."""

    bits: int
    symmetric: bool
    groups: frozenset[int | None]
    own: bool


def _facts(q: QTensor, dtype: torch.dtype) -> _Facts:
    groups = frozenset(group for group in (None, *GROUPS) if _repeats(q, group))
    return _Facts(q.grid.bits, q.grid.symmetric, groups, torch.equal(q.scale.to(dtype).double(), q.scale.double()))


def _repeats(q: QTensor, group: int | None) -> bool:
    """Whether every run of blocks that a group of columns is made of has one scale and one zero point."""
    blocks = q.scale.shape[1] if group is None else group // BLOCK
    if q.scale.shape[1] % blocks:
        return False
    runs = [part_ON.unflatten(1, (-1, blocks)) for part_ON in (q.scale, q.zero)]
    return all(torch.equal(part, part[..., :1].expand_as(part)) for part in runs)


def _settled(layers: list[_Facts], dtype: torch.dtype) -> Grid:
    """One grid for all layers of so many bits: the widest group, no zero points and the model's own dtype, where all of
    them allow it."""
    group = next(g for g in (None, *sorted(GROUPS, reverse=True)) if all(g in facts.groups for facts in layers))
    own, symmetric = (all(getattr(facts, name) for facts in layers) for name in ("own", "symmetric"))
    return Grid(layers[0].bits, group, symmetric, dtype if own else torch.float16)


def _regrouped(q: QTensor, grid: Grid) -> QTensor:
    step = grid.width(q.shape[1]) // BLOCK
    return QTensor(q.codes, q.scale[:, ::step].to(grid.scale_dtype).contiguous(), q.zero[:, ::step].contiguous(), grid)
