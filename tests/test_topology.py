"""The discovered topology: what is found in each family, that every fold keeps the whole model's function, and that planted
wrong folds are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from infopt.calibration.discover import discover, structure_key
from infopt.checkpoint import CheckpointReader
from infopt.errors import BadInput
from infopt.model import BlockCall, Skeleton
from infopt.topology import Topology
from tests.families import FAMILIES, make

from .tools import skeleton_of

# What the tests know of each family: space name -> the law of its fold, None where there must be no fold.
LLAMA = {
    "input_layernorm->q_proj,k_proj,v_proj": "mul",
    "v_proj->o_proj": "linear",
    "post_attention_layernorm->gate_proj,up_proj": "mul",
    "up_proj->down_proj": "linear",
}
GEMMA = {
    "input_layernorm->q_proj,k_proj,v_proj": "one_plus",
    "v_proj->o_proj": "linear",
    "pre_feedforward_layernorm->gate_proj,up_proj": "one_plus",
    "up_proj->down_proj": "linear",
}
SEQUENTIAL = {
    "input_layernorm->query_key_value": "mul",
    "query_key_value->dense": "linear",
    "post_attention_layernorm->dense_h_to_4h": "mul",
    "dense_h_to_4h->dense_4h_to_h": None,
}


def with_experts(count: int, gate: str, up: str, down: str) -> dict[str, str | None]:
    spaces: dict[str, str | None] = {"input_layernorm->q_proj,k_proj,v_proj": "mul", "v_proj->o_proj": "linear"}
    for e in range(count):
        spaces |= {f"mlp.experts.{e}:routed->{gate},{up}": None, f"mlp.experts.{e}:{up}->{down}": "linear"}
    return spaces


EXPECTED: dict[str, dict[str, str | None]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "granite"), LLAMA),
    **dict.fromkeys(("gemma2", "gemma3"), GEMMA),
    **dict.fromkeys(("gpt_neox", "falcon_alibi"), SEQUENTIAL),
    "phi": {
        "input_layernorm->q_proj,k_proj,v_proj,fc1": "mul",
        "v_proj->dense": "linear",
        "fc1->fc2": None,
    },
    "phi3": {
        "input_layernorm->qkv_proj": "mul",
        "qkv_proj->o_proj": "linear",
        "post_attention_layernorm->gate_up_proj": "mul",
        "gate_up_proj->down_proj": "linear",
    },
    "opt": {
        "self_attn_layer_norm->q_proj,k_proj,v_proj": "mul",
        "v_proj->out_proj": "linear",
        "final_layer_norm->fc1": "mul",
        "fc1->fc2": "linear",
    },
    "gpt2": {
        "ln_1->c_attn": "mul",
        "c_attn->c_proj": "linear",
        "ln_2->c_fc": "mul",
        "c_fc->c_proj": None,
    },
    "cohere": {
        "input_layernorm->q_proj,k_proj,v_proj,gate_proj,up_proj": "mul",
        "v_proj->o_proj": "linear",
        "up_proj->down_proj": "linear",
    },
    "olmo2": {
        "residual->q_proj,k_proj,v_proj": None,
        "v_proj->o_proj": "linear",
        "residual->gate_proj,up_proj": None,
        "up_proj->down_proj": "linear",
    },
    "starcoder2": {
        "input_layernorm->q_proj,k_proj,v_proj": "mul",
        "v_proj->o_proj": "linear",
        "post_attention_layernorm->c_fc": "mul",
        "c_fc->c_proj": None,
    },
    "falcon_old": {
        "input_layernorm->query_key_value,dense_h_to_4h": "mul",
        "query_key_value->dense": "linear",
        "dense_h_to_4h->dense_4h_to_h": None,
    },
    "falcon_new": {
        "ln_attn->query_key_value": "mul",
        "query_key_value->dense": "linear",
        "ln_mlp->dense_h_to_4h": "mul",
        "dense_h_to_4h->dense_4h_to_h": None,
    },
    "mixtral": with_experts(4, "w1", "w3", "w2"),
    "qwen3_moe": with_experts(8, "gate_proj", "up_proj", "down_proj"),
}
# Where each head's values are in the writer's output, per query head, and what follows from the layout on paper.
HEAD = 16
VALUE_ROWS = {
    "llama": [0, 0, 16, 16],  # two key-value heads, each read by two query heads
    "phi3": [96, 96, 112, 112],  # q 64, k 32, v 32
    "gpt2": [128, 144, 160, 176],  # q, k, v
    "gpt_neox": [32, 80, 128, 176],  # per head: q, k, v
    "falcon_old": [80, 80, 80, 80],  # four query heads, k, v
    "falcon_new": [48, 48, 112, 112],  # per group: two query heads, k, v
}


def laws(topology: Topology) -> dict[str, str | None]:
    return {space.name: space.fold.law if space.fold else None for space in topology.spaces}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folds_of_a_family_and_that_they_keep_the_whole_model(family: str, tmp_path: Path) -> None:
    model = skeleton_of(make(family, tmp_path))
    topology = discover(model, 0)
    assert laws(topology) == EXPECTED[family]
    assert all((space.fold is None) == bool(space.reason) for space in topology.spaces)
    assert all(parameter.is_meta for parameter in model.model.parameters())

    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids_BT = torch.arange(3, 35).view(2, 16)
    with torch.no_grad():
        before = whole(ids_BT, use_cache=False).logits
        for space in topology.spaces:
            if space.fold is not None and ".experts." not in space.name:  # theirs are stacked; test_experts folds ours
                fold_by_hand(whole.get_submodule(model.blocks[0]), topology, space.name)
        after = whole(ids_BT, use_cache=False).logits
    assert (after - before).norm() / before.norm() < 1e-4


def fold_by_hand(block: nn.Module, topology: Topology, space_name: str) -> None:
    """The definition of a fold, said once more and slowly: one channel after another."""
    space = next(space for space in topology.spaces if space.name == space_name)
    assert space.fold is not None
    writer = block.get_submodule(space.fold.writer)
    rows = space.fold.rows or tuple(range(space.width))
    for channel in sorted(set(rows)):
        s = 0.5 + (channel * 7 % 13) / 8
        weight = writer.weight.t() if topology.op(space.fold.writer).kind == "conv1d" else writer.weight
        weight[channel] = (1 + weight[channel]) * s - 1 if space.fold.law == "one_plus" else weight[channel] * s
        if getattr(writer, "bias", None) is not None:
            writer.bias[channel] *= s
        for reader in space.readers:
            matrix = block.get_submodule(reader).weight
            matrix = matrix.t() if topology.op(reader).kind == "conv1d" else matrix
            for column in [column for column, row in enumerate(rows) if row == channel]:
                matrix[:, column] /= s


@pytest.mark.parametrize("family", VALUE_ROWS)
def test_the_value_channels_are_where_the_layout_puts_them(family: str, tmp_path: Path) -> None:
    spaces = discover(skeleton_of(make(family, tmp_path)), 1).spaces
    rows = next(space.fold.rows for space in spaces if space.fold is not None and space.fold.law == "linear")
    assert rows == tuple(start + i for start in VALUE_ROWS[family] for i in range(HEAD))


def test_a_loaded_block_keeps_its_weights_bit_for_bit_and_stays_loaded(tmp_path: Path) -> None:
    model = skeleton_of(make("gemma2", tmp_path))
    block = model.load_block(0)
    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    discover(model, 0)
    assert all(torch.equal(parameter, before[name]) for name, parameter in block.named_parameters())


def test_the_same_answer_every_time_and_through_json(tmp_path: Path) -> None:
    model = skeleton_of(make("phi3", tmp_path))
    topology = discover(model, 0)
    assert discover(model, 0) == topology
    assert Topology.from_json(json.loads(json.dumps(topology.to_json()))) == topology


@pytest.mark.parametrize("data", [{}, {"ops": 3, "spaces": []}, {"ops": [{"name": "x"}], "spaces": []}, []])
def test_json_that_is_no_topology(data: object) -> None:
    with pytest.raises(BadInput, match="not a block topology"):
        Topology.from_json(data)  # type: ignore[arg-type]


def test_how_tensor_parallelism_splits_the_ops(tmp_path: Path) -> None:
    llama = discover(skeleton_of(make("llama", tmp_path / "llama")), 0)
    split = {op.name.rpartition(".")[2]: llama.parallel(op.name) for op in llama.ops}
    assert {name for name, how in split.items() if how == "row"} == {"o_proj", "down_proj"}
    assert {name for name, how in split.items() if how == "replicated"} == {
        "input_layernorm",
        "post_attention_layernorm",
    }
    gpt2 = discover(skeleton_of(make("gpt2", tmp_path / "gpt2")), 0)  # GELU: no fold, and still an inner space
    assert (gpt2.parallel("mlp.c_fc"), gpt2.parallel("mlp.c_proj")) == ("column", "row")
    assert llama.space_of("mlp.down_proj").fed_by == ("mlp.gate_proj", "mlp.up_proj")


def test_parameters_that_are_no_op_are_listed(tmp_path: Path) -> None:
    topology = discover(skeleton_of(make("mixtral", tmp_path)), 0)
    assert topology.unhandled == ("mlp.gate.weight",)  # a router answers with more than its product


def test_structure_keys_tell_layer_types_apart_and_nothing_else(tmp_path: Path) -> None:
    uniform = skeleton_of(make("llama", tmp_path / "llama")).model.model.layers
    mixed = skeleton_of(make("gemma3", tmp_path / "gemma3")).model.model.layers
    assert structure_key(uniform[0]) == structure_key(uniform[1])
    assert structure_key(mixed[0]) != structure_key(mixed[1])
    assert hash(structure_key(mixed[0])) != hash(structure_key(uniform[0]))


def test_a_proof_asks_for_float32(tmp_path: Path) -> None:
    reader = CheckpointReader(make("llama", tmp_path))
    with pytest.raises(ValueError, match="float32"):
        discover(Skeleton(reader.config, reader, torch.bfloat16), 0)


# Planted blocks


class Planted(nn.Module):
    """norm -> fc1 -> `middle` -> fc2, added to the input; `leak` is added to the output."""

    def __init__(self, inner: int, width: int, middle: Callable[[Tensor], Tensor], leak: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(16), nn.Linear(16, inner), nn.Linear(width, 16)
        nn.init.normal_(self.norm.weight, 1.0, 0.2)
        self.middle, self.leak = middle, leak

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        inner = self.fc1(normed)
        y = x + self.fc2(self.middle(inner))
        if self.leak == "norm":
            y = y + normed
        return y + 0.01 * inner[..., 3:4] if self.leak == "one channel" else y


class Toy:
    """The part of a Skeleton that discovery uses, around one given block."""

    def __init__(self, block: nn.Module) -> None:
        self.dtype = torch.float32
        self.model = nn.ModuleDict({"block": block.eval()})
        self.blocks = ["block"]
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=16))

    def calls(self, batch: int, length: int) -> list[BlockCall]:
        return [BlockCall((), {})]

    @contextmanager
    def outer_loaded(self) -> Iterator[None]:
        yield


def inner_space(block: nn.Module):
    return next(space for space in discover(Toy(block), 0).spaces if space.readers == ("fc2",))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "curve", [nn.functional.gelu, nn.functional.silu, torch.tanh, torch.square, nn.functional.softplus, torch.abs_]
)
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_curves_are_not_folded(curve: Callable[[Tensor], Tensor], size: float) -> None:
    block = Planted(32, 32, lambda x: curve(x.clone()))
    block.fc1.weight.data.mul_(size)  # far from zero GELU looks straight
    space = inner_space(block)
    homogeneous = curve is torch.abs_
    assert (space.fold is not None) == homogeneous
    assert space.fed_by == ("fc1",)


@pytest.mark.parametrize("leak", ["norm", "one channel"])
def test_an_output_that_somebody_else_reads_is_found_but_not_proven(leak: str) -> None:
    topology = discover(Toy(Planted(32, 32, torch.relu, leak)), 0)  # type: ignore[arg-type]
    outer, inner = topology.spaces
    leaking, sound = (outer, inner) if leak == "norm" else (inner, outer)
    assert leaking.fold is None and "changed the output by" in leaking.reason
    assert sound.fold is not None


@pytest.mark.parametrize("seed", range(5))
def test_any_wiring_is_recovered(seed: int) -> None:
    rows = torch.randint(0, 300, (257,), generator=torch.Generator().manual_seed(seed))  # repeats, gaps, any order
    space = inner_space(Planted(300, 257, lambda x: x[..., rows]))
    assert space.fold is not None and space.fold.rows == tuple(rows.tolist())


@pytest.mark.parametrize("layout", ["halves", "interleaved", "blocks of eight"])
def test_a_fused_gate_is_told_from_its_linear_half(layout: str) -> None:
    numbers = torch.arange(64)
    gates, ups = {
        "halves": (numbers[:32], numbers[32:]),
        "interleaved": (numbers[::2], numbers[1::2]),
        "blocks of eight": (numbers.view(-1, 2, 8)[:, 0].flatten(), numbers.view(-1, 2, 8)[:, 1].flatten()),
    }[layout]
    space = inner_space(Planted(64, 32, lambda x: nn.functional.silu(x[..., gates]) * x[..., ups]))
    assert space.fold is not None and space.fold.rows == tuple(ups.tolist())


def test_units_that_never_fire_are_found_too() -> None:
    block = Planted(32, 32, torch.relu)
    block.fc1.bias.data[5] = -1.5  # silent on ordinary input
    block.fc1.weight.data[7] = 0.0
    block.fc1.bias.data[7] = 0.0
    space = inner_space(block)
    assert space.fold is not None and space.fold.rows is None


def test_more_channels_than_two_digits_can_name() -> None:
    width = 2**16 + 3
    space = inner_space(Planted(width, width, lambda x: x.flip(-1)))
    assert space.fold is not None and space.fold.rows == tuple(reversed(range(width)))


def test_a_mixture_of_two_channels_is_not_folded() -> None:
    space = inner_space(Planted(32, 32, lambda x: x + x.roll(1, -1)))
    assert space.fold is None
