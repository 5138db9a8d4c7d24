"""A model folder, quantized or not, as a stream of runnable blocks.

The definition and the float tensors come from the skeleton (`infopt.model`). Where the folder holds an op as codes, the
block's linear is replaced by a `QuantLinear` made from those codes, so what runs is what was written. The skeleton
would read the dequantized weight of such an op as well; it is given a tensor of the right shape without memory instead,
since the module that would use it is taken out. A weight that is not one to one with a module (stacked experts) stays
with the skeleton, which dequantizes it.

Two models that are compared often hold the same embedding and head. `load_outer(share=...)` lets the second use the
first one's tensors: for a small model these are a third of all memory.

Legend: N windows, B windows of one step, T tokens of a window, C hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from infopt.checkpoint import CheckpointReader
from infopt.errors import BadInput, Unsupported, UsageError
from infopt.exporters.folder import model_config, open_model
from infopt.exporters.kv_cache import read_grid, read_scales
from infopt.exporters.quantized import QuantizedReader
from infopt.kernels.cpu import Precision
from infopt.kv_cache import CacheGrid, CacheScales, RoundingCache, attention_path, with_cache
from infopt.memory import release
from infopt.model import Skeleton
from infopt.qtensor import QTensor
from infopt.runtime.linear import QuantLinear

CacheChoice = Literal["stored", "float", "unit"]
_TOKENS_PER_STEP = 512  # more does not fill a processor better, and attention memory grows with it


class RuntimeModel:
    """A folder's model, one block in memory at a time.

    folder: a Hugging Face folder or one that infopt exported. precision: see `infopt.kernels.cpu`. device: where
    everything is computed, and lies while it is in memory. cache: a quantized key-value cache as
    the folder says, a float one, or one with scales of 1 (what some servers make of it). Raises what the
    reader and the skeleton raise: BadInput, Unsupported.
    """

    def __init__(
        self,
        folder: Path,
        precision: Precision = "exact",
        cache: CacheChoice = "stored",
        device: torch.device | str = "cpu",
    ) -> None:
        self.folder = Path(folder)
        self.precision, self.device = precision, device
        self.reader = open_model(self.folder)
        self._view = _View(self.reader)
        self.skeleton = Skeleton(model_config(self.reader.config), self._view, device=device)
        self._ops = [self._quantized_ops(i) for i in range(len(self.skeleton.blocks))]
        self._view.hollow = {f"{key}.weight" for ops in self._ops for key in ops.values()}
        self._originals: dict[int, dict[str, nn.Module]] = {}
        self.cache = None if cache == "float" else read_grid(self.reader.config.get("quantization_config") or {})
        self._unit_cache = cache == "unit"

    def __len__(self) -> int:
        return len(self.skeleton.blocks)

    @property
    def quantized(self) -> dict[str, Any]:
        """Each quantized op's name in the checkpoint, and its grid; empty for a float model."""
        return self.reader.quantized if isinstance(self.reader, QuantizedReader) else {}

    def check_windows(self, windows_NT: Tensor) -> None:
        """Raise UsageError or BadInput for windows that this model cannot read."""
        text = self.skeleton.config.get_text_config()
        limit = getattr(text, "max_position_embeddings", None)
        if windows_NT.shape[0] == 0 or windows_NT.shape[1] < 2:
            raise UsageError(
                f"windows of shape {list(windows_NT.shape)}", "There is nothing to predict.", "--seqlen 512"
            )
        if isinstance(limit, int) and windows_NT.shape[1] > limit:
            what = f"windows of {windows_NT.shape[1]} tokens"
            raise UsageError(what, f"{self.folder} knows {limit} positions.", f"--seqlen {limit}")
        largest = int(windows_NT.max())
        if largest >= text.vocab_size:
            what = f"{self.folder}: the tokenizer gives the id {largest}"
            raise BadInput(what, f"The model has {text.vocab_size} tokens.", "Use the tokenizer of the original model.")

    # Blocks

    def load_block(self, i: int) -> nn.Module:
        """Block i with a QuantLinear for each quantized op. `free_block` gives its memory back."""
        block = self.skeleton.load_block(i)
        self._originals[i] = {}
        for op_name, key in self._ops[i].items():
            original = block.get_submodule(op_name)
            self._originals[i][op_name] = original
            bias = getattr(original, "bias", None)
            if isinstance(self.reader, QuantizedReader):  # it is, or there would be no such ops
                put(block, op_name, QuantLinear(self.reader.qtensor(key).to(self.device), bias, self.precision))
        return block

    def codes_of(self, i: int) -> Callable[[str], QTensor | None]:
        """For each module path in block i: its weight's codes, None where it has none."""
        ops, reader = self._ops[i], self.reader

        def codes(path: str) -> QTensor | None:
            return (
                reader.qtensor(ops[path]).to(self.device)
                if path in ops and isinstance(reader, QuantizedReader)
                else None
            )

        return codes

    def replace_block(self, i: int, module: nn.Module) -> None:
        """Another module in block i's place, for good."""
        put(self.skeleton.model, self.skeleton.blocks[i], module)
        self._originals.pop(i, None)
        release()

    def free_block(self, i: int) -> None:
        block = self.skeleton.model.get_submodule(self.skeleton.blocks[i])
        for op_name, original in self._originals.pop(i, {}).items():
            put(block, op_name, original)
        self.skeleton.free_block(i)
        release()

    def _quantized_ops(self, i: int) -> dict[str, str]:
        """{module path in block i: op name in the checkpoint} of the ops that become a QuantLinear."""
        block = self.skeleton.model.get_submodule(self.skeleton.blocks[i])
        found = {}
        for op_name, module in block.named_modules():
            weight = getattr(module, "weight", None)
            if not self.quantized or not isinstance(weight, Tensor) or weight.dim() != 2:
                continue
            try:
                key = self.skeleton.weight_key(i, op_name)
            except Unsupported:  # made from several tensors: the skeleton converts it
                continue
            if key.removesuffix(".weight") in self.quantized:
                found[op_name] = key.removesuffix(".weight")
        return found

    def cache_bytes(self) -> tuple[float, float]:
        """Bytes of the key-value cache for one token in all layers: as the folder says, and in bf16."""
        text = self.skeleton.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        plain = 4.0 * heads * width * len(self)
        return self.cache.bytes_per_token(heads, width) * len(self) if self.cache else plain, plain

    def _rounding_cache(self, i: int) -> RoundingCache | None:
        if self.cache is None:
            return None
        return RoundingCache(self.cache, self.cache_scales(i))

    def cache_scales(self, i: int) -> CacheScales | None:
        """The calibrated scales of block i's cache, None where there are none (a float cache, or dynamic scales)."""
        if self.cache is not None and self._unit_cache and self.cache.static:
            return CacheScales.unit(self.cache)
        return stored_scales(self.skeleton, i, self.cache, self.reader)

    # The outer parts, and whole passes

    def load_outer(self, share: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Load embeddings, final norm and head. Returns their tensors by checkpoint key, for another model to share."""
        self._view.shared = dict(share or {})
        self._view.seen = {}
        self.skeleton.load_outer()
        seen, self._view.seen, self._view.shared = self._view.seen, None, {}
        return seen

    def free_outer(self) -> None:
        self.skeleton.free_outer()
        release()

    @torch.no_grad()
    def embed(self, windows_NT: Tensor) -> Tensor:
        """hidden_NTC, fp32: what enters block 0. Loads and frees the outer parts."""
        self.check_windows(windows_NT)
        self.load_outer()
        parts = []
        for some in steps(windows_NT):
            self.skeleton.calls(*windows_NT[some].shape)  # captured here, where the outer parts are in memory
            parts.append(self.skeleton.embed(windows_NT[some].to(self.device)))
        self.free_outer()
        return torch.cat(parts)

    @torch.no_grad()
    def advance(self, i: int, hidden_NTC: Tensor) -> None:
        """Run block i over all windows, in place. The block is in memory only for the time of this call."""
        block, cache = self.load_block(i), self._rounding_cache(i)
        for some in steps(hidden_NTC):
            call = self.skeleton.calls(*hidden_NTC[some].shape[:2])[i]
            call = with_cache(call, block, cache) if cache else call
            hidden_NTC[some] = call.run(block, hidden_NTC[some])
        self.free_block(i)

    def stream(self, windows_NT: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(i, hidden_NTC after block i) for every block in order; one tensor, overwritten from block to block."""
        hidden_NTC = self.embed(windows_NT)
        for i in range(len(self)):
            self.advance(i, hidden_NTC)
            yield i, hidden_NTC

    def last_hidden(self, windows_NT: Tensor, on_block: Callable[[], None] | None = None) -> Tensor:
        """hidden_NTC after the last block; `on_block` is called after each."""
        hidden_NTC = torch.empty(0)
        for _, hidden in self.stream(windows_NT):
            hidden_NTC = hidden
            if on_block:
                on_block()
        return hidden_NTC

    def logits(self, hidden_TC: Tensor) -> Tensor:
        """logits_TV, fp32, for some tokens' last hidden states; the outer parts must be loaded."""
        return self.skeleton.logits(hidden_TC[None])[0].to(torch.float32)


def stored_scales(skeleton: Skeleton, i: int, cache: CacheGrid | None, reader: CheckpointReader) -> CacheScales | None:
    """What the folder holds of block i's cache; see `RuntimeModel.cache_scales`."""
    if cache is None or not (cache.static or cache.balanced):
        return None
    block = skeleton.model.get_submodule(skeleton.blocks[i])
    path = skeleton.stored_path(i, attention_path(block))
    return read_scales(path, cache, getattr(reader, "stored", {}))


class _View:
    """The reader as the skeleton sees it: hollow where a QuantLinear will stand, shared where another model has it."""

    def __init__(self, reader: CheckpointReader) -> None:
        self.reader = reader
        self.tensors = reader.tensors
        self.hollow: set[str] = set()
        self.shared: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] | None = None

    def get(self, name: str) -> Tensor:
        if name in self.hollow:
            return torch.zeros(()).expand(self.tensors[name].shape)
        if name in self.shared:
            return self.shared[name]
        tensor = self.reader.get(name)
        if self.seen is not None:
            tensor = tensor.to(torch.float32) if tensor.is_floating_point() else tensor
            self.seen[name] = tensor
        return tensor


def steps(windows: Tensor) -> Iterator[slice]:
    """Slices of the windows [N, T, ...] so that one step has about 512 tokens."""
    count, length = windows.shape[:2]
    batch = max(1, _TOKENS_PER_STEP // length)
    return (slice(start, start + batch) for start in range(0, count, batch))


def put(block: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent) if parent else block, name, module)
