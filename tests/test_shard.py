"""`infopt shard` and `infopt assemble`: byte for byte there and back, cut where it may be cut, refused with arithmetic."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from infopt.errors import BadInput, InfoptError
from infopt.exporters.assemble import assemble, open_shards
from infopt.exporters.folder import open_model
from infopt.shards import read_shards

from .folders import complaint, json_values
from .tools import infopt, tiny

HEADS = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 384, "num_key_value_heads": 12}
SIZES = {
    "llama": HEADS,
    "qwen2": HEADS,
    "gemma3": {**HEADS, "head_dim": 32},
    "gpt2": {"n_embd": 384, "n_head": 12},
    "opt": {"hidden_size": 384, "ffn_dim": 384, "num_attention_heads": 12, "word_embed_proj_dim": 384},
}
SCHEMES = {"w4": ["--bits", 4], "w4-asym": ["--bits", 4, "--asym"], "w8": ["--bits", 8], "w3": ["--bits", 3]}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(family, scheme) -> folder, each made once."""
    place, made = tmp_path_factory.mktemp("models"), {}

    def get(family: str, scheme: str = "float") -> Path:
        if (family, "float") not in made:
            made[family, "float"] = tiny(family, place / family, **SIZES[family])
        if (family, scheme) not in made:
            out = place / f"{family}-{scheme}"
            asked = ["--method", "rtn", "--group-size", 32, *SCHEMES[scheme], "--no-verify"]
            done = infopt("quantize", made[family, "float"], *asked, "-o", out)
            assert done.code == 0, done.err
            made[family, scheme] = out
        return made[family, scheme]

    return get


@pytest.fixture(scope="module")
def two_ranks(models, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "tp2"
    assert infopt("shard", models("llama", "w4-asym"), "--tp", 2, "-o", out).code == 0
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_model(source: Path, back: Path) -> None:
    """Every file of the source is there with its bytes; a model without a manifest has got one."""
    want, got = files(source), files(back)
    assert got.keys() - want.keys() <= {"manifest.json"}
    assert all(got[name] == data for name, data in want.items()), [n for n in want if got[n] != want[n]]


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (3, 1), (4, 1), (2, 2), (3, 2), (4, 2)])
@pytest.mark.parametrize("scheme", ["float", "w4", "w4-asym", "w8"])
@pytest.mark.parametrize("family", list(SIZES))
def test_assembled_shards_are_the_model_byte_for_byte(models, tmp_path, family, scheme, tp, pp):
    model = models(family, scheme)
    done = infopt("shard", model, "--tp", tp, "--pp", pp, "-o", tmp_path / "shards", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["cut"] >= 12  # two blocks, at least six weights cut: nothing was just copied
    names = {f"pp{stage}-tp{rank}" for stage in range(pp) for rank in range(tp)}
    assert names | {"source", "shards.json", "manifest.json"} == set(os.listdir(tmp_path / "shards"))
    back = infopt("assemble", tmp_path / "shards", "-o", tmp_path / "back")
    assert back.code == 0, back.err
    assert_same_model(model, tmp_path / "back")


OTHERS = {
    "gptq": ["--method", "rtn", "--bits", 4, "--group-size", 32, "--format", "gptq"],
    "awq": ["--method", "rtn", "--bits", 4, "--asym", "--group-size", 32, "--format", "awq"],
    "fp8": ["--method", "fp8", "--scheme", "FP8_BLOCK", "--format", "fp8"],
    "mlx": ["--method", "rtn", "--bits", 4, "--group-size", 32, "--format", "mlx"],
}


@pytest.mark.parametrize("form", list(OTHERS))
def test_other_formats_come_back_and_each_rank_means_its_slice(tmp_path, form):
    model = tiny("llama", tmp_path / "m", hidden_size=512, intermediate_size=256, dtype=torch.bfloat16)
    made = infopt("quantize", model, *OTHERS[form], "--no-verify", "-o", tmp_path / "q")
    assert made.code == 0, made.err
    done = infopt("shard", tmp_path / "q", "--tp", 2, "--pp", 2, "-o", tmp_path / "s")
    if form == "mlx":
        assert done.code == 4 and "MLX" in done.err and not (tmp_path / "s").exists()
        return
    assert done.code == 0, done.err
    whole = open_model(tmp_path / "q")
    for rank in (0, 1):
        mine = open_model(tmp_path / "s" / f"pp1-tp{rank}")
        for name, side in (("self_attn.q_proj", 0), ("self_attn.o_proj", 1), ("mlp.up_proj", 0), ("mlp.down_proj", 1)):
            key = f"model.layers.1.{name}.weight"
            assert torch.equal(mine.get(key), whole.get(key).chunk(2, side)[rank]), key
    assert infopt("assemble", tmp_path / "s", "-o", tmp_path / "back").code == 0
    assert_same_model(tmp_path / "q", tmp_path / "back")


def test_each_rank_decodes_to_its_own_slice(models, two_ranks):
    """The slow twin: slices of the whole weights, against what each rank's codes mean when read on their own."""
    whole = open_model(models("llama", "w4-asym"))
    cut = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 0, "up_proj": 0, "down_proj": 1}
    for rank in (0, 1):
        mine = open_model(two_ranks / f"pp0-tp{rank}")
        for name in whole.quantized:
            w_OI = whole.get(f"{name}.weight")
            expected = w_OI.chunk(2, cut[name.rpartition(".")[2]])[rank]
            assert torch.equal(mine.get(f"{name}.weight"), expected), name
        head = whole.get("lm_head.weight").chunk(2, 0)[rank]
        assert torch.equal(mine.get("lm_head.weight"), head)
    ranks = [load_file(two_ranks / f"pp0-tp{rank}" / "model.safetensors") for rank in (0, 1)]
    shards = read_shards(two_ranks)
    for name, how in shards.tensors.items():
        assert torch.equal(ranks[0][name], ranks[1][name]) == (how.axis is None), name


