"""What becomes of each quantized layer when a model goes to another format, settled before anything is written.

    carried       the same codes, scales and zero points under other names and in other words: the same weights, bit for bit
    requantized   rounded to nearest on a grid that the target holds; only if asked for, since it loses
    dequantized   stored as floating numbers; only if asked for, since it grows

Grids and shapes answer most of it. Where the target stores scales in another dtype, or has no zero points, the numbers
themselves are asked: a bfloat16 scale usually is a float16 number, and then nothing is lost.

Legend: O output channels, I input columns, G groups of columns, K columns of one group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from infopt.errors import Unsupported
from infopt.exporters.formats import objection, others
from infopt.exporters.quantized import SCALES, Holder, QuantizedReader, damaged
from infopt.grid import BITS, GROUPS, Grid
from infopt.model import Skeleton
from infopt.qtensor import QTensor

Loss = Literal["requantize", "dequantize"]


@dataclass(frozen=True)
class Carry:
    """grids: what each layer that stays quantized becomes; `carried` of them keep their codes; `dequantized` do not.

    modules: each layer's module path, in the order of the model; `kept`: linear modules that are not quantized.
    """

    grids: dict[str, Grid]
    carried: frozenset[str]
    dequantized: frozenset[str]
    modules: dict[str, str]
    kept: list[str]

    @property
    def requantized(self) -> list[str]:
        return [name for name in self.grids if name not in self.carried]


def plan_carry(reader: QuantizedReader, skeleton: Skeleton, holder: Holder | None, loss: Loss | None) -> Carry:
    """holder: the target; None is plain floats. Raises Unsupported where codes cannot be carried and `loss` is None."""
    modules = _modules(reader, skeleton)
    found = {} if holder is None else _carriable(reader, holder)
    grids = {name: grid for name in modules if isinstance(grid := found.get(name), Grid)}
    if holder is not None and not holder.mixed and len(set(grids.values())) > 1:
        common = Counter(grids.values()).most_common(1)[0][0]
        found |= {name: f"{holder.name} wants all layers alike" for name, grid in grids.items() if grid != common}
        grids = {name: grid for name, grid in grids.items() if grid == common}
    tables = _tables(modules, skeleton) if holder and holder.name != reader.form.name else []
    found |= dict.fromkeys(tables, "it is an embedding, which only MLX quantizes")
    grids = {name: grid for name, grid in grids.items() if name not in tables}
    lost = [name for name in modules if name not in grids]
    if lost and loss is None:
        raise _needs_loss(reader, holder, lost, found)
    carried = dict(grids)
    if lost and loss == "requantize":
        layers = [name for name in modules if name not in tables]
        grids, lost = _requantized(reader, holder, layers, carried), tables
    linears = [path for path, module in skeleton.model.named_modules() if isinstance(module, nn.Linear)]
    taken = {modules[name] for name in grids}
    same = frozenset(name for name, grid in carried.items() if grids[name] == grid)
    return Carry(grids, same, frozenset(lost), modules, [path for path in linears if path not in taken])


def carried_tensor(name: str, q: QTensor, grid: Grid) -> QTensor:
    """q under the grid that `plan_carry` found for it: other dtypes, the same numbers. BadInput for scales that are none."""
    check_finite(name, q.scale)
    new = QTensor(q.codes, q.scale.to(grid.scale_dtype), q.zero, grid, q.input_scale)
    if not torch.equal(new.scale.double(), q.scale.double()):
        raise RuntimeError(f"{name}: the plan let {say(grid.scale_dtype)} round its scales")
    return new


def round_nearest(name: str, w_OI: torch.Tensor, grid: Grid) -> QTensor:
    """w rounded to nearest on a grid that spans each group from its minimum to its maximum; BadInput if w is not finite."""
    check_finite(name, w_OI)
    rows, columns = w_OI.shape
    w_OGK = w_OI.float().reshape(rows, -1, grid.width(columns))
    scale_OG, zero_OG = grid.range(w_OGK.amin(2).clamp_max(0), w_OGK.amax(2).clamp_min(0))
    codes = grid.encode(w_OGK, scale_OG[..., None], zero_OG[..., None]).to(torch.uint8)
    return QTensor(codes.reshape(rows, columns), scale_OG.to(grid.scale_dtype), zero_OG.to(torch.uint8), grid)


def check_finite(name: str, values: torch.Tensor) -> None:
    """BadInput, naming the tensor, for values that are NaN or infinite."""
    if not bool(torch.isfinite(values).all()):
        raise damaged(f"{name} has values that are not finite", "nothing can be made from them")


def model_dtype(config: dict[str, Any]) -> torch.dtype:
    """The model's own dtype as config.json names it; bfloat16 where it says nothing usable."""
    names = {say(dtype): dtype for dtype in SCALES}
    text = config.get("text_config")
    said = [part.get(key) for part in (config, text) if isinstance(part, dict) for key in ("dtype", "torch_dtype")]
    return next((names[name] for name in said if isinstance(name, str) and name in names), torch.bfloat16)


