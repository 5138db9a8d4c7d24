"""vLLM's `sharded_state` layout, made from logical shards (`load_format="sharded_state"`, as read by vLLM 0.32).

Each rank's file holds vLLM's own parameters before its kernels repack them:

* q/k/v and gate/up are one parameter each, the rank's parts one after another;
* the vocabulary is padded with zeros to a multiple of 64 and then divided; a tied embedding is stored as lm_head.weight only;
* every attention layer has its scale parameters, all 1, and compressed-tensors adds six more.

vLLM refuses files with a parameter too few or too many, so only what was loaded in its CPU build is written: llama models, not
quantized, in 4 bits (compressed-tensors pack-quantized, gptq without activation order, awq), or in 8 bits with rounded inputs
(compressed-tensors, scales per channel: W8A8, FP8_DYNAMIC; W8A8_STATIC at TP 1). `benchmarks/interop/sharded_state.py` loads
them again; all else is refused here, with the reason. This layout is one way: `infopt assemble` puts logical shards back.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from infopt.checkpoint import CheckpointReader
from infopt.errors import Unsupported
from infopt.exporters.assemble import OpenShards, join
from infopt.exporters.quantized import QuantizedReader
from infopt.exporters.shard_plan import SIDES
from infopt.grid import Grid
from infopt.header import read_tensor
from infopt.writer import INDEX, merge_shards, write_safetensors

FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
METHODS = {"compressed-tensors", "gptq", "awq"}
_SCALARS = ("_k_scale", "_v_scale", "_q_scale", "_prob_scale")
_MULTIPLE = 64  # vLLM pads the vocabulary to this
_KERNEL = 32  # rows and columns of a rank's quantized layer
_DROPPED = ("g_idx",)  # trivial where it is allowed at all; vLLM has no such parameter

Tensors = dict[str, torch.Tensor]


def check_vllm(reader: CheckpointReader, tp: int, pp: int) -> None:
    """Unsupported for what vLLM's loader is not known to read; nothing is read but configs and headers."""
    fix = "write logical shards (no --layout), or serve the folder itself: vLLM cuts it when it loads"
    if reader.config["model_type"] != "llama":
        raise Unsupported(
            f"--layout vllm of a {reader.config['model_type']} model", "only llama's names are known", fix
        )
    if pp > 1:
        raise Unsupported(f"--layout vllm with --pp {pp}", "only tensor parallelism is written", fix)
    section = reader.config.get("quantization_config") or {}
    grids = set(getattr(reader, "quantized", {}).values())
    for grid in grids:
        why = _unread(str(section.get("quant_method")), grid)
        if why is None and tp > 1 and grid.inputs and not grid.inputs.dynamic:
            why = "static scales of inputs were loaded at TP 1 only"
        if why:
            raise Unsupported(f"--layout vllm of {section.get('quant_method')} in {grid.bits} bits", why, fix)
    stored = getattr(reader, "stored", reader.tensors)
    if isinstance(reader, QuantizedReader) and reader.ordered:
        raise Unsupported(f"--layout vllm of {min(reader.ordered)}", "vLLM refuses activation order", fix)
    odd = [name for name in stored if name.endswith((".k_scale", ".v_scale"))]
    if odd:
        raise Unsupported(f"--layout vllm with {odd[0]}", "where vLLM keeps calibrated scales is not known", fix)
    words = math.ceil(_vocabulary(reader) / _MULTIPLE) * _MULTIPLE
    if words % tp:
        raise Unsupported(f"--layout vllm with --tp {tp}", f"a vocabulary of {words} rows / {tp} is not whole", fix)


def _unread(method: str, grid: Grid) -> str | None:
    """Why vLLM's loader does not take such layers, or could not be tried; None for what it reads right."""
    if method not in METHODS:
        return f"only {', '.join(sorted(METHODS))} were loaded"
    if method == "gptq" and not grid.symmetric:
        return "vLLM refuses sym: false"
    if grid.bits == 4 and not grid.inputs:
        return None
    if method != "compressed-tensors" or grid.bits < 4 or not grid.inputs:
        return (
            f"vLLM's CPU build has no kernel for weights of {grid.bits} bits with float inputs, so it cannot be tried"
        )
    if grid.bits == 4 or grid.inputs.kind != grid.kind:
        return "4-bit weights with rounded inputs were not loaded"
    if grid.strategy == "block":
        return "vLLM's CPU build runs blocks on AMX only, so it cannot be tried"
    if grid.kind == "float" and not grid.inputs.dynamic:
        return "vLLM's CPU build stops at static scales of 8-bit floats (an empty function), so it cannot be tried"
    if grid.strategy != "channel" or grid.inputs.group is not None:
        return f"vLLM stacks the scales of fused layers, and scales per {grid.strategy} were not loaded so"
    return None if grid.symmetric else "vLLM reads W8A8 without zero points"


def write_vllm(
    shards: OpenShards, reader: CheckpointReader, work: Path, stage: Path, on_block: Callable[[], None]
) -> None:
    """Write every rank's files, config.json and the side files into the empty folder `stage`.

    shards: the model cut for the same degree, one stage. reader: the model itself. Raises Unsupported for layers that
    kernels would refuse.
    """
    blocks = range(len(shards.described.stages[0]))
    for rank in range(shards.described.tp):
        parts = work / f"vllm-{rank}"
        parts.mkdir(parents=True)
        for i in blocks:
            write_safetensors(parts / f"{i:05d}.safetensors", _block(shards, reader, rank, i))
            on_block()
        write_safetensors(parts / "outer.safetensors", _outer(shards, reader, rank))
        _merge(sorted(parts.iterdir()), work / f"merged-{rank}", stage, rank)
        shutil.rmtree(parts)
    _write_config(reader, stage)
    for path in reader.side_files():
        target = stage / path.relative_to(reader.folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)


