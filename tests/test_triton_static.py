"""Triton's kernels compiled for GPUs that are not here: no spills, no more registers than measured, shared memory that fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parent.parent / "benchmarks" / "triton_static.py"
#: kernel -> registers of a thread at most, in any case and on any GPU; what was measured and a tenth. A spill is never fine.
REGISTERS = {
    "_add_rms_norm": 140, "_gated": 64, "_rope_write": 56, "_decode": 255, "_merge": 48, "_attention": 255,
    "_multiply": 255, "_dequantize": 48, "_int8_linear": 128, "_fp8_linear": 255, "_norm_linear": 160, "_best": 64,
    "_lowest": 62, "_rescore": 99,
}  # fmt: skip


def compiled(folder: Path, arch: str, only: str = "") -> list[dict[str, Any]]:
    """A process of its own: here kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    found = folder / "found.json"
    command = [sys.executable, str(PROGRAM), "--arch", arch, "--only", only, "--json", str(found)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(found.read_text())


def check(found: list[dict[str, Any]]) -> None:
    assert all(one["spilled"] == 0 for one in found)
    too_many = {one["case"]: one["registers"] for one in found if one["registers"] > REGISTERS[one["kernel"]]}
    assert not too_many


def test_some_kernels_compile_for_one_gpu(tmp_path) -> None:
    found = compiled(tmp_path, "90", "rows.norm.int8,cache.int4,decode.int8,weight.w4.g32")
    assert {one["kernel"] for one in found} == {
        "_add_rms_norm",
        "_rope_write",
        "_decode",
        "_merge",
        "_dequantize",
        "_multiply",
    }
    check(found)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_every_kernel_compiles_for(arch, tmp_path) -> None:
    found = compiled(tmp_path, str(arch))
    assert {one["kernel"] for one in found} == set(REGISTERS)
    check(found)
