"""Quantize one model with infopt and with its peers, one after the other, and write one table.

Same model folder, same calibration ids (infopt reads and tokenises them; every peer is given the saved ids), same grid,
same threads; perplexity of every output by one evaluator. Each tool runs in a process and, the peers, in a virtual
environment of their own, made on first use, because their pins contradict each other (llm-compressor wants an older
transformers than GPTQModel takes). Each peer runs once on a tiny random model before it is timed, so that nobody is
charged for compiling an extension. infopt runs through its command line, in the environment this script is run with.

A scheme says what weights and inputs become and which rows it has (`SCHEMES`); --schemes chooses, --bits and --group-size
are the grid of the first. One evaluator reads every output and rounds the inputs of W8A8 and FP8 itself.

Each row is kept as JSON in --results, so that a table can be added to: a row that is there is not run again without
--again. Failures and time-outs are rows too. This script imports only the standard library (see `measure.py`).

    python benchmarks/compare_peers.py ./smollm2 --dataset valid.txt --eval-dataset test.raw.txt --results results
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare_table import write_tables
from measure import Cost, run_measured, tail

HERE = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Peer:
    """What goes into a virtual environment beside torch, which is installed first and then held by a constraint."""

    requirements: tuple[str, ...]
    script: str
    env: tuple[tuple[str, str], ...] = ()


PEERS = {
    "llmcompressor": Peer(("llmcompressor==0.14.0.1",), "llmcompressor_run.py"),
    # without the setting it stops on a machine with two cores
    "gptqmodel": Peer(("gptqmodel==7.6.0",), "gptqmodel_run.py", (("GPTQMODEL_CPU_WORKERS", "2"),)),
    # imports requests without declaring it
    "modelopt": Peer(
        ("nvidia-modelopt==0.47.0", "requests", "transformers==5.23.0", "accelerate", "compressed-tensors"),
        "modelopt_run.py",
    ),
    "autoround": Peer(("auto-round==0.16.1", "transformers==5.23.0"), "autoround_run.py"),
    "evaluator": Peer(("transformers==5.23.0", "accelerate", "compressed-tensors"), "perplexity.py"),
}


@dataclass(frozen=True)
class Scheme:
    """What weights become, the flags that say so to infopt, and the rows (tool, method) that are compared. calibrated: even
    plain rounding needs data, for scales of what is only known at run time."""

    bits: int
    rows: tuple[tuple[str, str], ...]
    infopt: tuple[str, ...] = ()  # in place of bits and groups
    calibrated: bool = False


W4 = (
    ("llmcompressor", "rtn"),
    ("infopt", "rtn"),
    ("llmcompressor", "gptq"),
    ("gptqmodel", "gptq"),
    ("infopt", "gptq"),
    ("modelopt", "awq"),
    ("infopt", "awq"),
    ("infopt", "awq+gptq"),
    ("infopt", "best-4bit"),
    ("autoround", "autoround"),
)
SCHEMES = {
    "W4": Scheme(4, W4),
    "W3": Scheme(3, tuple(row for row in W4 if row[0] != "modelopt" and row[1] not in ("rtn", "awq"))),
    "W8A8": Scheme(
        8,
        (
            ("llmcompressor", "rtn"),
            ("infopt", "rtn"),
            ("llmcompressor", "smoothquant"),
            ("llmcompressor", "smoothquant+gptq"),
            ("infopt", "smoothquant"),
        ),
        ("--scheme", "W8A8"),
    ),
    "FP8_DYNAMIC": Scheme(
        8,
        (("llmcompressor", "rtn"), ("infopt", "rtn"), ("llmcompressor", "gptq"), ("infopt", "best-fp8")),
        ("--scheme", "FP8_DYNAMIC"),
    ),
    "W8A8_STATIC": Scheme(
        8, (("llmcompressor", "smoothquant"), ("infopt", "smoothquant")), ("--scheme", "W8A8_STATIC"), True
    ),
    "FP8": Scheme(8, (("llmcompressor", "rtn"), ("infopt", "rtn")), ("--scheme", "FP8"), True),
    "FP8_BLOCK": Scheme(8, (("llmcompressor", "rtn"), ("infopt", "rtn")), ("--scheme", "FP8_BLOCK")),
    "KV_FP8": Scheme(16, (("llmcompressor", "kv-cache"), ("infopt", "kv-cache")), ("--kv-cache", "fp8"), True),
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    scheme: str
    tool: str
    method: str


ROWS = (Row("-", "float", "-"), *(Row(name, *pair) for name, scheme in SCHEMES.items() for pair in scheme.rows))


def main() -> int:
    options = arguments()
    options.results.mkdir(parents=True, exist_ok=True)
    ids = calibration_ids(options)
    for row in chosen(options):
        target = options.results / f"{name_of(options, row)}.json"
        if target.exists() and not options.again:
            print(f"{target.name}: there already; --again runs it again", file=sys.stderr)
            continue
        print(f"{target.stem}: running", file=sys.stderr, flush=True)
        found = run_row(options, row, ids)
        target.write_text(json.dumps(found, indent=2))
        print(f"{target.stem}: {found['status']}", file=sys.stderr, flush=True)
    table = write_tables(options.results)
    print(table)
    return 0


def arguments() -> argparse.Namespace:
    cache = Path(__file__).resolve().parent.parent / ".venv-peers"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a Hugging Face folder")
    parser.add_argument("--dataset", type=Path, required=True, help="calibration text")
    parser.add_argument("--eval-dataset", type=Path, required=True, help="text of the perplexity")
    parser.add_argument("--results", type=Path, required=True, help="folder for rows, logs, outputs and the tables")
    parser.add_argument("--venvs", type=Path, default=cache, help="folder of the peers' virtual environments")
    parser.add_argument("--tools", default="float,infopt,llmcompressor,gptqmodel,modelopt")
    parser.add_argument("--methods", default=",".join(dict.fromkeys(row.method for row in ROWS if row.method != "-")))
    parser.add_argument("--schemes", default="W4", help=f"comma-separated, of {', '.join(SCHEMES)}")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of all methods but rtn and awq")
    parser.add_argument("--awq-samples", type=int, default=8, help="calibration windows of awq")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--bits", type=int, default=4, help="of the scheme W4's rows")
    parser.add_argument("--group-size", type=int, default=64, help="of W4 and W3")
    parser.add_argument("--autoround-iters", type=int, default=200, help="steps for each block; 200 is its default")
    parser.add_argument("--eval-windows", type=int, default=40)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="what the peers load the model as; float32 is fast and fair where bf16 is emulated")  # fmt: skip
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one tool's run")
    parser.add_argument("--again", action="store_true", help="run rows again whose result is there")
    parser.add_argument("--keep", action="store_true", help="keep the quantized models")
    options = parser.parse_args()
    for name in ("tools", "methods", "schemes"):
        setattr(options, name, getattr(options, name).split(","))
    for name, given, known in (
        ("--tools", options.tools, {row.tool for row in ROWS}),
        ("--methods", options.methods, {row.method for row in ROWS} - {"-"}),
        ("--schemes", options.schemes, set(SCHEMES)),
    ):
        if wrong := set(given) - known:
            parser.error(f"{name} {','.join(sorted(wrong))}: known are {', '.join(sorted(known))}")
    for path in (options.model / "config.json", options.dataset, options.eval_dataset):
        if not path.exists():
            parser.error(f"{path} is not there")
    return options


def chosen(options: argparse.Namespace) -> list[Row]:
    return [
        row
        for row in ROWS
        if row.tool in options.tools and row.method in (*options.methods, "-") and row.scheme in (*options.schemes, "-")
    ]


def name_of(options: argparse.Namespace, row: Row) -> str:
    """A row's file name without its ending. W4's say no scheme, as they did when there was no other."""
    parts = [row.tool, row.method, str(samples_of(options, row))]
    if row.tool == "autoround":
        parts.append(f"{options.autoround_iters}iters")
    return "-".join([*parts, *([] if row.scheme in ("-", "W4") else [row.scheme])])


def bits_of(options: argparse.Namespace, row: Row) -> int:
    return options.bits if row.scheme in ("-", "W4") else SCHEMES[row.scheme].bits


def samples_of(options: argparse.Namespace, row: Row) -> int:
    """How many calibration windows a row gets."""
    if row.scheme in SCHEMES and SCHEMES[row.scheme].calibrated:
        return int(options.samples)
    return int({"-": 0, "rtn": 0, "awq": options.awq_samples}.get(row.method, options.samples))


def environment(options: argparse.Namespace) -> dict[str, str]:
    threads = str(options.threads)
    return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip


def calibration_ids(options: argparse.Namespace) -> Path:
    """The windows that every tool gets, made once by infopt. Their sha256 lies beside them."""
    count = max(options.samples, options.awq_samples)
    ids = options.results / f"ids-{count}x{options.seqlen}.npy"
    if not ids.exists():
        _must([sys.executable, str(HERE / "peers" / "windows.py"), "--model", str(options.model), "--dataset",
               str(options.dataset), "--samples", str(count), "--seqlen", str(options.seqlen), "--out", str(ids)])  # fmt: skip
    return ids


def peer_python(options: argparse.Namespace, name: str) -> Path:
    """The interpreter of a peer's environment, made and proven on a tiny model if it is not there yet."""
    folder = options.venvs.resolve() / name
    python, ready = folder / "bin" / "python", folder / "infopt-ready.json"
    wanted = json.dumps([TORCH, *PEERS[name].requirements])
    if ready.exists() and ready.read_text() == wanted:
        return python
    if not python.exists():
        _must([sys.executable, "-m", "venv", str(folder)])
    pip = [str(python), "-m", "pip", "install", "--quiet", "--upgrade"]
    _must([*pip, "pip", "setuptools", "wheel"])
    _must([*pip, TORCH, "numpy"])
    constraints = folder / "constraints.txt"
    constraints.write_text(TORCH + "\n")
    _must([*pip, "-c", str(constraints), *PEERS[name].requirements])
    if name != "evaluator":
        _warm_up(options, name, python)
    ready.write_text(wanted)
    return python


