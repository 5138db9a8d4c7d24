"""Headers and JSON: what is sound is read exactly, what is not ends in a BadInput, soon and in little memory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from infopt.checkpoint import CheckpointReader, read_header, read_json
from infopt.errors import BadInput
from infopt.header import DTYPES
from tests.folders import complaint, json_values, make

Header = dict[str, Any]


def entry(dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> Header:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def raw(header: Header | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_every_dtype_is_read_exactly_as_the_safetensors_package_wrote_it(tmp_path: Path) -> None:
    bits = torch.randint(0, 256, (6 * 8,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    known = {name: dtype for name, dtype in DTYPES.items() if dtype is not torch.bool}
    content = {name: bits.clone()[: 6 * dtype.itemsize].view(dtype).reshape(2, 3) for name, dtype in known.items()}
    content |= {"bool": torch.tensor([[True, False]]), "scalar": torch.tensor(3.0), "empty": torch.empty(0, 5)}
    folder = make(tmp_path / "m", {"model.safetensors": content})
    reader = CheckpointReader(folder)
    assert list(reader.tensors) == sorted(content)
    for name, tensor in content.items():
        read = reader.get(name)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert bytes(read.reshape(-1).view(torch.uint8).tolist()) == bytes(
            tensor.reshape(-1).view(torch.uint8).tolist()
        )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 bytes"),
        (b"\x10\0\0", "3 bytes"),
        ((0).to_bytes(8, "little"), "not a JSON object"),
        ((2**63).to_bytes(8, "little"), "claims"),
        ((2**64 - 1).to_bytes(8, "little") + b"{}", "claims"),
        ((99).to_bytes(8, "little") + b"{}", "claims"),
        (raw(b"[]"), "not a JSON object"),
        (raw(b"\xef\xbb\xbf{}"), "not a JSON object"),
        (raw(b"{"), "not valid JSON"),
        (raw(b'{"\xff":1}'), "utf-8"),
        (raw('{"a":1}'.encode("utf-16")), "not a JSON object"),
        (raw(b'{"a":{"dtype":"U8","dtype":"U8","shape":[],"data_offsets":[0,1]}}', b"1"), "twice"),
        (raw(b'{"a":NaN}'), "NaN"),
        (raw(b'{"a":' + b"[" * 100_000), "nested"),
        (raw(b'{"a":' + b"9" * 5000 + b"}"), "not valid JSON"),
        (raw(b'{"\\ud800":1}'), "surrogate"),
        (raw({"a": 3}), "'a'"),
        (raw({"a": entry() | {"more": 1}}, bytes(24)), "exactly"),
        (raw({"a": {"dtype": "F32", "shape": [2, 3]}}, bytes(24)), "exactly"),
        (raw({"a": entry("F31")}, bytes(24)), "F31"),
        (raw({"a": entry(["F32"])}, bytes(24)), "F32"),
        (raw({"a": entry(shape=[-2, -3])}, bytes(24)), "natural"),
        (raw({"a": entry(shape=[2.0, 3])}, bytes(24)), "natural"),
        (raw({"a": entry(shape=[True, 6])}, bytes(24)), "natural"),
        (raw({"a": entry(shape=["2", 3])}, bytes(24)), "natural"),
        (raw({"a": entry(shape=[1] * 65, offsets=[0, 4])}, bytes(4)), "natural"),
        (raw({"a": entry(shape=[2**63])}, bytes(24)), "natural"),
        (raw({"a": entry(shape=[2**62, 2**62])}, bytes(24)), "overflows"),
        (raw({"a": entry(shape=[2**32, 2**32, 0], offsets=[0, 0])}), "overflows"),
        (raw({"a": entry(offsets=[24, 0])}, bytes(24)), "begin"),
        (raw({"a": entry(offsets=[0, 24, 24])}, bytes(24)), "begin"),
        (raw({"a": entry(offsets=[-24, 0])}, bytes(24)), "begin"),
        (raw({"a": entry(offsets=[0, 20])}, bytes(20)), "needs 24 bytes"),
        (raw({"a": entry(), "b": entry(offsets=[8, 32])}, bytes(32)), "'b' overlaps"),
        (raw({"a": entry(), "b": entry(offsets=[0, 24])}, bytes(24)), "overlaps"),
        (raw({"a": entry(), "b": entry(offsets=[32, 56])}, bytes(56)), "'b' leaves a hole"),
        (raw({"a": entry(offsets=[8, 32])}, bytes(32)), "'a' leaves a hole"),
        (raw({"a": entry()}, bytes(23)), "truncated"),
        (raw({"a": entry(shape=[2**40], offsets=[0, 2**42])}, bytes(24)), "truncated"),
        (raw({"a": entry()}, bytes(25)), "1 bytes after"),
        (raw({"__metadata__": {"format": 1}}), "__metadata__"),
        (raw({"__metadata__": None}), "__metadata__"),
        (raw({"a\x1b[2J\n" + "z" * 500: 3}), "..."),
    ],
)
def test_a_bad_header_is_refused_with_its_reason(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    error = complaint(BadInput, lambda: read_header(path), "model.safetensors", words)
    assert "\x1b" not in str(error)


def test_a_header_over_the_limit_is_not_read_even_if_the_file_is_that_long(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((2**30).to_bytes(8, "little"))
    os.truncate(path, 2**31)  # sparse
    complaint(BadInput, lambda: read_header(path), "limit")


def test_a_header_of_many_values_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw(b'{"a":[' + b"[]," * 5_000_000 + b"0]}"))
    complaint(BadInput, lambda: read_header(path), "too many values")


SOUND = raw({"__metadata__": {"format": "pt"}, "a": entry(), "b": entry("U8", [5], [24, 29])}, bytes(29))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, len(SOUND) - 1),
    st.integers(0, 40),
    st.one_of(st.binary(max_size=12), st.sampled_from([b"-1", b"1e9", b"[[", b"}", b'"', b"null", b"9" * 25, b"\xff"])),
)
@example(0, 8, (2**63).to_bytes(8, "little"))
def test_a_mutated_file_is_read_or_refused(tmp_path: Path, at: int, removed: int, inserted: bytes) -> None:
    path = tmp_path / "mutated.safetensors"
    path.write_bytes(SOUND[:at] + inserted + SOUND[at + removed :])
    try:
        infos, _ = read_header(path)
    except BadInput as err:
        assert "mutated.safetensors" in str(err)
        return
    for info in infos.values():  # what was accepted lies inside the file
        assert info.offset + info.nbytes <= path.stat().st_size
    assert set(load_file(path)) == set(infos)  # and the reference implementation accepts it too


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "U8"]) | json_values,
            "shape": json_values,
            "data_offsets": json_values,
        },
    ),
    json_values,
)
def test_a_header_of_any_json_is_read_or_refused(tmp_path: Path, first: Header, metadata: Any) -> None:
    path = tmp_path / "any.safetensors"
    path.write_bytes(raw({"a": first, "__metadata__": metadata}, bytes(4)))
    try:
        read_header(path)
    except BadInput as err:
        assert "any.safetensors" in str(err)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_json_file_is_read_as_python_reads_it_or_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(data)
    try:
        value = read_json(path)
    except BadInput as err:
        assert "file.json" in str(err)
    else:
        assert value == json.loads(data)
