"""Damped linear least squares: primal by Cholesky or QR, dual by the kernel, or iterative."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from math import frexp, inf, isfinite, sqrt
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_choice, check_number
from torch_secondorder._foundation.memory import TooLarge, check_fits
from torch_secondorder._params.space import WHOLE
from torch_secondorder.curvature import Diagonal, LinearOperator
from torch_secondorder.curvature._normal_equations import NormalEquations
from torch_secondorder.curvature.residual_jacobian import ResidualJacobian
from torch_secondorder.solvers._boxed_dense import BoxedQuadratic
from torch_secondorder.solvers._cholesky import cholesky
from torch_secondorder.solvers.cg import CG

__all__ = ["DampedLeastSquares", "DampedStep", "LeastSquaresSolverName"]

LeastSquaresSolverName: TypeAlias = Literal["auto", "primal", "dual", "cg"]

# Up to so many operations (rows times columns squared) a system is solved by QR, which keeps the
# digits that the normal equations lose. Calls take longer than the arithmetic then.
_SMALL = 3_000_000
# Matrices of the smaller side in memory at a time: the matrix, a damped one, its factor.
_MATRICES = 3
# Most corrections of a solution by Cholesky's method; their largest share of it for the method to
# be good enough, and the one for the solution to be.
_CORRECTIONS, _ROUNDED, _EXACT = 3, 0.1, 1e-4
# The smallest damping of a kernel, in units of its rounding error: a smaller one is lost in it.
_RESOLVED = 32.0
# From so many rows and columns on, conjugate gradients take fewer operations.
_LARGE = 10_000


@dataclass(frozen=True, slots=True)
class DampedStep:
    """A solution of a damped least-squares problem.

    Attributes:
        x: The step, shape `(n,)`.
        slope: `g'x`, with the gradient `g` of the undamped problem.
        decrease: How far the undamped quadratic falls from zero to `x`.
        length: The Euclidean norm of `x`.
        curvature: `x'A x / x'D x`, with the undamped matrix `A` and the metric `D`.
        held: Whether more than half of the curvature along `x` is damping.
        iterations: Of conjugate gradients.

    >>> step = DampedStep(x=torch.tensor([-1.0]), slope=-2.0, decrease=1.0, length=1.0)
    >>> step.held, step.iterations
    (False, 0)
    """

    x: Tensor
    slope: float
    decrease: float
    length: float
    curvature: float = inf
    held: bool = False
    iterations: int = 0


class DampedLeastSquares(ABC):
    """The quadratic `|r + J x|^2 / 2 + q'x + x'R x / 2`, minimized with a damping.

    `J` is the Jacobian of residuals `r`; `q` and the diagonal `R` belong to terms of the loss that
    are not in the residuals. For a damping `mu`, a metric `D` and a center `c`, the minimizer of
    the quadratic plus `mu (x - c)'D(x - c) / 2` is computed. What does not depend on the damping is
    computed once. `DampedLeastSquares.of` makes one.

    Args:
        jacobian: `J`, with `r`, `q` and `R`.
        grad: The gradient `g = J'r + q`, shape `(n,)`.

    Attributes:
        name: The solver: `"primal"`, `"dual"` or `"cg"`.
        factorization: Of the last system: `"cholesky"`, `"qr"`, `"eigen"`, or `"none"`.
        has_rows: Whether there is more than `J'J`.
        factor_dtype: See `of`.

    >>> from torch_secondorder import FunctionalObjective
    >>> x, y = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([5.0, 11.0])
    >>> def half_squares(w):
    ...     return torch.nn.functional.mse_loss(x @ w, y, reduction="sum") / 2
    >>> point = FunctionalObjective(half_squares, torch.zeros(2)).evaluate(curvature=True)
    >>> problem = DampedLeastSquares.of(ResidualJacobian(point), -x.T @ y)
    >>> step = problem.solve(1e-6)  # the solution is (1, 2)
    >>> problem.name, [round(value, 3) for value in step.x.tolist()]
    ('primal', [1.0, 2.0])
    """

    name: ClassVar[LeastSquaresSolverName]
    factorization: str = "none"
    has_rows: ClassVar[bool] = True
    factor_dtype: torch.dtype | None = None

    @staticmethod
    def of(
        jacobian: ResidualJacobian | NormalEquations,
        grad: Tensor,
        solver: LeastSquaresSolverName = "auto",
        factor_dtype: torch.dtype | None = None,
    ) -> DampedLeastSquares:
        """The problem in the form that suits its size.

        Args:
            jacobian: `J`; or `J'J` alone, which only `"primal"` can do with.
            grad: The gradient, shape `(n,)`.
            solver: `"primal"` for systems of `n` equations, `"dual"` for one equation for each
                residual, `"cg"` for products alone, `"auto"` for what takes least.
            factor_dtype: The dtype of Cholesky factors. If it is narrower than that of the
                gradient, solutions are refined until they are as good as with a wide one; where
                refinement does not converge, the matrix is factorized in its own dtype.

        Raises:
            ValueError: The name is unknown; a subclass of it if a matrix does not fit in memory.
        """
        check_choice("solver", solver, LeastSquaresSolverName)
        made: DampedLeastSquares
        if isinstance(jacobian, NormalEquations):
            made = _OfSums(jacobian, grad)
            made.factor_dtype = factor_dtype
            return made
        if solver == "auto":
            solver = suited_solver(jacobian.rows, jacobian.size, grad.dtype, grad.device)
        elif solver != "cg":
            _check_fits(solver, jacobian.rows, jacobian.size, grad.dtype, grad.device)
        made = _KINDS[solver](jacobian, grad)
        made.factor_dtype = factor_dtype
        return made

    jacobian: ResidualJacobian

    def __init__(self, jacobian: ResidualJacobian, grad: Tensor) -> None:
        self.jacobian, self._grad = jacobian, grad
        self._rest = jacobian.rest_diagonal

    @cached_property
    def diagonal(self) -> Tensor:
        """The diagonal of `J'J`, shape `(n,)`."""
        return self.jacobian.diagonal()

    @cached_property
    def _matrix(self) -> Tensor:
        """`J'J`, shape `(n, n)`."""
        return self.jacobian.normal_matrix()

    @property
    @abstractmethod
    def finite(self) -> bool:
        """True if the matrix of the systems is finite."""

    def mean_curvature(self, metric: Tensor | None = None) -> float:
        """The mean eigenvalue of `D^-1 J'J`; of those that rows or columns leave, if these are few.

        Args:
            metric: `D`, positive, shape `(n,)`; the identity by default.
        """
        (trace,) = WHOLE.to_host(sums=(self._trace(metric),))
        return trace / max(1, min(self.jacobian.rows, self.jacobian.size))

    def _trace(self, metric: Tensor | None) -> Tensor:
        return (self.diagonal if metric is None else self.diagonal / metric).sum()

    def solve(
        self, damping: float, metric: Tensor | None = None, center: Tensor | None = None
    ) -> DampedStep:
        """The minimizer with a damping.

        Args:
            damping: `mu`, above zero.
            metric: `D`, positive, shape `(n,)`; the identity by default.
            center: `c`, shape `(n,)`; zero by default.
        """
        check_number("damping", damping, above=0.0)
        damping = self._resolved(damping, metric)
        weights = damping * (1.0 if metric is None else metric) + self._rest
        moved, iterations = self._solve(damping, metric, weights, self._right_side(center))
        x = moved if center is None else moved + center
        measured = x if metric is None else metric * x
        slope, along, damped, square = WHOLE.to_host(
            sums=(self._grad @ x, measured @ x, measured @ moved, x @ x)
        )
        # `A x = -g - mu D (x - c)`: no difference of large numbers is taken.
        bend = -slope - damping * damped
        return DampedStep(
            x,
            slope,
            0.5 * (damping * damped - slope),
            sqrt(square),
            bend / along if along else inf,
            damping * along > -0.5 * slope,
            iterations,
        )

    def _right_side(self, center: Tensor | None) -> _Right:
        """The right side of the system for the way from a center."""
        return _Right.of(self, center)

    def solve_in(
        self, damping: float, metric: Tensor | None, low: Tensor, high: Tensor
    ) -> DampedStep:
        """The minimizer with a damping whose entries lie within bounds.

        Args:
            damping: `mu`, above zero.
            metric: `D`, positive, shape `(n,)`; the identity by default.
            low: Lower bounds of the step, at most zero.
            high: Upper bounds of the step, at least zero.
        """
        H = self._matrix.clone()
        H.diagonal().add_(self._rest)
        g, bounds = self._grad, (low, high)
        if metric is not None:  # in units of the metric
            units = metric.rsqrt()
            H, g = units[:, None] * H * units, units * g
            low, high = low / units, high / units
        self.factorization = "cholesky"
        step = BoxedQuadratic(H, g, low, high).damped(damping)
        x = step.x
        if metric is not None:  # at a bound it is there to the last bit
            x = torch.where(x <= low, bounds[0], torch.where(x >= high, bounds[1], units * x))
        slope, along, square = WHOLE.to_host(sums=(g @ step.x, step.x @ step.x, x @ x))
        bend = -2.0 * (slope + step.decrease)
        return DampedStep(
            x, slope, step.decrease, sqrt(square), bend / along if along else inf, step.held
        )

    def accelerate(self, damping: float, metric: Tensor | None, bend: Tensor) -> Tensor:
        """The correction for residuals that bend along a step: geodesic acceleration.

        Args:
            damping: That of the step.
            metric: That of the step.
            bend: The second derivative of the residuals along the step, shape `(N,)`.

        Returns:
            The solution of the same system with `-J'bend` on its right side, shape `(n,)`.
        """
        damping = self._resolved(damping, metric)
        weights = damping * (1.0 if metric is None else metric) + self._rest
        right = _Right(bend, None, self.jacobian.pull(bend))
        return self._solve(damping, metric, weights, right)[0]

    def products_along(self, x: Tensor) -> Tensor:
        """`J x`, shape `(N,)`."""
        return self.jacobian.push(x)

    def _resolved(self, damping: float, metric: Tensor | None) -> float:
        """The damping, or the smallest one that is not lost in rounding errors."""
        return damping

    @abstractmethod
    def _solve(
        self, damping: float, metric: Tensor | None, weights: float | Tensor, right: _Right
    ) -> tuple[Tensor, int]:
        """The solution of `(J'J + diag(weights)) d = -right.grad`, and a number of iterations."""


@dataclass(frozen=True, slots=True)
class _Right:
    """The right side `-(J'r + q)` of a system, whole and in parts."""

    residuals: Tensor
    rest: Tensor | None
    grad: Tensor

    @classmethod
    def of(cls, system: DampedLeastSquares, center: Tensor | None) -> _Right:
        """The right side of the system for the way from a center."""
        jacobian = system.jacobian
        residuals, rest, grad = jacobian.residuals, jacobian.rest_gradient, system._grad
        if center is None:
            return cls(residuals, rest, grad)
        image = jacobian.push(center)
        grad = grad + jacobian.pull(image)
        diagonal = system._rest
        if isinstance(diagonal, Tensor) or diagonal:
            more = diagonal * center
            grad, rest = grad + more, more if rest is None else rest + more
        return cls(residuals + image, rest, grad)


class _Primal(DampedLeastSquares):
    """Systems of `n` equations."""

    name = "primal"

    def __init__(self, jacobian: ResidualJacobian, grad: Tensor) -> None:
        super().__init__(jacobian, grad)
        rows, size = jacobian.rows, jacobian.size
        self._small = max(rows, size) * size * size <= _SMALL

    @cached_property
    def _matrix(self) -> Tensor:
        """See `DampedLeastSquares._matrix`."""
        if self._small:
            return self._dense.T @ self._dense
        return self.jacobian.normal_matrix()

    @cached_property
    def _dense(self) -> Tensor:
        return self.jacobian.dense()

    @cached_property
    def diagonal(self) -> Tensor:
        """See `DampedLeastSquares.diagonal`."""
        if self._small:
            return self._dense.square().sum(0)
        return self._matrix.diagonal().clone()

    @property
    def finite(self) -> bool:
        """See `DampedLeastSquares.finite`."""
        return _is_finite(self._dense.square() if self._small else self._matrix.diagonal())

    @cached_property
    def _triangle(self) -> tuple[Tensor, Tensor]:
        """`R` and `Q'r` of `J = Q R`; `J` and `r` themselves where it has few rows."""
        J, r = self._dense, self.jacobian.residuals
        rows, size = J.shape
        if rows <= size + 1:
            return J, r
        # The last column of the factor of `[J, r]` is `Q'r`: no matrix `Q` is made.
        R = torch.linalg.qr(torch.cat((J, r[:, None]), 1), mode="r")[1]
        return R[:size, :size], R[:size, size]

    def _solve(
        self, damping: float, metric: Tensor | None, weights: float | Tensor, right: _Right
    ) -> tuple[Tensor, int]:
        if not self._small:
            found = self._by_cholesky(weights, right)
            if found is not None:
                return found, 0
        return self._by_qr(weights, right), 0

    def _by_cholesky(self, weights: float | Tensor, right: _Right) -> Tensor | None:
        """The solution; None where the matrix is too close to a singular one."""
        factor = cholesky(self._matrix, weights, self.factor_dtype)
        x = None if factor is None else factor.solve(right.grad)
        if factor is None or x is None:
            return None
        self.factorization = "cholesky"
        x.neg_()
        norm_of = torch.linalg.vector_norm
        for _ in range(_CORRECTIONS):
            # The matrix is rounded more than the Jacobian, which says what is missing.
            missing = right.grad + self.jacobian.pull(self.jacobian.push(x)) + weights * x
            correction = factor.solve(missing)
            if correction is None:
                return None
            length, error = WHOLE.to_host(norms=(norm_of(x), norm_of(correction)))
            if not error <= _ROUNDED * length:
                return None
            x.sub_(correction)
            if error <= _EXACT * length:
                return x
        return None

    def _by_qr(self, weights: float | Tensor, right: _Right) -> Tensor:
        """The solution without the normal equations."""
        self.factorization = "qr"
        if right.residuals is self.jacobian.residuals:
            above, image = self._triangle
        else:
            above, image = self._dense, right.residuals
        size = above.shape[1]
        roots = (above.new_zeros(size) + weights).sqrt()
        rest = roots.new_zeros(size) if right.rest is None else right.rest / roots
        below = torch.cat((torch.diag(roots), rest[:, None]), 1)
        whole = torch.cat((torch.cat((above, image[:, None]), 1), below))
        R = torch.linalg.qr(whole, mode="r")[1]
        column = R[:size, size, None]
        x: Tensor = torch.linalg.solve_triangular(R[:size, :size], column, upper=True)[:, 0]
        return x.neg_()


class _OfSums(DampedLeastSquares):
    """Systems of `n` equations where `J'J` is all that is known of `J`."""

    name = "primal"
    has_rows = False

    def __init__(self, sums: NormalEquations, grad: Tensor) -> None:
        self._sums, self._grad = sums, grad
        self._rest = sums.rest_diagonal

    @cached_property
    def diagonal(self) -> Tensor:
        """See `DampedLeastSquares.diagonal`."""
        return self._sums.diagonal()

    @cached_property
    def _matrix(self) -> Tensor:
        """See `DampedLeastSquares._matrix`."""
        return self._sums.normal_matrix()

    @property
    def finite(self) -> bool:
        """See `DampedLeastSquares.finite`."""
        return self._sums.finite and _is_finite(self.diagonal)

    def _right_side(self, center: Tensor | None) -> _Right:
        grad, none = self._grad, self._grad.new_empty(0)
        if center is not None:
            grad = grad + self._matrix @ center + self._rest * center
        return _Right(none, None, grad)

    def _solve(
        self, damping: float, metric: Tensor | None, weights: float | Tensor, right: _Right
    ) -> tuple[Tensor, int]:
        factor = cholesky(self._matrix, weights, self.factor_dtype)
        found = None if factor is None else factor.solve(right.grad)
        if found is not None:
            self.factorization = "cholesky"
            return found.neg_(), 0
        self.factorization = "eigen"
        matrix = self._matrix.clone()
        matrix.diagonal().add_(weights)
        values, vectors = torch.linalg.eigh(matrix)
        # What rounding has made of small ones, down to below zero, says nothing.
        least = len(values) * torch.finfo(values.dtype).eps * float(values[-1])
        return (vectors @ ((vectors.T @ right.grad) / values.clamp(min=least))).neg_(), 0


class _Dual(DampedLeastSquares):
    """Systems of as many equations as there are residuals."""

    name = "dual"
    _known: tuple[Tensor | None, Tensor] | None = None  # weights and the kernel with them
    _inverted: tuple[Tensor, Tensor] | None = None  # a metric and its inverse
    _size: tuple[Tensor, float] | None = None  # a kernel and its largest entry

    @property
    def _rests(self) -> bool:
        """True if something of the loss that is not in the residuals has a curvature."""
        return isinstance(self._rest, Tensor) or bool(self._rest)

    @property
    def finite(self) -> bool:
        """See `DampedLeastSquares.finite`."""
        return _is_finite(self._kernel(None).diagonal())

    def _kernel(self, weights: Tensor | None) -> Tensor:
        if self._known is None or self._known[0] is not weights:
            self._known = None
            self._known = weights, self.jacobian.kernel(weights)
        return self._known[1]

    def _weighted(self, metric: Tensor | None) -> Tensor:
        """The kernel with the inverse of the metric, which all dampings have in common."""
        return self._kernel(None if metric is None else self._inverse(metric))

    def _trace(self, metric: Tensor | None) -> Tensor:
        return self._weighted(metric).diagonal().sum()

    def _resolved(self, damping: float, metric: Tensor | None) -> float:
        """See `DampedLeastSquares._resolved`."""
        if self._rests:
            return damping
        kernel = self._weighted(metric)
        if self._size is None or self._size[0] is not kernel:
            (largest,) = WHOLE.to_host(largest=(kernel.diagonal(),))
            self._size = kernel, largest
        return max(damping, _RESOLVED * torch.finfo(kernel.dtype).eps * self._size[1])

    def _solve(
        self, damping: float, metric: Tensor | None, weights: float | Tensor, right: _Right
    ) -> tuple[Tensor, int]:
        """By the identity of Woodbury, with `w / a` for the inverse of the weights."""
        w: Tensor | None = None
        if not isinstance(weights, Tensor):
            a, kernel = weights, self._kernel(None)
        elif not self._rests:
            assert metric is not None
            w = self._inverse(metric)
            a, kernel = damping, self._weighted(metric)
        else:  # the weights are no multiple of what they are for another damping
            w = 1.0 / weights
            a, kernel = 1.0, self.jacobian.kernel(w)
        r, free = right.residuals, None
        if right.rest is not None:
            free = right.rest / a if w is None else w * right.rest / a
            r = r - self.jacobian.push(free)
        x = self.jacobian.pull(self._by_kernel(kernel, a, r))
        if w is not None:
            x = w * x
        if free is not None:
            x = x + free
        return -x, 0

    def _inverse(self, metric: Tensor) -> Tensor:
        """The inverse of the metric; the same tensor for the same metric."""
        if self._inverted is None or self._inverted[0] is not metric:
            self._inverted = metric, 1.0 / metric
        return self._inverted[1]

    def _by_kernel(self, kernel: Tensor, a: float, r: Tensor) -> Tensor:
        """The solution of `(kernel + a I) y = r`."""
        factor = cholesky(kernel, a, self.factor_dtype)
        found = None if factor is None else factor.solve(r)
        if found is not None:
            self.factorization = "cholesky"
            return found
        self.factorization = "eigen"
        values, vectors = torch.linalg.eigh(kernel)
        divisors = values.clamp(min=0.0) + a
        solved: Tensor = vectors @ ((vectors.T @ r) / divisors)
        return solved


class _Iterative(DampedLeastSquares):
    """Conjugate gradients on `J'J`, preconditioned by the diagonal."""

    name = "cg"
    tolerance = 1e-3
    most = 250

    @property
    def finite(self) -> bool:
        """See `DampedLeastSquares.finite`."""
        return _is_finite(self.diagonal)

    def _solve(
        self, damping: float, metric: Tensor | None, weights: float | Tensor, right: _Right
    ) -> tuple[Tensor, int]:
        inverse = Diagonal((self.diagonal + weights).reciprocal())
        solver = CG(self.most, tolerance=self.tolerance)
        # In units in which no square of a norm is out of range; a power of two rounds nothing.
        (largest,) = WHOLE.to_host(largest=(right.grad,))
        unit = 2.0 ** (frexp(largest)[1] - 1) if isfinite(largest) else 1.0
        found = solver(_Normal(self.jacobian, weights), right.grad / -unit, preconditioner=inverse)
        return found.x * unit, found.iterations


class _Normal(LinearOperator):
    """`J'J` with a diagonal added."""

    def __init__(self, jacobian: ResidualJacobian, weights: float | Tensor) -> None:
        self._jacobian, self._weights = jacobian, weights
        self.size = jacobian.size
        self.dtype, self.device = jacobian.residuals.dtype, jacobian.residuals.device

    def matvec(self, v: Tensor) -> Tensor:
        """See `LinearOperator.matvec`."""
        return self._jacobian.pull(self._jacobian.push(v)) + self._weights * v


def _is_finite(squares: Tensor) -> bool:
    """True if numbers that are not negative are finite, in one pass."""
    return bool(squares.sum().isfinite())


_KINDS: dict[str, type[DampedLeastSquares]] = {"primal": _Primal, "dual": _Dual, "cg": _Iterative}


def suited_solver(
    rows: int, size: int, dtype: torch.dtype, device: torch.device
) -> Literal["primal", "dual", "cg"]:
    """The solver that takes least, of those whose matrices fit in memory.

    >>> suited_solver(1000, 200, torch.float64, torch.device("cpu"))
    'primal'
    >>> suited_solver(1000, 5000, torch.float64, torch.device("cpu"))
    'dual'
    >>> suited_solver(10**6, 10**6, torch.float64, torch.device("cpu"))
    'cg'
    """
    best: Literal["primal", "dual"] = "primal" if size <= rows else "dual"
    if min(rows, size) > _LARGE:
        return "cg"
    try:
        _check_fits(best, rows, size, dtype, device)
    except TooLarge:
        return "cg"
    return best


def _check_fits(
    solver: str, rows: int, size: int, dtype: torch.dtype, device: torch.device
) -> None:
    side = size if solver == "primal" else rows
    other = "dual" if solver == "primal" and rows < size else "cg"
    if solver == "dual" and size < rows:
        other = "primal"
    check_fits(
        f"the {solver} system with its factorization",
        (_MATRICES, side, side),
        dtype,
        device,
        f"use solver={other!r}" + (", which needs no matrix" if other == "cg" else ""),
    )
