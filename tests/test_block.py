"""The fused block and the packed head: put in only where they compute the same, and then they do."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from infopt.checkpoint import CheckpointReader
from infopt.kernels.cpu import prepare
from infopt.kernels.native import native, rescore
from infopt.model import Skeleton
from infopt.runtime.block import PROOF_TOKENS, FusedBlock, join, proven, rms_norm, try_fuse
from infopt.runtime.engine import Engine
from infopt.runtime.head import CANDIDATES, halved, pack_head
from infopt.runtime.store import LayerKind

from .families import FAMILIES
from .test_engine import answers, prompts, quantized, words  # noqa: F401
from .test_kernels import Grid, random_q
from .tools import infopt, tiny

FUSED = {"llama", "mistral", "qwen2", "qwen3", "phi3"}


def none(path: str) -> None:
    """No op has codes."""


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_blocks_are_fused_where_that_is_proven_and_nowhere_else(family: str, tmp_path: Path) -> None:
    """For a float model nothing is packed, so the tokens are transformers' own either way: alone, together, in pieces."""
    folder = tiny(family, tmp_path / "m")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    asked = prompts(5, 19)
    wanted = []
    for prompt in asked:
        ids = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        wanted.append(ids[0, len(prompt) :].tolist())
    engine = Engine(folder, "packed")
    assert len(engine.fused) == (2 if family in FUSED else 0)
    assert [answers(engine, [prompt])[0] for prompt in asked] == wanted
    assert answers(engine, asked) == wanted
    assert answers(engine, asked, chunk=3) == wanted


def block_of(folder: Path) -> tuple[Skeleton, nn.Module]:
    reader = CheckpointReader(folder)
    skeleton = Skeleton(reader.config, reader)
    return skeleton, skeleton.load_block(0)


@pytest.mark.parametrize("fault", ["eps", "scaling", "act", "norm", "heads", "bias", "residual"])
@torch.no_grad()
def test_the_proof_notices_a_block_that_differs(fault: str, tmp_path: Path) -> None:
    skeleton, block = block_of(tiny("llama", tmp_path / "m"))
    call, kind = skeleton.calls(1, PROOF_TOKENS)[0], LayerKind()
    fused = FusedBlock(block, 0, none, "exact")
    assert proven(block, fused, call, kind, 2)
    if fault == "eps":
        block.input_layernorm.variance_epsilon = 1e-3
    elif fault == "scaling":
        fused.scaling *= 1.01
    elif fault == "act":
        fused.act = nn.GELU()
    elif fault == "norm":
        fused.norm = rms_norm(block.post_attention_layernorm)
    elif fault == "heads":
        block.self_attn.k_proj.weight.data = block.self_attn.k_proj.weight.data.flip(0)
    elif fault == "bias":
        block.mlp.down_proj.bias = nn.Parameter(torch.full((64,), 0.01))
    else:
        whole = block.mlp.forward
        block.mlp.forward = lambda x: whole(x) * 1.001
    assert not proven(block, fused, call, kind, 2)


@torch.no_grad()
def test_a_block_without_the_parts_is_left_alone(tmp_path: Path) -> None:
    skeleton, block = block_of(tiny("gpt2", tmp_path / "m"))
    assert not try_fuse(block, 0, none, skeleton.calls(1, PROOF_TOKENS)[0], LayerKind(), 2)


@pytest.mark.parametrize("precision", ["exact", "packed"])
def test_layers_side_by_side_are_the_layers(precision: str) -> None:
    block = nn.Module()
    found = {"a": random_q(32, 64, Grid(4, 32), 1), "b": random_q(48, 64, Grid(4, 32), 2)}
    for name, q in found.items():
        block.add_module(name, nn.Linear(q.shape[1], q.shape[0], bias=name == "a"))
    x_TI = torch.randn(3, 64)
    whole = join(block, ["a", "b"], found.get, precision)
    wanted = torch.cat([prepare(found["a"], precision)(x_TI, block.a.bias), prepare(found["b"], precision)(x_TI)], -1)
    torch.testing.assert_close(whole(x_TI), wanted, rtol=1e-5, atol=1e-4)
    assert len(whole.kernels) == 1
    mixed = {**found, "b": random_q(48, 64, Grid(8, None), 2)}
    wanted = torch.cat([prepare(mixed["a"], precision)(x_TI, block.a.bias), prepare(mixed["b"], precision)(x_TI)], -1)
    apart = join(block, ["a", "b"], mixed.get, precision)
    torch.testing.assert_close(apart(x_TI), wanted, rtol=1e-5, atol=1e-4)
    assert len(apart.kernels) == 2


@pytest.mark.parametrize("vocabulary", [CANDIDATES, CANDIDATES + 1, 1000, 9 * 8 * CANDIDATES + 5])
def test_the_largest_logits_are_computed_again(vocabulary: int) -> None:
    """The candidates and few others, in spans of one and of several; none where a token's logits are no numbers."""
    library = native()
    if library is None:
        pytest.skip("no C++ compiler")
    weight_VC, x_TC = torch.randn(vocabulary, 32), torch.randn(3, 32)
    exact_TV = x_TC @ weight_VC.T
    rough_TV = exact_TV + 0.1 + 0.1 * torch.rand(3, vocabulary)  # never the same
    rough_TV[1] = torch.nan
    got_TV = rough_TV.clone()
    rescore(library, weight_VC, x_TC, CANDIDATES, got_TV)
    for token in (0, 2):
        changed_V = got_TV[token] != rough_TV[token]
        assert changed_V[rough_TV[token].topk(CANDIDATES).indices].all() and changed_V.sum() <= 1.2 * CANDIDATES
        torch.testing.assert_close(got_TV[token, changed_V], exact_TV[token, changed_V])
    assert got_TV[1].isnan().all()
    rough_TV[0] = 1.0  # all as large as each other
    rescore(library, weight_VC, x_TC, CANDIDATES, rough_TV)
    torch.testing.assert_close(rough_TV[0], exact_TV[0])


