"""Which geometry of blocks multiplies a few tokens the fastest on this GPU: each that there is, and `decode.geometry`'s place.

    python benchmarks/gpu_geometry.py [--shapes "8B down,8B qkv"] [--tokens 1,8,16] [--ahead]

The times are those of `gpu_check.py`: captured graphs over more memory than the cache holds, in turns. With --ahead each
product knows the weight that comes next. Exit status 4 without a GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import infopt  # noqa: E402

infopt.__path__.append(str(ROOT))  # its folders are packages of infopt where it is installed; here they lie beside it

import gpu_timing  # noqa: E402
import torch  # noqa: E402
from gpu_ops import BFLOAT, LAYERS, OURS, Case, cloned_weight, problems_of  # noqa: E402

from infopt.errors import InfoptError, Unsupported  # noqa: E402
from infopt.grid import Grid  # noqa: E402
from infopt.kernels.cuda import decode  # noqa: E402
from infopt.kernels.cuda.decode import WARPS, Geometry  # noqa: E402

SHAPES = tuple(label for label, sizes in LAYERS.items() if len(sizes) == 1)
SHOWN = 5


def main() -> None:
    options = arguments()
    if not torch.cuda.is_available():
        raise Unsupported("gpu_geometry: not run.", "torch sees no NVIDIA GPU.", "run it where there is one")
    print(torch.cuda.get_device_name())
    for label in options.shapes.split(","):
        for tokens in map(int, options.tokens.split(",")):
            times = measured(label, tokens, options.ahead)
            chosen = times[0][0]
            order = sorted(times, key=lambda pair: pair[1].us)
            print(
                f"\n{label}, {tokens} tokens; chosen: number {[g for g, _ in order].index(chosen) + 1} of {len(order)}"
            )
            for g, time in order[:SHOWN]:
                print(
                    f"  {g.tiles} tiles, {g.cuts} cuts, {g.cluster} blocks: {time.us:.2f} us (spread {time.spread:.1%})"
                )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", default="1,8,16")
    parser.add_argument("--ahead", action="store_true", help="each product knows the weight that comes next")
    return parser.parse_args()


def geometries(units: int) -> list[Geometry]:
    """All that fit into a block and leave each warp columns."""
    sizes = range(1, WARPS + 1)
    every = (Geometry(t, c, k) for t in sizes for c in sizes if t * c <= WARPS for k in (1, 2))
    return [g for g in every if g.parts <= units]


def measured(label: str, tokens: int, ahead: bool) -> list[tuple[Geometry, gpu_timing.Time]]:
    """The time of each geometry, of the chosen one first."""
    grid = Grid(4, 128, True, BFLOAT)
    problems = problems_of(grid, BFLOAT)(Case(label, tokens, LAYERS[label]), torch.Generator("cuda").manual_seed(0))
    (rows, columns), x_TI = problems[0].q.shape, problems[0].x_TI
    own = [cloned_weight(problems[0].packed) for _ in range(gpu_timing.copies(OURS.nbytes(problems)))]
    outs = [x_TI.new_empty(tokens, rows) for _ in own]
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    chosen = decode.geometry(-(-rows // 16), columns // 128, processors)

    def call(i: int, g: Geometry) -> None:
        after = own[(i + 1) % len(own)].weight if ahead else None
        decode.launch(own[i], x_TI, None, outs[i], after, g)

    graphs = {}
    for g in [chosen, *(g for g in geometries(columns // 128) if g != chosen)]:
        calls = [lambda i=i, g=g: call(i, g) for i in range(len(own))]
        graphs[str(g)] = (g, gpu_timing.Graph.capture(calls))
    times = gpu_timing.in_turns({name: graph for name, (_, graph) in graphs.items()})
    return [(g, times[name]) for name, (g, _) in graphs.items()]


if __name__ == "__main__":
    try:
        main()
    except InfoptError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