def test_pipeline_stages_hold_their_layers_and_tied_embeddings_twice(models, tmp_path):
    assert infopt("shard", models("gemma3"), "--pp", 2, "-o", tmp_path / "s").code == 0
    first, last = (set(load_file(tmp_path / "s" / f"pp{i}-tp0" / "model.safetensors")) for i in (0, 1))
    assert first & last == {"model.embed_tokens.weight"}
    assert any(".layers.0." in name for name in first) and not any(".layers.1." in name for name in first)
    assert "model.norm.weight" in last - first


FUSED = {
    "phi3": ("self_attn.qkv_proj", [[0, 32, 0], [64, 80, 0], [96, 112, 0]]),  # all queries, all keys, all values
    "gpt_neox": ("attention.query_key_value", [[0, 96, 0]]),  # each head's query, key and value together
    "falcon_new": ("self_attention.query_key_value", [[0, 64, 0]]),  # each group's queries, key and value
    "falcon_old": ("self_attention.query_key_value", [[0, 32, 0], [64, 96, 0]]),  # one key and value for all
    "gpt2": ("attn.c_attn", [[0, 32, 0], [64, 96, 0], [128, 160, 0]]),
    "olmo2": ("self_attn.q_proj", [[0, 64, 0]]),  # a norm over all heads: queries cannot be cut, values can
}


@pytest.mark.parametrize("family", list(FUSED))
def test_parts_of_fused_projections_are_found(tmp_path, family):
    model = tiny(family, tmp_path / "m")
    assert infopt("shard", model, "--tp", 2, "-o", tmp_path / "s").code == 0
    described = json.loads((tmp_path / "s" / "shards.json").read_text())
    name, rows = FUSED[family]
    found = next(op for key, op in described["ops"].items() if key.endswith(f"0.{name}"))
    assert found["parallel"] == "column" and found["rows"][0] == rows
    assert infopt("assemble", tmp_path / "s", "-o", tmp_path / "back").code == 0
    assert_same_model(model, tmp_path / "back")


def test_shared_heads_are_replicated_where_ranks_outnumber_them(tmp_path):
    model = tiny("llama", tmp_path / "m")  # four heads that share two keys and values
    assert infopt("shard", model, "--tp", 4, "-o", tmp_path / "s").code == 0
    keys = [load_file(tmp_path / "s" / f"pp0-tp{r}" / "model.safetensors") for r in range(4)]
    k = [held["model.layers.0.self_attn.k_proj.weight"] for held in keys]
    assert torch.equal(k[0], k[1]) and torch.equal(k[2], k[3]) and not torch.equal(k[1], k[2])
    assert infopt("assemble", tmp_path / "s", "-o", tmp_path / "back").code == 0
    assert_same_model(model, tmp_path / "back")


