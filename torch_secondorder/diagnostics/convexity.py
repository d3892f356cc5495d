"""Whether a curvature is positive semidefinite, and what proves it or speaks for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_secondorder.diagnostics._krylov import Ending, Krylov, fitting
from torch_secondorder.diagnostics._point import Counted, check_count, generator_of, opened
from torch_secondorder.diagnostics.problem import Source

__all__ = ["Definiteness", "definiteness"]


@dataclass(frozen=True, slots=True)
class Definiteness:
    """The verdict on a symmetric matrix `A`, with its certificate.

    Attributes:
        semidefinite: False where negative curvature was found, which is proof. True where none was
            found, and an eigenvalue further below `curvature` than `tolerance` times the width of
            the spectrum would have been, but for `failure_probability`. None where the products did
            not suffice to say so.
        curvature: `v'A v / v'v`, from a product with `v` of its own: the lowest curvature found.
        direction: The unit vector `v`, shape `(n,)`.
        residual: `|A v - curvature v|`: within this distance there is an eigenvalue.
        magnitude: The largest absolute value of an eigenvalue seen, a lower bound of `|A|`.
        failure_probability: The bound that a verdict of True rests on, over random starts (0 where
            all of the spectrum was seen). The residual alone is no ground for it: it knows nothing
            of eigenvalues that have had no time to show.
        products: Products that were taken.
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
    """Asks whether a Hessian is positive semidefinite here, by Lanczos for its lowest eigenvalue.

    A direction of negative curvature (beyond rounding) ends the search at once. Else it goes on for
    as many products as make it unlikely that one was missed: about `log(1.6 sqrt(n) / p) / (2
    sqrt(tolerance))` (Kuczynski and Wozniakowski 1992, "Estimating the largest eigenvalue by the
    power and Lanczos algorithms with a random start", theorem 4.2), 200 for `n = 20,000`.

    Args:
        source: See `eigenpairs`.
        tolerance: How negative a curvature may be and still be missed, relative to the distance
            from the lowest eigenvalue to the highest; above 0.
        failure_probability: How probable it may be to miss more than that, between 0 and 1.
        max_products: The most products, at least 2.
        subspace: Vectors that the basis holds, at least 4. By default as many as are needed for a
            verdict, if they fit into 256 MiB; with fewer than needed, negative curvature is still
            looked for, but there is no verdict of True.
        generator: Where the start comes from; one with a fixed seed by default.
        progress: Whether to show a bar, see `eigenpairs`.

    Raises:
        TypeError: The source is of another kind.
        ValueError: An argument is out of range.
        RuntimeError: Loss or products are not finite, or have no derivative.

    >>> from torch_secondorder.curvature import Diagonal
    >>> answer = definiteness(Diagonal(torch.tensor([4.0, 2.0, -1.0])))
    >>> answer.semidefinite, answer.curvature < -0.9
    (False, True)
    """
    check_count("max_products", max_products, 2)
    for name, value in (("tolerance", tolerance), ("failure_probability", failure_probability)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {value!r}")
    if subspace is not None:
        check_count("subspace", subspace, 4)
    with opened(source, progress, max_products, "definiteness") as point:
        A = point.operator
        needed = _steps(A.size, tolerance, failure_probability)
        room = subspace or max(22, min(needed, fitting(A.size, A.dtype)))
        krylov = Krylov(A, min(room, A.size), generator_of(generator))
        search = _Search(krylov, A, needed, max_products - 1)
        # Ritz values rest on a recurrence; the certificate does not.
        v = krylov.vectors(search.ritz, 1)[:, 0]
        product = A @ v
        curvature = float(v.double() @ product.double())
        residual = float(torch.linalg.vector_norm(product - curvature * v))
        semidefinite = True if search.seen or search.steps >= needed else None
        if curvature < -krylov.precision:
            semidefinite = False
        failure = 0.0 if search.seen else _failure(A.size, search.steps, tolerance)
        magnitude = search.magnitude
        return Definiteness(semidefinite, curvature, v, residual, magnitude, failure, A.products)


class _Search:
    """Grows the space until its lowest value is negative, or would be if there were one.

    Attributes:
        ritz: The pairs in the end, lowest first.
        magnitude: The largest absolute value seen.
        seen: Whether the space has met all eigenvalues.
        steps: Products before the first restart; the bound is about them.
    """

    def __init__(self, krylov: Krylov, A: Counted, needed: int, max_products: int) -> None:
        ending = Ending(krylov, 1)
        self.magnitude, self.steps, due = 0.0, 0, 1
        while True:
            broken = krylov.breaks
            krylov.step()
            if not krylov.restarted:
                self.steps = A.products
            broke = krylov.breaks > broken
            last = krylov.exhausted or A.products >= max_products or self.steps >= needed
            if not (last or broke or krylov.full or A.products >= due):
                continue
            due = A.products + max(1, A.products // 10)
            self.ritz = krylov.ritz("smallest")
            self.magnitude = max(self.magnitude, float(self.ritz.values.abs().max()))
            self.seen = krylov.exhausted or (broke and ending.complete(self.ritz))
            # Far enough below zero to stay there when it is computed anew.
            if last or self.seen or float(self.ritz.values[0]) < -2 * krylov.precision:
                return
            if krylov.full:
                krylov.restart(self.ritz, 1 + (krylov.count - 1) // 2)


def _failure(size: int, steps: int, tolerance: float) -> float:
    """The bound on the probability of missing more than `tolerance` after so many steps."""
    exponent = -math.sqrt(tolerance) * (2 * steps - 1)
    return min(1.0, 1.648 * math.sqrt(size) * math.exp(exponent))


def _steps(size: int, tolerance: float, failure: float) -> int:
    """The steps after which the bound is that small; no more than there are dimensions."""
    logarithm = math.log(1.648 * math.sqrt(size) / failure)
    return min(size, math.ceil((logarithm / math.sqrt(tolerance) + 1) / 2))
