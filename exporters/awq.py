"""The `awq` format of AutoAWQ, its GEMM version: 4 bits, with or without zero points.

    qweight int32 [I, O / 8]   qzeros int32 [G, O / 8]   scales float16 [G, O]

Eight neighbouring output channels share a word, and nibble k of a word holds channel ORDER[k] of its eight. Zero points are
stored as they are; without zero points (`zero_point: false`) they are 8 and stored all the same, which every loader
takes. What AWQ folded into norms is in the norms: the format knows nothing of the method.

A module is left alone by loaders when a name in `modules_to_not_convert` is a part of its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from infopt.exporters.packing import pack_bits, unpack_bits
from infopt.exporters.quantized import TRANSPOSED, Format, Layout, Shape, check_scale, damaged, require, unreadable
from infopt.grid import Grid
from infopt.header import TensorInfo
from infopt.qtensor import QTensor

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def encode(name: str, q: QTensor) -> dict[str, torch.Tensor]:
    """The file's tensors for the op `name`; the grid's scales must be float16 already."""
    if q.grid.scale_dtype is not torch.float16:
        raise ValueError(f"{name}: scales of {q.grid.scale_dtype} would be rounded")
    return {
        f"{name}.qweight": _pack(q.codes.T),
        f"{name}.qzeros": _pack(q.zero.T),
        f"{name}.scales": q.scale.T.contiguous(),
    }


def decode(get: Mapping[str, torch.Tensor], grid: Grid) -> QTensor:
    """The QTensor of an op from its tensors by their last name."""
    codes_OI, zero_OG = (_unpack(get[part]).T.contiguous() for part in ("qweight", "qzeros"))
    return QTensor(codes_OI, get["scales"].T.contiguous(), zero_OG, grid)


def config(grids: Mapping[str, Grid], ignore: Iterable[str], transposed: Iterable[str] = ()) -> dict[str, Any]:
    """`quantization_config`; all grids are equal here (`Format.mixed`)."""
    grid = next(iter(grids.values()))
    settings: dict[str, Any] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": -1 if grid.group is None else grid.group,
        "zero_point": not grid.symmetric,
        "version": "gemm",
        "modules_to_not_convert": sorted(ignore) or None,
    }
    if names := sorted(transposed):
        settings[TRANSPOSED] = names
    return settings


def layouts(settings: dict[str, Any], stored: Mapping[str, TensorInfo]) -> dict[str, Layout]:
    """The quantized ops of a folder, every type and shape checked. Raises BadInput, Unsupported."""
    bits = settings.get("bits", settings.get("w_bit"))
    group = settings.get("group_size", settings.get("q_group_size"))
    version, zero_point = settings.get("version", "gemm"), settings.get("zero_point", True)
    if bits != 4 or str(version).lower() != "gemm":
        raise unreadable(
            f"config.json: an awq folder of {str(bits)[:40]} bits, version {str(version)[:40]}",
            "infopt reads 4 bits in the version gemm",
        )
    if type(group) is not int or type(zero_point) is not bool:
        raise damaged("config.json: group_size or zero_point of the awq folder", "a whole number and a flag, please")
    names = [key.removesuffix(".qweight") for key in stored if key.endswith(".qweight")]
    return {name: _layout(name, group, not zero_point, stored) for name in names}


def _layout(name: str, group: int, symmetric: bool, stored: Mapping[str, TensorInfo]) -> Layout:
    words, scale = stored[f"{name}.qweight"], stored.get(f"{name}.scales")
    if scale is None:
        raise damaged(f"{words.file.name}: {name}.scales is missing", "the packed weight means nothing without it")
    check_scale(scale)
    if len(words.shape) != 2 or not all(words.shape):
        raise damaged(f"{words.file.name}: {name}.qweight has the shape {words.shape}", "it is no packed weight")
    columns, rows = words.shape[0], 8 * words.shape[1]
    width = columns if group == -1 else group
    if width < 1 or columns % width:
        raise damaged(f"{words.file.name}: {name} has {columns} columns", f"they are no groups of {group}")
    want: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "qweight": (torch.int32, (columns, rows // 8)),
        "qzeros": (torch.int32, (columns // width, rows // 8)),
        "scales": (scale.dtype, (columns // width, rows)),
    }
    require(name, stored, want)
    return Layout(Grid(4, None if group == -1 else group, symmetric, scale.dtype), (rows, columns), tuple(want))


def _objection(grid: Grid, shape: Shape) -> str | None:
    if grid.bits != 4:
        return f"it has 4 bits, not {grid.bits}"
    if not grid.fits(shape[1]):
        return f"{shape[1]} columns are no whole number of groups of {grid.group}"
    return f"{shape[0]} rows are no multiple of 8" if shape[0] % 8 else None


def _pack(codes_XO: torch.Tensor) -> torch.Tensor:
    """[X, O] codes to [X, O / 8] words; X is columns or groups."""
    eights = codes_XO.reshape(codes_XO.shape[0], -1, 8)[:, :, list(ORDER)]
    return pack_bits(eights.flatten(1), 4, 1)


def _unpack(words: torch.Tensor) -> torch.Tensor:
    eights = unpack_bits(words, 4, words.shape[1] * 8, 1).unflatten(1, (-1, 8))
    return eights[:, :, [ORDER.index(k) for k in range(8)]].flatten(1)


FORMAT = Format(
    name="awq",
    scales=(torch.float16,),
    mixed=False,
    objection=_objection,
    encode=encode,
    decode=decode,
    config=config,
    layouts=layouts,
)
