"""The C++ kernels against the reference, in every shape, for every target; and with faults put in, which must show."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from infopt import kernels
from infopt.grid import Grid, Inputs
from infopt.kernels import reference
from infopt.kernels.compiled import compilers
from infopt.kernels.compiled import library as compiled_library
from infopt.kernels.native import ROUNDED, Native, PackedWeight, build, fits, native
from infopt.kernels.pages import PAGE, Pages
from infopt.kv_cache import CacheGrid, CacheScales, Frame
from infopt.runtime.block import FusedBlock
from infopt.runtime.decode import Decoder, find
from infopt.runtime.engine import Engine
from infopt.runtime.paged import Step
from infopt.runtime.store import LayerKind

from .test_engine import answers, prompts, quantized, words  # noqa: F401
from .test_kernels import random_q, relative_error

CPP = Path(kernels.__file__).parent / "cpp"
ORDER = 2e-6  # fp32 in another order
CASES = [
    (32, 64, Grid(4, 32)),
    (13, 64, Grid(4, 64, False)),  # a tile that is cut short
    (40, 256, Grid(4, 128, False, torch.float16)),
    (40, 96, Grid(4, None, True, torch.float32)),
    (24, 64, Grid(3, 32, False)),
    (24, 64, Grid(2, 64, True)),
    (33, 128, Grid(8, None, True)),
    (48, 128, Grid(8, 32, False, torch.float16)),
    (24, 128, Grid(8, None, True, inputs=Inputs("int"))),  # W8A8: a scale for a token
    (24, 128, Grid(4, 64, False, inputs=Inputs("int"))),
]


@pytest.fixture(scope="module")
def library() -> Native:
    found = native()
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def errors(library: Native, cases: Sequence[tuple[int, int, Grid]] = CASES) -> list[float]:
    """Of some tokens with large and small values, against the reference with inputs rounded in the same way."""
    found = []
    for seed, (rows, columns, grid) in enumerate(cases):
        q = random_q(rows, columns, grid, seed)
        x_TI = torch.randn(70, columns, generator=torch.Generator().manual_seed(seed))
        x_TI[::3, 5] *= 30
        x_TI[1] *= 1e-6
        x_TI[2] = 0
        meant = replace(q, grid=replace(grid, inputs=grid.inputs or ROUNDED))
        got_TO, wanted_TO = PackedWeight(library, q).multiply(x_TI), reference.linear(x_TI, meant)
        found += [relative_error(got_TO[token], wanted_TO[token]) for token in (0, 1, 3, 4)]
        found += [relative_error(got_TO, wanted_TO), got_TO[2].norm().item()]
    return found


def test_they_compute_the_reference(library: Native) -> None:
    assert max(errors(library)) < ORDER


def test_a_tokens_bits_do_not_depend_on_its_neighbours(library: Native) -> None:
    for rows, columns, grid in CASES:
        weight = PackedWeight(library, random_q(rows, columns, grid))
        x_TI = torch.randn(7, columns)
        alone = torch.cat([weight.multiply(x_I[None]) for x_I in x_TI])
        assert torch.equal(alone, weight.multiply(x_TI))
        assert torch.equal(alone[2:7], weight.multiply(x_TI[2:7]))


def test_prepare_takes_them_where_they_fit(library: Native) -> None:
    for rows, columns, grid in CASES:
        q = random_q(rows, columns, grid)
        prepared = kernels.prepare(q, "packed")
        assert prepared.kernel == f"w{8 if grid.bits == 8 else 4}a8" and prepared.inputs == (grid.inputs or ROUNDED)
        assert prepared.nbytes < 0.8 * rows * columns * (2 if grid.bits == 8 else 1) + 16 * columns
        x_TI, bias_O = torch.randn(3, columns), torch.randn(rows)
        rounding = 1e-6 if grid.inputs else 2e-2
        assert relative_error(prepared(x_TI, bias_O), reference.linear(x_TI, q, bias_O)) < rounding
    for grid in (
        Grid(4, 16),
        Grid(8, None, True, kind="float"),
        Grid(4, None, rows=None),
        Grid(8, inputs=Inputs("float")),
    ):
        assert not fits(
            random_q(32, 64, grid) if grid.kind == "int" else replace(random_q(32, 64, Grid(8, None)), grid=grid)
        )
    assert not fits(random_q(32, 40, Grid(4, None)))


def test_what_is_not_finite_shows(library: Native) -> None:
    weight = PackedWeight(library, random_q(32, 64, Grid(4, 32)))
    for value in (float("nan"), float("inf"), -float("inf")):
        for place in (0, 37, 63):
            x_TI = torch.randn(2, 64)
            x_TI[0, place] = value
            got_TO = weight.multiply(x_TI)
            assert not torch.isfinite(got_TO[0]).any() and torch.isfinite(got_TO[1]).all()


# Blocks


@torch.inference_mode()
def blocks_differ(engine: Engine, library: Native) -> list[float]:
    """Relative differences of each block's change, sorted, for texts of several lengths that go on for some tokens."""
    blocks = [module for module in engine.model.modules() if isinstance(module, FusedBlock)]
    decoder = Decoder(engine.model, blocks, engine.kinds, library)
    cache = engine.cache(100, 3, chunk=8)
    requests = [request for _ in range(3) if (request := cache.admit(100)) is not None]
    for request, prompt in zip(requests, prompts(3, 70, 21), strict=True):
        engine.prefill(cache, request, prompt)
    found = []
    for token in range(3):
        step = Step(cache, requests, 1)
        hidden_B1C, angles = decoder.start(torch.tensor([[5], [9], [7 + token]]), step)
        hidden_B1C = torch.randn(hidden_B1C.shape, generator=torch.Generator().manual_seed(token))
        hidden_B1C[1] *= 1e-3  # where eps counts
        for i, block in enumerate(blocks):
            found_B1C = hidden_B1C.clone()
            decoder.run(found_B1C, *angles, step, layers=slice(i, i + 1))
            wanted_B1C = block(hidden_B1C, position_embeddings=angles, past_key_values=step)
            found.append(
                ((found_B1C - wanted_B1C) / (wanted_B1C - hidden_B1C).norm(dim=-1, keepdim=True)).norm().item()
            )
            hidden_B1C = wanted_B1C
        step.commit()
    return sorted(found)


