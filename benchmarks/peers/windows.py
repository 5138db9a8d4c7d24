"""Make the calibration windows that every tool gets: infopt's own reading and tokenisation, saved as .npy.

Runs in infopt's environment. Prints nothing; fails if the text is too short, because every tool must get the same.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from infopt.calibration.data import DataSpec, load_tokenizer, load_windows


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--model", "--dataset", "--out"):
        parser.add_argument(name, required=True)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--seqlen", type=int, required=True)
    options = parser.parse_args()
    spec = DataSpec(options.dataset, options.samples, options.seqlen)
    ids_NT, report = load_windows(spec, load_tokenizer(options.model), part="calibration")
    if len(ids_NT) < options.samples:
        raise SystemExit(f"{options.dataset} holds {len(ids_NT)} windows of {options.seqlen} tokens; give more text")
    np.save(options.out, ids_NT.numpy())
    Path(options.out).with_suffix(".json").write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
