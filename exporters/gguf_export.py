"""A model folder as a GGUF file, its codes carried into GGUF's blocks bit for bit (gguf_blocks.py).

Names come from transformers' table, the same that `gguf_model.py` reads with. What GGUF changes in a tensor (the row order
of q and k for rotary embeddings, 1 + w in Gemma's norms) is not written down here once more: transformers' undoing of
it is applied to a tensor of row numbers, and what comes out is inverted. A change that is neither a row order nor an offset
is refused.

The settings are written for architectures whose definition llama.cpp and transformers share, and each is refused where a
config asks for what GGUF's keys cannot say. At the end the written file is read by `gguf_model`, and every tensor is compared
with what the folder means, bit for bit, and the config that transformers makes of it with the folder's own.

Matrices that are not quantized keep their float type; vectors become F32, as llama.cpp wants them.

Legend: O output channels, I input columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType, dequantize
from torch import nn

from infopt.checkpoint import CheckpointReader
from infopt.errors import Unsupported, VerificationFailed
from infopt.exporters.carry import Carry, carried_tensor, check_finite, round_nearest
from infopt.exporters.folder import model_config
from infopt.exporters.gguf_blocks import block_type, encode_blocks
from infopt.exporters.gguf_codes import row_order
from infopt.exporters.gguf_kquants import fitting, round_blocks
from infopt.exporters.gguf_model import gguf_names, gguf_processor, open_gguf
from infopt.exporters.gguf_settings import ARCHITECTURES, add_settings, check_settings
from infopt.exporters.gguf_tokenizer import add_tokenizer
from infopt.exporters.quantized import QuantizedReader
from infopt.model import Skeleton
from infopt.qtensor import QTensor

_FLOATS = {
    torch.float32: (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    torch.float16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}
_FILE_TYPES = {
    GGMLQuantizationType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    GGMLQuantizationType.Q4_1: LlamaFileType.MOSTLY_Q4_1,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    GGMLQuantizationType.Q5_0: LlamaFileType.MOSTLY_Q5_0,
    GGMLQuantizationType.Q4_K: LlamaFileType.MOSTLY_Q4_K_S,
    GGMLQuantizationType.Q6_K: LlamaFileType.MOSTLY_Q6_K,
}
_FLOAT_KINDS = {kind for kind, _ in _FLOATS.values()}


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file. key: the folder's name for it; rows: the file's row r is the folder's row rows[r]."""

    name: str
    key: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    rows: np.ndarray | None
    offset: float


