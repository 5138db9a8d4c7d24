"""`infopt inspect MODEL`: layers, sizes, and each block structure's topology as found and proven."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Annotated, Any

import typer


def inspect(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or hub id, quantized or not.")],
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Show a model's layers, and which op writes what others read: found by probing, proven numerically.

    Of experts, the first of each layer is shown, for all; what calibration saw of them is shown where infopt made the folder.

    Example: infopt inspect ./model
    """
    from infopt.calibration.discover import discover, structure_key
    from infopt.checkpoint import resolve
    from infopt.exporters.folder import model_config, open_model
    from infopt.model import Skeleton
    from infopt.recipes.experts import expert_lines

    reader = open_model(resolve(model))
    skeleton = Skeleton(model_config(reader.config), reader)
    found: dict[Any, dict[str, Any]] = {}
    for i in range(len(skeleton.blocks)):
        key = structure_key(skeleton.model.get_submodule(skeleton.blocks[i]))
        if key not in found:
            skeleton.load_block(i)
            found[key] = {"blocks": [], "topology": discover(skeleton, i)}
            skeleton.free_block(i)
        found[key]["blocks"].append(i)
    structures = list(found.values())
    seen = expert_lines(reader.folder)
    if as_json:
        data = [{"blocks": s["blocks"], "topology": s["topology"].to_json()} for s in structures]
        weights = sum(info.nbytes for info in reader.tensors.values())
        print(json.dumps({"model_type": reader.config["model_type"], "tensor_bytes": weights, "structures": data,
                          "experts": seen}))  # fmt: skip
        return
    print(f"{reader.config['model_type']}: {len(skeleton.blocks)} blocks at {skeleton.blocks[0].rpartition('.')[0]}.*, "
          f"{len(reader.tensors)} tensors")  # fmt: skip
    for structure in structures:
        print(f"\n{_ranges(structure['blocks'])}")
        for line in _lines(structure["topology"]):
            print(f"  {line}")
    for line in seen:
        print(f"\n{line}" if line is seen[0] else line)


def _lines(topology: Any) -> list[str]:
    lines = []
    for space in topology.spaces:
        fold = space.fold
        origin = f"{fold.writer} ({fold.law}, proven)" if fold else f"no fold: {space.reason}"
        lines.append(f"{origin}  ->  [{space.width}]  ->  {', '.join(space.readers)}")
    ops = [f"{op.name} [{op.out_features}, {op.in_features}] {topology.parallel(op.name)}" for op in topology.linears()]
    lines = [*_twins(lines), "layers: " + "; ".join(_twins(ops))]
    if topology.unhandled:
        lines.append(f"left alone: {', '.join(topology.unhandled)}")
    return lines


def _twins(lines: list[str]) -> list[str]:
    """Lines that differ in the number of an expert, once: "mlp.experts.*.up_proj (x 8)"."""
    counted = Counter(re.sub(r"\.\d+\.", ".*.", line) for line in lines)
    return [f"{line} (x {count})" if count > 1 else line for line, count in counted.items()]


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return "blocks " + ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in runs)
