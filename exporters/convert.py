"""A model folder in another format, its codes carried over where both formats can hold them.

What happens to each layer is settled first (carry.py). Then one block at a time is read, written and freed, and the written
folder is read back and compared.

A source is trusted no more than by any other command: its manifest and its solver's digests, where it has them, must hold,
or the damage would be carried over and blessed with new ones.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import infopt
from infopt.checkpoint import CheckpointReader
from infopt.errors import InfoptError, Unsupported, VerificationFailed
from infopt.exporters.carry import Carry, Loss, carried_tensor, model_dtype, plan_carry, round_nearest, say
from infopt.exporters.folder import model_config, open_model, prove, write_folder
from infopt.exporters.gguf_blocks import GGUF_Q8_0
from infopt.exporters.gguf_export import GGUFExport
from infopt.exporters.gguf_kquants import KQUANTS
from infopt.exporters.quantized import Format, QuantizedReader, damaged, is_cache_tensor
from infopt.header import read_json, read_tensor
from infopt.memory import release
from infopt.model import Skeleton
from infopt.output import MANIFEST, OutputFolder, check_manifest, merge_shards, write_json, write_safetensors
from infopt.qtensor import QTensor

_REPORT = "infopt.json"


@dataclass(frozen=True)
class Converted:
    """What was done, by the names of layers; `copied` counts tensors that were not quantized and stayed as they were.

    left_out: the scales of a key-value cache, where the target has no place for them and a loss was agreed to.
    """

    output: str
    source_format: str
    format: str
    carried: list[str]
    requantized: list[str]
    dequantized: list[str]
    copied: int
    left_out: list[str] = field(default_factory=list)


def convert_folder(
    source: Path,
    output: Path,
    form: Format | None,
    loss: Loss | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Converted:
    """Write `output` in the format `form`; None is plain safetensors. dtype: of dequantized weights, the model's own if None.

    Raises Unsupported, before any work, where codes cannot be carried and `loss` does not say what to do instead;
    VerificationFailed for a damaged source; BadInput.
    """
    reader = open_model(source)
    if not isinstance(reader, QuantizedReader):
        raise _not_quantized(source, form)
    if (source / MANIFEST).exists():
        check_manifest(source)
    skeleton = Skeleton(model_config(reader.config), reader)
    left_out = _left_out(reader, form, loss)
    plan = plan_carry(reader, skeleton, form, loss)
    with OutputFolder(output, overwrite=overwrite, source=source) as folder:
        for left in (*folder.stage.iterdir(), *folder.work.glob("part-*")):
            left.unlink()  # of an interrupted run, perhaps of another source
        try:
            digests, copied = _write_weights(reader, skeleton, plan, form, dtype or model_dtype(reader.config), folder)
            _write_rest(reader, plan, form, dtype, digests, folder.stage)
            prove(folder.stage, digests)
        except InfoptError:
            folder.discard()  # there is nothing to go on from
            raise
        folder.commit()
    return Converted(
        str(output), reader.form.name, form.name if form else "safetensors",
        sorted(plan.carried), plan.requantized, sorted(plan.dequantized), copied, left_out,
    )  # fmt: skip


def convert_to_gguf(
    source: Path,
    output: Path,
    form: Format | str,
    loss: Loss | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    tokenizer: bool = True,
) -> Converted:
    """Write the folder `output` with `model.gguf` in it, from a quantized folder or a float one. form: a format that holds
    codes, or the name of a K-quant, which every linear layer is rounded to.

    Raises as `convert_folder`, and Unsupported for models and tokenizers that GGUF or infopt's writer cannot say.
    """
    if (source / MANIFEST).exists():
        check_manifest(source)
    with OutputFolder(output, overwrite=overwrite, source=source) as folder:
        for left in folder.stage.iterdir():
            left.unlink()
        try:
            reader = open_model(source)
            if isinstance(form, str):
                done = write_kquants(reader, folder.stage, form, loss, tokenizer)
            else:
                done = write_gguf(reader, folder.stage, form, loss, dtype, tokenizer)
        except InfoptError:
            folder.discard()
            raise
        folder.commit()
    return replace(done, output=str(output))


def write_gguf(
    reader: CheckpointReader, stage: Path, form: Format, loss: Loss | None, dtype: torch.dtype | None, tokenizer: bool
) -> Converted:
    """Write `model.gguf`, infopt.json and the licence into `stage`; nothing else of the folder is any use beside them."""
    skeleton = Skeleton(model_config(reader.config), reader)
    quantized = reader if isinstance(reader, QuantizedReader) else None
    left_out = _left_out(quantized, form, loss) if quantized else []
    plan = plan_carry(quantized, skeleton, form, loss) if quantized else None
    export = GGUFExport(reader, skeleton, plan, form is GGUF_Q8_0, dtype or model_dtype(reader.config))
    if quantized and plan:
        _check_digests(quantized, plan)
    digests = export.write(stage / "model.gguf", tokenizer)
    carry = plan or Carry({}, frozenset(), frozenset(), {}, [])
    name = quantized.form.name if quantized else "safetensors"
    write_json(stage / _REPORT, _report(reader.folder, name, form.name, carry, digests))
    _copy_beside_gguf(reader, stage)
    copied = len(export.tensors) - len(carry.modules)
    return Converted(
        str(stage),
        name,
        form.name,
        sorted(carry.carried),
        carry.requantized,
        sorted(carry.dequantized),
        copied,
        left_out,
    )


def write_kquants(reader: CheckpointReader, stage: Path, name: str, loss: Loss | None, tokenizer: bool) -> Converted:
    """As `write_gguf`, with every linear layer of the blocks rounded anew; Unsupported unless that was asked for."""
    if loss != "requantize":
        why = (
            "its scales are integers of their own kind, so every layer is rounded again, also one that is codes already"
        )
        raise Unsupported(f"{name} is only made by rounding", why, "--requantize")
    quantized = reader if isinstance(reader, QuantizedReader) else None
    left_out = _cache_tensors(quantized) if quantized else []
    skeleton = Skeleton(model_config(reader.config), reader)
    export = GGUFExport(reader, skeleton, None, False, model_dtype(reader.config), KQUANTS[name])
    export.write(stage / "model.gguf", tokenizer)
    source = quantized.form.name if quantized else "safetensors"
    rounded = export.rounded()
    report = _report(reader.folder, source, name, Carry({}, frozenset(), frozenset(), {}, []), {})
    report["conversions"][-1]["requantized"] = rounded
    write_json(stage / _REPORT, report)
    _copy_beside_gguf(reader, stage)
    copied = len(export.tensors) - len(rounded)
    return Converted(str(stage), source, name, [], sorted(rounded), [], copied, left_out)


def replace_by_gguf(folder: OutputFolder, form: Format, tokenizer: bool) -> None:
    """The stage's quantized folder becomes a GGUF file; the verdict on its codes stays, since they are the same."""
    made = folder.work / "gguf"
    made.mkdir(exist_ok=True)
    write_gguf(open_model(folder.stage), made, form, None, None, tokenizer)
    for path in folder.stage.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "verification.json":
            path.unlink()
    for path in made.iterdir():
        path.rename(folder.stage / path.name)


