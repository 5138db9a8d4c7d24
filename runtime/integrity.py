"""Is what lies on disk what was meant to be written? Each check names the file and the tensor that fail it.

The manifest is asked first: where a byte changed, nothing after it would mean much, so the only question left is which
tensor the byte belongs to (`locate`). The other checks hold without a manifest too, and against someone who rewrote it:
`infopt.json` carries the digest that the solver gave each layer's codes, scales and zero points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from infopt import kernels
from infopt.checkpoint import CheckpointReader
from infopt.errors import InfoptError, VerificationFailed
from infopt.exporters.folder import open_model
from infopt.exporters.quantized import QuantizedReader
from infopt.header import read_json
from infopt.kernels import reference
from infopt.output import MANIFEST, check_manifest
from infopt.qtensor import QTensor
from infopt.runtime.quality import identical

REPORT = "infopt.json"
INDEX = "model.safetensors.index.json"
#: Largest relative error of a kernel against the reference: fp32 summed in another order; bf16 weights and activations.
#: A kernel that rounds its inputs is compared with a reference that rounds them as well: then only the order is another.
TOLERANCE = {"exact": 1e-5, "packed": 2e-2}
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")
_TOKENS = 8  # of random input to each kernel
_SHOWN = 3  # failures spelled out in a row; the rest are counted


@dataclass(frozen=True)
class Check:
    """One row of the verdict. ok is None where the check could not be made; `detail` then says why."""

    name: str
    ok: bool | None
    detail: str


def manifest(folder: Path) -> Check:
    """Every file's sha256; a changed one is named with the tensor that the change hit, where that can be told."""
    name = "files as written"
    if not (folder / MANIFEST).exists():
        return Check(name, None, f"no {MANIFEST}: only what the files say about themselves is checked")
    try:
        check_manifest(folder)
    except VerificationFailed as error:
        return Check(name, False, "; ".join(part for part in (error.what, error.why, locate(folder)) if part))
    return Check(name, True, f"sha256 of every file equals {MANIFEST}")


def locate(folder: Path) -> str:
    """Which tensors a damaged folder's damage hit, as far as can be told without a reference; "" if it cannot."""
    absent = _tensors_of_absent_files(folder)
    if absent:
        return absent
    try:
        reader = open_model(folder)
        digests = solver_digests(folder)
    except InfoptError as error:
        return " ".join(part for part in (error.what, error.why) if part)
    if not isinstance(reader, QuantizedReader) or digests is None:
        return ""
    changed = [name for name in reader.quantized if name in digests and reader.qtensor(name).digest() != digests[name]]
    if not changed:
        return "No quantized layer changed: the byte is in a header, or in a tensor that was copied."
    return "changed: " + few([where(reader, name) for name in changed])


def solver_digests(folder: Path) -> dict[str, str] | None:
    """{op name: digest} from infopt.json, None where infopt did not make the folder; VerificationFailed if odd."""
    if not (folder / REPORT).exists():
        return None
    report = read_json(folder / REPORT)
    layers = report.get("layers") if isinstance(report, dict) else None
    if not isinstance(layers, dict) or not all(isinstance(entry, dict) for entry in layers.values()):
        why = "`layers` must map layer names to their reports."
        raise VerificationFailed(f"{folder / REPORT} is not a report of infopt", why, "Quantize the model again.")
    return {name: str(entry["digest"]) for name, entry in layers.items() if "digest" in entry}


def layers(reader: QuantizedReader, precisions: tuple[str, ...], on_layer: Callable[[], None] | None) -> list[Check]:
    """Numbers, digests and kernels of every quantized op, each op read once. `precisions` () leaves the kernels out."""
    digests = solver_digests(reader.folder)
    numbers: list[str] = []
    changed = (
        []
        if digests is None
        else [f"{name} is in {REPORT}, not here" for name in digests if name not in reader.quantized]
    )
    used = {precision: _KernelErrors() for precision in precisions}
    for name in reader.quantized:
        q = reader.qtensor(name)
        numbers += [f"{where(reader, name)}: {problem}" for problem in _number_problems(q)]
        if digests is not None and digests.get(name) != q.digest():
            changed.append(where(reader, name))
        for precision, errors in used.items():
            errors.add(name, q, precision)
        if on_layer:
            on_layer()
    checks = [
        _row("scales, zero points, codes", numbers, f"{len(reader.quantized)} layers: finite, positive, in range")
    ]
    checks.append(_digest_row(digests, changed, len(reader.quantized)))
    checks += [errors.row(precision) for precision, errors in used.items()]
    if reader.ordered:
        why = reader.why_dense(next(iter(reader.ordered)))
        said = f"{len(reader.ordered)} layers are read as dense weights, no kernel to check: {why}"
        checks.append(Check("layers without codes", None, said))
    return checks


