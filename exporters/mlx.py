"""MLX's affine groups: the format of `mlx-lm` models, 2, 3, 4 or 8 bits in groups of 32, 64 or 128 columns.

    weight  uint32 [O, I b / 32]   codes as a dense bit stream along I
    scales, biases [O, G]          W = code * scale + bias, in one floating type

An offset is a stored number here, and not a zero point: bias = -z * scale must be a number of the scales' own type. Without
zero points z is a power of two and it always is; with them a solver makes float16 scales of 7 bits (`scale_bits`), and what
comes from other formats takes the first type that holds both, float32 at worst. MLX's own quantizer rounds scales and
offsets apart, so its offsets are rarely multiples: such a layer is read as the dense weight that it means.

A module is quantized where `scales` exists, embeddings and the head too. config.json says `group_size` and `bits` twice, as
`quantization` and as `quantization_config`, and may override both for a path. Checked against the mlx package.

Legend: O output channels, I input columns, G groups of columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from infopt.exporters.packing import pack_bits, unpack_bits
from infopt.exporters.quantized import TRANSPOSED, Format, Layout, Shape, check_scale, damaged, require, unreadable
from infopt.grid import BITS, GROUPS, Grid
from infopt.header import TensorInfo, read_tensor
from infopt.qtensor import QTensor

_OFFSETS = "its offsets are no multiples of its scales"


def encode(name: str, q: QTensor) -> dict[str, torch.Tensor]:
    """The file's tensors for the op `name`; ValueError for offsets that `exact` would have named."""
    if why := exact(q):
        raise ValueError(f"{name}: {why}")
    return {
        f"{name}.weight": pack_bits(q.codes, q.grid.bits, 1).view(torch.uint32),
        f"{name}.scales": q.scale,
        f"{name}.biases": _offset(q.scale, q.zero).to(q.scale.dtype),
    }


def decode(get: Mapping[str, torch.Tensor], grid: Grid) -> QTensor:
    """The QTensor of an op from its tensors by their last name; only for ops whose offsets are multiples."""
    zero = _zero(get["scales"], get["biases"], grid)
    if zero is None:
        raise ValueError(_OFFSETS)
    return QTensor(_codes(get, grid), get["scales"], zero, grid)


def dense(get: Mapping[str, torch.Tensor], grid: Grid) -> torch.Tensor:
    """W [O, I] fp32 of any op, by MLX's own formula."""
    codes = _codes(get, grid)
    w_OGK = codes.float().unflatten(1, (-1, grid.width(codes.shape[1])))
    return (w_OGK * get["scales"].float()[..., None] + get["biases"].float()[..., None]).flatten(1)


def exact(q: QTensor) -> str | None:
    """Why the offsets of q are no numbers of its scales' type; None where they are."""
    offset = _offset(q.scale, q.zero)
    bad = int((offset.to(q.scale.dtype).double() != offset).sum())
    kind = str(q.scale.dtype).removeprefix("torch.")
    return f"zero point times scale is no {kind} number in {bad} of {offset.numel()} groups" if bad else None


def config(grids: Mapping[str, Grid], ignore: Iterable[str], transposed: Iterable[str] = ()) -> dict[str, Any]:
    """The section for both keys; the commonest grid is the rule. What is not quantized shows in the tensors."""
    common = Counter((grid.group, grid.bits) for grid in grids.values()).most_common(1)[0][0]
    settings: dict[str, Any] = {"group_size": common[0], "bits": common[1], "mode": "affine"}
    for name, grid in grids.items():
        if (grid.group, grid.bits) != common:
            settings[name] = {"group_size": grid.group, "bits": grid.bits}
    if names := sorted(transposed):
        settings[TRANSPOSED] = names
    return settings


def is_section(settings: Any) -> bool:
    """Whether a section of config.json is MLX's: it alone has no `quant_method`."""
    return isinstance(settings, dict) and "quant_method" not in settings and {"group_size", "bits"} <= settings.keys()


