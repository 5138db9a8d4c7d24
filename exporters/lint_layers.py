"""Rules of `infopt lint` about the layers themselves: scales, siblings that servers fuse, KV scales, shapes, groups.

Servers fuse q/k/v and gate/up into one weight by their names, so the names are the right question here, unlike where a
block's function is at stake (`infopt.calibration.discover` proves those without names).

Legend: O output channels, I input columns, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from infopt.exporters.lint_model import SCALES, Finding, Layer, Level, Model, found, quoted, values
from infopt.exporters.lint_scheme import packed_numbers
from infopt.header import TensorInfo, read_tensor

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
#: Names of layers that read an inner space: under tensor parallelism they are cut by their columns.
ROW_PARALLEL = ("o_proj", "down_proj", "out_proj", "c_proj", "dense", "dense_4h_to_h", "fc2", "w2", "wo")
_KV = ("k_scale", "v_scale")
_OTHER_SCALES = ("input_scale", "input_global_scale", "output_scale", "q_scale", *_KV)
_SMALL_TENSOR = 2**20


def scales(model: Model) -> Iterator[Finding]:
    """A scale that is NaN, infinite, zero or negative spoils its whole group, and no engine looks."""
    for layer in model.layers.values():
        for part, info in layer.parts.items():
            if part not in (*SCALES, *_OTHER_SCALES) or not info.dtype.is_floating_point:
                continue
            signed = part == "scales" and "biases" in layer.parts  # MLX: the sign is free
            for problem in _problems(info, zero=True, negative=not signed):
                yield found("scale", "error", info, problem, "quantize the layer again")


def numbers_in_weights(model: Model) -> Iterator[Finding]:
    """Small tensors (norms, biases) must be finite; all others too where the whole model is to be read."""
    for name, info in model.tensors.items():
        part = name.rpartition(".")[2]
        if not info.dtype.is_floating_point or part in (*SCALES, *_OTHER_SCALES):
            continue
        if model.deep or info.nbytes <= _SMALL_TENSOR:
            for problem in _problems(info, zero=False, negative=False):
                yield found("not-finite", "error", info, problem, "download or quantize the model again")


def _problems(info: TensorInfo, zero: bool, negative: bool) -> Iterator[str]:
    counts = {"not finite": 0, "zero": 0, "negative": 0}
    for piece in values(info):
        counts["not finite"] += int((~torch.isfinite(piece)).sum())
        counts["zero"] += int((piece == 0).sum()) if zero else 0
        counts["negative"] += int((piece < 0).sum()) if negative else 0
    for kind, count in counts.items():
        if count:
            yield f"{count} of its values {'is' if count == 1 else 'are'} {kind}"


def fused_siblings(model: Model) -> Iterator[Finding]:
    """q/k/v and gate/up become one weight in servers: one scheme, one group size, one per-tensor scale. MLX fuses nothing."""
    layers = model.layers if model.method != "mlx" else {}
    for name in sorted(layers):
        parent, _, last = name.rpartition(".")
        names = next((names for names in FUSED if names[0] == last), None)
        group = [layers[f"{parent}.{other}"] for other in names or () if f"{parent}.{other}" in layers]
        if len(group) < 2 or not any(layer.quantized for layer in group):
            continue
        schemes = {layer.last: _scheme(layer) for layer in group}
        if len(set(schemes.values())) > 1:
            told = "; ".join(f"{last}: {scheme}" for last, scheme in schemes.items())
            message = f"servers fuse these layers, and they differ: {told}"
            fix = "quantize all of them with one scheme, or leave all of them out"
            yield found("fused-siblings", "error", group[0].info(), message, fix)
        else:
            yield from _one_scale(group)


def _scheme(layer: Layer) -> str:
    """What must be equal, in words: which tensors there are, their types, and how many columns share a scale."""
    if not layer.quantized:
        return "not quantized"
    parts = []
    for part, info in sorted(layer.parts.items()):
        if part != "bias":
            parts.append(f"{part} {str(info.dtype).removeprefix('torch.')}{_ratio(layer, part)}")
    return ", ".join(parts)


def _ratio(layer: Layer, part: str) -> str:
    """The sizes along the input columns, which siblings have in common: "[64]" packed words, "[8]" groups."""
    shape = layer.parts[part].shape
    if len(shape) != 2 or part == "weight_shape":
        return ""
    along = 0 if "qweight" in layer.parts else 1
    return f" [{shape[along]}]"


def _one_scale(group: list[Layer]) -> Iterator[Finding]:
    for part in ("weight_global_scale", "weight_scale", "weight_scale_2", "input_scale", "input_global_scale"):
        infos = [layer.parts[part] for layer in group if part in layer.parts]
        if len(infos) < 2 or any(_count(info) != 1 for info in infos):
            continue
        numbers = [float(read_tensor(info).float().reshape(-1)[0]) for info in infos]
        if len(set(numbers)) > 1:
            message = (
                f"fused siblings have scales of their own ({', '.join(f'{n:.6g}' for n in numbers)}); servers take one"
            )
            level: Level = (
                "info" if part == "weight_scale" else "warning"
            )  # vLLM rescales weights to the largest, with a loss
            yield found("fused-siblings", level, infos[0], message, "give them one common scale")


def kv_scales(model: Model) -> Iterator[Finding]:
    """Calibrated KV scales that are absent, partly absent, or stored where nobody looks are served as 1.0."""
    scheme = model.quantization.get("kv_cache_scheme")
    dynamic = isinstance(scheme, dict) and scheme.get("dynamic") is True  # such scales are found while the model runs
    asked = bool(scheme or model.quantization.get("kv_cache_quant_algo")) and not dynamic
    have: dict[str, set[str]] = {part: set() for part in _KV}
    for name, info in model.tensors.items():
        module, _, part = name.rpartition(".")
        if part in _KV:
            have[part].add(module.removesuffix(".k_proj").removesuffix(".v_proj"))
        if part == "output_scale" and model.method == "compressed-tensors":
            message = "a KV scale under this name is not read: the cache runs at 1.0, or loading fails"
            yield found("kv-scale", "error", info, message, "name it self_attn.k_scale or self_attn.v_scale")
    attention = {
        name.rpartition(".")[0] for name, layer in model.layers.items() if layer.last in ("k_proj", "qkv_proj")
    }
    for part, places in have.items():
        other = have[_KV[0] if part == _KV[1] else _KV[1]]
        wanted = (attention if asked else set()) | other
        if absent := sorted(wanted - places):
            message = f"{part} is missing in {len(absent)} of {len(wanted)} layers ({quoted(absent)}): 1.0 is used"
            yield found("kv-scale", "error", "config.json", message, "calibrate the KV cache again")
    stored = have["k_scale"] | have["v_scale"]
    if stored and not asked:
        message = f"KV scales of {len(stored)} layers are stored, and kv_cache_scheme is not set: they are dropped"
        yield found("kv-scale", "warning", "config.json", message, "set kv_cache_scheme in quantization_config")


def act_order(model: Model) -> Iterator[Finding]:
    """Columns in activation order need every group on every rank, and most engines have stopped reading them."""
    described = model.quantization.get("desc_act") is True
    if described and model.quantization.get("group_size") != -1:
        message = "desc_act with groups: vLLM refuses it, and row-parallel layers go wrong under tensor parallelism"
        yield found("act-order", "warning", "config.json", message, "quantize again with static groups")
    for layer in model.layers.values():
        info = layer.parts.get("g_idx")
        if info is None or info.dtype not in (torch.int32, torch.int64) or described:
            continue
        groups_I = read_tensor(info)
        if bool((groups_I[1:] < groups_I[:-1]).any()):
            message = "its columns are in activation order, and the config does not say so: engines drop g_idx"
            yield found("act-order", "error", info, message, "set desc_act to true, or quantize with static groups")


def group_degrees(model: Model) -> Iterator[Finding]:
    """Row-parallel layers are cut between groups: too few groups, or an odd number, rule degrees out."""
    told: set[tuple[int, int]] = set()
    numbers = packed_numbers(model)
    heads = model.text_config.get("num_attention_heads", model.text_config.get("n_head"))
    heads = heads if type(heads) is int else 8  # a degree that the heads refuse anyway is not the groups' fault
    for layer in model.layers.values():
        size = _columns_and_groups(model, layer, numbers) if layer.last in ROW_PARALLEL else None
        if size is None or size[1] <= 1 or size in told:
            continue
        told.add(size)
        columns, groups = size
        degrees = [tp for tp in range(1, groups + 1) if groups % tp == 0]
        refused = [tp for tp in (2, 4, 8) if columns % tp == 0 and heads % tp == 0 and groups % tp]
        arithmetic = f"{columns} / {columns // groups} = {groups} groups: TP {', '.join(map(str, degrees[:6]))}"
        arithmetic += ", ... only" if len(degrees) > 6 else " only"
        if model.tp and groups % model.tp:
            fix = f"pad it (infopt shard --pad), or use a group size that divides {columns} / {model.tp}"
            yield found("group-degrees", "error", layer.info(), arithmetic, fix)
        elif refused and not model.tp:
            level: Level = "warning" if 2 in refused else "info"
            fix = "pad the layer (infopt shard --pad), or use smaller groups"
            yield found("group-degrees", level, layer.info(), arithmetic, fix)


def head_degrees(model: Model) -> Iterator[Finding]:
    """Attention heads are cut whole; those of keys and values are also replicated, whole."""
    tp, heads = model.tp, model.text_config.get("num_attention_heads", model.text_config.get("n_head"))
    shared = model.text_config.get("num_key_value_heads") or heads
    if not tp or type(heads) is not int or type(shared) is not int or min(heads, shared) < 1:
        return
    fix = f"choose a degree that divides {heads}"
    if heads % tp:
        yield found("head-degrees", "error", "config.json", f"{heads} heads / {tp} is not whole", fix)
    elif shared % tp and tp % shared:
        message = f"{shared} key-value heads cannot be divided among {tp} ranks, nor {tp} ranks among them"
        yield found("head-degrees", "error", "config.json", message, fix)


def block_degrees(model: Model) -> Iterator[Finding]:
    """A rank's part of a weight with scales for blocks must be whole blocks."""
    block = _block(model)
    told: set[tuple[int, int]] = set()
    if not model.tp or block is None:
        return
    for layer in model.layers.values():
        weight = layer.parts.get("weight")
        if not layer.quantized or weight is None or len(weight.shape) != 2:
            continue
        side = 1 if layer.last in ROW_PARALLEL else 0
        size, width = weight.shape[side], block[side]
        if (size, width) not in told and size % (model.tp * width):
            told.add((size, width))
            message = f"{size} / {model.tp} ranks is no whole number of blocks of {width}"
            fix = f"use a smaller degree, or pad {size} to a multiple of {model.tp * width}"
            yield found("group-degrees", "error", layer.info(), message, fix)


