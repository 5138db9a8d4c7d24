"""Write a model as one folder per rank: the plan of `shard_plan` carried out, a block at a time.

Every tensor is read once, cut for all ranks of its stage, and freed. What a rank holds is stored bytes: codes are neither
unpacked nor rounded. A rank's folder has the model's own config.json and names, so any reader of this format opens it.
Beside the ranks lies everything that `infopt assemble` needs to give the model back byte for byte (`infopt.shards`).

What is not carried: hidden files, and weights in other files than those of the safetensors that were read (a pickle or a
GGUF of the same model). They are listed, not dropped silently.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from infopt.cells import BlockFacts, Outer
from infopt.checkpoint import CheckpointReader, contained
from infopt.errors import BadInput, Unsupported
from infopt.exporters.packing import pack_bits
from infopt.exporters.quantized import QuantizedReader
from infopt.exporters.shard_plan import Layer, Split, cut_layer, even_rows, split_blocks
from infopt.grid import Grid
from infopt.header import TensorInfo, open_regular, read_into, read_tensor
from infopt.model import Skeleton
from infopt.output import MANIFEST, OutputFolder, check_manifest, free_space_check
from infopt.shards import HEADER, SHARDS, SOURCE, OpCut, ShardSet, TensorCut, rank_folder
from infopt.topology import Topology
from infopt.writer import CHUNK, DTYPE_NAMES, atomic_file, merge_shards, write_json, write_safetensors

_OTHER_WEIGHTS = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".gguf",
    ".safetensors",
    ".onnx",
    ".h5",
    ".msgpack",
)


#: Where older tools keep what config.json's quantization_config says today.
_OLD_SETTINGS = ("quantize_config.json", "quant_config.json")


@dataclass
class _Plan:
    ops: dict[str, OpCut] = field(default_factory=dict)
    tensors: dict[str, TensorCut] = field(default_factory=dict)
    layers: dict[str, Layer] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    parts: list[list[str]] = field(default_factory=list)  # stored names that are read and written together


def plan_shards(
    reader: CheckpointReader,
    skeleton: Skeleton,
    facts: list[BlockFacts],
    outer: Outer,
    tp: int,
    pp: int,
    pad: bool = False,
) -> tuple[ShardSet, _Plan]:
    """Decide every cut and check every law; nothing is written, and only group numbers (g_idx) are read.

    facts: one per block. Raises Unsupported (a law, with the arithmetic) and UsageError (more stages than blocks).
    """
    if tp > 1 and isinstance(reader, QuantizedReader) and reader.form.name == "mlx":
        why = "no engine reads parts of its layers"
        raise Unsupported(
            f"{reader.folder} is in MLX's format", why, "infopt convert --format compressed-tensors, or --tp 1"
        )
    stages = split_blocks(len(skeleton.blocks), pp)
    stage_of = {block: stage for stage, blocks in enumerate(stages) for block in blocks}
    owners = _owners(reader)
    plan = _Plan()
    taken: set[str] = set()
    for i, fact in enumerate(facts):
        keys = _block_keys(skeleton, owners, i)
        taken |= keys
        _plan_block(plan, reader, skeleton, fact, i, keys, owners, stage_of[i], tp, pad)
    rest = [key for key in owners if key not in taken]
    for key in rest:
        sides = [side for side in (0, pp - 1) if owners[key] in (outer.before, outer.after)[side > 0]]
        if pp == 1 or not sides:  # extra tensors (a draft layer) go with the head
            sides = [pp - 1]
        stage = tuple(sorted(set(sides)))
        plan.tensors[key] = TensorCut(_dtype(reader, key), _stored(reader)[key].shape, stage)
    _plan_vocabulary(plan, reader, owners, rest, outer, tp, pad)
    plan.parts += [[key] for key in rest]
    files, weights = _source_files(reader, plan.notes)
    described = ShardSet(
        tp=tp,
        stages=stages,
        ops=plan.ops,
        tensors=dict(sorted(plan.tensors.items())),
        files=files,
        weights=tuple(weights),
        logical={f"{name}.weight": reader.tensors[f"{name}.weight"].shape for name in _quantized(reader)},
        notes=tuple(plan.notes),
    )
    return described, plan


def write_shards(
    reader: CheckpointReader, described: ShardSet, plan: _Plan, output: OutputFolder, on_part: Callable[[], None]
) -> None:
    """Carry the plan out in `output.stage` (not committed). `on_part` is called once for every item of `plan.parts`."""
    stored = _stored(reader)
    free_space_check(output.work, 2 * described.tp * sum(info.nbytes for info in stored.values()))
    work = output.work / "parts"
    shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(output.stage, ignore_errors=True)
    written: dict[str, list[Path]] = {name: [] for _, _, name in described.rank_names()}
    for number, keys in enumerate(plan.parts):
        tensors: dict[str, dict[str, torch.Tensor]] = {name: {} for name in written}
        for key in keys:
            cut, whole = described.tensors[key], read_tensor(stored[key])
            for rank in range(described.tp):
                local = _cut(whole, cut, rank, _fill(plan.layers.get(key.rpartition(".")[0]), key))
                for stage in cut.stages:
                    tensors[rank_folder(stage, rank)][key] = local
        for name, found in tensors.items():
            if found:
                path = work / name / f"{number:06d}.safetensors"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_safetensors(path, found)
                written[name].append(path)
        on_part()
    for name, parts in written.items():
        folder = output.stage / name
        folder.mkdir(parents=True)
        merge_shards(parts, folder)
        for config in ("config.json", *(old for old in _OLD_SETTINGS if old in described.files)):
            shutil.copyfile(contained(reader.folder, config), folder / config)
        shutil.rmtree(work / name)
    _write_source(reader.folder, described, output.stage / SOURCE)
    write_json(output.stage / SHARDS, described.to_json())


def source_files(folder: Path) -> list[str]:
    """Relative names of every file of a folder that is not hidden, sorted."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [str((Path(root) / name).relative_to(folder)) for name in files if not name.startswith(".")]
    return sorted(found)


