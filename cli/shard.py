"""`infopt shard`: one folder per rank of a tensor- and pipeline-parallel run."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from infopt.errors import UsageError


class Layout(StrEnum):
    """What the ranks' files look like."""

    logical = "logical"
    vllm = "vllm"


def shard(
    model: Annotated[str, typer.Argument(help="A model: folder or hub id, quantized or not; or a folder of shards.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.", show_default=False)],
    tp: Annotated[int, typer.Option("--tp", "--tensor-parallel-size", min=1, help="Ranks that share each layer.")] = 1,
    pp: Annotated[int, typer.Option("--pp", "--pipeline-parallel-size", min=1, help="Stages of layers.")] = 1,
    pad: Annotated[
        bool, typer.Option("--pad", help="Pad MLP columns and the vocabulary where they do not divide.")
    ] = False,
    layout: Annotated[
        Layout, typer.Option(help="logical: any engine's; vllm: its sharded_state files, llama only, experimental.")
    ] = Layout.logical,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if infopt made it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="What was done, as JSON on stdout.")] = False,
) -> None:
    """Cut a model into one folder per rank, along heads, groups and packed words, as proven on the running block.

    `infopt assemble` gives the model back byte for byte. Example: infopt shard ./model-w4 --tp 2 -o ./model-w4-tp2
    """
    from infopt.calibration.facts import block_facts
    from infopt.calibration.outer import find_outer
    from infopt.cells import WHOLE
    from infopt.checkpoint import resolve
    from infopt.exporters.assemble import assemble, is_shards, open_shards
    from infopt.exporters.folder import model_config, open_model
    from infopt.exporters.shard import plan_shards, write_shards
    from infopt.exporters.shard_vllm import check_vllm, write_vllm
    from infopt.model import Skeleton
    from infopt.output import OutputFolder
    from infopt.report import json_out, note, progress

    if tp * pp > 1024:
        raise UsageError(f"{tp} x {pp} ranks", "at most 1024 are written", "--tp 8 --pp 2")
    folder = resolve(model)
    with OutputFolder(output, overwrite, folder) as out:
        try:
            if is_shards(folder):
                whole = out.work / "assembled"
                whole.mkdir()
                assemble(open_shards(folder), whole)
                folder = whole
            reader = open_model(folder)
            if layout is Layout.vllm:
                check_vllm(reader, tp, pp)
            skeleton = Skeleton(model_config(reader.config), reader)
            facts = block_facts(folder, skeleton) if tp > 1 else [WHOLE] * len(skeleton.blocks)
            outer = find_outer(skeleton)
            described, plan = plan_shards(reader, skeleton, facts, outer, tp, pp, pad)
            with progress("cutting", len(plan.parts)) as step:
                write_shards(reader, described, plan, out, step)
            if layout is Layout.vllm:
                logical = out.stage.rename(out.work / "logical")
                out.stage.mkdir()
                with progress("writing for vLLM", tp * len(skeleton.blocks)) as step:
                    write_vllm(open_shards(logical), reader, out.work, out.stage, step)
            out.commit()
        except BaseException:
            out.discard()
            raise
    for line in described.notes:
        note(line)
    note(f"{output}: {tp} x {pp} ranks, {len(described.tensors)} tensors")
    if as_json:
        cut = sum(tensor.axis is not None for tensor in described.tensors.values())
        said: dict[str, Any] = {"tp": tp, "pp": pp, "tensors": len(described.tensors), "cut": cut}
        json_out({**said, "replicated": len(described.tensors) - cut, "notes": list(described.notes)})
