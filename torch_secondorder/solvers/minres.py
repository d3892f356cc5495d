"""MINRES: symmetric systems that need not be definite, or even regular."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from torch_secondorder._foundation.checks import check_integer, check_number
from torch_secondorder._foundation.deprecation import renamed
from torch_secondorder.curvature import LinearOperator
from torch_secondorder.solvers._minres_iteration import MinresIteration
from torch_secondorder.solvers.base import SolveResult, SolveStatus, check_system

__all__ = ["MINRES"]

# Iterations after which a product more costs little, and the residual is worth one.
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
        run = MinresIteration(A, b.detach(), None if x0 is None else x0.detach(), preconditioner)
        target = max(self.tolerance, run.precision)
        status, verified = run.begin(target), False
        while status is None and run.iterations < self.max_iterations:
            status = run.iterate(target, self.stop_at_negative_curvature)
            if status is SolveStatus.CONVERGED and run.iterations >= _LONG and not verified:
                # Once: what rounding adds from here on is as much smaller as the residual is.
                status, verified = run.restart(target), True
        return run.result(status or SolveStatus.MAX_ITERATIONS)


if not TYPE_CHECKING:
    __getattr__ = renamed(__name__, {"Minres": "MINRES"})
