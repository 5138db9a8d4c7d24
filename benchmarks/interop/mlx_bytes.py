"""MLX's own functions on bytes that infopt packed, and infopt's formula on bytes that MLX packed. Needs the mlx environment.

Run once with `make` in infopt's environment, then with `check` in mlx's:

    python benchmarks/interop/mlx_bytes.py make FOLDER
    .venv-interop/mlx/bin/python benchmarks/interop/mlx_bytes.py check FOLDER

With scales of 1 and offsets of 0 MLX's `dequantize` gives the codes themselves, so the layout is compared exactly; values are
compared to within the rounding of MLX's arithmetic, which multiplies before it adds.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

CASES = [(bits, group) for bits in (2, 3, 4, 8) for group in (32, 64, 128)]


def make(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from infopt.exporters import mlx
    from infopt.grid import Grid
    from infopt.qtensor import QTensor

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for bits, group in CASES:
        grid = Grid(bits, group, True, torch.float16)
        codes = torch.randint(0, 2**bits, (64, 256), generator=generator).to(torch.uint8)
        scale = (torch.rand(64, 256 // group, generator=generator) + 0.1).half()
        q = QTensor(codes, scale, torch.full(scale.shape, grid.middle, dtype=torch.uint8), grid)
        values = {"codes": codes.float(), "values": q.dequantize()}
        save_file({**mlx.encode("x", q), **values}, folder / f"{bits}-{group}.safetensors")


def check(folder: Path) -> int:
    import mlx.core as mx

    wrong = 0
    for bits, group in CASES:
        held = mx.load(str(folder / f"{bits}-{group}.safetensors"))
        how = {"group_size": group, "bits": bits}
        ones = mx.ones_like(held["x.scales"])
        codes = mx.dequantize(held["x.weight"], ones, mx.zeros_like(ones), **how)
        values = mx.dequantize(held["x.weight"], held["x.scales"], held["x.biases"], **how)
        same = bool((codes.astype(mx.float32) == held["codes"]).all())
        apart = float(mx.abs(values.astype(mx.float32) - held["values"]).max() / mx.abs(held["values"]).max())
        theirs = mx.quantize(held["values"], **how)
        ours = stream(np.array(theirs[0]), bits).reshape(64, -1, group).astype(np.float64)
        ours = ours * np.array(theirs[1])[..., None].astype(np.float64) + np.array(theirs[2])[..., None]
        back = float(np.abs(ours.reshape(64, 256) - np.array(mx.dequantize(*theirs, **how))).max())
        good = same and apart < 1e-3 and back < 1e-4
        wrong += not good
        print(
            f"{bits} bits, groups of {group}: codes {'equal' if same else 'DIFFER'}, values {apart:.1e}, MLX's bytes {back:.1e}"
        )
    return wrong


def stream(words: np.ndarray, bits: int) -> np.ndarray:
    """The codes in MLX's words, bit by bit: the slow twin of the unpacker."""
    single = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    return (single.reshape(len(words), -1, bits).astype(np.int64) << np.arange(bits)).sum(-1)


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        sys.exit(check(Path(sys.argv[2])))