@pytest.mark.parametrize(("compiled", "gain"), [(True, 0.5), (False, 0.3)])
def test_the_packed_head_is_exact_where_it_counts(compiled: bool, gain: float) -> None:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(64, 1000)
    with torch.no_grad():
        head.weight.copy_(torch.randn(1000, 64, generator=generator).bfloat16())
        head.bias.copy_(torch.randn(1000, generator=generator))
    assert halved(head.weight.detach()).dtype == torch.bfloat16
    assert halved(head.weight.detach() + 1e-6).dtype == torch.float32
    packed = pack_head(head, halved(head.weight.detach()), compiled)
    assert packed is not None
    x_BTC = torch.randn(2, 3, 64, generator=generator)
    x_BTC[..., 5] *= 30
    with torch.no_grad():
        wanted, got = head(x_BTC), packed(x_BTC)
        packed.fine = True
        fine = packed(x_BTC)
    best = wanted.topk(CANDIDATES // 4).indices
    torch.testing.assert_close(got.gather(-1, best), wanted.gather(-1, best))
    assert got.shape == wanted.shape
    assert (fine - wanted).norm() < gain * (got - wanted).norm()
    alone = torch.stack([packed(x_TC) for x_TC in x_BTC])
    assert torch.equal(alone, fine)  # rows do not depend on each other
    assert packed.kernel == ("w8a8" if compiled else "quantized.linear_dynamic")
    assert pack_head(nn.Linear(64, CANDIDATES), torch.zeros(CANDIDATES, 64), compiled) is None


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3"])
def test_packed_answers_are_near_the_exact_ones(family: str, words: Path, tmp_path: Path) -> None:  # noqa: F811
    """And the same for every way of putting texts together, with a vocabulary that makes the head a packed one."""
    folder = quantized(family, tmp_path, words, "--method", "rtn", vocab_size=640)
    exact, packed = Engine(folder), Engine(folder, "packed")
    prompt = prompts(30)[0]
    logits = []
    for engine in (exact, packed):
        cache = engine.cache(64)
        place = cache.admit(64)
        engine.prefill(cache, place, prompt)
        logits.append(engine.advance(cache, [place], torch.tensor([[5]]))[0])
    assert (logits[1] - logits[0]).norm() < 0.05 * logits[0].norm()
    assert packed.weight_bytes[1] < 0.5 * exact.weight_bytes[1]
    asked = prompts(9, 14)
    assert answers(packed, asked) == [answers(packed, [one])[0] for one in asked]


def test_bench_reports_what_it_says(words: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = quantized("llama", tmp_path, words, "--method", "rtn", "--kv-cache", "int8")
    flags = ("--batch", 2, "--prompt", 20, "--new-tokens", 5, "--json")
    done = infopt("bench", folder, "--reference", tmp_path / "m", *flags)
    assert done.code == 0, done.err
    said = json.loads(done.out)
    for figures in (said, said["reference"]):
        for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "time_to_first_token", "share_of_bandwidth"):
            assert figures[name] > 0
        assert figures["peak_memory"] > figures["cache_bytes"] > 0
    assert said["precision"] == "packed" and said["kv_cache"] == "int8" and said["fused_blocks"] == 2
    assert said["cache_bytes_per_token"] == 2 * 2 * 2 * 16  # layers, keys and values, heads, channels
    assert said["cache_bytes_per_token_bf16"] == 2 * said["cache_bytes_per_token"]
    assert said["reference"]["kv_cache"] == "fp32"
    assert said["reference"]["weight_bytes_read_per_step"] > 2 * said["weight_bytes_read_per_step"]
    assert "decode, tokens/s" in done.err
    assert said["kernels"] == {"w4a8": 8} and said["compiled"] and said["compiled_blocks"] == 2
    assert said["reference"]["compiled"] is None and said["reference"]["kernels"] == {}
    assert infopt("bench", folder, "--prompt", 300).code == 2
    assert infopt("bench", folder, "--plot", tmp_path / "nowhere" / "plot.svg").code == 2
    assert infopt("bench", folder, "--new-tokens", 1).code == 2


def test_bench_draws_latency_against_batch_and_context(words: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = quantized("llama", tmp_path, words, "--method", "rtn", max_position_embeddings=512)
    done = infopt("bench", folder, "--prompt", 8, "--new-tokens", 3, "--plot", tmp_path / "plot.svg", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["compiled_blocks"] == 2
    root = ElementTree.parse(tmp_path / "plot.svg").getroot()
    lines = root.findall(".//{*}polyline")
    assert [len(line.get("points", "").split()) for line in lines] == [4, 4, 2, 2, 2, 2]  # by context, then by batch
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["plot.svg"]
