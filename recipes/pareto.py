"""A picture of what mixed precision had to choose from."""

from __future__ import annotations

from math import log10
from typing import Any


def pareto_svg(report: dict[str, Any]) -> str:
    """A plot of the least error against average bits, on a logarithmic scale, with the uniform choices and the decision."""
    points = [(bits, error) for bits, error in report["front"] if error > 0]
    uniform = [(float(bits), error) for bits, error in report["uniform"].items() if error > 0]
    everything = [*points, *uniform, (report["bits"], max(report["error"], 1e-30))]
    logs = [log10(error) for _, error in everything]
    x0, x1 = min(b for b, _ in everything), max(b for b, _ in everything)
    y0, y1 = min(logs), max(logs)

    def place(bits: float, error: float) -> tuple[float, float]:
        x = 60 + 520 * (bits - x0) / max(x1 - x0, 1e-9)
        return x, 340 - 300 * (log10(error) - y0) / max(y1 - y0, 1e-9)

    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    dots = [("#999", f"{bits:g} bits everywhere", place(bits, error)) for bits, error in uniform]
    dots.append(("#c00", f"chosen: {report['bits']:.3f} bits", place(report["bits"], max(report["error"], 1e-30))))
    shapes = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>'
        f'<text x="{x + 7:.1f}" y="{y - 6:.1f}" fill="{color}">{label}</text>'
        for color, label, (x, y) in dots
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="720" height="400" font-family="sans-serif" font-size="12">'
        f'<rect width="720" height="400" fill="#fff"/><polyline points="{line}" fill="none" stroke="#06c"/>{shapes}'
        f'<text x="60" y="380">average bits of a weight: {x0:.2f} to {x1:.2f}</text>'
        f'<text x="60" y="20">sum of relative errors: 1e{y1:.1f} (top) to 1e{y0:.1f} (bottom)</text></svg>\n'
    )
