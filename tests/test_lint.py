"""`infopt lint`: nothing on a clean folder, every planted defect found and named, and no damage that it cannot survive."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from infopt.errors import InfoptError
from infopt.exporters.lint import at_least, lint
from infopt.exporters.packing import pack_bits

from .folders import json_values
from .tools import infopt, tiny
from .tools import text as letters

SIZES = {"hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 512}
LAYER = "model.layers.0"


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """A model in 4 bits with everything that a server wants."""
    place = tmp_path_factory.mktemp("lint")
    model = tiny("llama", place / "m", **SIZES)
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    asked = ["--method", "rtn", "--group-size", 32, "--no-verify", "-o", place / "q"]
    assert infopt("quantize", model, *asked).code == 0
    return place / "q"


@pytest.fixture
def copied(clean, tmp_path) -> Path:
    return shutil.copytree(clean, tmp_path / "q")


def edit(folder: Path, change: Callable[[dict], None], name: str = "config.json") -> None:
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))


def section(change: Callable[[dict], None]) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda config: change(config["quantization_config"]))


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return apply


def put(name: str, value: float) -> Callable[[Path], None]:
    return weights(lambda tensors: tensors[name].reshape(-1)[3:4].fill_(value))


def plain(*names: str) -> Callable[[Path], None]:
    """Dequantize some layers in place, as a tool that skips them would leave them."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            rows, columns = tensors.pop(f"{name}.weight_shape").tolist()
            del tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"]
            tensors[f"{name}.weight"] = torch.ones(rows, columns)

    return weights(change)


def regroup(name: str) -> Callable[[Path], None]:
    """Twice as many columns share a scale as in the siblings."""
    return weights(lambda t: t.update({f"{name}.weight_scale": t[f"{name}.weight_scale"][:, ::2].contiguous()}))


def kv(*parts: str) -> Callable[[Path], None]:
    return weights(lambda t: t.update({f"{LAYER}.self_attn.{part}": torch.ones(1) for part in parts}))


def write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def remove(*names: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return apply


def chatty(folder: Path) -> None:
    remove("chat_template.jinja")(folder)
    edit(folder, lambda data: data["added_tokens"].append({"id": 5, "content": "<|im_start|>"}), "tokenizer.json")


def head_copy(values: float) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        edit(folder, lambda config: config.update(tie_word_embeddings=True))
        weights(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + values}))(folder)

    return apply


def tied_and_quantized(folder: Path) -> None:
    edit(folder, lambda config: config.update(tie_word_embeddings=True))
    weights(lambda t: t.update({"lm_head.weight_packed": torch.ones(128, 32, dtype=torch.int32)}))(folder)


