"""Quadratics with a dense matrix, minimized exactly: within a radius, with damping, or modified."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from math import copysign, sqrt
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_number
from torch_secondorder._params.space import to_host
from torch_secondorder.curvature import LinearOperator
from torch_secondorder.solvers._units import power_of_two
from torch_secondorder.solvers.lanczos import lanczos

__all__ = ["DefinitenessName", "DenseQuadratic", "DenseStep", "solve_trust_region"]

DefinitenessName: TypeAlias = Literal["positive definite", "singular", "indefinite"]

# Up to so many unknowns a matrix is diagonalized, on a CPU and on a device. An eigendecomposition
# takes the time of 15 to 30 Cholesky factorizations, of which a step needs one to about five.
_SMALL, _SMALL_ON_DEVICE = 128, 32
# Most iterations for a multiplier. Each doubles the digits.
_MOST = 60
# Steps of Lanczos' process for the lowest eigenvalue of a matrix that has no Cholesky factor.
_LANCZOS = 40


@dataclass(frozen=True, slots=True)
class DenseStep:
    """A minimizer of a quadratic `g'x + x'H x / 2`, or what stands for one.

    Attributes:
        x: The minimizer, shape `(n,)`: `(H + multiplier I) x = -g`, but for the hard case.
        multiplier: What was added to the diagonal, of at least zero.
        decrease: How far the quadratic falls from zero to `x`.
        length: The Euclidean norm of `x`.
        held: Whether the radius, or for the larger part the damping, keeps `x` short.
        hard_case: Whether `x` has a part along the lowest eigenvector that no equation gives: the
            gradient has none there, and the rest of `x` does not reach the radius.
        inverse: Multiplies a vector with the inverse of `H + multiplier I`.

    >>> step = solve_trust_region(torch.eye(2), torch.tensor([3.0, 0.0]), radius=1.0)
    >>> round(step.multiplier, 4), round(step.length, 4), step.held
    (2.0, 1.0, True)
    """

    x: Tensor
    multiplier: float
    decrease: float
    length: float
    held: bool = False
    hard_case: bool = False
    inverse: Callable[[Tensor], Tensor] = field(default=torch.clone, repr=False)

    def next_from(self, grad: Tensor) -> Tensor:
        """The step that the same matrix gives with another gradient, shape `(n,)`.

        It takes no factorization.
        """
        return self.inverse(grad).neg_()


class _Solution(NamedTuple):
    """A step in the units of the computation, without the numbers that follow from it."""

    x: Tensor
    multiplier: float
    inverse: Callable[[Tensor], Tensor]
    held: bool = False
    hard_case: bool = False


class DenseQuadratic(ABC):
    """The quadratic `g'x + x'H x / 2` with a dense symmetric matrix.

    `DenseQuadratic.of` makes one. Small matrices are diagonalized; others are factorized by
    Cholesky's method, anew for each multiplier. Both is done in units in which the largest entries
    of `H` and `g` are about one.

    Args:
        H: Symmetric, shape `(n, n)`, finite.
        g: Shape `(n,)`, finite.
        tolerance: The relative error that the length of a step at the radius may have.

    Attributes:
        definiteness: What the eigenvalues are, up to rounding.
        smallest_eigenvalue: The smallest one. Of a large matrix it is None where the matrix is
            positive definite, and else an approximation from above.

    >>> H = torch.tensor([[1.0, 0.0], [0.0, -2.0]], dtype=torch.float64)
    >>> quadratic = DenseQuadratic.of(H, torch.tensor([1.0, 0.0], dtype=torch.float64))
    >>> step = quadratic.within(1.0)
    >>> round(step.multiplier, 6), step.hard_case, [round(abs(v), 6) for v in step.x.tolist()]
    (2.0, True, [0.333333, 0.942809])
    >>> quadratic.definiteness, quadratic.smallest_eigenvalue
    ('indefinite', -2.0)
    """

    definiteness: DefinitenessName
    smallest_eigenvalue: float | None

    @staticmethod
    def of(H: Tensor, g: Tensor, tolerance: float = 1e-10) -> DenseQuadratic:
        """The quadratic of a matrix, in the form that suits its size.

        Args:
            H: Symmetric, shape `(n, n)`, finite.
            g: Shape `(n,)`, finite.
            tolerance: The relative error that the length of a step at the radius may have.

        Raises:
            TypeError: One of them is no tensor, or they are not of one floating-point dtype.
            ValueError: The shapes do not match, or the tolerance is out of range.
        """
        _check_types(H, g)
        if g.dim() != 1 or not len(g) or H.shape != (len(g), len(g)):
            raise ValueError(
                f"H must have shape (n, n) and g (n,), got {tuple(H.shape)} and {tuple(g.shape)}"
            )
        check_number("tolerance", tolerance, above=0.0)
        small = _SMALL if H.device.type == "cpu" else _SMALL_ON_DEVICE
        return (Diagonalized if len(g) <= small else Factorized)(H, g, tolerance)

    def __init__(self, H: Tensor, g: Tensor, tolerance: float) -> None:
        sizes = torch.stack([H.abs().amax(), g.abs().amax()])
        self._matrix_unit, self._grad_unit = to_host(*power_of_two(sizes))
        self._H = H if self._matrix_unit == 1.0 else H / self._matrix_unit
        self._g = g if self._grad_unit == 1.0 else g / self._grad_unit
        self._unit = self._grad_unit / self._matrix_unit  # of x
        precision = torch.finfo(H.dtype).eps
        self._tolerance = max(tolerance, 100 * precision)
        # The rounding error of eigenvalues, and what takes the place of eigenvalues like that where
        # a matrix is inverted: the rounding errors of a gradient are divided by it.
        self._noise = 4 * len(g) * precision
        self._floor = max(precision ** (2 / 3), self._noise)

    def within(self, radius: float) -> DenseStep:
        """The global minimizer within a radius, whatever the eigenvalues.

        Args:
            radius: The largest Euclidean norm, above zero.
        """
        return self._stepped(self._within(radius / self._unit))

    def damped(self, damping: float) -> DenseStep:
        """The solution of `(H + multiplier I) x = -g`.

        The multiplier is the damping, plus what makes `H` semidefinite where it is indefinite.

        Args:
            damping: In the unit of `H`, above zero.
        """
        return self._stepped(self._damped(damping / self._matrix_unit))

    def modified(self) -> DenseStep:
        """The solution with a positive definite matrix in place of `H`: a direction of descent.

        It is Newton's step where `H` is positive definite. Small matrices have the signs of their
        negative eigenvalues changed; to large ones a multiple of the identity is added (Nocedal and
        Wright 2006, section 3.4).
        """
        return self._stepped(self._modified())

    def along_gradient(self) -> float:
        """The curvature `|H g| / |g|` along the gradient; 0 where there is none."""
        image, norm = to_host((self._H @ self._g).norm(), self._g.norm())
        return image / norm * self._matrix_unit if norm else 0.0

    @abstractmethod
    def _within(self, radius: float) -> _Solution: ...

    @abstractmethod
    def _damped(self, damping: float) -> _Solution: ...

    @abstractmethod
    def _modified(self) -> _Solution: ...

    def _stepped(self, solution: _Solution) -> DenseStep:
        """A solution in the units of `H` and `g`."""
        x, multiplier, inverse, held, hard_case = solution
        largest = power_of_two(x.abs().amax())
        unit_x = x / largest  # squares of `x` may be beyond the range of float32
        slope, curvature, square, size = to_host(
            self._g @ unit_x, unit_x @ (self._H @ unit_x), unit_x @ unit_x, largest
        )
        slope, curvature, square = slope * size, curvature * size * size, square * size * size
        matrix_unit = self._matrix_unit
        return DenseStep(
            x if self._unit == 1.0 else x * self._unit,
            multiplier * matrix_unit,
            -(slope + 0.5 * curvature) * self._unit * self._grad_unit,
            sqrt(square) * self._unit,
            held or multiplier * square > -0.5 * slope,
            hard_case,
            lambda grad: inverse(grad / matrix_unit),
        )

    def _judge(self, lowest: float) -> None:
        """Notes the lowest eigenvalue."""
        self.smallest_eigenvalue = lowest * self._matrix_unit
        if lowest > self._noise:
            self.definiteness = "positive definite"
        else:
            self.definiteness = "indefinite" if lowest < -self._noise else "singular"


class Diagonalized(DenseQuadratic):
    """A quadratic whose matrix is diagonalized once.

    Steps are made in the basis of eigenvectors, in float64 and on the host; each takes one product
    with the eigenvectors.
    """

    def __init__(self, H: Tensor, g: Tensor, tolerance: float) -> None:
        super().__init__(H, g, tolerance)
        values, self._vectors = torch.linalg.eigh(self._H)
        both = torch.stack([values, self._vectors.T @ self._g]).to("cpu", torch.float64)
        self._values, self._components = both
        lowest = float(self._values[0])
        self._judge(lowest)
        # What has to be added to make the matrix semidefinite.
        self._lift = max(0.0, -lowest)

    def _within(self, radius: float) -> _Solution:
        # The equation |(H + multiplier I)^-1 g| = radius is solved for what the multiplier exceeds
        # the lift by: no difference to the lowest eigenvalue is rounded like that.
        values, components = self._values + self._lift, self._components
        rounding = self._noise * float(components.norm())
        flat = (values <= self._noise) & (components.abs() <= rounding)
        components = torch.where(flat, 0.0, components)
        # The excess is no smaller than each component alone would have it. From there, on the left
        # of the solution, Newton's method for the inverse of the length never overshoots.
        excess = max(0.0, float((components.abs() / radius - values).max()))
        for _ in range(_MOST):
            divisors = values + excess
            x = torch.where(components == 0.0, 0.0, -components / divisors)
            length = float(x.norm())
            if not excess and length <= radius:
                return self._inside(x, length, radius)
            if length - radius <= self._tolerance * radius:
                break
            unit = x / length  # squares of a tiny step would underflow
            slope = float((unit * torch.where(components == 0.0, 0.0, unit / divisors)).sum())
            excess += (length - radius) / radius / slope
        return self._solution(x, self._lift + excess, held=True)

    def _inside(self, x: Tensor, length: float, radius: float) -> _Solution:
        """The solution where that of the semidefinite matrix does not reach the radius."""
        if self.definiteness != "indefinite":
            return self._solution(x, 0.0)
        rest = sqrt(max(radius * radius - length * length, 0.0))
        x[0] = -copysign(rest, float(self._components[0]))
        return self._solution(x, self._lift, held=True, hard_case=True)

    def _damped(self, damping: float) -> _Solution:
        multiplier = damping + (self._lift if self.definiteness == "indefinite" else 0.0)
        divisors = (self._values + multiplier).clamp(min=damping)
        return self._solution(-self._components / divisors, multiplier)

    def _modified(self) -> _Solution:
        sizes = self._values.abs()
        sizes = sizes.clamp(min=self._floor * float(sizes.max()) or 1.0)
        return self._solution(-self._components / sizes, 0.0, divisors=sizes)

    def _solution(
        self,
        x: Tensor,
        multiplier: float,
        held: bool = False,
        hard_case: bool = False,
        divisors: Tensor | None = None,
    ) -> _Solution:
        """A solution from its components along the eigenvectors."""
        vectors = self._vectors
        if divisors is None:
            divisors = self._values + multiplier
        inverses = torch.where(divisors > self._noise, 1.0 / divisors, 0.0).to(vectors)
        return _Solution(
            vectors @ x.to(vectors),
            multiplier,
            lambda grad: vectors @ (inverses * (vectors.T @ grad)),
            held,
            hard_case,
        )


class Factorized(DenseQuadratic):
    """A quadratic whose matrix is factorized by Cholesky's method for each multiplier.

    Reference: Moré and Sorensen 1983, "Computing a trust region step".
    """

    def __init__(self, H: Tensor, g: Tensor, tolerance: float) -> None:
        super().__init__(H, g, tolerance)
        self._known: tuple[float, Tensor] | None = None  # the last multiplier and its factor
        self._lowest = self._error = 0.0
        self._vector = torch.zeros_like(g)
        factor = self._factor(0.0)
        # The smallest square on the diagonal is an upper bound of the smallest eigenvalue.
        if factor is not None and float(factor.diagonal().min()) ** 2 > self._noise:
            self.definiteness, self.smallest_eigenvalue = "positive definite", None
            return
        # A random start has a part along every eigenvector; the gradient may have none.
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(len(g), dtype=torch.float64, generator=generator).to(g)
        for steps in (_LANCZOS, 4 * _LANCZOS, len(g)):
            steps = min(steps, len(g))
            found = lanczos(_Matrix(self._H), start, steps, reorthogonalize=True)
            self._judge(min(float(found.eigh()[0][0]), 0.0))
            indefinite = self.definiteness == "indefinite"
            if indefinite or steps == len(g) or self._factor(self._floor) is not None:
                break
        self._lowest = min(float(found.eigh()[0][0]), 0.0)
        self._error = float(found.residuals()[0])
        self._vector = found.ritz_vectors([0])[:, 0]

    def _factor(self, multiplier: float) -> Tensor | None:
        """The lower factor of `H + multiplier I`; None where that is not positive definite."""
        if self._known is not None and self._known[0] == multiplier:
            return self._known[1]
        self._known = None
        shifted = self._H.clone()
        shifted.diagonal().add_(multiplier)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(shifted)
        del shifted
        if int(failed):
            return None
        self._known = (multiplier, factor)
        return factor

    def _lifted(self, multiplier: float) -> tuple[float, Tensor]:
        """A multiplier that a factor exists for, as small as one or little larger; the factor."""
        more = max(self._noise, min(self._error, 0.1 * multiplier))
        while (factor := self._factor(multiplier)) is None:
            multiplier, more = multiplier + more, 4 * more
        return multiplier, factor

    def _within(self, radius: float) -> _Solution:
        along, norm, rows = to_host(
            self._g @ self._vector, self._g.norm(), self._H.abs().sum(1).amax()
        )
        low = -self._lowest  # the multiplier lies between low and high
        high = norm / radius + rows
        multiplier = low + abs(along) / radius
        if self.definiteness == "singular":
            multiplier = max(multiplier, self._floor)
        for _ in range(_MOST):
            multiplier, factor = self._lifted(multiplier)
            x = _solved(factor, -self._g)
            norm_of_x = x.norm()
            # Of the unit vector: squares of a tiny step would underflow.
            half = torch.linalg.solve_triangular(factor, (x / norm_of_x)[:, None], upper=False)
            length, half_length = to_host(norm_of_x, half.norm())
            solution = _Solution(x, multiplier, _inverse_of(factor), multiplier > 2 * self._floor)
            narrow = high - low <= self._noise * high  # no multiplier fits better
            short = length < radius and self.definiteness == "indefinite"
            if abs(length - radius) <= self._tolerance * radius or (narrow and not short):
                break
            if length > radius:
                low = max(low, multiplier)
            else:
                high = min(high, multiplier)
                if not solution.held:
                    break
                if short:
                    completed, good, estimate = self._completed(solution, factor, length, radius)
                    if good or narrow:
                        return completed
                    low = max(low, estimate)
            if length:
                multiplier += half_length**-2 * (length - radius) / radius
            if not length or multiplier <= low:  # the gradient is zero, or that went too far
                multiplier = low + 0.01 * (high - low)
            multiplier = min(multiplier, high)
        return solution

    def _completed(
        self, solution: _Solution, factor: Tensor, length: float, radius: float
    ) -> tuple[_Solution, bool, float]:
        """The hard case: a step that is too short, and as much of the lowest eigenvector as fits.

        Returns:
            The step; whether the tolerance says that it is as good as the exact one; and a lower
            bound of the multiplier.
        """
        x, z = solution.x, self._vector
        for _ in range(2):  # inverse iteration
            z = _solved(factor, z)
            z = z / z.norm()
        self._vector = z
        image, x_image = factor.T @ z, factor.T @ x
        curvature, bend, inner = to_host(image @ image, x_image @ x_image, x @ z)
        # The root of |x + share z| = radius that is closer to zero.
        rest = radius * radius - length * length
        share = rest / (inner + copysign(sqrt(inner * inner + rest), inner))
        lower = solution.multiplier - curvature
        worst = self._tolerance * (bend + solution.multiplier * radius * radius)
        completed = solution._replace(x=x + share * z, held=True, hard_case=True)
        return completed, share * share * curvature <= worst, lower

    def _damped(self, damping: float) -> _Solution:
        lift = -self._lowest if self.definiteness == "indefinite" else 0.0
        multiplier, factor = self._lifted(damping + lift)
        return _Solution(_solved(factor, -self._g), multiplier, _inverse_of(factor))

    def _modified(self) -> _Solution:
        # Negative eigenvalues would change their signs with twice the lift.
        lift = max(-2 * self._lowest, self._floor)
        if self.definiteness == "positive definite":
            lift = 0.0
        multiplier, factor = self._lifted(lift)
        return _Solution(_solved(factor, -self._g), multiplier, _inverse_of(factor))


def _check_types(H: Tensor, g: Tensor) -> None:
    kinds = [v.dtype if isinstance(v, Tensor) else type(v).__name__ for v in (H, g)]
    if kinds[0] != kinds[1] or kinds[0] not in (torch.float32, torch.float64):
        raise TypeError(
            "H and g must be tensors of one dtype, torch.float32 or torch.float64, got "
            f"{kinds[0]} and {kinds[1]}"
        )


def _solved(factor: Tensor, right: Tensor) -> Tensor:
    return torch.cholesky_solve(right[:, None], factor)[:, 0]


def _inverse_of(factor: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda grad: _solved(factor, grad)


class _Matrix(LinearOperator):
    """A matrix as an operator."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.size = matrix, len(matrix)
        self.dtype, self.device = matrix.dtype, matrix.device

    def matvec(self, v: Tensor) -> Tensor:
        """See `LinearOperator.matvec`."""
        return self.matrix @ v


