"""What the engines' scripts share: their command line, and the files that they leave.

Each runs in an environment of its own, so nothing of infopt can be imported here. A job is `NAME=FOLDER`; its result is
NAME.npy, log-probabilities fp32 [tokens - 1, vocabulary] of a fixed text, or NAME.error, what the engine said instead.
NAME.note tells what the caller must do for it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

Answer = np.ndarray | tuple[np.ndarray, str]  # logits [tokens, vocabulary], and what had to be done to get them
Logits = Callable[[Path, list[int]], Answer]  # of a folder and token ids


def serve(logits: Logits, *packages: str, arguments: list[str] | None = None) -> None:
    """Do the jobs of the command line (or of `arguments`). An engine may fail in any way: its error is the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ids", type=Path, required=True, help="a JSON list of token ids")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("jobs", nargs="+", metavar="NAME=FOLDER")
    options = parser.parse_args(arguments)
    ids = json.loads(options.ids.read_text())
    versions = {name: importlib.metadata.version(name) for name in packages}
    for job in options.jobs:
        name, _, folder = job.partition("=")
        try:
            answer = logits(Path(folder), ids)
            values, note = answer if isinstance(answer, tuple) else (answer, "")
            np.save(options.out / f"{name}.npy", log_softmax(values[: len(ids) - 1]))
            if note:
                (options.out / f"{name}.note").write_text(note)
            print(f"{name}: done", flush=True)
        except Exception as error:  # noqa: BLE001
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}".strip().splitlines()
            (options.out / f"{name}.error").write_text(" ".join(said)[:500])
            print(f"{name}: failed", flush=True)
    (options.out / f"versions-{packages[0]}.json").write_text(json.dumps(versions))


def log_softmax(values_TV: np.ndarray) -> np.ndarray:
    values = values_TV.astype(np.float64)
    values -= values.max(-1, keepdims=True)
    return (values - np.log(np.exp(values).sum(-1, keepdims=True))).astype(np.float32)


def difference(got_TV: np.ndarray, want_TV: np.ndarray) -> float:
    """The largest difference of logits (the mean of a token's taken away), relative to the largest logit wanted."""
    got, want = _centred(got_TV), _centred(want_TV)
    return float(np.abs(got - want).max() / np.abs(want).max())


def _centred(values_TV: np.ndarray) -> np.ndarray:
    values = values_TV.astype(np.float64)
    return values - values.mean(-1, keepdims=True)