@pytest.mark.parametrize("family", ["gelu", "llama", "mistral", "phi3", "qwen2", "qwen3"])
def test_blocks_in_cpp_are_the_blocks(family: str, library: Native, words: Path, tmp_path: Path) -> None:  # noqa: F811
    """The texts are longer than mistral's window. A last bit may move a rounded activation by one step, but seldom."""
    options = {"hidden_act": "gelu_pytorch_tanh"} if family == "gelu" else {}
    folder = quantized("llama" if options else family, tmp_path, words, "--method", "rtn", **options)
    engine = Engine(folder, "packed")
    assert engine.decoder is not None
    found = blocks_differ(engine, library)
    assert found[len(found) // 2] < 1e-5 and found[-1] < 1e-2


def test_the_step_of_cpp_is_used_only_where_it_is_proven(words: Path, tmp_path: Path) -> None:  # noqa: F811
    """Not for a model with something between the blocks and the head, or an activation that the C++ has not."""
    engine = Engine(quantized("llama", tmp_path, words, "--method", "rtn"), "packed")
    library = native()
    assert library is not None and engine.decoder is not None
    blocks = engine.decoder.blocks
    look = torch.inference_mode()(find)
    assert look(engine.model, blocks, engine.kinds, library) is not None
    with engine.model.model.norm.register_forward_hook(lambda module, x, y: 1.001 * y):
        assert look(engine.model, blocks, engine.kinds, library) is None
    act, blocks[1].act = blocks[1].act, torch.nn.ReLU()
    assert look(engine.model, blocks, engine.kinds, library) is None
    blocks[1].act = act
    width, blocks[1].scaling = blocks[1].scaling, 0.0
    assert look(engine.model, blocks, engine.kinds, library) is not None  # the same fault on both sides
    blocks[1].scaling = width


CACHES: dict[str, CacheGrid | None] = {
    "bf16": None,
    "fp8 tensor": CacheGrid("float", 8, "tensor"),
    "fp8 token": CacheGrid("float", 8, "token"),
    "int8 head": CacheGrid("int", 8, "head"),
    "int8 token": CacheGrid("int", 8, "token"),
    "int8 token with zero points": CacheGrid("int", 8, "token", False),
    "int4 token": CacheGrid("int", 4, "token"),
    "int4 token with zero points": CacheGrid("int", 4, "token", False),
    "int4 channel with zero points": CacheGrid("int", 4, "channel", False),
}
BALANCED = {
    "fp8 channel": CacheGrid("float", 8, "channel", balanced=True, sinks=1),
    "int8 token": CacheGrid("int", 8, "token", balanced=True, sinks=3),
    "int4 token with zero points": CacheGrid("int", 4, "token", False, balanced=True, sinks=1),
    "int8 token, first tokens alone": CacheGrid("int", 8, "token", sinks=9),
}


def with_cache(engine: Engine, grid: CacheGrid | None, dtype: torch.dtype) -> Engine:
    """The same engine, with a cache that was not calibrated well: some values lie beyond its range."""
    scales, other, generator = CacheScales(), copy(engine), torch.Generator().manual_seed(0)
    if grid is not None and grid.strategy != "token":
        x_BHTD = torch.randn(1, *_shape(engine), 50, generator=generator).transpose(2, 3) / 2
        scale, zero = grid.range(x_BHTD)
        scales = CacheScales({"k": scale, "v": scale * 2}, {"k": zero, "v": zero})
    if grid is not None and grid.balanced:
        (heads, width), frames = _shape(engine), {}
        for which in "kv":
            mixed_HDD = torch.eye(width) + 0.3 * torch.randn(heads, width, width, generator=generator) / width**0.5
            frames[which] = Frame(mixed_HDD, 0.2 * torch.randn(heads, width, generator=generator))
        scales = replace(scales, frames=frames)
    other.kinds = [LayerKind(kind.window, grid, scales, dtype=dtype) for kind in engine.kinds]
    return other


def _shape(engine: Engine) -> tuple[int, int]:
    """Heads of keys, and channels of one."""
    assert isinstance(engine.decoder, Decoder)
    block = engine.decoder.blocks[0]
    return block.heads[1], block.width


@torch.inference_mode()
def stored(engine: Engine, library: Native, tokens: int = 40) -> tuple[Pages, Pages]:
    """What the C++ keeps of some tokens in the first layer; one of them is all zeros."""
    assert isinstance(engine.decoder, Decoder)
    decoder = Decoder(engine.model, engine.decoder.blocks, engine.kinds, library)
    cache = engine.cache(tokens, chunk=tokens)
    request = cache.admit(tokens)
    assert request is not None
    step = Step(cache, [request], tokens)
    ids_1T = torch.randint(5, 100, (1, tokens), generator=torch.Generator().manual_seed(0))
    hidden_1TC, angles = decoder.start(ids_1T, step, range(tokens))
    hidden_1TC[0, 3] = 0.0
    decoder.run(hidden_1TC, *angles, step, range(tokens), slice(0, 1))
    return cache.stores[0].pages(*_shape(engine))


def kept_as_pages_would(engine: Engine, library: Native, name: str) -> bool:
    """Bit for bit, from the values that the C++ keeps as floats."""
    values, found = (
        stored(with_cache(engine, grid, dtype), library)
        for grid, dtype in ((None, torch.float32), (CACHES[name], torch.bfloat16))
    )
    parts = ("codes", "scale", "zero")
    for value, one in zip(values, found, strict=True):
        wanted = replace(
            one, **{part: kept.clone() for part in parts if isinstance(kept := getattr(one, part), torch.Tensor)}
        )
        wanted.codes.zero_()
        wanted.write(slice(PAGE, None), value.codes[PAGE:])
        pairs = [(getattr(one, part), getattr(wanted, part)) for part in parts]
        if not all(a is None or torch.equal(a[PAGE : PAGE + 40], b[PAGE : PAGE + 40]) for a, b in pairs):
            return False
    return True


@pytest.mark.parametrize("name", CACHES)
def test_caches(name: str, engine: Engine, library: Native) -> None:
    """What is kept is what `Pages` would keep, and what is read is what the block reads; the step is used."""
    assert kept_as_pages_would(engine, library, name)
    other = with_cache(engine, CACHES[name], torch.bfloat16)
    assert isinstance(engine.decoder, Decoder)
    look = torch.inference_mode()(find)
    assert look(engine.model, engine.decoder.blocks, other.kinds, library) is not None
    found = blocks_differ(other, library)
    assert found[len(found) // 2] < 1e-5 and found[-1] < 1e-2


@pytest.mark.parametrize("name", BALANCED)
def test_caches_with_coordinates_and_first_tokens_of_their_own(name: str, engine: Engine, library: Native) -> None:
    """They are read as the block reads them, the step is used, and a text's bits do not depend on how it is cut."""
    other = with_cache(engine, BALANCED[name], torch.bfloat16)
    assert isinstance(engine.decoder, Decoder)
    look = torch.inference_mode()(find)
    found = look(engine.model, engine.decoder.blocks, other.kinds, library)
    assert found is not None
    differences = blocks_differ(other, library)
    assert differences[len(differences) // 2] < 1e-5 and differences[-1] < 1e-2
    other.decoder, logits = found, []
    for chunk in (1, 5, 40):
        cache = other.cache(50, chunk=chunk)
        request = cache.admit(50)
        assert request is not None
        logits.append(other.prefill(cache, request, prompts(40)[0]))
    assert all(torch.equal(one_V, logits[0]) for one_V in logits)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_texts_bits_do_not_depend_on_pieces_or_company(family: str, words: Path, tmp_path: Path) -> None:  # noqa: F811
    """Logits bit for bit, for every way of cutting a prompt, and tokens alone, together and in used pages."""
    engine = Engine(quantized(family, tmp_path, words, "--method", "rtn", vocab_size=640), "packed")
    assert engine.decoder is not None
    (prompt,) = prompts(150)
    logits = []
    for chunk in (1, 7, 64, 150):
        cache = engine.cache(160, chunk=chunk)
        request = cache.admit(160)
        assert request is not None
        logits.append(engine.prefill(cache, request, prompt))
    assert all(torch.equal(one_V, logits[0]) for one_V in logits)
    asked = prompts(5, 90, 33)
    alone = [answers(engine, [one])[0] for one in asked]
    assert answers(engine, asked, chunk=5) == answers(engine, asked) == answers(engine, asked, at_once=2) == alone


@pytest.mark.parametrize("grid", [None, CACHES["int8 token"]])
@torch.inference_mode()
def test_what_an_earlier_text_left_is_not_read(grid: CacheGrid | None, engine: Engine, library: Native) -> None:
    """Pages that are used again may hold what is no number."""
    other, logits = with_cache(engine, grid, torch.bfloat16), []
    other.decoder = Decoder(engine.model, engine.decoder.blocks, other.kinds, library) if engine.decoder else None
    for fill in (0.0, float("nan")):
        cache = other.cache(40)
        for store in cache.stores:
            for half in store.pages(*_shape(engine)):
                (half.codes if half.scale is None else half.scale).fill_(fill)
        request = cache.admit(40)
        assert request is not None
        logits.append(other.prefill(cache, request, prompts(37)[0]))
    assert torch.isfinite(logits[0]).all() and torch.equal(*logits)


# Faults: one line is changed, the library is compiled anew, and the comparison that passes above must fail

FAULTS = {
    "a scale of another group": ("linear.h", "place += ROWS;", ""),
    "no zero point": ("linear.h", "exact -= zero[i / N] * x_sum[i % N]", ""),
    "no middle": ("linear.h", "ZEROS ? 0 : BITS == 4", "true ? 0 : BITS == 4"),
    "nibbles exchanged": ("linear.h", "a = half ? a >> 4 : a & 15;", "a = half ? a & 15 : a >> 4;"),
    "a register too few": ("linear.h", "for (int r = 0; r < BITS; ++r,", "for (int r = 0; r < BITS - 1; ++r,"),
    "not to the nearest": ("linear.h", "/ scale + 0x1.8p23f", "/ scale - 0.5f + 0x1.8p23f"),
    "another token's scale": ("linear.h", "x_scale[i % N]", "x_scale[0]"),
    "another bunch of tokens": (
        "linear.h",
        "bunch = size_t(token / TOKENS) * blocks * TOKENS",
        "bunch = 0",
    ),
    "the bias of another tile": ("linear.h", "load<Floats>(bias + other * ROWS)", "load<Floats>(bias + t * ROWS)"),
    "half of the angles": ("block.cpp", " + a * load<T>(sine + high)", ""),
    "a position too few": ("attention.h", "seen_to = int(high - low);", "seen_to = int(high - low) - 1;"),
    "parts as they are": ("attention.h", "std::exp(part[0] - most)", "1.0f"),
    "queries of another group": ("attention.h", "q + (h * group + g) * width", "q + (h + g) * width"),
    "always the same page": ("attention.h", "text.table[position / PAGE % text.pages]", "text.table[0]"),
    "no eps": ("block.cpp", "/ count + eps", "/ count"),
    "no residual": ("block.cpp", "block.down, s.x, count, hidden, true", "block.down, s.x, count, hidden, false"),
    "heads exchanged": ("attention.h", "rows.eights[1][i] + h * width", "rows.eights[1][i] + some.first * width"),
    "codes cut off": ("pages.h", "value = load<Floats>(x + d) / scale", "value = load<Floats>(x + d) / scale - 0.5f"),
    "a zero point too few": (
        "pages.h",
        "eight_of<KIND>(codes, d) - zero) * scale",
        "eight_of<KIND>(codes, d)) * scale",
    ),
    "stale floats": ("attention.h", "if (text.table != desk.table ||", "if (!desk.table ||"),
    "up for gate": (
        "block.cpp",
        "activate(y[2 * i], block.act) * y[2 * i + 1]",
        "activate(y[2 * i + 1], block.act) * y[2 * i]",
    ),
    "tiles exchanged": ("linear.h", "load<Bytes>(one), load<Bytes>(two)", "load<Bytes>(two), load<Bytes>(one)"),
    "keys of another head's coordinates": ("block.cpp", "half.into + size_t(head) *", "half.into + 0 *"),
    "no center": (
        "block.cpp",
        "load<Floats>(x + d) - load<Floats>(half.center + head * width + d)",
        "load<Floats>(x + d)",
    ),
    "queries as they are": ("block.cpp", "std::copy_n(turned, width, q);", ""),
    "values in coordinates": ("block.cpp", "if (!values.back) return;", "return;"),
    "first tokens rounded": ("attention.h", "if (position + j < pages.sinks)", "if (false)"),
    "first tokens of another layer": ("attention.h", "(size_t(pages.layer) * 2 + which)", "(size_t(which))"),
    "channels left out": (
        "attention.h",
        "for (int d = 0; d < width; d += WIDTH",
        "for (int d = WIDTH<Vector>; d < width; d += WIDTH",
    ),
}


@pytest.fixture(scope="module")
def engine(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:  # noqa: F811
    return Engine(quantized("qwen2", tmp_path_factory.mktemp("qwen2"), words, "--method", "rtn"), "packed")


QUICK = (
    "a scale of another group", "no zero point", "no middle", "a register too few", "a position too few", "parts as they are",
    "no residual", "queries as they are", "first tokens rounded",
)  # fmt: skip


@pytest.mark.parametrize(
    "fault", [fault if fault in QUICK else pytest.param(fault, marks=pytest.mark.slow) for fault in FAULTS]
)
def test_a_fault_shows(fault: str, engine: Engine, library: Native, tmp_path: Path) -> None:
    name, old, new = FAULTS[fault]
    shutil.copytree(CPP, tmp_path / "cpp")
    source = (tmp_path / "cpp" / name).read_text()
    assert source.count(old) == 1
    (tmp_path / "cpp" / name).write_text(source.replace(old, new))
    faulty = build(tmp_path, tmp_path / "cpp" / "block.cpp", ("-march=native", "-fopenmp", "-O0"))
    assert faulty is not None
    if name == "linear.h" and max(errors(faulty)) > 1e-4:
        return
    caches = ("int8 head", "int4 token with zero points") if name in ("pages.h", "attention.h") else ()
    grids = [*(CACHES[cache] for cache in caches), BALANCED["int8 token"]]
    engines = [engine, *(with_cache(engine, grid, torch.bfloat16) for grid in grids)]
    kept = all(kept_as_pages_would(engine, faulty, cache) for cache in caches)
    assert not kept or max(blocks_differ(one, faulty)[-1] for one in engines) > 1e-4


@pytest.mark.parametrize("target", ["-march=x86-64", pytest.param("-march=x86-64-v3", marks=pytest.mark.slow)])
def test_every_target_computes_the_same(target: str, engine: Engine, library: Native, tmp_path: Path) -> None:
    """Processors without AVX2 get plain code."""
    if platform.machine() != "x86_64":
        pytest.skip("targets of another processor")
    made = build(tmp_path, flags=(target, "-fopenmp", "-O1"))
    assert made is not None and made.target == ("portable" if target == "-march=x86-64" else "AVX2")
    assert max(errors(made)) < ORDER
    assert blocks_differ(engine, made)[-1] < 1e-2


@pytest.mark.parametrize("target", ["alderlake", "sapphirerapids"])
def test_targets_that_are_not_here_compile(target: str, library: Native) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("targets of another processor")
    command = [next(compilers()), f"-march={target}", "-O0", "-std=c++17", "-fsyntax-only", str(CPP / "block.cpp")]
    subprocess.run(command, check=True, timeout=60)


# Building


def test_what_was_built_is_kept_and_built_again_where_it_is_damaged(library: Native, tmp_path: Path) -> None:
    source, kept, other = tmp_path / "one.cpp", tmp_path / "kept", tmp_path / "other"
    source.write_text('extern "C" int answer() { return 41; }')
    found, flags = tuple(compilers()), ("-O0",)
    first = compiled_library(source, kept, found, flags)
    assert first is not None and first.functions.answer() == 41
    (only,) = kept.iterdir()
    written = only.stat().st_mtime_ns
    assert compiled_library(source, kept, found, flags) is not None and only.stat().st_mtime_ns == written
    other.mkdir()
    (other / only.name).write_bytes(b"damaged")
    again = compiled_library(source, other, found, flags)
    assert again is not None and again.functions.answer() == 41
    assert compiled_library(source, kept, (), flags) is None
    assert compiled_library(source, kept, ("/bin/false",), flags) is None
    unkept = compiled_library(source, Path("/proc/nowhere"), found, flags)  # nothing can be kept
    assert unkept is not None and unkept.functions.answer() == 41
    source.write_text('extern "C" int answer() { return 42; }')
    second = compiled_library(source, kept, found, flags)
    assert second is not None and second.functions.answer() == 42 and len(list(kept.iterdir())) == 2
    for wrong in ('extern "C" int missing(); extern "C" int answer() { return missing(); }', "no C++"):
        source.write_text(wrong)
        assert compiled_library(source, kept, found, flags) is None
    assert len(list(kept.iterdir())) == 2


def test_without_a_compiler_torchs_kernels_run(engine: Engine, tmp_path: Path) -> None:
    """And the bench says so; the answers are near each other."""
    environment = {**os.environ, "PATH": "", "CXX": "", "XDG_CACHE_HOME": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "infopt.cli.main",
        "bench",
        str(engine.folder),
        *["--prompt", "8", "--new-tokens", "3"],
    ]
    done = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kernels"] == {"int4pack": 8}
    assert "int4pack x 8" in done.stderr and json.loads(done.stdout)["compiled"] is None
