"""The model as a stream of blocks: the same function as transformers' own loading, and refusals before anything is built."""

from __future__ import annotations

import json
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3nTextConfig

from infopt.checkpoint import CheckpointReader
from infopt.errors import BadInput, Unsupported
from infopt.model import Skeleton
from tests.families import FAMILIES, make, randomise


def skeleton(folder: Path, **changes: Any) -> Skeleton:
    reader = CheckpointReader(folder)
    config = {key: value for key, value in {**reader.config, **changes}.items() if value is not REMOVED}
    return Skeleton(config, reader)


REMOVED = object()


def edit_tensors(folder: Path, edit) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@torch.no_grad()
def streamed_logits(model: Skeleton, ids_BT: torch.Tensor) -> torch.Tensor:
    calls = model.calls(*ids_BT.shape)
    model.load_outer()
    hidden_BTC = model.embed(ids_BT)
    for i in range(len(model.blocks)):
        hidden_BTC = calls[i].run(model.load_block(i), hidden_BTC)
        model.free_block(i)
    logits_BTV = model.logits(hidden_BTC)
    model.free_outer()
    return logits_BTV


@torch.no_grad()
def whole_logits(folder: Path, ids_BT: torch.Tensor) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids_BT, use_cache=False).logits


def relative(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).norm() / two.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_one_at_a_time_equal_the_whole_model(family: str, tmp_path: Path) -> None:
    model = skeleton(make(family, tmp_path))
    ids_BT = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    assert relative(streamed_logits(model, ids_BT), whole_logits(tmp_path, ids_BT)) < 1e-5
    assert all(parameter.is_meta for parameter in model.model.parameters())
    placed = [*model.outer_keys(), *(key for i in (0, 1) for key in model.block_keys(i))]
    assert sorted(placed) == sorted(model.weights.tensors)
    assert len(model.block_keys(0)) == len(model.block_keys(1)) > 0
    assert not model.extra_keys()


def test_several_shards_and_a_half_precision_source(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make("llama", tmp_path / "one"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    ids_BT = torch.arange(3, 23).view(2, 10)
    streamed = streamed_logits(skeleton(tmp_path / "many"), ids_BT)
    assert relative(streamed, whole_logits(tmp_path / "many", ids_BT)) < 1e-5


def test_the_dtype_of_loaded_parameters(tmp_path: Path) -> None:
    reader = CheckpointReader(make("llama", tmp_path))
    block = Skeleton(reader.config, reader, torch.bfloat16).load_block(1)
    assert {parameter.dtype for parameter in block.parameters()} == {torch.bfloat16}


def test_a_freed_block_is_not_retained(tmp_path: Path) -> None:
    model = skeleton(make("llama", tmp_path))
    model.calls(2, 8)
    alive = [weakref.ref(parameter) for parameter in model.load_block(0).parameters()]
    model.free_block(0)
    assert not any(reference() is not None for reference in alive)


def test_calls_differ_between_sliding_and_full_layers_and_are_cached(tmp_path: Path) -> None:
    model = skeleton(make("gemma3", tmp_path))
    sliding, full = (call.kwargs["attention_mask"] for call in model.calls(1, 12))
    assert str(sliding) != str(full)  # a full causal mask may be None: attention kernels know it
    assert model.calls(1, 12) is model.calls(1, 12)


def test_blocks_are_back_in_place_after_a_failure(tmp_path: Path) -> None:
    model = skeleton(make("llama", tmp_path))
    before = list(model.model.model.layers)
    model.load_outer()
    with pytest.raises(IndexError):
        model.embed(torch.tensor([[1000]]))
    assert list(model.model.model.layers) == before


def test_side_inputs_that_depend_on_the_tokens_are_refused(tmp_path: Path) -> None:
    sizes = {**FAMILIES["gemma3"][1], "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128}
    more = {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0], "laurel_rank": 8}
    model = AutoModelForCausalLM.from_config(Gemma3nTextConfig(**sizes, **more), dtype=torch.float32)
    randomise(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match="depend on the tokens"):
        skeleton(tmp_path).calls(1, 4)


@pytest.mark.parametrize(
    ("family", "op", "key"),
    [
        ("llama", "self_attn.q_proj", "model.layers.1.self_attn.q_proj.weight"),
        ("gpt2", "attn.c_attn", "h.1.attn.c_attn.weight"),
        ("mixtral", "self_attn.o_proj", "model.layers.1.self_attn.o_proj.weight"),
        ("mixtral", "mlp.experts.3.w2", "model.layers.1.block_sparse_moe.experts.3.w2.weight"),
    ],
)
def test_the_key_of_a_weight(family: str, op: str, key: str, tmp_path: Path) -> None:
    assert skeleton(make(family, tmp_path)).weight_key(1, op).endswith(key)


def test_stacked_experts_have_no_key_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"experts\.gate_up_proj"):
        skeleton(make("mixtral", tmp_path)).tensor_key(0, "mlp.experts.gate_up_proj")


# Heads and tying


def test_a_stored_head_that_differs_is_not_tied(tmp_path: Path) -> None:
    make("gemma3", tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.randn(128, 64)}))
    ids_BT = torch.arange(3, 13).view(1, 10)
    assert relative(streamed_logits(skeleton(tmp_path), ids_BT), whole_logits(tmp_path, ids_BT)) < 1e-5


def test_the_outer_parts_load_again_after_they_were_freed(tmp_path: Path) -> None:
    model = skeleton(make("gpt2", tmp_path))
    ids_BT = torch.arange(3, 13).view(1, 10)
    assert torch.equal(streamed_logits(model, ids_BT), streamed_logits(model, ids_BT))