def solve_trust_region(H: Tensor, g: Tensor, radius: float) -> DenseStep:
    """The global minimizer of `g'x + x'H x / 2` within `|x| <= radius`.

    The matrix may be indefinite or singular; the hard case is solved. For several steps with one
    matrix make a `DenseQuadratic`.

    References: Moré and Sorensen 1983, "Computing a trust region step"; Conn, Gould and Toint 2000,
    "Trust-region methods", chapter 7.

    Args:
        H: Symmetric, shape `(n, n)`.
        g: Shape `(n,)`.
        radius: Above zero.

    Returns:
        The minimizer with the multiplier of the radius.

    Raises:
        TypeError: One of them is no tensor, or they are not of one floating-point dtype.
        ValueError: The shapes do not match, the radius is not above zero, or an entry is not
            finite.

    >>> H = torch.tensor([[2.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    >>> g = torch.tensor([-2.0, -4.0], dtype=torch.float64)
    >>> solve_trust_region(H, g, 10.0).x
    tensor([1., 1.], dtype=torch.float64)
    >>> solve_trust_region(H, g, 0.5).length
    0.5
    """
    check_number("radius", radius, above=0.0)
    _check_types(H, g)
    for name, tensor in (("H", H), ("g", g)):
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} has entries that are not finite")
    return DenseQuadratic.of(H, g).within(radius)
