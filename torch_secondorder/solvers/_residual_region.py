"""Linearized residuals within a trust radius, without bounds and with them."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, sqrt

import torch
from torch import Tensor

from torch_secondorder._params.space import WHOLE
from torch_secondorder.curvature.residual_jacobian import ResidualJacobian
from torch_secondorder.solvers._boxed_dense import BoxedQuadratic

# The relative error of the length of a step at the radius, and most steps of Newton's method to it.
_TOLERANCE, _STEPS = 1e-3, 100
# Up to so many entries the Jacobian itself is factorized. The normal equations, of which the
# singular values are the roots of the eigenvalues, have lost half of the digits of the smallest.
_SMALL = 10_000_000


@dataclass(frozen=True, slots=True)
class RegionStep:
    """A minimizer of the quadratic within a radius.

    Attributes:
        x: The step, shape `(n,)`.
        slope: `g'x` with the gradient `g`.
        decrease: How far the quadratic falls from zero to `x`.
        length: The length of `x` in the metric: what the radius bounds.
        held: Whether the radius keeps it short.
    """

    x: Tensor
    slope: float
    decrease: float
    length: float
    held: bool


class ResidualRegion:
    """The quadratic `|r + J x|^2 / 2 + q'x + x'R x / 2` in the units of a metric, diagonalized.

    `J` is the Jacobian of residuals `r`; `q` and the diagonal `R` belong to terms of the loss that
    are not in the residuals. With the units `u`, the roots of the metric, the singular values of
    `J / u` give the minimizer within each radius of `|u x|` (Moré 1978). The cut-off of small
    singular values is that of `torch.linalg.pinv`.

    Args:
        jacobian: `J`, with `r`, `q` and `R`; finite.
        grad: The gradient `J'r + q`, shape `(n,)`.
        metric: Positive, shape `(n,)`; the identity by default.
    """

    def __init__(
        self, jacobian: ResidualJacobian, grad: Tensor, metric: Tensor | None = None
    ) -> None:
        self._units = None if metric is None else metric.sqrt()
        rest = jacobian.rest_diagonal
        plain = jacobian.rest_gradient is None and not isinstance(rest, Tensor) and not rest
        if plain and jacobian.rows * jacobian.size <= _SMALL:
            J = jacobian.dense()
            J = J if self._units is None else J / self._units
            self._vectors, values, pulled = _singular(J, jacobian.residuals)
        else:
            A = jacobian.normal_matrix().clone()
            A.diagonal().add_(rest)
            if self._units is not None:
                A = A / self._units[:, None] / self._units
            values, vectors = torch.linalg.eigh(A)
            self._vectors = vectors.T
            pulled = self._vectors @ self._in_units(grad)
        self._values = values.clamp(min=0.0)
        numbers = torch.stack((self._values, pulled)).to("cpu", torch.float64)
        self._curvatures, self._slopes = numbers.tolist()
        largest = max(self._curvatures, default=0.0)
        # Squares of what is zero up to rounding.
        precision = torch.finfo(values.dtype).eps * max(jacobian.rows, jacobian.size)
        self._least = largest * (precision**2 if plain else precision)
        self._multiplier = 0.0

    def _in_units(self, grad: Tensor) -> Tensor:
        return grad if self._units is None else grad / self._units

    def _step(self, coefficients: Tensor) -> Tensor:
        x = self._vectors.T @ coefficients
        return x if self._units is None else x / self._units

    def length_of(self, x: Tensor) -> float:
        """The length of a vector in the metric."""
        (length,) = WHOLE.to_host(norms=((x if self._units is None else self._units * x).norm(),))
        return length

    def along_gradient(self) -> float:
        """The length of the step along the gradient that minimizes the quadratic; 0 without one."""
        pairs = list(zip(self._curvatures, self._slopes, strict=True))
        square = sum(c * c for _, c in pairs)
        bend = sum(v * c * c for v, c in pairs)
        return sqrt(square) * square / bend if bend > 0.0 else 0.0

    def within(self, radius: float) -> RegionStep:
        """The shortest minimizer within a radius.

        Args:
            radius: Above zero.
        """
        pairs = [
            (v, c) for v, c in zip(self._curvatures, self._slopes, strict=True) if v > self._least
        ]
        multiplier = self._multiplier_for(radius, pairs)
        self._multiplier = multiplier
        slope = decrease = square = 0.0
        for v, c in pairs:
            x = c / (v + multiplier)
            slope -= c * x
            decrease += x * x * (0.5 * v + multiplier)
            square += x * x
        return RegionStep(
            self._solved(torch.tensor(self._slopes, dtype=self._values.dtype)),
            slope,
            decrease,
            sqrt(square),
            multiplier > 0.0,
        )

    def _multiplier_for(self, radius: float, pairs: list[tuple[float, float]]) -> float:
        """The multiplier at which the step is as long as the radius; 0 where it is shorter.

        Newton's method on the reciprocal of the length, which is almost linear and convex: from
        below it never overshoots (Hebden 1973; Moré 1978).
        """
        low, high = 0.0, sqrt(sum(c * c for _, c in pairs)) / radius
        multiplier = 0.0
        for _ in range(_STEPS):
            square = sum((c / (v + multiplier)) ** 2 for v, c in pairs)
            length = sqrt(square)
            excess = length / radius - 1.0
            if excess <= 0.0:
                if multiplier == 0.0 or excess >= -_TOLERANCE:
                    break
                high = multiplier
            else:
                if excess <= _TOLERANCE:
                    break
                low = multiplier
            # Lengths beyond the range of floats count as infinite: halve the interval.
            bend = sum(c * c / (v + multiplier) ** 3 for v, c in pairs)
            better = multiplier + square / bend * excess if 0.0 < bend < inf else inf
            multiplier = better if low < better < high else 0.5 * (low + high)
            if not low < multiplier < high:
                break
        return multiplier

    def further(self, grad: Tensor, moved: Tensor) -> Tensor:
        """The step of the same system with the gradient somewhere else.

        Args:
            grad: The gradient there, shape `(n,)`.
            moved: The way there; of no account here.
        """
        return self._solved(self._vectors @ self._in_units(grad))

    def _solved(self, slopes: Tensor) -> Tensor:
        shifted = self._values + self._multiplier
        kept = self._values > self._least
        return self._step(torch.where(kept, -slopes.to(shifted) / shifted, 0.0))


class BoxedRegion:
    """The counterpart of `ResidualRegion` within bounds; the radius bounds each entry in its unit.

    Args:
        jacobian: See `ResidualRegion`.
        grad: See `ResidualRegion`.
        metric: See `ResidualRegion`.
        low: Lower bounds of a step, at most zero.
        high: Upper bounds of a step, at least zero.
    """

    def __init__(
        self,
        jacobian: ResidualJacobian,
        grad: Tensor,
        metric: Tensor | None,
        low: Tensor,
        high: Tensor,
    ) -> None:
        units = torch.ones_like(grad) if metric is None else metric.sqrt()
        A = jacobian.normal_matrix().clone()
        A.diagonal().add_(jacobian.rest_diagonal)
        A = A / units[:, None] / units
        self._units, self._grad = units, grad / units
        self._quadratic = BoxedQuadratic(A, self._grad, low * units, high * units)

    def length_of(self, x: Tensor) -> float:
        """The length of a vector in the metric: its largest entry."""
        (length,) = WHOLE.to_host(largest=(self._units * x,))
        return length

    def along_gradient(self) -> float:
        """The length of the step along the gradient that minimizes the quadratic; 0 without one."""
        curvature = self._quadratic.along_gradient()
        free = torch.where(self._quadratic.free, self._grad, 0.0)
        (length,) = WHOLE.to_host(norms=(free.norm(),))
        return length / curvature if curvature else 0.0

    def within(self, radius: float) -> RegionStep:
        """A minimizer within bounds none of whose entries is longer than a radius.

        Args:
            radius: Above zero.
        """
        step = self._quadratic.within(radius)
        (slope,) = WHOLE.to_host(sums=(self._grad @ step.x,))
        return RegionStep(step.x / self._units, slope, step.decrease, step.length, step.held)

    def further(self, grad: Tensor, moved: Tensor) -> Tensor:
        """The step that the matrix gives with the gradient somewhere else; zero where none falls.

        Args:
            grad: The gradient there, shape `(n,)`.
            moved: The way there, a step in the box.
        """
        return self._quadratic.further(grad / self._units, moved * self._units) / self._units


def _singular(J: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Right singular vectors of `J` in rows, its squared singular values, and `V'J'r`."""
    rows, size = J.shape
    if rows > 2 * size:
        # The last column of the triangle of `[J, r]` is `Q'r`.
        R = torch.linalg.qr(torch.cat((J, r[:, None]), 1), mode="r")[1]
        J, r = R[:size, :size], R[:size, size]
    U, values, vectors = torch.linalg.svd(J, full_matrices=False)
    return vectors, values.square(), values * (U.T @ r)
