"""L-BFGS with a line search, a compact history and named endings."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_secondorder.curvature.inverse_bfgs import InverseBFGS
from torch_secondorder.globalization import (
    FixedStep,
    LineSearch,
    SearchResult,
    SearchStatus,
    Trial,
    resolve_line_search,
)
from torch_secondorder.objective import Evaluation, Objective
from torch_secondorder.optim.base import (
    SecondOrderOptimizer,
    StepInfo,
    StepStatus,
    check_number,
    check_size,
)
from torch_secondorder.vector import ParameterVector, max_norm, to_host

__all__ = ["LBFGS"]

# Powell's constant: a pair keeps at least this share of the curvature that H expects.
_DAMPING = 0.2
# What the history may take by default, if twenty pairs do not take more.
_HISTORY_BYTES = 256 * 2**20
# Iterations without a new best loss or gradient after which only rounding error is left.
_PATIENCE = 10


class LBFGS(SecondOrderOptimizer):
    """Limited-memory BFGS, a drop-in for `torch.optim.LBFGS`.

    Every call that `torch.optim.LBFGS` accepts is accepted and means the same. What differs by
    default: a line search is on, and the tolerances are relative to scale, so that a small loss
    does not end the training silently.

    Reference: Liu and Nocedal 1989, "On the limited memory BFGS method for large scale
    optimization"; the direction follows Byrd, Nocedal and Schnabel 1994 (see
    `torch_secondorder.curvature.InverseBFGS`).

    Args:
        params: Parameters or groups. A group may have its own `lr` and `weight_decay`.
        lr: The first step a line search tries along the quasi-Newton direction; without a line
            search, the step. Where groups differ, the largest plays this part, and each group's
            share of it scales the group's part of the initial inverse Hessian.
        max_iter: Iterations per `step()`.
        max_eval: Closure evaluations per `step()`, `max_iter * 5 // 4` by default. Looked at
            between iterations: a line search always gets to finish.
        tolerance_grad: The step ends once no entry of the gradient is larger. By default `1e-7`,
            times the largest entry seen so far where that is below one.
        tolerance_change: The step ends once an iteration changes both the loss and the parameters
            by no more than this, relative to their size.
        history_size: Pairs kept; each takes twice the memory of the parameters. By default as many
            as fit in 256 MiB, but no fewer than 20 and no more than 200.
        line_search_fn: `"strong_wolfe"`, `"hager_zhang"`, `"armijo"`, a `LineSearch`, or None for
            steps of length `lr` as they come.
        weight_decay: Coefficient of `|theta|^2 / 2`, added to the loss.
        maximize: Whether to maximize the closure's loss.
        damping: Whether a pair with too little curvature is mended (Powell 1978) instead of left
            out.

    Raises:
        TypeError: A parameter is neither floating-point nor complex, or `line_search_fn` is of a
            wrong type.
        ValueError: A hyperparameter is out of range, or the name of a line search unknown.

    >>> x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
    >>> optimizer = LBFGS([x], max_iter=100)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
    ...     loss.backward()
    ...     return loss
    >>> round(float(optimizer.step(closure)), 6)
    24.2
    >>> optimizer.info.status.name, [round(v, 6) for v in x.tolist()]
    ('CONVERGED_GRADIENT', [1.0, 1.0])
    """

    _carried = (*SecondOrderOptimizer._carried, "line_search", "_reset_reason")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float | None = None,
        tolerance_change: float = 1e-9,
        history_size: int | None = None,
        line_search_fn: str | LineSearch | None = "strong_wolfe",
        *,
        weight_decay: float = 0.0,
        maximize: bool = False,
        damping: bool = False,
    ) -> None:
        check_number("max_iter", max_iter, low=1, integer=True)
        if history_size is not None:
            check_number("history_size", history_size, low=1, integer=True)
        check_number("tolerance_change", tolerance_change, low=0.0)
        if tolerance_grad is not None:
            check_number("tolerance_grad", tolerance_grad, low=0.0)
        if max_eval is None:
            max_eval = max_iter * 5 // 4
        check_number("max_eval", max_eval, low=1, integer=True)
        self.line_search = resolve_line_search(line_search_fn)
        self._inverse: InverseBFGS | None = None
        self._reset_reason = ""
        self._largest_gradient = 0.0
        self._counts = {"n_iter": 0, "func_evals": 0}
        defaults = {
            "lr": lr,
            "max_iter": max_iter,
            "max_eval": max_eval,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "history_size": history_size,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "damping": damping,
        }
        super().__init__(params, defaults)

    def _step(self, objective: Objective) -> Tensor:
        evaluation = objective.evaluate()
        loss, grad_norm, size = to_host(
            evaluation.loss,
            max_norm(evaluation.grad),
            torch.linalg.vector_norm(objective.position),
        )
        point = _Point(evaluation, loss, grad_norm)
        run = _Run(point, size, self._learning_rate, best=(loss, grad_norm))
        if not (isfinite(loss) and isfinite(grad_norm)):
            self._forget("the loss or gradient at the start of a step was not finite")
            status = StepStatus.NONFINITE_START
        else:
            self._largest_gradient = max(self._largest_gradient, grad_norm)
            status = self._iterate(objective, run)
        self._counts["n_iter"] += run.iterations
        self._counts["func_evals"] += objective.evaluations
        self.info = StepInfo(
            status=status,
            loss=loss,
            loss_after=run.point.loss,
            grad_norm=run.point.grad_norm,
            iterations=run.iterations,
            evaluations=objective.evaluations,
            step_length=run.step_length,
            search_status=run.search_status,
            nonfinite_trials=run.nonfinite,
            skipped_pairs=run.skipped,
            damped_pairs=run.damped,
            history_reset=self._reset_reason,
        )
        self._reset_reason = ""
        return evaluation.closure_loss

    def _iterate(self, objective: Objective, run: _Run) -> StepStatus:
        """Iterates until something ends the step."""
        self._fit_history(objective)
        while True:
            status = self._ending(objective, run)
            if status is not None:
                return status
            line = self._line(objective, run)
            result = self._search(objective, run, line)
            run.search_status = result.status
            run.nonfinite += result.nonfinite
            if result.status.accepted:
                self._move(objective, run, line, result)
            elif self._history.count:
                self._forget(f"the line search ended with {result.status.name}")
                self._fit_history(objective)
            elif result.status is SearchStatus.NONFINITE:
                self._forget("no trial of a line search was finite")
                return StepStatus.NONFINITE_TRIALS
            else:
                return StepStatus.NO_DECREASE

    def _ending(self, objective: Objective, run: _Run) -> StepStatus | None:
        """Why the step is over at this point, if it is."""
        group = self.param_groups[0]
        tolerance = group["tolerance_grad"]
        if tolerance is None:
            tolerance = 1e-7 * min(1.0, self._largest_gradient)
        if run.point.grad_norm <= tolerance:
            return StepStatus.CONVERGED_GRADIENT
        if not run.lr:
            return StepStatus.ZERO_LEARNING_RATE
        if run.change <= group["tolerance_change"]:
            return StepStatus.CONVERGED_CHANGE
        if run.stalled >= _PATIENCE and not isinstance(self.line_search, FixedStep):
            return StepStatus.STALLED
        if run.iterations >= group["max_iter"]:
            return StepStatus.MAX_ITERATIONS
        if objective.evaluations >= group["max_eval"] and run.iterations:
            return StepStatus.MAX_EVALUATIONS
        return None

    def _line(self, objective: Objective, run: _Run) -> _Line:
        """The direction at a point, with what the host has to know of it; one synchronization."""
        point = run.point
        grad = point.evaluation.grad
        if self._history.count:
            direction = self._history.direction(grad)
            slope, square = to_host(grad @ direction, direction @ direction)
            if -inf < slope < 0 and isfinite(square):
                return _Line(direction, slope, square)
            self._forget("the history gave a direction of ascent")
            self._fit_history(objective)
        # Nothing is known of the scale yet. Without a search, as far as torch goes: the negative
        # gradient, at most one long in the 1-norm. With a search, to where a line from here would
        # meet a loss of zero, at most as far as the parameters are long.
        unit = grad / -point.grad_norm  # no square of it overflows
        square, total = to_host(unit @ unit, unit.abs().sum())
        if isinstance(self.line_search, FixedStep):
            length = min(point.grad_norm, 1 / total)
        else:
            length = max(1.0, run.size) / sqrt(square)
            if point.loss:
                length = min(length, 2 * abs(point.loss) / (point.grad_norm * square))
        return _Line(unit * length, -point.grad_norm * square * length, square * length**2)

    def _search(self, objective: Objective, run: _Run, line: _Line) -> SearchResult:
        """Searches along a line; the payload of its trials is a `_Candidate`."""
        before, direction = run.point.evaluation.grad, line.direction

        def phi(t: float) -> Trial:
            step = direction if t == 1.0 else direction * t
            evaluation = objective.trial(step)
            grad = evaluation.grad
            y = grad - before
            loss, slope, grad_norm, y_y, y_d = to_host(
                evaluation.loss, grad @ direction, max_norm(grad), y @ y, y @ direction
            )
            candidate = _Candidate(_Point(evaluation, loss, grad_norm), step, y, y_y, y_d)
            return Trial(t, loss, slope if isfinite(grad_norm) else inf, candidate)

        start = Trial(0.0, run.point.loss, line.slope)
        return self.line_search(phi, start, run.lr, precision=objective.vector.precision)

    def _move(self, objective: Objective, run: _Run, line: _Line, result: SearchResult) -> None:
        """Goes to the point that a search accepted and learns from the way there."""
        t, candidate = result.trial.t, result.trial.payload
        objective.accept(candidate.step)
        s_y, s_s, y, y_y = t * candidate.y_d, t * t * line.square, candidate.y, candidate.y_y
        # H g = -d, so B s = -t g whatever B is, and the curvature that B expects is known.
        expected = -t * t * line.slope
        precision = torch.finfo(objective.vector.dtype)
        if self.param_groups[0]["damping"] and s_y < _DAMPING * expected:
            keep = (1 - _DAMPING) * expected / (expected - s_y)
            y = keep * y - (1 - keep) * t * run.point.evaluation.grad
            run.damped += 1
            self._history.push(candidate.step, y)
        elif s_y > 10 * precision.eps * sqrt(s_s * y_y) and y_y > precision.tiny:
            self._history.push(candidate.step, y, s_y / y_y)
        else:
            run.skipped += 1
        run.advance(candidate.point, t, t * sqrt(line.square))

    # The history and its place in checkpoints.

    @property
    def _history(self) -> InverseBFGS:
        assert self._inverse is not None
        return self._inverse

    def _fit_history(self, objective: Objective) -> None:
        vector = objective.vector
        size = self.param_groups[0]["history_size"] or _default_history_size(vector)
        inverse = self._inverse
        if inverse is not None and (inverse.size, inverse.history_size) != (vector.size, size):
            self._forget("history_size or the trainable parameters changed")
        if self._inverse is None:
            self._inverse = InverseBFGS(vector.size, size, vector.dtype, vector.device)

    def _forget(self, reason: str) -> None:
        self._reset_reason = reason
        self._inverse = None

    def _export_state(self) -> dict[str, Any]:
        history = {} if self._inverse is None else self._inverse.state_dict()
        return self._counts | {"largest_gradient": self._largest_gradient, "history": history}

    def _import_state(self, state: dict[str, Any]) -> None:
        inverse = None
        # With all parameters frozen there is nothing to hold it against; the next step does.
        vector = ParameterVector(self._trainable or self.param_groups[0]["params"])
        if history := state.get("history"):
            if self._trainable:
                check_size(history["size"], vector)
            inverse = InverseBFGS(
                history["size"], history["history_size"], vector.dtype, vector.device
            )
            inverse.load_state_dict(history)
        elif state.get("old_stps"):
            size = self.param_groups[0]["history_size"] or _default_history_size(vector)
            inverse = _from_torch(state, size, vector)
        for name in set(self._model_state) - {"master"}:  # what it is made of is not kept twice
            del self._model_state[name]
        self._inverse = inverse
        self._largest_gradient = state.get("largest_gradient", 0.0)
        self._counts = {name: state.get(name, 0) for name in ("n_iter", "func_evals")}


def _default_history_size(vector: ParameterVector) -> int:
    pair = 2 * vector.size * torch.finfo(vector.dtype).bits // 8
    return max(20, min(200, _HISTORY_BYTES // pair))


def _from_torch(state: dict[str, Any], history_size: int, vector: ParameterVector) -> InverseBFGS:
    """The history of a `torch.optim.LBFGS` checkpoint."""
    inverse = InverseBFGS(vector.size, history_size, vector.dtype, vector.device)
    for y, s in zip(state["old_dirs"], state["old_stps"], strict=True):
        check_size(s.numel(), vector)
        inverse.push(s.to(vector.device, vector.dtype), y.to(vector.device, vector.dtype))
    return inverse


class _Point(NamedTuple):
    """An evaluated point and what the host knows of it."""

    evaluation: Evaluation
    loss: float
    grad_norm: float


class _Candidate(NamedTuple):
    """A trial point, with the pair that going there would give."""

    point: _Point
    step: Tensor
    y: Tensor
    y_y: float
    y_d: float


class _Line(NamedTuple):
    """A direction `d` from a point with gradient `g`."""

    direction: Tensor
    slope: float  # g'd
    square: float  # d'd


@dataclass
class _Run:
    """How a step is going."""

    point: _Point
    size: float  # norm of the parameters at the start
    lr: float
    best: tuple[float, float]  # lowest loss, smallest gradient
    iterations: int = 0
    step_length: float = 0.0
    search_status: SearchStatus | None = None
    nonfinite: int = 0
    skipped: int = 0
    damped: int = 0
    change: float = inf  # relative change of the last iteration
    stalled: int = 0  # iterations since the last improvement

    def advance(self, point: _Point, step_length: float, moved: float) -> None:
        """Notes an accepted point, at a distance `moved`."""
        loss = abs(self.point.loss - point.loss) / max(abs(point.loss), 1e-300)
        self.change = max(loss, moved / self.size if self.size else inf)
        best_loss, best_grad = self.best
        improved = point.loss < best_loss or point.grad_norm < best_grad
        self.stalled = 0 if improved else self.stalled + 1
        self.best = (min(point.loss, best_loss), min(point.grad_norm, best_grad))
        self.point, self.step_length = point, step_length
        self.iterations += 1
