"""From a data set to windows of token ids, for calibration and for evaluation.

One protocol serves both: the rows are joined to one text, the text is tokenised once, and cut into non-overlapping windows
of `seqlen` tokens, each of which begins with what the tokenizer puts before a text, if it does so. Models that were trained
with such a token lean on it: without it Gemma 3's perplexity is three times as large, and what rounding does to it is
decided by the few tokens that take its place. Evaluation takes the first `num_samples` windows. Calibration does too when
`seed` is 0; any other seed draws that many windows without replacement, in their order. What was read and what was used
goes into the report, with a digest of the ids.

With `padding` no rows are joined: each row (of a text, each paragraph) is a window of its own, cut after `seqlen` tokens, and
shorter ones are filled up (`infopt.calibration.padding`). Chosen are then rows, as windows are otherwise.

A data set is
  builtin   Python's own language reference as every CPython carries it (`pydoc_data.topics`): English prose and code,
            about 90,000 tokens, no network. Calibration sees the first four fifths of it, evaluation the last fifth.
            A default that works everywhere, not a good choice for your model: give text like what it will be used on.
  a file    .txt .text .md (the whole file), .jsonl (one object per line) or .parquet
  a folder or a hub id   through the `datasets` library; `id:config` names a configuration; HF_HUB_OFFLINE is respected
A row is a column of text (`text`, or the one named), `messages`/`conversations` through the tokenizer's chat template,
or `prompt` + `completion`. File formats are read here, so `datasets` (and pandas with it) is imported only for the hub.

Files are untrusted and of any size: what is read of them is bounded (`_budget`), and the report says when it was cut.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, cast

import torch

from infopt.calibration.padding import NO_TOKEN, padded
from infopt.calibration.rows import json_rows, parquet_rows, row_text
from infopt.checkpoint import contained
from infopt.errors import BadInput, UsageError
from infopt.header import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Part = Literal["calibration", "evaluation"]

_TEXT_FILES = (".txt", ".text", ".md")
_FILES = (*_TEXT_FILES, ".jsonl", ".parquet")
_LONGEST_LINE = 64 * 2**20
_CONTINUATION = bytes(range(0x80, 0xC0))  # the bytes of a UTF-8 character after its first
_BETWEEN = "\n\n"  # rows that are joined, and paragraphs of a text
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class DataSpec:
    """What to read: the flags `--dataset --num-samples --seqlen --seed --split --column --pad`."""

    dataset: str = "builtin"
    num_samples: int = 128
    seqlen: int = 512
    seed: int = 0
    split: str | None = None
    column: str | None = None
    padding: bool = False

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("seqlen", 2)):
            if getattr(self, name) < least:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag} {getattr(self, name)}", "is too small", f"Give {flag} {least} or more.")


@dataclass
class _Text:
    """The texts of the rows, or the paragraphs of one text, and how they came to be."""

    source: str
    rows: list[str]
    rows_read: int = 1
    rows_empty: int = 0
    truncated: bool = False


def load_windows(
    spec: DataSpec, tokenizer: PreTrainedTokenizerBase, *, part: Part, vocab_size: int | None = None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Windows of token ids, int64 [N, T], and the report of what was read.

    N is `spec.num_samples` or fewer, where the text is shorter (the report's `windows` and `windows_asked` tell); T is
    `spec.seqlen`, with padding the length of the longest window. Give `vocab_size` (the rows of the embedding) to have the
    ids checked against it.
    Raises BadInput naming the file, line or column.
    """
    text = _read(spec, tokenizer, part)
    ids_NT, counts = (_padded if spec.padding else _packed)(text.rows, spec, tokenizer, part)
    if vocab_size is not None and int(ids_NT.max()) >= vocab_size:
        raise BadInput(
            f"the tokenizer made the token id {int(ids_NT.max())}",
            f"the model's embedding has only {vocab_size} rows",
            "Use the tokenizer that belongs to this model.",
        )
    report = {
        "dataset": spec.dataset,
        "source": text.source,
        "part": part,
        "rows_read": text.rows_read,
        "rows_used": text.rows_read - text.rows_empty,
        "rows_empty": text.rows_empty,
        "truncated": text.truncated,
        "characters": len(_BETWEEN.join(text.rows)),
        **counts,
        "beginning": len(beginning(tokenizer)),
        "windows": len(ids_NT),
        "windows_asked": spec.num_samples,
        "seqlen": spec.seqlen,
        "seed": spec.seed,
        "padding": spec.padding,
        "tokens_used": int((ids_NT != NO_TOKEN).sum()),
        "sha256": hashlib.sha256(ids_NT.numpy().tobytes()).hexdigest(),
    }
    return ids_NT, report


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local model folder. No code from the folder is run. Raises BadInput."""
    from transformers import AutoTokenizer

    fix = "Copy tokenizer.json and tokenizer_config.json from the original model into this folder."
    if not Path(folder).is_dir():
        raise BadInput(f"{folder} is not a folder", "a tokenizer is read from a model's folder", fix)
    config = _family(Path(folder))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), config=config, trust_remote_code=False, local_files_only=True
        )
        tokenizer("a", verbose=False)  # what is odd in its config shows when it is used
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise BadInput(f"{folder} has no tokenizer that can be loaded", _first_line(error), fix) from error
    except Exception as error:
        if type(error) is not Exception:  # the Rust tokenizer raises a plain Exception for a malformed file
            raise
        raise BadInput(f"{folder} has no tokenizer that can be loaded", _first_line(error), fix) from error
    if not set(tokenizer.get_vocab()) - {*tokenizer.all_special_tokens, "\u2581"}:  # made of nothing: no file was there
        raise BadInput(f"{folder} has no tokenizer that can be loaded", "its vocabulary is empty", fix)
    return cast("PreTrainedTokenizerBase", tokenizer)


def _family(folder: Path) -> Any:
    """What a tokenizer needs to know of the model: its type, and the class if config.json names it. All else in there is left
    to those who build the model, which check it first."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    path = contained(folder, "config.json")
    raw = read_json(path) if path.exists() else {}
    said = {key: raw.get(key) for key in ("model_type", "tokenizer_class")} if isinstance(raw, dict) else {}
    name = said.get("model_type")
    kind: Any = CONFIG_MAPPING[name] if isinstance(name, str) and name in CONFIG_MAPPING else PreTrainedConfig
    try:
        config = kind()
    except (StrictDataclassError, ValueError):  # a family whose defaults do not suit it
        config = PreTrainedConfig()
    for key, value in said.items():
        if isinstance(value, str):
            setattr(config, key, value)
    return config


