"""Base class of optimizers that search along a direction which they learn from gradients."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torch_secondorder._foundation.types import ParamsT
from torch_secondorder._objective.base import Evaluation, Objective
from torch_secondorder._optim.bounded_line import (
    first_length,
    line_in_box,
    steepest_line_in_box,
)
from torch_secondorder._optim.flat import (
    Candidate,
    Descent,
    DescentInfo,
    FlatOptimizer,
    Line,
    Point,
)
from torch_secondorder._optim.info import StepStatus
from torch_secondorder._optim.sequential_quadratic import SequentialQuadratic
from torch_secondorder._optim.state import Number, declare
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.curvature import LinearOperator
from torch_secondorder.globalization import (
    Armijo,
    FixedStep,
    HagerZhang,
    LineSearch,
    SearchResult,
    SearchStatus,
    StrongWolfe,
    falls_without_end,
    resolve_line_search,
)
from torch_secondorder.solvers._box_quadratic import FaceModel


@dataclass(frozen=True, slots=True)
class LineSearchInfo(DescentInfo):
    """Report of one step of a `LineSearchOptimizer` that names no class of its own.

    Attributes:
        history_reset: Why what was learned was dropped during the step; empty if it was not.
    """

    history_reset: str = ""


class LineSearchOptimizer(FlatOptimizer):
    """Base class of `LBFGS`, `BFGS` and `NonlinearCG`.

    An iteration searches along a direction, moves, and learns from the step and the change of the
    gradient. After a search in vain, what was learned is dropped and the next direction is the
    negative gradient.

    A subclass implements `_direction`, `_learn` and `_restart`, and passes its hyperparameters on.
    A report of its own has the field of `LineSearchInfo`.

    Args:
        params: See `SecondOrderOptimizer`.
        line_search_fn: The name of a line search, a `LineSearch`, or None for steps of length `lr`
            without a search.
        defaults: Hyperparameters.
    """

    _recognized_by = "max_iter"
    _takes_manifolds = True
    _info_type: type[DescentInfo] = LineSearchInfo
    _state_fields = declare(n_iter=Number(0), func_evals=Number(0))
    _n_iter: int
    _func_evals: int
    _carried: ClassVar[tuple[str, ...]] = ("line_search", "_reset_reason")
    _sequential: SequentialQuadratic | None = None  # of a step with constraints

    def __init__(
        self, params: ParamsT, line_search_fn: str | LineSearch | None, defaults: dict[str, Any]
    ) -> None:
        self.line_search = resolve_line_search(line_search_fn, "line_search_fn")
        self._reset_reason = ""
        super().__init__(params, defaults)

    # For subclasses.

    @abstractmethod
    def _direction(self, descent: Descent) -> Tensor | None:
        """The direction of the next search, `(n,)`.

        None if nothing was learned yet: the search then goes along the negative gradient.
        """

    @abstractmethod
    def _learn(self, descent: Descent, line: Line, t: float, before: Point, to: Candidate) -> None:
        """Learns from an accepted step.

        Args:
            descent: The step, already at the new point.
            line: The line; its direction may be overwritten.
            t: The accepted step length.
            before: The point where the line begins.
            to: The accepted trial.
        """

    @abstractmethod
    def _restart(self) -> bool:
        """Drops what was learned; says whether there was anything."""

    def _inverse_hessian(self) -> LinearOperator | None:
        """The inverse Hessian that was learned; None if nothing was learned yet.

        For subclasses that take constraints.
        """
        raise NotImplementedError

    def _first_step(self, descent: Descent, line: Line) -> float:
        """The first step to try, as a multiple of the direction."""
        return descent.lr

    # The steps.

    @property
    def _searches(self) -> bool:
        """True if there is a line search."""
        return not isinstance(self.line_search, FixedStep)

    def _current_vector(self, params: Any, rates: Any) -> ParameterVector:
        # Those of a step which an exception has ended.
        self._reset_reason, self._sequential = "", None
        return super()._current_vector(params, rates)

    def _evaluate(self, objective: Objective) -> tuple[Evaluation, Point]:
        if self._program is None:
            return super()._evaluate(objective)
        if self._sharded:
            raise ValueError(
                f"{type(self).__name__} takes no constraints for sharded parameters: pass "
                "method='augmented_lagrangian' to Constrained"
            )
        evaluation = objective.evaluate()
        self._sequential = SequentialQuadratic(self._program, objective)
        return evaluation, self._sequential.evaluated(evaluation, objective)

    def _begin(self, descent: Descent) -> None:
        group = self.param_groups[0]
        descent.max_eval = group["max_eval"] or group["max_iter"] * 5 // 4
        if not self._searches:
            descent.patience = inf  # without a search the loss may climb for a while
        if self._sequential is not None:
            descent.patience = inf  # towards feasible points it climbs as well
            self._judge(descent)

    def _finish(self, objective: Objective, descent: Descent | None) -> dict[str, Any]:
        self._func_evals += objective.evaluations
        if descent is None:
            super()._finish(objective, descent)
        else:
            self._n_iter += descent.count
        if self._sequential is not None:
            self._sequential.finish(descent)
            self._sequential = None
        reason, self._reset_reason = self._reset_reason, ""
        return {"history_reset": reason}

    def _forget(self, reason: str) -> None:
        super()._forget(reason)
        self._reset_reason = reason

    def _iterate(self, descent: Descent) -> StepStatus | None:
        if descent.objective.renewed:
            # Trials and pairs must belong to one function, and it has changed.
            _, descent.point = self._evaluate(descent.objective)
            self._judge(descent)
            if descent.feasible and descent.point.grad_norm <= descent.tolerance_grad:
                return StepStatus.CONVERGED_GRADIENT
        if self._sequential is not None:
            if self._sequential.contradiction:
                return StepStatus.INFEASIBLE
            if self._sequential.unbounded:
                return StepStatus.UNBOUNDED
        line = self._line(descent)
        if line is None:
            stuck = self._sequential is not None and self._sequential.contradiction
            return StepStatus.INFEASIBLE if stuck else StepStatus.NO_DECREASE
        precision = line.precision
        first = min(self._first_step(descent, line), line.start.longest)
        result = self._search(line, line.start, first, precision=precision)
        descent.search_status = result.status
        descent.nonfinite_trials += result.nonfinite
        unbounded = line.bottomless or (
            result.status is SearchStatus.UNBOUNDED and falls_without_end(line.slope, result)
        )
        if result.status.accepted:
            before = descent.point
            candidate = line.accept(result.trial)
            self._learn(descent, line, result.trial.t, before, candidate)
            self._judge(descent)
        if unbounded:
            return StepStatus.UNBOUNDED
        return None if result.status.accepted else self._failed(descent, result)

    def _failed(self, descent: Descent, result: SearchResult) -> StepStatus | None:
        """Drops what was learned after a search in vain; if there is nothing the step is over."""
        if self._restart():
            if self._sequential is not None:
                self._sequential.restart()
            self._reset_reason = f"the line search ended with {result.status.name}"
            return None
        if self._begins_restoration():
            self._judge(descent)
            return None
        if result.status is SearchStatus.NONFINITE:
            self._reset_reason = "no trial of a line search was finite"
            return StepStatus.NONFINITE_TRIALS
        return StepStatus.NO_DECREASE

    def _line(self, descent: Descent) -> Line | None:
        """The line of the next search, None if there is none; one synchronization."""
        if self._sequential is not None:
            return self._line_of_program(descent)
        if descent.objective.box is not None:
            return self._line_in_box(descent)
        grad, direction = descent.point.grad, self._direction(descent)
        assert grad is not None
        manifold = descent.objective.manifold
        if direction is not None and manifold is not None:
            direction = manifold.tangent(descent.objective.position, direction)
        if direction is not None:
            slope, square = descent.space.to_host(
                sums=(grad.dot(direction), direction.dot(direction))
            )
            if -inf < slope < 0 and isfinite(square):
                return Line(descent, direction, slope, square)
            self._restart()
            self._reset_reason = "the history gave a direction of ascent"
        # The scale is not known yet.
        largest = descent.point.grad_norm
        unit = grad / -largest  # no square of it overflows
        square, total = descent.space.to_host(sums=(unit @ unit, unit.abs().sum()))
        length = first_length(descent, largest, square, total, searches=self._searches)
        return Line(descent, unit * length, -largest * square * length, square * length**2)

    # Constraints.

    @property
    def _search(self) -> LineSearch:
        """The line search of this step."""
        if self._sequential is not None and isinstance(self.line_search, (StrongWolfe, HagerZhang)):
            # Pairs are corrected where they lack curvature, so a step need not look for it: over 53
            # problems that takes 9% of the evaluations.
            return Armijo()
        return self.line_search

    def _judge(self, descent: Descent) -> None:
        """Judges a new point by its quadratic program, if there are constraints."""
        if self._sequential is not None:
            inverse = self._inverse_hessian()
            self._sequential.solve(descent, inverse, searches=self._searches)
            if self._sequential.turns:
                self._restart()
                self._reset_reason = "restoration of feasibility began or ended"
                self._sequential.solve(descent, None, searches=self._searches)

    def _line_of_program(self, descent: Descent) -> Line | None:
        """The line of the next search with constraints; None if there is none."""
        sequential = self._sequential
        assert sequential is not None
        if sequential.step is None:  # what was learned was dropped
            self._judge(descent)
        line = sequential.line(descent)
        if line is None and self._restart():
            self._reset_reason = "the history gave no descent of the merit function"
            sequential.restart()
            self._judge(descent)
            line = sequential.line(descent)
        if line is None and self._begins_restoration():
            self._judge(descent)
            line = sequential.line(descent)
        return line

    def _begins_restoration(self) -> bool:
        """Begins a restoration where nothing else helps; True if it has begun."""
        sequential = self._sequential
        if sequential is None or not sequential.violated or sequential.restoration.runs:
            return False
        sequential.restore()
        self._reset_reason = "restoration of feasibility began"
        self._restart()
        return True

    # Bounds.

    def _line_in_box(self, descent: Descent) -> Line | None:
        """The line of the next search within bounds; None if there is none."""
        model = self._face_model(descent)
        if model is not None:
            line = line_in_box(descent, model)
            if line is not None:
                return line
            self._restart()
            self._reset_reason = "the history gave no descent within the bounds"
        return steepest_line_in_box(descent, searches=self._searches)

    def _face_model(self, descent: Descent) -> FaceModel | None:
        """The quadratic model that was learned; None if nothing was learned yet.

        For subclasses that take bounds.
        """
        raise NotImplementedError


class Pair(NamedTuple):
    """A step and the change of the gradient along it, fit to learn the curvature from.

    Attributes:
        s: The step, shape `(n,)`.
        y: The difference of the gradients, shape `(n,)`.
        scale: `s'y / y'y`, if it is known on the host.
        damped: Whether Powell's damping has changed `y`.
    """

    s: Tensor
    y: Tensor
    scale: float | None
    damped: bool


def curvature_pair(
    descent: Descent, line: Line, t: float, before: Point, to: Candidate, *, damping: bool
) -> Pair | None:
    """The pair of an accepted step; None if it shows no curvature and is not to be corrected.

    Args:
        descent: The step.
        line: The line, whose direction is `-H g` with the inverse Hessian `H`. The direction is
            overwritten.
        t: The accepted step length.
        before: The point where the line begins.
        to: The accepted trial.
        damping: Whether a pair with too little curvature is corrected (Powell 1978).
    """
    assert to.point is not None and to.point.grad is not None
    y, y_y = to.y, to.y_y
    assert before.grad is not None
    if y is None:
        y = to.point.grad - before.grad
    precision = torch.finfo(y.dtype)
    if not precision.tiny < y_y < inf and y.dtype == torch.float32:
        # The square is beyond the range of float32.
        (y_y,) = descent.space.to_host(sums=[y.double() @ y.double()])
    s_y, s_s = t * to.y_d, t * t * line.square
    # H g = -d and so B s = -t g: the curvature that B expects is known without B.
    expected = t * t * line.bend
    step = line.direction if t == 1.0 else line.direction.mul_(t)
    least = line.least_curvature
    if damping and s_y < least * expected:
        keep = (1 - least) * expected / (expected - s_y)
        of_direction = before.grad.neg() if line.product is None else line.product
        return Pair(step, y.mul_(keep).add_(of_direction, alpha=(1 - keep) * t), None, damped=True)
    if s_y > 10 * precision.eps * sqrt(s_s) * sqrt(y_y) and y_y > 0:
        return Pair(step, y, s_y / y_y, damped=False)
    return None
