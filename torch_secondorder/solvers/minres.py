"""MINRES: symmetric systems that need not be definite, or even regular."""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot, isfinite, sqrt
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_integer, check_number
from torch_secondorder._foundation.deprecation import renamed
from torch_secondorder.curvature import LinearOperator
from torch_secondorder.solvers.base import SolveResult, SolveStatus, check_system
from torch_secondorder.solvers.lanczos import three_terms

__all__ = ["MINRES"]

# Iterations after which one product more costs little, and the true residual is worth one.
_LONG = 50


@dataclass(frozen=True, slots=True)
class MINRES:
    """Minimizes `|b - A x|` over Krylov spaces that grow by one product with `A` per iteration.

    The method of Paige and Saunders 1975. `A` may be indefinite or singular. If `A x = b` has no
    solution, the result is one of the `x` whose residual is smallest, generally not the shortest
    of them (Choi, Paige and Saunders 2011).

    Every residual `r` on the way is tested for `r'A r <= 0`, at the cost of no further product
    (Liu and Roosta 2022). Where that holds, `A` is not positive definite, and the quadratic
    `x'A x / 2 - b'x` falls along `r` without end. Up to there, from `x0 = 0`, it falls and `|x|`
    grows with every iteration. With a preconditioner `M` the direction tested is `M r`.

    Args:
        max_iterations: The most iterations.
        tolerance: Residual to reach, `|b - A x| / |b|` in the Euclidean norm, in [0, 1). Machine
            epsilon takes its place where that is larger. The residual is known by recursion; the
            true one also has the rounding of the process in it, up to machine epsilon times the
            square of the condition of `A` (Sleijpen, van der Vorst and Modersitzki 2000). After 50
            iterations or more it is therefore computed once in the end, and where it is larger the
            iteration begins anew from there.
        stop_at_negative_curvature: Whether to stop at a direction of negative curvature, with the
            iterate before it. If not, the indefinite system is solved.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> from torch_secondorder.curvature import Diagonal
        >>> A = Diagonal(torch.tensor([2.0, -4.0]))
        >>> b = torch.tensor([1.0, 1.0])
        >>> result = MINRES()(A, b)
        >>> result.status.name, result.negative_direction, round(result.negative_curvature, 4)
        ('NEGATIVE_CURVATURE', tensor([1., 1.]), -1.0)
        >>> result = MINRES(stop_at_negative_curvature=False)(A, b)
        >>> result.status.name, result.iterations, [round(x, 4) for x in result.x.tolist()]
        ('CONVERGED', 2, [0.5, -0.25])
    """

    max_iterations: int = 250
    tolerance: float = 1e-6
    stop_at_negative_curvature: bool = True

    def __post_init__(self) -> None:
        check_integer("max_iterations", self.max_iterations)
        check_number("tolerance", self.tolerance, low=0, below=1)

    def __call__(
        self,
        A: LinearOperator,
        b: Tensor,
        *,
        x0: Tensor | None = None,
        preconditioner: LinearOperator | None = None,
    ) -> SolveResult:
        """Solves `A x = b`; see `LinearSolver`.

        The host waits for the device once per iteration, once more where the curvature looks
        negative, and once each at the beginning, at the end and where the residual is computed.

        Args:
            A: A symmetric operator.
            b: Shape `(n,)`.
            x0: Where to begin, shape `(n,)`; zero by default.
            preconditioner: A positive definite operator `M` close to the inverse of `A`. What
                falls with every iteration is then `r'M r`; `tolerance` is still about `|r|`.

        Returns:
            One of the statuses CONVERGED, NEGATIVE_CURVATURE, MAX_ITERATIONS, SINGULAR and
            NONFINITE. SINGULAR says that the next step would change the residual by rounding, about
            `eps |A|` times its length, rather than reduce it, or that the curvature along the
            residual is zero; a consistent system whose condition is beyond the precision is not
            told from an inconsistent one. What `x` has of the null space is then arbitrary, and
            `decrease` may be negative. Where `b` is zero, so is `x`.

        Raises:
            ValueError: If shapes do not fit, `b` or `x0` is not finite, or the preconditioner
                turns out not to be positive definite.
        """
        check_system(A, b, x0, preconditioner)
        run = _Iteration(A, b.detach(), None if x0 is None else x0.detach(), preconditioner)
        target = max(self.tolerance, run.precision)
        status, verified = run.begin(target), False
        while status is None and run.iterations < self.max_iterations:
            status = run.iterate(target, self.stop_at_negative_curvature)
            if status is SolveStatus.CONVERGED and run.iterations >= _LONG and not verified:
                # Once: what rounding adds from here on is as much smaller as the residual is.
                status, verified = run.restart(target), True
        return run.result(status or SolveStatus.MAX_ITERATIONS)


