"""A model on a GPU, as far as that can be followed without one: everything lies there, and the kernels give the answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from infopt.errors import InfoptError, OutOfResources, Unsupported
from infopt.runtime import head
from infopt.runtime.device import device_errors, find_device
from infopt.runtime.engine import Engine, KVCache
from infopt.runtime.gpu import GpuDecoder, proven
from infopt.runtime.model import RuntimeModel
from infopt.runtime.quality import perplexity
from infopt.runtime.scheduler import Scheduler, Text

from .pretend import pretended
from .test_engine import prompts
from .tools import infopt, text, tiny

pytest.importorskip("triton")
from . import triton_tools  # noqa: F401  which repairs the interpreter

NEW = 3


def written(engine: Engine, asked: list[list[int]]) -> list[list[int]]:
    texts = [Text(prompt, NEW) for prompt in asked]
    scheduler = Scheduler(engine, engine.cache(max(map(len, asked)) + NEW, len(asked), chunk=6))
    for one in texts:
        scheduler.submit(one)
    for _ in scheduler.run():
        pass
    return [one.tokens for one in texts]


def again(run):
    """In the place of a CUDA graph: what would be captured is run again, on the same memory."""
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("device")
    model = tiny("qwen3", place / "m", num_hidden_layers=1)
    done = infopt("quantize", model, "--method", "rtn", "--group-size", 32, "--no-verify", "-o", place / "q")
    assert done.code == 0, done.err
    return place / "q"


@pytest.mark.parametrize(
    ("cache", "most"),
    [
        ("float", 0.02),
        pytest.param("int8", 0.04, marks=pytest.mark.slow),
        pytest.param("int4", 0.2, marks=pytest.mark.slow),
    ],
)
def test_the_whole_model_runs_by_the_kernels_for_gpus(cache: KVCache, most: float, folder: Path) -> None:
    """A prompt in pieces, three texts in a graph for four: a text's tokens are the same alone, and its logits, up to bf16,
    those of the processor."""
    asked = prompts(3, 7, 5)
    with pretended():
        engine = Engine(folder, "packed", cache, device="cuda", capture=again)
        assert isinstance(engine.decoder, GpuDecoder)
        assert engine.cache_name == ("bf16" if cache == "float" else cache)
        assert "cuda-int4" in engine.kernels
        assert written(engine, asked)[1:2] == written(engine, asked[1:2])
        pages = engine.cache(16)
        logits_V = engine.prefill(pages, pages.admit(16), asked[1])
        found_V = logits_V.here.float()
    plain = Engine(folder, cache=cache)
    places = plain.cache(16)
    wanted_V = plain.prefill(places, places.admit(16), asked[1])
    assert ((found_V - wanted_V).norm() / wanted_V.norm()).item() < most


def test_a_large_head_is_packed_there_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens, and one byte is read for each of its weights."""
    engines, found = [], []
    with pretended():
        for least in (head.LEAST_ON_GPU, 0):
            monkeypatch.setattr(head, "LEAST_ON_GPU", least)
            engines.append(engine := Engine(folder, "packed", device="cuda", capture=again))
            assert isinstance(engine.decoder, GpuDecoder)
            found.append(written(engine, prompts(3, 7, 5)))
    assert found[0] == found[1]
    halved, packed = (engine.model.get_output_embeddings() for engine in engines)
    assert isinstance(halved, head.PackedHead) and isinstance(packed, head.PackedHead)
    assert engines[1].kernels["cuda-int8"] == 1
    last, first = (engines[1].decoder.blocks[i].block for i in (-1, 0))
    assert last.down.weight.ahead is packed.linear.packed.weight  # a step ends with the head, and the next one begins
    assert packed.linear.ahead is first.qkv.weight.packed.weight
    assert engines[0].weight_bytes[1] - engines[1].weight_bytes[1] == halved.packed_bytes - packed.packed_bytes > 0


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_exact_runs_transformers_own_code_there(family: str, tmp_path: Path) -> None:
    """Tensors of both places must never meet; the answers are the same bits."""
    model, asked = tiny(family, tmp_path / "m"), prompts(3, 9)
    with pretended():
        found = written(Engine(model, device="cuda"), asked)
    assert found == written(Engine(model), asked)


def test_eval_runs_there(folder: Path, tmp_path: Path) -> None:
    windows_NT = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    with pretended(), torch.inference_mode():
        found = perplexity(RuntimeModel(folder, device="cuda"), windows_NT)
    assert found == pytest.approx(perplexity(RuntimeModel(folder), windows_NT))


def test_a_block_that_computes_something_else_gets_no_decoder(folder: Path) -> None:
    """The proof notices it, and transformers' own forward goes on being used."""
    with pretended():
        engine = Engine(folder, "packed", device="cuda", capture=again)
        decoder = engine.decoder
        assert isinstance(decoder, GpuDecoder)
        decoder.blocks[0].head_eps = 1.0
        with torch.inference_mode():
            assert not proven(decoder, engine.model, engine.kinds, engine.device)


# What cannot be done


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("command", ["generate", "bench", "eval"])
def test_a_gpu_that_is_not_there(command: str, folder: Path) -> None:
    flags = ("--prompt", "x") if command == "generate" else ()
    done = infopt(command, folder, *flags, "--device", "cuda")
    assert done.code == 4, done.err
    assert "CUDA" in done.err or "driver" in done.err
    assert "--device cpu" in done.err and "Traceback" not in done.err
    done = infopt(command, folder, *flags, "--device", "tpu")
    assert done.code == 4 and "processors and on NVIDIA GPUs" in done.err


def test_devices_that_torch_sees_or_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch would say where it was built for CUDA."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Unsupported, match="driver is missing"):
        find_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (7, 5))
    with pytest.raises(Unsupported, match=r"8\.0 or newer"):
        find_device("cuda")
    with pytest.raises(Unsupported, match="1 GPUs"):
        find_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (9, 0))
    assert find_device("cuda") == torch.device("cuda", 0)


def test_failures_of_a_gpu_are_errors_that_say_what_to_do() -> None:
    device = torch.device("cuda")

    def fail(error: Exception, kind: type[Exception]) -> str:
        with pytest.raises(kind) as caught, device_errors(device):
            raise error
        return str(caught.value)

    out = fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), OutOfResources)
    assert "cuda is out of memory" in out and "--kv-cache int8" in out
    assert "device-side assert" in fail(RuntimeError("CUDA error: device-side assert triggered\nmore"), OutOfResources)
    assert fail(RuntimeError("a bug"), RuntimeError) == "a bug"
    assert issubclass(OutOfResources, InfoptError) and OutOfResources.exit_code == 5


def test_a_checkpoint_for_another_scheme(folder: Path, tmp_path: Path) -> None:
    """A scheme that infopt does not read is refused by every command that runs models."""
    import json
    import shutil

    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (other / "config.json").write_text(json.dumps(config))
    for command in (("generate", "--prompt", "x"), ("bench",), ("eval", "--dataset", text(tmp_path))):
        done = infopt(command[0], other, *command[1:])
        assert done.code == 4 and "bitsandbytes" in done.err and "Traceback" not in done.err
