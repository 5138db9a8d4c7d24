"""One rank of a tensor-parallel model: its own folder's tensors, in the model's own definition.

The transformers module tree stays as it is, and a layer that was cut is replaced by its part:

* A column-parallel part computes the rank's output channels and puts them where they belong in a tensor of the full width;
  the others are zero. So the attention code, whatever its layout (fused, interleaved, grouped heads), runs unchanged. The
  heads of other ranks come out as something that no one reads.
* A row-parallel part reads the rank's columns of its input, and the ranks' answers are added; the bias comes after the sum.
* The embedding and the head hold zeros outside the rank's part of the vocabulary, and their outputs are added too.

That is right by construction: the columns that a rank reads depend on its own channels only, which was proven when the model
was cut (`infopt.calibration.cells`). It divides the weights and the work of the layers among the ranks, but neither the work
of attention nor that of the head. The cache is divided: a rank keeps the heads that are its own (`Engine` finds out which).

`reduce` adds a tensor over all ranks, in place. Everything that the ranks do together goes through it.

Legend: N windows, T tokens, C hidden width, I input columns, O output channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from infopt.checkpoint import CheckpointReader
from infopt.errors import BadInput, Unsupported
from infopt.exporters.folder import model_config, open_model
from infopt.exporters.kv_cache import read_grid
from infopt.exporters.quantized import QuantizedReader
from infopt.grid import Grid, Inputs
from infopt.header import DTYPES, TensorInfo
from infopt.kernels.cpu import Precision
from infopt.kv_cache import CacheGrid, CacheScales, RoundingCache, with_cache
from infopt.memory import release
from infopt.model import Skeleton
from infopt.runtime.linear import QuantLinear
from infopt.runtime.model import put, steps, stored_scales
from infopt.shards import OpCut, Pieces, ShardSet, rank_folder, read_shards

Reduce = Callable[[Tensor], None]
_TOKENS_PER_STEP = 512


@dataclass(frozen=True)
class _Place:
    """Where a rank's positions lie: position `mine[i]` of its part is position `whole[i]` of `size`."""

    mine: Tensor
    whole: Tensor
    size: int

    @staticmethod
    def of(pieces: Pieces, size: int) -> _Place:
        """Padding is in the part, but nowhere in the whole."""
        mine, whole, at = [], [], 0
        for start, stop, pad in pieces:
            mine.append(torch.arange(at, at + stop - start))
            whole.append(torch.arange(start, stop))
            at += stop - start + pad
        return _Place(torch.cat(mine), torch.cat(whole), size)

    def spread(self, part: Tensor, axis: int) -> Tensor:
        """The part in its place in a tensor of the full size, zeros elsewhere."""
        shape = list(part.shape)
        shape[axis] = self.size
        full = torch.zeros(shape, dtype=part.dtype)
        return full.index_copy_(axis, self.whole, part.index_select(axis, self.mine))

    def only(self, full: Tensor) -> Tensor:
        """The full input with zeros outside the rank's columns."""
        return torch.zeros_like(full).index_copy_(-1, self.whole, full.index_select(-1, self.whole))

    def gather(self, full: Tensor, width: int) -> Tensor:
        """The rank's columns [..., width] of a full input, zeros where it is padded."""
        part = torch.zeros((*full.shape[:-1], width), dtype=full.dtype)
        return part.index_copy_(-1, self.mine, full.index_select(-1, self.whole))


class _Dense(nn.Module):
    """y = x W^T for a plain weight [O, I]."""

    def __init__(self, w_OI: Tensor) -> None:
        super().__init__()
        self.w_OI = w_OI.to(torch.float32)
        self.out_features, self.in_features = w_OI.shape

    def forward(self, x_TI: Tensor) -> Tensor:
        return nn.functional.linear(x_TI, self.w_OI)


class ColumnPart(nn.Module):
    """Some output channels of a layer, in their places; bias_O: the rank's channels too."""

    def __init__(self, local: nn.Module, place: _Place, bias_O: Tensor | None) -> None:
        super().__init__()
        self.local, self.place, self.bias_O = local, place, bias_O

    def forward(self, x_TI: Tensor) -> Tensor:
        part = self.local(x_TI)
        return self.place.spread(part if self.bias_O is None else part + self.bias_O, -1)


