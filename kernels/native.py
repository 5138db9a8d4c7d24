"""The C++ kernels of `kernels/cpp/`: 4- and 8-bit weights times activations rounded to 8 bits, and whole blocks of a model.

What a linear layer computes is `reference.linear` with the inputs rounded as `Inputs("int", group=32)` says: 8 bits, a scale
for 32 columns of a token. That costs a relative error of about 5e-3, and lets one instruction multiply 32 pairs of numbers.
The sums of 32 columns are exact; the C++ says in which order the rest is added, which is the same for one token and for
a thousand. A grid that rounds its inputs itself (W8A8, W4A8, dynamic) is computed as it says, and costs nothing more.

The weight is laid out anew, in tiles of 8 rows; it needs as many bytes as before. Scales are kept in 16 bits where that loses
nothing. The library is compiled at first use (`compiled.py`).

Legend: O output rows, I input columns, G groups of columns, N tiles, R rows of a tile, T tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from infopt.grid import Inputs
from infopt.kernels import compiled
from infopt.kernels.pages import Pages
from infopt.kv_cache import Frame
from infopt.qtensor import QTensor

ROWS, BLOCK = 8, 32
ROUNDED = Inputs("int", True, BLOCK)  # what happens to the inputs of a grid that does not say
_TYPES = {"pointer": ctypes.c_void_p, "int": ctypes.c_int32, "long": ctypes.c_int64, "float": ctypes.c_float}
_HALVES = (torch.bfloat16, torch.float16, torch.float32)  # the C++'s numbers for them
_KEPT = (torch.float32, torch.bfloat16, "fp8", "int8", "int4")
_SOURCE = Path(__file__).parent / "cpp" / "block.cpp"


def _fields(**types: str) -> list[tuple[str, type]]:
    return [(name, _TYPES[kind]) for kind, names in types.items() for name in names.split()]


def _types(names: str) -> list[type]:
    return [_TYPES[name] for name in names.split()]


class LinearStruct(ctypes.Structure):
    """`Linear` in `cpp/linear.h`."""

    _fields_ = _fields(pointer="codes scale zero bias", int="rows columns bits group scale_type span")


class BlockStruct(ctypes.Structure):
    """`Block` in `cpp/block.cpp`."""

    _fields_ = (
        *((name, LinearStruct) for name in ("qkv", "o", "gate_up", "down")),
        *_fields(
            pointer="norm mlp_norm q_norm k_norm",
            float="eps mlp_eps q_eps k_eps scaling",
            int="queries keys width act kind",
        ),
    )


class TextStruct(ctypes.Structure):
    """`Text` in `cpp/block.cpp`."""

    _fields_ = _fields(pointer="table sinks", long="pages first position")


class HalfStruct(ctypes.Structure):
    """`Half` in `cpp/pages.h`."""

    _fields_ = _fields(pointer="codes scale zero into back center")


class PagesStruct(ctypes.Structure):
    """`Pages` in `cpp/pages.h`."""

    _fields_ = (("k", HalfStruct), ("v", HalfStruct), *_fields(int="kind own sinks layer"))

    def __init__(
        self, pages: Sequence[Pages], frames: Sequence[Frame | None] = (None, None), sinks: int = 0, layer: int = 0
    ) -> None:
        """Of a layer's keys and values, which have to live as long."""
        self._tables: list[Tensor] = []
        k, v = pages
        halves = self._half(k, frames[0], of_queries=True), self._half(v, frames[1])
        super().__init__(*halves, _KEPT.index(k.codes.dtype if k.grid is None else k.kind), k.own, sinks, layer)

    def _half(self, pages: Pages, frame: Frame | None, of_queries: bool = False) -> HalfStruct:
        parts = [pages.codes, *((pages.scale, pages.zero) if pages.own else self._spread(pages))]
        if frame is not None:
            back_HDD = frame.back_HDD.mT if of_queries else frame.back_HDD
            matrices = [part.contiguous() for part in (frame.into_HDD, back_HDD, frame.center_HD)]
            self._tables += matrices
            parts += matrices
        return HalfStruct(*(None if part is None else part.data_ptr() for part in parts))

    def _spread(self, pages: Pages) -> tuple[Tensor | None, Tensor | None]:
        """A calibration's scales and zero points as floats [H, D]."""
        if pages.grid is None or pages.scale is None:
            return None, None
        zero = torch.tensor(float(pages.grid.grid.middle)) if pages.zero is None else pages.zero
        shape = (pages.heads, pages.codes.shape[2] * 8 // pages.grid.bits)
        spread = [part.float().expand(shape).contiguous() for part in (pages.scale, zero)]
        self._tables += spread
        return spread[0], spread[1]


@dataclass(frozen=True)
class Native:
    """The loaded library. target: the instructions it uses; compiler: who made it."""

    functions: ctypes.CDLL
    target: str
    compiler: str

    def __call__(self, name: str, *arguments: object) -> None:
        if getattr(self.functions, name)(*arguments):
            raise MemoryError(f"{name}: no memory for what is computed in between")


@lru_cache(maxsize=1)
def native() -> Native | None:
    """This machine's library, None where nothing can compile it."""
    return build(compiled.cache_folder())


def build(folder: Path, source: Path = _SOURCE, flags: tuple[str, ...] = ()) -> Native | None:
    """A library of a source, kept in a folder. flags: see `compiled.library`."""
    library = compiled.library(source, folder, tuple(compiled.compilers()), flags)
    if library is None:
        return None
    functions = library.functions
    functions.infopt_target.restype = ctypes.c_char_p
    functions.infopt_linear.argtypes = _types("pointer pointer long pointer")
    functions.infopt_blocks.argtypes = _types("pointer int pointer pointer int pointer pointer pointer")
    functions.infopt_rescore.argtypes = _types("pointer int int pointer int int int pointer")
    return Native(functions, functions.infopt_target().decode(), library.compiler)


def fits(q: QTensor) -> bool:
    """Whether the kernels compute this weight as its grid says."""
    grid, (_, columns) = q.grid, q.shape
    inputs = grid.inputs or ROUNDED
    whole = columns % BLOCK == 0 and grid.width(columns) % BLOCK == 0 and columns % grid.width(columns) == 0
    rounds = inputs.kind == "int" and inputs.dynamic and inputs.group in (None, BLOCK)
    return grid.kind == "int" and grid.rows == 1 and whole and rounds


class PackedWeight:
    """A weight in the kernels' layout. `struct` is what the C++ reads; it is good for as long as this object is."""

    def __init__(self, library: Native, q: QTensor) -> None:
        rows, columns = q.shape
        self.library, self.shape = library, (rows, columns)
        bits = 8 if q.grid.bits == 8 else 4
        codes_OI = q.codes if bits == 4 else q.codes ^ 128  # as a signed number: less 128
        self._codes = _tiles(_padded(codes_OI), bits)
        self._scale, kind = _halved(_by_tile(q.scale.float()))
        plain = bool((q.zero == 2 ** (bits - 1)).all())
        self._zero = None if plain else _by_tile(q.zero.to(torch.bfloat16))
        self._biases: list[Tensor] = []
        inputs = q.grid.inputs or ROUNDED
        group = q.grid.width(columns) // BLOCK
        pointers = (None if part is None else part.data_ptr() for part in (self._codes, self._scale, self._zero))
        self.struct = LinearStruct(*pointers, None, rows, columns, bits, group, kind, inputs.group or columns)

    def with_bias(self, bias_O: Tensor | None) -> LinearStruct:
        """The struct of a layer that adds a bias."""
        struct = LinearStruct.from_buffer_copy(self.struct)
        if bias_O is not None:
            self._biases.append(_padded(bias_O.detach().float()[:, None])[:, 0].contiguous())
            struct.bias = self._biases[-1].data_ptr()
        return struct

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self._codes, self._scale, self._zero) if part is not None)

    def multiply(self, x_TI: Tensor) -> Tensor:
        """y_TO fp32."""
        x_TI = x_TI.to(torch.float32).contiguous()
        y_TO = torch.empty(len(x_TI), self.shape[0])
        self.library("infopt_linear", ctypes.byref(self.struct), x_TI.data_ptr(), len(x_TI), y_TO.data_ptr())
        return y_TO