def _not_quantized(source: Path, form: Format | None) -> Unsupported:
    what = f"{source} is not quantized"
    if form is None:
        return Unsupported(what, "it is plain safetensors already", f"cp -r {source} OUT")
    return Unsupported(
        what,
        "convert carries codes over and makes none",
        f"infopt quantize {source} --method awq --format {form.name} -o OUT",
    )


def _left_out(reader: QuantizedReader, form: Format | None, loss: Loss | None) -> list[str]:
    """The stored scales of a key-value cache that the target cannot hold; Unsupported unless a loss was agreed to."""
    names = _cache_tensors(reader)
    if form is not None and form.name == "compressed-tensors":
        return []
    if names and loss is None:
        raise Unsupported(
            f"{form.name if form else 'plain safetensors'} says nothing about a key-value cache",
            f"{len(names)} calibrated scales would be lost, the first is {names[0]}",
            "--format compressed-tensors, or --requantize or --dequantize to leave them out",
        )
    return names


def _cache_tensors(reader: QuantizedReader) -> list[str]:
    return [name for name in reader.stored if is_cache_tensor(name)]


# Writing


def _write_weights(
    reader: QuantizedReader,
    skeleton: Skeleton,
    plan: Carry,
    form: Format | None,
    dtype: torch.dtype,
    folder: OutputFolder,
) -> tuple[dict[str, str], int]:
    """Write the shards; gives the digest of each layer that is still codes, and the number of copied tensors."""
    claimed = _digests(reader.folder)
    digests: dict[str, str] = {}
    parts: list[Path] = []
    copied = 0
    cache = _cache_tensors(reader) if form is not None and form.name == "compressed-tensors" else []
    for keys in _portions(skeleton, cache):
        tensors: dict[str, torch.Tensor] = {}
        for key in keys:
            name = key.removesuffix(".weight")
            if name not in plan.modules or name == key:
                tensors[key] = read_tensor(reader.stored[key])
                copied += 1
            elif name in plan.grids and form is not None:
                q = _converted(reader, name, plan, claimed)
                tensors |= form.encode(name, q)
                digests[name] = q.digest()
            else:
                tensors[key] = _dense(reader, key, dtype)
        parts.append(folder.work / f"part-{len(parts):05d}.safetensors")
        write_safetensors(parts[-1], tensors)
        tensors.clear()
        release()
    merge_shards(parts, folder.stage)
    return digests, copied


def _portions(skeleton: Skeleton, cache: list[str]) -> Iterator[list[str]]:
    """The order in which `infopt quantize` writes, so that a model converted there and back has its old bytes.

    cache: the cache's scales, which lie beside their block's tensors.
    """
    yield [*skeleton.outer_keys(), *skeleton.extra_keys()]
    for i in range(len(skeleton.blocks)):
        keys = skeleton.block_keys(i)
        modules = {key.rpartition(".")[0].rpartition(".")[0] for key in keys}
        yield [*keys, *(name for name in cache if name.rpartition(".")[0] in modules)]