@pytest.mark.parametrize(
    ("options", "scheme", "tp", "says"),
    [
        ({}, None, 3, ["layers.0.self_attn.o_proj", "4 heads / 3 is not whole", "TP 1, 2, 4 only"]),
        ({"intermediate_size": 224}, ["--bits", 4, "--group-size", 32], 2,
         ["layers.0.mlp.down_proj", "224 columns / 32 = 7 groups", "7 / 2 is not whole", "TP 1, 7 only"]),
        ({"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 4}, None, 3,
         ["layers.0.self_attn.k_proj", "4 key-value heads over 3 ranks", "TP 1, 2, 4, 12 only"]),
        ({"num_attention_heads": 8, "head_dim": 8}, ["--bits", 4, "--group-size", 32, "--asym"], 8,
         ["layers.0.self_attn.o_proj", "64 columns / 32 = 2 groups", "TP 1, 2 only"]),
        ({"intermediate_size": 48}, ["--bits", 3, "--group-size", "channel"], 2,
         ["layers.0.mlp.down_proj", "24 columns x 3 bits = 72 bits", "words of 32 bits", "TP 1 only"]),
    ],
)  # fmt: skip
def test_laws_name_the_layer_and_the_arithmetic(tmp_path, options, scheme, tp, says):
    model = tiny("llama", tmp_path / "m", **options)
    if scheme:
        asked = ["--method", "rtn", *scheme, "--no-verify", "-o", tmp_path / "q"]
        assert infopt("quantize", model, *asked).code == 0
        model = tmp_path / "q"
    done = infopt("shard", model, "--tp", tp, "-o", tmp_path / "s")
    assert done.code == 4 and all(word in done.err for word in says), done.err
    assert not list(tmp_path.glob("s*"))


def test_more_stages_than_blocks(tmp_path, models):
    done = infopt("shard", models("llama"), "--pp", 3, "-o", tmp_path / "s")
    assert done.code == 2 and "2 blocks" in done.err


@pytest.mark.parametrize(
    "scheme", [None, ["--bits", 4], ["--bits", 4, "--asym"], ["--bits", 3], ["--bits", 8, "--asym"]]
)
def test_padding_means_zero_and_goes_away_again(tmp_path, scheme):
    model = tiny("llama", tmp_path / "m", intermediate_size=224, vocab_size=127)
    if scheme:
        asked = ["--method", "rtn", "--group-size", 32, *scheme, "--no-verify", "-o", tmp_path / "q"]
        assert infopt("quantize", model, *asked).code == 0
        model = tmp_path / "q"
    done = infopt("shard", model, "--tp", 2, "--pad", "-o", tmp_path / "s")
    assert done.code == 0 and "127 rows padded to 128" in done.err, done.err
    if scheme:
        assert "224 columns padded to 256" in done.err
        last = open_model(tmp_path / "s" / "pp0-tp1")
        down = last.get("model.layers.0.mlp.down_proj.weight")
        assert down.shape == (64, 128) and not bool(down[:, 96:].any()) and bool(down[:, :96].any())
        assert bool(torch.isfinite(last.get("model.layers.0.mlp.up_proj.weight")).all())
    assert infopt("assemble", tmp_path / "s", "-o", tmp_path / "back").code == 0
    assert_same_model(model, tmp_path / "back")


def test_shards_are_sharded_again(models, two_ranks, tmp_path):
    assert infopt("shard", two_ranks, "--tp", 3, "--pp", 2, "-o", tmp_path / "again").code == 0
    assert infopt("shard", models("llama", "w4-asym"), "--tp", 3, "--pp", 2, "-o", tmp_path / "straight").code == 0
    assert files(tmp_path / "again") == files(tmp_path / "straight")


def test_many_files_and_odd_headers_come_back(tmp_path):
    """Weights in two shards whose headers are not laid out as ours: metadata, padding and order are kept."""
    model = tiny("llama", tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, model / file, {"format": "pt", "note": "ours"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "LICENSE").write_text("free")
    (model / "pytorch_model.bin").write_bytes(b"never read")
    done = infopt("shard", model, "--tp", 2, "--pp", 2, "-o", tmp_path / "s")
    assert done.code == 0 and "pytorch_model.bin: left out" in done.err
    assert infopt("assemble", tmp_path / "s", "-o", tmp_path / "back").code == 0
    (model / "pytorch_model.bin").unlink()
    assert_same_model(model, tmp_path / "back")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["topologies"], {}), (["topologies", "topology-0"], 5), (["blocks"], []), (["blocks", 0], None),
        (["topologies", "topology-0", "ops", 1, "name"], "self_attn.none"),
        (["topologies", "topology-0", "ops", 1, "out_features"], "384"),
        (["topologies", "topology-0", "spaces", 1, "readers"], ["mlp.none"]),
        (["topologies", "topology-0", "spaces", 1, "width"], 10**12),
        (["topologies", "topology-0", "spaces", 1, "fold", "writer"], "nobody"),
        (["topologies", "topology-0", "spaces", 1, "fold", "rows"], [10**9] * 384),
    ],
)  # fmt: skip
def test_a_recorded_topology_is_not_trusted(models, tmp_path, path, value):
    model = shutil.copytree(models("llama", "w4"), tmp_path / "m")
    report = json.loads((model / "infopt.json").read_text())
    set_at(report, path, value)
    (model / "infopt.json").write_text(json.dumps(report))
    (model / "manifest.json").unlink()
    done = infopt("shard", model, "--tp", 2, "-o", tmp_path / "s")
    assert done.code == 3 and "infopt.json" in done.err, done


