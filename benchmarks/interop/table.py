"""One quantization of one model in every format, loaded by every engine: the same weights, and whose logits are how far away.

Two GPTQ runs in groups of 32 (symmetric; with zero points that every format holds) are converted to all formats. The
dequantized weights of each folder are compared bit for bit with the run's. Each engine, in an environment of its own,
then reads each folder; the number is the largest difference of a logit from infopt's, relative to the largest logit, over a
fixed text. Where an engine cannot read a folder, its own error stands below the table.

    python benchmarks/interop/table.py ./smollm2 --dataset valid.txt --results results [--venvs DIR]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from engine import difference, log_softmax
from environments import ENGINES, run_engine
from transformers import AutoTokenizer

from infopt.exporters.folder import open_model
from infopt.exporters.gguf_model import open_gguf
from infopt.runtime.model import RuntimeModel

#: run -> (flags of quantize, its own format, the formats that it is converted to)
RUNS = {
    "symmetric": ((), "compressed-tensors", ("gptq", "gptq_v2", "awq", "mlx", "gguf")),
    "zero points": (("--asym",), "mlx", ("compressed-tensors", "gptq_v2", "awq", "gguf")),
}
TEXT = (
    "The council met on 14 March 1893 to decide whether the old bridge should be repaired or replaced. Engineers "
    "had measured the piers and found that two of the seven were no longer safe."
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a Hugging Face folder")
    parser.add_argument("--dataset", type=Path, help="calibration text; a text that comes with Python if none")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--venvs", type=Path, default=Path(".venv-interop"))
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    folders = {name: folder for run in RUNS for name, folder in make(options, run).items()}
    ids = AutoTokenizer.from_pretrained(options.model)(TEXT).input_ids
    (options.results / "ids.json").write_text(json.dumps(ids))
    engines = options.engines.split(",")
    for engine in engines:
        ask(options, engine, folders)
    write(options, folders, engines, ids)
    return 0


def make(options: argparse.Namespace, run: str) -> dict[str, Path]:
    """{name: folder} of the run and its conversions, made where they are not there."""
    flags, own, others = RUNS[run]
    first = options.results / f"{run.replace(' ', '-')}-{own}"
    if not first.exists():
        data = ("--dataset", str(options.dataset)) if options.dataset else ()
        infopt(
            "quantize", str(options.model), "--method", options.method, "--group-size", "32", *flags, *data,
            "--num-samples", str(options.samples), "--format", own, "--no-verify", "-o", str(first),
        )  # fmt: skip
    made = {first.name: first}
    for form in others:
        folder = options.results / f"{run.replace(' ', '-')}-{form}"
        if not folder.exists():
            infopt("convert", str(first), "--format", form, "-o", str(folder))
        made[folder.name] = folder
    return made


def infopt(*arguments: str) -> None:
    done = subprocess.run([str(Path(sys.executable).parent / "infopt"), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)


def ask(options: argparse.Namespace, engine: str, folders: dict[str, Path]) -> None:
    """Leave NAME.npy or NAME.error for every folder in the engine's results; what is there is not asked again."""
    place = options.results / engine
    place.mkdir(exist_ok=True)
    for name, folder in folders.items():  # one process each: some engines do not survive their own errors
        if (place / f"{name}.npy").exists() or (place / f"{name}.error").exists():
            continue
        why = next((why for form, why in ENGINES[engine].not_asked if name.endswith(f"-{form}")), None)
        if why:
            (place / f"{name}.error").write_text(f"not asked: {why}")
            continue
        flags = ["--ids", str(options.results / "ids.json"), "--out", str(place), f"{name}={folder.resolve()}"]
        try:
            run_engine(options.venvs, engine, flags, options.results / f"{engine}.log", options.threads)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            (place / f"{name}.error").write_text(f"not run: {str(error)[:300]}")
        print(
            f"{engine} {name}: {'read' if (place / f'{name}.npy').exists() else 'not read'}",
            file=sys.stderr,
            flush=True,
        )


def write(options: argparse.Namespace, folders: dict[str, Path], engines: list[str], ids: list[int]) -> None:
    lines = ["| run, format | same weights | " + " | ".join(engines) + " |", "| --- " * (len(engines) + 2) + "|"]
    errors = []
    for run in RUNS:
        mine = {name: folder for name, folder in folders.items() if name.startswith(run.replace(" ", "-"))}
        first = next(iter(mine.values()))
        want, meant = ours(first, ids), weights(first)
        for name, folder in mine.items():
            cells = [
                f"{run}, {name.removeprefix(run.replace(' ', '-') + '-')}",
                "yes" if weights(folder) == meant else "NO",
            ]
            for engine in engines:
                place = options.results / engine / f"{name}.npy"
                error = place.with_suffix(".error")
                if place.exists():
                    note = place.with_suffix(".note")
                    cells.append(f"{difference(np.load(place), want):.1e}{'*' if note.exists() else ''}")
                    if note.exists():
                        errors.append(f"- {engine}, {name} *: {note.read_text()[:300]}")
                else:
                    cells.append("-")
                    said = error.read_text() if error.exists() else "the process ended without a word"
                    errors.append(f"- {engine}, {name}: {said[:240]}")
            lines.append("| " + " | ".join(cells) + " |")
    table = "\n".join(
        [*lines, "", *(line for engine in engines for line in about(options.results, engine)), "", *errors]
    )
    (options.results / "interop.md").write_text(table + "\n")
    print(table)


def about(results: Path, engine: str) -> list[str]:
    """Its versions, and which of its kernels were stand-ins."""
    versions = [json.loads(path.read_text()) for path in (results / engine).glob("versions-*.json")]
    said = ", ".join(f"{name} {number}" for name, number in (versions[0] if versions else {}).items())
    log = results / f"{engine}.log"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    replaced = [line for line in lines if line.startswith("kernels replaced")]
    return [f"- {engine}: {'; '.join([said, *replaced[-1:]])}"]


def weights(folder: Path) -> dict[str, str]:
    """sha256 of every weight as the folder means it, in float32; without a head that only repeats the embedding."""
    if (folder / "model.gguf").exists():
        tensors = open_gguf(folder / "model.gguf").tensors(torch.float32)
    else:
        reader = open_model(folder)
        tensors = ((name, reader.get(name)) for name in reader.tensors)
    return {
        name: hashlib.sha256(tensor.float().contiguous().numpy().data).hexdigest()
        for name, tensor in tensors
        if name != "lm_head.weight"
    }


def ours(folder: Path, ids: list[int]) -> np.ndarray:
    model = RuntimeModel(folder)
    hidden_NTC = model.last_hidden(torch.tensor([ids]))
    model.load_outer()
    return log_softmax(model.logits(hidden_NTC[0, :-1]).numpy())


if __name__ == "__main__":
    sys.exit(main())
