"""gptq and awq folders: golden bytes against slow twins, reading of act-order, refusals, damage."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from infopt.checkpoint import CheckpointReader
from infopt.errors import BadInput, InfoptError, Unsupported
from infopt.exporters import awq, gptq
from infopt.exporters.folder import open_model
from infopt.exporters.formats import FORMATS, check, for_settings
from infopt.exporters.quantized import QuantizedReader
from infopt.grid import Grid
from infopt.output import write_manifest
from infopt.qtensor import QTensor

from .folders import complaint, json_values
from .tools import infopt, text, tiny

Q = "model.layers.0.self_attn.q_proj"


def random_qtensor(grid: Grid, rows: int = 64, columns: int = 128, seed: int = 0) -> QTensor:
    generator = torch.Generator().manual_seed(seed)
    groups = columns // grid.width(columns)
    codes = torch.randint(0, grid.levels + 1, (rows, columns), generator=generator).to(torch.uint8)
    scale = (torch.rand(rows, groups, generator=generator) + 0.1).to(grid.scale_dtype)
    zero = torch.full((rows, groups), grid.middle, dtype=torch.uint8)
    if not grid.symmetric:
        zero = torch.randint(0, grid.levels + 1, (rows, groups), generator=generator).to(torch.uint8)
    return QTensor(codes, scale, zero, grid)


def stream(numbers: list[int], bits: int) -> list[int]:
    """Numbers as 32-bit words, little-endian, one bit after another: slow and obvious."""
    text_of_bits = "".join(f"{number:0{bits}b}"[::-1] for number in numbers)
    words = [int(text_of_bits[i : i + 32][::-1], 2) for i in range(0, len(text_of_bits), 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


# Golden bytes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_is_the_stream_of_its_codes(bits: int, version: int) -> None:
    """AutoGPTQ's layout written out by hand: input along words, zero points less one in version 1."""
    q = random_qtensor(Grid(bits, 32, version == 1, torch.float16), rows=32, columns=64)
    tensors = gptq.encode(version, "x", q)
    for column in (0, 7, 31):  # output channels
        assert tensors["x.qweight"][:, column].tolist() == stream(q.codes[column].tolist(), bits)
    for group in (0, 1):
        zeros = [(z - 1 if version == 1 else z) for z in q.zero[:, group].tolist()]
        assert tensors["x.qzeros"][group].tolist() == stream(zeros, bits)
    assert torch.equal(tensors["x.scales"], q.scale.T) and tensors["x.scales"].is_contiguous()
    assert tensors["x.g_idx"].tolist() == [i // 32 for i in range(64)]
    assert {name: t.dtype for name, t in tensors.items() if name != "x.scales"} == {
        f"x.{part}": torch.int32 for part in ("qweight", "qzeros", "g_idx")
    }


def test_gptq_words_that_everybody_knows() -> None:
    q = random_qtensor(Grid(4, 32, True, torch.float16))
    assert set(gptq.encode(1, "x", q)["x.qzeros"].flatten().tolist()) == {0x77777777}
    assert set(gptq.encode(2, "x", q)["x.qzeros"].flatten().tolist()) == {0x88888888 - 2**32}


def test_awq_is_its_published_order() -> None:
    """Nibbles 0..7 of a word hold the output channels 0, 2, 4, 6, 1, 3, 5, 7 of eight."""
    q = random_qtensor(Grid(4, 32, False, torch.float16), rows=16, columns=64)
    tensors = awq.encode("x", q)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    for words, values_XO in ((tensors["x.qweight"], q.codes.T), (tensors["x.qzeros"], q.zero.T)):
        for row in (0, 1):
            expected = [stream([int(values_XO[row, 8 * w + k]) for k in order], 4)[0] for w in range(2)]
            assert words[row].tolist() == expected
    assert tensors["x.qweight"].shape == (64, 2) and tensors["x.qzeros"].shape == (2, 2)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, None])
def test_codes_come_back(name: str, bits: int, symmetric: bool, group: int | None) -> None:
    form = FORMATS[name]
    grid = form.settled(Grid(bits, group, symmetric))
    if form.refuses(grid, (64, 128)):
        zeros_of_eight = name == "mlx" and (group is None or (bits == 8 and not symmetric))
        assert name == "fp8" or zeros_of_eight or (name == "awq" and bits != 4) or (name == "gptq" and not symmetric)
        return
    q = random_qtensor(grid)
    if grid.scale_bits:  # as a solver for this format makes them
        q = replace(q, scale=grid.stored(q.scale.float()).to(grid.scale_dtype))
    tensors = form.encode("x", q)
    again = form.decode({key.removeprefix("x."): t for key, t in tensors.items()}, grid)
    assert again.digest() == q.digest()
    assert all(torch.equal(tensors[key], t) for key, t in form.encode("x", again).items())