# What is refused, and how early

LIES = [
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"num_hidden_layers": 3}, "num_hidden_layers"),
    ({"num_hidden_layers": 1}, "num_hidden_layers"),
    ({"num_hidden_layers": "2"}, "num_hidden_layers"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"num_hidden_layers": True}, "num_hidden_layers"),
    ({"vocab_size": 2**62}, "vocab_size"),
    ({"vocab_size": -1}, "vocab_size"),
    ({"vocab_size": 100}, "asks for (100, 64)"),
    ({"hidden_size": 2**40}, "hidden_size"),
    ({"intermediate_size": 96}, "mlp."),
    ({"max_position_embeddings": 10**15}, "max_position_embeddings"),
    ({"num_attention_heads": 5, "head_dim": REMOVED}, "num_key_value_heads"),
    ({"num_attention_heads": 6, "head_dim": REMOVED}, "num_attention_heads"),
    ({"num_key_value_heads": 8}, "num_key_value_heads"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"head_dim": 8}, "self_attn"),
    ({"head_dim": 10**12}, "head_dim"),
    ({"hidden_act": "no-such-function"}, "no-such-function"),
    ({"rope_parameters": {"rope_type": "no-such-rope", "rope_theta": 1e4}}, "config.json"),
    ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers"),
]


@pytest.mark.parametrize(
    ("changes", "words"), LIES, ids=[f"{i}-{next(iter(changes))}" for i, (changes, _) in enumerate(LIES)]
)
def test_a_config_that_lies_is_refused_at_once(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    make("llama", tmp_path)
    started = time.perf_counter()
    with pytest.raises(BadInput) as caught:
        skeleton(tmp_path, **changes)
    assert words in str(caught.value) and "config.json" in str(caught.value)
    assert time.perf_counter() - started < 2


def test_other_spellings_of_a_size_are_checked_too(tmp_path: Path) -> None:
    make("gpt2", tmp_path)
    with pytest.raises(BadInput, match="n_layer"):
        skeleton(tmp_path, n_layer=10**9)


@pytest.mark.parametrize("kind", ["no_such_model", "clip", "vit", None, 7])
def test_models_that_are_no_known_causal_lm(kind: Any, tmp_path: Path) -> None:
    make("llama", tmp_path)
    with pytest.raises((Unsupported, BadInput), match="model_type"):
        skeleton(tmp_path, model_type=kind)


def test_labels_and_kernels_named_in_the_config_are_not_obeyed(tmp_path: Path) -> None:
    make("llama", tmp_path)
    model = skeleton(tmp_path, num_labels=10**9, _attn_implementation="someone/kernel", _name_or_path="someone/model")
    assert len(model.calls(1, 4)) == 2


def test_a_missing_tensor_is_named_before_any_work(tmp_path: Path) -> None:
    make("llama", tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(BadInput, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        skeleton(tmp_path)


def test_a_missing_expert_is_named_when_its_block_is_loaded(tmp_path: Path) -> None:
    make("mixtral", tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.3.w2.weight"))
    with pytest.raises(BadInput, match=r"experts\.down_proj"):
        skeleton(tmp_path).load_block(1)


def test_a_missing_embedding_is_named(tmp_path: Path) -> None:
    make("llama", tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(BadInput, match=r"model\.norm\.weight"):
        skeleton(tmp_path).load_outer()


def test_a_head_that_is_neither_stored_nor_tied_is_named(tmp_path: Path) -> None:
    make("llama", tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(BadInput, match=r"lm_head\.weight"):
        skeleton(tmp_path, tie_word_embeddings=False).load_outer()


@pytest.mark.parametrize(
    "changes", [{"torch_dtype": "float16", "dtype": "bfloat16"}, {"torch_dtype": 7}, {"dtype": "int8"}], ids=str
)
def test_types_that_contradict_the_tensors_decide_nothing(changes: dict[str, Any], tmp_path: Path) -> None:
    make("llama", tmp_path)
    block, odd = skeleton(tmp_path).load_block(0), skeleton(tmp_path, **changes).load_block(0)
    pairs = zip(block.parameters(), odd.parameters(), strict=True)
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in pairs)


@pytest.mark.parametrize("kind", ["no-such-type", []])
def test_types_that_do_not_exist_are_refused(kind: Any, tmp_path: Path) -> None:
    make("llama", tmp_path)
    with pytest.raises(BadInput, match=r"config\.json"):
        skeleton(tmp_path, dtype=kind)


def test_a_tensor_of_another_shape_is_named_with_its_file(tmp_path: Path) -> None:
    make("llama", tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(127, 64)}))
    with pytest.raises(BadInput, match=r"model\.safetensors: model\.layers\.0\.mlp\.up_proj\.weight .*\(127, 64\)"):
        skeleton(tmp_path)


def test_tensors_without_a_use_are_listed(tmp_path: Path) -> None:
    make("llama", tmp_path)
    old_buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(tmp_path, lambda tensors: tensors.update({old_buffer: torch.zeros(8), "mtp.head": torch.zeros(3)}))
    model = skeleton(tmp_path)
    assert sorted(model.extra_keys()) == [old_buffer, "mtp.head"]


def test_a_reading_error_keeps_its_own_message(tmp_path: Path) -> None:
    model = skeleton(make("llama", tmp_path))
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(BadInput, match=r"model\.safetensors"):
        model.load_block(1)


def test_the_config_given_is_not_changed(tmp_path: Path) -> None:
    reader = CheckpointReader(make("gemma3", tmp_path))
    before = json.dumps(reader.config, sort_keys=True)
    Skeleton(reader.config, reader)
    assert json.dumps(reader.config, sort_keys=True) == before