def rescore(library: Native, weight_VC: Tensor, x_TC: Tensor, count: int, logits_TV: Tensor) -> None:
    """Put the exact logits in the place of each token's `count` largest rough ones, and of the few more that are not below the
    least of as many spans' largest. weight_VC: bf16, fp16 or fp32; more rows than `count`, columns in whole blocks."""
    if not all(part.is_contiguous() for part in (weight_VC, x_TC, logits_TV)):
        raise ValueError("a tensor that is not contiguous")
    kind, shape = _HALVES.index(weight_VC.dtype), (len(x_TC), count, len(weight_VC))
    library(
        "infopt_rescore", weight_VC.data_ptr(), kind, weight_VC.shape[1], x_TC.data_ptr(), *shape, logits_TV.data_ptr()
    )


def _padded(x_OI: Tensor) -> Tensor:
    """With rows of zeros up to an even number of tiles."""
    return torch.nn.functional.pad(x_OI, (0, 0, 0, -len(x_OI) % (2 * ROWS)))


def _by_tile(x_OG: Tensor) -> Tensor:
    """[N, G, R] of [O, G]."""
    return _padded(x_OG).unflatten(0, (-1, ROWS)).transpose(1, 2).contiguous()


def _halved(scale: Tensor) -> tuple[Tensor, int]:
    """(the scales in 16 bits where that loses nothing, the C++'s number for the type)."""
    found = next(kind for kind, dtype in enumerate(_HALVES) if torch.equal(scale.to(dtype).float(), scale))
    return scale.to(_HALVES[found]), found


def _tiles(codes_OI: Tensor, bits: int) -> Tensor:
    """[N, blocks, registers, R, 4]: a byte holds one code of 8 bits, or two of 4, those of columns j and j + 16."""
    codes_NRBI = codes_OI.unflatten(0, (-1, ROWS)).unflatten(2, (-1, BLOCK))
    codes = codes_NRBI.unflatten(3, (-1, 4)).permute(0, 2, 3, 1, 4)
    if bits == 8:
        return codes.contiguous()
    low, high = codes.chunk(2, dim=2)
    return (low | high << 4).contiguous()
