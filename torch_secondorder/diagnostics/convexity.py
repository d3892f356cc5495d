"""A test for positive semidefiniteness, with a certificate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_integer, check_number
from torch_secondorder.diagnostics._krylov import Convergence, Krylov, vectors_in_memory
from torch_secondorder.diagnostics._point import generator_of, opened
from torch_secondorder.diagnostics.problem import Source

__all__ = ["Definiteness", "definiteness"]


@dataclass(frozen=True, slots=True)
class Definiteness:
    """The verdict on a symmetric matrix `A`, with its certificate.

    Attributes:
        semidefinite: False if negative curvature was found, which is a proof. True if none was
            found, although an eigenvalue further below `curvature` than `tolerance` times the width
            of the spectrum would have been found, except with `failure_probability`. None if there
            were too few products for a verdict.
        curvature: `v'A v / v'v`, the lowest curvature found, from a separate product with `v`.
        direction: The unit vector `v`, shape `(n,)`.
        residual: `|A v - curvature v|`: within this distance there is an eigenvalue.
        magnitude: The largest absolute value of an eigenvalue seen, a lower bound of `|A|`.
        failure_probability: The bound behind a verdict of True, over random starts; 0 if the whole
            spectrum was seen. A small residual alone would prove nothing: lower eigenvalues may not
            have shown yet.
        products: Number of products.

    >>> from torch_secondorder.curvature import Diagonal
    >>> verdict = definiteness(Diagonal(torch.tensor([3.0, 1.0, 0.5])))
    >>> verdict.semidefinite, verdict.failure_probability < 1e-2
    (True, True)
    """

    semidefinite: bool | None
    curvature: float
    direction: Tensor
    residual: float
    magnitude: float
    failure_probability: float
    products: int


def definiteness(
    source: Source,
    *,
    tolerance: float = 1e-3,
    failure_probability: float = 1e-3,
    max_products: int = 500,
    subspace: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> Definiteness:
    """Tests for positive semidefiniteness, by the Lanczos process for the lowest eigenvalue.

    A direction of negative curvature (beyond rounding) ends the search at once. Otherwise it
    continues until it is unlikely that one was missed, for about
    `log(1.6 sqrt(n) / p) / (2 sqrt(tolerance))` products, 200 for `n = 20,000` (Kuczynski and
    Wozniakowski 1992, "Estimating the largest eigenvalue by the power and Lanczos algorithms with a
    random start", theorem 4.2).

    Args:
        source: See `eigenpairs`.
        tolerance: Negative curvature that may be missed, relative to the distance between the
            lowest and the highest eigenvalue; above 0.
        failure_probability: Probability of missing more than that, between 0 and 1.
        max_products: The largest number of products, at least 2.
        subspace: Number of basis vectors to hold, at least 4. By default as many as a verdict
            needs, if they fit into 256 MiB. With fewer, negative curvature can still be found, but
            there is no verdict of True.
        generator: Source of the start vector; by default one with a fixed seed.
        progress: Shows a progress bar, see `eigenpairs`.

    Returns:
        The verdict with its certificate.

    Raises:
        TypeError: The source is of another kind.
        ValueError: An argument is out of range.
        RuntimeError: Loss or products are not finite, or have no derivative.

    >>> from torch_secondorder.curvature import Diagonal
    >>> answer = definiteness(Diagonal(torch.tensor([4.0, 2.0, -1.0])))
    >>> answer.semidefinite, answer.curvature < -0.9
    (False, True)
    """
    check_integer("max_products", max_products, 2)
    for name, value in (("tolerance", tolerance), ("failure_probability", failure_probability)):
        check_number(name, value, above=0, below=1)
    check_integer("subspace", subspace, 4, optional=True)
    with opened(source, progress, max_products, "definiteness") as point:
        A = point.operator
        needed = _steps(A.size, tolerance, failure_probability)
        room = subspace or max(22, min(needed, vectors_in_memory(A.size, A.dtype)))
        krylov = Krylov(A, min(room, A.size), generator_of(generator))
        convergence, magnitude = Convergence(krylov, 1), 0.0
        # After a restart the bound for a verdict of True does not apply.
        enough = needed if room >= needed else max_products
        for ritz, broke in krylov.search(1, "smallest", min(enough, max_products - 1)):
            if not krylov.restarted:
                steps = krylov.steps
            magnitude = max(magnitude, float(ritz.values.abs().max()))
            seen = krylov.exhausted or (broke and convergence.complete(ritz))
            # Far enough below zero to stay negative in a separate product.
            if seen or float(ritz.values[0]) < -2 * krylov.precision:
                break
        # A separate product, because Ritz values rely on the recurrence.
        v = krylov.vectors(ritz, 1)[:, 0]
        product = A @ v
        curvature = float(v.double() @ product.double())
        residual = float(torch.linalg.vector_norm(product - curvature * v))
        semidefinite = True if seen or steps >= needed else None
        if curvature < -krylov.precision:
            semidefinite = False
        failure = 0.0 if seen else _failure(A.size, steps, tolerance)
        return Definiteness(semidefinite, curvature, v, residual, magnitude, failure, A.products)


def _failure(size: int, steps: int, tolerance: float) -> float:
    """The bound on the probability of missing more than `tolerance` after a number of steps."""
    exponent = -math.sqrt(tolerance) * (2 * steps - 1)
    return min(1.0, 1.648 * math.sqrt(size) * math.exp(exponent))


def _steps(size: int, tolerance: float, failure: float) -> int:
    """Number of steps after which the bound is `failure`, at most the number of dimensions."""
    logarithm = math.log(1.648 * math.sqrt(size) / failure)
    return min(size, math.ceil((logarithm / math.sqrt(tolerance) + 1) / 2))