def _choose(spec: DataSpec, count: int, part: Part) -> torch.Tensor:
    wanted = min(spec.num_samples, count)
    if spec.seed == 0 or part == "evaluation":
        return torch.arange(wanted)
    generator = torch.Generator().manual_seed(spec.seed)
    return torch.randperm(count, generator=generator)[:wanted].sort().values


def _packed(
    rows: list[str], spec: DataSpec, tokenizer: PreTrainedTokenizerBase, part: Part
) -> tuple[torch.Tensor, dict[str, int]]:
    """(windows cut from the rows joined to one text, the tokens of that text)."""
    ids = torch.tensor(token_ids(spec.dataset, tokenizer, [_BETWEEN.join(rows)])[0], dtype=torch.int64)
    begin = torch.tensor(beginning(tokenizer)[: spec.seqlen - 1], dtype=torch.int64)
    length = spec.seqlen - len(begin)
    if len(ids) < length:
        raise BadInput(
            f"{spec.dataset} is too short",
            f"it has {len(ids)} tokens, and one window needs {length}",
            f"Give more text with --dataset, or a shorter window: --seqlen {max(2, len(ids) + len(begin))}",
        )
    count = len(ids) // length
    windows_NT = torch.cat((begin.expand(count, -1), ids[: count * length].view(count, length)), dim=1)
    return windows_NT[_choose(spec, count, part)].contiguous(), {"tokens": len(ids)}


