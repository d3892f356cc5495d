"""Some eigenpairs of a curvature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from torch_secondorder.diagnostics._krylov import Ending, Krylov, Ritz, Which, subspace_room
from torch_secondorder.diagnostics._point import Counted, check_count, generator_of, opened
from torch_secondorder.diagnostics.problem import Source

__all__ = ["Eigenpairs", "eigenpairs"]


@dataclass(frozen=True, slots=True)
class Eigenpairs:
    """Approximate eigenvalues and eigenvectors, best wanted first.

    Attributes:
        values: Shape `(k,)`, float64, on the host.
        vectors: Unit vectors as columns, `(n, k)`, in the dtype and on the device of the curvature;
            `Problem.named(vectors[:, 0])` shapes one like the parameters.
        residuals: `|A v - value v|` for each, `(k,)`. Within this distance of the value there is an
            eigenvalue; if it stands alone, it is nearer still, by the square of the residual over
            the gap.
        products: Products with the curvature that were taken.
        converged: Whether all residuals are as small as was asked for.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int
    converged: bool


def eigenpairs(
    source: Source,
    k: int = 10,
    which: Which = "largest",
    *,
    tolerance: float = 1e-3,
    max_products: int = 1000,
    subspace: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> Eigenpairs:
    """Some eigenpairs at an end of the spectrum, by Lanczos with thick restarts.

    The method of Wu and Simon 2000 with full reorthogonalization. A Krylov space uses all products
    since the start, where power iteration uses the last one. By default the basis takes up to
    256 MiB, so that for small models it is never restarted.

    Like all methods that start from one vector, it may return an eigenvalue that occurs several
    times only once; it finds the others where the Krylov space comes to an end, as for matrices of
    low rank.

    Args:
        source: A `Problem` (see `from_model`, `from_closure`), a `FunctionalObjective`, or any
            `LinearOperator`. Of the first two it is the Hessian, unless the problem says otherwise.
        k: How many, from 1 to `n - 1`.
        which: `"largest"` or `"smallest"` (with their signs), or `"magnitude"` for the largest
            absolute values.
        tolerance: The largest residual allowed, relative to the eigenvalue's absolute value, but
            no smaller than rounding.
        max_products: The most products.
        subspace: Vectors that the basis holds, more than `k + 1`.
        generator: Where the start comes from; one with a fixed seed by default.
        progress: Whether to show a bar; by default where tqdm is installed and stderr is a
            terminal.

    Raises:
        TypeError: The source is of another kind.
        ValueError: An argument is out of range.
        RuntimeError: Loss or products are not finite, or have no derivative.

    >>> from torch_secondorder.curvature import Diagonal
    >>> found = eigenpairs(Diagonal(torch.tensor([1.0, -5.0, 3.0, 2.0])), k=2)
    >>> [round(value, 4) for value in found.values.tolist()]
    [3.0, 2.0]
    """
    check_count("k", k)
    check_count("max_products", max_products, k)
    if subspace is not None:
        check_count("subspace", subspace)
    if which not in get_args(Which):
        raise ValueError(f"which must be one of {get_args(Which)}, got {which!r}")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must lie in [0, 1), got {tolerance!r}")
    with opened(source, progress, max_products, "eigenpairs") as point:
        A = point.operator
        if k >= A.size:
            raise ValueError(
                f"k must be below the number of parameters, {A.size}, got {k}; for all eigenvalues "
                "of a matrix this small call torch.linalg.eigh on it"
            )
        room = subspace_room(A.size, A.dtype, k) if subspace is None else min(subspace, A.size)
        if room < min(k + 2, A.size):
            raise ValueError(f"subspace must be at least k + 2 = {k + 2}, got {subspace}")
        krylov = Krylov(A, room, generator_of(generator))
        ritz, converged = _search(krylov, A, k, which, tolerance, max_products)
        return Eigenpairs(
            ritz.values[:k],
            krylov.vectors(ritz, k),
            ritz.residuals[:k],
            A.products,
            converged,
        )


def _search(
    krylov: Krylov, A: Counted, k: int, which: Which, tolerance: float, max_products: int
) -> tuple[Ritz, bool]:
    """Grows the space until the wanted pairs are good; returns them and whether they are."""
    ending, due = Ending(krylov, k), k
    while True:
        broken = krylov.breaks
        krylov.step()
        last = krylov.exhausted or A.products >= max_products
        if not (last or krylov.full or krylov.breaks > broken or A.products >= due):
            continue
        # The small eigenproblem is not free: it is solved after every tenth of the products more.
        due = A.products + max(1, A.products // 10)
        ritz = krylov.ritz(which)
        allowed = tolerance * ritz.values[:k].abs()
        converged = krylov.count >= k and ending.reached(ritz, allowed, krylov.breaks > broken)
        if converged or last:
            return ritz, converged
        if krylov.full:
            krylov.restart(ritz, k + (krylov.count - k) // 2)
