"""Safetensors files: what we write others read, and merging part files changes no bit and needs no memory."""

from __future__ import annotations

import json
import resource
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from infopt.checkpoint import CheckpointReader, read_header
from infopt.errors import BadInput, UsageError
from infopt.header import DTYPES
from infopt.output import merge_shards, write_safetensors
from tests.folders import everything

# --- safetensors files


def sample(seed: int, names: list[str]) -> dict[str, torch.Tensor]:
    """Tensors of all dtypes and awkward sizes."""
    generator = torch.Generator().manual_seed(seed)
    kinds = sorted(set(DTYPES) - {"BOOL"})
    result = {}
    for name in names:
        dtype = DTYPES[kinds[int(torch.randint(len(kinds), (), generator=generator))]]
        rank = int(torch.randint(0, 4, (), generator=generator))
        shape = torch.randint(0, 5, (rank,), generator=generator).tolist()
        count = torch.Size(shape).numel() * dtype.itemsize
        data = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
        result[name] = data.view(dtype).reshape(shape)
    return result


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)]
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(*bits)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.lists(st.text(max_size=8), unique=True, max_size=8))
def test_the_safetensors_package_reads_what_we_write(tmp_path: Path, seed: int, names: list[str]) -> None:
    tensors = sample(seed, names) | {"flag": torch.tensor([True, False, True])}
    path = tmp_path / "x.safetensors"
    write_safetensors(path, tensors)
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    for info in read_header(path)[0].values():
        assert info.offset % info.dtype.itemsize == 0  # so it may be mapped


def test_the_bytes_depend_on_the_tensors_alone(tmp_path: Path) -> None:
    tensors = sample(3, list("fbeadc"))
    write_safetensors(tmp_path / "1", tensors)
    write_safetensors(tmp_path / "2", dict(reversed(tensors.items())))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_views_aliases_and_strides_are_written_as_their_values(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"t": base.T, "alias": base, "again": base, "slice": base[1:, ::2], "wide": torch.ones(1).expand(3, 2)}
    write_safetensors(tmp_path / "x", tensors)
    loaded = load_file(tmp_path / "x")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_dtype_that_the_format_lacks_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'z' of torch\.complex128"):
        write_safetensors(tmp_path / "x", {"z": torch.zeros(1, dtype=torch.complex128)})
    assert everything(tmp_path) == []


# --- merging part files


def parts(folder: Path, count: int = 4) -> tuple[list[Path], dict[str, torch.Tensor]]:
    folder.mkdir()
    merged: dict[str, torch.Tensor] = {}
    paths = [folder / f"part-{i}" for i in range(count)]
    for i, path in enumerate(paths):
        tensors = sample(i, [f"block.{i}.{name}" for name in "zyx"]) | {f"block.{i}.w": torch.full((5, 5), float(i))}
        save_file(tensors, path)
        merged |= tensors
    return paths, merged


def model_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.mark.parametrize("limit", [1, 150, 10**9])
def test_merged_shards_hold_every_tensor_bit_for_bit(tmp_path: Path, limit: int) -> None:
    paths, merged = parts(tmp_path / "parts")
    folder = model_folder(tmp_path / "m")
    merge_shards(paths, folder, max_shard_bytes=limit)
    reader = CheckpointReader(folder)
    assert list(reader.tensors) == sorted(merged)
    assert all(same(reader.get(name), tensor) for name, tensor in merged.items())
    files = [name for name in everything(folder) if name.endswith(".safetensors")]
    for name in files:
        loaded = load_file(folder / name)
        assert all(same(tensor, merged[key]) for key, tensor in loaded.items())
        assert len(loaded) == 1 or sum(tensor.nbytes for tensor in loaded.values()) <= limit
    if limit == 10**9:
        assert everything(folder) == ["config.json", "model.safetensors"]
    else:
        assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in merged.values())


def test_merged_tensors_are_aligned_whatever_the_parts_hold(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    write_safetensors(tmp_path / "1", {"a": torch.ones(3, dtype=torch.uint8)})
    write_safetensors(
        tmp_path / "2", {"b": torch.ones(1, dtype=torch.float64), "c": torch.ones(1, dtype=torch.bfloat16)}
    )
    merge_shards([tmp_path / "1", tmp_path / "2"], folder)
    infos = CheckpointReader(folder).tensors.values()
    assert [info.offset % info.dtype.itemsize for info in infos] == [0, 0, 0]


def test_shards_follow_the_order_of_the_parts(tmp_path: Path) -> None:
    paths, _ = parts(tmp_path / "parts", count=11)
    folder = model_folder(tmp_path / "m")
    merge_shards(paths, folder, max_shard_bytes=1)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    in_order = sorted(index, key=index.__getitem__)
    filled = [int(name.split(".")[1]) for name in in_order]
    assert filled == sorted(filled)


def test_another_layout_leaves_no_shard_of_the_first(tmp_path: Path) -> None:
    paths, merged = parts(tmp_path / "parts")
    folder = model_folder(tmp_path / "m")
    for limit in (100, 200, 10**9, 1):
        merge_shards(paths, folder, max_shard_bytes=limit)
        assert list(CheckpointReader(folder).tensors) == sorted(merged)
        others = [name for name in everything(folder) if name.endswith(".safetensors")]
        assert sum(len(read_header(folder / name)[0]) for name in others) == len(merged)


def test_a_tensor_in_two_parts_or_a_part_in_the_way_is_an_error(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    paths, _ = parts(tmp_path / "parts")
    with pytest.raises(BadInput, match=r"'block\.1\.w' is in .*part-1 and in .*part-1"):
        merge_shards([*paths, paths[1]], folder)
    with pytest.raises(BadInput, match="no tensors"):
        merge_shards([], folder)
    with pytest.raises(UsageError):
        merge_shards(paths, folder, max_shard_bytes=0)
    save_file({"x": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="name of a shard"):
        merge_shards([folder / "model.safetensors"], folder)
    assert everything(folder) == ["config.json", "model.safetensors"]


def test_merging_takes_constant_memory(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    paths = [tmp_path / f"part-{i}" for i in range(2)]
    for i, path in enumerate(paths):
        save_file({f"t{i}": torch.ones(6 * 2**20)}, path)
    tracemalloc.start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    merge_shards(paths, folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 * 2**10  # KiB; the file has 48 MiB
    assert (folder / "model.safetensors").stat().st_size > 48 * 2**20
