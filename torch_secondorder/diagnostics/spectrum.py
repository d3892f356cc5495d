"""The density of a curvature's eigenvalues."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_integer, check_number
from torch_secondorder._foundation.progress_bar import optional
from torch_secondorder.curvature._random import draw
from torch_secondorder.diagnostics._point import generator_of, opened
from torch_secondorder.diagnostics.problem import Source
from torch_secondorder.solvers import lanczos

__all__ = ["SpectralDensity", "spectral_density"]


@dataclass(frozen=True, slots=True)
class SpectralDensity:
    """The distribution of the eigenvalues of a matrix, as points with weights.

    Attributes:
        nodes: One row for each random vector, `(n_vectors, m)`, ascending; float64, on the host.
        weights: The share of the spectrum at each node, `(n_vectors, m)`; each row adds up to one.
            If a row has fewer nodes than others, it ends with nodes of weight zero.
        size: `n`, the number of eigenvalues.
        products: Number of products.

    >>> from torch_secondorder.curvature import Diagonal
    >>> spectrum = spectral_density(Diagonal(torch.tensor([1.0, 3.0])), n_vectors=2)
    >>> spectrum.nodes.shape, bool(spectrum.weights.sum(1).allclose(torch.ones(2).double()))
    (torch.Size([2, 2]), True)
    """

    nodes: Tensor
    weights: Tensor
    size: int
    products: int

    def average(self, function: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """The mean of a function over the eigenvalues, with its standard error.

        Args:
            function: Takes a tensor of eigenvalues, and applies to each entry.

        Returns:
            The mean, and its standard error over the random vectors (NaN for a single one).
            Multiplied by `size`, the mean is the trace of the function; for `torch.log` that is the
            log-determinant.
        """
        means = torch.where(self.weights > 0, self.weights * function(self.nodes), 0.0).sum(1)
        count = len(means)
        error = float(means.std()) / math.sqrt(count) if count > 1 else math.nan
        return float(means.mean()), error

    def density(self, grid: Tensor, width: float | None = None) -> Tensor:
        """The density on a grid: each node is a Gaussian; it integrates to one.

        Args:
            grid: Points, any shape.
            width: Standard deviation of the Gaussians; by default a hundredth of the spectrum.

        Returns:
            Shaped like `grid`, float64.

        Raises:
            ValueError: `width` is not positive.
        """
        width = self._width() if width is None else width
        check_number("width", width, above=0)
        points = grid.detach().to("cpu", torch.float64)
        distances = (points.reshape(-1, 1) - self.nodes.reshape(1, -1)) / width
        bells = torch.exp(-0.5 * distances**2) / (width * math.sqrt(2 * math.pi))
        return (bells @ self.weights.reshape(-1) / len(self.nodes)).reshape(points.shape)

    def plot(self, ax: Any = None, *, width: float | None = None) -> Any:
        """Plots the density with matplotlib, on a logarithmic scale.

        Args:
            ax: The axes to plot on; by default those of a new figure.
            width: See `density`.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        if ax is None:
            pyplot = optional("matplotlib.pyplot", "matplotlib", "plot()")
            ax = pyplot.subplots()[1]
        width = self._width() if width is None else width
        low, high = float(self.nodes.min()) - 5 * width, float(self.nodes.max()) + 5 * width
        grid = torch.linspace(low, high, 1000, dtype=torch.float64)
        # Densities far below one eigenvalue are rounding, and would stretch the scale.
        floor = 1e-3 / (self.size * width)
        ax.semilogy(grid.tolist(), self.density(grid, width).clamp_min(floor).tolist())
        ax.set_xlabel("eigenvalue")
        ax.set_ylabel("density")
        return ax

    def _width(self) -> float:
        spread = float(self.nodes.max() - self.nodes.min())
        return 0.01 * (spread or float(self.nodes.abs().max()) or 1.0)


def spectral_density(
    source: Source,
    n_vectors: int = 10,
    n_steps: int = 80,
    *,
    reorthogonalize: bool = True,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> SpectralDensity:
    """The eigenvalue density by stochastic Lanczos quadrature (Ghorbani, Krishnan and Xiao 2019).

    For each of `n_vectors` Gaussian vectors, `n_steps` products give a Gauss quadrature of the
    spectrum as seen by that vector. The density is their mean, and its moments up to degree
    `2 n_steps - 1` are exact in expectation.

    Args:
        source: See `eigenpairs`.
        n_vectors: Number of random vectors.
        n_steps: Number of products for each; fewer if these already give the whole spectrum.
        reorthogonalize: Holds `n_steps` vectors and keeps them orthogonal. If False, three are
            held, and an isolated eigenvalue appears as several nodes that share its weight.
        generator: Source of the random vectors; by default one with a fixed seed.
        progress: Shows a progress bar, see `eigenpairs`.

    Returns:
        Nodes and weights of the density; `plot()` draws it.

    Raises:
        TypeError: The source is of another kind.
        ValueError: A number is below one.
        RuntimeError: Loss or products are not finite, or have no derivative.

    >>> from torch_secondorder.curvature import Diagonal
    >>> spectrum = spectral_density(Diagonal(torch.tensor([1.0, 2.0])), n_vectors=3)
    >>> [round(node, 4) for node in spectrum.nodes[0].tolist()]
    [1.0, 2.0]
    """
    check_integer("n_vectors", n_vectors)
    check_integer("n_steps", n_steps)
    generator = generator_of(generator)
    with opened(source, progress, n_vectors * n_steps, "spectral density") as point:
        A = point.operator
        rows = []
        for _ in range(n_vectors):
            start = draw(A.size, "gaussian", generator, dtype=A.dtype, device=A.device)
            values, first = lanczos(A, start, n_steps, reorthogonalize=reorthogonalize).eigh()
            rows.append((values, first.square()))
        return SpectralDensity(
            _stacked([values for values, _ in rows], repeat_last=True),
            _stacked([weights for _, weights in rows], repeat_last=False),
            A.size,
            A.products,
        )


def _stacked(rows: list[Tensor], *, repeat_last: bool) -> Tensor:
    """Rows of different lengths as one tensor, padded with their last entry or zero."""
    longest = max(map(len, rows))
    filled = [
        torch.cat([row, (row[-1:] if repeat_last else row.new_zeros(1)).expand(longest - len(row))])
        for row in rows
    ]
    return torch.stack(filled)