def test_a_record_that_lies_about_heads_is_found_out(models, tmp_path):
    """The values of two heads are said to be swapped: the derivatives tell otherwise."""
    model = shutil.copytree(models("llama", "w4"), tmp_path / "m")
    report = json.loads((model / "infopt.json").read_text())
    space = report["topologies"]["topology-0"]["spaces"][1]
    assert space["readers"] == ["self_attn.o_proj"]
    space["fold"]["rows"] = [*range(192, 384), *range(192)]
    (model / "infopt.json").write_text(json.dumps(report))
    (model / "manifest.json").unlink()
    done = infopt("shard", model, "--tp", 2, "-o", tmp_path / "s")
    assert done.code == 4 and "v_proj" in done.err, done


def test_what_is_replicated_is_told(tmp_path):
    done = infopt("shard", tiny("mixtral", tmp_path / "m"), "--tp", 2, "-o", tmp_path / "s")
    assert done.code == 0 and "layers.0: mlp" in done.err and "replicated" in done.err, done.err


# Damage


def damaged(two_ranks: Path, tmp_path: Path) -> Path:
    """A copy of the shards without a manifest, so that what is checked is the shards themselves."""
    copied = shutil.copytree(two_ranks, tmp_path / "copy")
    (copied / "manifest.json").unlink()
    return copied


def change_tensor(folder: Path, name: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = tensors[name].flip(0) if tensors[name].dim() > 1 else tensors[name] + 1
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "says"),
    [("model.norm.weight", "differs from another rank"), ("lm_head.weight", "is not what was cut")],
)
def test_other_weights_are_noticed_without_a_manifest(two_ranks, tmp_path, name, says):
    folder = damaged(two_ranks, tmp_path)
    change_tensor(folder / "pp0-tp1", name)
    done = infopt("assemble", folder, "-o", tmp_path / "out")
    assert done.code == 6 and says in done.err and not list(tmp_path.glob("out*")), done.err


def test_a_flipped_byte_fails_the_manifest(two_ranks, tmp_path):
    copied = shutil.copytree(two_ranks, tmp_path / "copy")
    path = copied / "pp0-tp0" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    done = infopt("assemble", copied, "-o", tmp_path / "out")
    assert done.code == 6 and "pp0-tp0/model.safetensors was changed" in done.err


