"""A model folder as a whole: which reader opens it, and what an exported one carries besides tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from infopt.checkpoint import CheckpointReader, contained
from infopt.errors import Unsupported, VerificationFailed
from infopt.exporters import mlx
from infopt.exporters.formats import for_settings
from infopt.exporters.quantized import QuantizedReader
from infopt.header import read_json, show


def open_model(folder: Path) -> CheckpointReader | QuantizedReader:
    """The reader for a folder, by its config's quantization_config; Unsupported for formats that infopt does not read."""
    reader = CheckpointReader(folder)
    settings = reader.config.get("quantization_config") or reader.config.get("quantization") or _old_settings(reader)
    if not settings:
        return reader
    form = for_settings(settings)
    if form is None:
        names = ("quant_method", "checkpoint_format", "format", "version")
        said = {name: settings[name] for name in names if name in settings} if isinstance(settings, dict) else settings
        raise Unsupported(
            f"{folder}: the model is quantized already, as {show(said)}",
            "infopt reads compressed-tensors, gptq, awq, fp8 in blocks, MLX's affine groups, and unquantized folders",
            "give the original model",
        )
    return QuantizedReader(folder, form, settings)


def _old_settings(reader: CheckpointReader) -> Any:
    """What AutoGPTQ and AutoAWQ wrote beside config.json before transformers gave them a place in it."""
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        path = contained(reader.folder, name)
        if any(key.endswith(".qweight") for key in reader.tensors) and path.exists():
            settings = read_json(path)
            return {"quant_method": method, **settings} if isinstance(settings, dict) else settings
    return None


def model_config(config: dict[str, Any]) -> dict[str, Any]:
    """A folder's config without its quantization: what the model definition is built from."""
    return {
        key: value
        for key, value in config.items()
        if key != "quantization_config" and not (key == "quantization" and mlx.is_section(value))
    }


def write_folder(
    stage: Path,
    source: CheckpointReader,
    quantization: dict[str, Any] | None,
    changed: dict[str, Any] | None = None,
) -> None:
    """Everything but the weights: config.json with `quantization_config` added, all other keys and their spelling kept
    (transformers 5 rewrites rope settings in a way that version 4 misreads), and the source's side files byte for byte.

    quantization: None for plain weights. changed: keys of config.json with a new value."""
    config = {**model_config(source.config), **(changed or {})}
    if quantization is not None:
        config["quantization_config"] = quantization
        if mlx.is_section(quantization):
            config["quantization"] = quantization  # the older of the two names, which mlx-lm reads first
    (stage / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for path in source.side_files():
        target = stage / path.relative_to(source.folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)


def prove(stage: Path, digests: dict[str, str]) -> None:
    """Read a folder back: every layer must decode to the codes, scales and zero points that were meant."""
    written = open_model(stage)
    seen = {}
    if isinstance(written, QuantizedReader):
        seen = {name: written.qtensor(name).digest() for name in written.quantized}
    wrong = sorted(name for name in seen.keys() | digests.keys() if seen.get(name) != digests.get(name))
    if wrong:
        raise VerificationFailed(f"{wrong[0]} was not written as meant", f"{len(wrong)} such layers", "report this bug")