PLANTED = {
    # Non-finite numbers (FIELD 1.3)
    "nan scale": (put(f"{LAYER}.mlp.up_proj.weight_scale", float("nan")), "error", "scale", "not finite"),
    "infinite scale": (put(f"{LAYER}.mlp.up_proj.weight_scale", float("inf")), "error", "scale", "not finite"),
    "zero scale": (put(f"{LAYER}.mlp.up_proj.weight_scale", 0.0), "error", "scale", "1 of its values is zero"),
    "negative scale": (put(f"{LAYER}.mlp.up_proj.weight_scale", -1.0), "error", "scale", "negative"),
    "no scale": (weights(lambda t: t.pop(f"{LAYER}.mlp.up_proj.weight_scale")), "error", "shape", "no scale"),
    "nan norm": (put("model.norm.weight", float("nan")), "error", "not-finite", "not finite"),
    # Groups against shapes and tensor parallelism (1.6)
    "group that is none": (section(lambda s: weights_of(s).update(group_size=0)), "error", "number", "group_size is 0"),
    "group of a text": (section(lambda s: weights_of(s).update(group_size="32")), "error", "number", "group_size is '32'"),
    "bits": (section(lambda s: weights_of(s).update(num_bits=99)), "error", "number", "num_bits is 99"),
    "shape": (weights(lambda t: t[f"{LAYER}.mlp.up_proj.weight_shape"].fill_(7)), "error", "shape", "7 rows"),
    # Activation order (1.7)
    "act-order": (section(lambda s: weights_of(s).update(actorder="group")), "error", "act-order", "actorder 'group'"),
    # Names, ignore lists, fused layers (1.9)
    "old name": (section(lambda s: s["ignore"].append("language_model.lm_head2")), "warning", "unmatched-name", "lm_head2"),
    "old pattern": (section(lambda s: s["ignore"].append("re:.*moe_gate$")), "warning", "unmatched-name", "moe_gate"),
    "endless pattern": (section(lambda s: s["ignore"].append("re:(a|a|l.*)+$")), "warning", "unmatched-name", "bounded"),
    "no ignore": (section(lambda s: s.update(ignore=[])), "error", "uncovered-layer", "becomes NaN"),
    "half of the siblings": (plain(f"{LAYER}.self_attn.k_proj"), "error", "fused-siblings", "k_proj: not quantized"),
    "other group": (regroup(f"{LAYER}.mlp.gate_proj"), "error", "fused-siblings", "differ"),
    "no section": (lambda f: edit(f, lambda c: c.pop("quantization_config")), "error", "uncovered-layer", "no quantization"),
    "empty section": (section(lambda s: s.clear()), "error", "uncovered-layer", "no quantization_config"),
    "no target": (section(lambda s: group_of(s).update(targets=["re:.*mlp.*"])), "error", "uncovered-layer", "no config group"),
    "ignored but packed": (section(lambda s: s["ignore"].append(f"{LAYER}.mlp.up_proj")), "error", "uncovered-layer", "remove"),
    "no status": (section(lambda s: s.pop("quantization_status")), "error", "config-key", "quantization_status"),
    "frozen": (section(lambda s: s.update(quantization_status="frozen")), "error", "config-key", "frozen"),
    "rotations": (section(lambda s: s.update(transform_config={"config_groups": {}})), "error", "transform", "leaves them out"),
    # KV scales (1.10)
    "kv dropped": (kv("k_scale", "v_scale"), "warning", "kv-scale", "dropped"),
    "kv missing": (section(lambda s: s.update(kv_cache_scheme={"num_bits": 8})), "error", "kv-scale", "2 of 2 layers"),
    "kv half": (kv("k_scale"), "error", "kv-scale", "v_scale is missing in 1 of 1"),
    "kv zero": (weights(lambda t: t.update({f"{LAYER}.self_attn.k_scale": torch.zeros(1)})), "error", "scale", "zero"),
    "kv misnamed": (weights(lambda t: t.update({f"{LAYER}.self_attn.k_proj.output_scale": torch.ones(1)})), "error",
                    "kv-scale", "not read"),
    # What a server needs beside weights (1.12)
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), "warning", "tokenizer", "no tokenizer"),
    "half a tokenizer": (remove("tokenizer_config.json"), "warning", "tokenizer", "missing"),
    "other tokenizer": (lambda f: edit(f, lambda d: d["model"]["vocab"].update(zz=999), "tokenizer.json"), "error", "tokenizer",
                        "the id 999"),
    "no template": (remove("chat_template.jinja"), "info", "chat-template", "no chat template"),
    "chat without template": (chatty, "warning", "chat-template", "<|im_start|>"),
    "two templates": (lambda f: edit(f, lambda d: d.update(chat_template="x"), "tokenizer_config.json"), "warning",
                      "chat-template", "differs"),
    "no generation config": (remove("generation_config.json"), "warning", "generation-config", "missing"),
    "lost draft layers": (lambda f: edit(f, lambda c: c.update(num_nextn_predict_layers=1)), "warning",
                          "missing-layers", "draft"),
    "lost layers": (lambda f: edit(f, lambda c: c.update(num_hidden_layers=3)), "error", "missing-layers", "layer '2'"),
    # Tied heads (1.13)
    "no head": (weights(lambda t: t.pop("lm_head.weight")), "error", "tied-head", "no lm_head"),
    "tied, stored": (head_copy(0.0), "info", "tied-head", "although it is tied"),
    "tied, different": (head_copy(1.0), "error", "tied-head", "differs"),
    "tied, quantized": (tied_and_quantized, "error", "tied-head", "quantized and tied"),
    # Unsafe files
    "pickle": (write("optimizer.pt", b"x"), "warning", "pickle", "run code"),
    "code": (write("modeling_x.py", b"x"), "warning", "remote-code", "code"),
    "remote code": (lambda f: edit(f, lambda c: c.update(auto_map={"AutoModel": "x.Y"})), "error", "remote-code", "auto_map"),
    "link": (lambda f: (f / "NOTICE").symlink_to("/etc/hostname"), "error", "link", "link out"),
    # Damage
    "half a file": (write("model.safetensors", b"\x00" * 20), "error", "unreadable", "safetensors"),
    "no json": (write("config.json", b"{"), "error", "unreadable", "JSON"),
    "a list": (write("config.json", b"[]"), "error", "unreadable", "no JSON object"),
    "no json beside": (write("tokenizer.json", b"{"), "error", "unreadable", "tokenizer.json"),
    "stray shard": (lambda f: shutil.copy(f / "model.safetensors", f / "old.safetensors"), "warning",
                    "stray-weights", "no index"),
    "index out of the folder": (write("model.safetensors.index.json", b'{"weight_map": {"x": "../x.safetensors"}}'), "error",
                                "unreadable", "../x.safetensors"),
    "old section": (write("quantize_config.json", b'{"bits": 4}'), None, None, None),
}  # fmt: skip