class _Scaled:
    """The vector `scale * vector`, which can be scaled without being touched."""

    def __init__(self, vector: Tensor) -> None:
        self.vector = vector
        self.scale = 1.0

    def combine(self, factor: float, other: Tensor, coefficient: float) -> None:
        """Becomes `factor` times itself plus `coefficient` times `other`."""
        self.scale *= factor
        if self.scale < 1e-12:  # before the vector grows out of float32
            self.vector.mul_(self.scale)
            self.scale = 1.0
        self.vector.add_(other, alpha=coefficient / self.scale)


class _Iteration:
    """One solve by MINRES, on the Lanczos process `A V = U T` with `V = M U` and `U'V = I`.

    Attributes:
        x: The iterate.
        r: Its residual `b - A x`, by recursion.
        p: The same multiplied by `M`.
        residual: The Euclidean norm of `r`.
        u: The newest Lanczos vector, before it is normalized with `beta`.
        z: The same multiplied by `M`.
        d: The direction in which `x` last moved.
        space: Where all these live.
    """

    def __init__(
        self, A: LinearOperator, b: Tensor, x0: Tensor | None, M: LinearOperator | None
    ) -> None:
        self.A, self.b, self.M = A, b, M
        self.space = A.space
        self.precision = torch.finfo(b.dtype).eps
        self.x = torch.zeros_like(b) if x0 is None else x0.to(b, copy=True)
        self.iterations = 0
        self.products = 0 if x0 is None else 1
        self.u = b.clone() if x0 is None else b - (A @ self.x).detach()
        self.z = self._precondition(self.u)
        self.r = _Scaled(self.u.clone())
        self.p = self.r if M is None else _Scaled(self.z.clone())
        self.u_before, self.d, self.d_before = (torch.zeros_like(b) for _ in range(3))
        self.v = None if M is None else torch.empty_like(b)
        self.negative_curvature = 0.0

    def _precondition(self, u: Tensor) -> Tensor:
        return u if self.M is None else (self.M @ u).detach()

    def begin(self, target: float) -> SolveStatus | None:
        """Measures the first residual, and ends here where there is nothing to do."""
        u_z, self.b_norm, self.residual = self.space.to_host(
            sums=[torch.dot(self.u, self.z)],
            norms=[torch.linalg.vector_norm(t) for t in (self.b, self.u)],
        )
        if self.b_norm == 0.0:
            self.x.zero_()
            self.r.vector.zero_()
            return SolveStatus.CONVERGED
        if not isfinite(self.b_norm):
            raise ValueError(f"b must be finite, but its norm is {self.b_norm}")
        if not isfinite(self.residual):
            (misfits,) = self.space.to_host(sums=[self.x.isfinite().logical_not_().sum()])
            if misfits:
                raise ValueError("x0 must be finite")
            return SolveStatus.NONFINITE
        if self.residual <= target * self.b_norm:
            return SolveStatus.CONVERGED
        if not isfinite(u_z):
            return SolveStatus.NONFINITE
        self.beta = self._length(self.residual, u_z)
        self.scalars = MinresScalars(self.beta)
        return None

    def restart(self, target: float) -> SolveStatus | None:
        """Computes the residual, and begins anew from there unless it is small enough."""
        self.products += 1
        self.u = self.b - (self.A @ self.x).detach()
        self.z = self._precondition(self.u)
        self.r = _Scaled(self.u.clone())
        self.p = self.r if self.M is None else _Scaled(self.z.clone())
        for vector in (self.u_before, self.d, self.d_before):
            vector.zero_()
        return self.begin(target)

    def iterate(self, target: float, stop_at_negative_curvature: bool) -> SolveStatus | None:
        """One iteration, unless the product shows that it should not be done."""
        # M may give its own memory away, or its argument, and so may A below: a product is never
        # written to, and M's is used before its argument changes.
        v = self.u if self.v is None else torch.mul(self.z, 1.0 / self.beta, out=self.v)
        self.u.mul_(1.0 / self.beta)
        measured = self._multiply(v)
        if not all(map(isfinite, measured)):
            return SolveStatus.NONFINITE
        alpha, u_norm, u_z, r_u = measured
        self.beta = self._length(u_norm, u_z)
        self.scalars.extend(alpha, self.beta)
        if stop_at_negative_curvature and self.scalars.curvature <= 0.0:
            status = self._judge_curvature()
            if status is not None:
                return status
        if self.scalars.spoilt(self.precision):
            return SolveStatus.SINGULAR
        self._move(v, u_norm, r_u)
        return SolveStatus.CONVERGED if self.residual <= target * self.b_norm else None

    def _multiply(self, v: Tensor) -> list[float]:
        """Advances `u` and `z` and gives `alpha`, `|u|`, `u'z` and `r'u`."""
        product = (self.A @ v).detach()
        self.products += 1
        u, alpha = three_terms(product, v, self.u, self.u_before, self.beta, self.space)
        self.u_before, self.u, self.z = self.u, u, self._precondition(u)
        u_norm = torch.linalg.vector_norm(u)
        if self.M is None:
            length, curvature = self.space.to_host(norms=[u_norm], whole=[alpha])
            return [curvature, length, 0.0, 0.0]  # the last two are not needed
        u_z, r_u, length, curvature = self.space.to_host(
            sums=(torch.dot(u, self.z), torch.dot(self.r.vector, u)),
            norms=(u_norm,),
            whole=(alpha,),
        )
        return [curvature, length, u_z, r_u]

    def _length(self, u_norm: float, u_z: float) -> float:
        """`sqrt(u'M u)`."""
        if self.M is None:
            return u_norm
        if u_z < 0.0 or (u_z == 0.0 and u_norm > 0.0):
            raise ValueError(f"the preconditioner is not positive definite: u'M u is {u_z}")
        return sqrt(u_z)

    def _judge_curvature(self) -> SolveStatus | None:
        """Tells negative curvature along `p` from rounding; None if it is positive after all.

        It is computed anew from vectors, for the scalars hold only as long as the Lanczos vectors
        are orthogonal. A definite `A` has `p'A p >= |A p|^2 / |A|`, so with a large `A p` a zero is
        as good a proof as a negative number. If nothing is proved, `A` is singular to rounding, and
        a step could go anywhere.
        """
        t, p, u, u_next = self.scalars, self.p.vector, self.u_before, self.u
        p_u, p_next, p_p = self.space.to_host(
            sums=(torch.dot(p, u), torch.dot(p, u_next), torch.dot(p, p))
        )
        p_Ap = (t.gamma_bar * p_u - t.c * p_next) * t.phi * self.p.scale
        curvature = p_Ap / (t.phi * t.phi)
        if curvature > 0.0:
            return None
        doubtful = 100.0 * self.precision * t.magnitude * t.magnitude
        if max(-curvature * t.magnitude, t.slope * t.slope) <= doubtful:
            return SolveStatus.SINGULAR
        self.negative_curvature = p_Ap / (p_p * self.p.scale * self.p.scale)
        return SolveStatus.NEGATIVE_CURVATURE

    def _move(self, v: Tensor, u_norm: float, r_u: float) -> None:
        """Takes the step along `v` and all before it that makes the residual smallest."""
        t = self.scalars
        d = torch.add(v, self.d_before, alpha=-t.weight_before, out=self.d_before)
        d.add_(self.d, alpha=-t.weight)
        self.d_before, self.d = self.d, d
        t.advance()
        self.x.add_(d, alpha=t.step)
        self.iterations += 1
        factor, r_u = t.s * t.s, r_u * self.r.scale
        self.r.combine(factor, self.u, -t.step)
        if self.M is None:
            self.residual = t.phi
            return
        self.p.combine(factor, self.z, -t.step)
        kept, added = factor * self.residual, t.step * u_norm
        square = kept * kept + added * added - 2.0 * factor * t.step * r_u
        self.residual = sqrt(max(square, 0.0))

    def result(self, status: SolveStatus) -> SolveResult:
        """The result, with the status it ended with."""
        r = self.r.vector.mul_(self.r.scale)
        b_x, r_x, r_norm = self.space.to_host(
            sums=(torch.dot(self.b, self.x), torch.dot(r, self.x)),
            norms=(torch.linalg.vector_norm(r),),
        )
        negative = status is SolveStatus.NEGATIVE_CURVATURE
        if self.M is not None and negative:
            self.p.vector.mul_(self.p.scale)
        return SolveResult(
            x=self.x,
            status=status,
            iterations=self.iterations,
            products=self.products,
            residual_norm=r_norm / self.b_norm if self.b_norm else 0.0,
            decrease=0.5 * (b_x + r_x),  # A x = b - r
            negative_direction=self.p.vector if negative else None,
            negative_curvature=self.negative_curvature,
        )