def _block(model: Model) -> tuple[int, int] | None:
    """Rows and columns of the blocks that have scales of their own, as the section says; None where there are none."""
    listed = [model.quantization.get("weight_block_size")]
    groups = model.quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        listed.append(weights.get("block_structure") if isinstance(weights, dict) else None)
    for block in listed:
        if isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block):
            return block[0], block[1]
    return None


def _columns_and_groups(
    model: Model, layer: Layer, numbers: Mapping[str, tuple[object, object]]
) -> tuple[int, int] | None:
    parts = layer.parts
    if "qweight" in parts and "scales" in parts and len(parts["scales"].shape) == 2:
        words, bits = parts["qweight"].shape[0], numbers.get(layer.name, (None, None))[0]
        columns = words if model.method == "awq" else words * 32 // bits if type(bits) is int and bits > 0 else 0
        return (columns, parts["scales"].shape[0]) if columns else None
    scale = parts.get("weight_scale")
    if not layer.quantized or scale is None or len(scale.shape) != 2:
        return None
    shape = _logical(layer)
    return (shape[1], scale.shape[1]) if shape and scale.shape[0] == shape[0] else None  # and not blocks of rows


def _logical(layer: Layer) -> tuple[int, int] | None:
    """[O, I] of a compressed-tensors layer, as its own tensors say."""
    if "weight_shape" in layer.parts:
        info = layer.parts["weight_shape"]
        if info.dtype not in (torch.int64, torch.int32) or info.shape != (2,):
            return None
        rows, columns = read_tensor(info).tolist()
        return int(rows), int(columns)
    weight = layer.parts.get("weight")
    if weight is None or len(weight.shape) != 2 or weight.dtype in (torch.uint8, torch.uint32):  # two codes to a byte
        return None
    return weight.shape[0], weight.shape[1]


