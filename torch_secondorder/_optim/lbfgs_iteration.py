"""The iterations of one L-BFGS step, without the optimizer around them."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from torch_secondorder._objective.base import Objective
from torch_secondorder._objective.evaluation import Evaluation
from torch_secondorder._optim.info import StepStatus
from torch_secondorder._optim.stopping import Progress
from torch_secondorder._params.vector import max_norm
from torch_secondorder.curvature import InverseBFGS
from torch_secondorder.globalization import (
    FixedStep,
    LineSearch,
    SearchResult,
    SearchStatus,
    Trial,
    falls_without_end,
)

__all__ = ["Iteration", "Point", "Settings"]

# Powell's constant: a pair keeps at least this share of the curvature that H expects.
_DAMPING = 0.2
# Iterations without a new best loss or gradient after which only rounding error is left.
_PATIENCE = 10
# Entries that are worth no care for their memory.
_PIECE = 2**16


@dataclass(frozen=True, slots=True)
class Settings:
    """What a step is told; the arguments of `LBFGS` by their names, all resolved."""

    lr: float
    max_iter: int
    max_eval: int
    tolerance_grad: float
    tolerance_change: float
    damping: bool
    line_search: LineSearch


class Point(NamedTuple):
    """An evaluated point and what the host knows of it."""

    evaluation: Evaluation
    loss: float
    grad_norm: float  # largest entry

    @property
    def finite(self) -> bool:
        """Whether one can start from here."""
        return isfinite(self.loss) and isfinite(self.grad_norm)


class _Candidates:
    """The trials of a search that it may accept: the newest, and that of the lowest loss.

    Each holds a gradient, and no other trial's is worth its memory.

    Args:
        start: Where the search begins.
    """

    def __init__(self, start: Trial) -> None:
        self._lowest = start.loss
        self._best: _Candidate | None = None
        self._newest: _Candidate | None = None

    def make_room(self) -> None:
        """Before a new trial."""
        if self._newest is not None and self._newest is not self._best:
            self._newest.point = None
        self._newest = None

    def add(self, trial: Trial) -> None:
        """After it."""
        self._newest = trial.payload
        if trial.finite and trial.loss < self._lowest:
            if self._best is not None:
                self._best.point = None
            self._lowest, self._best = trial.loss, self._newest


class _Candidate:
    """A trial point, and what the host knows of the pair that going there would give.

    Attributes:
        point: Where it is; None where that was given up.
        y: The difference of the gradients, where it is short.
        y_y: `y'y`.
        y_d: `y'd`.
    """

    __slots__ = ("point", "y", "y_d", "y_y")

    def __init__(self, point: Point, y: Tensor | None, y_y: float, y_d: float) -> None:
        self.point: Point | None = point
        self.y, self.y_y, self.y_d = y, y_y, y_d


class _Line(NamedTuple):
    """A direction `d` from a point with gradient `g`."""

    direction: Tensor
    slope: float  # g'd
    square: float  # d'd


class Iteration:
    """Goes downhill from a finite point until something ends the step.

    Args:
        objective: What is minimized.
        history: The inverse Hessian approximation; learns from each iteration.
        settings: What the step is told.
        start: Where the objective is.

    Attributes:
        point: Where it is now.
        count: Iterations done.
        step_length: The last accepted step, as a multiple of its direction.
        search_status: How the last search ended.
        nonfinite: Trials that were not finite.
        skipped: Pairs left out.
        damped: Pairs changed.
        reset_reason: Why the history was dropped, if it was.
    """

    def __init__(
        self, objective: Objective, history: InverseBFGS, settings: Settings, start: Point
    ) -> None:
        self.point = start
        self.count = 0
        self.step_length = 0.0
        self.search_status: SearchStatus | None = None
        self.nonfinite = self.skipped = self.damped = 0
        self.reset_reason = ""
        self._objective = objective
        self._history = history
        self._settings = settings
        self._space = objective.vector.space
        (self._size,) = self._space.to_host(norms=[torch.linalg.vector_norm(objective.position)])
        self._progress = Progress(start.loss, start.grad_norm, self._size)
        self._bottomless = False  # whether a trial gave minus infinity

    def run(self) -> StepStatus:
        """Iterates; says why it ended."""
        while True:
            status = self._ending() or self._iterate()
            if status is not None:
                return status

    def _iterate(self) -> StepStatus | None:
        if self._objective.renewed:
            self._renew()
            if self.point.grad_norm <= self._settings.tolerance_grad:
                return StepStatus.CONVERGED_GRADIENT
        line = self._line()
        result = self._search(line)
        self.search_status = result.status
        self.nonfinite += result.nonfinite
        unbounded = self._bottomless or falls_without_end(line.slope, result)
        if result.status.accepted:
            self._move(line, result)
        if unbounded:
            return StepStatus.UNBOUNDED
        if result.status.accepted:
            return None
        return self._failed(result)

    def _failed(self, result: SearchResult) -> StepStatus | None:
        """Drops the history after a search in vain; without one the step is over."""
        if self._history.count:
            self._forget(f"the line search ended with {result.status.name}")
        elif result.status is SearchStatus.NONFINITE:
            self._forget("no trial of a line search was finite")
            return StepStatus.NONFINITE_TRIALS
        else:
            return StepStatus.NO_DECREASE
        return None

    def _ending(self) -> StepStatus | None:
        """Why the step is over at this point, if it is."""
        settings = self._settings
        if self.point.grad_norm <= settings.tolerance_grad:
            return StepStatus.CONVERGED_GRADIENT
        if not settings.lr:
            return StepStatus.ZERO_LEARNING_RATE
        if self._progress.change <= settings.tolerance_change:
            return StepStatus.CONVERGED_CHANGE
        # Steps without a search may climb for a while, as they are asked to.
        if self._progress.stalled >= _PATIENCE and not isinstance(settings.line_search, FixedStep):
            return StepStatus.STALLED
        if self.count >= settings.max_iter:
            return StepStatus.MAX_ITERATIONS
        evaluations = self._objective.evaluations - self._objective.examinations
        if evaluations >= settings.max_eval and self.count:
            return StepStatus.MAX_EVALUATIONS
        return None

    def _renew(self) -> None:
        """Evaluates anew: trials and pairs are to be of one function, and it has changed."""
        evaluation = self._objective.evaluate()
        grad_norm, loss = self._space.to_host(
            largest=[max_norm(evaluation.grad)], whole=[evaluation.loss]
        )
        self.point = Point(evaluation, loss, grad_norm)

    def _line(self) -> _Line:
        """The direction, with what the host has to know of it; one synchronization."""
        grad = self.point.evaluation.grad
        if self._history.count:
            direction = self._history.direction(grad)
            slope, square = self._space.to_host(sums=(grad @ direction, direction @ direction))
            if -inf < slope < 0 and isfinite(square):
                return _Line(direction, slope, square)
            self._forget("the history gave a direction of ascent")
        # Nothing is known of the scale yet. Without a search, as far as torch goes: the negative
        # gradient, at most one long in the 1-norm. With a search, to where a line from here would
        # meet a loss of zero, at most as far as the parameters are long.
        loss, largest = self.point.loss, self.point.grad_norm
        unit = grad / -largest  # no square of it overflows
        square, total = self._space.to_host(sums=(unit @ unit, unit.abs().sum()))
        if isinstance(self._settings.line_search, FixedStep):
            length = min(largest, 1 / total)
        else:
            length = max(1.0, self._size) / sqrt(square)
            if loss:
                length = min(length, 2 * abs(loss) / (largest * square))
        return _Line(unit * length, -largest * square * length, square * length**2)

    def _search(self, line: _Line) -> SearchResult:
        """Searches along a line; the payload of its trials is a `_Candidate`."""
        start = Trial(0.0, self.point.loss, line.slope)
        candidates = _Candidates(start)

        def phi(t: float) -> Trial:
            candidates.make_room()
            trial = self._try(line, t)
            candidates.add(trial)
            return trial

        settings, precision = self._settings, self._objective.vector.precision
        return settings.line_search(phi, start, settings.lr, precision=precision)

    def _try(self, line: _Line, t: float) -> Trial:
        """Evaluates at `t`; one synchronization."""
        evaluation = self._objective.trial(line.direction, t)
        grad, before = evaluation.grad, self.point.evaluation.grad
        y = grad - before if len(grad) <= _PIECE else None
        products = (
            _products_of_difference(grad, before, line.direction)
            if y is None
            else (y @ y, y @ line.direction)
        )
        slope, y_y, y_d, grad_norm, loss = self._space.to_host(
            sums=(grad @ line.direction, *products),
            largest=(max_norm(grad),),
            whole=(evaluation.loss,),
        )
        self._bottomless = self._bottomless or loss == -inf
        candidate = _Candidate(Point(evaluation, loss, grad_norm), y, y_y, y_d)
        return Trial(t, loss, slope if isfinite(grad_norm) else inf, candidate)

    def _move(self, line: _Line, result: SearchResult) -> None:
        """Goes to the point that a search accepted and learns from the way there."""
        t: float = result.trial.t
        candidate: _Candidate = result.trial.payload
        if candidate.point is None:  # somebody else's search may have other favorites
            candidate = self._try(line, t).payload
        point = candidate.point
        assert point is not None
        self._objective.accept(line.direction, t)
        self._learn(t, line, candidate, point)
        self._progress.note(self.point.loss, point.loss, point.grad_norm, t * sqrt(line.square))
        self.point = point
        self.step_length = t
        self.count += 1

    def _learn(self, t: float, line: _Line, candidate: _Candidate, point: Point) -> None:
        """Enters the pair into the history, if it shows curvature or can be made to."""
        before, y_y = self.point.evaluation.grad, candidate.y_y
        y = candidate.y
        if y is None:
            y = point.evaluation.grad - before
        precision = torch.finfo(self._objective.vector.dtype)
        if not precision.tiny < y_y < inf and y.dtype == torch.float32:  # its square has no place
            (y_y,) = self._space.to_host(sums=[y.double() @ y.double()])
        s_y, s_s = t * candidate.y_d, t * t * line.square
        # H g = -d, so B s = -t g whatever B is, and the curvature that B expects is known.
        expected = -t * t * line.slope
        # In place: nobody needs the direction any more.
        step = line.direction if t == 1.0 else line.direction.mul_(t)
        if self._settings.damping and s_y < _DAMPING * expected:
            keep = (1 - _DAMPING) * expected / (expected - s_y)
            self._history.push(step, y.mul_(keep).sub_(before, alpha=(1 - keep) * t))
            self.damped += 1
        elif s_y > 10 * precision.eps * sqrt(s_s) * sqrt(y_y) and y_y > 0:
            self._history.push(step, y, s_y / y_y)
        else:
            self.skipped += 1

    def _forget(self, reason: str) -> None:
        self.reset_reason = reason
        self._history.reset()


def _products_of_difference(a: Tensor, b: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """`y'y` and `y'd` for `y = a - b`, without a vector for `y`."""
    # Pieces that lie in cache; on a device each costs four launches.
    size = _PIECE if a.device.type == "cpu" else max(_PIECE, -(-len(a) // 16))
    room, y_y, y_d = a.new_empty(size), a.new_zeros(()), a.new_zeros(())
    for one, other, along in zip(a.split(size), b.split(size), d.split(size), strict=True):
        y = torch.sub(one, other, out=room[: len(one)])
        y_y, y_d = y_y + y @ y, y_d + y @ along
    return y_y, y_d
