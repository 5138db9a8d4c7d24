"""`infopt assemble`: the model that a folder of shards was cut from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def assemble(
    shards: Annotated[Path, typer.Argument(metavar="SHARDS", help="What `infopt shard` wrote.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.", show_default=False)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if infopt made it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="What was done, as JSON on stdout.")] = False,
) -> None:
    """Put shards back together: every file of the model, byte for byte, checked against its recorded sha256.

    Example: infopt assemble ./model-w4-tp2 -o ./model-w4
    """
    from infopt.exporters.assemble import assemble as put_together
    from infopt.exporters.assemble import open_shards
    from infopt.output import OutputFolder
    from infopt.report import json_out, note, progress

    opened = open_shards(shards)
    with OutputFolder(output, overwrite, shards) as out:
        try:
            with progress("assembling", len(opened.described.tensors)) as step:
                put_together(opened, out.stage, step)
            out.commit()
        except BaseException:
            out.discard()
            raise
    files = len(opened.described.files)
    note(f"{output}: {files} files, each with the sha256 that it had")
    if as_json:
        json_out({"files": files, "tensors": len(opened.described.tensors)})
