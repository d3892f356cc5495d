"""The Lanczos process: a large symmetric operator seen through a small tridiagonal matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot, isfinite

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_integer
from torch_secondorder._params.space import WHOLE, Space, to_host
from torch_secondorder.curvature import LinearOperator

__all__ = ["ROUNDING", "Tridiagonal", "lanczos", "orthogonalized", "three_terms"]


@dataclass(frozen=True, slots=True)
class Tridiagonal:
    """The matrix `T = Q'A Q` of an operator `A` in an orthonormal basis `Q` of a Krylov space.

    Its eigenvalues, the Ritz values, approach those at both ends of the spectrum of `A` first
    (Golub and Van Loan 2013, section 10.1). The small matrices are float64 and on the host.

    Attributes:
        diagonal: Of `T`, shape `(k,)`.
        off_diagonal: Beside it, shape `(k - 1,)`, positive.
        basis: The rows are the vectors of `Q`, the first one parallel to the start; shape
            `(k, n)`. None if it was not kept.
        residual: `|A Q - Q T|`, which lies in the last column alone; 0 if the space is invariant.

    >>> from torch_secondorder.curvature import Diagonal
    >>> T = lanczos(Diagonal(torch.tensor([1.0, 3.0])), torch.ones(2), steps=2)
    >>> [round(value, 4) for value in T.eigh()[0].tolist()]
    [1.0, 3.0]
    """

    diagonal: Tensor
    off_diagonal: Tensor
    basis: Tensor | None
    residual: float

    def eigh(self) -> tuple[Tensor, Tensor]:
        """The Ritz values, and the first components of the eigenvectors of `T`.

        The squares of the components are the weights of a Gauss quadrature: `start'f(A) start` is
        near `|start|^2` times their sum over `f(Ritz value)`, which is what stochastic Lanczos
        quadrature averages (Golub and Meurant 2010, chapter 7).

        Returns:
            Shape `(k,)` both, float64; the values ascend.
        """
        values, vectors = self._decomposed()
        return values, vectors[0]

    def residuals(self) -> Tensor:
        """`|A y - theta y|` for every Ritz value `theta` and its unit Ritz vector `y`.

        Within this distance of the Ritz value there is an eigenvalue of `A`. It is known from `T`
        alone: the last component of the eigenvector times `residual` (Parlett 1998, section 13.2).

        Returns:
            Shape `(k,)`, float64, in the order of `eigh`.
        """
        return self.residual * self._decomposed()[1][-1].abs()

    def ritz_vectors(self, indices: Sequence[int]) -> Tensor:
        """Unit Ritz vectors, as the columns of a matrix.

        Args:
            indices: Which ones, in the order of `eigh`: 0 for the lowest value, -1 for the highest.

        Returns:
            Shape `(n, len(indices))`, in the dtype and on the device of the basis.

        Raises:
            ValueError: If the basis was not kept.
            IndexError: If an index is out of range.
        """
        if self.basis is None:
            raise ValueError("Ritz vectors need the basis; call lanczos with reorthogonalize=True")
        chosen = self._decomposed()[1][:, list(indices)]
        return self.basis.T @ chosen.to(self.basis)

    def _decomposed(self) -> tuple[Tensor, Tensor]:
        beside = self.off_diagonal
        full = self.diagonal.diag() + beside.diag(1) + beside.diag(-1)
        values, vectors = torch.linalg.eigh(full)
        return values, vectors


def lanczos(
    A: LinearOperator, start: Tensor, steps: int, *, reorthogonalize: bool = True
) -> Tridiagonal:
    """Runs the Lanczos process (Lanczos 1950), with one product per step.

    In floating point the basis loses its orthogonality as soon as a Ritz value converges, and
    copies of that value appear. Every new vector is therefore made orthogonal to all before it,
    twice, which is enough (Giraud, Langou and Rozloznik 2005). Without, no basis is kept: three
    vectors are held instead of `steps`, and Ritz values at the ends of the spectrum are still
    right, but come in copies.

    The process ends early where the Krylov space is invariant, that is, where what is left of a
    product is no more than its rounding. Rounding may hide such an end: more steps than there are
    dimensions then follow, with weights near zero. The host waits for the device once per step.

    Args:
        A: A symmetric operator.
        start: Shape `(n,)`, not zero; it need not be a unit vector.
        steps: The most steps; `n` at most are done.
        reorthogonalize: Whether to keep the basis and to reorthogonalize against it.

    Returns:
        The tridiagonal matrix of as many steps as were done.

    Raises:
        ValueError: If `steps` is below 1, or `start` has another shape, is zero or not finite.
        RuntimeError: If a product is not finite.

    Example:
        >>> from torch_secondorder.curvature import Diagonal
        >>> A = Diagonal(torch.tensor([1.0, 2.0, 4.0]))
        >>> tridiagonal = lanczos(A, torch.ones(3), steps=10)
        >>> values, first = tridiagonal.eigh()
        >>> [round(value, 4) for value in values.tolist()]
        [1.0, 2.0, 4.0]
        >>> [round(weight, 4) for weight in first.square().tolist()]
        [0.3333, 0.3333, 0.3333]
    """
    check_integer("steps", steps)
    if start.shape != (A.size,):
        raise ValueError(f"start must have shape ({A.size},), got {tuple(start.shape)}")
    start = start.detach()
    (norm,) = to_host(torch.linalg.vector_norm(start))
    if norm == 0.0 or not isfinite(norm):
        raise ValueError(f"start must be finite and not zero, but its norm is {norm}")
    basis = start.new_empty((min(steps, A.size), A.size)) if reorthogonalize else None
    process = _Process(A, start / norm, basis)
    while process.step() and len(process.diagonal) < min(steps, A.size):
        process.advance()
    return process.result()


def three_terms(
    product: Tensor, v: Tensor, u: Tensor, before: Tensor, beta: float, space: Space = WHOLE
) -> tuple[Tensor, Tensor]:
    """One step of the recurrence: `product - beta * before - alpha * u`.

    In exact arithmetic the result is orthogonal to all vectors before it.

    Args:
        product: `A v`.
        v: The newest vector.
        u: The same, before it was multiplied by a preconditioner.
        before: The `u` before. Its memory holds the result.
        beta: Its coefficient, from the step before.
        space: Where the vectors live.

    Returns:
        The result and `alpha`, 0-dim.
    """
    rest = torch.add(product, before, alpha=-beta, out=before)
    alpha = space.total(torch.dot(v, rest))
    return rest.addcmul_(u, alpha, value=-1.0), alpha


def orthogonalized(
    product: Tensor, basis: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Makes a vector orthogonal to orthonormal rows, twice, for rounding.

    Args:
        product: Shape `(n,)`.
        basis: Shape `(k, n)`.
        out: Memory for the result.

    Returns:
        The result, and the coefficients taken away the first and the second time, shape `(k,)`.
    """
    first = basis @ product
    rest = torch.addmv(product, basis.T, first, alpha=-1.0, out=out)
    second = basis @ rest
    return rest.addmv_(basis.T, second, alpha=-1.0), first, second