def file_digest(path: Path) -> tuple[int, str]:
    """(size, sha256) of a regular file, read in pieces."""
    digest = hashlib.sha256()
    with open_regular(path) as fd:
        size = os.fstat(fd).st_size
        buffer = memoryview(bytearray(min(CHUNK, size)))
        for done in range(0, size, CHUNK):
            chunk = buffer[: min(CHUNK, size - done)]
            read_into(fd, path, chunk, done)
            digest.update(chunk)
    return size, digest.hexdigest()


# The plan


def _stored(reader: CheckpointReader) -> Mapping[str, TensorInfo]:
    """The tensors as they lie in the files: a reader of a quantized format lists the logical ones as `tensors`."""
    return getattr(reader, "stored", reader.tensors)


def _quantized(reader: CheckpointReader) -> Mapping[str, Grid]:
    return {**getattr(reader, "quantized", {}), **getattr(reader, "ordered", {})}


def _dtype(reader: CheckpointReader, key: str) -> str:
    return DTYPE_NAMES[_stored(reader)[key].dtype]


def _owners(reader: CheckpointReader) -> dict[str, str]:
    """{stored name: the logical tensor that it is part of}."""
    quantized = _quantized(reader)
    owners = {}
    for key in _stored(reader):
        op = key.rpartition(".")[0]
        part_of_op = op in quantized and not key.endswith(".bias")
        owners[key] = f"{op}.weight" if part_of_op else key
    return owners


def _block_keys(skeleton: Skeleton, owners: Mapping[str, str], i: int) -> set[str]:
    """The stored names that belong to block i: those that the model uses, and extras (KV scales) under the same path."""
    used = set(skeleton.block_keys(i))
    number = str(i)
    prefixes = {key[: key.index(f".{number}.") + len(number) + 2] for key in used if f".{number}." in key}
    prefix = prefixes.pop() if len(prefixes) == 1 else None
    return {key for key, owner in owners.items() if owner in used or (prefix and key.startswith(prefix))}


