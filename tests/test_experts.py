"""Mixtures of experts: taken apart only after a proof, the same function as before, calibrated expert by expert; an expert
that no token reaches, and stacks that stay as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from infopt.calibration.discover import discover
from infopt.calibration.experts import spaces_of
from infopt.calibration.stats import InputStats
from infopt.calibration.stream import Stream
from infopt.checkpoint import CheckpointReader
from infopt.definition import small_twin
from infopt.errors import BadInput
from infopt.experts import Expert, Experts, Proof, Roles, obstacle, table_of
from infopt.exporters.folder import open_model
from infopt.model import BlockCall, Skeleton

from .families import GROUPED, ROUTED, randomise
from .folders import complaint
from .test_quantize import our_logits
from .tools import infopt, skeleton_of, slow_unless, text, tiny

ROUTERS = {"mixtral": "block_sparse_moe.gate.weight", "qwen3_moe": "mlp.gate.weight"}
UNREACHED = 1
SMALL = ("--num-samples", 8, "--seqlen", 32, "--verify-samples", 2)
ALL = {**GROUPED, **ROUTED, "num_local_experts": 8, "n_routed_experts": 8}
DEEPSEEK = {
    **ALL, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "head_dim": 8, "n_shared_experts": 1,
}  # fmt: skip


def moe(family: str, folder: Path) -> Path:
    """A tiny model in whose first block expert 1 is never chosen, and the others are."""
    model = tiny(family, folder)
    tensors = load_file(model / "model.safetensors")
    router = tensors[f"model.layers.0.{ROUTERS[family]}"]
    # A channel that is always positive, which this expert's row of the router reads as "never" and the others' not at all.
    tensors["model.embed_tokens.weight"][:, 0] = 0.3
    for name in ("0.input_layernorm", "1.input_layernorm", "1.post_attention_layernorm"):  # nobody else hears of it
        tensors[f"model.layers.{name}.weight"][0] = 0
    tensors["model.layers.0.self_attn.o_proj.weight"][0] = 0
    router[:, 0] = 0
    router[UNREACHED, 0] = -50.0
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


def quantize(model: Path, out: Path, *flags: object):
    return infopt("quantize", model, "-o", out, *SMALL, "--dataset", text(out.parent), *flags)


# Splitting


@pytest.mark.parametrize(
    "config",
    [
        hf.Qwen2MoeConfig(**{**ALL, "shared_expert_intermediate_size": 80}),
        hf.OlmoeConfig(**ALL),
        hf.DeepseekV3Config(**DEEPSEEK),
        hf.MiniMaxConfig(**{**ALL, "head_dim": 16}),
    ],
    ids=lambda config: config.model_type,
)
def test_other_families_split_without_a_table(config, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model)
    model.save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids_BT = torch.arange(3, 35).view(2, 16)
    ours = skeleton_of(tmp_path)
    assert not ours.stacked and any(isinstance(module, Experts) for module in ours.model.modules())
    with torch.no_grad():
        assert (our_logits(tmp_path, ids_BT) - whole(ids_BT, use_cache=False).logits).abs().max() < 1e-5


def test_a_split_layer_is_the_layer_that_it_replaces(tmp_path: Path) -> None:
    """Against transformers' own module at full size, with all experts used, and with one alone."""
    model = skeleton_of(moe("mixtral", tmp_path))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    theirs = whole.model.layers[1].mlp.experts
    ours = model.load_block(1).get_submodule("mlp.experts")
    x_TH = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    for index_TK in (torch.stack([torch.arange(50) % 4, (torch.arange(50) + 1) % 4], 1), torch.full((50, 1), 2)):
        weights_TK = torch.rand(index_TK.shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            wanted = theirs(x_TH, index_TK, weights_TK)
            assert (ours(x_TH, index_TK, weights_TK) - wanted).norm() <= 1e-6 * wanted.norm()
            ours.whole = frozenset(range(4))  # calibration shows them everything: the answer must not change
            assert (ours(x_TH, index_TK, weights_TK) - wanted).norm() <= 1e-6 * wanted.norm()
            ours.whole = frozenset()


class Clamped(hf.models.mixtral.modeling_mixtral.MixtralExperts):
    """As gpt-oss does: gates are clamped, which only large inputs show."""

    limit = 7.0

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for token in range(len(hidden_states)):
            for slot, expert in enumerate(top_k_index[token].tolist()):
                gate, up = (self.gate_up_proj[expert] @ hidden_states[token]).chunk(2)
                gate = self.curve(gate)
                out[token] += top_k_weights[token, slot] * (self.down_proj[expert] @ (self.act_fn(gate) * up))
        return out

    def curve(self, gate: Tensor) -> Tensor:
        return gate.clamp(max=self.limit)


class Sound(Clamped):
    def curve(self, gate: Tensor) -> Tensor:
        return gate


class WeighsFirst(Clamped):
    """As Llama 4 does: the router's weight goes in before the curve."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        ones = torch.ones_like(top_k_weights)
        return super().forward(hidden_states * top_k_weights[:, :1], top_k_index, ones)


class Strange(Clamped):
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        raise NotImplementedError("not on this machine")


def proof_of(kind: type[nn.Module], merge: Callable[[Tensor, Tensor], Tensor]) -> tuple[Roles | None, str]:
    config = hf.MixtralConfig(hidden_size=64, intermediate_size=128, num_local_experts=4)
    with torch.device("meta"):
        module = kind(config)
    assert obstacle(module) == ""
    keys = [f"x.experts.{e}.{name}.weight" for e in range(4) for name in ("p", "q", "r")]
    table = table_of(keys, 4)
    assert table is not None

    def convert(tensors):
        p, q, r = (torch.stack([tensors[key] for key in table[name]]) for name in "pqr")
        return {"gate_up_proj": merge(q, p), "down_proj": r}

    shapes = {"p": (128, 64), "q": (128, 64), "r": (64, 128)}
    return Proof(table, shapes, lambda sizes: small_twin(module, sizes), convert).roles()


def stacked_halves(gate: Tensor, up: Tensor) -> Tensor:
    return torch.cat((gate, up), 1)


def interleaved(gate: Tensor, up: Tensor) -> Tensor:
    return torch.stack((gate, up), 2).flatten(1, 2)


def test_roles_are_found_whatever_the_names_say() -> None:
    assert proof_of(Sound, stacked_halves) == (Roles(up="p", down="r", gate="q"), "")


@pytest.mark.parametrize(
    ("kind", "merge", "words"),
    [
        (Clamped, stacked_halves, "computes what it computes"),
        (WeighsFirst, stacked_halves, "computes what it computes"),
        (Sound, interleaved, "computes what it computes"),
        (Strange, stacked_halves, "not on this machine"),
    ],
)
def test_what_is_not_understood_is_refused(kind, merge, words: str) -> None:
    roles, reason = proof_of(kind, merge)
    assert roles is None and words in reason


@pytest.mark.parametrize(
    "keys",
    [
        [],
        ["a.0.w.bias", "a.1.w.bias"],
        ["a.0.w.weight", "a.2.w.weight", "a.0.v.weight", "a.2.v.weight"],
        ["a.0.w.weight", "a.1.w.weight", "a.0.v.weight"],
        ["a.0.forward.weight", "a.1.forward.weight", "a.0.v.weight", "a.1.v.weight"],
        ["a.0.w.weight", f"a.{'9' * 5000}.w.weight", "a.0.v.weight", "a.1.v.weight"],
        ["a.0.w.weight", "a.1.x.w.weight"],
    ],
)
def test_keys_that_are_no_table(keys: list[str]) -> None:
    assert table_of(keys, 2) is None


@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss"])
def test_experts_that_are_stored_stacked_stay_and_are_told(family: str, tmp_path: Path) -> None:
    kinds = {"granitemoe": hf.GraniteMoeConfig(**ALL), "gpt_oss": hf.GptOssConfig(**{**ALL, "head_dim": 16})}
    tiny("llama", tmp_path / "m")  # for its tokenizer
    model = AutoModelForCausalLM.from_config(kinds[family], dtype=torch.float32)
    randomise(model)
    model.save_pretrained(tmp_path / "m")
    result = quantize(tmp_path / "m", tmp_path / "out", "--method", "gptq", "--bits", 8, "--group-size", 32)
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "out" / "infopt.json").read_text())
    stacks = {name: why for name, why in report["kept"].items() if name.endswith(".experts")}
    assert len(stacks) == 2 and all("stack" in why or "besides matrices" in why for why in stacks.values())
    assert "experts stays float" in result.err
    assert not any("experts" in name for name in report["layers"])


def test_experts_of_a_shape_that_the_config_denies_are_refused(tmp_path: Path) -> None:
    model = tiny("mixtral", tmp_path)
    tensors = load_file(model / "model.safetensors")
    for e in range(4):
        for name in ("w1", "w3"):
            key = f"model.layers.1.block_sparse_moe.experts.{e}.{name}.weight"
            tensors[key] = tensors[key].T.contiguous()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match="experts"):
        skeleton_of(model).load_block(1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_local_experts": 10**9}, "num_local_experts"),
        ({"num_local_experts": -1}, "num_local_experts"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"num_local_experts": 5}, "gate"),
    ],
)
def test_numbers_of_experts_that_cannot_be(changes: dict[str, int], words: str, tmp_path: Path) -> None:
    model = tiny("mixtral", tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))
    complaint(BadInput, lambda: skeleton_of(model), words, "config.json")


# Topology


def test_one_expert_is_proven_for_all(tmp_path: Path) -> None:
    """Each expert has the two spaces of a gated MLP; every fold keeps the block's function; the order is that of running."""
    model = skeleton_of(moe("qwen3_moe", tmp_path))
    topology = discover(model, 1)
    experts = spaces_of(topology, "mlp.experts")
    assert len(experts) == 8 and all(len(spaces) == 2 for spaces in experts)
    assert [space.readers[0].split(".")[0] for space in topology.spaces][:2] == ["self_attn", "self_attn"]
    block, call = model.load_block(1), model.calls(2, 40)[1]
    hidden_BTH = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = call.run(block, hidden_BTH)
        for outer, inner in experts:
            assert outer.fold is None and "router" in outer.reason and inner.fold is not None
            scale_C = 0.5 + torch.rand(inner.width)
            block.get_submodule(inner.fold.writer).weight.mul_(scale_C[:, None])
            block.get_submodule(inner.readers[0]).weight.div_(scale_C)
        after = call.run(block, hidden_BTH)
    assert (after - before).norm() <= 1e-5 * before.norm()


def test_discovery_does_not_grow_with_the_experts() -> None:
    """The runs of the block that discovery needs are the same for 2 experts and for 40."""
    runs = []
    for count in (2, 40):
        block = Layer(count)
        toy = SimpleNamespace(
            dtype=torch.float32, model=nn.ModuleDict({"block": block}), blocks=["block"],
            config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=16)),
            calls=lambda batch, length: [BlockCall((), {})], outer_loaded=torch.no_grad,
        )  # fmt: skip
        topology = discover(toy, 0)  # type: ignore[arg-type]
        assert len(topology.spaces) == 1 + 2 * count
        runs.append(block.runs)
    assert runs[0] == runs[1]