def group_of(quantization: dict) -> dict:
    return quantization["config_groups"]["group_0"]


def weights_of(quantization: dict) -> dict:
    return group_of(quantization)["weights"]


def test_a_clean_folder_gives_nothing(clean):
    done = infopt("lint", clean, "--level", "info", "--json", "--deep")
    said = json.loads(done.out)
    assert done.code == 0 and said == {"passed": True, "findings": []}, done.err
    assert infopt("lint", clean, "--tp", 2).code == 0


@pytest.mark.parametrize("name", list(PLANTED))
def test_each_planted_defect_is_found(copied, name):
    change, level, rule, says = PLANTED[name]
    change(copied)
    done = infopt("lint", copied, "--level", "info", "--json")
    findings = json.loads(done.out)["findings"]
    if rule is None:
        assert done.code == 0 and not findings
        return
    assert done.code == 7, done.err
    hits = [
        f for f in findings if f["rule"] == rule and f["level"] == level and says in json.dumps(f, ensure_ascii=False)
    ]
    assert hits, findings
    assert all(hit["message"] and hit["fix"] and (hit["file"] or hit["tensor"]) for hit in hits)


def test_the_level_decides_the_exit_code(copied):
    remove("generation_config.json")(copied)
    done = infopt("lint", copied)
    assert done.code == 7 and "generation_config.json" in done.err and "1 findings of level warning" in done.err
    assert infopt("lint", copied, "--level", "error").code == 0


@pytest.mark.parametrize("degree", [None, 2, 7])
def test_groups_that_rule_out_degrees(tmp_path, degree):
    model = tiny("llama", tmp_path / "m", intermediate_size=224)
    asked = ["--method", "rtn", "--group-size", 32, "--no-verify", "-o", tmp_path / "q"]
    assert infopt("quantize", model, *asked).code == 0
    findings = lint(tmp_path / "q", tp=degree)
    hits = [f for f in findings if "224 / 32 = 7 groups: TP 1, 7 only" in f.message]
    assert [f.level for f in hits] == {None: ["warning"], 2: ["error"], 7: []}[degree]


def test_heads_that_rule_out_degrees(clean):
    """FIELD 1.6: 25 heads and four ranks; and key-value heads that can be neither divided nor replicated."""
    said = {tp: [f.message for f in lint(clean, tp=tp) if f.rule == "head-degrees"] for tp in (2, 3, 4, 8)}
    assert said == {2: [], 3: ["8 heads / 3 is not whole"], 4: [], 8: []}


def test_key_value_heads_that_rule_out_degrees(copied):
    edit(copied, lambda config: config.update(num_attention_heads=12, num_key_value_heads=4))
    said = {tp: [f.message for f in lint(copied, tp=tp) if f.rule == "head-degrees"] for tp in (2, 4, 6)}
    assert said[2] == said[4] == [] and "4 key-value heads cannot be divided among 6" in said[6][0]


