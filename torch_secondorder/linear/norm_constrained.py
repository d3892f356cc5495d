"""Least squares with a bound on the norm of the solution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_integer, check_number
from torch_secondorder._foundation.report import Report
from torch_secondorder.linear._ball import Ball, solve_in_ball
from torch_secondorder.linear._bidiagonalization import check_right_hand_side
from torch_secondorder.linear._dense import (
    Decomposition,
    check_dense,
    column_norms,
    column_parameter,
    needs_gradient,
    regularized,
    with_gradient,
)
from torch_secondorder.linear._secular import SecularSolution, solve_secular
from torch_secondorder.linear.iterative import KrylovStatus
from torch_secondorder.linear.operators import OperatorLike, as_operator

__all__ = ["NormConstrainedResult", "norm_constrained"]


@dataclass(frozen=True, slots=True)
class NormConstrainedResult(Report):
    """The solution of a least-squares problem with a bound on its norm.

    The last three numbers are the residuals of the Karush-Kuhn-Tucker conditions, computed from `x`
    and the multiplier alone. If they are small and the multiplier is not negative, `x` is the
    global solution: they are the certificate.

    Attributes:
        x: Shape `(n,)` or `(n, k)`.
        multiplier: `A'(A x - b) + multiplier x = 0`; zero if the bound is not active. It is the
            `penalty` whose `ridge` solution is `x`, and says what a larger radius would gain:
            `|A x - b|^2 / 2` falls by `multiplier` per unit of `radius^2 / 2`. Shape `()` or
            `(k,)`.
        residual_norm: `|b - A x|`, likewise.
        norm: `|x|`, likewise.
        iterations: Of Newton's method for the multiplier; with a matrix-free operator, steps of the
            bidiagonalization.
        stationarity: `|A'(A x - b) + multiplier x| / |A'b|`, likewise.
        feasibility: `(|x| - radius) / radius` if that is positive, else zero; its absolute value
            with `equality`. Likewise.
        complementarity: `multiplier |radius^2 - |x|^2| / |b|^2`; zero with `equality`. Likewise.
        status: With a matrix-free operator the reason why the iteration stopped, else None.

    >>> result = norm_constrained(torch.eye(2), torch.tensor([3.0, 4.0]), radius=1.0)
    >>> round(result.norm.item(), 4), round(result.multiplier.item(), 4)
    (1.0, 4.0)
    """

    x: Tensor
    multiplier: Tensor
    residual_norm: Tensor
    norm: Tensor
    iterations: int
    stationarity: Tensor
    feasibility: Tensor
    complementarity: Tensor
    status: KrylovStatus | None = None


def norm_constrained(
    A: OperatorLike,
    b: Tensor,
    radius: float | Tensor,
    *,
    equality: bool = False,
    rcond: float | None = None,
    atol: float = 1e-10,
    max_iterations: int | None = None,
) -> NormConstrainedResult:
    """Minimizes `|A x - b|` subject to `|x| <= radius`.

    If the solution of minimum norm lies within the ball, it is the result, with a multiplier of
    zero. Otherwise `|x| = radius`, and the multiplier is the root of the secular equation
    `|(A'A + multiplier I)^-1 A'b| = radius`. Other than for an indefinite quadratic, there is no
    hard case: with a multiplier of zero every component has a positive divisor.

    With a dense matrix the root is exact to rounding, by one singular value decomposition and a few
    steps of Newton's method on numbers. `x` and the multiplier can then be differentiated by `A`,
    `b` and `radius`, in reverse and forward mode, up to three times.

    With a matrix-free operator the problem is solved in Krylov spaces of growing dimension `j`,
    where it has `j` unknowns, until the conditions hold to `atol`. Gould, Lucidi, Roma and Toint
    1999 do so for trust regions; here the spaces come from the bidiagonalization of Golub and
    Kahan. The `j` basis vectors are kept, and the host waits for the device once per step. No graph
    is recorded.

    References: Golub and Van Loan 2013, section 6.2.1; Björck 1996, section 5.3.

    Args:
        A: A dense matrix of shape `(m, n)`, float32 or float64; or a matrix-free operator in one of
            the other forms of `as_operator`.
        b: Shape `(m,)` or `(m, k)`; with a matrix-free operator one right-hand side, as for `lsqr`.
        radius: Above 0: a number for all columns of `b`, or a vector with one for each. With a
            dense matrix and a vector `b`, there is a solution for each entry.
        equality: Whether `|x| = radius` is asked for, of a dense matrix. If the solution of minimum
            norm is shorter than that, a vector of the null space is added, which leaves the
            residual as it is; without a null space the multiplier becomes negative. Both directions
            along the last singular vector may then be solutions, and one is returned.
        rcond: See `lstsq`; of a dense matrix.
        atol: With a matrix-free operator the accuracy of the stationarity, relative to the norms of
            `[A; multiplier^0.5 I]` and of its residual, as in `lsqr`.
        max_iterations: With a matrix-free operator the most steps; by default 500, and no more than
            there are unknowns or residuals.

    Returns:
        The solution with its multiplier, the certificate.

    Raises:
        TypeError: `A` is no matrix in one of these forms, or `b` is not a tensor of float32 or
            float64.
        ValueError: Shapes, dtypes or devices do not fit, an entry is not finite, a number is out of
            range, or `equality` is asked for with an operator, a matrix without columns, or
            gradients of a solution whose multiplier is negative.

    >>> A = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    >>> print(norm_constrained(A, torch.tensor([3.0, 1.0], dtype=torch.float64), 1.0).x)
    tensor([0.9...], dtype=torch.float64)
    """
    if isinstance(A, Tensor) and A.layout == torch.strided:
        return _dense(A, b, radius, equality, rcond)
    operator = as_operator(A)
    if equality:
        raise ValueError("equality=True needs a dense matrix: for an operator leave it out")
    check_right_hand_side(A, b)
    check_number("radius", radius, above=0)
    check_number("atol", atol, low=0, below=1)
    check_integer("max_iterations", max_iterations, optional=True)
    found = solve_in_ball(operator, b.detach(), float(radius), atol, max_iterations)
    image, right = operator.matvec(found.x).detach(), operator.rmatvec(b.detach()).detach()
    pull = operator.rmatvec(image - b).detach()
    return _matrix_free(found, b.detach(), image, pull, right, float(radius))


def _dense(
    A: Tensor, b: Tensor, radius: float | Tensor, equality: bool, rcond: float | None
) -> NormConstrainedResult:
    check_dense(A, b, rcond)
    columns, radii = column_parameter("radius", radius, b)
    if equality and not A.shape[1]:
        raise ValueError("equality=True needs an unknown, but A has no columns")
    factors = Decomposition(A, rcond)
    count = columns.shape[1]
    constant = columns.detach()
    found = solve_secular(
        factors.s.to("cpu", torch.float64),
        (factors.U.T @ constant).to("cpu", torch.float64),
        radii.detach().to("cpu", torch.float64).expand(count),
        equality=equality,
        singular=factors.rank < A.shape[1],
    )
    x = factors.Vh.T @ found.x.to(A)
    if equality:
        x = x + _last_direction(factors)[:, None] * found.missing.to(A)
    multiplier = found.multiplier.to(A)
    conditions = _conditions(A.detach(), constant, x, multiplier, radii.detach(), equality)
    if needs_gradient(A, b, radii):
        x, multiplier = _differentiable(A, columns, radii, x, multiplier, factors, found)
    one = b.dim() == 1 and not (isinstance(radius, Tensor) and radius.dim())
    shape = torch.Size() if one else x.shape[1:]
    return NormConstrainedResult(
        x=x[:, 0] if one else x,
        multiplier=multiplier.reshape(shape),
        residual_norm=column_norms(columns - A @ x).reshape(shape),
        norm=column_norms(x).reshape(shape),
        iterations=found.iterations,
        stationarity=conditions.stationarity.reshape(shape),
        feasibility=conditions.feasibility.reshape(shape),
        complementarity=conditions.complementarity.reshape(shape),
    )


class _Conditions(NamedTuple):
    stationarity: Tensor
    feasibility: Tensor
    complementarity: Tensor


def _conditions(
    A: Tensor, b: Tensor, x: Tensor, multiplier: Tensor, radius: Tensor, equality: bool
) -> _Conditions:
    """The residuals of the Karush-Kuhn-Tucker conditions, for each column."""
    norm = column_norms(x)
    gradient = column_norms(A.T @ (A @ x - b) + multiplier * x)
    return _relative(
        gradient,
        column_norms(A.T @ b),
        norm,
        multiplier,
        column_norms(b),
        radius,
        equality,
    )


def _relative(
    gradient: Tensor,
    at_zero: Tensor,
    norm: Tensor,
    multiplier: Tensor,
    size_of_b: Tensor,
    radius: Tensor,
    equality: bool,
) -> _Conditions:
    excess = (norm - radius) / radius
    size = torch.where(size_of_b > 0, size_of_b, 1.0)
    gap = multiplier * ((radius - norm) / size).abs() * ((radius + norm) / size)
    return _Conditions(
        torch.where(at_zero > 0, gradient / at_zero, gradient),
        excess.abs() if equality else excess.clamp(min=0),
        torch.zeros_like(gap) if equality else gap,
    )


def _last_direction(factors: Decomposition) -> Tensor:
    """A unit vector of the null space; without one, the last right singular vector."""
    Vh = factors.Vh
    rank, size = Vh.shape
    if rank == size:
        last: Tensor = Vh[-1]
        return last
    # The unit vector that is farthest from the row space, projected twice for rounding.
    vector = torch.zeros(size, dtype=Vh.dtype, device=Vh.device)
    vector[Vh.square().sum(0).argmin()] = 1.0
    for _ in range(2):
        vector = vector - Vh.T @ (Vh @ vector)
        vector = vector / torch.linalg.vector_norm(vector)
    return vector


def _differentiable(
    A: Tensor,
    columns: Tensor,
    radii: Tensor,
    x: Tensor,
    multiplier: Tensor,
    factors: Decomposition,
    found: SecularSolution,
) -> tuple[Tensor, Tensor]:
    """The solution and the multiplier with their derivatives.

    Two steps of Newton's method from the multiplier: each doubles the number of derivatives that
    are those of the root.
    """
    if bool((found.missing > 0).any()) or bool((multiplier < 0).any()):
        raise ValueError(
            "with equality=True there are no derivatives where the solution of minimum norm is "
            "shorter than the radius: detach A, b and radius, or leave equality out"
        )
    active = multiplier > 0
    inside = torch.linalg.pinv(A, rtol=factors.rcond) @ columns
    if not bool(active.any()):
        return with_gradient(x, inside), multiplier
    # Solutions inside get a penalty as well, so that all columns are one batch; it is not used.
    root = torch.where(active, multiplier, factors.s[0].square()).detach()
    for _ in range(2):
        solution = regularized(A, columns, root)
        norm = column_norms(solution.x)
        step = norm.square() / solution.bend * (norm - radii) / radii
        root = root + torch.where(active, step, 0.0)
    solution = regularized(A, columns, root)
    return (
        with_gradient(x, torch.where(active, solution.x, inside)),
        with_gradient(multiplier, torch.where(active, root, 0.0)),
    )


def _matrix_free(
    found: Ball, b: Tensor, image: Tensor, pull: Tensor, right: Tensor, radius: float
) -> NormConstrainedResult:
    """The result, with numbers from products with the final `x`."""
    x, multiplier = found.x, b.new_tensor(found.multiplier)
    norm = column_norms(x.flatten())
    conditions = _relative(
        column_norms((pull + multiplier * x).flatten()),
        column_norms(right.flatten()),
        norm,
        multiplier,
        column_norms(b.flatten()),
        b.new_tensor(radius),
        False,
    )
    return NormConstrainedResult(
        x=x,
        multiplier=multiplier,
        residual_norm=column_norms((b - image).flatten()),
        norm=norm,
        iterations=found.iterations,
        stationarity=conditions.stationarity,
        feasibility=conditions.feasibility,
        complementarity=conditions.complementarity,
        status=found.status,
    )
