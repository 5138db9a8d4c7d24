"""`infopt lint` on sound checkpoints of other tools: six of them, from a tiny random model, and no finding above `info`.

llm-compressor (rounded, and GPTQ), GPTQModel, ModelOpt, mlx-lm and transformers each write one or two. The first three use
the environments of `benchmarks/compare_peers.py`, which makes them. A tool that is not there is a line that says so. Where a
tool saves weights alone, the tokenizer and chat template are copied beside them, as its users do.

    python benchmarks/interop/clean_checkpoints.py ./smollm2 --results results [--peers .venv-peers] [--venvs .venv-interop]

`./smollm2` gives its tokenizer and its config; the weights are random. The exit status is the number of folders with findings.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from environments import python_of

PEERS = Path(__file__).resolve().parent.parent / "peers"
TOOLS = {
    "llm-compressor rtn": ("llmcompressor", "rtn"),
    "llm-compressor gptq": ("llmcompressor", "gptq"),
    "gptqmodel gptq": ("gptqmodel", "gptq"),
    "modelopt awq": ("modelopt", "awq"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a Hugging Face folder with a tokenizer")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--peers", type=Path, default=Path(".venv-peers"))
    parser.add_argument("--venvs", type=Path, default=Path(".venv-interop"))
    options = parser.parse_args()
    options.results, options.model = options.results.resolve(), options.model.resolve()
    options.results.mkdir(parents=True, exist_ok=True)
    tiny = options.results / "transformers"
    if not tiny.exists():
        run([sys.executable, str(PEERS / "tiny_model.py"), str(options.model), str(tiny)], options.results)
    ids = options.results / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(10, 1000, (2, 128)))
    makers = {"transformers": lambda out: None}
    makers |= {name: lambda out, how=how: peer(options.peers, tiny, ids, out, *how) for name, how in TOOLS.items()}
    makers["mlx-lm"] = lambda out: mlx(options.venvs, tiny, out)
    wrong = 0
    for name, make in makers.items():
        out = options.results / name.replace(" ", "-")
        try:
            if not out.exists():
                make(out)
        except (RuntimeError, OSError) as error:
            print(f"{name}: not made: {str(error)[-200:]}")
            continue
        findings = lint(completed(out, tiny))
        wrong += bool(findings)
        print(f"{name}: {findings or 'clean'}")
    return wrong


def peer(venvs: Path, model: Path, ids: Path, out: Path, tool: str, method: str) -> None:
    python = venvs.resolve() / tool / "bin" / "python"
    flags = {"--model": model, "--ids": ids, "--method": method, "--samples": 2, "--bits": 4, "--group-size": 64,
             "--dtype": "bfloat16", "--out": out, "--result": out.with_suffix(".json")}  # fmt: skip
    run(
        [str(python), str(PEERS / f"{tool}_run.py"), *(str(part) for pair in flags.items() for part in pair)],
        out.parent,
    )


def completed(out: Path, model: Path) -> Path:
    """The checkpoint that a tool left in or under `out`, with a tokenizer."""
    folder = out / "export" if (out / "export").is_dir() else out
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if not (folder / name).exists():
            shutil.copy(model / name, folder / name)
    return folder


def mlx(venvs: Path, model: Path, out: Path) -> None:
    command = [str(python_of(venvs, "mlx")), "-m", "mlx_lm", "convert", "--hf-path", str(model), "--mlx-path", str(out)]
    run([*command, "-q"], out.parent)


def run(command: list[str], place: Path) -> None:
    """Run in `place`, where some tools leave logs. RuntimeError with what the tool said."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr).strip())


def lint(folder: Path) -> list[str]:
    """Findings above `info`: what an engine would trip over, or lose."""
    command = [str(Path(sys.executable).parent / "infopt"), "lint", str(folder), "--level", "warning", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = json.loads(done.stdout)
    return [f"{f['level']} {f['rule']} {f['tensor'] or f['file']}: {f['message']}" for f in said["findings"]
            if f["level"] in ("error", "warning")]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