def _number_problems(q: QTensor) -> Iterator[str]:
    scale = q.scale.to(torch.float32)
    if not bool(torch.isfinite(scale).all()):
        yield "weight_scale has values that are not finite"
    elif not bool((scale > 0).all()):
        yield "weight_scale has values that are not positive"
    if q.grid.kind == "float":
        if not bool(torch.isfinite(q.grid.unpack(q.codes)).all()):
            yield "a weight is NaN"
        return
    if int(q.zero.max()) > q.grid.levels:
        yield f"a zero point is above {q.grid.levels}"
    if int(q.codes.max()) > q.grid.levels:
        yield f"a code is above {q.grid.levels}"


def _digest_row(digests: dict[str, str] | None, changed: list[str], count: int) -> Check:
    name = "codes as solved"
    if digests is None:
        return Check(name, None, f"no {REPORT}: infopt did not make this folder")
    return _row(name, changed, f"{count} layers decode to the solver's codes, scales and zero points, bit for bit")


class _KernelErrors:
    """The largest relative error of a production kernel against the reference, over all layers."""

    def __init__(self) -> None:
        self.worst, self.worst_name = 0.0, ""
        self.counts: dict[str, int] = {}
        self.failures: list[str] = []

    def add(self, name: str, q: QTensor, precision: str) -> None:
        generator = torch.Generator().manual_seed(0)
        x_TI = torch.randn(_TOKENS, q.shape[1], generator=generator)
        prepared = kernels.prepare(q, precision)  # type: ignore[arg-type]
        rounded = prepared.inputs is not None and q.grid.inputs is None
        meant = replace(q, grid=replace(q.grid, inputs=prepared.inputs)) if rounded else q
        want_TO, got_TO = reference.linear(x_TI, meant), prepared(x_TI)
        largest = want_TO.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        error = ((got_TO - want_TO).abs().max() / largest).item()
        self.counts[prepared.kernel] = self.counts.get(prepared.kernel, 0) + 1
        if not error <= TOLERANCE["exact" if prepared.inputs else precision]:  # also where it is NaN
            self.failures.append(f"{name} ({prepared.kernel}): relative error {error:.2g}")
        if error > self.worst:
            self.worst, self.worst_name = error, name

    def row(self, precision: str) -> Check:
        ran = ", ".join(f"{kernel} x {count}" for kernel, count in sorted(self.counts.items()))
        fine = f"{ran or 'no layers'}; largest relative error {self.worst:.1e}"
        return _row(f"{precision} kernel", self.failures, f"{fine} ({self.worst_name})" if self.worst_name else fine)


def passed_through(reader: CheckpointReader, original: CheckpointReader) -> Check:
    """Tensors that no step rewrote must be the original's, bit for bit; none may be missing, none added."""
    report = read_json(reader.folder / REPORT) if (reader.folder / REPORT).exists() else {}
    rewritten, dropped = set(report.get("rewritten", ())), set(report.get("dropped", ()))
    quantized = (
        {f"{name}.weight" for name in (*reader.quantized, *reader.ordered)}
        if isinstance(reader, QuantizedReader)
        else set()
    )
    known = original.tensors.keys() | set(report.get("added", ()))  # a head that was tied to the embedding
    problems = [f"{name} is not in the original" for name in reader.tensors if name not in known]
    copied = 0
    for name in original.tensors:
        if name not in reader.tensors:
            if name not in dropped:
                problems.append(f"{name} is missing")
        elif name not in quantized and name not in rewritten:
            copied += 1
            if not identical(reader, original, name):
                problems.append(f"{reader.tensors[name].file.name}: {name} differs from the original")
    said = f"; {len(rewritten)} rewritten" if rewritten else ""
    return _row("tensors passed through", problems, f"{copied} equal the original's, bit for bit{said}")


def side_files(reader: CheckpointReader, original: CheckpointReader | None) -> Check:
    """What a server needs besides weights: the quantization config, the tokenizer, everything that the original had."""
    have = {path.name for path in reader.side_files()}
    problems = []
    if getattr(reader, "quantized", {}) and "quantization_config" not in reader.config:
        problems.append("config.json has no quantization_config")
    if original is not None:
        problems += [f"{path.name} is missing" for path in original.side_files() if path.name not in have]
    if problems:
        return _row("tokenizer and config", problems, "")
    if not any(name in have for name in _TOKENIZERS):
        return Check("tokenizer and config", None if original is None else True, "no tokenizer, as in the original")
    return Check("tokenizer and config", True, f"{len(have)} files beside the weights")


def where(reader: CheckpointReader, name: str) -> str:
    """ "model.safetensors: model.layers.0.mlp.up_proj" for an op name."""
    info = reader.tensors.get(f"{name}.weight")
    return f"{info.file.name}: {name}" if info else name


def few(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _row(name: str, problems: list[str], fine: str) -> Check:
    return Check(name, not problems, few(problems) if problems else fine)


def _tensors_of_absent_files(folder: Path) -> str:
    if not (folder / INDEX).exists():
        return ""
    try:
        index: Any = read_json(folder / INDEX)
    except InfoptError as error:
        return error.what
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        return ""
    plain = {
        key: file for key, file in weight_map.items() if isinstance(file, str) and "/" not in file and "\0" not in file
    }
    absent = [f"{file}: {key}" for key, file in plain.items() if not (folder / file).exists()]
    return f"missing: {few(absent)}" if absent else ""
