"""A picture of what mixed precision had to choose from."""

from __future__ import annotations

from math import log10
from typing import Any

from infopt.plot import Chart, svg


def pareto_svg(report: dict[str, Any]) -> str:
    """A plot of the least error against average bits, on a logarithmic scale, with the uniform choices and the decision."""
    line = [(bits, log10(error)) for bits, error in report["front"] if error > 0]
    uniform = [(float(bits), log10(error)) for bits, error in report["uniform"].items() if error > 0]
    chosen = (report["bits"], log10(max(report["error"], 1e-30)))
    dots = [("#999", f"{point[0]:g} bits everywhere", point) for point in uniform]
    dots.append(("#c00", f"chosen: {report['bits']:.3f} bits", chosen))
    everything = [*line, *uniform, chosen]
    x0, x1 = min(x for x, _ in everything), max(x for x, _ in everything)
    y0, y1 = min(y for _, y in everything), max(y for _, y in everything)
    above = f"expected KL divergence, nats: 1e{y1:.1f} (top) to 1e{y0:.1f} (bottom)"
    return svg([Chart([("#06c", line)], dots, above, f"average bits of a weight: {x0:.2f} to {x1:.2f}")])
