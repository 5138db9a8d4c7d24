"""How much faster is `infopt quantize` under torchrun, and is the result the same?

A model by GPTQ, 4 bits, group 64, 64 windows of 512 tokens, and verified: by one process on one core,
and by two processes with one thread each, which may take 0.65 of its time. Seconds are the wall's, of the whole command,
from torchrun's first import to the last written byte. Then the two results are compared. Their codes differ: statistics are
sums in another order, a weight that lies between two codes may take the other one, and GPTQ lets all columns after it make
up for that. They must be as good: each layer's error within 3 %, the distance to the original (of few tokens) within 10 %.

    python benchmarks/ranks.py ./smollm2 --dataset text.txt
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

from measure import Cost, run_measured, tail
from safetensors import safe_open
from safetensors.torch import save_file

from infopt.exporters.folder import open_model

MOST_RATIO = 0.65
MOST_ERROR_APART = 0.03
MOST_KL_APART = 0.1
INFOPT = str(Path(sys.executable).parent / "infopt")


def main() -> int:
    options = arguments()
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node", str(options.ranks), "--no-python"]
    with tempfile.TemporaryDirectory(prefix="infopt-ranks-", dir=options.scratch) as name:
        folder = Path(name)
        model = cut(options.model, folder / "model", options.blocks) if options.blocks else options.model
        one = quantize(["taskset", "-c", "0"], model, folder / "one", options)
        many = quantize([sys.executable, *ranks], model, folder / "many", options)
        other = codes_apart(folder / "one", folder / "many")
        error, kl = quality_apart(folder / "one", folder / "many")
    ratio = many.wall_s / one.wall_s
    fast, same = ratio <= MOST_RATIO, error <= MOST_ERROR_APART and kl <= MOST_KL_APART
    print(f"ratio {ratio:.2f}  (at most {MOST_RATIO}: {word(fast)})")
    print(f"{other:.1%} of the codes differ; the layers' errors by {error:.1%} at most, the KL divergence by {kl:.1%}")
    print(f"  (at most {MOST_ERROR_APART:.0%} and {MOST_KL_APART:.0%}: {word(same)})")
    return 0 if fast and same else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a Hugging Face folder")
    parser.add_argument("--dataset", default="builtin", help="the calibration text; infopt's own if absent")
    parser.add_argument(
        "--blocks", type=int, help="only so many of the first blocks: starting is then more of the time"
    )
    parser.add_argument("--ranks", type=int, default=2, help="processes beside the one")
    parser.add_argument("--scratch", type=Path, help="where to write; the system's temporary folder if absent")
    return parser.parse_args()


def cut(model: Path, target: Path, blocks: int) -> Path:
    """A copy of a model that has only its first blocks."""
    target.mkdir()
    for path in model.glob("*.json"):
        if not path.name.endswith(".index.json"):
            shutil.copy(path, target)
    config = json.loads((model / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "num_hidden_layers": blocks}))
    tensors = {}
    for path in model.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                number = re.search(r"\.layers\.(\d+)\.", name)
                if not number or int(number[1]) < blocks:
                    tensors[name] = file.get_tensor(name)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def quantize(starter: list[str], model: Path, out: Path, options: argparse.Namespace) -> Cost:
    flags = ["--method", "gptq", "--bits", "4", "--group-size", "64", "--num-samples", "64", "--seqlen", "512"]
    flags += ["--dataset", options.dataset]
    log = out.with_suffix(".log")
    cost = run_measured(
        [*starter, INFOPT, "quantize", str(model), *flags, "-o", str(out)], log, env={"OMP_NUM_THREADS": "1"}
    )
    if cost.code:
        raise SystemExit(f"{out.name} exited {cost.code}:\n{tail(log, 20, 3000)}")
    print(
        f"{out.name:5} {cost.wall_s:6.1f} s ({cost.cpu_s:.1f} s of processors; load {cost.load_before:.1f} before)",
        flush=True,
    )
    return cost


def codes_apart(one: Path, other: Path) -> float:
    """The share of codes that differ between two quantized folders."""
    readers = [open_model(folder) for folder in (one, other)]
    differ, count = 0, 0
    for name in readers[0].quantized:
        a, b = (reader.qtensor(name).codes for reader in readers)
        differ, count = differ + int((a != b).sum()), count + a.numel()
    return differ / count


def quality_apart(one: Path, other: Path) -> tuple[float, float]:
    """Relative differences between two quantized folders: the largest of a layer's error, and that of the mean KL."""
    errors, kl = [], []
    for folder in (one, other):
        report, verdict = (json.loads((folder / f"{name}.json").read_text()) for name in ("infopt", "verification"))
        errors.append([layer["error"] for layer in report["layers"].values()])
        kl.append(verdict["quality"]["kl_mean"])
    return max(abs(b / a - 1) for a, b in zip(*errors, strict=True)), abs(kl[1] / kl[0] - 1)


def word(good: bool) -> str:
    return "kept" if good else "NOT KEPT"


if __name__ == "__main__":
    sys.exit(main())
