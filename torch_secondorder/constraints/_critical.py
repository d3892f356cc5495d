"""The curvature of the Lagrangian along the constraints: conditions of second order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from torch_secondorder.constraints._estimates import row_space
from torch_secondorder.constraints._evaluation import wide
from torch_secondorder.curvature import LinearOperator
from torch_secondorder.diagnostics import Problem, eigenpairs
from torch_secondorder.diagnostics._point import opened

#: The verdict on a point where the conditions of first order hold.
Verdict: TypeAlias = Literal["minimum", "saddle", "undecided"]

# Up to so many parameters the matrix is formed.
_DENSE = 300
_PRODUCTS = 500
_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class SecondOrder:
    """The lowest curvature along the constraints.

    Attributes:
        verdict: `"minimum"` if it is above zero for all directions that the constraints with
            multipliers leave, which proves a strict local minimum. `"saddle"` if there is a
            direction along all active constraints, or off the weakly active ones, with negative
            curvature, which proves that the point is no minimum if the gradients of the active
            constraints are independent. Else `"undecided"`.
        curvature: The lowest curvature; None if no direction is left.
        direction: The unit vector with that curvature, `(n,)`.
    """

    verdict: Verdict
    curvature: float | None
    direction: Tensor | None


@dataclass(frozen=True, slots=True)
class _Lowest:
    value: float
    error: float
    magnitude: float
    direction: Tensor

    @property
    def zero(self) -> float:
        """The size below which a curvature counts as zero."""
        return self.error + 1e-7 * self.magnitude


def second_order(
    problem: Problem,
    strong: Tensor,
    weak: Tensor,
    fixed: Tensor,
    loose: Tensor,
    precision: float,
) -> SecondOrder:
    """Searches for the lowest curvature.

    Args:
        problem: The Lagrangian.
        strong: The gradients of equalities, and of active inequalities that have multipliers.
        weak: Those of other active inequalities.
        fixed: The entries of the parameters that bounds with multipliers hold, a mask `(n,)`.
        loose: The entries at other bounds: -1 at an upper, 1 at a lower one, else 0.
        precision: The machine epsilon that the rows were computed with.

    Raises:
        RuntimeError: The loss or a constraint has no second derivative here.
    """
    with opened(problem, False, None, "second order") as point:
        A = _Kept(point.operator)
        lowest = _lowest(A, strong, fixed, precision)
        if lowest is None:
            return SecondOrder("minimum", None, None)
        v = lowest.direction
        verdict: Verdict = "undecided"
        if lowest.value > lowest.zero:
            verdict = "minimum"
        elif lowest.value < -lowest.zero:
            # Into the region that the weakly active constraints allow, on one of its two sides?
            rise = torch.cat([weak @ v, -(loose * v)[loose != 0]])
            slack = 1e-7 * float(rise.abs().max()) if len(rise) else 0.0
            if bool((rise <= slack).all()):
                verdict = "saddle"
            elif bool((rise >= -slack).all()):
                verdict, lowest = "saddle", replace(lowest, direction=-v)
            else:
                tight = _lowest(A, torch.cat([strong, weak]), fixed | (loose != 0), precision)
                if tight is not None and tight.value < -tight.zero:
                    verdict, lowest = "saddle", tight
        return SecondOrder(verdict, lowest.value, lowest.direction)


class _Kept:
    """An operator, and its matrix once formed."""

    def __init__(self, operator: LinearOperator) -> None:
        self.operator = operator
        self._dense: Tensor | None = None

    def dense(self) -> Tensor:
        if self._dense is None:
            self._dense = wide(self.operator.dense())
        return self._dense


class _Restricted(LinearOperator):
    """A matrix on a subspace, with a given eigenvalue on the rest."""

    def __init__(self, A: LinearOperator, basis: Tensor, free: Tensor) -> None:
        self.size, self.dtype, self.device = A.size, A.dtype, A.device
        self._A = A
        self._basis = basis.to(A.device, A.dtype)
        self._free = free.to(A.device, A.dtype)
        self.rest = 0.0

    def project(self, v: Tensor) -> Tensor:
        v = v * self._free
        return (v - self._basis @ (self._basis.T @ v)) * self._free

    def matvec(self, v: Tensor) -> Tensor:
        """See `LinearOperator.matvec`."""
        inside = self.project(v)
        return self.project(self._A @ inside) + self.rest * (v - inside)


def _lowest(kept: _Kept, rows: Tensor, fixed: Tensor, precision: float) -> _Lowest | None:
    """The lowest eigenvalue on the directions that leave rows and fixed entries alone."""
    free = ~fixed
    basis = row_space(rows * free, precision)
    left = int(free.sum()) - basis.shape[1]
    if left <= 0:
        return None
    if kept.operator.size <= _DENSE:
        H = kept.dense()
        # The columns after those of the basis are orthogonal to it.
        Z = torch.zeros(len(free), left, dtype=H.dtype, device=H.device)
        Z[free.to(H.device)] = torch.linalg.qr(basis[free], mode="complete")[0][:, -left:].to(H)
        values, vectors = torch.linalg.eigh(Z.T @ H @ Z)
        magnitude = max(float(values.abs().max()), precision * float(H.abs().max()))
        return _Lowest(float(values[0]), 0.0, magnitude, Z @ vectors[:, 0])
    A = _Restricted(kept.operator, basis, free)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(A.size, generator=generator, dtype=torch.float64).to(A.device, A.dtype)
    start = A.project(start)
    start = start / torch.linalg.vector_norm(start)
    # No lower than the lowest inside, wherever that is: then the rest does not show.
    rayleigh = float(start @ (kept.operator @ start))
    A.rest = rayleigh + abs(rayleigh)
    found = eigenpairs(
        A, 1, "smallest", tolerance=_TOLERANCE, max_products=_PRODUCTS, progress=False
    )
    direction = A.project(found.vectors[:, 0])
    largest = eigenpairs(A, 1, "magnitude", tolerance=0.1, max_products=30, progress=False)
    error = float(found.residuals[0]) if not found.converged else 0.0
    return _Lowest(float(found.values[0]), error, float(largest.values[0].abs()), wide(direction))