class MinresScalars:
    """The arithmetic on single numbers: a QR factorization of `T` that grows with it.

    `T` has `alpha` on and `beta` beside its diagonal. Reflections `[c s; s -c]` make it triangular
    while it grows; the entries are named as by Liu and Roosta 2022. The iterates are
    `x_k = x_{k-1} + step d_k` with `d_k = v_k - weight d_{k-1} - weight_before d_{k-2}`, so the
    lengths of the `d` follow too, as long as the Lanczos vectors are orthogonal. Lengths are the
    preconditioner's: `sqrt(r'M r)` for a residual, and by the inverse of `M` for a `d`.

    Attributes:
        phi: The norm of the residual `r`.
        magnitude: The largest column of `T` so far, a lower bound of `|A|`.
        step: How far `x` is to go along the next `d`.
    """

    def __init__(self, phi: float) -> None:
        self.phi = phi
        self.magnitude = self.step = 0.0
        # The first column is treated like any other, with nothing before it.
        self.c, self.s = -1.0, 0.0
        self.beta = self.delta = self.delta_bar = self.gamma_bar = 0.0
        self.epsilon = self.epsilon_next = 0.0
        self.gamma, self.gamma_before, self.gamma_next = 1.0, 1.0, 1.0
        self.c_next, self.s_next = 0.0, 1.0
        # The squares of the last two d, and the product of both.
        self._d_d = self._d_d_before = self._d_before_d = 0.0

    def extend(self, alpha: float, beta: float) -> None:
        """Takes a new column of `T` and finds the next step, not yet taken."""
        self.magnitude = max(self.magnitude, hypot(self.beta, alpha, beta))
        self.beta = beta
        self.delta = self.c * self.delta_bar + self.s * alpha
        self.gamma_bar = self.s * self.delta_bar - self.c * alpha
        self.delta_bar = -self.c * beta
        self.epsilon, self.epsilon_next = self.epsilon_next, self.s * beta
        self.gamma_next = hypot(self.gamma_bar, beta)
        if self.gamma_next > 0.0:
            self.c_next, self.s_next = self.gamma_bar / self.gamma_next, beta / self.gamma_next
            self.step = self.c_next * self.phi / self.gamma_next

    @property
    def weight(self) -> float:
        """Of the last direction in the next one."""
        return self.delta / self.gamma

    @property
    def weight_before(self) -> float:
        """Of the last direction but one in the next one."""
        return self.epsilon / self.gamma_before

    @property
    def curvature(self) -> float:
        """`r'M A M r / r'M r` for the residual before the step."""
        return -self.c * self.gamma_bar

    @property
    def slope(self) -> float:
        """`|A M r| / |r|`, for `A M r = phi (gamma_bar u + delta_bar u_next)`."""
        return hypot(self.gamma_bar, self.delta_bar)

    def spoilt(self, precision: float) -> bool:
        """Tells that rounding would change the residual by more than the step reduces it.

        Where `A x = b` has no solution, the least residual `r` has `A r = 0`. Near it the steps
        grow very long, along `r`, and reduce the residual by nothing, while each of them changes it
        by the rounding of `A x`, about `precision |A| |step d|`. The same happens where the
        condition of `A` is beyond the precision. Steps that gain nothing and cost nothing are none
        of these: with as much negative as positive curvature, every other step is zero.
        """
        if self.slope == 0.0:
            return True
        loss = 10.0 * precision * self.magnitude * abs(self.step) * sqrt(self._next_d_d())
        gain = self.phi * self.c_next * self.c_next / (1.0 + self.s_next)
        negligible: float = precision ** (2 / 3) * self.phi
        return loss >= max(gain, negligible)

    def _next_d_d(self) -> float:
        w, w_before = self.weight, self.weight_before
        squares = w * w * self._d_d + w_before * w_before * self._d_d_before
        return max(1.0, 1.0 + squares + 2.0 * w * w_before * self._d_before_d)

    def advance(self) -> None:
        """Takes the step."""
        w, w_before, next_d_d = self.weight, self.weight_before, self._next_d_d()
        self._d_before_d = -w_before * self._d_before_d - w * self._d_d
        self._d_d, self._d_d_before = next_d_d, self._d_d
        self.gamma, self.gamma_before = self.gamma_next, self.gamma
        self.c, self.s = self.c_next, self.s_next
        self.phi *= self.s


if not TYPE_CHECKING:
    __getattr__ = renamed(__name__, {"Minres": "MINRES"})