def _plan_block(
    plan: _Plan,
    reader: CheckpointReader,
    skeleton: Skeleton,
    fact: BlockFacts,
    i: int,
    keys: set[str],
    owners: Mapping[str, str],
    stage: int,
    tp: int,
    pad: bool,
) -> None:
    layers = _layers(reader, skeleton, fact.topology, i, keys, owners)
    cuts: dict[str, OpCut] = {op: OpCut("replicated", layer.shape) for op, layer in layers.items()}
    for cells in fact.cells if tp > 1 else ():
        absent = [op for op in (*cells.readers, *cells.channels) if op not in layers]
        if absent:
            why = "its weight is not stored as a tensor of its own"
            raise Unsupported(f"{skeleton.blocks[i]}.{absent[0]} cannot be cut", why, "--tp 1 --pp N")
        writers = {op: layers[op] for op in cells.channels}
        split = Split(cells, writers, {op: layers[op] for op in cells.readers}, tp, pad)
        split.check(skeleton.blocks[i])
        cuts |= {
            op: OpCut("row", layers[op].shape, columns=split.pieces(layers[op], "columns")) for op in split.readers
        }
        cuts |= {op: OpCut("column", layers[op].shape, rows=split.pieces(layers[op], "rows")) for op in writers}
        if split.padded != cells.count:
            plan.notes.append(f"{layers[cells.readers[0]].name}: {cells.count} columns padded to {split.padded}")
    for op, cut in cuts.items():
        plan.ops[layers[op].name] = cut
        plan.layers[layers[op].name] = layers[op]
        plan.tensors |= cut_layer(layers[op], cut, (stage,), tp)
        if tp > 1 and cut.parallel == "replicated":
            plan.notes.append(f"{layers[op].name}: replicated, it feeds no inner space")
    if fact.topology.unhandled:
        name = fact.topology.unhandled[0]
        more = f" and {rest} more" if (rest := len(fact.topology.unhandled) - 1) else ""
        plan.notes.append(f"{skeleton.blocks[i]}: {name}{more} replicated, they are no layers of their own")
    for key in keys:
        plan.tensors.setdefault(key, TensorCut(_dtype(reader, key), _stored(reader)[key].shape, (stage,)))
    plan.parts.append(sorted(keys))


def _layers(
    reader: CheckpointReader,
    skeleton: Skeleton,
    topology: Topology,
    i: int,
    keys: set[str],
    owners: Mapping[str, str],
) -> dict[str, Layer]:
    """{op of block i: the layer as stored}; ops that are not one tensor on disk are left out."""
    stored, quantized = _stored(reader), _quantized(reader)
    found = {}
    for op in topology.linears():
        try:
            name = skeleton.weight_key(i, op.name).removesuffix(".weight")
        except Unsupported:
            continue
        mine = {key.rpartition(".")[2]: stored[key] for key in sorted(keys) if key.rpartition(".")[0] == name}
        transposed = op.kind == "conv1d" and name not in quantized
        found[op.name] = Layer(name, (op.out_features, op.in_features), mine, transposed, quantized.get(name))
    return found


def _plan_vocabulary(
    plan: _Plan,
    reader: CheckpointReader,
    owners: Mapping[str, str],
    rest: list[str],
    outer: Outer,
    tp: int,
    pad: bool,
) -> None:
    """Cut the embedding and the head along the vocabulary, where it divides or may be padded."""
    names = sorted({owner.rpartition(".")[0] for owner in outer.vocabulary}) if tp > 1 else []
    for name in names:
        stored = {key.rpartition(".")[2]: _stored(reader)[key] for key in rest if key.rpartition(".")[0] == name}
        shape = reader.tensors[f"{name}.weight"].shape
        layer = Layer(name, (shape[0], shape[1]), stored, False, _quantized(reader).get(name))
        rows = even_rows(shape[0], tp, pad)
        if rows is None:
            plan.notes.append(f"{name}: replicated, {shape[0]} rows / {tp} is not whole (--pad would add rows)")
            continue
        units = layer.units("rows").values()
        if any((edge * unit).denominator != 1 for _, unit in units for one in rows for edge in one[0]):
            plan.notes.append(f"{name}: replicated, its {shape[0]} rows cannot be cut at every {shape[0] // tp}")
            continue
        op = OpCut("column", layer.shape, rows=rows)
        plan.ops[name], plan.layers[name] = op, layer
        for key, cut in cut_layer(layer, op, (0,), tp).items():
            plan.tensors[key] = TensorCut(
                cut.dtype, cut.shape, plan.tensors[key].stages, cut.axis, cut.pieces, cut.values, cut.local_values
            )
        if added := sum(one[0][2] for one in rows):
            plan.notes.append(f"{name}: {shape[0]} rows padded to {shape[0] + added}")