def say(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _modules(reader: QuantizedReader, skeleton: Skeleton) -> dict[str, str]:
    """{op name in the files: module path}, in the model's order; ops that are no module of their own come last."""
    found: dict[str, str] = {}
    for path, module in skeleton.model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        block = next((i for i, name in enumerate(skeleton.blocks) if path.startswith(f"{name}.")), None)
        name = path
        if block is not None:
            try:
                name = skeleton.weight_key(block, path.removeprefix(f"{skeleton.blocks[block]}."))
            except Unsupported:  # several tensors make it: they are listed below under their own names
                continue
        found[name.removesuffix(".weight")] = path
    ops = (*reader.quantized, *reader.ordered)
    inside = {name: path for name, path in found.items() if name in ops}
    return inside | {name: name for name in ops if name not in found}


def _tables(modules: dict[str, str], skeleton: Skeleton) -> list[str]:
    """The ops that are embeddings."""
    tables = {path for path, module in skeleton.model.named_modules() if isinstance(module, nn.Embedding)}
    return [name for name, path in modules.items() if path in tables]


def _carriable(reader: QuantizedReader, holder: Holder) -> dict[str, Grid | str]:
    """For each layer the grid on which the target holds its codes, or why it cannot."""
    found: dict[str, Grid | str] = {name: reader.why_dense(name) for name in reader.ordered}
    return found | {name: _carried(reader, holder, name) for name in reader.quantized}


def _carried(reader: QuantizedReader, holder: Holder, name: str) -> Grid | str:
    wanted, grid, shape = model_dtype(reader.config), reader.quantized[name], reader.shape(name)
    why = holder.refuses(grid, shape)
    without = replace(grid, symmetric=True)
    if why and (grid.symmetric or holder.refuses(without, shape)):
        return why
    if why or holder.exact or grid.scale_dtype != wanted or wanted not in holder.scales:
        return _narrowed(name, reader.qtensor(name), holder, wanted, without if why else grid)
    return grid


def _narrowed(name: str, q: QTensor, holder: Holder, wanted: torch.dtype, grid: Grid) -> Grid | str:
    """`grid` with a scale dtype that holds the scales of q exactly; the reason where q would change."""
    check_finite(name, q.scale)
    if grid.symmetric and not bool((q.zero == grid.middle).all()):
        return holder.refuses(q.grid, q.shape) or "it has zero points"
    why = f"its scales are {say(q.grid.scale_dtype)} numbers that {say(holder.scales[0])} would round"
    for dtype in (wanted, q.grid.scale_dtype, *holder.scales):
        scale = q.scale.to(dtype)
        if dtype not in holder.scales or not torch.equal(scale.double(), q.scale.double()):
            continue
        inexact = holder.exact(replace(q, scale=scale)) if holder.exact else None
        if inexact is None:
            return replace(grid, scale_dtype=dtype)
        why = inexact
    return why


def _requantized(
    reader: QuantizedReader, holder: Holder | None, names: list[str], carried: dict[str, Grid]
) -> dict[str, Grid]:
    """A grid for every layer: that of the carried ones, and for others the nearest that the target holds."""
    if holder is None:
        raise Unsupported("plain safetensors hold no codes", "there is nothing to requantize for", "--dequantize")
    own = reader.quantized | reader.ordered
    if not _rounds(holder):
        why = "it holds floats with rounded inputs, which are made from the original model"
        fix = f"infopt quantize MODEL --method fp8 --scheme FP8_BLOCK --format {holder.name}"
        raise Unsupported(f"nothing is rounded again for {holder.name}", why, fix)
    if holder.mixed:
        return {name: carried.get(name) or _first(reader, holder, own[name], [name]) for name in names}
    base = next(iter(carried.values()), None) or Counter(own.values()).most_common(1)[0][0]
    return dict.fromkeys(names, _first(reader, holder, base, names))


def _rounds(holder: Holder) -> bool:
    return holder.weight_only or holder.name == "compressed-tensors"


def _first(reader: QuantizedReader, holder: Holder, old: Grid, names: list[str]) -> Grid:
    """The grid most like `old` that the target holds for all of these layers."""
    for grid in _alike(replace(old, inputs=None) if holder.weight_only else old):
        if all(holder.refuses(grid, reader.shape(name)) is None for name in names):
            return holder.settled(grid)
    raise Unsupported(f"{holder.name} holds no grid for {names[0]} {list(reader.shape(names[0]))}", "", "--dequantize")


def _alike(old: Grid) -> Iterator[Grid]:
    """Grids from the most to the least like `old`: its bits, then more, then fewer; its symmetry; its group, then smaller.

    Of floats, and of scales for blocks or whole tensors, only the weight survives: whole numbers in groups or channels.
    """
    if old.kind == "float" or old.rows != 1:
        old = Grid(old.bits, old.group, old.symmetric, old.scale_dtype, inputs=old.inputs)
    groups = [old.group, *(size for size in sorted(GROUPS, reverse=True) if size != old.group), None]
    for bits in sorted(BITS, key=lambda b: (b < old.bits, abs(b - old.bits))):
        for symmetric in (old.symmetric, not old.symmetric):
            for group in groups:
                yield replace(old, bits=bits, symmetric=symmetric, group=group)


def _needs_loss(
    reader: QuantizedReader, holder: Holder | None, lost: list[str], found: dict[str, Grid | str]
) -> Unsupported:
    total = len(reader.quantized) + len(reader.ordered)
    if holder is None:
        what = f"plain safetensors hold no codes, and {total} layers of {reader.folder} are codes"
        return Unsupported(what, "they can only be dequantized, which makes them larger", "--dequantize")
    what = f"{len(lost)} of {total} layers cannot be carried over to {holder.name} as they are"
    ops = {name: (grid, reader.shape(name)) for name, grid in reader.quantized.items()}
    able = (
        other.name
        for other in ([] if reader.ordered else others(holder.name))
        if other.name != reader.form.name and objection(other, ops) is None
        if all(isinstance(_carried(reader, other, name), Grid) for name in ops)
    )
    other = next(able, None)
    hint = f"; `--format {other}` carries them" if other else ""
    again = "--requantize (rounds them again) or " if _rounds(holder) else ""
    return Unsupported(what, f"{lost[0]}: {found[lost[0]]}", f"{again}--dequantize (stores floats){hint}")