class Layer(nn.Module):
    """A linear layer, then experts."""

    def __init__(self, count: int) -> None:
        super().__init__()
        weights = {"a": torch.randn(24, 16), "b": torch.randn(24, 16), "c": torch.randn(16, 24)}
        self.first = nn.Linear(16, 16)
        self.experts = Experts([Expert(weights, Roles("a", "c", "b"), nn.SiLU()) for _ in range(count)])
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        x = x + self.first(x)
        index = torch.zeros(x.numel() // 16, 1, dtype=torch.long)
        return x + self.experts(x.reshape(-1, 16), index, torch.ones(index.shape)).view_as(x)


# Calibration


def stream_of(model: Path, folder: Path) -> tuple[Skeleton, Stream]:
    ours = skeleton_of(model)
    stream = Stream(ours, torch.randint(3, 90, (70, 32), generator=torch.Generator().manual_seed(0)), folder)
    stream.start()
    return ours, stream


@pytest.mark.parametrize("family", ROUTERS)
def test_a_starved_expert_sees_the_whole_batch(family: str, tmp_path: Path) -> None:
    """By gathering and by walking: its own count is nothing, what it was shown is everything; others see their own."""
    ours, stream = stream_of(moe(family, tmp_path / "m"), tmp_path / "h")
    stream.min_expert_tokens = 16
    topology = discover(ours, 0)
    block = ours.load_block(0)
    gathered = stream.gather(0, block, topology)
    output = stream.advance(0, block)
    walked: dict[str, InputStats] = {}
    assert stream.walk(0, block, topology, lambda space, stats: walked.update({space.name: stats})) == output
    routed = 0
    for number, spaces in enumerate(spaces_of(topology, "mlp.experts")):
        for stats in (gathered[spaces[0].name], walked[spaces[0].name]):
            starved = number == UNREACHED
            assert (stats.routed == 0) == starved
            assert stats.tokens == (70 * 32 if starved else stats.routed)
        routed += walked[spaces[0].name].routed or 0
        for space in spaces:
            assert torch.allclose(gathered[space.name].gram, walked[space.name].gram, rtol=1e-5, atol=1e-3)
    assert routed == 2 * 70 * 32  # two experts a token
    assert all(not experts.whole and experts.delegate is None for experts in (block.get_submodule("mlp.experts"),))
    assert [path.name for path in (tmp_path / "h").iterdir() if "hidden" not in path.name] == []


def test_each_expert_sees_its_predecessors_quantized(tmp_path: Path) -> None:
    """Against the definition: gather again for every space, with what is quantized so far."""
    ours, stream = stream_of(tiny("mixtral", tmp_path / "m"), tmp_path / "h")
    topology = discover(ours, 0)

    def quantized(block: nn.Module, readers: tuple[str, ...], stats: InputStats) -> None:
        for name in readers:
            weight = block.get_submodule(name).weight.data
            weight.copy_((weight * 4).round() / 4 + 1e-4 * stats.gram.diagonal() / max(stats.tokens, 1))

    slow = ours.load_block(0)
    for space in topology.spaces:
        quantized(slow, space.readers, stream.gather(0, slow, topology)[space.name])
    wanted = {name: tensor.clone() for name, tensor in slow.state_dict().items()}
    output = stream.advance(0, slow)
    block = ours.load_block(0)
    assert stream.walk(0, block, topology, lambda space, stats: quantized(block, space.readers, stats)) == output
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in block.state_dict().items())