def _source_files(reader: CheckpointReader, notes: list[str]) -> tuple[dict[str, tuple[int, str]], list[str]]:
    """({name: (size, sha256)} of every file that will come back, the weight files among them)."""
    folder = reader.folder
    if (folder / MANIFEST).exists():
        check_manifest(folder)  # damaged input would be carried faithfully into every rank
    weights = sorted({info.file.name for info in _stored(reader).values()})
    files = {}
    for name in source_files(folder):
        if name not in weights and name.lower().endswith((*_OTHER_WEIGHTS, ".py")):
            notes.append(f"{name}: left out, it is code or weights in another format")
            continue
        if name.endswith(HEADER):
            raise BadInput(f"{folder / name} is in the way", f"shards keep their own {HEADER} files", f"rm {name}")
        files[name] = file_digest(contained(folder, name))
    return files, weights


# Cutting


def _cut(whole: torch.Tensor, cut: TensorCut, rank: int, fill: torch.Tensor) -> torch.Tensor:
    """The rank's part of a stored tensor; fill: a few positions of what stands for zero, repeated where padding is."""
    if cut.values is not None:
        return torch.tensor(cut.local_values[rank], dtype=whole.dtype)
    if cut.axis is None:
        return whole
    parts = []
    for start, stop, pad in cut.pieces[rank]:
        parts.append(_bits(whole).narrow(cut.axis, start, stop - start))
        if pad:
            shape = [pad if axis == cut.axis else size for axis, size in enumerate(whole.shape)]
            one = fill.to(whole.dtype) if fill.numel() == 1 else fill
            pattern = one.repeat(-(-pad // one.numel()))[:pad]
            view = [pad if axis == cut.axis else 1 for axis in range(whole.dim())]
            parts.append(_bits(pattern.view(view).expand(shape).contiguous()))
    joined = torch.cat(parts, cut.axis).contiguous().view(whole.dtype)
    return joined - cut.base[rank] if cut.base else joined


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same bytes as a dtype that every torch operation knows (8-bit floats lack some)."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize])


def _fill(layer: Layer | None, key: str) -> torch.Tensor:
    """What a padded position holds: a scale of 1, the code that means zero, else 0."""
    suffix = key.rpartition(".")[2]
    if suffix == "weight_scale":
        return torch.ones(1)
    if suffix == "weight_packed" and layer is not None and layer.grid is not None and layer.grid.symmetric:
        return pack_bits(torch.full((32,), layer.grid.middle, dtype=torch.uint8), layer.grid.bits, 0)
    return torch.zeros(1)


# The source's own files


def _write_source(folder: Path, described: ShardSet, target: Path) -> None:
    target.mkdir()
    for name in described.files:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name not in described.weights:
            shutil.copyfile(contained(folder, name), path)
            continue
        with open_regular(folder / name) as fd, atomic_file(target / (name + HEADER)) as file:
            for chunk in _header_chunks(fd, folder / name):
                file.write(chunk)


def _header_chunks(fd: int, path: Path) -> Iterator[memoryview]:
    prefix = memoryview(bytearray(8))
    read_into(fd, path, prefix, 0)
    yield prefix
    header = memoryview(bytearray(int.from_bytes(prefix, "little")))
    read_into(fd, path, header, 8)
    yield header