@pytest.mark.parametrize("form", ["compressed-tensors", "fp8"])
def test_blocks_that_rule_out_degrees(tmp_path, form):
    """FIELD 1.6: a rank's part that is smaller than a block."""
    model = tiny("llama", tmp_path / "m", hidden_size=256, intermediate_size=384, dtype=torch.bfloat16)
    asked = ["--method", "fp8", "--scheme", "FP8_BLOCK", "--format", form, "--no-verify", "-o", tmp_path / "q"]
    assert infopt("quantize", model, *asked).code == 0
    assert not [f for f in lint(tmp_path / "q") if f.rule == "group-degrees"]
    hits = {f.message for f in lint(tmp_path / "q", tp=2) if f.rule == "group-degrees"}
    assert "384 / 2 ranks is no whole number of blocks of 128" in hits and not any("256" in hit for hit in hits)


def test_static_scales_of_fused_layers(tmp_path):
    """FIELD 1.9: servers keep one scale for the inputs of q, k and v."""
    model = tiny("llama", tmp_path / "m", **SIZES)
    asked = ["--method", "rtn", "--scheme", "W8A8_STATIC", "--dataset", letters(tmp_path), "--num-samples", 2]
    assert infopt("quantize", model, *asked, "--seqlen", 32, "--no-verify", "-o", tmp_path / "q").code == 0
    assert not [f for f in lint(tmp_path / "q") if f.rule == "fused-siblings"]
    weights(lambda t: t[f"{LAYER}.self_attn.k_proj.input_scale"].mul_(2))(tmp_path / "q")
    (hit,) = [f for f in lint(tmp_path / "q") if f.rule == "fused-siblings"]
    assert hit.level == "warning" and "scales of their own" in hit.message


def test_an_expert_that_was_lost(tmp_path):
    """FIELD 1.9: transformers fills the gap with random numbers."""
    folder = tiny("mixtral", tmp_path / "m")
    assert not [f for f in lint(folder) if f.rule == "missing-layers"]
    gone = "block_sparse_moe.experts.2."
    weights(lambda t: [t.pop(name) for name in list(t) if f"layers.1.{gone}" in name])(folder)
    (hit,) = [f for f in lint(folder) if f.rule == "missing-layers"]
    assert "model.layers.1.block_sparse_moe.experts has no expert '2'" in hit.message


def test_a_large_weight_is_read_only_if_asked(tmp_path):
    """FIELD 1.3: NaN in a weight; small tensors are always looked at, all of them with --deep."""
    folder = tiny("llama", tmp_path / "m", vocab_size=5000)
    put("model.embed_tokens.weight", float("nan"))(folder)
    assert not [f for f in lint(folder) if f.rule == "not-finite"]
    assert infopt("lint", folder, "--deep", "--level", "error").code == 7
    (hit,) = [f for f in lint(folder, deep=True) if f.rule == "not-finite"]
    assert hit.tensor == "model.embed_tokens.weight"


def gptq(folder: Path, **section_keys: object) -> Path:
    """A gptq model written without infopt's exporter: one layer of 64 x 64 and what lint asks for besides."""
    tiny("llama", folder)
    tensors = load_file(folder / "model.safetensors")
    name = f"{LAYER}.mlp.up_proj"
    del tensors[f"{name}.weight"], tensors[f"{LAYER}.mlp.gate_proj.weight"]
    for layer in (name, f"{LAYER}.mlp.gate_proj"):
        tensors[f"{layer}.qweight"] = pack_bits(torch.randint(16, (64, 128), dtype=torch.uint8), 4, 0)
        tensors[f"{layer}.qzeros"] = pack_bits(torch.full((2, 128), 7, dtype=torch.uint8), 4, 1)
        tensors[f"{layer}.scales"] = torch.rand(2, 128).half() + 0.1
        tensors[f"{layer}.g_idx"] = torch.arange(64, dtype=torch.int32) // 32
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    keys = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, **section_keys}
    edit(folder, lambda config: config.update(quantization_config=keys))
    (folder / "chat_template.jinja").write_text("x")
    return folder


def test_a_gptq_folder(tmp_path):
    assert lint(gptq(tmp_path / "m")) == []