def _block(shards: OpenShards, reader: CheckpointReader, rank: int, i: int) -> Tensors:
    prefix = f"model.layers.{i}."
    held = {
        name.removeprefix(prefix): read_tensor(info)
        for name, info in shards.ranks[0][rank].items()
        if name.startswith(prefix) and not name.endswith(_DROPPED)
    }
    for fused, names in FUSED.items():
        for suffix in {name.rpartition(".")[2] for name in held if name.rpartition(".")[0] == names[0]}:
            parts = [held.pop(f"{name}.{suffix}") for name in names]
            held[f"{fused}.{suffix}"] = _fuse(f"{prefix}{fused}", parts, suffix)
    for name, tensor in held.items():
        if name.endswith(".weight_scale") and f"{name.removesuffix('.weight_scale')}.weight" in held:
            held[name] = tensor.float()  # vLLM keeps the scales of 8-bit weights in fp32
    _check_sizes(shards, prefix, rank)
    return {f"{prefix}{name}": tensor for name, tensor in (*held.items(), *_attention(reader))}


def _fuse(name: str, parts: list[torch.Tensor], suffix: str) -> torch.Tensor:
    if suffix == "weight_shape":
        return torch.stack([torch.stack([part[0] for part in parts]).sum(), parts[0][1]])
    if suffix == "input_scale":
        if any(not torch.equal(part, parts[0]) for part in parts):
            why = "its parts have different static scales for the inputs that they share, and vLLM keeps one"
            raise Unsupported(f"--layout vllm of {name}", why, "quantize the model again with infopt")
        return parts[0].float()
    return torch.cat(parts, SIDES[suffix].index("rows"))


def _attention(reader: CheckpointReader) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters of vLLM's attention layer that no checkpoint has: scales of 1, offsets of 0."""
    for name in _SCALARS:
        yield f"self_attn.attn.{name}", torch.tensor(1.0)
    if (reader.config.get("quantization_config") or {}).get("quant_method") == "compressed-tensors":
        dtype = reader.tensors["model.norm.weight"].dtype
        for letter in "kvq":
            yield f"self_attn.attn.{letter}_scale", torch.ones(1)
            yield f"self_attn.attn.{letter}_zero_point", torch.zeros(1, dtype=dtype)


def _check_sizes(shards: OpenShards, prefix: str, rank: int) -> None:
    for name, op in shards.described.ops.items():
        if not name.startswith(prefix) or f"{name}.weight" not in shards.described.logical:
            continue
        for side, size in zip((op.rows, op.columns), op.shape, strict=True):
            mine = sum(stop - start for start, stop, _ in side[rank]) if side else size
            if mine % _KERNEL:
                why = f"a rank would have {mine} of its {size}, and kernels want multiples of {_KERNEL}"
                raise Unsupported(f"--layout vllm of {name}", why, "use a smaller --tp")


def _outer(shards: OpenShards, reader: CheckpointReader, rank: int) -> Tensors:
    """The rest: the vocabulary padded and divided anew, all others as they are."""
    held = {
        name: read_tensor(info)
        for name, info in shards.ranks[0][rank].items()
        if not name.startswith("model.layers.") and name not in VOCABULARY
    }
    tied = reader.config.get("tie_word_embeddings") is True or "lm_head.weight" not in shards.described.tensors
    for name in VOCABULARY[:1] if tied else VOCABULARY:
        whole = join(shards, name, shards.described.tensors[name])
        held["lm_head.weight" if tied else name] = _rows(whole, rank, shards.described.tp)
    return held


def _rows(whole: torch.Tensor, rank: int, tp: int) -> torch.Tensor:
    each = math.ceil(whole.shape[0] / _MULTIPLE) * _MULTIPLE // tp
    mine = whole[rank * each : (rank + 1) * each]
    padding = torch.zeros((each - mine.shape[0], *whole.shape[1:]), dtype=whole.dtype)
    return torch.cat([mine, padding])


def _vocabulary(reader: CheckpointReader) -> int:
    return reader.tensors[VOCABULARY[0]].shape[0]


def _merge(parts: list[Path], place: Path, stage: Path, rank: int) -> None:
    """Files under the names that vLLM looks for; it reads all parts of a rank, so they need no index."""
    place.mkdir()
    merge_shards(parts, place)
    (place / INDEX).unlink(missing_ok=True)
    for number, path in enumerate(sorted(place.iterdir())):
        os.replace(path, stage / f"model-rank-{rank}-part-{number}.safetensors")
    place.rmdir()


def _write_config(reader: CheckpointReader, stage: Path) -> None:
    """config.json as it is; gptq must also name its layers, which vLLM cannot tell from these files."""
    if (reader.config.get("quantization_config") or {}).get("quant_method") != "gptq":
        shutil.copyfile(reader.folder / "config.json", stage / "config.json")
        return
    layers = [list(names) for names in FUSED.values()]
    layers += [["self_attn.o_proj"], ["mlp.down_proj"]]
    section = {**reader.config["quantization_config"], "modules_in_block_to_quantize": layers}
    config = {**reader.config, "quantization_config": section}
    (stage / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
