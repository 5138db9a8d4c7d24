"""Triton kernels without a GPU: its interpreter repaired, outputs poisoned, and kernels with a bug planted in them.

The interpreter executes a kernel block by block with numpy, which has no bf16: it keeps the bits in uint16. As it comes
(3.6 to 3.9) it multiplies such bits as if they were numbers in `tl.dot`, cuts bits off where fp32 becomes bf16 (a GPU
rounds to the nearest), and loses the carry where fp32 becomes E4M3. `repair` sends these conversions through torch.
Only the interpreter is changed, and only in the processes of the tests.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH = {
    tl.float16: torch.float16, tl.bfloat16: torch.bfloat16, tl.float32: torch.float32, tl.float64: torch.float64,
    tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2,
}  # fmt: skip
_BITS = (tl.bfloat16, tl.float8e4nv, tl.float8e5)  # kept as integers by the interpreter
_SIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_counter = itertools.count()


def convert(data: np.ndarray, source: Any, target: Any) -> np.ndarray:
    """Values of a floating type as another one, in the arrays that the interpreter keeps them in; E4M3 saturates."""
    numbers = torch.from_numpy(np.ascontiguousarray(data).reshape(-1).view(np.uint8)).view(_TORCH[source])
    wide = numbers.to(torch.float64 if source == tl.float64 else torch.float32)
    if target in (tl.float8e4nv, tl.float8e5):
        largest = torch.finfo(_TORCH[target]).max
        wide = wide.clamp(-largest, largest)
    made = wide.to(_TORCH[target]).view(torch.uint8).numpy()
    return made.view(interpreter._get_np_dtype(target)).reshape(data.shape)


def repair() -> None:
    """Make the interpreter round like a GPU, and multiply bf16 and FP8 as numbers."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot = builder.create_dot

    def cast(self: Any, src: Any, dst_type: Any, *_: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        data = src.data
        if source in _TORCH and target in _TORCH:
            return handle(convert(data, source, target), target)
        if source in _BITS:
            data = convert(data, source, tl.float32)
        if target in _BITS:
            return handle(convert(data.astype(np.float32), tl.float32, target), target)
        return handle(data.astype(interpreter._get_np_dtype(target)), target)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        a, b = (
            handle(convert(x.data, x.dtype.scalar, tl.float32), tl.float32) if x.dtype.scalar in _BITS else x
            for x in (a, b)
        )
        return dot(self, a, b, d, *rest)

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast, cast, create_dot


repair()


@contextmanager
def poisoned() -> Iterator[None]:
    """`torch.empty` gives NaN, or the largest integer, so that an element that nobody writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def planted(module: ModuleType, folder: Path, old: str, new: str, inside: ModuleType | None = None) -> ModuleType:
    """A copy of a module of kernels in whose source `old` has become `new`. inside: the module of kernels that it uses
    where the bug is put, if it is not the module itself."""
    if inside is not None:
        helper = planted(inside, folder, old, new)
        old, new = f"from {inside.__name__} import", f"from {helper.__name__} import"
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {module.__name__}"
    name = f"planted_{next(_counter)}"
    path = folder / f"{name}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made


def assert_caught(check: Any, *arguments: Any) -> None:
    """That the comparison of the ordinary test fails."""
    with pytest.raises(AssertionError, match="off by"):
        check(*arguments)


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float, what: str = "result") -> None:
    """Relative to the norm of what is wanted, and everything finite."""
    assert found.shape == wanted.shape, f"{what}: {tuple(found.shape)} instead of {tuple(wanted.shape)}"
    found, wanted = found.double(), wanted.double()
    error = ((found - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()
    assert error <= tolerance, f"{what} is off by {error:.2e}"  # also where it is NaN


def assert_codes(found: torch.Tensor, wanted: torch.Tensor, share: float = 2e-3) -> None:
    """Codes, equal but for a few that lie next to each other: sums in another order can move a value over an edge."""
    apart = (_order(found) - _order(wanted)).abs()
    wrong = (apart > 0).float().mean().item()
    assert apart.max() <= 1, f"codes are off by {apart.max().item()}"
    assert wrong <= share, f"codes are off by one at {wrong:.1%}"


def _order(codes: torch.Tensor) -> torch.Tensor:
    """Whole numbers in the order of the values."""
    if codes.dtype != torch.float8_e4m3fn:
        return codes.int()
    bits = codes.view(torch.uint8).int()
    return torch.where(bits >= 128, 128 - bits, bits)
