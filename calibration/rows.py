"""Rows of a data set: reading them from a JSONL or parquet file, and the text that one row stands for.

Every row travels with a string that says where it came from ("talk.jsonl, line 12"), for the error messages.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from infopt.chat import fill
from infopt.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = {"human": "user", "gpt": "assistant"}  # the names that ShareGPT files use


def json_rows(path: Path, file: BinaryIO, longest: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, one line in memory at a time. A line longer than `longest` bytes is refused."""
    number = 0
    while line := file.readline(longest + 1):
        number += 1
        where = f"{path}, line {number}"
        if len(line) > longest:
            raise BadInput(f"{where} is longer than {longest} bytes", "", "Split it into several rows.")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{where} is not valid JSON", _reason(error), "Correct or remove the line.") from error
        if not isinstance(row, dict):
            raise BadInput(
                f"{where} is not an object", f"it is a {type(row).__name__}", 'Write rows as {"text": "..."}.'
            )
        yield where, row


def parquet_rows(path: Path, file: BinaryIO) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a parquet file, a few hundred in memory at a time."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInput(f"{path} is not a readable parquet file", _reason(error), "Write the file again.") from error


def row_text(where: str, row: dict[str, Any], column: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of one row: the named column, `text`, a conversation, or `prompt` + `completion`.

    A null is an empty text (and counted as such by the caller); any other type that is not text is a BadInput.
    """
    if column is not None:
        if column not in row:
            raise _missing(where, row, f"has no column {column!r}")
        names = [column]
    elif "text" in row:
        names = ["text"]
    elif "messages" in row or "conversations" in row:
        names = ["messages" if "messages" in row else "conversations"]
    elif "prompt" in row and "completion" in row:
        names = ["prompt", "completion"]
    else:
        raise _missing(where, row, "has no column `text`, `messages`, or `prompt` and `completion`")
    return "".join(_value_text(where, name, row[name], tokenizer) for name in names)


def _missing(where: str, row: dict[str, Any], what: str) -> BadInput:
    names = ", ".join(sorted(map(str, row))[:20]) or "none"
    return BadInput(f"{where} {what}", f"its columns: {names}", "Name the column that holds the text with --column.")


def _value_text(where: str, name: str, value: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return _conversation(where, name, value, tokenizer)
    if not isinstance(value, str):
        raise BadInput(
            f"{where}: column {name!r} is not text",
            f"it is a {type(value).__name__}",
            "Correct the row, or name another --column.",
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadInput(f"{where}: column {name!r} has half of a surrogate pair", str(error), "Remove it.") from error
    return value


def _conversation(where: str, name: str, messages: list[Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """A conversation as the tokenizer's own chat template writes it (`infopt.chat` runs it in bounds)."""
    if not getattr(tokenizer, "chat_template", None):
        raise BadInput(
            f"{where} is a conversation, and this tokenizer has no chat template",
            "without one it is not known how the model wants it written",
            "Give rows with a `text` column instead.",
        )
    turns = [_turn(where, name, message) for message in messages]
    if not turns:
        return ""
    return fill(f"this tokenizer ({where}, column {name!r})", tokenizer, turns)


def _turn(where: str, name: str, message: Any) -> dict[str, str]:
    """One message as {"role", "content"}; ShareGPT's {"from", "value"} and lists of text parts are understood."""
    shape = f'{where}: column {name!r} must hold messages like {{"role": "user", "content": "..."}}'
    if not isinstance(message, dict):
        raise BadInput(shape, f"one is a {type(message).__name__}", "Correct the row.")
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content):
        content = "".join(str(part["text"]) for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise BadInput(shape, f"one has {', '.join(sorted(map(str, message)))}", "Correct the row.")
    return {"role": _ROLES.get(role, role), "content": content}


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