def _padded(
    rows: list[str], spec: DataSpec, tokenizer: PreTrainedTokenizerBase, part: Part
) -> tuple[torch.Tensor, dict[str, int]]:
    """(a window of each chosen row, their tokens before any was cut, and how many were)."""
    rows = [row for row in rows if row.strip()]
    chosen = [rows[i] for i in _choose(spec, len(rows), part).tolist()]
    ids = [row for row in token_ids(spec.dataset, tokenizer, chosen) if row]
    if not ids:
        raise BadInput(
            f"{spec.dataset} has no tokens", "its rows are empty to this tokenizer", "Give another --dataset."
        )
    begin = beginning(tokenizer)
    ids = [row if row[: len(begin)] == begin else begin + row for row in ids]  # a chat template may have put it there
    windows_NT = padded([row[: spec.seqlen] for row in ids])
    return windows_NT, {"tokens": sum(map(len, ids)), "rows_cut": sum(len(row) > spec.seqlen for row in ids)}


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text: a token like <bos>, or nothing."""
    alone, whole = ([int(i) for i in token_ids("a", tokenizer, ["a"], special)[0]] for special in (False, True))
    return next((whole[:i] for i in range(len(whole)) if alone and whole[i : i + len(alone)] == alone), [])


def token_ids(
    what: str, tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool = False
) -> list[list[int]]:
    """The tokens of each text; with `special` also those put around it. BadInput, naming `what`, where there are none."""
    try:
        encoding = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
    except UnicodeEncodeError as error:
        why = f"it contains half of a surrogate pair ({error})"
        raise BadInput(f"{what} cannot be tokenised", why, "Remove it.") from error
    except Exception as error:
        if type(error) is not Exception:  # the Rust tokenizer's: a character that it has no token for, not even <unk>
            raise
        raise BadInput(f"{what} cannot be tokenised", _first_line(error), "Use the original tokenizer.json.") from error
    return cast("list[list[int]]", encoding["input_ids"])


def _budget(spec: DataSpec) -> int:
    """How many bytes of text are read at most: 16 for every token asked for, and never fewer than 4 MiB."""
    return max(4 * 2**20, 16 * spec.num_samples * spec.seqlen)


def _read(spec: DataSpec, tokenizer: PreTrainedTokenizerBase, part: Part) -> _Text:
    path = Path(spec.dataset)
    rows = path.suffix not in _TEXT_FILES and spec.dataset != "builtin"
    for flag, given, has in (("--split", spec.split, rows and not path.is_file()), ("--column", spec.column, rows)):
        if given is not None and not has:
            raise UsageError(f"{flag} {given} with {spec.dataset}", "it has none", f"drop {flag}")
    if spec.dataset == "builtin":
        return _builtin(part)
    if path.is_dir():
        return _collect(_library_rows(spec, part), f"folder {spec.dataset}", spec, tokenizer)
    if path.exists():
        return _read_file(path, spec, tokenizer)
    if path.suffix in _FILES or not _HUB_ID.fullmatch(spec.dataset):
        raise BadInput(
            f"{spec.dataset} does not exist",
            "a data set is `builtin`, a file, a folder or the id of one on the hub",
            "Check the path, or leave it away to use the built-in text.",
        )
    return _collect(_library_rows(spec, part), f"hub {spec.dataset}", spec, tokenizer)


def _builtin(part: Part) -> _Text:
    from pydoc_data.topics import topics

    paragraphs = [paragraph for name in sorted(topics) for paragraph in topics[name].strip().split("\n\n")]
    whole = "\n\n".join(
        dict.fromkeys(paragraphs)
    )  # topics repeat each other; what is evaluated must not be seen before
    cut = whole.index("\n\n", len(whole) * 4 // 5)
    text = whole[:cut] if part == "calibration" else whole[cut:].lstrip()
    return _Text("Python's language reference (pydoc_data.topics)", text.split(_BETWEEN))


def _read_file(path: Path, spec: DataSpec, tokenizer: PreTrainedTokenizerBase) -> _Text:
    if not path.is_file():  # a pipe or a device could be read for ever
        raise BadInput(f"{path} is not a regular file", "", "Give a .txt, .jsonl or .parquet file.")
    try:
        with path.open("rb") as file:
            if path.suffix in _TEXT_FILES:
                return _whole_file(path, file, _budget(spec))
            if path.suffix == ".jsonl":
                return _collect(json_rows(path, file, _LONGEST_LINE), f"file {path.name}", spec, tokenizer)
            if path.suffix == ".parquet":
                return _collect(parquet_rows(path, file), f"file {path.name}", spec, tokenizer)
    except OSError as error:
        raise BadInput(f"{path} cannot be read", str(error), "Check the file and its permissions.") from error
    raise BadInput(
        f"{path} is of a kind that cannot be read",
        f"the name must end in {', '.join(_FILES)}",
        "Rename or convert it.",
    )


def _whole_file(path: Path, file: BinaryIO, budget: int) -> _Text:
    raw = file.read(budget)
    truncated = bool(file.read(1))
    if truncated:  # end at a line's end, so that neither a character nor a token is cut in two
        raw = raw[: raw.rfind(b"\n") + 1] or raw.rstrip(_CONTINUATION)[:-1]
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path} is not UTF-8 text",
            f"the byte at offset {error.start} ({raw[error.start]:#04x}) cannot be decoded",
            f"Convert it: iconv -t UTF-8 {path} > {path.stem}.utf8{path.suffix}",
        ) from error
    if not text.strip():
        raise BadInput(f"{path} has no text", "", "Give a file with text in it.")
    return _Text(f"file {path.name}", text.replace("\r\n", "\n").split(_BETWEEN), truncated=truncated)


def _collect(
    rows: Iterator[tuple[str, dict[str, Any]]], source: str, spec: DataSpec, tokenizer: PreTrainedTokenizerBase
) -> _Text:
    """The rows' texts, as far as the budget goes."""
    result = _Text(source, [], rows_read=0)
    left = _budget(spec)
    for where, row in rows:
        if left <= 0:
            result.truncated = True
            break
        result.rows_read += 1
        text = row_text(where, row, spec.column, tokenizer)
        if text.strip():
            result.truncated = len(text) > left
            result.rows.append(text[:left])
            left -= len(text)
        else:
            result.rows_empty += 1
    if not result.rows:
        raise BadInput(
            f"{spec.dataset} has no text",
            f"{result.rows_read} rows were read, and all were empty" if result.rows_read else "it has no rows",
            "Give another --dataset, or name the column that holds the text with --column.",
        )
    return result


def _library_rows(spec: DataSpec, part: Part) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a folder or hub data set, through the `datasets` library (which runs no code of theirs)."""
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    local = Path(spec.dataset).is_dir()
    name, _, config = (spec.dataset, "", "") if local else spec.dataset.partition(":")
    split = spec.split or ("train" if local or part == "calibration" else "test")
    try:
        data = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, DatasetsError, HfHubHTTPError) as error:
        raise BadInput(
            f"the data set {spec.dataset} (split {split}) cannot be loaded",
            _first_line(error),
            "Check the name and --split; without a network give a local .txt, .jsonl or .parquet file, "
            "or leave --dataset away to use the built-in text.",
        ) from error
    for number, row in enumerate(data, start=1):
        yield f"{spec.dataset}, row {number}", row


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