class RowPart(nn.Module):
    """Some input columns of a layer: a partial sum, completed by `reduce`; bias_O: the whole one, added once.

    Inputs that are rounded by their own maximum need that of all ranks: each gives its columns, and the sum is the whole.
    """

    def __init__(
        self,
        local: _Dense | QuantLinear,
        place: _Place,
        bias_O: Tensor | None,
        reduce: Reduce,
        inputs: Inputs | None = None,
        input_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.width, self.inputs, self.input_scale = local.in_features, inputs, input_scale
        self.local, self.place, self.bias_O, self.reduce = local, place, bias_O, reduce

    def forward(self, x_TI: Tensor) -> Tensor:
        if self.inputs is not None:
            if self.inputs.dynamic:
                x_TI = self.place.only(x_TI)
                self.reduce(x_TI)
            x_TI = self.inputs.round(x_TI, self.input_scale)
        total = self.local(self.place.gather(x_TI, self.width)).contiguous()
        self.reduce(total)
        return total if self.bias_O is None else total + self.bias_O


class RankModel:
    """The part of a model that one rank holds: stage `stage` of the pipeline, rank `rank` within it.

    precision: of the quantized layers. Raises BadInput and Unsupported as readers and skeleton do.
    """

    def __init__(self, folder: Path, stage: int, rank: int, reduce: Reduce, precision: Precision = "exact") -> None:
        self.described = read_shards(folder)
        self.stage, self.rank, self.reduce, self.precision = stage, rank, reduce, precision
        self.reader = open_model(folder / rank_folder(stage, rank))
        self._view = _View(self.described, self.reader, rank)
        self.skeleton = Skeleton(model_config(self.reader.config), self._view)
        self.blocks = self.described.stages[stage]
        if [i for blocks in self.described.stages for i in blocks] != list(range(len(self.skeleton.blocks))):
            raise _wrong(folder, "its stages are not the model's blocks, each once and in order")
        self._view.hollow = {
            f"{key}.{part}" for i in self.blocks for key in self._ops(i).values() for part in ("weight", "bias")
        }
        self._add_up_vocabulary()

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def quantized(self) -> Mapping[str, Grid]:
        """As `RuntimeModel.quantized`, of this rank's tensors."""
        return self.reader.quantized if isinstance(self.reader, QuantizedReader) else {}

    @property
    def cache(self) -> CacheGrid | None:
        """The type of the key-value cache, None for floats."""
        return read_grid(self.reader.config.get("quantization_config") or {})

    def cache_scales(self, i: int) -> CacheScales | None:
        return stored_scales(self.skeleton, i, self.cache, self.reader)

    def agreed(self, x: Tensor) -> Tensor:
        """Rank 0's tensor on all ranks, so that they go on alike whatever the last bits."""
        x = x.contiguous() if self.rank == 0 else torch.zeros_like(x)
        self.reduce(x)
        return x

    def load_block(self, i: int) -> nn.Module:
        """Block i with its parts in place, to stay in memory."""
        return self._load_block(i)[0]

    def load_outer(self) -> None:
        """The embeddings, the final norm and the head, to stay in memory."""
        self.skeleton.load_outer()

    @torch.no_grad()
    def embed(self, windows_NT: Tensor) -> Tensor:
        """hidden_NTC that enters block 0; the first stage only."""
        with self.skeleton.outer_loaded():
            parts = [self.skeleton.embed(windows_NT[some]) for some in steps(windows_NT)]
        return torch.cat(parts)

    @torch.no_grad()
    def advance(self, hidden_NTC: Tensor) -> Tensor:
        """Run this stage's blocks over all windows, one block in memory at a time; the argument is overwritten."""
        for i in self.blocks:
            block, originals = self._load_block(i)
            cache = RoundingCache(self.cache, self.cache_scales(i)) if self.cache else None
            for some in steps(hidden_NTC):
                call = self.skeleton.calls(*hidden_NTC[some].shape[:2])[i]
                call = with_cache(call, block, cache) if cache else call
                hidden_NTC[some] = call.run(block, hidden_NTC[some])
            for path, module in originals.items():
                put(block, path, module)
            self.skeleton.free_block(i)
            release()
        return hidden_NTC

    @torch.no_grad()
    def logits(self, hidden_NTC: Tensor) -> Tensor:
        """logits_NTV, fp32, of some last hidden states; the last stage only."""
        with self.skeleton.outer_loaded():
            return torch.cat([self.skeleton.logits(hidden_NTC[some]).float() for some in steps(hidden_NTC)])

    def _load_block(self, i: int) -> tuple[nn.Module, dict[str, nn.Module]]:
        """(the block with its parts in place, the modules that they replace by their paths)."""
        block = self.skeleton.load_block(i)
        originals = {path: block.get_submodule(path) for path in self._ops(i)}
        for path, key in self._ops(i).items():
            put(block, path, self._part(key, originals[path]))
        return block, originals

    def _ops(self, i: int) -> dict[str, str]:
        """{module path in block i: name in the checkpoint} of the layers that are cut or quantized."""
        found = {}
        for path, module in self.skeleton.model.get_submodule(self.skeleton.blocks[i]).named_modules():
            weight = getattr(module, "weight", None)
            if not isinstance(weight, Tensor) or weight.dim() != 2:
                continue
            try:
                name = self.skeleton.weight_key(i, path).removesuffix(".weight")
            except Unsupported:  # made of several tensors: the skeleton converts it
                continue
            cut = self.described.ops.get(name)
            if name in self.quantized or (cut is not None and cut.parallel != "replicated"):
                found[path] = name
        return found

    def _part(self, name: str, original: nn.Module) -> nn.Module:
        cut = self.described.ops.get(name, OpCut("replicated", (0, 0)))
        bias = self.reader.get(f"{name}.bias").to(torch.float32) if f"{name}.bias" in self.reader.tensors else None
        inputs, scale = None, None
        if isinstance(self.reader, QuantizedReader) and name in self.reader.quantized:
            own = (
                nn.Parameter(bias, requires_grad=False) if bias is not None and not (cut.rows or cut.columns) else None
            )
            q = self.reader.qtensor(name)
            if cut.columns:  # the part rounds its inputs itself, before it takes its columns
                inputs, scale = q.grid.inputs, q.input_scale
                q = replace(q, grid=replace(q.grid, inputs=None), input_scale=None)
            local: _Dense | QuantLinear = QuantLinear(q, own, self.precision)
        else:
            weight = self.reader.get(f"{name}.weight")
            local = _Dense(weight.t() if isinstance(original, Conv1D) else weight)
        self._check(name, cut, local, original)
        if cut.rows:
            return ColumnPart(local, _Place.of(cut.rows[self.rank], cut.shape[0]), bias)
        if cut.columns:
            return RowPart(local, _Place.of(cut.columns[self.rank], cut.shape[1]), bias, self.reduce, inputs, scale)
        return local

    def _check(self, name: str, cut: OpCut, local: _Dense | QuantLinear, original: nn.Module) -> None:
        """The part must have the size that its description gives it, and the whole the size that the model has."""
        sizes = [sum(b - a + pad for a, b, pad in side[self.rank]) if side else size
                 for side, size in zip((cut.rows, cut.columns), cut.shape, strict=True)]  # fmt: skip
        weight = original.get_parameter("weight")
        shape = tuple(reversed(weight.shape)) if isinstance(original, Conv1D) else tuple(weight.shape)
        cut_at_all = bool(cut.rows or cut.columns)
        if cut_at_all and (shape != cut.shape or (local.out_features, local.in_features) != tuple(sizes)):
            raise _wrong(self.reader.folder, f"{name} is not the part of {list(shape)} that is described")

    def _add_up_vocabulary(self) -> None:
        """Embedding and head answer for their part of the vocabulary; their outputs are added over the ranks."""
        model = self.skeleton.model
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if module is not None and self._is_cut(module):
                module.register_forward_hook(self._sum_hook)

    def _is_cut(self, module: nn.Module) -> bool:
        """Whether the module's weight is one that is cut; a tied head's is the embedding's."""
        names = [name for name, other in self.skeleton.model.named_parameters() if other is module.weight]
        keys = {key for name in names for key in self.skeleton.outer_sources().get(name, [])}
        return any(self.described.ops.get(key.removesuffix(".weight"), OpCut("", (0, 0))).rows for key in keys)

    def _sum_hook(self, _module: nn.Module, _args: object, out: Tensor) -> Tensor:
        total = out.contiguous()
        self.reduce(total)
        return total


class _View:
    """What the skeleton reads: the model's tensors with their full shapes. Other stages' tensors are zeros: the skeleton
    needs them only to learn what a block is called with, which depends on no weight."""

    def __init__(self, described: ShardSet, reader: CheckpointReader, rank: int) -> None:
        self.described, self.reader, self.rank = described, reader, rank
        self.hollow: set[str] = set()
        parts = {name.removesuffix(".weight") for name in described.logical}
        self.tensors = {
            name: TensorInfo(name, DTYPES[cut.dtype], cut.shape, reader.folder, 0, 0)
            for name, cut in described.tensors.items()
            if name.endswith(".bias") or name.rpartition(".")[0] not in parts
        }
        for name, shape in described.logical.items():
            self.tensors[name] = TensorInfo(name, torch.float32, shape, reader.folder, 0, 0)

    def get(self, name: str) -> Tensor:
        if name in self.hollow or name not in self.reader.tensors:
            return torch.zeros(()).expand(self.tensors[name].shape)
        part = self.reader.get(name)
        op, cut = self.described.ops.get(name.rpartition(".")[0]), self.described.tensors.get(name)
        if op is not None and op.rows and name in self.described.logical:
            if part.shape[0] != sum(b - a + pad for a, b, pad in op.rows[self.rank]):
                raise _wrong(self.reader.folder, f"{name} is not the part that is described")
            return _Place.of(op.rows[self.rank], op.shape[0]).spread(part, 0)
        if cut is not None and cut.axis is not None:
            return _Place.of(cut.pieces[self.rank], cut.shape[cut.axis]).spread(part, cut.axis)
        return part


def _wrong(folder: Path, why: str) -> BadInput:
    return BadInput(f"{folder} does not fit its shards.json", f"{why[0].upper()}{why[1:]}.", "Cut the model again.")