def _warm_up(options: argparse.Namespace, name: str, python: Path) -> None:
    """One untimed run on a tiny random model: compiles what the peer compiles, and shows that its runner works."""
    tiny = options.venvs.resolve() / "tiny-model"
    if not tiny.exists():
        _must([sys.executable, str(HERE / "peers" / "tiny_model.py"), str(options.model), str(tiny)])
    changed = {"model": tiny, "samples": 2, "awq_samples": 2, "autoround_iters": 2}
    small = argparse.Namespace(**{**vars(options), **changed})
    row = next(row for row in ROWS if row.tool == name and row.method != "rtn")
    out, result = options.venvs.resolve() / f"{name}-tiny", options.venvs.resolve() / f"{name}-tiny.json"
    shutil.rmtree(out, ignore_errors=True)
    env = {**environment(options), **dict(PEERS[name].env)}
    _must(peer_command(small, row, python, calibration_ids(options), out, result), env, options.venvs)
    shutil.rmtree(out)


def _must(command: list[str], env: dict[str, str] | None = None, cwd: Path | None = None) -> None:
    env = {**os.environ, **(env or {})}
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nexited {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")


def peer_command(options: argparse.Namespace, row: Row, python: Path, ids: Path, out: Path, result: Path) -> list[str]:
    """The command line of a runner script (`peers/runner.py` reads it)."""
    return [str(python), str(HERE / "peers" / PEERS[row.tool].script), "--model", str(options.model.resolve()),
            "--ids", str(ids.resolve()), "--method", row.method, "--samples", str(samples_of(options, row)),
            "--scheme", row.scheme, "--bits", str(bits_of(options, row)), "--group-size", str(options.group_size),
            "--iters", str(options.autoround_iters), "--dtype", options.dtype, "--out", str(out),
            "--result", str(result)]  # fmt: skip


def infopt_command(options: argparse.Namespace, row: Row, out: Path) -> list[str]:
    """infopt as a user runs it, its report on stdout. best-4bit has zero points: they are part of that recipe."""
    command = [str(Path(sys.executable).parent / "infopt"), "quantize", str(options.model), "--method", row.method,
               "--no-verify", "--json", "-o", str(out)]  # fmt: skip
    grid = ("--bits", str(bits_of(options, row)), "--group-size", str(options.group_size))
    command += SCHEMES[row.scheme].infopt or (*grid, "--asym" if row.method == "best-4bit" else "--sym")
    if samples := samples_of(options, row):
        command += ["--dataset", str(options.dataset), "--num-samples", str(samples), "--seqlen", str(options.seqlen)]
    return command


def described(options: argparse.Namespace, row: Row) -> dict[str, Any]:
    """What is known of a row before it runs."""
    grid = {} if row.scheme in SCHEMES and SCHEMES[row.scheme].infopt else {"group_size": options.group_size}
    notes = {"autoround": f", {options.autoround_iters} iters", "best-4bit": ", zero points"}
    return {
        "tool": row.tool, "scheme": row.scheme, "method": row.method + notes.get(row.method, ""),
        "samples": samples_of(options, row), "seqlen": options.seqlen, "bits": bits_of(options, row), **grid,
        "threads": options.threads, "dtype": options.dtype if row.tool in PEERS else "as stored",
        "model": options.model.resolve().name, "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "status": "done",
    }  # fmt: skip


def run_row(options: argparse.Namespace, row: Row, ids: Path) -> dict[str, Any]:
    """Quantize, measure, evaluate: one row of the table."""
    name, found = name_of(options, row), described(options, row)
    if row.tool == "float":
        return {**found, "bytes": weight_bytes(options.model), **perplexity(options, options.model, name)}
    out, log = options.results / f"{name}.model", options.results / f"{name}.log"
    for old in (out, out.with_name(out.name + ".infopt-work")):  # the second would let infopt go on where it was killed
        shutil.rmtree(old, ignore_errors=True)
    result = options.results / f"{name}.runner.json"
    result.unlink(missing_ok=True)
    if row.tool == "infopt":
        command, env = infopt_command(options, row, out), environment(options)
    else:
        python = peer_python(options, row.tool)
        env = {**environment(options), **dict(PEERS[row.tool].env)}
        command = peer_command(options, row, python, ids, out.resolve(), result.resolve())
    litter = options.results if row.tool in PEERS else None  # some leave files where they run; their paths are absolute
    cost = run_measured(command, log, env=env, timeout=options.timeout, cwd=litter)
    found |= {"process": dataclasses.asdict(cost)}
    if cost.code:
        found["status"] = f"timed out after {options.timeout:.0f} s" if cost.timed_out else f"exit status {cost.code}"
        return {**found, "error": tail(log)}
    found |= infopt_report(log, cost) if row.tool == "infopt" else json.loads(result.read_text())
    found["bytes"] = weight_bytes(out)
    found |= perplexity(options, out, name)
    if not options.keep:
        shutil.rmtree(out)
    return found


def infopt_report(log: Path, cost: Cost) -> dict[str, Any]:
    """infopt says how long quantizing took, writing included; of CPU time and memory only the whole run's is known."""
    text = log.read_text()
    start = text.index("\n{\n") if not text.startswith("{\n") else -1
    report = json.JSONDecoder().raw_decode(text[start + 1 :])[0]
    return {
        "quantize_wall_s": report["seconds_quantizing"],
        "quantize_cpu_s": cost.cpu_s,
        "quantize_peak_rss_mb": cost.peak_rss_mb,
    }


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors files, without the evaluator's `dequantized/`."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors") if path.parent.name != "dequantized")


def perplexity(options: argparse.Namespace, folder: Path, name: str) -> dict[str, Any]:
    """Perplexity of a folder by the one evaluator; the row keeps every window's loss."""
    result, log = options.results / f"{name}.perplexity.json", options.results / f"{name}.perplexity.log"
    result.unlink(missing_ok=True)
    python = peer_python(options, "evaluator")
    reference = options.results / f"original-{options.eval_windows}x{options.seqlen}.logprobs"
    command = [str(python), str(HERE / "peers" / "perplexity.py"), "--model", str(folder.resolve()), "--original",
               str(options.model.resolve()), "--dataset", str(options.eval_dataset), "--windows",
               str(options.eval_windows), "--seqlen", str(options.seqlen), "--reference", str(reference.resolve()),
               "--result", str(result)]  # fmt: skip
    cost = run_measured(command, log, env=environment(options), timeout=options.timeout)
    if cost.code:
        return {"status": f"the evaluator exited {cost.code}", "error": tail(log)}
    return json.loads(result.read_text())


if __name__ == "__main__":
    sys.exit(main())