#: Units of precision below which a remainder is none; of dense matrices it was up to 40 units.
ROUNDING = 100.0


class _Process:
    """The state of the process.

    Attributes:
        v: The newest vector of the basis.
        rest: What the product with it leaves outside the basis.
        residual: The length of it.
        magnitude: The largest column of `T` so far, a lower bound of `|A|`.
    """

    def __init__(self, A: LinearOperator, v: Tensor, basis: Tensor | None) -> None:
        self.A, self.v, self.basis = A, v, basis
        self.rest = torch.zeros_like(v)  # so far the vector before v, and a place to write to
        self.residual = self.magnitude = 0.0
        self.diagonal: list[float] = []
        self.off_diagonal: list[float] = []

    def step(self) -> bool:
        """Adds a column to `T`, and tells whether anything is left that is more than rounding."""
        product = (self.A @ self.v).detach()
        before = self.residual
        if self.basis is None:
            _, entry = three_terms(product, self.v, self.v, self.rest, self.residual)
        else:
            basis = self.basis[: len(self.diagonal) + 1]
            basis[-1] = self.v
            _, first, _ = orthogonalized(product, basis, self.rest)
            entry = first[-1]
        alpha, self.residual = to_host(entry, torch.linalg.vector_norm(self.rest))
        if not (isfinite(alpha) and isfinite(self.residual)):
            raise RuntimeError(f"the product in step {len(self.diagonal) + 1} is not finite")
        self.diagonal.append(alpha)
        self.magnitude = max(self.magnitude, hypot(before, alpha, self.residual))
        return self.residual > ROUNDING * torch.finfo(self.v.dtype).eps * self.magnitude

    def advance(self) -> None:
        """Normalizes what is left to the next vector."""
        self.off_diagonal.append(self.residual)
        self.v, self.rest = self.rest.mul_(1.0 / self.residual), self.v

    def result(self) -> Tridiagonal:
        """The matrix of the steps done."""
        count = len(self.diagonal)
        basis = self.basis
        if basis is not None and count < len(basis):
            basis = basis[:count].clone()  # lets go of the rows that were not needed
        return Tridiagonal(
            diagonal=torch.tensor(self.diagonal, dtype=torch.float64),
            off_diagonal=torch.tensor(self.off_diagonal, dtype=torch.float64),
            basis=basis,
            residual=self.residual,
        )
