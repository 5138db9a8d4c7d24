"""One pass that stops at every space: it must be the two passes that it replaces, and the definition of "sequential"."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from infopt.calibration.discover import discover
from infopt.calibration.stats import InputStats
from infopt.calibration.stream import Stream
from infopt.checkpoint import CheckpointReader
from infopt.experts import experts_in
from infopt.grid import Grid
from infopt.model import Skeleton
from infopt.quantizers.gptq import solve
from infopt.topology import Space

from .tools import infopt, text, tiny

FAMILIES = ("llama", "gemma3", "phi", "gpt2", "falcon_new", "mixtral", "qwen3_moe")


def stream_of(model: Path, folder: Path) -> tuple[Skeleton, Stream]:
    reader = CheckpointReader(model)
    skeleton = Skeleton(reader.config, reader)
    generator = torch.Generator().manual_seed(0)
    stream = Stream(skeleton, torch.randint(3, 90, (70, 32), generator=generator), folder)
    stream.start()
    return skeleton, stream


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hold", [0, 1 << 30])
def test_walking_without_changes_is_gathering_and_advancing(family: str, hold: int, tmp_path: Path) -> None:
    skeleton, stream = stream_of(tiny(family, tmp_path / "m"), tmp_path / "h")
    stream.hold = hold
    topology = discover(skeleton, 0)
    block = skeleton.load_block(0)
    wanted = stream.gather(0, block, topology)
    output = stream.advance(0, block)
    seen: dict[str, InputStats] = {}
    assert stream.walk(0, block, topology, lambda space, stats: seen.update({space.name: stats})) == output
    assert list(seen) == [space.name for space in topology.spaces]
    for name, stats in seen.items():
        assert stats.tokens == wanted[name].tokens == (70 * 32 if stats.routed is None else stats.routed)
        assert stats.routed == wanted[name].routed
        assert torch.equal(stats.gram, wanted[name].gram)
    assert [path.name for path in (tmp_path / "h").iterdir() if "hidden" not in path.name] == []


def test_each_space_sees_its_predecessors_quantized(tmp_path: Path) -> None:
    """Against the definition: run the block again from its start for every space, with what is quantized so far."""
    grid = Grid(3, 32, True)

    def quantize(block: torch.nn.Module, readers: tuple[str, ...], gram: torch.Tensor) -> None:
        for name in readers:
            weight = block.get_submodule(name).weight.data
            weight.copy_(solve(weight, gram, grid)[0].dequantize())

    skeleton, stream = stream_of(tiny("llama", tmp_path / "m"), tmp_path / "h")
    topology = discover(skeleton, 0)
    slow = skeleton.load_block(0)
    for space in topology.spaces:
        quantize(slow, space.readers, stream.gather(0, slow, topology)[space.name].gram)
    wanted = {name: tensor.clone() for name, tensor in slow.state_dict().items()}
    output = stream.advance(0, slow)

    block = skeleton.load_block(0)
    assert stream.walk(0, block, topology, lambda space, stats: quantize(block, space.readers, stats.gram)) == output
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in block.state_dict().items())


def test_the_last_block_is_not_run_to_its_end(tmp_path: Path) -> None:
    skeleton, stream = stream_of(tiny("llama", tmp_path / "m"), tmp_path / "h")
    topology = discover(skeleton, 1)
    stream.advance(0, skeleton.load_block(0))
    counted: list[str] = []
    assert stream.walk(1, skeleton.load_block(1), topology, lambda space, _: counted.append(space.name)) is None
    assert len(counted) == len(topology.spaces)
    assert not (tmp_path / "h" / "hidden-00002.f32").exists()


def test_sequential_is_a_choice(tmp_path: Path) -> None:
    model = tiny("llama", tmp_path / "m")
    outputs = {}
    for choice in ("space", "block"):
        out = tmp_path / choice
        done = infopt(
            "quantize", model, "-o", out, "--method", "gptq", "--group-size", "32", "--sequential", choice,
            "--dataset", text(tmp_path), "--num-samples", "8", "--seqlen", "64", "--no-verify",
        )  # fmt: skip
        assert done.code == 0, done.err
        outputs[choice] = (out / "model.safetensors").read_bytes()
    assert outputs["space"] != outputs["block"]
    wrong = infopt("quantize", model, "-o", tmp_path / "x", "--method", "gptq", "--sequential", "layer")
    assert wrong.code == 2 and "sequential" in wrong.err


@pytest.mark.parametrize("floor", [0, 10**6])
@pytest.mark.parametrize("family", ["llama", "mixtral", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_a_twin_shows_what_the_original_model_is_given(family: str, floor: int, tmp_path: Path) -> None:
    """Against the definition: shift = (Y - X)^T X, where an expert's Y are the original inputs of the tokens that *this* model
    sends to it (all tokens, where that are too few), whatever the original router does with them."""
    reader = CheckpointReader(tiny(family, tmp_path / "m"))
    skeleton = Skeleton(reader.config, reader)
    windows_NT = torch.randint(3, 90, (20, 32), generator=torch.Generator().manual_seed(0))
    stream = Stream(skeleton, windows_NT, tmp_path / "h", twin=True)
    stream.min_expert_tokens = floor
    stream.start()
    topology = discover(skeleton, 0)
    block, generator, shifts = skeleton.load_block(0), torch.Generator().manual_seed(1), {}

    def spoil(space: Space, found: InputStats) -> None:
        shifts[space.name] = found.shift
        for name in space.readers:
            weight = block.get_submodule(name).weight.data
            weight.add_(0.3 * weight.std() * torch.randn(weight.shape, generator=generator))

    stream.walk(0, block, topology, spoil, frozenset({"gram", "shift"}))
    changed = deepcopy(block)
    original = skeleton.load_block(0)
    with skeleton.outer_loaded():
        hidden_BTC, calls = skeleton.capture(windows_NT)
    inputs, index_TK = inputs_of(changed, topology.spaces, lambda b: calls[0].run(b, hidden_BTC))
    wanted, _ = inputs_of(original, topology.spaces, lambda b: calls[0].run(b, hidden_BTC))
    assert list(shifts) == [space.name for space in topology.spaces]
    for name, shift_CC in shifts.items():
        x_TC, y_TC = inputs[name], wanted[name]
        if ".experts." in name and floor == 0:
            number = int(name.split(".experts.")[1].split(":")[0])
            mine = (index_TK == number).any(-1)
            x_TC, y_TC = x_TC[mine], y_TC[mine]
        assert torch.allclose(shift_CC, (y_TC - x_TC).T @ x_TC, rtol=1e-4, atol=1e-4 * shift_CC.abs().max())


@torch.no_grad()
def inputs_of(block: nn.Module, spaces: tuple[Space, ...], run) -> tuple[dict[str, Tensor], Tensor]:
    """(what the readers of every space would be given of every token [T, C], where a router sends the tokens [T, K])."""
    seen: dict[str, Tensor] = {}
    routed: list[Tensor] = [torch.zeros(0)]
    handles = []
    for path, experts in experts_in(block).items():

        def arrive(_, args, kwargs, path=path) -> None:
            hidden, index = [*args, *kwargs.values()][:2]
            seen[path] = hidden.reshape(-1, hidden.shape[-1])
            routed[0] = index.reshape(-1, index.shape[-1])

        handles.append(experts.register_forward_pre_hook(arrive, with_kwargs=True))
    for space in spaces:
        if ".experts." not in space.readers[0]:
            hook = lambda _, args, name=space.name: seen.update({name: args[0].reshape(-1, args[0].shape[-1])})  # noqa: E731
            handles.append(block.get_submodule(space.readers[0]).register_forward_pre_hook(hook))
    run(block)
    for handle in handles:
        handle.remove()
    for space in spaces:
        if ".experts." in space.readers[0]:
            path, _, rest = space.readers[0].partition(".experts.")
            number, projection = rest.split(".")
            expert = block.get_submodule(f"{path}.experts").each()[int(number)]
            x_TH = seen[f"{path}.experts"]
            seen[space.name] = expert.inner(x_TH) if projection == expert.roles.down else x_TH
    return seen, routed[0]