# From end to end


EIGHT = ("--bits", 8, "--group-size", 32)
METHODS = {
    **{method: ("--method", method, *EIGHT) for method in ("rtn", "awq", "gptq", "awq+gptq", "best-4bit")},
}
MORE = {
    "smoothquant": ("--method", "smoothquant", "--scheme", "W8A8"),
    "fp8": ("--method", "fp8", "--scheme", "FP8"),
    "smoothquant W8A8_STATIC": ("--method", "smoothquant", "--scheme", "W8A8_STATIC"),
    "fp8 FP8_DYNAMIC": ("--method", "fp8", "--scheme", "FP8_DYNAMIC"),
    "fp8 FP8_BLOCK": ("--method", "fp8", "--scheme", "FP8_BLOCK"),
    "gptq W4A8": ("--method", "gptq", "--scheme", "W4A8", "--group-size", 32),
    "gptq block by block": ("--method", "gptq", *EIGHT, "--sequential", "block"),
    "gptq on original inputs": ("--method", "gptq", *EIGHT, "--sequential", "none"),
    "gptq with a cache": ("--method", "gptq", *EIGHT, "--kv-cache", "int8"),
    "gptq rotated": ("--method", "gptq", *EIGHT, "--rotate"),
    "awq mixed": ("--method", "awq", "--group-size", 32, "--target-bits", 6),
}
WITHOUT_DATA = ("rtn", "fp8 FP8_DYNAMIC", "fp8 FP8_BLOCK")
MOST = {"gptq W4A8": 0.05, "awq mixed": 0.05, "smoothquant": 0.03, "fp8": 0.03}  # static scales, and routers


