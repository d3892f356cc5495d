"""The part of MINRES that works on vectors."""

from __future__ import annotations

from math import isfinite, sqrt

import torch
from torch import Tensor

from torch_secondorder.curvature import LinearOperator
from torch_secondorder.solvers._minres_scalars import MinresScalars
from torch_secondorder.solvers.base import SolveResult, SolveStatus

__all__ = ["MinresIteration"]


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


class MinresIteration:
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
        u = torch.add(product, self.u_before, alpha=-self.beta, out=self.u_before)
        alpha = self.space.total(torch.dot(v, u))
        u.addcmul_(self.u, alpha, value=-1.0)
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
        """Whether the curvature along `p` is negative, or zero, or only seemed so.

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
        """What there is to say at the end."""
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