def layouts(settings: dict[str, Any], stored: Mapping[str, TensorInfo]) -> dict[str, Layout]:
    """The quantized ops of a folder, every type and shape checked. Raises BadInput, Unsupported."""
    if settings.get("mode", "affine") != "affine":
        raise unreadable(f"config.json: MLX's mode {str(settings['mode'])[:40]}", "infopt reads affine groups")
    names = sorted(key.removesuffix(".scales") for key in stored if key.endswith(".scales"))
    return {name: _layout(name, settings, stored) for name in names}


def _layout(name: str, settings: dict[str, Any], stored: Mapping[str, TensorInfo]) -> Layout:
    own = settings.get(name)
    rule = {**settings, **own} if isinstance(own, dict) else settings
    bits, group = rule["bits"], rule["group_size"]
    if type(bits) is not int or bits not in BITS or type(group) is not int or group < 1:
        what = f"config.json: {name} in {str(bits)[:40]} bits, groups of {str(group)[:40]}"
        raise unreadable(what, "infopt reads MLX's groups of 2, 3, 4 and 8 bits")
    words, scale = stored.get(f"{name}.weight"), stored[f"{name}.scales"]
    check_scale(scale)
    if words is None or len(words.shape) != 2 or not all(words.shape) or not all(scale.shape):
        raise damaged(f"{scale.file.name}: {name}.weight is no packed matrix", "its scales mean nothing without one")
    rows, columns = words.shape[0], words.shape[1] * 32 // bits
    if columns % group or columns * bits % 32:
        raise damaged(f"{words.file.name}: {name} has {columns} columns", f"they are no groups of {group}")
    want: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight": (torch.uint32, (rows, columns * bits // 32)),
        "scales": (scale.dtype, (rows, columns // group)),
        "biases": (scale.dtype, (rows, columns // group)),
    }
    require(name, stored, want)
    scale_OG, bias_OG = (read_tensor(stored[f"{name}.{part}"]) for part in ("scales", "biases"))
    grid = Grid(bits, group, False, scale.dtype)
    zero = _zero(scale_OG, bias_OG, grid)
    if zero is None:
        return Layout(grid, (rows, columns), ("scales", "weight", "biases"), dense=_OFFSETS)
    symmetric = bool((zero == 2 ** (bits - 1)).all())
    return Layout(Grid(bits, group, symmetric, scale.dtype), (rows, columns), ("scales", "weight", "biases"))


def _codes(get: Mapping[str, torch.Tensor], grid: Grid) -> torch.Tensor:
    words = get["weight"].view(torch.int32)
    return unpack_bits(words, grid.bits, words.shape[1] * 32 // grid.bits, 1)


def _zero(scale_OG: torch.Tensor, bias_OG: torch.Tensor, grid: Grid) -> torch.Tensor | None:
    """uint8 zero points with bias = -z * scale exactly, None where there are none."""
    scale, bias = scale_OG.double(), bias_OG.double()
    if not bool((torch.isfinite(scale) & torch.isfinite(bias) & (scale > 0)).all()):
        return None
    zero = (-bias / scale).round()
    fits = (zero >= 0) & (zero <= grid.levels) & (zero * scale == -bias)
    return zero.to(torch.uint8) if bool(fits.all()) else None


def _offset(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return 0.0 - scale.double() * zero.double()  # and not -0.0


def _objection(grid: Grid, shape: Shape) -> str | None:
    if grid.group not in GROUPS:
        return (
            f"MLX has groups of {', '.join(map(str, GROUPS))} columns, and this is {grid.group or 'one of all columns'}"
        )
    if not grid.fits(shape[1]):
        return f"{shape[1]} columns are no whole number of groups of {grid.group}"
    return "8 bits with zero points leave three bits for a scale" if grid.bits == 8 and not grid.symmetric else None


FORMAT = Format(
    name="mlx",
    scales=(torch.float16, torch.bfloat16, torch.float32),
    mixed=True,
    objection=_objection,
    exact=exact,
    scale_bits=7,
    encode=encode,
    decode=decode,
    dense=dense,
    config=config,
    layouts=layouts,
)