class GGUFExport:
    """`check` settles what can be settled before any work; `write` makes the file and compares it with the folder.

    plan: what becomes of quantized layers; None for a float model. q8: Q8_0 blocks for all of them. dtype: of dequantized
    layers. rounding: the K-quant that every linear layer of the blocks is rounded to, instead of all that; None for none.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        skeleton: Skeleton,
        plan: Carry | None,
        q8: bool,
        dtype: torch.dtype,
        rounding: GGMLQuantizationType | None = None,
    ) -> None:
        self.reader, self.skeleton, self.plan, self.q8, self.dtype = reader, skeleton, plan, q8, dtype
        self.rounding = rounding
        self._linears = {
            f"{path}.weight"
            for path, module in skeleton.model.named_modules()
            if isinstance(module, nn.Linear) and path.startswith(tuple(f"{name}." for name in skeleton.blocks))
        }
        self.settings = skeleton.config.get_text_config()
        self.arch = check_settings(self.settings, reader.folder)
        self.tensors = list(self._plan_tensors())

    def write(self, path: Path, tokenizer: bool) -> dict[str, str]:
        """The digest of each layer that is codes. Raises Unsupported (a tokenizer that GGUF cannot hold), BadInput."""
        writer = GGUFWriter(path, self.arch)
        add_settings(writer, self.settings)
        writer.add_file_type(self._file_type())
        writer.add_quantization_version(2)
        if tokenizer:
            add_tokenizer(writer, self.reader.folder, self.settings.vocab_size)
        for tensor in self.tensors:
            block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
            nbytes = int(np.prod(tensor.shape)) // block * block_bytes
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes, raw_dtype=tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        meant: dict[str, str] = {}
        digests: dict[str, str] = {}
        for tensor in self.tensors:
            name = tensor.key.removesuffix(".weight")
            if self.plan and name in self.plan.grids:
                q = self._qtensor(name)
                digests[name], meant[tensor.key] = q.digest(), _digest(q.dequantize())
                writer.write_tensor_data(encode_blocks(_in_rows(q, tensor.rows), tensor.kind))
            elif tensor.kind not in _FLOAT_KINDS:
                raw, meant[tensor.key] = self._rounded(tensor)
                writer.write_tensor_data(raw)
            else:
                raw, meant[tensor.key] = self._floats(tensor)
                writer.write_tensor_data(raw)
        writer.close()
        self._prove(path, meant)
        return digests

    # What will be written

    def _plan_tensors(self) -> Iterator[_Tensor]:
        model = self.skeleton.model
        processor = gguf_processor(self.arch, model)
        names = {theirs: ours for ours, theirs in gguf_names(model, processor, self.arch).items()}
        state = model.state_dict()
        tied = {key for key in state if key not in self.reader.tensors}
        if tied - {"lm_head.weight"} or (tied and not self.settings.tie_word_embeddings):
            raise _refused(self.reader, f"it has no tensor {sorted(tied)[0]}")
        for key, tensor in state.items():
            if key in tied or (key == "lm_head.weight" and self.settings.tie_word_embeddings and self._same_head()):
                continue
            if key not in names:
                raise _refused(self.reader, f"GGUF's {self.arch} has no place for {key}")
            name, shape = names.pop(key), tuple(tensor.shape)
            rows, offset = row_order(processor, name, shape)
            yield _Tensor(name, key, self._kind(key, len(shape)), shape, rows, offset)

    def _same_head(self) -> bool:
        """Whether a stored head is the embedding that it is tied to; it is then left out, which GGUF reads as tied."""
        embedding = next(key for key in self.reader.tensors if key.endswith("embed_tokens.weight"))
        return torch.equal(self.reader.get("lm_head.weight"), self.reader.get(embedding))

    def _kind(self, key: str, rank: int) -> GGMLQuantizationType:
        grid = self.plan.grids.get(key.removesuffix(".weight")) if self.plan else None
        if grid is not None:
            return block_type(self.q8, grid)
        if (
            self.rounding
            and key in self._linears
            and (fit := fitting(self.rounding, self.reader.tensors[key].shape[-1]))
        ):
            return fit
        dtype = self._dtype(key)
        if dtype not in _FLOATS:
            raise _refused(self.reader, f"{key} is {dtype}")
        return _FLOATS[dtype][0] if rank > 1 else GGMLQuantizationType.F32

    def _file_type(self) -> LlamaFileType:
        """What GGUF calls the file, by the type of most of its weights."""
        size: dict[GGMLQuantizationType, int] = {}
        for tensor in self.tensors:
            size[tensor.kind] = size.get(tensor.kind, 0) + int(np.prod(tensor.shape))
        largest = max(size, key=lambda kind: (kind in _FILE_TYPES, size[kind]))
        return _FILE_TYPES.get(largest) or dict(_FLOATS.values())[largest]

    # The bytes

    def rounded(self) -> dict[str, str]:
        """{layer: its type} for what `rounding` rounds."""
        kinds = {tensor.key.removesuffix(".weight"): tensor.kind for tensor in self.tensors}
        return {name: kind.name for name, kind in kinds.items() if self.rounding and kind not in _FLOAT_KINDS}

    def _rounded(self, tensor: _Tensor) -> tuple[np.ndarray, str]:
        """The blocks of a rounded layer, and the digest of what the gguf package reads from them."""
        w_OI = self.reader.get(tensor.key)
        check_finite(tensor.key, w_OI)
        blocks = round_blocks(w_OI, tensor.kind)
        meant = torch.from_numpy(dequantize(blocks, tensor.kind))
        return blocks if tensor.rows is None else blocks[tensor.rows], _digest(meant)

    def _floats(self, tensor: _Tensor) -> tuple[np.ndarray, str]:
        """The tensor's numbers in the file, and the digest of what they mean to a reader in the folder's own terms."""
        values = self.reader.get(tensor.key).to(self._dtype(tensor.key))
        check_finite(tensor.key, values)
        written, meant = values, values.float()
        if tensor.offset:  # 1 + w rounds to float32: a reader gets w back to within 2^-24
            written = values.float() - tensor.offset
            meant = written + tensor.offset
        if tensor.rows is not None:
            written = written[torch.from_numpy(tensor.rows)]
        if tensor.kind is GGMLQuantizationType.F32:
            written = written.float()
        elif tensor.kind is GGMLQuantizationType.BF16:
            written = written.view(torch.uint16)
        return written.contiguous().numpy(), _digest(meant)

    def _dtype(self, key: str) -> torch.dtype:
        dense = self.plan is not None and key.removesuffix(".weight") in self.plan.dequantized
        return self.dtype if dense else self.reader.tensors[key].dtype

    def _qtensor(self, name: str) -> QTensor:
        if self.plan is None or not isinstance(self.reader, QuantizedReader):
            raise TypeError(f"{name} is not quantized")
        grid = self.plan.grids[name]
        if name in self.plan.carried:
            return carried_tensor(name, self.reader.qtensor(name), grid)
        return round_nearest(name, self.reader.get(f"{name}.weight"), grid)

    def _prove(self, path: Path, digests: dict[str, str]) -> None:
        """Read the file with the importer: every tensor and every setting must be the folder's."""
        written = open_gguf(path)
        seen = {name: _digest(tensor) for name, tensor in written.tensors(torch.float32)}
        wrong = sorted(name for name in digests.keys() | seen.keys() if digests.get(name) != seen.get(name))
        if wrong:
            raise VerificationFailed(
                f"{path.name}: {wrong[0]} does not come back as it is in {self.reader.folder}",
                f"{len(wrong)} of {len(digests)} tensors", "report this bug",
            )  # fmt: skip
        theirs = written.model.config.get_text_config()
        for field in ARCHITECTURES[self.settings.model_type].compared:
            ours, got = getattr(self.settings, field), getattr(theirs, field)
            if not (ours == got or (isinstance(ours, float) and np.float32(ours) == np.float32(got))):
                raise VerificationFailed(f"{path.name}: {field} is read as {got}", f"it is {ours}", "report this bug")


def check_gguf(reader: CheckpointReader, tokenizer: bool) -> None:
    """Raise Unsupported, before any work on the weights, for a model or tokenizer that cannot become a GGUF file."""
    export = GGUFExport(reader, Skeleton(model_config(reader.config), reader), None, False, torch.float32)
    if tokenizer:
        add_tokenizer(GGUFWriter(None, export.arch), reader.folder, export.settings.vocab_size)


def _in_rows(q: QTensor, rows: np.ndarray | None) -> QTensor:
    if rows is None:
        return q
    index = torch.from_numpy(rows)
    return QTensor(q.codes[index], q.scale[index], q.zero[index], q.grid)


def _digest(values: torch.Tensor) -> str:
    return hashlib.sha256(values.float().contiguous().numpy().data).hexdigest()


def _refused(reader: CheckpointReader, why: str) -> Unsupported:
    return Unsupported(f"{reader.folder} cannot become a GGUF file", why, "use llama.cpp's own converter")