def shapes(model: Model) -> Iterator[Finding]:
    """Packed tensors that contradict each other or the section, and sizes that kernels refuse."""
    numbers = packed_numbers(model)
    for layer in model.layers.values():
        if not layer.quantized:
            continue
        flat = "qweight" in layer.parts
        for message in _flat_shapes(model, layer, *numbers.get(layer.name, ())) if flat else _packed_shapes(layer):
            yield found("shape", "error", layer.info(), message, "quantize the layer again")
        logical = _logical(layer)
        if logical and any(side % 32 for side in logical):
            message = f"{logical[0]} x {logical[1]} is not a multiple of 32: vLLM's and Marlin's kernels refuse it"
            yield found("shape", "warning", layer.info(), message, "leave this layer out, or pad the model")


def _flat_shapes(model: Model, layer: Layer, bits: object = None, size: object = None) -> Iterator[str]:
    """gptq and awq: qweight, qzeros and scales against bits and group_size."""
    missing = [part for part in ("scales", "qzeros") if part not in layer.parts]
    if missing:
        yield f"{quoted(missing)} is missing"
        return
    q, zeros, scale = (layer.parts[part].shape for part in ("qweight", "qzeros", "scales"))
    if (
        not isinstance(bits, int)
        or not isinstance(size, int)
        or bits not in (2, 3, 4, 8)
        or not (size == -1 or size > 0)
    ):
        return
    if not len(q) == len(zeros) == len(scale) == 2:
        return
    columns, rows = (q[0], q[1] * 32 // bits) if model.method == "awq" else (q[0] * 32 // bits, q[1])
    groups = 1 if size == -1 else -(-columns // size)
    if scale != (groups, rows):
        yield f"scales are {list(scale)}; {rows} x {columns} in groups of {size} makes them [{groups}, {rows}]"
    if zeros != (groups, -(-rows * bits // 32)):
        yield f"qzeros are {list(zeros)}; they should be [{groups}, {-(-rows * bits // 32)}]"


def _packed_shapes(layer: Layer) -> Iterator[str]:
    """compressed-tensors: weight_packed, weight_scale and weight_shape against each other."""
    packed, scale, shape = (layer.parts.get(part) for part in ("weight_packed", "weight_scale", "weight_shape"))
    if scale is None and not any(part in layer.parts for part in (*SCALES, "_weight_scale", "scale")):
        yield "it has no scale"
        return
    logical = _logical(layer)
    if shape is not None and logical is None:
        yield f"weight_shape is {shape.dtype} {list(shape.shape)}, not two whole numbers"
    if logical is None or scale is None:
        return
    rows, columns = logical
    if packed is not None and (len(packed.shape) != 2 or packed.shape[0] != rows):
        yield f"weight_packed is {list(packed.shape)}, and weight_shape says {rows} rows"
    per_row = len(scale.shape) == 2 and scale.shape[0] == rows
    if packed is not None and per_row and (not scale.shape[1] or columns % scale.shape[1]):
        yield f"{scale.shape[1]} groups do not divide {columns} columns"


def quantized_head(model: Model) -> Iterator[Finding]:
    """transformers converts no head of a gptq model, and computes with random numbers."""
    for layer in model.layers.values():
        if layer.last == "lm_head" and layer.quantized and model.method == "gptq":
            message = "the head is quantized: transformers leaves it out without a word"
            yield found("quantized-head", "warning", layer.info(), message, "serve it with vLLM or GPTQModel only")


def _count(info: TensorInfo) -> int:
    return torch.Size(info.shape).numel()
