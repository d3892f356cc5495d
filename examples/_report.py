"""How the examples show their results: an aligned table and a plot of loss curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Okabe and Ito's palette: told apart with any colour vision, and darker than its yellow on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")


@dataclass
class Curve:
    """Training loss along a run, against two measures of its cost."""

    seconds: list[float] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)

    def add(self, seconds: float, evaluations: int, loss: float) -> None:
        """Appends one point."""
        self.seconds.append(seconds)
        self.evaluations.append(evaluations)
        self.loss.append(loss)


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


def plot_curves(curves: Mapping[str, Curve], path: Path, *, title: str) -> None:
    """Draws loss against seconds and against closure evaluations, one line a label, into a file."""
    import matplotlib as mpl

    mpl.use("Agg")  # draws into a file, needs no display
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for i, (label, curve) in enumerate(curves.items()):
        style: dict[str, Any] = {
            "label": label,
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": DASHES[i % len(DASHES)],
            "linewidth": 1.8,
        }
        # The first point is the start, for which a logarithmic axis has no place.
        left.plot(curve.seconds[1:], curve.loss[1:], **style)
        right.plot(curve.evaluations[1:], curve.loss[1:], **style)
    _label_axes(left, "seconds", "training loss")
    _label_axes(right, "closure evaluations", "")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _label_axes(axes: Any, x_label: str, y_label: str) -> None:
    axes.set(xlabel=x_label, ylabel=y_label, xscale="log", yscale="log")
    axes.grid(visible=True, which="major", color="0.85")
    axes.grid(visible=True, which="minor", color="0.93", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