def _converted(reader: QuantizedReader, name: str, plan: Carry, claimed: dict[str, str]) -> QTensor:
    grid = plan.grids[name]
    if name not in plan.carried:
        w = reader.get(f"{name}.weight")
        return round_nearest(name, w.T if name in reader.transposed else w, grid)
    q = reader.qtensor(name)
    _check_digest(reader, name, q, claimed)
    return carried_tensor(name, q, grid)


def _check_digests(reader: QuantizedReader, plan: Carry) -> None:
    claimed = _digests(reader.folder)
    for name in plan.carried if claimed else ():
        _check_digest(reader, name, reader.qtensor(name), claimed)


def _check_digest(reader: QuantizedReader, name: str, q: QTensor, claimed: dict[str, str]) -> None:
    if claimed.get(name, q.digest()) != q.digest():
        raise VerificationFailed(
            f"{reader.folder}: {name} is not what the solver made",
            f"its digest is not the one in {_REPORT}",
            "quantize the model again, or fetch an undamaged copy",
        )


def _dense(reader: QuantizedReader, key: str, dtype: torch.dtype) -> torch.Tensor:
    w = reader.get(key).to(dtype)
    if not bool(torch.isfinite(w).all()):
        raise Unsupported(
            f"{key} has values that are not finite as {say(dtype)}", "its range is too small", "--dtype float32"
        )
    return w


def _write_rest(
    reader: QuantizedReader,
    plan: Carry,
    form: Format | None,
    dtype: torch.dtype | None,
    digests: dict[str, str],
    stage: Path,
) -> None:
    settings = None
    if form is not None and plan.grids:
        grids = {plan.modules[name]: grid for name, grid in plan.grids.items()}
        settings = form.config(grids, plan.kept, reader.transposed & plan.grids.keys())
        scheme = (reader.config.get("quantization_config") or {}).get("kv_cache_scheme")
        if scheme is not None and form.name == "compressed-tensors":
            settings["kv_cache_scheme"] = scheme
    changed: dict[str, Any] = {}
    if dtype is not None and plan.dequantized:
        changed = {key: say(dtype) for key in ("dtype", "torch_dtype") if key in reader.config} or {"dtype": say(dtype)}
    write_folder(stage, reader, settings, changed)
    _copy_recipe(reader.folder, stage)
    target = form.name if form else "safetensors"
    write_json(stage / _REPORT, _report(reader.folder, reader.form.name, target, plan, digests))


def _copy_beside_gguf(reader: CheckpointReader, stage: Path) -> None:
    _copy_recipe(reader.folder, stage)
    for path in reader.side_files():
        if path.name.upper().startswith(("LICEN", "NOTICE", "USE_POLICY")):
            (stage / path.name).write_bytes(path.read_bytes())


def _copy_recipe(folder: Path, stage: Path) -> None:
    recipe = folder / "recipe.yaml"
    if recipe.is_file() and not recipe.is_symlink():
        (stage / recipe.name).write_bytes(recipe.read_bytes())


def _report(folder: Path, source: str, target: str, plan: Carry, digests: dict[str, str]) -> dict[str, Any]:
    """The source's infopt.json, where it has one, with this step's layers and its own record."""
    old = _source_report(folder)
    layers = old.get("layers", {})
    described = {
        name: {
            **(layers.get(name, {}) if name in plan.carried else {"error": None}),
            "bits": grid.bits,
            "group_size": grid.group or "channel",
            "symmetric": grid.symmetric,
            "digest": digests[name],
        }
        for name, grid in plan.grids.items()
    }
    record = {
        "from": source,
        "to": target,
        "infopt": infopt.__version__,
        "requantized": plan.requantized,
        "dequantized": sorted(plan.dequantized),
    }
    rewritten = [*old.get("rewritten", []), *(f"{name}.weight" for name in sorted(plan.dequantized))]
    history = [*old.get("conversions", []), record]
    return {**old, "layers": described, "rewritten": rewritten, "conversions": history}


def _source_report(folder: Path) -> dict[str, Any]:
    """infopt.json as far as it is one; {} for a folder of another tool. BadInput where it is damaged."""
    if not (folder / _REPORT).exists():
        return {}
    report = read_json(folder / _REPORT)
    kinds = {"layers": dict, "rewritten": list, "conversions": list}
    odd = not isinstance(report, dict) or any(not isinstance(report.get(k, kind()), kind) for k, kind in kinds.items())
    if odd or not all(isinstance(entry, dict) for entry in report.get("layers", {}).values()):
        raise damaged(f"{folder / _REPORT} is no report of infopt", "`layers` must map names to their reports")
    return report


def _digests(folder: Path) -> dict[str, str]:
    layers = _source_report(folder).get("layers", {})
    return {name: str(entry["digest"]) for name, entry in layers.items() if "digest" in entry}