@pytest.mark.parametrize(
    ("family", "method"), [slow_unless(method in METHODS and (family == "mixtral" or method == "awq+gptq"), family, method)
                           for family in ROUTERS for method in METHODS | MORE]
)  # fmt: skip
def test_every_method_with_an_expert_that_no_token_reaches(family: str, method: str, tmp_path: Path) -> None:
    model = moe(family, tmp_path / "m")
    result = quantize(model, tmp_path / "out", *(METHODS | MORE)[method])
    assert result.code == 0, result.err
    count = 4 if family == "mixtral" else 8
    report = json.loads((tmp_path / "out" / "infopt.json").read_text())
    layers = {name: layer for name, layer in report["layers"].items() if ".experts." in name}
    assert len(layers) == 2 * 3 * count
    most = MOST.get(method, MOST.get(method.split()[0], 1e-3))
    assert json.loads((tmp_path / "out" / "verification.json").read_text())["quality"]["kl_median"] < most
    if method in WITHOUT_DATA:  # so data, so nothing was counted
        assert not any("tokens" in layer for layer in layers.values())
        return
    first = [layer for name, layer in layers.items() if name.startswith("model.layers.0.")]
    starved = [layer for name, layer in layers.items() if name.startswith("model.layers.0.") and ".experts.1." in name]
    assert len(starved) == 3 and all(s["tokens"] == 0 and s["fallback"] == "whole batch" for s in starved)
    assert all(layer["fallback"] is None for layer in first if layer["tokens"] >= 16)
    assert sum(layer["tokens"] for layer in first) == 3 * 2 * 8 * 32
    assert "calibrated on the whole batch, for lack of tokens: 1" in result.err
    shown = infopt("inspect", tmp_path / "out")
    assert shown.code == 0 and "calibrated on the whole batch, for lack of tokens: 1" in shown.out
    assert f"(x {count})" in shown.out


