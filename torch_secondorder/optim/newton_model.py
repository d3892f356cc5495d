"""The quadratic model at a point: what it proposes, and how the loss answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite, nan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_secondorder.curvature import Damped, LinearOperator
from torch_secondorder.evaluation import Evaluation, Objective
from torch_secondorder.globalization import SearchStatus, Trial
from torch_secondorder.globalization.line_search import rounding_allowance
from torch_secondorder.solvers import SolveResult, SolveStatus
from torch_secondorder.space import Space
from torch_secondorder.vector import max_norm

__all__ = ["Line", "Memory", "Model", "Move", "Point", "Tally"]


class Point(NamedTuple):
    """An evaluated point and what the host knows of it.

    That of a trial comes without its evaluation: the gradient is a vector, and who goes there needs
    a graph as well.
    """

    evaluation: Evaluation | None
    loss: float
    grad_norm: float  # largest entry
    length: float  # Euclidean norm of the gradient

    @classmethod
    def of(cls, evaluation: Evaluation, space: Space) -> Point:
        """Looks at an evaluation of vectors in a space; one synchronization."""
        grad = evaluation.grad
        grad_norm, length, loss = space.to_host(
            largest=(max_norm(grad),),
            norms=(torch.linalg.vector_norm(grad),),
            whole=(evaluation.loss,),
        )
        return cls(evaluation, loss, grad_norm, length)

    @property
    def grad(self) -> Tensor:
        """The gradient."""
        assert self.evaluation is not None
        return self.evaluation.grad

    @property
    def finite(self) -> bool:
        """Whether one can start from here."""
        return isfinite(self.loss) and isfinite(self.length)


@dataclass(slots=True)
class Memory:
    """What goes on from one step to the next.

    Attributes:
        damping: Of the next system.
        radius: Of the next model.
        direction: The last solution, where the next solver begins.
        length: Norm of the gradient at the start of the last iteration.
    """

    damping: float
    radius: float
    direction: Tensor | None = None
    length: float = inf


@dataclass(slots=True)
class Tally:
    """What a step did, added up."""

    products: int = 0
    solver_iterations: int = 0
    solver_status: SolveStatus | None = None
    nonfinite: int = 0
    negative_curvature: float = 0.0
    unbounded: bool = False  # whether the loss was seen to fall without end


class Line(NamedTuple):
    """A direction `d`, and the model along it.

    Attributes:
        direction: `d`.
        slope: `g'd`.
        decrease: What the undamped model promises for the whole of `d`.
    """

    direction: Tensor
    slope: float
    decrease: float

    def promised(self, t: float) -> float:
        """What the model promises for `t d`: `-t g'd - t^2 d'A d / 2`."""
        return -t * self.slope - t * t * (-self.slope - self.decrease)


class Move(NamedTuple):
    """A step that was found good.

    Attributes:
        line: The direction.
        trial: How far along it, and what is there; its payload is a `Point`.
        gain_ratio: What the first trial gained over what the model promised.
        search_status: How the search ended, where there was one.
    """

    line: Line
    trial: Trial
    gain_ratio: float
    search_status: SearchStatus | None = None


class Model:
    """The quadratic model of the objective at a point, and trials of what it proposes.

    Args:
        objective: Stands at the point.
        point: Where that is.
        operator: The curvature there.
        solve: Solves a system with it, see `LinearSolver`.
        inverse: Gives a preconditioner for a damping; None for none.
        tally: What is counted.
    """

    def __init__(
        self,
        objective: Objective,
        point: Point,
        operator: LinearOperator,
        solve: Callable[..., SolveResult],
        inverse: Callable[[float], LinearOperator] | None,
        tally: Tally,
    ) -> None:
        self.point = point
        self.tally = tally
        self.precision = objective.vector.precision
        self._objective = objective
        self._space = objective.vector.space
        self._operator = operator
        self._solve = solve
        self._inverse = inverse
        self._allowance = rounding_allowance(point.loss, self.precision)

    def solve(self, damping: float, **more: Any) -> SolveResult:
        """Solves `(A + damping I) x = -g`.

        Args:
            damping: Of at least zero.
            more: Passed on to the solver; `x0` is used up.
        """
        operator = Damped(self._operator, damping) if damping else self._operator
        inverse = None if self._inverse is None else self._inverse(damping)
        # For the gradient itself, and then negated in place: a vector less.
        if more.get("x0") is not None:
            more["x0"].neg_()
        result = self._solve(operator, self.point.grad, preconditioner=inverse, **more)
        for x in (result.x, *(iterate.x for iterate in result.iterates)):
            x.neg_()
        tally = self.tally
        tally.products += result.products
        tally.solver_iterations += result.iterations
        tally.solver_status = result.status
        if result.negative_direction is not None:
            # Of the operator itself: the damping has lifted what the solver saw.
            curvature = result.negative_curvature - damping
            tally.negative_curvature = min(tally.negative_curvature, curvature)
        return result

    def line(self, direction: Tensor, decrease: float, damping: float) -> Line:
        """A line along a solution of the damped system, whose quadratic fell by `decrease`."""
        grad = self.point.grad
        slope, square = self._space.to_host(sums=(grad @ direction, direction @ direction))
        return Line(direction, slope, decrease + 0.5 * damping * square)

    def trial(self, line: Line, t: float) -> Trial:
        """Evaluates `t` along a line; the payload is a `Point`."""
        evaluation = self._objective.trial(line.direction, t)
        grad = evaluation.grad
        slope, grad_norm, length, loss = self._space.to_host(
            sums=(grad @ line.direction,),
            largest=(max_norm(grad),),
            norms=(torch.linalg.vector_norm(grad),),
            whole=(evaluation.loss,),
        )
        point = Point(None, loss, grad_norm, length)
        if not point.finite:
            self.tally.nonfinite += 1
            self.tally.unbounded |= loss == -inf
        return Trial(t, loss, slope if isfinite(length) else inf, point)

    def start(self, line: Line) -> Trial:
        """The point itself, as a trial along a line."""
        return Trial(0.0, self.point.loss, line.slope)

    def gain_ratio(self, line: Line, trial: Trial) -> float:
        """What a trial gained over what the model promised; NaN where that is no number."""
        if not trial.finite:
            return nan
        gained = self.point.loss - trial.loss
        if abs(gained) <= self._allowance:
            # Lost in rounding: the slopes at both ends know more (trapezoidal rule).
            gained = -0.5 * trial.t * (line.slope + trial.slope)
        promised = line.promised(trial.t)
        return gained / promised if promised > 0 else nan

    def unresolved(self, line: Line) -> bool:
        """Whether the loss cannot show what the model promises."""
        return line.decrease <= self._allowance