def test_a_missing_rank_and_swapped_ranks(two_ranks, tmp_path):
    folder = damaged(two_ranks, tmp_path)
    (folder / "pp0-tp0").rename(folder / "x")
    done = infopt("assemble", folder, "-o", tmp_path / "out")
    assert done.code == 3 and "pp0-tp0" in done.err
    (folder / "pp0-tp1").rename(folder / "pp0-tp0")
    (folder / "x").rename(folder / "pp0-tp1")
    done = infopt("assemble", folder, "-o", tmp_path / "out")
    assert done.code == 6 and not list(tmp_path.glob("out*")), done.err


def test_a_folder_that_is_no_shards(models, tmp_path):
    done = infopt("assemble", models("llama"), "-o", tmp_path / "out")
    assert done.code == 3 and "shards.json" in done.err


def set_at(data, path: list, value) -> None:
    for key in path[:-1]:
        data = data[key]
    data[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["format"], "other"), (["tp"], 10**9), (["tp"], True), (["pp"], 0), (["stages"], [1]),
        (["source", "files"], {"../evil": {"size": 1, "sha256": "0" * 64}}),
        (["source", "files"], {"/evil": {"size": 1, "sha256": "0" * 64}}),
        (["source", "files"], {"a/../../evil": {"size": 1, "sha256": "0" * 64}}),
        (["source", "files", "config.json/x"], {"size": 1, "sha256": "0" * 64}),
        (["source", "files", "manifest.json/x"], {"size": 1, "sha256": "0" * 64}),
        (["source", "weights"], ["absent.safetensors"]), (["source", "weights"], []),
        (["tensors", "lm_head.weight", "shape"], [2**62, 2**62]),
        (["tensors", "lm_head.weight", "axis"], 2), (["tensors", "lm_head.weight", "stages"], [1]),
        (["tensors", "lm_head.weight", "pieces", 0, 0], [0, 10**9, 0]),
        (["tensors", "lm_head.weight", "pieces", 0, 0], [1, 64, 0]),
        (["tensors", "lm_head.weight", "pieces", 0, 0], [0, 64, 5]),
        (["tensors", "lm_head.weight", "dtype"], "F33"),
        (["ops"], {"x": {"parallel": "sideways", "shape": [1, 1]}}),
    ],
)  # fmt: skip
def test_a_wrong_description_is_refused_at_once(two_ranks, tmp_path, path, value):
    folder = damaged(two_ranks, tmp_path)
    described = json.loads((folder / "shards.json").read_text())
    set_at(described, path, value)
    (folder / "shards.json").write_text(json.dumps(described))
    complaint(BadInput, lambda: open_shards(folder))


def test_a_name_that_no_file_can_have_is_a_message(two_ranks, tmp_path):
    folder = damaged(two_ranks, tmp_path)
    described = json.loads((folder / "shards.json").read_text())
    described["source"]["files"]["x" * 300] = {"size": 1, "sha256": "0" * 64}
    (folder / "shards.json").write_text(json.dumps(described))
    done = infopt("assemble", folder, "-o", tmp_path / "out")
    assert done.code in (2, 3) and not list(tmp_path.glob("out*")), done


def places(data, path=()):
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_other_description_crashes_nothing_and_writes_nothing_outside(two_ranks, tmp_path, data):
    folder, out = tmp_path / "fuzz", tmp_path / "place" / "out"
    if not folder.exists():
        shutil.copytree(two_ranks, folder)
        (folder / "manifest.json").unlink()
    described = json.loads((two_ranks / "shards.json").read_text())
    path = data.draw(st.sampled_from(sorted(places(described), key=str)))
    changed = copy.deepcopy(described)
    value = data.draw(json_values | st.sampled_from(["../x", "/x", "", "lm_head.weight", 2**31, [], {}]))
    if path:
        set_at(changed, list(path), value)
    else:
        changed = value
    (folder / "shards.json").write_text(json.dumps(changed))
    before = files(folder)
    out.mkdir(parents=True, exist_ok=True)
    try:
        assemble(open_shards(folder), out)
        assert {name: data for name, data in files(out).items() if name in described["source"]["files"]}
    except InfoptError as error:
        assert error.exit_code in (3, 5, 6), error
    assert files(folder) == before
    assert set(os.listdir(tmp_path)) == {"fuzz", "place"} and os.listdir(out.parent) == ["out"]
    shutil.rmtree(out)