def test_the_floor_is_a_choice(tmp_path: Path) -> None:
    """0: an expert without tokens is rounded without data, each group from its smallest to its largest weight."""
    model = moe("mixtral", tmp_path / "m")
    for method, flags in (("rtn", ()), ("gptq", ("--min-expert-tokens", 0)), ("awq+gptq", ("--min-expert-tokens", 0))):
        result = quantize(model, tmp_path / method, "--method", method, "--bits", 4, "--group-size", 32, *flags)
        assert result.code == 0, result.err
        if flags:
            assert "rounded without data, for lack of tokens: 1" in result.err
    rounded, solved = (open_model(tmp_path / method) for method in ("rtn", "gptq"))
    for number, same in ((UNREACHED, True), (0, False)):
        for part in ("w1", "w2", "w3"):
            name = f"model.layers.0.block_sparse_moe.experts.{number}.{part}"
            assert torch.equal(rounded.qtensor(name).codes, solved.qtensor(name).codes) == same
    everyone = quantize(
        model, tmp_path / "all", "--method", "gptq", "--group-size", 32, "--min-expert-tokens", 10**6, "--no-verify"
    )
    assert "4 of 4 calibrated on the whole batch" in everyone.err
    assert infopt("quantize", model, "-o", tmp_path / "x", "--method", "rtn", "--min-expert-tokens", -1).code == 2


