"""Mutated files in front of every reader that other tests do not mutate: GGUF, quantized folders, a model's whole config.

Whatever is in a file: a reader, or one of our errors, soon, in bounded memory, and nothing written beside the output.
(Headers and indexes: test_header, test_checkpoint; shards.json: test_shard; lint: test_lint; settings: test_formats.)
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from infopt.checkpoint import CheckpointReader
from infopt.errors import InfoptError
from infopt.exporters.folder import model_config, open_model
from infopt.exporters.gguf_header import read_gguf_header
from infopt.exporters.gguf_import import convert_gguf
from infopt.model import Skeleton

from .folders import json_values
from .test_convert import tiny_llama, write_gguf
from .tools import infopt, tiny

FORMS = {
    "compressed-tensors": ("--asym",),
    "gptq": (),
    "awq": ("--asym",),
    "mlx": ("--asym",),
    "fp8": ("--scheme", "FP8_BLOCK"),
}
UNUSUAL = [
    0,
    1,
    -1,
    2**31 - 1,
    2**31,
    2**62,
    2**63,
    10**30,
    -(2**40),
    0.5,
    1e300,
    True,
    None,
    "",
    "x" * 300,
    [],
    {},
    [[]],
]
slowly = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
quickly = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def survives(act: Callable[[], Any], seconds: float = 10.0) -> Any:
    """What `act` gives, or None for an error of ours; never another exception, never long, never 64 MB and more.

    seconds: of this process's own CPU time, since a loaded machine may stop it for any time.
    """
    began = time.process_time()
    tracemalloc.start()
    try:
        return act()
    except InfoptError as error:
        assert error.exit_code in (3, 4, 5, 6) and error.what, repr(error)
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 64 * 2**20
        assert time.process_time() - began < seconds


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("faults")
    tiny("llama", home / "model", dtype=torch.bfloat16, hidden_size=128, intermediate_size=128)
    for name, flags in FORMS.items():
        method = ("--method", "fp8") if name == "fp8" else ("--method", "rtn", "--group-size", 32)
        done = infopt("quantize", home / "model", "-o", home / name, *method, *flags, "--format", name, "--no-verify")
        assert done.code == 0, done.err
    write_gguf(home / "tiny.gguf", tiny_llama(tied=True), "llama")
    return home


# GGUF


def mutated(data: bytes, at: int, removed: int, inserted: bytes) -> bytes:
    return data[:at] + inserted + data[at + removed :]


NUMBERS = st.sampled_from([0, 1, 255, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1]).map(lambda n: struct.pack("<Q", n))


@quickly
@given(at=st.floats(0, 1), removed=st.sampled_from([0, 1, 4, 8, 100]), inserted=st.binary(max_size=12) | NUMBERS)
@example(at=0.0, removed=24, inserted=b"GGUF\x03\x00\x00\x00" + struct.pack("<QQ", 2**60, 0))
def test_a_mutated_gguf_header_is_read_or_refused(
    home: Path, tmp_path: Path, at: float, removed: int, inserted: bytes
) -> None:
    data = (home / "tiny.gguf").read_bytes()
    start = min(info.offset for info in read_gguf_header(home / "tiny.gguf").tensors.values())
    path = tmp_path / "tiny.gguf"
    path.write_bytes(mutated(data, int(at * (start - 1)), removed, inserted))
    header = survives(lambda: read_gguf_header(path))
    for info in header.tensors.values() if header else ():
        assert info.offset >= 0 and info.offset + info.nbytes <= path.stat().st_size


@slowly
@given(at=st.floats(0, 1), byte=st.integers(0, 255), cut=st.floats(0.2, 1) | st.just(1.0))
def test_a_mutated_gguf_file_is_converted_or_leaves_nothing(
    home: Path, tmp_path: Path, at: float, byte: int, cut: float
) -> None:
    data = bytearray((home / "tiny.gguf").read_bytes())
    start = min(info.offset for info in read_gguf_header(home / "tiny.gguf").tensors.values())
    data[int(at * (start - 1))] = byte
    path = tmp_path / "in" / "tiny.gguf"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data[: int(cut * len(data))])
    done = survives(lambda: convert_gguf(path, tmp_path / "out"), seconds=20)
    assert sorted(os.listdir(tmp_path)) == (["in", "out"] if done else ["in"])
    assert os.listdir(tmp_path / "in") == ["tiny.gguf"]
    shutil.rmtree(tmp_path / "out", ignore_errors=True)


# Quantized folders


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@quickly
@given(data=st.data())
@pytest.mark.parametrize("form", list(FORMS))
def test_a_quantized_folder_with_another_header_is_read_or_refused(
    home: Path, tmp_path: Path, form: str, data: st.DataObject
) -> None:
    """Another type, shape or name for a tensor of any layer: what is read has the shape that it says it has."""
    folder = tmp_path / form
    if not folder.exists():
        shutil.copytree(home / form, folder)
    header, body = header_of(home / form / "model.safetensors")
    name = data.draw(st.sampled_from(sorted(key for key in header if key != "__metadata__" and "layers.0" in key)))
    change = data.draw(st.sampled_from(["dtype", "shape", "swap", "name", "gone"]))
    if change == "dtype":  # of the same width, so that the header itself is sound
        same = {"I32": ["F32", "U32"], "U32": ["I32", "F32"], "F16": ["BF16", "I16"], "BF16": ["F16", "I16"],
                "F8_E4M3": ["I8", "U8"], "F32": ["I32", "U32"], "I64": ["F64"]}  # fmt: skip
        header[name]["dtype"] = data.draw(st.sampled_from(same[header[name]["dtype"]]))
    elif change == "shape":
        size = 1
        for length in header[name]["shape"]:
            size *= length
        header[name]["shape"] = data.draw(st.sampled_from([[size], [1, size], [size, 1], [2, size // 2], [size, 1, 1]]))
    elif change == "swap":
        other = data.draw(st.sampled_from(sorted(key for key in header if key != "__metadata__")))
        header[name], header[other] = header[other], header[name]
    else:
        info = header.pop(name)
        if change == "name":
            header[data.draw(st.sampled_from([f"{name}x", "x.weight", "x.qweight", "x.scales", "x.weight_scale"]))] = (
                info
            )
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)

    def read_all() -> None:
        reader = open_model(folder)
        for key, info in reader.tensors.items():
            assert tuple(reader.get(key).shape) == info.shape, key

    survives(read_all)


@quickly
@given(data=st.data())
@pytest.mark.parametrize("form", list(FORMS))
def test_a_quantized_folder_with_other_bytes_is_read_or_refused(
    home: Path, tmp_path: Path, form: str, data: st.DataObject
) -> None:
    """Another number in a small tensor that says how others are to be read: shapes, groups, zero points, scales."""
    folder = tmp_path / form
    if not folder.exists():
        shutil.copytree(home / form, folder)
    header, body = header_of(home / form / "model.safetensors")
    say = (
        "weight_shape",
        "g_idx",
        "qzeros",
        "scales",
        "biases",
        "weight_scale",
        "weight_scale_inv",
        "weight_zero_point",
    )
    name = data.draw(st.sampled_from(sorted(key for key in header if key.endswith(say) and "layers.1" in key)))
    begin, end = header[name]["data_offsets"]
    changed = bytearray(body)
    at = data.draw(st.integers(begin, end - 1))
    new = data.draw(st.binary(min_size=1, max_size=8))[: end - at]
    changed[at : at + len(new)] = new
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(changed))

    def read_all() -> None:
        reader = open_model(folder)
        for key, info in reader.tensors.items():
            assert tuple(reader.get(key).shape) == info.shape, key

    survives(read_all)


# The whole config


@quickly
@given(data=st.data())
def test_any_config_gives_a_skeleton_or_an_error_of_ours(home: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Odd values in up to three fields, known to transformers or not: nothing of a claimed size is ever allocated."""
    folder = tmp_path / "model"
    if not folder.exists():
        shutil.copytree(home / "model", folder)
    config = json.loads((home / "model" / "config.json").read_text())
    more = [
        "rope_scaling",
        "layer_types",
        "num_experts",
        "auto_map",
        "quantization_config",
        "text_config",
        "pad_token_id",
    ]
    for field in data.draw(st.lists(st.sampled_from([*sorted(config), *more]), min_size=1, max_size=3)):
        config[field] = data.draw(st.sampled_from(UNUSUAL) | json_values)
    try:
        (folder / "config.json").write_text(json.dumps(config))
    except UnicodeEncodeError:
        return

    def build() -> Skeleton:
        reader = CheckpointReader(folder)
        return Skeleton(model_config(reader.config), reader)

    survives(build)
    assert sorted(os.listdir(tmp_path)) == ["model"]
