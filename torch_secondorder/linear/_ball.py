"""Least squares within a ball on a matrix-free operator, in Krylov spaces of growing dimension."""

from __future__ import annotations

from math import ceil, hypot, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from torch_secondorder.linear._bidiagonalization import Bidiagonalization
from torch_secondorder.linear._secular import solve_secular
from torch_secondorder.linear.iterative import KrylovStatus
from torch_secondorder.linear.operators import RectangularOperator

# Up to here the small problem is solved after every step, and then after a tenth more of them.
_EVERY = 20
_MOST = 500


class Ball(NamedTuple):
    """A solution within a ball.

    Attributes:
        x: The solution, shaped like the rows of the operator.
        multiplier: The multiplier of the bound.
        iterations: Steps of the bidiagonalization.
        status: The reason why it stopped.
    """

    x: Tensor
    multiplier: float
    iterations: int
    status: KrylovStatus


def solve_in_ball(
    A: RectangularOperator, b: Tensor, radius: float, atol: float, max_iterations: int | None
) -> Ball:
    """Minimizes `|A x - b|` over `|x| <= radius`."""
    process = Bidiagonalization(A, b)
    shape = process.v.shape
    if not process.beta or not process.alpha:
        ending = KrylovStatus.LEAST_SQUARES if process.beta else KrylovStatus.CONSISTENT
        return Ball(torch.zeros_like(process.v), 0.0, 0, ending)
    most = max_iterations or min(_MOST, process.v.numel(), b.numel())
    unit = process.unit_of_b / process.unit
    small = _Projected(process.beta, radius / unit, torch.finfo(b.dtype).eps)
    basis = process.v.new_empty((min(most, _EVERY), process.v.numel()))
    status: KrylovStatus | None = None if process.finite else KrylovStatus.NONFINITE
    count, due = 0, 1
    while status is None:
        if count == len(basis):
            basis = torch.cat([basis, torch.empty_like(basis[: most - count])])
        basis[count] = process.v.flatten()
        alpha = process.alpha
        process.step(basis=basis[: count + 1])
        if not process.finite:
            status = KrylovStatus.NONFINITE
            break
        count += 1
        small.grow(alpha, process.beta)
        if count >= min(due, most):
            status = small.solve(process.alpha, atol)
            due = count + 1 if count < _EVERY else ceil(1.1 * count)
        if status is None and count >= most:
            status = KrylovStatus.MAX_ITERATIONS
    if status is KrylovStatus.NONFINITE and count:
        small.solve(0.0, atol)
    y = (small.y * unit).to(basis)
    x = (basis[: len(y)].T @ y).view(shape)
    return Ball(x, small.multiplier * process.unit * process.unit, count, status)


class _Projected:
    """The problem in the Krylov space: `min |B y - beta e1|` over `|y| <= radius`.

    Attributes:
        y: Its solution, shape `(j,)`, float64 and on the host.
        multiplier: The multiplier.
    """

    def __init__(self, beta: float, radius: float, precision: float) -> None:
        self.y, self.multiplier = torch.zeros(0, dtype=torch.float64), 0.0
        self._first, self._radius, self._precision = beta, radius, precision
        self._diagonal: list[float] = []
        self._below: list[float] = []
        self._norm = 0.0  # of B, Frobenius

    def grow(self, alpha: float, beta: float) -> None:
        """Adds a column to `B`."""
        self._diagonal.append(alpha)
        self._below.append(beta)
        self._norm = hypot(self._norm, alpha, beta)

    def solve(self, alpha: float, atol: float) -> KrylovStatus | None:
        """Solves the problem, and tells whether that of the operator is solved with it.

        Args:
            alpha: The entry of `B` that would be next on the diagonal.
            atol: The tolerance.
        """
        size = len(self._diagonal)
        B = torch.zeros(size + 1, size, dtype=torch.float64)
        B.diagonal().copy_(torch.tensor(self._diagonal, dtype=B.dtype))
        B.diagonal(-1).copy_(torch.tensor(self._below, dtype=B.dtype))
        U, s, Vh = torch.linalg.svd(B, full_matrices=False)
        kept = s > self._precision * s[0]
        c = self._first * U[0][kept]
        found = solve_secular(s[kept], c[:, None], s.new_tensor([self._radius]))
        self.y, self.multiplier = Vh[kept].T @ found.x[:, 0], float(found.multiplier[0])
        rest = -(B @ self.y)
        rest[0] += self._first
        norm, length = float(rest.norm()), float(self.y.norm())
        atol = max(atol, self._precision)
        if norm <= atol * (self._first + self._norm * length):
            return KrylovStatus.CONSISTENT
        # All of the gradient outside of the space lies along the next vector.
        gradient = alpha * abs(float(rest[-1]))
        root = sqrt(self.multiplier)
        small = gradient <= atol * hypot(self._norm, root) * hypot(norm, root * length)
        return KrylovStatus.LEAST_SQUARES if small else None
