"""A rewrite and a quantization in one recipe: its `rewrite` section is done first, the rest on what came out.

Each step is verified on its own (the rewritten model against the original, the quantized one against the rewritten) and the
result against the original. `infopt.json` of the result has the lineage: for each step what it was asked, what it read and how
far it went. The rewritten folder lies in the work folder of the run; a killed run finds it there, known by its fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from infopt.checkpoint import CheckpointReader
from infopt.errors import BadInput, UsageError, VerificationFailed
from infopt.header import read_json
from infopt.output import MANIFEST, OutputFolder, check_manifest, update_manifest, write_json
from infopt.recipe import Recipe, did_you_mean
from infopt.recipes.marks import BlockReport
from infopt.recipes.rewrite import RewriteRun
from infopt.rewriters.options import RewriteOptions
from infopt.runtime.verify import verify


@dataclass(frozen=True)
class Rewritten:
    """The first step's result. step: its entry in the lineage. tensors: those that are not the original's."""

    folder: Path
    step: dict[str, Any]
    tensors: list[str]


def rewrite_options(recipe: Recipe) -> RewriteOptions | None:
    """What the recipe's `rewrite` section asks for; UsageError for an unknown key or a value of another type."""
    if recipe.rewrite is None:
        return None
    known = {field.name: field for field in fields(RewriteOptions)}
    for key, value in recipe.rewrite.items():
        if key not in known:
            raise UsageError(f"rewrite.{key}", "there is no such key", did_you_mean(key, list(known)))
        if type(value).__name__ not in str(known[key].type) and not (type(value) is int and known[key].type == "float"):
            raise UsageError(f"rewrite.{key}: {value!r}", f"it must be of type {known[key].type}", f"correct {key}")
    options = RewriteOptions(**{"curve": False, **recipe.rewrite})
    if options.rotate:
        raise UsageError("rewrite.rotate", "the recipe itself has this switch", "rotate: true, outside of `rewrite`")
    return options


def rewrite_first(
    reader: CheckpointReader,
    options: RewriteOptions,
    output: OutputFolder,
    windows_NT: Tensor | None,
    data_report: dict[str, Any] | None,
    compared_NT: Tensor | None,
    resume: bool,
    on_block: Callable[[BlockReport, bool], None],
    on_step: Callable[[int, float], None] | None = None,
) -> Rewritten:
    """Rewrite into the work folder of `output`, verified against the original; or find it there from an earlier run."""
    folder, mark = output.work / "rewritten", output.work / "rewritten.json"
    with OutputFolder(folder, overwrite=True) as inner:
        run = RewriteRun(reader, options, inner, windows_NT if options.needs_data else None, data_report)
        if resume and _finished(folder, mark, run.fingerprint()):
            inner.discard()
        else:
            run(resume, on_block, on_step)
            verdict = verify(inner.stage, reader.folder, compared_NT) if compared_NT is not None else None
            inner.commit()
            quality = (verdict.to_json()["quality"] or {}) if verdict else None
            write_json(mark, {"fingerprint": run.fingerprint(), "quality": quality})
    said = read_json(folder / "infopt.json")
    step = {"step": "rewrite", **said["rewrite"], "quality": read_json(mark)["quality"]}
    return Rewritten(folder, step, said["rewritten"])


def note_lineage(stage: Path, first: Rewritten, recipe: Recipe, compared_NT: Tensor | None) -> dict[str, Any]:
    """Verify the quantized folder against the rewritten one, and write both steps into its infopt.json."""
    verdict = verify(stage, first.folder, compared_NT) if compared_NT is not None else None
    files = read_json(first.folder / MANIFEST)["files"]
    source = {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}
    quality = (verdict.to_json()["quality"] or {}) if verdict else None
    second = {"step": "quantize", "source": source, "recipe": recipe.name, "quality": quality}
    said = read_json(stage / "infopt.json")
    said["rewritten"] = sorted({*said["rewritten"], *first.tensors} - {f"{name}.weight" for name in said["layers"]})
    said["lineage"] = [first.step, second]
    write_json(stage / "infopt.json", said)
    update_manifest(stage, "infopt.json")
    return {"lineage": said["lineage"]}


def _finished(folder: Path, mark: Path, fingerprint: str) -> bool:
    if not mark.is_file() or not folder.is_dir():
        return False
    try:
        check_manifest(folder)
        return bool(read_json(mark).get("fingerprint") == fingerprint)
    except (BadInput, VerificationFailed):
        return False
