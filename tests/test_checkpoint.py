"""Reading a model folder: exactly, or with an InfoptError that says what is wrong, soon and in little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from infopt.checkpoint import CheckpointReader, resolve
from infopt.errors import BadInput, Unsupported, UsageError
from infopt.output import write_safetensors
from tests.folders import CONFIG, complaint, hub_cache, json_values, make, tensors, two_shards

# --- reading tensors


def test_rows_are_the_leading_rows(tmp_path: Path) -> None:
    reader = CheckpointReader(make(tmp_path / "m"))
    whole = reader.get("model.a")
    assert torch.equal(reader.rows("model.a", 1, 3), whole[1:3])
    assert reader.rows("model.a", 2, 2).shape == (0, 3)
    with pytest.raises(ValueError, match=r"3:5 of model\.a"):
        reader.rows("model.a", 3, 5)


def test_a_tensor_is_fresh_memory(tmp_path: Path) -> None:
    reader = CheckpointReader(make(tmp_path / "m"))
    reader.get("model.a").zero_()
    assert reader.get("model.a").abs().sum() > 0


def test_a_byte_that_is_no_truth_value_becomes_one(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", {"model.safetensors": {"flags": torch.tensor([True, False])}})
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2] + b"\x02\x00")
    assert CheckpointReader(folder).get("flags").view(torch.uint8).tolist() == [1, 0]


def test_an_absent_tensor_is_named(tmp_path: Path) -> None:
    reader = CheckpointReader(make(tmp_path / "m"))
    complaint(BadInput, lambda: reader.get("model.layers.9.w"), "model.layers.9.w")


def test_a_file_cut_short_after_its_header_was_read_is_an_error_not_a_crash(tmp_path: Path) -> None:
    reader = CheckpointReader(make(tmp_path / "m"))
    path = tmp_path / "m" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 40)
    last = max(reader.tensors.values(), key=lambda info: info.offset).name
    complaint(BadInput, lambda: reader.get(last), "model.safetensors", "ends at byte")


# --- the index


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    reader = CheckpointReader(make(tmp_path / "m", two_shards()))
    assert list(reader.tensors) == ["x", "y"]
    assert reader.tensors["y"].file == tmp_path / "m" / "b.safetensors"
    assert torch.equal(reader.get("x"), torch.ones(2))


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ([], "weight_map"),
        ({}, "weight_map"),
        ({"weight_map": {}}, "weight_map"),
        ({"weight_map": ["a.safetensors"]}, "weight_map"),
        ({"weight_map": {"x": "/etc/passwd"}}, "same folder"),
        ({"weight_map": {"x": "/abs/a.safetensors"}}, "same folder"),
        ({"weight_map": {"x": "../m/a.safetensors"}}, "same folder"),
        ({"weight_map": {"x": "..\\a.safetensors"}}, "same folder"),
        ({"weight_map": {"x": "a\0.safetensors"}}, "same folder"),
        ({"weight_map": {"x": ""}}, "same folder"),
        ({"weight_map": {"x": 3}}, "same folder"),
        ({"weight_map": {"x": "pytorch_model.bin"}}, "same folder"),
        ({"weight_map": {"x": "z" * 300 + ".safetensors"}}, "too long"),
        ({"weight_map": {"x": "a.safetensors", "y": "gone.safetensors"}}, "gone.safetensors"),
        ({"weight_map": {"x": "a.safetensors", "y": "folder.safetensors"}}, "folder.safetensors"),
        ({"weight_map": {"x": "a.safetensors", "y": "pipe.safetensors"}}, "pipe.safetensors"),
        ({"weight_map": {"x": "a.safetensors", "y": "device.safetensors"}}, "device.safetensors"),
        ({"weight_map": {"x": "a.safetensors", "y": "out.safetensors"}}, "link out of its folder"),
        ({"weight_map": {"x": "a.safetensors", "y": "loop.safetensors"}}, "loop.safetensors"),
        ({"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"}}, "'z' is not in"),
        ({"weight_map": {"x": "b.safetensors", "y": "a.safetensors"}}, "wrong shard"),
        ({"weight_map": {"x": "a.safetensors", "y": "twice.safetensors"}}, "'x' is in two shards"),
        ({"weight_map": {"x": "a.safetensors"}, "metadata": {"total_size": -1}}, "total_size"),
        ({"weight_map": {"x": "a.safetensors"}, "metadata": {"total_size": "8"}}, "total_size"),
        ({"weight_map": {"x": "extra.safetensors"}}, "'hidden' of"),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, index: Any, words: str) -> None:
    folder = make(tmp_path / "m", two_shards(), index)
    save_file({"x": torch.ones(2), "y": torch.ones(2)}, folder / "twice.safetensors")
    save_file({"x": torch.ones(2), "hidden": torch.ones(2)}, folder / "extra.safetensors")
    save_file({"y": torch.ones(2)}, tmp_path / "secret.safetensors")
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "device.safetensors").symlink_to("/dev/zero")
    (folder / "out.safetensors").symlink_to("../secret.safetensors")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    complaint(BadInput, lambda: CheckpointReader(folder), words)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from(["weight_map", "metadata"]) | st.text(max_size=3), json_values, max_size=3),
    st.text(),
)
def test_any_index_is_read_or_refused(tmp_path: Path, index: Any, shard: str) -> None:
    folder = make(tmp_path / "m", two_shards(), index)
    with pytest.raises(BadInput):
        CheckpointReader(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(BadInput):
        CheckpointReader(folder)


def test_the_total_size_of_an_index_is_only_informational(tmp_path: Path) -> None:
    weight_map = {"x": "a.safetensors", "y": "b.safetensors"}
    CheckpointReader(make(tmp_path / "m", two_shards(), {"metadata": {"total_size": 10**15}, "weight_map": weight_map}))


def test_an_index_of_ten_million_entries_is_refused_by_its_size(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", two_shards())
    os.truncate(folder / "model.safetensors.index.json", 300 * 2**20)
    complaint(BadInput, lambda: CheckpointReader(folder), "too large")


def test_a_single_file_beside_an_index_of_others_is_ambiguous(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", two_shards())
    save_file(tensors(), folder / "model.safetensors")
    complaint(BadInput, lambda: CheckpointReader(folder), "both")


# --- folders, links and the hub cache


def test_links_inside_the_folder_work_and_links_out_of_it_do_not(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    (folder / "real").mkdir()
    (folder / "model.safetensors").rename(folder / "real" / "weights")
    (folder / "model.safetensors").symlink_to("real/weights")
    assert torch.equal(CheckpointReader(folder).get("model.a"), tensors()["model.a"])
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(make(tmp_path / "other") / "model.safetensors")
    complaint(BadInput, lambda: CheckpointReader(folder), "link out of its folder")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_no_file_of_a_model_may_link_to_a_private_one(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "m")
    (tmp_path / "private").write_text(json.dumps(CONFIG))
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../private")
    complaint(BadInput, lambda: CheckpointReader(folder), name, "link out of its folder")


def test_a_pipe_as_tokenizer_does_not_hang(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    os.mkfifo(folder / "tokenizer.json")
    complaint(BadInput, lambda: CheckpointReader(folder), "tokenizer.json", "not a regular file")


def test_a_snapshot_of_the_hub_cache_works(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    reader = CheckpointReader(snapshot)
    assert torch.equal(reader.get("model.a"), tensors()["model.a"])
    (tmp_path / "link").symlink_to(snapshot)  # the user's own link to the folder is the user's business
    assert CheckpointReader(tmp_path / "link").fingerprint() == reader.fingerprint()


def test_a_snapshot_may_not_reach_other_repositories(tmp_path: Path) -> None:
    snapshot, other = hub_cache(tmp_path), hub_cache(tmp_path, "models--org--private")
    weights = snapshot / "model.safetensors"
    for target in (
        "../../../models--org--private/blobs/" + os.readlink(other / weights.name).split("/")[-1],
        "../../blobs/../../models--org--private/snapshots/" + "c" * 40 + "/model.safetensors",
        "../../refs/main",
    ):
        weights.unlink()
        weights.symlink_to(target)
        complaint(BadInput, lambda: CheckpointReader(snapshot), "link out of its folder")


def test_only_a_hub_cache_may_use_blobs_outside_the_folder(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path, "unpacked-archive")
    complaint(BadInput, lambda: CheckpointReader(snapshot), "link out of its folder")


def test_a_blob_in_the_shared_store_of_the_cache_works_but_only_through_the_repository(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    weights, digest = snapshot / "model.safetensors", "ab" * 32
    store = tmp_path / "blobs" / "ab"
    store.mkdir(parents=True)
    blob = weights.resolve()
    blob.rename(store / digest)
    blob.symlink_to(f"../../blobs/ab/{digest}")
    complaint(BadInput, lambda: CheckpointReader(snapshot), "link out of its folder")  # no marker: just some folder
    (tmp_path / "blobs" / ".huggingface-shared-blobs").write_text("1")
    assert torch.equal(CheckpointReader(snapshot).get("model.a"), tensors()["model.a"])
    weights.unlink()
    weights.symlink_to(store / digest)
    complaint(BadInput, lambda: CheckpointReader(snapshot), "link out of its folder")


def test_folders_without_safetensors_say_what_to_do(tmp_path: Path) -> None:
    complaint(BadInput, lambda: CheckpointReader(tmp_path / "absent"), "not a folder")
    folder = make(tmp_path / "m")
    complaint(BadInput, lambda: CheckpointReader(folder / "config.json"), "not a folder")
    (folder / "model.safetensors").unlink()
    complaint(BadInput, lambda: CheckpointReader(folder), "holds no weights")
    (folder / "pytorch_model.bin").write_bytes(b"")
    complaint(BadInput, lambda: CheckpointReader(folder), "pytorch_model.bin", "safetensors", "save_pretrained")
    (folder / "tiny.gguf").write_bytes(b"GGUF")
    complaint(UsageError, lambda: CheckpointReader(folder), "infopt convert")
    save_file({}, folder / "model.safetensors")
    complaint(BadInput, lambda: CheckpointReader(folder), "holds no tensors")


# --- config.json


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"{", "not valid JSON"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b'{"model_type": "llama", "x": NaN}', "NaN"),
        (b'{"model_type": "llama", "x": 1e999}', "too large"),
        (b'{"x":' * 100_000, "nested"),
        (b'{"x":' * 100 + b"1" + b"}" * 100, "nested"),
        (b'{"model_type": "llama", "model_type": "gpt2"}', "twice"),
        (b"[]", "not a JSON object"),
        (b"3", "not a JSON object"),
        (b"\xff\xfe{", "utf-8"),
        (b"{}", "model_type"),
        (b'{"model_type": 3}', "model_type"),
        (b'{"model_type": "llama", "num_hidden_layers": "32"}', "num_hidden_layers"),
        (b'{"model_type": "llama", "num_hidden_layers": -1}', "num_hidden_layers"),
        (b'{"model_type": "llama", "hidden_size": 0}', "hidden_size"),
        (b'{"model_type": "llama", "hidden_size": 8.0}', "hidden_size"),
        (b'{"model_type": "llama", "vocab_size": true}', "vocab_size"),
    ],
)
def test_a_bad_config_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    folder = make(tmp_path / "m")
    (folder / "config.json").write_bytes(content)
    complaint(BadInput, lambda: CheckpointReader(folder), "config.json", words)


def test_a_missing_or_huge_config_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    os.truncate(folder / "config.json", 2**30)
    complaint(BadInput, lambda: CheckpointReader(folder), "config.json is too large")
    (folder / "config.json").unlink()
    complaint(BadInput, lambda: CheckpointReader(folder), "no config.json")


@pytest.mark.parametrize(
    "extra",
    [
        {"trust_remote_code": True},
        {"quantization_config": {"bits": 4, "trust_remote_code": True}},
        {"parts": [{"auto_map": "x"}]},
    ],
)
def test_remote_code_is_refused_as_unsupported(tmp_path: Path, extra: dict[str, Any]) -> None:
    folder = make(tmp_path / "m")
    (folder / "config.json").write_text(json.dumps(CONFIG | extra))
    error = complaint(Unsupported, lambda: CheckpointReader(folder), "never run")
    assert error.exit_code == 4
    (folder / "config.json").write_text(json.dumps(CONFIG | {"trust_remote_code": False}))
    CheckpointReader(folder)


def test_an_auto_map_is_dropped(tmp_path: Path) -> None:
    """Models whose definition went into transformers still carry one; nobody after us may run its code either."""
    folder = make(tmp_path / "m")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}))
    assert CheckpointReader(folder).config == CONFIG


# --- what is copied, what identifies a model, where it comes from


def test_side_files_are_those_to_copy(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    wanted = ["LICENSE", "README.md", "chat_template.jinja", "generation_config.json", "merges.txt", "tokenizer.json"]
    wanted += ["tokenizer.model", "USE_POLICY.md", "qwen.tiktoken", "additional_chat_templates/rag.jinja"]
    unwanted = [
        "modeling_evil.py",
        "pytorch_model.bin",
        "x.index.json",
        "infopt.json",
        "manifest.json",
        ".gitattributes",
    ]
    unwanted += [
        "quantize_config.json",
        "consolidated.safetensors",
        "training_args.bin",
        ".env",
        "additional_chat_templates/x",
    ]
    (folder / "additional_chat_templates").mkdir()
    (folder / "LICENSES").mkdir()
    for name in wanted + unwanted:
        (folder / name).write_text("x")
    found = [str(path.relative_to(folder)) for path in CheckpointReader(folder).side_files()]
    assert sorted(found) == sorted(wanted)


def test_the_fingerprint_follows_content_and_not_place(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    before = CheckpointReader(folder).fingerprint()
    folder = folder.rename(tmp_path / "moved")
    assert CheckpointReader(folder).fingerprint() == before
    path = folder / "model.safetensors"
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert (touched := CheckpointReader(folder).fingerprint()) != before
    (folder / "config.json").write_text(json.dumps(CONFIG | {"rope_theta": 1.0}))
    assert CheckpointReader(folder).fingerprint() not in (before, touched)


def test_resolve_tells_folders_files_and_hub_ids_apart(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    assert resolve(str(folder)) == folder
    complaint(UsageError, lambda: resolve(str(folder), revision="v1"), "revision")
    complaint(UsageError, lambda: resolve("some/model.Q4_0.gguf"), "infopt convert some/model.Q4_0.gguf -o")
    complaint(UsageError, lambda: resolve(str(folder / "model.safetensors")), "is a file")
    for absent in ("./absent", "/absent", "a/b/c", "~absent/x", "a\0b", ""):
        complaint(BadInput, partial(resolve, absent), "no folder")


OFFLINE = """
import socket, sys
def refuse(*args, **kwargs):
    print("NETWORK"); raise OSError("blocked")
socket.socket.connect = socket.getaddrinfo = refuse
from infopt.checkpoint import resolve
from infopt.errors import InfoptError
for model, revision in (("org/tiny", None), ("org/absent", None), ("org/tiny", "v9"), ("or g/tiny", None)):
    try:
        print(resolve(model, revision))
    except InfoptError as err:
        print(type(err).__name__, err.what)
"""


def test_offline_the_hub_cache_answers_without_the_network(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path), "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == str(snapshot), done.stdout + done.stderr
    assert lines[1].startswith("BadInput 'org/absent' was not found")
    assert lines[2].startswith("BadInput 'org/tiny' at revision 'v9' was not found")
    assert lines[3].startswith("UsageError 'or g/tiny' is neither")
    assert "NETWORK" not in done.stdout


def test_our_writer_is_read_by_our_reader(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    write_safetensors(folder / "model.safetensors", tensors(5))
    reader = CheckpointReader(folder)
    assert all(torch.equal(reader.get(name), tensor) for name, tensor in tensors(5).items())
