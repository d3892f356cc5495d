"""Step plots as small SVG files, the same to the last byte for the same data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Colours that can be told apart with colour blindness (Okabe and Ito, 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#777777")
PANEL, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 290, 230, 48, 34, 42, 230


@dataclass(frozen=True)
class Line:
    """A curve of steps.

    Attributes:
        name: The name in the legend.
        points: Pairs of x and y; y holds from x to the next x.
        dashed: Whether the line is dashed.
    """

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """One plot; x is on a logarithmic scale from one to `2**powers`, y from zero to one."""

    title: str
    xlabel: str
    lines: Sequence[Line]
    powers: int = 5


def plot(panels: Sequence[Panel], ylabel: str) -> str:
    """An SVG with panels side by side and one legend for all of them."""
    names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    dashed = {line.name: line.dashed for panel in panels for line in panel.lines}
    style = {name: _style(index, dashed[name]) for index, name in enumerate(names)}
    width = len(panels) * (PANEL + LEFT) + LEGEND
    height = max(TOP + HEIGHT + BOTTOM, TOP + 20 * len(names) + 10)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for index, panel in enumerate(panels):
        out += _panel(panel, index * (PANEL + LEFT) + LEFT, style, ylabel if index == 0 else "")
    x = len(panels) * (PANEL + LEFT) + 14
    for index, name in enumerate(names):
        y = TOP + 10 + 20 * index
        out.append(f'<path d="M{x} {y}h26" {style[name]}/>')
        out.append(f'<text x="{x + 32}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join([*out, "</svg>", ""])


def _style(index: int, dashed: bool) -> str:
    dash = ' stroke-dasharray="5 3"' if dashed else ""
    thickness = 1.4 if dashed else 2.2
    colour = COLOURS[index % len(COLOURS)]
    return f'fill="none" stroke="{colour}" stroke-width="{thickness}"{dash}'


def _panel(panel: Panel, x0: int, style: dict[str, str], ylabel: str) -> list[str]:
    out = [f'<text x="{x0 + PANEL / 2:g}" y="20" text-anchor="middle">{escape(panel.title)}</text>']
    for power in range(panel.powers + 1):
        x = x0 + PANEL * power / panel.powers
        out.append(f'<path d="M{x:.1f} {TOP}v{HEIGHT}" stroke="#e4e4e4"/>')
        out.append(
            f'<text x="{x:.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{2**power}</text>'
        )
    for tick in range(6):
        y = TOP + HEIGHT * (1.0 - tick / 5)
        out.append(f'<path d="M{x0} {y:.1f}h{PANEL}" stroke="#e4e4e4"/>')
        out.append(f'<text x="{x0 - 6}" y="{y + 4:.1f}" text-anchor="end">{tick / 5:g}</text>')
    out.append(
        f'<rect x="{x0}" y="{TOP}" width="{PANEL}" height="{HEIGHT}" fill="none" stroke="#999999"/>'
    )
    middle = x0 + PANEL / 2
    out.append(
        f'<text x="{middle:g}" y="{TOP + HEIGHT + 34}" text-anchor="middle">'
        f"{escape(panel.xlabel)}</text>"
    )
    if ylabel:
        x, y = x0 - 36, TOP + HEIGHT / 2
        out.append(
            f'<text x="{x}" y="{y:g}" text-anchor="middle" transform="rotate(-90 {x} {y:g})">'
            f"{escape(ylabel)}</text>"
        )
    # The first line is drawn last, above the others.
    lines = reversed(panel.lines)
    return out + [f'<path d="{_path(line, panel, x0)}" {style[line.name]}/>' for line in lines]


def _path(line: Line, panel: Panel, x0: int) -> str:
    """The steps within the panel, drawn to its right edge."""
    pieces, last = [], 0.0
    for value, share in line.points:
        at = PANEL * math.log2(value) / panel.powers
        if at > PANEL:
            break
        x, y = x0 + at, TOP + HEIGHT * (1.0 - share)
        pieces.append(f"M{x:.1f} {y:.1f}" if not pieces else f"H{x:.1f}V{y:.1f}")
        last = y
    return "".join([*pieces, f"H{x0 + PANEL}"]) if pieces else f"M{x0} {last:.1f}"
