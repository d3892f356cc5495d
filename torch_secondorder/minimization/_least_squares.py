"""Runs of `LevenbergMarquardt` on functions that return residuals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._closure.capture import mark_outputs
from torch_secondorder._objective.functional import FunctionalObjective
from torch_secondorder._optim.flat import Descent, Iterate
from torch_secondorder._optim.info import StepStatus
from torch_secondorder.curvature.residual_jacobian import ResidualJacobian
from torch_secondorder.minimization._bounds import Bound
from torch_secondorder.minimization._gradients import Counts, recorded
from torch_secondorder.minimization._robust import LossName, cost_of
from torch_secondorder.minimization._runs import Problem
from torch_secondorder.minimization.result import LeastSquaresResult
from torch_secondorder.optim.levenberg_marquardt import LevenbergMarquardt

#: A call after each iteration with the point, the cost, the iterations and the evaluations so far;
#: True ends the minimization.
Report = Callable[[Any, float, int, int], bool]

# Up to so many unknowns the step is the best one within a radius, which takes a factorization by
# singular values; beyond, systems with a damping are solved.
_MOST_FOR_A_REGION = 2000

_MESSAGES = {
    -4: "no step lowers the cost any more; x is the best point found",
    -3: "residuals or their derivatives are not finite close to x, the best point found",
    -2: "the callback raised StopIteration",
    0: "max_nfev evaluations were used",
    1: "the residuals are orthogonal to all columns of the Jacobian up to gtol, or zero",
    2: "neither the last step nor the next one changes the cost by more than ftol, relatively",
    3: "the step is shorter than xtol, relative to x",
    4: "neither cost nor x changes by more than ftol and xtol any more, relatively",
}


@dataclass(frozen=True)
class Tolerances:
    """Tolerances of `least_squares`, at least a few times the machine epsilon; -1 for none."""

    ftol: float
    xtol: float
    gtol: float
    precision: float

    @classmethod
    def of(
        cls, ftol: float | None, xtol: float | None, gtol: float | None, dtype: torch.dtype
    ) -> Tolerances:
        """The tolerances for a dtype; None for one that is not tested."""
        eps = torch.finfo(dtype).eps
        found = [-1.0 if tol is None else max(tol, 4.0 * eps) for tol in (ftol, xtol, gtol)]
        return cls(found[0], found[1], found[2], eps)


class ResidualCost:
    """The cost of the residuals that a function returns, with checks of what it returns.

    Args:
        fun: Returns residuals for a tree.
        loss: See `cost_of`.
        scale: See `cost_of`.

    Attributes:
        shape: The shape of the residuals; None before the first call.
    """

    def __init__(self, fun: Callable[[Any], Any], loss: LossName, scale: float) -> None:
        self._fun, self._loss, self._scale = fun, loss, scale
        self.shape: torch.Size | None = None

    def __call__(self, x: Any) -> Tensor:
        """The cost at a tree; the residuals are marked."""
        r = self.residuals(x)
        if not r.requires_grad:
            raise ValueError(
                "the residuals do not depend on x by operations that autograd records: do not use "
                ".detach(), .data, NumPy, torch.no_grad() or torch.inference_mode(), or pass "
                "jac='2-point' for finite differences, which need no graph"
            )
        if self._loss != "linear":  # the squares show their residuals themselves
            r = mark_outputs(r)
        return cost_of(r, self._loss, self._scale)

    def residuals(self, x: Any) -> Tensor:
        """The residuals at a tree; a number becomes a vector of one entry."""
        r = recorded(self._fun, x)
        if not isinstance(r, Tensor) or r.is_complex() or not r.is_floating_point():
            kind = f"a tensor of {r.dtype}" if isinstance(r, Tensor) else f"{type(r).__name__}"
            hint = ""
            if isinstance(r, Tensor) and r.is_complex():
                hint = "; torch.view_as_real(r) has the same sum of squares"
            elif isinstance(r, (list, tuple)):
                hint = "; torch.stack or torch.cat makes one of several"
            raise TypeError(f"fun must return a tensor of real residuals, got {kind}{hint}")
        if self.shape is None:
            self._check_first(r)
            self.shape = r.shape
        elif r.shape != self.shape:
            raise ValueError(
                f"fun returned residuals of shape {tuple(r.shape)}, and of shape "
                f"{tuple(self.shape)} before: the number of residuals must not depend on x"
            )
        return r if r.dim() else r.reshape(1)

    @staticmethod
    def _check_first(r: Tensor) -> None:
        if not r.numel():
            raise ValueError(f"fun returned no residuals, a tensor of shape {tuple(r.shape)}")
        bad = ~r.detach().isfinite()
        if bool(bad.any()):
            place = tuple(bad.nonzero()[0].tolist())
            raise ValueError(
                f"residuals are not finite at x0: {int(bad.sum())} of {r.numel()}, the first at "
                f"{place}: choose another x0, or bounds that keep x where fun is defined"
            )


class Fit:
    """A least-squares problem, its run and its result.

    Args:
        fun: Returns residuals for a tree.
        leaves: The leaves of `x0`.
        structure: The structure of `x0`; None for one tensor.
        limits: The bounds of each leaf; None for none.
        loss: See `cost_of`.
        scale: See `cost_of`.
    """

    def __init__(
        self,
        fun: Callable[[Any], Any],
        leaves: Sequence[Tensor],
        structure: Any,
        limits: Sequence[tuple[Bound, Bound]] | None,
        loss: LossName,
        scale: float,
    ) -> None:
        self.cost = ResidualCost(fun, loss, scale)
        self._linear = loss == "linear"
        self._problem = Problem(leaves, structure, self.cost, Counts(), None, limits)
        self._status: int | None = None
        self._descent: Descent | None = None  # none where derivatives are not finite at x0

    def run(
        self,
        tolerances: Tolerances,
        max_nfev: int | None,
        report: Report | None,
        scaling: str,
        arguments: Mapping[str, Any],
    ) -> LeastSquaresResult:
        """Iterates to the solution.

        Args:
            tolerances: When the iteration ends.
            max_nfev: Most evaluations; None for a limit by the number of unknowns.
            report: Called after each iteration.
            scaling: See `LevenbergMarquardt`.
            arguments: Further arguments of the optimizer.
        """
        problem, self._tolerances, self._report = self._problem, tolerances, report
        size = sum(p.numel() for p in problem.params)
        given: dict[str, Any] = {
            "max_iter": 2**62,
            "scaling": scaling,
            "max_eval": 200 * (size + 1) if max_nfev is None else max_nfev,
            "tolerance_grad": 0.0,
            "tolerance_change": 0.0,
        }
        if size <= _MOST_FOR_A_REGION:
            given["globalization"] = "trust_region"
        given |= arguments
        if given.get("globalization") != "trust_region":
            given["tolerance_change"] = max(tolerances.xtol, 0.0)
        self._optimizer = optimizer = LevenbergMarquardt(problem.groups(), **given)
        optimizer._observe = self._observe
        optimizer.step(FunctionalObjective(self.cost, problem.tree()))
        return self._result()

    def _observe(self, descent: Descent, iterate: Iterate) -> Iterate:
        """See `FlatOptimizer._observe`."""
        self._descent, self._first = descent, descent.point.loss

        def watched(descent: Descent) -> StepStatus | None:
            before = descent.count
            status = iterate(descent)
            self._status = self._converged()
            if descent.count > before and self._report is not None:
                with torch.enable_grad():
                    objective = descent.objective
                    pieces = objective.vector.split(objective.position.clone())
                    done = objective.evaluations
                    if self._report(self._tree(pieces), descent.point.loss, descent.count, done):
                        self._status = -2
            return status if self._status is None else StepStatus.CONVERGED_CHANGE

        return watched

    def _converged(self) -> int | None:
        """The status by the tolerances after an iteration; None to go on."""
        tol, found = self._tolerances, self._optimizer._outlook
        assert self._descent is not None
        loss = self._descent.point.loss
        if found.cosine <= tol.gtol or loss <= tol.precision**2 * self._first:
            return 1
        by_cost = (
            abs(found.gained) <= tol.ftol
            and found.predicted <= tol.ftol
            and found.gained <= 2.0 * found.predicted
        )
        by_step = found.moved <= tol.xtol
        if (by_cost and by_step) or (found.fall <= tol.ftol and found.length <= tol.xtol):
            return 4
        return 2 if by_cost else 3 if by_step else None

    def _tree(self, pieces: Sequence[Tensor]) -> Any:
        left = iter(pieces)
        return self._problem.tree([next(left) if p.numel() else p for p in self._problem.params])

    def _result(self) -> LeastSquaresResult:
        """The result where the iteration ended."""
        problem, info = self._problem, self._optimizer.info
        assert info is not None and info.loss_after is not None
        status = self._status if self._status is not None else _status_of(info.status)
        nfev = info.evaluations
        evaluation = None if self._descent is None else self._descent.point.evaluation
        if evaluation is None or evaluation.linearization is None:
            objective = FunctionalObjective(self.cost, problem.tree())
            evaluation, nfev = objective.evaluate(curvature="jacobian"), nfev + 1
        jacobian = ResidualJacobian(evaluation, method=self._optimizer._way)
        J, fun, grad = jacobian.dense(), jacobian.residuals, evaluation.grad
        if not (self._linear and jacobian.finite):
            with torch.no_grad():
                fun, nfev = self.cost.residuals(problem.tree()).detach(), nfev + 1
        shape = self.cost.shape
        assert shape is not None
        columns = J.split([p.numel() for p in problem.params], 1)
        parts = grad.split([p.numel() for p in problem.params])
        leaves = [p.detach() for p in problem.params]
        masks = self._masks()
        optimality = info.projected_grad_norm
        if optimality is None:
            optimality = float(grad.abs().max()) if len(grad) else 0.0
        return LeastSquaresResult(
            x=problem.tree(leaves),
            cost=info.loss_after,
            fun=fun.reshape(shape),
            jac=problem.tree(
                [c.reshape((*shape, *p.shape)) for c, p in zip(columns, leaves, strict=True)]
            ),
            grad=problem.tree([g.reshape(p.shape) for g, p in zip(parts, leaves, strict=True)]),
            optimality=optimality,
            active_mask=problem.tree(masks),
            success=status > 0,
            status=status,
            message=_MESSAGES[status],
            nit=info.iterations,
            nfev=nfev,
            njev=info.jacobians + 1,
            info=info,
        )

    def _masks(self) -> list[Tensor]:
        """For each leaf, the entries at a lower and at an upper bound."""
        masks = []
        limits = self._problem.limits or [(None, None)] * len(self._problem.params)
        for p, (low, high) in zip(self._problem.params, limits, strict=True):
            at_low = p.detach() <= (-inf if low is None else low)
            at_high = p.detach() >= (inf if high is None else high)
            masks.append(at_high.int() - at_low.int())
        return masks


def _status_of(status: StepStatus) -> int:
    """The status of an end that no tolerance brought about."""
    if status in (StepStatus.MAX_EVALUATIONS, StepStatus.MAX_ITERATIONS):
        return 0
    if status is StepStatus.CONVERGED_GRADIENT:
        return 1
    if status is StepStatus.STALLED:  # the predicted decrease is below the rounding of the cost
        return 2
    if status is StepStatus.CONVERGED_CHANGE:
        return 4
    return -4 if status is StepStatus.NO_DECREASE else -3