# Folders


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("formats")
    tiny("llama", home / "model", dtype=torch.bfloat16)
    for name, flags in {
        "gptq": (),
        "gptq_v2": ("--asym",),
        "awq": ("--asym",),
        "compressed-tensors": (),
        "mlx": ("--asym",),
    }.items():
        made = quantize(home / "model", home / name, "--format", name, *flags)
        assert made.code == 0, made.err
    return home


def quantize(model: Path, out: Path, *flags: object):
    return infopt("quantize", model, "-o", out, "--method", "rtn", "--group-size", 32, "--no-verify", *flags)


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "awq"])
def test_verify_and_eval_read_the_folder(home: Path, name: str) -> None:
    few = ("--num-samples", 2, "--seqlen", 32)
    verified = infopt("verify", home / name, "--reference", home / "model", *few, "--max-kl", 1, "--json")
    assert verified.code == 0, verified.err
    checks = {check["name"]: check["ok"] for check in json.loads(verified.out)["checks"]}
    assert checks["codes as solved"] and checks["tensors passed through"] and checks["exact kernel"]
    assert infopt("eval", home / name, *few, "--dataset", text(home)).code == 0
    config = json.loads((home / name / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == name.removesuffix("_v2")
    assert load_file(home / name / "model.safetensors")[f"{Q}.scales"].dtype == torch.float16


def test_a_changed_byte_is_told(home: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(home / "awq", tmp_path / "awq")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{Q}.qweight"][3, 1] ^= 16
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    result = infopt("verify", folder, "--num-samples", 0)
    assert result.code == 6 and Q in result.err
    write_manifest(folder)  # someone who rewrites the manifest still has the digests against him
    result = infopt("verify", folder, "--num-samples", 0)
    assert result.code == 6 and Q in result.err


def test_gptq_in_activation_order_is_read_dense(home: Path, tmp_path: Path) -> None:
    """The formula W[o, i] = (u - z[g_idx[i]]) * s[g_idx[i]], written out with a shuffled g_idx."""
    folder = shutil.copytree(home / "gptq", tmp_path / "folder")
    before = open_model(folder).get(f"{Q}.weight")
    tensors = load_file(folder / "model.safetensors")
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    tensors[f"{Q}.g_idx"] = tensors[f"{Q}.g_idx"][shuffled].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("manifest.json", "infopt.json"):
        (folder / name).unlink()
    reader = open_model(folder)
    assert isinstance(reader, QuantizedReader) and Q in reader.ordered and Q not in reader.quantized
    q = open_model(home / "gptq").qtensor(Q)
    group_I = tensors[f"{Q}.g_idx"].long()
    expected = (q.codes.float() - q.zero.float()[:, group_I]) * q.scale.float()[:, group_I]
    assert torch.equal(reader.get(f"{Q}.weight"), expected) and not torch.equal(before, expected)
    assert torch.equal(reader.rows(f"{Q}.weight", 3, 5), expected[3:5])
    result = infopt("verify", folder, "--reference", home / "model", "--num-samples", 1, "--seqlen", 32)
    assert result.code == 0 and "activation order" in result.err, result.err


@pytest.mark.parametrize(("name", "file"), [("gptq", "quantize_config.json"), ("awq", "quant_config.json")])
def test_settings_beside_the_config_as_in_old_folders(home: Path, tmp_path: Path, name: str, file: str) -> None:
    folder = shutil.copytree(home / name, tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    del settings["quant_method"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / file).write_text(json.dumps(settings))
    assert open_model(folder).qtensor(Q).digest() == open_model(home / name).qtensor(Q).digest()
    for text_of_file, error in (("[4]", Unsupported), ("{", BadInput), ('{"bits": 5, "w_bit": 5}', Unsupported)):
        (folder / file).write_text(text_of_file)
        with pytest.raises(error):
            open_model(folder)


def test_mixed_grids_and_ignored_layers(tmp_path: Path) -> None:
    """Groups that do not fit some layers: `dynamic` in gptq, a refusal before any work in awq."""
    model = tiny("llama", tmp_path / "model", intermediate_size=160, dtype=torch.bfloat16)
    flags = ("--method", "rtn", "--group-size", 128, "--group-fallback", "adjust", "--no-verify")
    flags = (*flags, "--ignore", "model.layers.1.mlp.up_proj")
    refused = infopt("quantize", model, "-o", tmp_path / "awq", *flags, "--format", "awq", "--bits", 3)
    assert refused.code == 4 and "--format compressed-tensors" in refused.err and "4 bits, not 3" in refused.err
    refused = infopt("quantize", model, "-o", tmp_path / "awq", *flags, "--format", "awq")
    assert refused.code == 4 and "2 different grids" in refused.err and not (tmp_path / "awq").exists()
    made = infopt("quantize", model, "-o", tmp_path / "gptq", *flags, "--format", "gptq")
    assert made.code == 0, made.err
    reader = open_model(tmp_path / "gptq")
    assert {grid.group for grid in reader.quantized.values()} == {32, 64} and len(reader.quantized) == 13
    assert (
        reader.config["quantization_config"]["dynamic"]["+:^model\\.layers\\.0\\.mlp\\.down_proj$"]["group_size"] == 32
    )
    assert "-:^model\\.layers\\.1\\.mlp\\.up_proj$" in reader.config["quantization_config"]["dynamic"]
    assert infopt("verify", tmp_path / "gptq", "--num-samples", 0).code == 0


def test_check_names_the_nearest_format() -> None:
    wide, odd = Grid(4, 32, True, torch.float16), Grid(4, 64, True, torch.float16)
    with pytest.raises(Unsupported, match="compressed-tensors"):
        check(FORMATS["awq"], {"a": (wide, (64, 64)), "b": (odd, (64, 64))})
    with pytest.raises(Unsupported, match="zero"):
        check(FORMATS["gptq"], {"a": (Grid(4, 32, False), (64, 64))})
    with pytest.raises(Unsupported, match="20 rows"):
        check(FORMATS["gptq_v2"], {"a": (Grid(4, 32, False), (20, 64))})
    check(FORMATS["gptq_v2"], {"a": (wide, (64, 64)), "b": (odd, (64, 64))})


# Damage


def changed(home: Path, folder: Path, name: str, **fields: object) -> Path:
    shutil.copytree(home / name, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(fields)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("name", "fields", "error"),
    [
        ("gptq", {"bits": 5}, Unsupported),
        ("gptq", {"bits": True}, Unsupported),
        ("gptq", {"bits": [4]}, Unsupported),
        ("gptq", {"sym": "yes"}, BadInput),
        ("gptq", {"group_size": None}, BadInput),
        ("gptq", {"checkpoint_format": "marlin"}, Unsupported),
        ("gptq", {"checkpoint_format": ["gptq"]}, Unsupported),
        ("gptq", {"pack_dtype": "int16"}, Unsupported),
        ("awq", {"bits": 8}, Unsupported),
        ("awq", {"version": "gemv"}, Unsupported),
        ("awq", {"group_size": 0}, BadInput),
        ("awq", {"group_size": 48}, BadInput),
        ("awq", {"group_size": 64}, BadInput),
        ("awq", {"zero_point": 3}, BadInput),
        ("awq", {"quant_method": {"a": 1}}, Unsupported),
    ],
)
def test_settings_that_are_wrong(home: Path, tmp_path: Path, name: str, fields: dict, error: type) -> None:
    with pytest.raises(error):
        open_model(changed(home, tmp_path / "folder", name, **fields))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "awq", "compressed-tensors", "mlx"])
def test_any_settings_end_in_an_error_of_ours(home: Path, name: str, data: st.DataObject) -> None:
    """Arbitrary JSON in any field: a reader, or an InfoptError; never another exception, never a wrong shape."""
    config = json.loads((home / name / "config.json").read_text())["quantization_config"]
    if name == "compressed-tensors" and data.draw(st.booleans()):
        part = config["config_groups"]["group_0"]["weights"]
    else:
        part = config
    for field in data.draw(st.lists(st.sampled_from([*part, "dynamic", "format", "w_bit"]), min_size=1, max_size=3)):
        part[field] = data.draw(json_values)
    form = for_settings(config)
    if form is None:
        return
    stored = CheckpointReader(home / name).tensors
    try:
        found = form.layouts(config, stored)
    except InfoptError:
        return
    fits = {4: 64, 8: 32, 2: 128} if name == "mlx" else {}  # there, the number of columns follows from the bits alone
    assert all(layout.shape == (64, fits.get(layout.grid.bits, 64)) for op, layout in found.items() if op == Q)


@pytest.mark.parametrize("name", ["gptq", "awq"])
@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
@pytest.mark.parametrize("harm", ["gone", "short", "type", "flat"])
def test_tensors_that_are_wrong(home: Path, tmp_path: Path, name: str, part: str, harm: str) -> None:
    if (name, part) == ("awq", "g_idx") or (part, harm) in (("qweight", "gone"), ("g_idx", "gone")):
        return
    folder = shutil.copytree(home / name, tmp_path / "folder")
    tensors = load_file(folder / "model.safetensors")
    old = tensors.pop(f"{Q}.{part}")
    new = {"gone": None, "short": old[1:].clone(), "type": old.to(torch.int64), "flat": old.flatten()[None]}[harm]
    if new is not None:
        tensors[f"{Q}.{part}"] = new
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match="q_proj"):
        open_model(folder)


@pytest.mark.parametrize("value", [-1, 2, 2**31 - 1])
def test_groups_that_do_not_exist(home: Path, tmp_path: Path, value: int) -> None:
    folder = shutil.copytree(home / "gptq", tmp_path / "folder")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{Q}.g_idx"][5] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    complaint(BadInput, lambda: open_model(folder), "g_idx")


def test_zero_points_that_contradict_the_config(home: Path, tmp_path: Path) -> None:
    folder = changed(home, tmp_path / "folder", "awq", zero_point=False)
    with pytest.raises(BadInput, match="zero points other than 8"):
        open_model(folder).qtensor(Q)
