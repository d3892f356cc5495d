"""Cholesky factors of matrices with a diagonal added; in float32 too, with refinement."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from torch_secondorder._foundation.host_transfer import read_numbers

# Most corrections of a solution; each has to leave less than this share of what is missing.
_CORRECTIONS, _CONTRACTION = 20, 0.5


class Factor(Protocol):
    """A factorized matrix."""

    def solve(self, right: Tensor) -> Tensor | None:
        """The solution of the system, `(n,)`; None if the matrix is not positive definite at all.

        That can turn out late, see `RefinedCholesky`.
        """


class Cholesky:
    """The factor of a positive definite matrix.

    Args:
        factor: A lower triangle, `(n, n)`.
    """

    def __init__(self, factor: Tensor) -> None:
        self._factor = factor

    def solve(self, right: Tensor) -> Tensor:
        """See `Factor.solve`.

        Two triangular systems: `torch.cholesky_solve` copies the factor.
        """
        half = torch.linalg.solve_triangular(self._factor, right[:, None], upper=False)
        found: Tensor = torch.linalg.solve_triangular(self._factor.mT, half, upper=True)[:, 0]
        return found


def cholesky(
    matrix: Tensor, weights: float | Tensor, dtype: torch.dtype | None = None
) -> Factor | None:
    """The factor of a matrix with a diagonal added; None if it is not positive definite.

    Args:
        matrix: Symmetric, `(n, n)`.
        weights: The diagonal.
        dtype: The dtype of the factor. If it is narrower than that of the matrix, solutions are
            refined until they are as good as with a wide one, which takes over where that fails.
    """
    if dtype is not None and torch.finfo(dtype).bits < torch.finfo(matrix.dtype).bits:
        refined = RefinedCholesky(matrix, weights, dtype)
        if refined.refines:
            return refined
    return _wide(matrix, weights)


def _wide(matrix: Tensor, weights: float | Tensor) -> Cholesky | None:
    # The diagonal is added in place and taken back, which saves a copy of the matrix.
    diagonal = matrix.diagonal()
    before = diagonal.clone()
    diagonal.add_(weights)
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    diagonal.copy_(before)
    return None if int(failed) else Cholesky(factor)


class RefinedCholesky:
    """A factor of fewer digits, with iterative refinement (Higham 2002, section 12).

    Each correction is solved for in few digits and the residual computed in many, until the
    residual is as small as a stable method leaves it. Corrections contract if the condition of the
    matrix, scaled to a diagonal of ones, is below about `0.1 / eps` of the narrow dtype. If they do
    not, the matrix is factorized in its own dtype, in which it may not be positive definite.

    Args:
        matrix: Symmetric, `(n, n)`; it has to stay as it is.
        weights: The diagonal that is added.
        dtype: The narrow dtype.

    Attributes:
        refines: Whether the narrow factor is in use.
    """

    def __init__(self, matrix: Tensor, weights: float | Tensor, dtype: torch.dtype) -> None:
        self._matrix, self._weights, self._dtype = matrix, weights, dtype
        diagonal = matrix.diagonal() + weights
        # Powers of two: scaling rounds nothing.
        self._scale = torch.exp2(torch.frexp(diagonal.clamp(min=0).rsqrt()).exponent.to(diagonal))
        narrow = (matrix * self._scale[:, None]).mul_(self._scale)
        narrow.diagonal().copy_(diagonal * self._scale.square())
        self._size_of_matrix = torch.linalg.matrix_norm(narrow)
        factor, failed = torch.linalg.cholesky_ex(narrow.to(dtype))
        self._narrow = Cholesky(factor)
        self.refines = not int(failed)
        self._exact: Cholesky | None = None

    def solve(self, right: Tensor) -> Tensor | None:
        """See `Factor.solve`."""
        if self.refines:
            found = self._refined(right)
            if found is not None:
                return found
            self.refines, self._exact = False, _wide(self._matrix, self._weights)
        return None if self._exact is None else self._exact.solve(right)

    def _refined(self, right: Tensor) -> Tensor | None:
        """The solution; None if corrections do not contract."""
        scale, norm = self._scale, torch.linalg.vector_norm
        right = scale * right
        solution, missing = torch.zeros_like(right), right
        size_of_right = norm(right)
        eps, last = torch.finfo(right.dtype).eps, math.inf
        for _ in range(_CORRECTIONS):
            largest = missing.abs().amax().clamp(min=torch.finfo(right.dtype).tiny)
            correction = self._narrow.solve((missing / largest).to(self._dtype))
            solution = solution + largest * correction.to(right.dtype)
            x = scale * solution
            missing = right - scale * (torch.mv(self._matrix, x) + self._weights * x)
            allowed = eps * (self._size_of_matrix * norm(solution) + size_of_right)
            left, allowed_there = read_numbers(norm(missing), allowed)
            if left <= allowed_there:
                return x
            if not left <= _CONTRACTION * last:
                return None
            last = left
        return None
