"""The packed tensors of infopt against those of the reference packers: GPTQModel's and compressed-tensors' own, byte for byte.

`make` writes codes, scales and infopt's tensors (infopt's environment); `gptqmodel` and `compressed-tensors` check them, in
the environment that has the library:

    python benchmarks/interop/packer_bytes.py make FOLDER
    .venv-interop/gptqmodel/bin/python benchmarks/interop/packer_bytes.py gptqmodel FOLDER
    .venv-interop/transformers/bin/python benchmarks/interop/packer_bytes.py compressed-tensors FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GRIDS = [(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]
ROWS, COLUMNS, GROUP = 64, 256, 64


def make(folder: Path) -> None:
    from infopt.exporters import compressed_tensors, gptq
    from infopt.grid import Grid
    from infopt.qtensor import QTensor

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for bits, symmetric in GRIDS:
        grid = Grid(bits, GROUP, symmetric, torch.float16)
        codes = torch.randint(0, 2**bits, (ROWS, COLUMNS), generator=generator).to(torch.uint8)
        scale = (torch.rand(ROWS, COLUMNS // GROUP, generator=generator) + 0.1).half()
        zero = torch.full(scale.shape, grid.middle, dtype=torch.uint8)
        if not symmetric:
            zero = torch.randint(1, 2**bits, scale.shape, generator=generator).to(torch.uint8)
        q = QTensor(codes, scale, zero, grid)
        held = {"codes": codes, "scale": scale, "zero": zero, **gptq.encode(2, "gptq", q)}
        held |= compressed_tensors.encode("ct", q)
        save_file({name: tensor.clone() for name, tensor in held.items()}, folder / f"{bits}-{symmetric}.safetensors")


def check_gptqmodel(held: dict[str, torch.Tensor], bits: int, symmetric: bool) -> list[str]:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    zero, scale = held["zero"].float(), held["scale"].float()
    spread = [part.repeat_interleave(GROUP, 1) for part in (zero, scale)]
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data = (held["codes"].float() - spread[0]) * spread[1]
    layer = TorchLinear(bits, GROUP, symmetric, False, COLUMNS, ROWS, pack_dtype=torch.int32)
    layer.pack_original(linear, scale, zero, held["gptq.g_idx"].long())
    return [
        part for part in ("qweight", "qzeros", "scales") if not torch.equal(getattr(layer, part), held[f"gptq.{part}"])
    ]


def check_compressed_tensors(held: dict[str, torch.Tensor], bits: int, symmetric: bool) -> list[str]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    middle = 2 ** (bits - 1)
    codes, zero = ((held[name].to(torch.int16) - middle).to(torch.int8) for name in ("codes", "zero"))
    if bits == 8:
        wrong = [] if torch.equal(held["ct.weight"], codes) else ["weight"]
        return wrong if symmetric or torch.equal(held["ct.weight_zero_point"], zero) else [*wrong, "weight_zero_point"]
    wrong = [] if torch.equal(held["ct.weight_packed"], pack_to_int32(codes, bits)) else ["weight_packed"]
    if not symmetric and not torch.equal(held["ct.weight_zero_point"], pack_to_int32(zero, bits, packed_dim=0)):
        wrong.append("weight_zero_point")
    return wrong


def main() -> int:
    folder = Path(sys.argv[2])
    if sys.argv[1] == "make":
        make(folder)
        return 0
    check = check_gptqmodel if sys.argv[1] == "gptqmodel" else check_compressed_tensors
    failed = 0
    for bits, symmetric in GRIDS:
        wrong = check(load_file(folder / f"{bits}-{symmetric}.safetensors"), bits, symmetric)
        failed += bool(wrong)
        said = f"{', '.join(wrong)} differ" if wrong else "the same bytes"
        print(f"{sys.argv[1]}, {bits} bits, {'symmetric' if symmetric else 'zero points'}: {said}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
