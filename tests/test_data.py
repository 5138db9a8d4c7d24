"""Data sets to token windows: the protocol, and every way in which a data set can be bad."""

from __future__ import annotations

import gzip
import json
import os
import socket
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from infopt.calibration.data import DataSpec, load_tokenizer, load_windows
from infopt.errors import BadInput, UsageError

_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that ids can be counted by hand; and a chat template."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=core)
    fast.chat_template = _TEMPLATE
    return fast


def windows(path: Path, tokenizer, part="calibration", **fields):
    fields = {"num_samples": 4, "seqlen": 8} | fields
    return load_windows(DataSpec(dataset=str(path), **fields), tokenizer, part=part)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def decoded(tokenizer, ids_NT: torch.Tensor) -> str:
    return tokenizer.decode(ids_NT.flatten())


def test_windows_are_the_text_tokenised_once_and_cut(tmp_path, tokenizer):
    path = write(tmp_path, "a.txt", "0123456789abcdefghijklmnopqrstuvwxyz")
    ids_NT, report = windows(path, tokenizer)
    assert ids_NT.dtype == torch.int64
    assert ids_NT.tolist() == torch.tensor(tokenizer("0123456789abcdefghijklmnopqrstuv").input_ids).view(4, 8).tolist()
    assert (report["tokens"], report["windows"], report["windows_asked"]) == (36, 4, 4)


@pytest.fixture(scope="module")
def beginner(tokenizer) -> PreTrainedTokenizerFast:
    """The same tokenizer with a token before every text and one after it."""
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.add_special_tokens(["<begin>", "<end>"])
    ids = [(name, core.token_to_id(name)) for name in ("<begin>", "<end>")]
    core.post_processor = processors.TemplateProcessing(single="<begin> $A <end>", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_a_window_begins_with_what_the_tokenizer_puts_before_a_text(tmp_path, beginner):
    path = write(tmp_path, "a.txt", "0123456789abcdefghijklmnopqrstuvwxyz")
    ids_NT, report = windows(path, beginner)
    assert [decoded(beginner, ids_T) for ids_T in ids_NT] == [
        f"<begin>{part}" for part in ("0123456", "789abcd", "efghijk", "lmnopqr")
    ]
    assert (ids_NT.shape, report["tokens_used"]) == ((4, 8), 32)
    short = write(tmp_path, "short.txt", "0123456")
    assert decoded(beginner, windows(short, beginner)[0]) == "<begin>0123456"
    with pytest.raises(BadInput, match="one window needs 8"):
        windows(short, beginner, seqlen=9)


def test_a_padded_row_begins_once(tmp_path, beginner):
    path = write(tmp_path, "rows.jsonl", '{"text": "ab"}\n{"text": "<begin>abcdefghij"}\n')
    ids_NT, _ = windows(path, beginner, padding=True)
    assert decoded(beginner, ids_NT[0, :3]) == "<begin>ab"
    assert decoded(beginner, ids_NT[1]) == "<begin>abcdefg"


def test_fewer_windows_than_asked_are_reported(tmp_path, tokenizer):
    ids_NT, report = windows(write(tmp_path, "a.txt", "x" * 20), tokenizer, num_samples=100)
    assert ids_NT.shape == (2, 8)
    assert (report["windows"], report["windows_asked"]) == (2, 100)


def test_builtin_parts_do_not_overlap(tokenizer):
    spec = DataSpec(num_samples=10**6, seqlen=64)
    (calibration, report), (evaluation, _) = (
        load_windows(spec, tokenizer, part=p) for p in ("calibration", "evaluation")
    )
    assert calibration.shape[0] > 3 * evaluation.shape[0] > 0
    assert decoded(tokenizer, evaluation[0]) not in decoded(tokenizer, calibration)
    again, report_again = load_windows(spec, tokenizer, part="calibration")
    assert torch.equal(again, calibration) and report_again["sha256"] == report["sha256"]


def test_seed_draws_other_windows_for_calibration_only(tmp_path, tokenizer):
    path = write(tmp_path, "a.txt", "".join(f"{i:08d}" for i in range(100)))
    first, _ = windows(path, tokenizer)
    drawn, _ = windows(path, tokenizer, seed=1)
    again, _ = windows(path, tokenizer, seed=1)
    evaluated, _ = windows(path, tokenizer, "evaluation", seed=1)
    assert torch.equal(drawn, again) and not torch.equal(drawn, first) and torch.equal(evaluated, first)
    starts = [int(decoded(tokenizer, row)) for row in drawn]
    assert starts == sorted(set(starts))


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "hello there"}, "hello there"),
        ({"prompt": "2+2=", "completion": "4, surely"}, "2+2=4, surely"),
        ({"messages": [{"role": "user", "content": "hello"}]}, "<user>hello\n"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]}, "<user>hello\n"),
        ({"conversations": [{"from": "gpt", "value": "hello"}]}, "<assistant>hello\n"),
    ],
)
def test_rows_of_every_shape(tmp_path, tokenizer, row, text):
    path = write(tmp_path, "a.jsonl", json.dumps(row) + "\n\n" + json.dumps(row) + "\n")
    ids_NT, report = windows(path, tokenizer, seqlen=2 * len(text) + 2)
    assert decoded(tokenizer, ids_NT) == text + "\n\n" + text
    assert report["rows_read"] == 2


