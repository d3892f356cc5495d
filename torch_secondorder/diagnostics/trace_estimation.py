"""The trace of a curvature."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_integer
from torch_secondorder.curvature._random import draw
from torch_secondorder.diagnostics._point import Counted, generator_of, opened
from torch_secondorder.diagnostics.problem import Source

__all__ = ["TraceEstimate", "trace"]


@dataclass(frozen=True, slots=True)
class TraceEstimate:
    """An estimate of a trace.

    Attributes:
        value: The estimate.
        standard_error: Estimated from the spread of the random part; 0 if there is no random part,
            NaN if it has a single sample.
        low_rank: The exact trace in the subspace found, `tr(Q'A Q)`.
        products: Number of products.

    >>> from torch_secondorder.curvature import Diagonal
    >>> estimate = trace(Diagonal(torch.tensor([1.0, 3.0])))
    >>> round(estimate.value, 4), estimate.standard_error
    (4.0, 0.0)
    """

    value: float
    standard_error: float
    low_rank: float
    products: int


def trace(
    source: Source,
    n_products: int = 90,
    *,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> TraceEstimate:
    """The trace by Hutch++ (Meyer, Musco, Musco and Woodruff 2021).

    A third of the products finds the subspace `Q` of the largest eigenvalues, as `A` times random
    signs. A third computes the trace there exactly, and a third is used for Hutchinson's estimate
    of the rest, whose variance comes from the small eigenvalues alone. The error falls like one
    over the number of products, Hutchinson's like one over its square root. The result is exact up
    to rounding if the rank is at most a third of `n_products`, or the size at most `n_products`. If
    eigenvalues decay slowly, a third of a few products finds too small a subspace to be worth it:
    `Hutchinson` in `torch_secondorder.curvature` is then as good, up to about 100 products for the
    Hessian of a small network.

    Args:
        source: See `eigenpairs`.
        n_products: Number of products, at least 3.
        generator: Source of random signs; by default one with a fixed seed.
        progress: Shows a progress bar, see `eigenpairs`.

    Returns:
        The estimate with its standard error.

    Raises:
        TypeError: The source is of another kind.
        ValueError: `n_products` is below 3.
        RuntimeError: Loss or products are not finite, or have no derivative.

    >>> from torch_secondorder.curvature import Diagonal
    >>> estimate = trace(Diagonal(torch.tensor([1.0, 2.0, 4.0])))
    >>> estimate.value, estimate.standard_error, estimate.products
    (7.0, 0.0, 3)
    """
    check_integer("n_products", n_products, 3)
    with opened(source, progress, n_products, "trace") as point:
        A = point.operator
        if n_products >= A.size:
            return _exact(A)
        generator = generator_of(generator)
        k = n_products // 3
        Q = torch.linalg.qr(A.matmat(_signs(A, k, generator)))[0]
        low_rank = _inner(Q, A.matmat(Q)).sum().item()
        G = _signs(A, n_products - 2 * k, generator)
        for _ in range(2):  # the second time removes rounding errors
            G = G - Q @ (Q.T @ G)
        samples = _inner(G, A.matmat(G))
        count = len(samples)
        error = samples.std().item() / math.sqrt(count) if count > 1 else math.nan
        return TraceEstimate(low_rank + samples.mean().item(), error, low_rank, A.products)


def _exact(A: Counted) -> TraceEstimate:
    total = 0.0
    for places in torch.arange(A.size, device=A.device).split(64):
        columns = torch.zeros(A.size, len(places), dtype=A.dtype, device=A.device)
        each = torch.arange(len(places), device=A.device)
        columns[places, each] = 1.0
        total += A.matmat(columns)[places, each].double().sum().item()
    return TraceEstimate(total, 0.0, total, A.products)


def _signs(A: Counted, count: int, generator: torch.Generator) -> Tensor:
    columns = [
        draw(A.size, "rademacher", generator, dtype=A.dtype, device=A.device) for _ in range(count)
    ]
    return torch.stack(columns, 1)


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """The inner products of columns, in float64."""
    return (left.double() * right.double()).sum(0)
