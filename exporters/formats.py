"""The table of formats that hold codes, and the question whether one can hold a model.

`check` is asked before any work. It names the op and the reason, and the nearest format that can hold everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infopt.errors import Unsupported, UsageError
from infopt.exporters import awq, compressed_tensors, gguf_blocks, gptq, hf_fp8, mlx
from infopt.exporters.quantized import Format, Holder, Shape
from infopt.grid import Grid

FORMATS = {
    form.name: form for form in (compressed_tensors.FORMAT, gptq.V1, gptq.V2, awq.FORMAT, hf_fp8.FORMAT, mlx.FORMAT)
}

#: written as one GGUF file; while a model is still codes they are folders in the layout of compressed-tensors
GGUF_FORMATS = {form.name: form for form in (gguf_blocks.GGUF, gguf_blocks.GGUF_Q8_0)}
PLAIN = "safetensors"


def named(name: str) -> Format:
    """The format as the command line spells it; UsageError for others."""
    known = FORMATS | GGUF_FORMATS
    if name not in known:
        raise UsageError(f"--format {name}", f"known: {', '.join(known)}", "--format compressed-tensors")
    return known[name]


def for_settings(settings: Any) -> Format | None:
    """The format of a folder by its quantization_config, None for one that infopt does not read."""
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method == "gptq":
        version = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        return FORMATS.get(version) if version in ("gptq", "gptq_v2") else None
    if mlx.is_section(settings):
        return mlx.FORMAT
    return FORMATS[method] if method in ("compressed-tensors", "awq", "fp8") else None


def objection(form: Holder, ops: Mapping[str, tuple[Grid, Shape]]) -> str | None:
    """Why the format cannot hold these ops, naming the first that it cannot; None if it can."""
    for name, (grid, shape) in ops.items():
        if why := form.refuses(grid, shape):
            return f"{name} [{shape[0]}, {shape[1]}]: {why}"
    grids = {form.settled(grid) for grid, _ in ops.values()}
    if len(grids) > 1 and not form.mixed:
        return f"all layers must be quantized alike, and these have {len(grids)} different grids"
    return None


def check(form: Holder, ops: Mapping[str, tuple[Grid, Shape]]) -> None:
    """Raise Unsupported, with the nearest format that can, unless the format holds all of these ops."""
    why = objection(form, ops)
    if why is None:
        return
    able = next((other.name for other in others(form.name) if objection(other, ops) is None), None)
    fix = f"--format {able}" if able else "choose other --bits, --group-size or --sym"
    raise Unsupported(f"the format {form.name} cannot hold this model", why, fix)


def others(name: str) -> list[Format]:
    """The formats to try where this one will not do, the best guess first: its other version, then the table's order."""
    table = GGUF_FORMATS if name in GGUF_FORMATS else FORMATS
    order = sorted(table, key=lambda other: not other.startswith(name.removesuffix("_v2")))
    return [table[other] for other in order if other != name]
