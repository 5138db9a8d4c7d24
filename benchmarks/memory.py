"""Peak memory of `infopt quantize`: does it depend on a model's depth, and what does a real model need?

(a) Two synthetic Llamas of the same width, one with 4 and one with 120 blocks, quantized by rtn and by gptq. A tool
    that works block by block from disk to disk needs the same for both; the deep one may take 1.15 times as much.
(b) With --model, that model by GPTQ, 4 bits, group 64, 64 windows of 512 tokens; SmolLM2-135M must stay under 700 MB.

Every run is a process of its own and the figure is the kernel's high-water mark for it, Python and torch included
(`measure.py`; this script imports only the standard library, because a child inherits its starter's mark). The models
are written block by block, so making the deep one takes no memory either. Exit status 1 if a limit is passed.

    python benchmarks/memory.py --model ./smollm2 --dataset text.txt
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from measure import run_measured, tail

HERE = Path(__file__).resolve().parent
MOST_RATIO = 1.15
MOST_MB = 700


def main() -> int:
    options = arguments()
    with tempfile.TemporaryDirectory(prefix="infopt-memory-", dir=options.scratch) as name:
        folder = Path(name)
        passed = [depth_ratio(options, folder, method) for method in filter(None, options.methods.split(","))]
        if options.model:
            passed.append(real_model(options, folder))
    return 0 if all(passed) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder for part (b)")
    parser.add_argument("--dataset", help="its calibration text; infopt's own if absent")
    parser.add_argument("--methods", default="rtn,gptq", help="of part (a); empty leaves it out")
    parser.add_argument("--blocks", type=int, nargs=2, default=(4, 120), help="the two depths of part (a)")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=704)
    parser.add_argument(
        "--scratch", type=Path, help="where to write the models; the system's temporary folder if absent"
    )
    return parser.parse_args()


def depth_ratio(options: argparse.Namespace, folder: Path, method: str) -> bool:
    """Part (a) for one method; whether the ratio is within the limit."""
    peaks = []
    for blocks in options.blocks:
        model = folder / f"llama-{blocks}"
        if not model.exists():
            _make(options, folder, model, blocks)
        flags = ["--num-samples", "16", "--seqlen", "128"] if method != "rtn" else []
        peaks.append(_quantize(model, folder / f"{model.name}-{method}", method, flags))
        size = sum(path.stat().st_size for path in model.glob("*.safetensors")) / 1e6
        print(f"{method:5} {blocks:4} blocks ({size:.0f} MB of weights): peak {peaks[-1]:.0f} MB", flush=True)
    ratio = peaks[1] / peaks[0]
    print(f"{method:5} ratio {ratio:.3f}  (at most {MOST_RATIO}: {_word(ratio <= MOST_RATIO)})", flush=True)
    return ratio <= MOST_RATIO


def real_model(options: argparse.Namespace, folder: Path) -> bool:
    """Part (b); whether the peak is within the limit."""
    flags = ["--num-samples", "64", "--seqlen", "512", *(["--dataset", options.dataset] if options.dataset else [])]
    peak = _quantize(options.model, folder / "real", "gptq", flags)
    print(
        f"{options.model.name}, gptq, 64 x 512 tokens: peak {peak:.0f} MB  (at most {MOST_MB}: {_word(peak <= MOST_MB)})"
    )
    return peak <= MOST_MB


def _quantize(model: Path, out: Path, method: str, flags: list[str]) -> float:
    """Peak RSS in MB of one run of the command line."""
    command = [str(Path(sys.executable).parent / "infopt"), "quantize", str(model), "--method", method, "--bits", "4",
               "--group-size", "64", "--sym", "--no-verify", *flags, "-o", str(out)]  # fmt: skip
    return _run(command, out.with_suffix(".log"))


def _make(options: argparse.Namespace, folder: Path, model: Path, blocks: int) -> None:
    script = HERE / "synthetic_llama.py"
    sizes = [str(blocks), str(options.hidden), str(options.intermediate)]
    _run([sys.executable, str(script), str(model), *sizes], folder / "make.log")


def _run(command: list[str], log: Path) -> float:
    cost = run_measured(command, log)
    if cost.code:
        raise SystemExit(f"{' '.join(command)}\nexited {cost.code}:\n{tail(log, 20, 3000)}")
    return cost.peak_rss_mb


def _word(good: bool) -> str:
    return "kept" if good else "NOT KEPT"


if __name__ == "__main__":
    sys.exit(main())
