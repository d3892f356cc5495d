"""Preconditioned conjugate gradients, as second-order optimizers need them."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf, isfinite, sqrt

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_integer, check_number
from torch_secondorder._params.space import WHOLE
from torch_secondorder.curvature import LinearOperator
from torch_secondorder.solvers.base import Iterate, SolveResult, SolveStatus, check_system

__all__ = ["CG"]

# Iterates are kept at iterations 5, 7, 9, 11, 15, ...: each 1.3 times the last (Martens 2010).
_FIRST_KEPT, _SPACING = 5, 1.3


@dataclass(frozen=True, slots=True)
class CG:
    """Preconditioned conjugate gradients for `A x = b`, that is, for a minimum of `x'A x/2 - b'x`.

    Differences from the textbook (Hestenes and Stiefel 1952):

    - It may stop when the quadratic has stopped falling rather than when the residual is small, by
      the rule of Martens 2010, "Deep learning via Hessian-free optimization".
    - It stops at a direction of negative curvature, and at a trust radius (Steihaug 1983), measured
      in the norm of the inverse preconditioner. The iterate before a direction of negative
      curvature is kept: what was found there does not depend on it.
    - Curvature below the rounding of the largest that was met tells nothing. It is taken as large
      as that rounding, and `x` goes along it only where that still leads to the radius.
    - The residual is computed anew every `recompute` iterations, for in float32 the recurrence
      drifts.
    - Scalars stay on the device, and are looked at once an iteration.

    Args:
        max_iterations: Most iterations.
        tolerance: It ends where `|b - A x| <= tolerance |b|`.
        progress: Martens' rule: it ends after iteration `i` where the last `k = max(10, i / 10)`
            iterations lowered the quadratic by less than `k * progress` of what all together have;
            0 for never.
        slack: That rule applies only where `|b - A x| <= slack |b|`.
        keep_iterates: Whether to keep some iterates on the way, for backtracking.
        most_iterates: How many at most, 0 for any number. Where there are more, those remain that
            lie ever further apart towards the start.
        overwrites: Whether the memory of `x0` may be used for the solution.
        recompute: Iterations from one computation of the residual to the next; 0 for never.

    Raises:
        ValueError: A number is out of range.

    >>> from torch_secondorder.curvature import Diagonal
    >>> CG()(Diagonal(torch.tensor([1.0, 4.0])), torch.tensor([1.0, 1.0])).x
    tensor([1.0000, 0.2500])
    """

    max_iterations: int = 250
    tolerance: float = 1e-6
    progress: float = 0.0
    slack: float = inf
    keep_iterates: bool = False
    recompute: int = 50
    most_iterates: int = 0
    overwrites: bool = False

    def __post_init__(self) -> None:
        # An optimizer makes one for each system: ordinary numbers need no calls.
        counts = (self.max_iterations, self.recompute, self.most_iterates)
        if {*map(type, counts)} != {int} or min(counts) < 0 or self.max_iterations < 1:
            for name, least in (("max_iterations", 1), ("recompute", 0), ("most_iterates", 0)):
                check_integer(name, getattr(self, name), least)
        for name in ("tolerance", "progress"):
            value = getattr(self, name)
            if type(value) is not float or not 0.0 <= value < 1.0:
                check_number(name, value, low=0, below=1)
        if not self.slack > 0:
            raise ValueError(f"slack must be above 0, got {self.slack!r}")

    def __call__(
        self,
        A: LinearOperator,
        b: Tensor,
        *,
        x0: Tensor | None = None,
        preconditioner: LinearOperator | None = None,
        radius: float | None = None,
        first_product: Tensor | None = None,
    ) -> SolveResult:
        """Solves the system; see `LinearSolver`.

        Args:
            A: The operator.
            b: Shape `(n,)`.
            x0: The solver begins where the quadratic is least along it; zero by default. See
                `overwrites`.
            preconditioner: Positive definite, close to the inverse of `A`.
            radius: The trust radius; it needs a start at zero.
            first_product: `A P b` with the preconditioner `P`, where that is known already: it is
                the first product, if the start is zero. Its memory is used.

        Raises:
            ValueError: Shapes do not fit, `b` is not finite, the preconditioner is not positive
                definite, the radius is out of range, or both a radius and a start were given.
        """
        check_system(A, b, x0, preconditioner)
        if radius is not None and x0 is not None:
            raise ValueError("a trust radius needs a start at zero: leave x0 out")
        if radius is not None and not 0 <= radius < inf:
            raise ValueError(f"the radius must be at least 0 and finite, got {radius!r}")
        start = None if x0 is None else x0.detach()
        run = _Run(A, b.detach(), start, preconditioner, radius, overwrites=self.overwrites)
        if start is None:
            run.known = first_product
        quadratics, iterates = [run.quadratic], list[Iterate]()
        next_kept, number, kept_at = float(_FIRST_KEPT), 0, -1
        numbers: list[int] = []  # which of those that might be kept are
        target = max(self.tolerance, torch.finfo(run.x.dtype).eps) * run.size_of_b
        status = SolveStatus.CONVERGED if run.residual <= target else None
        while status is None:
            if self.keep_iterates and run.count >= ceil(next_kept):
                if 0 < self.most_iterates <= len(iterates):
                    least = _least_missed(numbers, number)
                    del iterates[least], numbers[least]
                iterates.append(Iterate(run.x.clone(), -run.quadratic))
                numbers.append(number)
                next_kept, number, kept_at = next_kept * _SPACING, number + 1, run.count
            status = run.iterate(bool(self.recompute) and (run.count + 1) % self.recompute == 0)
            if status is None:
                quadratics.append(run.quadratic)
                status = self._ending(run, quadratics, target)
        if kept_at == run.count:  # the last iteration went nowhere
            iterates.pop()
        if run.interior is not None:
            iterates.append(run.interior)
        return run.result(status, iterates)

    def _ending(self, run: _Run, quadratics: list[float], target: float) -> SolveStatus | None:
        if run.residual <= target:
            return SolveStatus.CONVERGED
        if self.progress and run.residual <= self.slack * run.size_of_b:
            k = max(10, ceil(0.1 * run.count))
            if run.count > k and quadratics[-1] < 0:
                share = (quadratics[-1] - quadratics[-1 - k]) / quadratics[-1]
                if share < k * self.progress:
                    return SolveStatus.SLOW_PROGRESS
        return SolveStatus.MAX_ITERATIONS if run.count >= self.max_iterations else None


def _least_missed(numbers: list[int], following: int) -> int:
    """The place that leaves the smallest gap, as seen from the place that follows them."""
    gaps = [b - a for a, b in zip([-1, *numbers], [*numbers[1:], following], strict=False)]
    shares = [gap / (following - own) for gap, own in zip(gaps, numbers, strict=True)]
    return shares.index(min(shares))


class _Run:
    """The iteration: what lives on the device, and what the host knows of it.

    Attributes:
        x: The iterate.
        count: Iterations done.
        quadratic: `x'A x/2 - b'x`.
        residual: `|b - A x|`.
        size_of_b: `|b|`.
        known: The product with the first direction, where it need not be made.
        interior: The iterate from which a direction of negative curvature led to the radius.
    """

    def __init__(
        self,
        A: LinearOperator,
        b: Tensor,
        x0: Tensor | None,
        preconditioner: LinearOperator | None,
        radius: float | None,
        *,
        overwrites: bool,
    ) -> None:
        self._A, self._b, self._space = A, b, A.space
        self._whole = A.space is WHOLE  # sums need no message then
        self._preconditioner = preconditioner
        self._radius = radius
        self.count = 0
        self.known: Tensor | None = None
        self.interior: Iterate | None = None
        self._products = 0
        self._negative: tuple[Tensor, float] | None = None
        # Squares of norms in the metric of the inverse preconditioner, by recurrence: of x, of p,
        # and their product (Conn, Gould and Toint 2000, section 7.5.1).
        self._x_x = self._x_p = 0.0
        self._largest, self._precision = 0.0, torch.finfo(b.dtype).eps  # curvature in that metric
        if x0 is None:
            self.x, self._r = torch.zeros_like(b), b.clone()
        else:
            # As far along it as is best: a step that was right elsewhere may be too long here.
            self._products += 1
            image = A.matvec(x0)
            curvature, slope = self._space.totals(x0 @ image, b @ x0)
            share = torch.where(curvature > 0, slope / curvature, 0.0)
            kept = share > 0  # else what is multiplied with zero may still be no number
            self.x = torch.where(kept, share * x0, 0.0)
            if overwrites:
                self.x = x0.copy_(self.x)
            self._r = torch.where(kept, b - share * image, b)
        self._spare = self._r if radius is None else torch.empty_like(self._r)
        z = self._r if preconditioner is None else preconditioner.matvec(self._r)
        self._p = z.clone()
        r_p = self._r @ self._p
        self._r_z = self._r_p = r_p if self._whole else self._space.total(r_p)
        r_r, x_br, self.size_of_b, r_z = self._space.to_host(
            sums=(self._r @ self._r, self.x @ torch.add(b, self._r)),
            norms=(torch.linalg.vector_norm(b),),
            whole=(self._r_z,),
        )
        if not isfinite(self.size_of_b):
            raise ValueError(f"b must be finite, but its norm is {self.size_of_b}")
        if preconditioner is not None:
            self._check(r_z, r_r)
        self._host_r_z = self._p_p = r_z
        self.residual = sqrt(r_r)
        self.quadratic = -0.5 * x_br

    def iterate(self, recompute: bool) -> SolveStatus | None:
        """One iteration; says why it was the last one, if it was.

        Args:
            recompute: Whether to put the true residual in place of the one by recurrence.
        """
        if not 0 < self._host_r_z < inf:  # of the preconditioner, or beyond the range of numbers
            return SolveStatus.NONFINITE
        preconditioner, whole = self._preconditioner, self._whole
        image, self.known = self.known, None
        if image is None:
            self._products += 1
            image = self._A.matvec(self._p)
        p_A_p = self._p @ image
        if not whole:
            p_A_p = self._space.total(p_A_p)
        # Curvature that is as good as none beside the largest one met: nothing moves then.
        least = self._precision * self._largest * self._p_p
        alpha = torch.where(p_A_p > least, self._r_p / p_A_p, 0.0)
        # In place, for the memory's sake, unless the step may have to end at the radius instead.
        r = torch.addcmul(self._r, image, alpha, value=-1, out=self._spare)
        z = r if preconditioner is None else preconditioner.matvec(r)
        r_r = r @ r
        r_z = r_r if preconditioner is None else r @ z
        if not whole:
            r_z, r_r = self._space.totals(r_z, r_r)
        beta = r_z / self._r_z
        if recompute:
            # Only what p is made of is replaced: beta belongs to the recurrence.
            if self._radius is None:
                image = r  # the product is needed at the radius only, and it is a vector
            there = torch.addcmul(self.x, self._p, alpha, out=r)
            self._products += 1
            torch.sub(self._b, self._A.matvec(there), out=r)
            z = r if preconditioner is None else preconditioner.matvec(r)
            r_r = r @ r
            r_z = r_r if preconditioner is None else r @ z
            if not whole:
                r_z, r_r = self._space.totals(r_z, r_r)
        curvature, step, share, new_r_z, new_r_r = self._space.to_host(
            whole=(p_A_p, alpha, beta, r_z, r_r)
        )
        if not isfinite(curvature):
            return SolveStatus.NONFINITE
        if curvature <= least:
            negative = curvature < -least or not least
            self._note_negative(curvature if negative else 0.0)
            if self._radius is not None and (negative or self._beyond(self._host_r_z / least)):
                if self.count:
                    self.interior = Iterate(self.x.clone(), -self.quadratic, sqrt(self._x_x))
                self._to_boundary(image)
            return SolveStatus.NEGATIVE_CURVATURE
        if self._radius is not None:
            if self._beyond(step):
                self._to_boundary(image)
                return SolveStatus.BOUNDARY
            self._x_x = self._square_after(step)
        if not (isfinite(step) and isfinite(new_r_r)):
            return SolveStatus.NONFINITE
        if preconditioner is not None:
            self._check(new_r_z, new_r_r)
        self._largest = max(self._largest, curvature / self._p_p)
        self.count += 1
        self.x.add_(self._p, alpha=step)
        self._r, self._spare = r, self._r
        self.quadratic -= 0.5 * step * (step * curvature)
        self.residual = sqrt(new_r_r)
        self._x_p = share * (self._x_p + step * self._p_p)
        self._p_p = new_r_z + share * share * self._p_p
        torch.addcmul(z, self._p, beta, out=self._p)
        self._r_z, self._host_r_z = r_z, new_r_z
        # By recurrence the residual is orthogonal to the directions before; the true one is not.
        self._r_p = r_z
        if recompute:
            r_p = r @ self._p
            self._r_p = r_p if whole else self._space.total(r_p)
        return None

    def result(self, status: SolveStatus, iterates: list[Iterate]) -> SolveResult:
        """The result, with the status it ended with."""
        decrease, residual = -self.quadratic, self.residual
        if status is not SolveStatus.NONFINITE:  # or r may not be either
            decrease, r_r = self._space.to_host(
                sums=(0.5 * (self.x @ (self._b + self._r)), self._r @ self._r)
            )
            residual = sqrt(r_r)
        direction, curvature = self._negative or (None, 0.0)
        return SolveResult(
            x=self.x,
            status=status,
            iterations=self.count,
            products=self._products,
            residual_norm=residual / self.size_of_b if self.size_of_b else residual,
            decrease=decrease,
            length=sqrt(self._x_x),
            negative_direction=direction,
            negative_curvature=curvature,
            iterates=tuple(iterates),
        )

    def _check(self, r_z: float, r_r: float) -> None:
        # Where r is tiny, a zero may have underflowed.
        if -inf < r_z < 0 < r_r or (r_z == 0 and r_r > torch.finfo(self.x.dtype).tiny ** 0.5):
            raise ValueError(f"the preconditioner is not positive definite: r'P r is {r_z}")

    def _note_negative(self, curvature: float) -> None:
        (square,) = self._space.to_host(sums=[self._p @ self._p])
        self._negative = self._p, min(curvature / square, 0.0) if square else 0.0

    def _square_after(self, step: float) -> float:
        """The square of the length of `x` after a step along `p`."""
        return self._x_x + 2 * step * self._x_p + step * step * self._p_p

    def _beyond(self, step: float) -> bool:
        """True if a step along `p` crosses the trust radius."""
        assert self._radius is not None
        # Where the step is infinite, the square is no number.
        return not self._square_after(step) < self._radius**2

    def _to_boundary(self, image: Tensor) -> None:
        """Moves `x` along `p` to where that line meets the radius."""
        assert self._radius is not None
        room = max(self._radius**2 - self._x_x, 0.0)
        root = sqrt(self._x_p**2 + self._p_p * room)
        # The larger root, written without cancellation.
        tau = room / (self._x_p + root) if self._x_p > 0 else (root - self._x_p) / self._p_p
        self.x.add_(self._p, alpha=tau)
        self._r.sub_(image, alpha=tau)
        self._x_x = self._radius**2
        self.count += 1
