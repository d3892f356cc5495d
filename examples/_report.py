"""Output of the examples: aligned tables and plots of curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Okabe and Ito's palette for any colour vision; a brown for its yellow, which is faint on white.
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7"),
    *("#E69F00", "#56B4E9", "#000000", "#8C510A"),
)
DASHES = ("-", "--", "-.", ":")

Line = tuple[Sequence[float], Sequence[float]]


@dataclass
class Curve:
    """Training loss and task-specific score along a run, with three measures of cost."""

    seconds: list[float] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def add(self, seconds: float, evaluations: int, loss: float, score: float, steps: int) -> None:
        """Appends one point."""
        self.seconds.append(seconds)
        self.evaluations.append(evaluations)
        self.steps.append(steps)
        self.loss.append(loss)
        self.score.append(score)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligns a table for the terminal: the first column to the left, the others to the right.

    >>> print(format_table(["name", "loss"], [["sgd", "0.5"], ["adam", "0.25"]]))
    name  loss
    ----------
    sgd    0.5
    adam  0.25
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in others)])

    body = [line(row) for row in rows]
    return "\n".join([line(header), "-" * len(line(header)), *body])


def write_results(
    path: Path | None, example: str, results: Mapping[str, Mapping[str, float]]
) -> None:
    """Writes results by label for programs, in the form of `scripts/bench.py --json`.

    Args:
        path: The file, or None for none.
        example: The name of the example.
        results: Numbers by their names, for each label.
    """
    if path is None:
        return
    named = {f"examples.{example}.{label}": dict(found) for label, found in results.items()}
    path.write_text(json.dumps({"results": named}, indent=1) + "\n", encoding="utf-8")


def plot_curves(curves: Mapping[str, Curve], path: Path, *, title: str) -> None:
    """Plots loss against seconds and against closure evaluations, one line per label, to a file."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for i, (label, curve) in enumerate(curves.items()):
        # Without the first point: its time is zero, which a logarithmic axis cannot show.
        left.plot(curve.seconds[1:], curve.loss[1:], label=label, **line_style(i))
        right.plot(curve.evaluations[1:], curve.loss[1:], **line_style(i))
    scales = {"xscale": "log", "yscale": "log"}
    style_axes(left, xlabel="seconds", ylabel="training loss", **scales)
    style_axes(right, xlabel="closure evaluations", **scales)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_spread(axes: Any, lines: Sequence[Line], i: int, label: str) -> None:
    """Plots the mean of several lines, and shades their range.

    Args:
        axes: The axes to plot on.
        lines: The same quantity in several runs, each at its own increasing abscissas.
        i: Number of the line's style, see `line_style`.
        label: Label in the legend.
    """
    import numpy as np

    # Only the range that all runs cover; each run has its own points.
    start, end = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    common = np.unique([v for x, _ in lines for v in x if start <= v <= end])
    values = np.array([np.interp(common, x, y) for x, y in lines])
    look = line_style(i)
    axes.plot(common, values.mean(axis=0), label=label, **look)
    axes.fill_between(
        common, values.min(axis=0), values.max(axis=0), color=look["color"], alpha=0.15, lw=0
    )


def pyplot() -> Any:
    """Returns matplotlib's plotting module, set up to plot into files, without a display."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def line_style(i: int) -> dict[str, Any]:
    """The style of the i-th line in a plot."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        # Another dash in each round of the colours.
        "linestyle": DASHES[(i + i // len(COLOURS)) % len(DASHES)],
        "linewidth": 1.8,
    }


def style_axes(axes: Any, **settings: str) -> None:
    """Gives axes a quiet grid and no box; `settings` are the labels and the scales."""
    axes.set(**settings)
    axes.grid(visible=True, which="major", color="0.85")
    axes.grid(visible=True, which="minor", color="0.93", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
