"""Every method and scheme of infopt on one model: perplexity, KL and top-1 against the original, and the size.

Each row is one `infopt quantize` with its verification; the calibration text and the comparison's text are the same in all.
A row's JSON stays in --results, so the table can be made in pieces; --again runs rows again. `compare_peers.py` puts other
tools beside the weight-only rows. Standard library only: the measured processes are infopt's own.

    python benchmarks/accuracy.py ./smollm2 --dataset valid.txt --eval-dataset test.raw.txt --results accuracy
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from measure import run_measured, tail

SYMMETRIC = ("--group-size", "64", "--sym")
ROWS: dict[str, tuple[str, ...]] = {
    "W4 rtn": ("--method", "rtn", *SYMMETRIC),
    "W4 awq": ("--method", "awq", *SYMMETRIC),
    "W4 gptq, columns in order": ("--method", "gptq", "--no-act-order", *SYMMETRIC),
    "W4 gptq": ("--method", "gptq", *SYMMETRIC),
    "W4 awq+gptq": ("--method", "awq+gptq", *SYMMETRIC),
    "W4 gptq, zero points": ("--method", "gptq", "--group-size", "64", "--asym"),
    "W4 best-4bit": ("--method", "best-4bit"),
    "W3 gptq": ("--method", "gptq", "--bits", "3", *SYMMETRIC),
    "W3 best-4bit's steps": ("--method", "best-4bit", "--bits", "3"),
    "4.0 bits, mixed, gptq": ("--method", "gptq", "--target-bits", "4.0", *SYMMETRIC),
    "W8A8 rtn": ("--method", "rtn", "--scheme", "W8A8"),
    "W8A8 smoothquant": ("--method", "smoothquant"),
    "W8A8 static, smoothquant": ("--method", "smoothquant", "--scheme", "W8A8_STATIC"),
    "FP8_DYNAMIC fp8": ("--method", "fp8"),
    "FP8_DYNAMIC gptq": ("--method", "gptq", "--scheme", "FP8_DYNAMIC"),
    "FP8_DYNAMIC best-fp8": ("--method", "best-fp8"),
    "FP8 fp8": ("--method", "fp8", "--scheme", "FP8"),
    "FP8_BLOCK fp8": ("--method", "fp8", "--scheme", "FP8_BLOCK"),
    "KV fp8": ("--method", "kv-cache", "--kv-cache", "fp8"),
    "KV int8": ("--method", "kv-cache", "--kv-cache", "int8"),
    "KV int4": ("--method", "kv-cache", "--kv-cache", "int4"),
    "KV int8-token": ("--method", "kv-cache", "--kv-cache", "int8-token"),
    "KV int4-token": ("--method", "kv-cache", "--kv-cache", "int4-token"),
    "KV fp8-balanced": ("--method", "kv-cache", "--kv-cache", "fp8-balanced"),
    "KV int8-balanced": ("--method", "kv-cache", "--kv-cache", "int8-balanced"),
    "KV int4-balanced": ("--method", "kv-cache", "--kv-cache", "int4-balanced"),
}


def main() -> int:
    options = arguments()
    options.results.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in options.rows or ROWS:
        target = options.results / f"{name.replace(' ', '-').replace(',', '')}.json"
        if options.again or not target.exists():
            row = measure(options, name)
            target.write_text(json.dumps(row, indent=2))
            failed += row["status"] != "done"
            print(line(row), flush=True)
    print(table(options.results))
    return 1 if failed else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a Hugging Face folder")
    parser.add_argument("--dataset", required=True, help="calibration text")
    parser.add_argument("--eval-dataset", required=True, help="text of the comparison")
    parser.add_argument("--results", type=Path, required=True, help="folder for the rows")
    parser.add_argument("--rows", nargs="*", metavar="ROW", choices=list(ROWS), help="only these rows")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--eval-windows", type=int, default=40)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--again", action="store_true", help="run rows again whose result is there")
    return parser.parse_args()


def measure(options: argparse.Namespace, name: str) -> dict[str, object]:
    """One row: quantize, verify against the original, read the report."""
    out, log = options.results / "output", options.results / "output.log"
    for old in (out, out.with_name("output.infopt-work")):
        shutil.rmtree(old, ignore_errors=True)
    command = [str(Path(sys.executable).parent / "infopt"), "quantize", str(options.model), "-o", str(out), *ROWS[name],
               "--dataset", options.dataset, "--num-samples", str(options.samples), "--seqlen", "512",
               "--verify-dataset", options.eval_dataset, "--verify-samples", str(options.eval_windows)]  # fmt: skip
    cost = run_measured(command, log, env={"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"})
    row: dict[str, object] = {"name": name, "samples": options.samples, "windows": options.eval_windows}
    if cost.code:
        return {**row, "status": f"exit status {cost.code}", "error": tail(log)}
    verdict = json.loads((out / "verification.json").read_text())
    shutil.rmtree(out)
    return {**row, "status": "done", "cpu_s": cost.cpu_s, **verdict["quality"], "cache": verdict["cache"],
            "bits": verdict["size"]["bits_per_quantized_weight"], "bytes": verdict["size"]["bytes"]}  # fmt: skip


def line(row: dict[str, object]) -> str:
    if row["status"] != "done":
        return f"| {row['name']} | {row['status']} | | | | | |"
    bits = f"{row['bits']:.2f}" if row["bits"] else "16"
    return (
        f"| {row['name']} | {row['perplexity']:.3f} | {row['perplexity_increase']:+.2%} | {row['kl_mean']:.5f} | "
        f"{row['top1']:.2%} | {bits} | {row['cpu_s']:.0f} |"
    )


def table(results: Path) -> str:
    rows = [json.loads(path.read_text()) for path in results.glob("*.json")]
    order = list(ROWS)
    head = "| row | perplexity | increase | mean KL | same first choice | bits of a weight | CPU s |"
    ordered = sorted((row for row in rows if row.get("name") in order), key=lambda row: order.index(row["name"]))
    return "\n".join([head, "| --- " * 7 + "|", *map(line, ordered)])


if __name__ == "__main__":
    sys.exit(main())
