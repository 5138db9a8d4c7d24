"""Quantize one model with infopt and with its peers, one after the other, and write one table.

Same model folder, same calibration ids (infopt reads and tokenises them; every peer is given the saved ids), same grid,
same threads; perplexity of every output by one evaluator. Each tool runs in a process and, the peers, in a virtual
environment of their own, made on first use, because their pins contradict each other (llm-compressor wants an older
transformers than GPTQModel takes). Each peer runs once on a tiny random model before it is timed, so that nobody is
charged for compiling an extension. infopt runs through its command line, in the environment this script is run with.

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
    "evaluator": Peer(("transformers==5.23.0", "accelerate", "compressed-tensors"), "perplexity.py"),
}
ROWS = (
    ("float", "-"),
    ("llmcompressor", "rtn"),
    ("infopt", "rtn"),
    ("llmcompressor", "gptq"),
    ("gptqmodel", "gptq"),
    ("infopt", "gptq"),
    ("modelopt", "awq"),
    ("infopt", "awq"),
    ("infopt", "awq+gptq"),
)


def main() -> int:
    options = arguments()
    options.results.mkdir(parents=True, exist_ok=True)
    rows = [row for row in ROWS if row[0] in options.tools and row[1] in (*options.methods, "-")]
    ids = calibration_ids(options)
    for tool, method in rows:
        target = options.results / f"{tool}-{method}-{samples_of(options, method)}.json"
        if target.exists() and not options.again:
            print(f"{target.name}: there already; --again runs it again", file=sys.stderr)
            continue
        print(f"{tool} {method}: running", file=sys.stderr, flush=True)
        row = run_row(options, tool, method, ids)
        target.write_text(json.dumps(row, indent=2))
        print(f"{tool} {method}: {row['status']}", file=sys.stderr, flush=True)
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
    parser.add_argument("--methods", default="rtn,gptq,awq,awq+gptq")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of gptq and awq+gptq")
    parser.add_argument("--awq-samples", type=int, default=8, help="calibration windows of awq")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--eval-windows", type=int, default=40)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="what the peers load the model as; float32 is fast and fair where bf16 is emulated")  # fmt: skip
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one tool's run")
    parser.add_argument("--again", action="store_true", help="run rows again whose result is there")
    parser.add_argument("--keep", action="store_true", help="keep the quantized models")
    options = parser.parse_args()
    options.tools, options.methods = options.tools.split(","), options.methods.split(",")
    for name, given, known in (
        ("--tools", options.tools, {tool for tool, _ in ROWS}),
        ("--methods", options.methods, {method for _, method in ROWS} - {"-"}),
    ):
        if wrong := set(given) - known:
            parser.error(f"{name} {','.join(sorted(wrong))}: known are {', '.join(sorted(known))}")
    for path in (options.model / "config.json", options.dataset, options.eval_dataset):
        if not path.exists():
            parser.error(f"{path} is not there")
    return options


def samples_of(options: argparse.Namespace, method: str) -> int:
    """How many calibration windows a method gets."""
    return {"-": 0, "rtn": 0, "awq": options.awq_samples}.get(method, options.samples)


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
    small = argparse.Namespace(**{**vars(options), "model": tiny, "samples": 2, "awq_samples": 2})
    method = next(method for tool, method in ROWS[::-1] if tool == name)
    out, result = options.venvs.resolve() / f"{name}-tiny", options.venvs.resolve() / f"{name}-tiny.json"
    shutil.rmtree(out, ignore_errors=True)
    env = {**environment(options), **dict(PEERS[name].env)}
    _must(peer_command(small, name, python, method, calibration_ids(options), out, result), env)
    shutil.rmtree(out)


def _must(command: list[str], env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nexited {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")


def peer_command(
    options: argparse.Namespace, tool: str, python: Path, method: str, ids: Path, out: Path, result: Path
) -> list[str]:
    """The command line of a runner script (`peers/runner.py` reads it)."""
    return [str(python), str(HERE / "peers" / PEERS[tool].script), "--model", str(options.model.resolve()),
            "--ids", str(ids.resolve()), "--method", method, "--samples", str(samples_of(options, method)),
            "--bits", str(options.bits), "--group-size", str(options.group_size), "--dtype", options.dtype,
            "--out", str(out), "--result", str(result)]  # fmt: skip


def infopt_command(options: argparse.Namespace, method: str, out: Path) -> list[str]:
    """infopt as a user runs it, its report on stdout."""
    command = [str(Path(sys.executable).parent / "infopt"), "quantize", str(options.model), "--method", method,
               "--bits", str(options.bits), "--group-size", str(options.group_size), "--sym", "--no-verify",
               "--json", "-o", str(out)]  # fmt: skip
    if samples := samples_of(options, method):
        command += ["--dataset", str(options.dataset), "--num-samples", str(samples), "--seqlen", str(options.seqlen)]
    return command


def run_row(options: argparse.Namespace, tool: str, method: str, ids: Path) -> dict[str, Any]:
    """Quantize, measure, evaluate: one row of the table."""
    name = f"{tool}-{method}-{samples_of(options, method)}"
    out, log = options.results / f"{name}.model", options.results / f"{name}.log"
    row: dict[str, Any] = {
        "tool": tool, "method": method, "samples": samples_of(options, method), "seqlen": options.seqlen,
        "bits": options.bits, "group_size": options.group_size, "threads": options.threads,
        "dtype": options.dtype if tool in PEERS else "as stored", "model": options.model.resolve().name,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "status": "done",
    }  # fmt: skip
    if tool == "float":
        row["bytes"] = weight_bytes(options.model)
        return {**row, **perplexity(options, options.model, name)}
    for old in (out, out.with_name(out.name + ".infopt-work")):  # the second would let infopt go on where it was killed
        shutil.rmtree(old, ignore_errors=True)
    result = options.results / f"{name}.runner.json"
    result.unlink(missing_ok=True)
    if tool == "infopt":
        command, env = infopt_command(options, method, out), environment(options)
    else:
        python = peer_python(options, tool)
        env = {**environment(options), **dict(PEERS[tool].env)}
        command = peer_command(options, tool, python, method, ids, out.resolve(), result.resolve())
    cost = run_measured(command, log, env=env, timeout=options.timeout)
    row |= {"process": dataclasses.asdict(cost)}
    if cost.code:
        row["status"] = f"timed out after {options.timeout:.0f} s" if cost.timed_out else f"exit status {cost.code}"
        return {**row, "error": tail(log)}
    row |= infopt_report(log, cost) if tool == "infopt" else json.loads(result.read_text())
    row["bytes"] = weight_bytes(out)
    row |= perplexity(options, out, name)
    if not options.keep:
        shutil.rmtree(out)
    return row


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
    command = [str(python), str(HERE / "peers" / "perplexity.py"), "--model", str(folder.resolve()), "--original",
               str(options.model.resolve()), "--dataset", str(options.eval_dataset), "--windows",
               str(options.eval_windows), "--seqlen", str(options.seqlen), "--result", str(result)]  # fmt: skip
    cost = run_measured(command, log, env=environment(options), timeout=options.timeout)
    if cost.code:
        return {"status": f"the evaluator exited {cost.code}", "error": tail(log)}
    return json.loads(result.read_text())


if __name__ == "__main__":
    sys.exit(main())