@pytest.mark.parametrize(
    ("family", "bits"), [slow_unless((family, bits) in (("mixtral", 3), ("qwen3_moe", 4)), family, bits)
                         for family in ROUTERS for bits in (2, 3, 4)]
)  # fmt: skip
def test_transformers_stacks_our_experts(family: str, bits: int, tmp_path: Path) -> None:
    """Symmetric packed experts load in transformers under its own names, and give our logits.

    From a model in fp32: transformers computes experts' weights in the dtype of their scales.
    """
    model = moe(family, tmp_path / "m")
    result = quantize(model, tmp_path / "out", "--method", "gptq", "--bits", bits, "--group-size", 32, "--no-verify")
    assert result.code == 0, result.err
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids_BT = torch.randint(3, 98, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = loaded(ids_BT).logits
    ours = our_logits(tmp_path / "out", ids_BT)
    assert (theirs - ours).abs().max() <= 1e-5 * ours.abs().max()


def test_names_in_the_output(tmp_path: Path) -> None:
    """The checkpoint's own names for experts; the router under each name that an engine may know it by."""
    model = moe("mixtral", tmp_path / "m")
    flags = ("--method", "rtn", "--group-size", 32, "--no-verify", "--ignore", "*.experts.3.*")
    assert quantize(model, tmp_path / "out", *flags).code == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight_packed" in stored
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in stored
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {"lm_head", "model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.gate"} <= set(settings["ignore"])
    assert "model.layers.1.block_sparse_moe.experts.3.w2" in settings["ignore"]
    assert infopt("verify", tmp_path / "out", "--reference", model, "--num-samples", 2, "--seqlen", 32).code == 0


def test_experts_with_another_group_than_attention(tmp_path: Path) -> None:
    """Two numeric types in one model: targets are named as the file names them, and our own reader finds them."""
    model = tiny("qwen3_moe", tmp_path / "m")  # inner width 96: 64 does not divide it
    result = quantize(
        model, tmp_path / "out", "--method", "gptq", "--group-size", 64, "--group-fallback", "adjust", "--bits", 8
    )
    assert result.code == 0, result.err
    quantized = open_model(tmp_path / "out").quantized
    assert quantized["model.layers.0.mlp.experts.0.down_proj"].group == 32
    assert quantized["model.layers.0.mlp.experts.0.up_proj"].group == 64
    mixtral = quantize(
        tiny("mixtral", tmp_path / "x", intermediate_size=96), tmp_path / "y", "--method", "rtn", "--group-size", 64,
        "--group-fallback", "adjust",
    )  # fmt: skip
    assert mixtral.code == 0, mixtral.err


@pytest.mark.parametrize("sequential", ["space", "block"])
def test_a_resumed_run_gives_the_same_bytes(sequential: str, tmp_path: Path) -> None:
    model = moe("mixtral", tmp_path / "m")
    flags = ("--method", "awq+gptq", "--group-size", 32, "--no-verify", "--sequential", sequential)
    assert quantize(model, tmp_path / "whole", *flags).code == 0
    kept = stop_after_the_first_block(model, tmp_path / "cut", flags)
    assert kept
    resumed = quantize(model, tmp_path / "cut", *flags)
    assert resumed.code == 0 and "block 1/2  done by an earlier run" in resumed.err
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes(), path.name


def stop_after_the_first_block(model: Path, out: Path, flags: tuple) -> bool:
    """The same run in this process, left by an interrupt when the first block is done."""
    from infopt import recipes
    from infopt.calibration.data import DataSpec, load_tokenizer, load_windows
    from infopt.cli.quantize import build_recipe
    from infopt.output import OutputFolder
    from infopt.recipes.run import Run

    absent = ("bits", "symmetric", "act_order", "ignore", "group_fallback", "scheme", "seed", "kv_cache")
    given = dict.fromkeys((*absent, "target_bits", "target_size"))
    given |= {"group_size": "32", "sequential": flags[-1], "min_expert_tokens": None, "num_samples": 8, "seqlen": 32}
    recipe = build_recipe("awq+gptq", None, {**given, "dataset": str(text(out.parent))})
    data = recipe.calibration
    spec = DataSpec(data.dataset, data.num_samples, data.seqlen, data.seed, data.split, data.column)
    windows, report = load_windows(spec, load_tokenizer(model), part="calibration", vocab_size=128)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), OutputFolder(out, source=model) as folder:
        run = Run(CheckpointReader(model), recipe, recipes.build_steps(recipe), folder, windows, report)
        run(True, stop)
    return not out.exists() and (out.parent / f"{out.name}.infopt-work" / "parts" / "block-00000.json").exists()
