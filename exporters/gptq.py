"""The `gptq` format of AutoGPTQ and GPTQModel, 2, 3, 4 or 8 bits, in both of its versions.

    qweight int32 [I b / 32, O]   codes as a dense bit stream along I
    qzeros  int32 [G, O b / 32]   zero points as a bit stream along O; version 1 stores z - 1, version 2 ("gptq_v2") z
    scales  float16 [G, O]        g_idx int32 [I], the group of each column: i // group unless in activation order

W[o, i] = (u[i, o] - z[g_idx[i], o]) * scales[g_idx[i], o]. Checked against GPTQModel 7.7's packer, by formula in the tests.

Version 1 cannot say z = 0: the subtraction borrows from the neighbouring field, and loaders disagree on what they read
then. So version 1 is written for symmetric grids only, and `gptq_v2` for those with zero points. Of activation order,
only what servers take is written: trivial groups with `desc_act: false`. (Our GPTQ solves in activation order with static
groups, which needs no more.) Permuted groups are read, as dense weights.

Ops that differ from the rest are listed in `dynamic`, GPTQModel's table of regular expressions. Those of a folder are not
evaluated (a hostile one can run for ever): ours are known by their text, and for others bits and groups show in the shapes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch

import infopt
from infopt.exporters.packing import pack_bits, unpack_bits
from infopt.exporters.quantized import TRANSPOSED, Format, Layout, Shape, check_scale, damaged, require, unreadable
from infopt.grid import BITS, Grid
from infopt.header import TensorInfo, read_tensor
from infopt.qtensor import QTensor


def encode(version: int, name: str, q: QTensor) -> dict[str, torch.Tensor]:
    """The file's tensors for the op `name`; the grid's scales must be float16 already."""
    if q.grid.scale_dtype is not torch.float16:
        raise ValueError(f"{name}: scales of {q.grid.scale_dtype} would be rounded")
    bits, columns = q.grid.bits, q.shape[1]
    stored_OG = q.zero if version == 2 else (q.zero.to(torch.int16) - 1) % 2**bits
    return {
        f"{name}.qweight": pack_bits(q.codes.T, bits, 0),
        f"{name}.qzeros": pack_bits(stored_OG.T, bits, 1),
        f"{name}.scales": q.scale.T.contiguous(),
        f"{name}.g_idx": (torch.arange(columns) // q.grid.width(columns)).to(torch.int32),
    }


def decode(version: int, get: Mapping[str, torch.Tensor], grid: Grid) -> QTensor:
    """The QTensor of an op; its columns are sorted by group (a stable sort) where `g_idx` is not sorted."""
    words, scale_GO = get["qweight"], get["scales"]
    columns, rows = words.shape[0] * 32 // grid.bits, words.shape[1]
    codes_OI = unpack_bits(words, grid.bits, columns, 0).T
    if "g_idx" in get and (order := _order(get["g_idx"], grid.width(columns))) is not None:
        codes_OI = codes_OI[:, order]
    zero_GO = unpack_bits(get["qzeros"], grid.bits, rows, 1)
    if version == 1:
        zero_GO = (zero_GO + 1) & grid.levels
    return QTensor(codes_OI.contiguous(), scale_GO.T.contiguous(), zero_GO.T.contiguous(), grid)


def config(
    version: int, grids: Mapping[str, Grid], ignore: Iterable[str], transposed: Iterable[str] = ()
) -> dict[str, Any]:
    """`quantization_config`. The commonest grid is the rule; the others, and linears left alone, are in `dynamic`."""
    common = Counter(grids.values()).most_common(1)[0][0]
    settings: dict[str, Any] = {
        "quant_method": "gptq",
        **_numbers(common),
        "desc_act": False,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "lm_head": "lm_head" in grids,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"infopt:{infopt.__version__}"]},
    }
    dynamic = {_rule(name): _numbers(grid) for name, grid in grids.items() if grid != common}
    blocks = {name.split(".")[0] for name in grids}
    dynamic |= {f"-:^{re.escape(name)}$": {} for name in sorted(ignore) if name.split(".")[0] in blocks}
    if dynamic:
        settings["dynamic"] = dynamic
    if names := sorted(transposed):
        settings[TRANSPOSED] = names
    return settings


def layouts(settings: dict[str, Any], stored: Mapping[str, TensorInfo]) -> dict[str, Layout]:
    """The quantized ops of a folder, every type and shape checked. Raises BadInput, Unsupported."""
    bits, group, symmetric = settings.get("bits"), settings.get("group_size", -1), settings.get("sym", True)
    if type(bits) is not int or bits not in BITS:
        raise unreadable(f"config.json: a gptq folder of {str(bits)[:40]} bits", "infopt reads 2, 3, 4 and 8 bits")
    if settings.get("pack_dtype", "int32") != "int32":
        raise unreadable("config.json: a gptq folder whose pack_dtype is not int32", "infopt reads 32-bit words")
    if type(group) is not int or type(symmetric) is not bool:
        raise damaged("config.json: group_size or sym of the gptq folder", "they must be a whole number and a flag")
    given = settings.get("dynamic") or {}
    rules = {text: rule for text, rule in given.items() if isinstance(rule, dict)} if isinstance(given, dict) else {}
    names = [key.removesuffix(".qweight") for key in stored if key.endswith(".qweight")]
    ours = set(map(_rule, names))
    foreign = [rule for text, rule in rules.items() if text not in ours]
    if any(rule.get("sym", symmetric) != symmetric for rule in foreign):
        symmetric = False  # which ops the rule means is not asked: zero points are stored for all of them anyway
    return {
        name: _layout(name, {"group_size": group, "sym": symmetric, **rules.get(_rule(name), {})}, bits, stored)
        for name in names
    }


def _layout(name: str, rule: Mapping[str, Any], bits: int, stored: Mapping[str, TensorInfo]) -> Layout:
    """rule: `group_size` and `sym` as the config has them for this op."""
    words = stored[f"{name}.qweight"]
    scale, index = stored.get(f"{name}.scales"), stored.get(f"{name}.g_idx")
    if scale is None:
        raise damaged(f"{words.file.name}: {name}.scales is missing", "the packed weight means nothing without it")
    check_scale(scale)
    if len(words.shape) != 2 or not all(words.shape) or not scale.shape[0]:
        raise damaged(f"{words.file.name}: {name} has shapes {words.shape}, {scale.shape}", "they are no packed weight")
    rows, groups = words.shape[1], scale.shape[0]
    columns = words.shape[0] * 32 // bits
    if (
        index is not None and len(index.shape) == 1 and index.shape[0]
    ):  # another number of bits than the rule's shows here
        columns = index.shape[0]
        bits = words.shape[0] * 32 // columns
    if bits not in BITS or columns % groups:
        raise damaged(
            f"{words.file.name}: {name} claims {columns} columns, {groups} groups, {bits} bits", "no such grid"
        )
    width = columns // groups
    channel = groups == 1 and rule["group_size"] != columns
    grid = Grid(bits, None if channel else width, rule["sym"] is True, scale.dtype)
    want: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "qweight": (torch.int32, (columns * bits // 32, rows)),
        "qzeros": (torch.int32, (groups, rows * bits // 32)),
        "scales": (scale.dtype, (groups, rows)),
    }
    if objection := _fields(grid, (rows, columns)):
        raise damaged(f"{words.file.name}: {name} is [{rows}, {columns}] of {bits} bits", objection)
    if index is None:
        require(name, stored, want)
        return Layout(grid, (rows, columns), tuple(want))
    want["g_idx"] = (torch.int32, (columns,))
    require(name, stored, want)
    group_I = read_tensor(index)
    known = int(group_I.min()) >= 0 and int(group_I.max()) < groups  # asked first: bincount makes room for the largest
    if not known or bool((torch.bincount(group_I, minlength=groups) != width).any()):
        raise damaged(f"{index.file.name}: {name}.g_idx", f"it must name each of {groups} groups {width} times")
    return Layout(grid, (rows, columns), tuple(want), _order(group_I, width))


def _order(group_I: torch.Tensor, width: int) -> torch.Tensor | None:
    """What sorts the columns by group, None where they are sorted."""
    if bool((group_I == torch.arange(len(group_I)) // width).all()):
        return None
    return torch.argsort(group_I, stable=True)


def _rule(name: str) -> str:
    """The key in `dynamic` that means this op and no other."""
    return f"+:^{re.escape(name)}$"


def _numbers(grid: Grid) -> dict[str, Any]:
    return {"bits": grid.bits, "group_size": -1 if grid.group is None else grid.group, "sym": grid.symmetric}


def _fields(grid: Grid, shape: Shape) -> str | None:
    """Why codes and zero points of this shape do not fill whole words."""
    bad = [f"{size} {what}" for size, what in zip(shape, ("rows", "columns"), strict=True) if size * grid.bits % 32]
    return f"{' and '.join(bad)} of {grid.bits} bits do not fill whole 32-bit words" if bad else None


def _objection(version: int, grid: Grid, shape: Shape) -> str | None:
    if not grid.fits(shape[1]):
        return f"{shape[1]} columns are no whole number of groups of {grid.group}"
    if version == 1 and not grid.symmetric:
        return "version 1 stores zero points minus one and cannot say zero"
    return _fields(grid, shape)


def _make(version: int) -> Format:
    return Format(
        name="gptq" if version == 1 else "gptq_v2",
        scales=(torch.float16,),
        mixed=True,
        objection=partial(_objection, version),
        encode=partial(encode, version),
        decode=partial(decode, version),
        config=partial(config, version),
        layouts=layouts,
    )


V1, V2 = _make(1), _make(2)