def test_named_column_and_empty_rows(tmp_path, tokenizer):
    lines = [json.dumps({"body": text, "text": "other"}) for text in ("first text", "", None, "second text")]
    ids_NT, report = windows(write(tmp_path, "a.jsonl", "\n".join(lines)), tokenizer, column="body", seqlen=23)
    assert decoded(tokenizer, ids_NT) == "first text\n\nsecond text"
    assert (report["rows_read"], report["rows_used"], report["rows_empty"]) == (4, 2, 2)


def test_parquet_and_a_folder_give_the_same_rows_as_jsonl(tmp_path, tokenizer):
    import pyarrow
    import pyarrow.parquet

    texts = [f"row number {i}" for i in range(600)]
    data = tmp_path / "data"
    data.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    write(data, "train.jsonl", "\n".join(json.dumps({"text": text}) for text in texts))
    expected, _ = windows(data / "train.jsonl", tokenizer, num_samples=500)
    assert torch.equal(windows(tmp_path / "a.parquet", tokenizer, num_samples=500)[0], expected)
    assert torch.equal(windows(data, tokenizer, num_samples=500)[0], expected)


def test_a_parquet_file_that_was_cut(tmp_path, tokenizer):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["some text"] * 100}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    for part in (whole[: len(whole) // 2], whole[:-1], whole[:4] + bytes(50) + whole[54:]):
        with pytest.raises(BadInput, match="not a readable parquet file"):
            windows(write(tmp_path, "b.parquet", part), tokenizer)


def test_rows_that_repeat_are_rows(tmp_path, tokenizer):
    lines = "\n".join([json.dumps({"text": "again"})] * 50)
    ids_NT, report = windows(write(tmp_path, "a.jsonl", lines), tokenizer, padding=True, num_samples=100)
    assert ids_NT.shape == (50, 5) and (report["rows_read"], report["windows"], report["windows_asked"]) == (
        50,
        50,
        100,
    )


def test_byte_order_mark_and_crlf_do_not_reach_the_model(tmp_path, tokenizer):
    plain, _ = windows(write(tmp_path, "a.txt", "one line\ntwo lines\n"), tokenizer)
    windowsish, _ = windows(write(tmp_path, "b.txt", b"\xef\xbb\xbfone line\r\ntwo lines\r\n"), tokenizer)
    assert torch.equal(plain, windowsish)
    rows, _ = windows(write(tmp_path, "c.jsonl", b'\xef\xbb\xbf{"text": "one line\\ntwo lines\\n"}'), tokenizer)
    assert torch.equal(plain, rows)


@pytest.mark.slow
def test_a_large_file_is_read_as_far_as_needed_and_says_so(tmp_path, tokenizer):
    line = "a line of text that is repeated\n"
    path = write(tmp_path, "a.txt", line * (5 * 2**20 // len(line)))
    ids_NT, report = windows(path, tokenizer)
    assert report["truncated"] and report["characters"] <= 4 * 2**20
    assert decoded(tokenizer, ids_NT) == line
    unbroken = write(tmp_path, "b.txt", "é" * (3 * 2**20) + "x")  # 6 MiB without a line's end, two bytes each
    assert decoded(tokenizer, windows(unbroken, tokenizer)[0]) == "é" * 16
    one_row = write(tmp_path, "c.jsonl", json.dumps({"text": "z" * 10 * 2**20}))
    _, report = windows(one_row, tokenizer)
    assert report["truncated"] and report["characters"] == 4 * 2**20


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "no text"),
        ("a.txt", b" \n\n ", "no text"),
        ("a.txt", b"short", "5 tokens, and one window needs 8"),
        ("a.txt", b"0123456789\xff\xfe", "offset 10"),
        ("a.jsonl", b"", "no rows"),
        ("a.jsonl", b'{"text": ""}\n{"text": null}', "2 rows were read, and all were empty"),
        ("a.jsonl", b'{"text": "abc"}\n{"text": \n', "line 2 is not valid JSON"),
        ("a.jsonl", b'{"text": "abc"}\n\xff\xfe\n', "line 2 is not valid JSON"),
        ("a.jsonl", b"[" * 200_000, "line 1 is not valid JSON"),
        ("a.jsonl", b'["a list"]', "line 1 is not an object"),
        ("a.jsonl", b'{"text": "abc"}\n{"body": "abc"}', "line 2 has no column"),
        ("a.jsonl", b'{"text": "abc"}\n{"text": 7}', "line 2: column 'text' is not text"),
        ("a.jsonl", b'{"text": "\\ud800 half"}', "half of a surrogate pair"),
        ("a.jsonl", b'{"messages": ["hello"]}', "must hold messages"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', "must hold messages"),
        ("a.jsonl", b'{"messages": [{"role": "tool", "content": "x"}]}', "no tools"),
        ("a.parquet", b"PAR1 and not much more", "not a readable parquet file"),
        ("a.csv", b"text\nhello", "the name must end in"),
        ("a.jsonl.gz", gzip.compress(bytes(2**24)), "the name must end in"),  # a bomb, not even opened
        ("a.jsonl", b'{"text": "a"}\n' * 20_000 + b"{", "line 20001 is not valid JSON"),
        ("a.jsonl", b'{"text": "abc"}\n{"text": ["a", 7]}', "line 2"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, tokenizer, name, content, says):
    with pytest.raises(BadInput, match=r".") as caught:
        windows(write(tmp_path, name, content), tokenizer)
    assert says in str(caught.value)


def test_conversations_without_a_template_are_refused(tmp_path):
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    path = write(tmp_path, "a.jsonl", '{"messages": [{"role": "user", "content": "hello"}]}')
    with pytest.raises(BadInput, match="no chat template"):
        windows(path, bare)


def test_ids_beyond_the_embedding_are_refused(tmp_path, tokenizer):
    spec = DataSpec(dataset=str(write(tmp_path, "a.txt", "0123456789")), seqlen=8)
    with pytest.raises(BadInput, match="only 10 rows"):
        load_windows(spec, tokenizer, part="calibration", vocab_size=10)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path, tokenizer):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(BadInput, match="not a regular file"):
        windows(tmp_path / "a.txt", tokenizer)


@pytest.mark.parametrize("name", ["gone.txt", "../gone/gone", "/gone", "no such thing"])
def test_paths_that_do_not_exist(tokenizer, name):
    with pytest.raises(BadInput, match="does not exist"):
        windows(Path(name), tokenizer)


def test_a_hub_name_offline_says_what_to_do(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", None)  # conftest.py has told the hub's library that it is offline
    with pytest.raises(BadInput, match="someone/something") as caught:
        load_windows(DataSpec(dataset="someone/something"), None, part="calibration")
    assert "leave --dataset away" in str(caught.value)


@pytest.mark.parametrize("fields", [{"num_samples": 0}, {"seqlen": 1}, {"seqlen": -5}])
def test_sizes_that_make_no_sense(fields):
    with pytest.raises(UsageError):
        DataSpec(**fields)


def test_tokenizers_load_from_a_folder_and_bad_ones_are_refused(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "good")
    assert load_tokenizer(tmp_path / "good")("abc").input_ids == tokenizer("abc").input_ids
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    write(tmp_path / "broken", "tokenizer.json", '{"version": "1.0", "model": {"type": "nonsense"}}')
    write(tmp_path / "broken", "tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast"}')
    for name in ("empty", "broken", "absent"):
        with pytest.raises(BadInput, match="tokenizer"):
            load_tokenizer(tmp_path / name)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_windows_of_their_own(tmp_path, tokenizer, side):
    """Cut after seqlen tokens, filled up behind; the tokenizer's own pad token and side play no part."""
    tokenizer.padding_side, tokenizer.pad_token = side, "!"
    lines = [json.dumps({"text": row}) for row in ("short", "", "a row that is cut", "exactly8", "more")]
    ids_NT, report = windows(write(tmp_path, "a.jsonl", "\n".join(lines)), tokenizer, padding=True, num_samples=3)
    rows = [tokenizer(row).input_ids for row in ("short", "a row th", "exactly8")]
    assert ids_NT.tolist() == [row + [-1] * (8 - len(row)) for row in rows]
    assert report["tokens"] == 5 + 17 + 8 and report["tokens_used"] == 5 + 8 + 8
    assert (report["rows_read"], report["rows_empty"], report["rows_cut"], report["windows"]) == (5, 1, 1, 3)
    drawn = [windows(tmp_path / "a.jsonl", tokenizer, padding=True, num_samples=2, seed=s)[0] for s in (1, 1, 2, 3, 4)]
    assert torch.equal(drawn[0], drawn[1]) and any(not torch.equal(drawn[0], other) for other in drawn)


def test_padded_windows_are_no_longer_than_the_longest_row(tmp_path, tokenizer):
    """And the rows of a text are its paragraphs."""
    ids_NT, report = windows(write(tmp_path, "a.txt", "one\n\n\n\nthree\n\nfive"), tokenizer, padding=True, seqlen=512)
    assert [decoded(tokenizer, row[row >= 0]) for row in ids_NT] == ["one", "three", "five"]
    assert ids_NT.shape == (3, 5) and report["windows_asked"] == 4


def test_packed_rows_report_what_was_used(tmp_path, tokenizer):
    _, report = windows(write(tmp_path, "a.txt", "x" * 100), tokenizer)
    assert (report["tokens"], report["tokens_used"], report["padding"]) == (100, 32, False)
