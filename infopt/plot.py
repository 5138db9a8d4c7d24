"""Charts as SVG, without a library: lines and labelled dots, scaled to what is given, one chart below the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLORS = ("#06c", "#c00", "#083", "#c60", "#639", "#555")
_WIDTH, _HEIGHT = 720, 400
Point = tuple[float, float]


@dataclass(frozen=True)
class Chart:
    """lines: (color, points). dots: (color, label, point); an empty label is none. above, below: what the axes are."""

    lines: Sequence[tuple[str, Sequence[Point]]]
    dots: Sequence[tuple[str, str, Point]]
    above: str
    below: str


def svg(charts: Sequence[Chart]) -> str:
    """The file's text."""
    height = _HEIGHT * len(charts)
    parts = [f'<g transform="translate(0 {_HEIGHT * i})">{_group(chart)}</g>' for i, chart in enumerate(charts)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="sans-serif" font-size="12">'
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _group(chart: Chart) -> str:
    everything = [point for _, points in chart.lines for point in points] + [point for *_, point in chart.dots]
    x0, x1 = min(x for x, _ in everything), max(x for x, _ in everything)
    y0, y1 = min(y for _, y in everything), max(y for _, y in everything)

    def place(point: Point) -> tuple[str, str]:
        x = 60 + 520 * (point[0] - x0) / max(x1 - x0, 1e-9)
        return f"{x:.1f}", f"{340 - 300 * (point[1] - y0) / max(y1 - y0, 1e-9):.1f}"

    parts = [
        f'<polyline points="{" ".join(",".join(place(point)) for point in points)}" fill="none" stroke="{color}"/>'
        for color, points in chart.lines
    ]
    for color, label, point in chart.dots:
        x, y = place(point)
        parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{color}"/>')
        parts.append(f'<text x="{float(x) + 7:.1f}" y="{float(y) - 6:.1f}" fill="{color}">{escape(label)}</text>')
    parts.append(f'<text x="60" y="380">{escape(chart.below)}</text><text x="60" y="20">{escape(chart.above)}</text>')
    return "".join(parts)
