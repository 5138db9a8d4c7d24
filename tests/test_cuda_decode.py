"""The CUDA C++ kernels, run without a GPU: the very source that NVRTC gets, compiled by g++ for `tests/emulator/machine.h`.

The mutations at the end plant a bug each and ask the same comparison to see it.
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from infopt.grid import Grid
from infopt.kernels.cuda import decode
from infopt.kernels.cuda.decode import Geometry
from infopt.kernels.cuda.layout import ungated

from .emulator.build import COMPILER, SOURCES, Emulator, Fault
from .emulator.cases import BFLOAT, CASES, HALF, Case
from .pretend import There, pretended

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++: the CUDA kernels were not emulated")

SEEDS = (0, 1, 2)
#: The same weight and the same parts for one token and for many, in both sizes of the kernel.
BATCHES = tuple(Case(tokens, 256, 384, Grid(4, 64, False, HALF), HALF, (2, 3, 2)) for tokens in (1, 8, 13, 16))


@pytest.fixture(scope="module", params=[True, False], ids=["clusters", "alone"])
def emulator(request, tmp_path_factory) -> Emulator:
    variants = sorted({case.variant for case in CASES + BATCHES})
    dense = sorted({decode.variant(case.packed(), case.dtype, 1) for case in CASES})
    return Emulator.build(variants, tmp_path_factory.mktemp("emulator"), dense=dense, clusters=request.param)


def run(emulator: Emulator, case: Case, seed: int) -> torch.Tensor:
    x, bias = case.inputs()
    packed = case.packed()
    y = emulator.multiply(packed, x, case.kernel_bias(bias), geometry=case.geometry, seed=seed)
    if packed.arrived.any():
        raise Fault("the counters are not zero again")
    return y


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_agree_with_the_reference_in_any_order_of_threads(emulator, case) -> None:
    results = [run(emulator, case, seed) for seed in SEEDS]
    assert case.agrees(results[0], case.want(*case.inputs()))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_token_gets_the_same_bits_alone_and_in_a_batch(emulator) -> None:
    packed, (x_TI, _) = BATCHES[-1].packed(), BATCHES[-1].inputs()
    geometry = BATCHES[0].geometry
    together = emulator.multiply(packed, x_TI, geometry=geometry)
    for tokens in (1, 8, 13):
        assert torch.equal(emulator.multiply(packed, x_TI[:tokens], geometry=geometry), together[:tokens])
    assert torch.equal(emulator.multiply(packed, x_TI[9:10], geometry=geometry), together[9:10])
    wider = Geometry(1, 6, 1)  # as many parts
    assert torch.equal(emulator.multiply(packed, x_TI, geometry=wider), together)


def test_a_weight_can_be_used_again_and_in_other_blocks(emulator) -> None:
    case = CASES[2]
    packed, (x_TI, bias) = case.packed(), case.inputs()
    first = emulator.multiply(packed, x_TI, bias, geometry=case.geometry)
    assert torch.equal(emulator.multiply(packed, x_TI, bias, geometry=case.geometry, seed=7), first)
    for blocks in ((1, 1, 1), (4, 2, 1), (1, 6, 1), (3, 1, 2), (2, 3, 2)):
        assert case.agrees(emulator.multiply(packed, x_TI, bias, geometry=Geometry(*blocks)), case.want(x_TI, bias))


#: Of Llama 3 8B and on 132 processors: what was fastest on an H100 (`benchmarks/gpu_geometry.py`).
FASTEST = {
    (28672, 4096): (7, 1, 1), (4096, 14336): (2, 4, 2), (4096, 4096): (2, 4, 2), (6144, 4096): (3, 2, 2),
    (8192, 8192): (4, 2, 2),
}  # fmt: skip


@pytest.mark.parametrize(("shape", "blocks"), FASTEST.items(), ids=str)
def test_the_blocks_are_those_that_were_fastest(shape, blocks) -> None:
    rows, columns = shape
    assert decode.geometry(rows // 16, columns // 128, 132) == Geometry(*blocks)


@pytest.mark.parametrize("shape", [*FASTEST, (576, 576), (16, 64), (49152, 576), (57344, 8192)], ids=str)
@pytest.mark.parametrize("processors", [1, 46, 108, 132])
def test_a_block_fits_and_every_warp_has_columns(shape, processors) -> None:
    tiles, units = shape[0] // 16, shape[1] // 64
    g = decode.geometry(tiles, units, processors)
    assert g.threads <= decode.THREADS
    assert g.parts <= units
    assert -(-g.tiles // g.cluster) * g.parts <= number("SLOTS")  # sums that a block of a cluster has room for
    waves = -(-(-(-tiles // g.tiles) * g.cluster) // (2 * processors))
    assert waves == 1 or tiles * g.parts >= processors * 2 * decode.WARPS  # nobody waits while there is room


def number(name: str) -> int:
    found = re.findall(rf"constexpr int {name} = (\d+);", (SOURCES / "decode.cuh").read_text())
    assert len(found) == 1
    return int(found[0])


def test_what_both_languages_know_is_the_same() -> None:
    assert (number("WARPS"), number("CHUNK")) == (decode.WARPS, decode.CHUNK)
    assert torch.empty(number("PIECE"), device="meta", dtype=torch.uint8).nbytes == decode._PIECE


def test_more_tokens_than_a_launch_takes_are_several(monkeypatch) -> None:
    launched = []
    monkeypatch.setattr(decode, "launch", lambda *arguments: launched.append(arguments))
    monkeypatch.setattr(decode, "_processors", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    with pretended():
        packed, after = (Case(32, 160, 512, Grid(4, 128, False, HALF)).packed() for _ in range(2))
        packed = replace(packed, weight=There(packed.weight))
        x_TI, bias_O = There(torch.randn(29, 512).half()), There(torch.randn(160).half())
        y = decode.multiply(packed, x_TI, bias_O, ahead=after.weight)
        assert y.shape == (29, 160)
        assert [len(x) for _, x, *_ in launched] == [16, 13]
        for start, (_, x, bias, part, ahead, g) in zip((0, 16), launched, strict=True):
            assert x.data_ptr() == x_TI.data_ptr() + start * 1024
            assert part.data_ptr() == y.data_ptr() + start * 320
            assert torch.equal(bias.here, bias_O.here)
            assert ahead is (after.weight if start else packed.weight)
            assert g == launched[0][-1]


@pytest.mark.parametrize("tokens", [1, 16])
def test_what_is_fetched_ahead_lies_within_the_weight(tokens) -> None:
    for nbytes in (64, 1024, 5000, 8 << 20, (8 << 20) + 1024, 9 << 20, (64 << 20) + 512):
        count, stride = decode.pieces(torch.empty(nbytes, dtype=torch.uint8, device="meta"), tokens)
        assert (count - 1) * stride + 1024 <= nbytes or count == 0
        assert count * 1024 == min(nbytes // 1024 * 1024, (8 << 20) if tokens == 1 else (4 << 20))
        assert stride % 16 == 0 and stride >= min(count, 1) * 1024
    assert decode.pieces(None, tokens) == (0, 0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_weight_written_out_has_the_bits_that_torch_gives_it(emulator, case) -> None:
    packed = case.packed()
    w_OI = emulator.dense(packed, case.dtype)
    assert torch.equal(ungated(w_OI) if packed.gated else w_OI, case.weight.dequantize(case.dtype))


def test_the_emulator_sees_what_leaves_its_buffers(emulator) -> None:
    case = CASES[0]
    packed, (x_TI, _) = case.packed(), case.inputs()
    short = replace(packed, weight=packed.weight[:-1].clone())
    with pytest.raises(Fault, match="outside"):
        emulator.multiply(short, x_TI, geometry=case.geometry)


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    before: str
    after: str
    case: Case
    clusters: bool = False


SPLIT = Case(5, 160, 512, Grid(4, 128, False, HALF), HALF, (3, 2, 2))
PLAIN = Case(9, 128, 256, Grid(4, 64, True, BFLOAT), HALF, (4, 1, 1))
MUTATIONS = (
    Mutation("a barrier removed", "decode.cuh", "    device_fence();\n    block_barrier();\n", "    device_fence();\n",
             SPLIT),
    Mutation("threads that do not wait", "decode.cuh", "!block_any(complete)", "!complete", SPLIT),
    Mutation("the first to arrive adds up", "decode.cuh", "last) == last", "last) == 0", SPLIT),
    Mutation("counters that stay", "decode.cuh", "d.cluster, last)", "d.cluster, 99)", SPLIT),
    Mutation("a part left out", "decode.cuh", "int other = 0; other < parts", "int other = 1; other < parts", SPLIT),
    Mutation("a part in another's place", "decode.cuh", "store(sums + part * SUMS", "store(sums + part / 2 * SUMS", SPLIT),
    Mutation("a cluster that does not wait", "decode.cuh", "    cluster_arrive();\n    cluster_wait();\n", "", SPLIT, True),
    Mutation("a block that writes to one that has not begun", "decode.cuh",
             "    cluster_wait();  // all of its blocks have begun\n", "", SPLIT, True),
    Mutation("a tile that nobody adds up", "decode.cuh", "return row * d.cluster / d.tiles;",
             "return (row + 1) * d.cluster / d.tiles % d.cluster;", SPLIT, True),
    Mutation("two tiles in one place", "decode.cuh", "(row - first_tile()) * parts * SUMS", "(row - first_tile()) * SUMS",
             SPLIT, True),
    Mutation("x read before the kernel that makes it has ended", "decode.cuh",
             "  wait_for_kernel_before();\n  work.multiply();", "  work.multiply();\n  wait_for_kernel_before();", PLAIN),
    Mutation("a fetch behind the end of what comes next", "decode.cuh", "i < d.pieces", "i <= d.pieces", PLAIN),
    Mutation("all warps of a block at the same columns", "decode.cuh", "part(block * d.cuts + cut)", "part(block * d.cuts)",
             SPLIT, True),
    Mutation("a range that forgets its last unit", "decode.cuh", "at + i >= to", "at + i >= to - 1", PLAIN),
    Mutation("a range one unit short", "decode.cuh", "to(per_row * (part + 1) / parts)",
             "to(per_row * (part + 1) / parts - (part == 0))", SPLIT),
    Mutation("a ring that runs ahead of the weight", "decode.cuh", "at + ahead < to", "at + ahead <= to + 8", PLAIN),
    Mutation("the wrong part of x", "decode.cuh", "{j % 2 ? tokens[n].z : tokens[n].x, j",
             "{j % 2 ? tokens[n].x : tokens[n].z, j", PLAIN),
    Mutation("tokens that are not there", "decode.cuh", "(token < d.tokens ? token : d.tokens - 1)", "token",
             SPLIT),
    Mutation("the wrong half of a weight's word", "unpack.cuh", "above = q >> 8", "above = q >> 4", PLAIN),
    Mutation("the zero point of another row", "unpack.cuh", "mask_or(q, 0x00f000f0u, 0x64006400u), 0x2c002c00u, lower.high",
             "mask_or(q, 0x00f000f0u, 0x64006400u), 0x2c002c00u, upper.high", SPLIT),
    Mutation("scales of swapped rows", "decode.cuh", "up = Scales<V>::upper(entry)", "up = Scales<V>::lower(entry)", PLAIN),
    Mutation("a neighbour's zero point", "decode.cuh", "V::ZEROS ? entry[1] >> 16", "V::ZEROS ? entry[0] >> 16", SPLIT),
    Mutation("scales of the next group", "decode.cuh", "ahead * (8 * WORDS)", "(ahead - 1) * (8 * WORDS)",
             replace(PLAIN, columns=1024)),
)  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_planted_bug_is_found(mutation, tmp_path: Path) -> None:
    for path in SOURCES.glob("*.cuh"):
        text = path.read_text()
        if path.name == mutation.file:
            assert text.count(mutation.before) == 1, f"{mutation.before!r} is not in {path.name}, or more than once"
            text = text.replace(mutation.before, mutation.after)
        (tmp_path / path.name).write_text(text)
    broken = Emulator.build([mutation.case.variant], tmp_path, tmp_path, clusters=mutation.clusters)
    want = mutation.case.want(*mutation.case.inputs())
    verdicts = []
    for seed in SEEDS:
        try:
            verdicts.append(mutation.case.agrees(run(broken, mutation.case, seed), want))
        except Fault:
            verdicts.append(False)
    assert not all(verdicts)
