"""Estimates of multipliers by least squares, from gradients and values at one point.

The multipliers `y` minimize `|grad + J'y|^2 + |s y|^2`, `s` the slack of each inequality, and
`y >= 0` for these: an inequality that is far from its bound is to have none (Nocedal and Wright
2006, equation 19.38, with the barrier parameter zero and the signs kept). At a point where the
conditions of first order hold the minimum is zero, so the estimates are multipliers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_secondorder.solvers._multiplier_quadratic import solve


def dependence(precision: float) -> float:
    """The relative singular value below which rows count as dependent.

    Products of rows round where its square is, and the rows themselves at their precision.

    Args:
        precision: The machine epsilon that the rows were computed with.
    """
    return max(1e-7, 100.0 * precision)


@dataclass(frozen=True, slots=True)
class AtBounds:
    """The entries of the parameters that are at their bounds.

    Attributes:
        low: A mask, `(n,)`.
        high: Another one.
    """

    low: Tensor
    high: Tensor

    def free(self, slope: Tensor) -> Tensor:
        """The entries that no bound holds against a step down a slope, a mask `(n,)`."""
        return ~((self.low & (slope >= 0)) | (self.high & (slope <= 0)))


def estimated_multipliers(
    jacobian: Tensor,
    grad: Tensor,
    slack: Tensor,
    inequality: Tensor,
    at: AtBounds | None,
    precision: float,
) -> Tensor:
    """The multipliers that fit best, see above.

    At bounds of the parameters only slopes that lead inside count.

    Args:
        jacobian: `(m, n)`.
        grad: `(n,)`.
        slack: How far each inequality is from its bound, `(m,)`, not negative; else zero.
        inequality: A mask, `(m,)`.
        at: The entries at bounds; None for none.
        precision: The machine epsilon that all this was computed with.
    """
    if at is None:
        return _fitted(jacobian, grad, slack, inequality, precision)
    best, least = None, torch.inf
    free = ~(at.low | at.high)
    for _ in range(20):
        y = _fitted(jacobian * free, grad, slack, inequality, precision)
        slope = grad + jacobian.T @ y
        now = at.free(slope)
        size = float((slope * now).square().sum() + (slack * y).square().sum())
        if best is None or size < least:
            best, least = y, size
        if torch.equal(now, free):
            break
        free = now
    assert best is not None
    return best


def _fitted(
    jacobian: Tensor, grad: Tensor, slack: Tensor, inequality: Tensor, precision: float
) -> Tensor:
    if not len(jacobian):
        return jacobian.new_zeros(0)
    # Rows of length one: neither the estimates nor ranks depend on the units of a constraint.
    length = _lengths(jacobian)
    rows, s = jacobian / length[:, None], slack / length
    W = (rows @ rows.T + s.square().diag()).cpu()
    inequality = inequality.cpu()
    b = -(rows @ grad).cpu()
    z = solve(W, b, inequality)
    z[inequality & (z <= 1e-14 * b.abs().max())] = 0.0  # rounding
    on = ~inequality | (z > 0)
    # Products of rows lose half the digits; two corrections with true residuals bring them back.
    inverse = torch.linalg.pinv(W[on][:, on], hermitian=True, rtol=dependence(precision) ** 2)
    for _ in range(2):
        y = z.to(rows)
        residual = (rows @ (grad + rows.T @ y) + s.square() * y).cpu()
        corrected = z.clone()
        corrected[on] -= inverse @ residual[on]
        if bool((corrected < 0)[inequality].any()):
            break
        z = corrected
    return z.to(rows) / length


def _lengths(rows: Tensor) -> Tensor:
    """The Euclidean lengths of rows, `(m,)`, with one for rows of zeros."""
    length: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return torch.where(length > 0, length, 1.0)


def row_space(rows: Tensor, precision: float) -> Tensor:
    """An orthonormal basis of the row space, as columns `(n, rank)`.

    Args:
        rows: `(k, n)`; their lengths do not matter.
        precision: The machine epsilon that the rows were computed with.
    """
    if not len(rows):
        return rows.T
    values, right = torch.linalg.svd(rows / _lengths(rows)[:, None], full_matrices=False)[1:]
    rank = int((values > dependence(precision) * values.max()).sum())
    basis: Tensor = right[:rank].T
    return basis
