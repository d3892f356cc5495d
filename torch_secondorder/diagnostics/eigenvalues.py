"""A few eigenpairs of a curvature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_choice, check_integer, check_number
from torch_secondorder.diagnostics._krylov import Convergence, Krylov, Which, subspace_room
from torch_secondorder.diagnostics._point import generator_of, opened
from torch_secondorder.diagnostics.problem import Source

__all__ = ["Eigenpairs", "eigenpairs"]


@dataclass(frozen=True, slots=True)
class Eigenpairs:
    """Approximate eigenvalues and eigenvectors, the most wanted first.

    Attributes:
        values: Shape `(k,)`, float64, on the host.
        vectors: Unit vectors as columns, `(n, k)`, in the dtype and on the device of the curvature;
            `Problem.named(vectors[:, 0])` shapes one like the parameters.
        residuals: `|A v - value v|` for each, `(k,)`. There is an eigenvalue within this distance
            of the value. If it is isolated, it is even closer: within the squared residual over
            the gap.
        products: Number of products with the curvature.
        converged: True if all residuals are within the tolerance.

    >>> from torch_secondorder.curvature import Diagonal
    >>> top = eigenpairs(Diagonal(torch.tensor([5.0, 1.0, 2.0])), k=1)
    >>> top.converged, round(top.values.item(), 4), top.vectors.shape
    (True, 5.0, torch.Size([3, 1]))
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
    """A few eigenpairs at an end of the spectrum, by Lanczos with thick restarts.

    This is the method of Wu and Simon 2000 with full reorthogonalization. A Krylov space uses all
    products since the start, while power iteration uses only the last one. By default the basis
    takes up to 256 MiB, so for small models it is never restarted.

    Like all methods that start from one vector, it may return a multiple eigenvalue only once. It
    finds the other copies if the Krylov space comes to an end, as for matrices of low rank.

    Args:
        source: A `Problem` (see `from_model`, `from_closure`), a `FunctionalObjective`, or any
            `LinearOperator`. The matrix of the first two is the Hessian, or the curvature that the
            problem was made with.
        k: Number of eigenpairs, from 1 to `n - 1`.
        which: `"largest"` or `"smallest"` (with their signs), or `"magnitude"` for the largest
            absolute values.
        tolerance: The largest residual allowed, relative to the eigenvalue's absolute value.
            Rounding is always allowed.
        max_products: The largest number of products.
        subspace: Number of basis vectors to hold, more than `k + 1`.
        generator: Source of the start vector; by default one with a fixed seed.
        progress: Shows a progress bar; None shows one if tqdm is installed and stderr is a
            terminal.

    Returns:
        `k` eigenvalues and eigenvectors with their residuals.

    Raises:
        TypeError: The source is of another kind.
        ValueError: An argument is out of range.
        RuntimeError: Loss or products are not finite, or have no derivative.

    >>> from torch_secondorder.curvature import Diagonal
    >>> found = eigenpairs(Diagonal(torch.tensor([1.0, -5.0, 3.0, 2.0])), k=2)
    >>> [round(value, 4) for value in found.values.tolist()]
    [3.0, 2.0]
    """
    check_integer("k", k)
    check_integer("max_products", max_products, k)
    check_integer("subspace", subspace, optional=True)
    check_choice("which", which, Which)
    check_number("tolerance", tolerance, low=0, below=1)
    with opened(source, progress, max_products, "eigenpairs") as point:
        A = point.operator
        if k >= A.size:
            raise ValueError(
                f"k must be below the number of parameters, {A.size}, got {k}; for all eigenvalues "
                "of such a small matrix call torch.linalg.eigh"
            )
        room = subspace_room(A.size, A.dtype, k) if subspace is None else min(subspace, A.size)
        if room < min(k + 2, A.size):
            raise ValueError(f"subspace must be at least k + 2 = {k + 2}, got {subspace}")
        krylov = Krylov(A, room, generator_of(generator))
        convergence = Convergence(krylov, k)
        for ritz, broke in krylov.search(k, which, max_products):
            allowed = tolerance * ritz.values[:k].abs()
            converged = krylov.count >= k and convergence.reached(ritz, allowed, broke)
            if converged:
                break
        return Eigenpairs(
            ritz.values[:k],
            krylov.vectors(ritz, k),
            ritz.residuals[:k],
            A.products,
            converged,
        )
