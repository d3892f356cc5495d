"""Plots of one-layer autoencoders: spectra, contraction, filters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from _report import Line, line_style, pyplot, style_axes

FILTERS = 20  # shown for each autoencoder, in two rows


@dataclass(frozen=True)
class Figures:
    """The plotted data of one autoencoder.

    Attributes:
        label: Its name.
        spectrum: Singular values of its Jacobian, largest first.
        ratios: Contraction ratios along distances between images.
        filters: Weights of its units, shape ``(units, pixels)``, the most important ones first.
    """

    label: str
    spectrum: Sequence[float]
    ratios: Line
    filters: Tensor


def plot(drawn: Sequence[Figures], path: Path, *, title: str) -> None:
    """Plots spectra, contraction ratios and filters into a file."""
    plt = pyplot()
    figure = plt.figure(figsize=(13, 7), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.25])
    above, below = left.subplots(2, 1)
    for i, entry in enumerate(drawn):
        above.plot(
            range(1, len(entry.spectrum) + 1), entry.spectrum, label=entry.label, **line_style(i)
        )
        below.plot(*entry.ratios, label=entry.label, **line_style(i))
    style_axes(
        above,
        xlabel="index",
        ylabel="singular value of the Jacobian",
        yscale="log",
    )
    largest = max(entry.spectrum[0] for entry in drawn)
    above.set_ylim(1e-3 * largest, 1.5 * largest)
    above.legend(frameon=False)
    style_axes(
        below,
        xlabel="distance between image and test image",
        ylabel="distance between codes / between images",
        xscale="log",
    )
    below.set_ylim(bottom=0)
    blocks = right.subfigures(len(drawn), 1, squeeze=False)[:, 0]
    for entry, block in zip(drawn, blocks, strict=True):
        draw_filters(block, entry)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_filters(block: Any, entry: Figures) -> None:
    """Draws weights as images, each on its own scale: blue below zero, red above."""
    side = round(entry.filters.shape[1] ** 0.5)
    block.suptitle(entry.label, fontsize="medium")
    cells = block.subplots(2, FILTERS // 2)
    for cell in cells.flat:
        cell.set_axis_off()
    for image, cell in zip(entry.filters, cells.flat, strict=False):
        bound = float(image.abs().max()) or 1.0
        cell.imshow(image.reshape(side, side), cmap="RdBu_r", vmin=-bound, vmax=bound)