@pytest.mark.parametrize(
    ("keys", "level", "rule"),
    [
        ({"bits": 5}, "error", "number"), ({"bits": "4"}, "error", "number"), ({"bits": 3}, "warning", "number"),
        ({"group_size": 0}, "error", "number"), ({"group_size": 16}, "warning", "number"),
        ({"group_size": 64}, "error", "shape"), ({"sym": False}, "warning", "number"),
        ({"desc_act": True}, "warning", "act-order"), ({"dynamic": {"-:mlp.old": {}}}, "warning", "unmatched-name"),
    ],
)  # fmt: skip
def test_gptq_settings_that_engines_refuse(tmp_path, keys, level, rule):
    findings = lint(gptq(tmp_path / "m", **keys))
    assert (level, rule) in {(f.level, f.rule) for f in findings}, findings


def test_layers_with_numbers_of_their_own(tmp_path):
    """What `dynamic` says of a layer is what its tensors are held to: the right numbers pass, wrong ones are found."""
    own = {
        "+:^" + re.escape(f"{LAYER}.mlp.gate_proj") + "$": {"bits": 4, "group_size": 32},
        "+:.*up.*": {"group_size": 32},
    }
    assert not [f for f in lint(gptq(tmp_path / "m", group_size=64, dynamic=own)) if f.rule == "shape"]
    (wrong,) = [f for f in lint(gptq(tmp_path / "n", group_size=64, dynamic={"+:.*up.*": {"group_size": 32}}))
                if f.rule == "shape" and "scales" in f.message]  # fmt: skip
    assert "gate_proj" in wrong.tensor
    hopeless = {"+:(a+)+$": {"group_size": 64}}
    assert not [f for f in lint(gptq(tmp_path / "o", dynamic=hopeless)) if f.rule == "shape"]


def test_activation_order_that_the_config_hides(tmp_path):
    folder = gptq(tmp_path / "m")
    name = f"{LAYER}.mlp.up_proj.g_idx"
    weights(lambda tensors: tensors[name].copy_(tensors[name].flip(0)))(folder)
    (hit,) = lint(folder)
    assert (hit.level, hit.rule, hit.tensor) == ("error", "act-order", name)


def test_no_model_folder_at_all(tmp_path):
    assert infopt("lint", tmp_path).code == 3
    (tmp_path / "x").write_text("x")
    assert infopt("lint", tmp_path / "x").code == 2


def test_many_findings_are_counted_not_listed(copied):
    edit(copied, lambda config: config["quantization_config"]["ignore"].extend(f"old.{i}" for i in range(500)))
    findings = lint(copied)
    assert len(findings) == 21 and "480 more" in findings[-1].message
    assert len(at_least(findings, "error")) == 0


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_config_crashes_it_or_takes_long(clean, tmp_path, data):
    folder = tmp_path / "fuzz"
    if not folder.exists():
        shutil.copytree(clean, folder)
    name = data.draw(
        st.sampled_from(["config.json", "tokenizer.json", "tokenizer_config.json", "hf_quant_config.json"])
    )
    source = clean / name
    content = json.loads(source.read_text()) if source.exists() else {"quantization": {}}
    at, key = content, None
    while isinstance(at, dict) and at and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(at)))
        if not isinstance(at[key], dict):
            break
        at = at[key]
    if isinstance(at, dict):
        at[key or "x"] = data.draw(json_values)
    try:
        text = json.dumps(content)
        (folder / name).write_text(text)
    except UnicodeEncodeError:
        return
    began = time.monotonic()
    try:
        lint(folder)
    except InfoptError as error:
        assert error.exit_code == 3, error
    assert time.monotonic() - began < 10
    (folder / name).unlink()
    if source.exists():
        shutil.copy(source, folder / name)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 4000), byte=st.integers(0, 255), length=st.none() | st.integers(0, 5000))
def test_no_header_crashes_it(clean, tmp_path, at, byte, length):
    """A byte of the header, or the length of the file, is another."""
    folder = tmp_path / "fuzz"
    if not folder.exists():
        shutil.copytree(clean, folder)
    data = bytearray((clean / "model.safetensors").read_bytes())
    data[at] = byte
    (folder / "model.safetensors").write_bytes(data[:length])
    began = time.monotonic()
    findings = lint(folder)
    assert length is None or any(f.rule == "unreadable" for f in findings)
    assert time.monotonic() - began < 10
