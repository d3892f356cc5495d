"""The course of one step of a flat-vector optimizer: its points, its line searches, its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from torch_secondorder._objective.base import Objective
from torch_secondorder._objective.evaluation import Evaluation
from torch_secondorder._optim.info import StepInfo, StepStatus
from torch_secondorder.globalization import SearchStatus, Trial

__all__ = ["Candidate", "Descent", "DescentInfo", "Line", "Point"]

# Vectors of at most this many entries are kept rather than computed twice.
_SHORT = 2**16


@dataclass(frozen=True, slots=True)
class DescentInfo(StepInfo):
    """Report of one step of a flat-vector optimizer; `LBFGS` and `NewtonCG` add to it.

    Attributes:
        step_length: The last accepted step, as a multiple of its direction.
        search_status: How the last line search ended; None without one.
        nonfinite_trials: Evaluations with a non-finite loss or gradient, stepped back from.
    """

    step_length: float = 0.0
    search_status: SearchStatus | None = None
    nonfinite_trials: int = 0


class Point(NamedTuple):
    """An evaluated point, with its numbers on the host.

    Attributes:
        loss: The loss.
        grad_norm: The largest absolute entry of the gradient.
        grad: The gradient. A trial may come without it, for it takes the memory of a vector.
        evaluation: The evaluation, where its graph is needed.
        length: The Euclidean norm of the gradient, for optimizers that need it.
    """

    loss: float
    grad_norm: float
    grad: Tensor | None
    evaluation: Evaluation | None = None
    length: float = 0.0


class Descent:
    """One call of `step()`: its settings, its current point, and the record of its iterations.

    Args:
        objective: The function that is minimized, at the start.
        point: The start, where loss and gradient are finite.
        lr: The learning rate.
        max_iter: Most iterations.
        tolerance_grad: The step ends once no entry of the gradient is larger.
        tolerance_change: The step ends once an iteration changes both the loss and the parameters
            by no more than this, relative to their size.

    Attributes:
        point: The current point.
        max_eval: Most evaluations, as of the second iteration.
        patience: Iterations without a new lowest loss or gradient after which the step ends: what
            is left then is rounding error.
        count: Iterations so far.
        step_length: The last accepted step, as a multiple of its direction.
        search_status: The outcome of the last line search.
        nonfinite_trials: Trials that were not finite.
    """

    def __init__(
        self,
        objective: Objective,
        point: Point,
        lr: float,
        max_iter: int,
        tolerance_grad: float,
        tolerance_change: float,
    ) -> None:
        self.objective = objective
        self.space = objective.vector.space
        self.point = point
        self.lr = lr
        self.max_iter = max_iter
        self.max_eval: float = inf
        self.tolerance_grad = tolerance_grad
        self.tolerance_change = tolerance_change
        self.patience: float = 10
        self.count = 0
        self.step_length = 0.0
        self.search_status: SearchStatus | None = None
        self.nonfinite_trials = 0
        #: The Euclidean norm of the parameters at the start.
        (self.size,) = self.space.to_host(norms=(torch.linalg.vector_norm(objective.position),))
        # The larger of the relative changes of loss and parameters in the last iteration.
        self._change = inf
        self._stalled = 0  # iterations since the lowest loss or gradient
        self._lowest_loss, self._lowest_gradient = point.loss, point.grad_norm

    def run(self, iterate: Callable[[Descent], StepStatus | None]) -> StepStatus:
        """Iterates until something ends the step.

        Args:
            iterate: One iteration from `point` on; returns the reason to end the step, or None.
        """
        status = None
        while status is None:
            status = self._ending() or iterate(self)
        return status

    def _ending(self) -> StepStatus | None:
        """The reason to end the step at the current point, if there is one."""
        if self.point.grad_norm <= self.tolerance_grad:
            return StepStatus.CONVERGED_GRADIENT
        if not self.lr:
            return StepStatus.ZERO_LEARNING_RATE
        if self._change <= self.tolerance_change:
            return StepStatus.CONVERGED_CHANGE
        if self._stalled >= self.patience:
            return StepStatus.STALLED
        if self.count >= self.max_iter:
            return StepStatus.MAX_ITERATIONS
        evaluations = self.objective.evaluations - self.objective.examinations
        if self.count and evaluations >= self.max_eval:
            return StepStatus.MAX_EVALUATIONS
        return None

    def arrive(self, point: Point, t: float, moved: float, *, held: bool = False) -> None:
        """Records an iteration, after the objective has moved.

        Args:
            point: The new current point.
            t: The step length, as a multiple of the direction.
            moved: The distance that the parameters have moved.
            held: Whether a damping or a trust radius has kept the step short. A small change says
                nothing then.
        """
        loss, grad_norm, before = point.loss, point.grad_norm, self.point.loss
        if held:
            self._change = inf
        else:
            of_loss = abs(before - loss) / abs(loss) if loss else inf if before else 0.0
            self._change = max(of_loss, moved / self.size if self.size else inf)
        improved = loss < self._lowest_loss or grad_norm < self._lowest_gradient
        self._stalled = 0 if improved or held else self._stalled + 1
        self._lowest_loss = min(loss, self._lowest_loss)
        self._lowest_gradient = min(grad_norm, self._lowest_gradient)
        self.point = point
        self.step_length = t
        self.count += 1


@dataclass(slots=True)
class Candidate:
    """A trial point on a `Line`, with the pair that a quasi-Newton method learns by going there.

    The pair is the step `t d` and the difference `y` of the gradients.

    Attributes:
        point: The point; None once the search cannot accept it any more.
        y: `y`, if it is short enough to be kept.
        y_y: `y'y`.
        y_d: `y'd`.
    """

    point: Point | None
    y: Tensor | None
    y_y: float
    y_d: float


class Line:
    """The objective along a direction `d` from the current point, for a line search.

    A call evaluates a trial, with one synchronization; its payload is a `Candidate`. Only the
    newest trial and the one with the lowest loss keep their gradients: a search accepts one of
    these.

    Args:
        descent: The step; the line begins at its current point.
        direction: `d`.
        slope: `g'd` with the gradient `g` at the current point.
        square: `d'd`.

    Attributes:
        start: The current point as a trial.
        bottomless: Whether a trial had a loss of minus infinity.
    """

    def __init__(self, descent: Descent, direction: Tensor, slope: float, square: float) -> None:
        point = descent.point
        assert point.grad is not None
        self.direction, self.slope, self.square = direction, slope, square
        self.start = Trial(0.0, point.loss, slope)
        self.bottomless = False
        self._descent, self._before = descent, point.grad
        self._lowest_loss = point.loss
        self._lowest: Candidate | None = None
        self._newest: Candidate | None = None

    def __call__(self, t: float) -> Trial:
        """Evaluates the objective at `t d` from the current point."""
        if self._newest is not None and self._newest is not self._lowest:
            self._newest.point = None
        self._newest = None
        direction, before = self.direction, self._before
        evaluation = self._descent.objective.trial(direction, t)
        grad = evaluation.grad
        if len(grad) <= _SHORT:
            y = grad - before
            y_y, y_d = y @ y, y @ direction
        else:
            y, (y_y, y_d) = None, _products_of_difference(grad, before, direction)
        slope, y_y_, y_d_, grad_norm, loss = self._descent.space.to_host(
            sums=(grad @ direction, y_y, y_d),
            largest=(grad,),
            whole=(evaluation.loss,),
        )
        if loss == -inf:
            self.bottomless = True
        candidate = self._newest = Candidate(Point(loss, grad_norm, grad), y, y_y_, y_d_)
        if not isfinite(grad_norm):
            slope = inf
        elif loss < self._lowest_loss and isfinite(loss) and isfinite(slope):
            if self._lowest is not None:
                self._lowest.point = None
            self._lowest_loss, self._lowest = loss, candidate
        return Trial(t, loss, slope, candidate)

    def accept(self, trial: Trial) -> Candidate:
        """Moves the objective to a trial, which becomes the current point.

        Args:
            trial: A trial of this line.
        """
        t: float = trial.t
        candidate: Candidate = trial.payload
        if candidate.point is None:  # a search of the user's own may accept any trial
            candidate = self(t).payload
        assert candidate.point is not None
        self._descent.objective.accept(self.direction, t)
        self._descent.arrive(candidate.point, t, t * sqrt(self.square))
        return candidate


def _products_of_difference(a: Tensor, b: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """`y'y` and `y'd` for `y = a - b`, without a vector for `y`."""
    # Pieces that lie in cache; on a device each costs four launches.
    size = _SHORT if a.device.type == "cpu" else max(_SHORT, -(-len(a) // 16))
    room, y_y, y_d = a.new_empty(size), a.new_zeros(()), a.new_zeros(())
    for one, other, along in zip(a.split(size), b.split(size), d.split(size), strict=True):
        y = torch.sub(one, other, out=room[: len(one)])
        y_y, y_d = y_y + y @ y, y_d + y @ along
    return y_y, y_d
