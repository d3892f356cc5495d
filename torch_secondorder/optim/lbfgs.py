"""L-BFGS with a line search, a compact history and named endings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, isfinite, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_secondorder._objective.evaluation import Evaluation, Objective
from torch_secondorder._optim.base import check_number
from torch_secondorder._optim.flat import FlatOptimizer, Rows, check_size
from torch_secondorder._optim.info import StepInfo, StepStatus
from torch_secondorder._optim.stopping import Progress
from torch_secondorder._params.vector import ParameterVector, max_norm
from torch_secondorder.curvature import InverseBFGS
from torch_secondorder.globalization import (
    FixedStep,
    LineSearch,
    SearchResult,
    SearchStatus,
    Trial,
    falls_without_end,
    resolve_line_search,
)

__all__ = ["LBFGS", "LBFGSInfo"]

# What the history may take by default, if twenty pairs do not take more.
_HISTORY_BYTES = 256 * 2**20
# Powell's constant: a pair keeps at least this share of the curvature that H expects.
_DAMPING = 0.2
# Iterations without a new best loss or gradient after which only rounding error is left.
_PATIENCE = 10
# Entries that are worth no care for their memory.
_PIECE = 2**16


@dataclass(frozen=True, slots=True)
class LBFGSInfo(StepInfo):
    """Report of one step of `LBFGS`.

    Attributes:
        step_length: The last accepted step, as a multiple of its direction.
        search_status: How the last line search ended; None without one.
        nonfinite_trials: Evaluations with a non-finite loss or gradient, stepped back from.
        skipped_pairs: Pairs that failed the curvature test and were left out of the history.
        damped_pairs: Pairs that were changed by Powell's damping.
        history_reset: Why the history was dropped during the step; empty if it was not.
    """

    step_length: float = 0.0
    search_status: SearchStatus | None = None
    nonfinite_trials: int = 0
    skipped_pairs: int = 0
    damped_pairs: int = 0
    history_reset: str = ""


class LBFGS(FlatOptimizer):
    """Limited-memory BFGS, a drop-in for `torch.optim.LBFGS`.

    Its constructor accepts every call that `torch.optim.LBFGS` accepts, with the same meaning. What
    differs by default: a line search is on, and the tolerances are relative to scale, so that a
    small loss does not end the training silently.

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
            times the largest entry seen so far where that is below one. Where groups differ in
            `lr`, the gradient is that of the scaled parameters.
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

    _info_type = LBFGSInfo
    _recognized_by = "max_iter"
    _foreign_names = (
        *("d", "t", "ro", "al", "H_diag", "old_dirs", "old_stps"),
        *("prev_flat_grad", "prev_loss"),
    )
    _carried = (*FlatOptimizer._carried, "line_search", "_reset_reason")

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
        if max_eval is not None:
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
        if self._sharded:
            self._show_names()

    def _step(self, objective: Objective) -> Tensor:
        evaluation = objective.evaluate()
        grad_norm, loss = objective.vector.space.to_host(
            largest=[max_norm(evaluation.grad)], whole=[evaluation.loss]
        )
        start = _Point(evaluation, loss, grad_norm)
        # A copy: a closure may use one tensor for all its losses.
        returned = evaluation.closure_loss.clone()
        if not start.finite:
            objective.abandon()
            self._forget("the loss or gradient at the start of a step was not finite")
            self._report(
                LBFGSInfo(StepStatus.NONFINITE_START, loss, loss, grad_norm, evaluations=1)
            )
            return returned
        self._largest_gradient = max(self._largest_gradient, grad_norm)
        history = self._fitting_history(objective.vector)
        iteration = _Iterations(objective, history, self._settings(), start)
        del evaluation, start  # a gradient that is not needed for long
        status = iteration.run()
        self._reset_reason = iteration.reset_reason or self._reset_reason
        self._report(
            LBFGSInfo(
                status=status,
                loss=loss,
                loss_after=iteration.point.loss,
                grad_norm=iteration.point.grad_norm,
                iterations=iteration.count,
                evaluations=objective.evaluations,
                step_length=iteration.step_length,
                search_status=iteration.search_status,
                nonfinite_trials=iteration.nonfinite,
                skipped_pairs=iteration.skipped,
                damped_pairs=iteration.damped,
            )
        )
        return returned

    def _report(self, info: LBFGSInfo) -> None:
        self.info = replace(info, history_reset=self._reset_reason)
        self._reset_reason = ""
        self._counts["n_iter"] += info.iterations
        self._counts["func_evals"] += info.evaluations

    def _settings(self) -> _Settings:
        group = self.param_groups[0]
        tolerance_grad = group["tolerance_grad"]
        if tolerance_grad is None:
            tolerance_grad = 1e-7 * min(1.0, self._largest_gradient)
        return _Settings(
            lr=self._learning_rate,
            max_iter=group["max_iter"],
            max_eval=group["max_eval"] or group["max_iter"] * 5 // 4,
            tolerance_grad=tolerance_grad,
            tolerance_change=group["tolerance_change"],
            damping=group["damping"],
            line_search=self.line_search,
        )

    # The history and its place in checkpoints.

    def _fitting_history(self, vector: ParameterVector) -> InverseBFGS:
        """The history; a new one where there is none, or none that fits."""
        size = self.param_groups[0]["history_size"] or _default_history_size(vector)
        inverse = self._inverse
        if inverse is not None and (inverse.size, inverse.history_size) != (vector.size, size):
            self._forget("history_size or the trainable parameters changed")
        if self._inverse is None:
            self._inverse = _history(vector, size)
        self._inverse.largest_scale = not isinstance(self.line_search, FixedStep)
        return self._inverse

    def _forget(self, reason: str) -> None:
        self._reset_reason = reason
        self._inverse = None

    def _split_state(self, vector: ParameterVector) -> tuple[dict[str, Any], dict[str, Rows]]:
        size = self.param_groups[0]["history_size"] or _default_history_size(vector)
        inverse = self._inverse
        if inverse is None or (inverse.size, inverse.history_size) != (vector.size, size):
            inverse = _history(vector, size)
        small, steps, differences = inverse.split_state()
        counts = self._counts | {"largest_gradient": self._largest_gradient}
        return counts | small, {"steps": Rows(steps, size), "differences": Rows(differences, size)}

    def _join_state(
        self, small: dict[str, Any], vectors: dict[str, Tensor], vector: ParameterVector
    ) -> dict[str, Any]:
        names = ("n_iter", "func_evals", "largest_gradient")
        history = InverseBFGS.join_state(small, vectors["steps"], vectors["differences"])
        return {name: small[name] for name in names} | {"history": history}

    def _export_state(self) -> dict[str, Any]:
        history = {} if self._inverse is None else self._inverse.state_dict()
        return self._counts | {"largest_gradient": self._largest_gradient, "history": history}

    def _import_state(self, state: dict[str, Any]) -> None:
        inverse = None
        # With all parameters frozen there is nothing to hold it against; the next step does.
        vector = self._known_vector()
        if vector is None:
            pass
        elif history := state.get("history"):
            if self._trainable:
                check_size(history["size"], vector)
            inverse = _history(vector, history["history_size"], history["size"])
            inverse.load_state_dict(history)
        elif state.get("old_stps"):
            size = self.param_groups[0]["history_size"] or _default_history_size(vector)
            inverse = _from_torch(state, size, vector)
        self._inverse = inverse
        self._largest_gradient = state.get("largest_gradient", 0.0)
        self._counts = {name: state.get(name, 0) for name in ("n_iter", "func_evals")}


def _default_history_size(vector: ParameterVector) -> int:
    # Of the whole vector: all ranks keep as many pairs, and so they do when they get fewer or more.
    pair = 2 * vector.whole_size * torch.finfo(vector.dtype).bits // 8
    return max(20, min(200, _HISTORY_BYTES // pair))


def _history(vector: ParameterVector, history_size: int, size: int | None = None) -> InverseBFGS:
    size = vector.size if size is None else size
    return InverseBFGS(size, history_size, vector.dtype, vector.device, space=vector.space)


def _from_torch(state: dict[str, Any], history_size: int, vector: ParameterVector) -> InverseBFGS:
    """The history of a `torch.optim.LBFGS` checkpoint."""
    inverse = _history(vector, history_size)
    for y, s in zip(state["old_dirs"], state["old_stps"], strict=True):
        check_size(s.numel(), vector)
        inverse.push(s.to(vector.device, vector.dtype), y.to(vector.device, vector.dtype))
    return inverse


# The iterations of one step.


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a step is told; the arguments of `LBFGS` by their names, all resolved."""

    lr: float
    max_iter: int
    max_eval: int
    tolerance_grad: float
    tolerance_change: float
    damping: bool
    line_search: LineSearch


class _Point(NamedTuple):
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

    def __init__(self, point: _Point, y: Tensor | None, y_y: float, y_d: float) -> None:
        self.point: _Point | None = point
        self.y, self.y_y, self.y_d = y, y_y, y_d


class _Line(NamedTuple):
    """A direction `d` from a point with gradient `g`."""

    direction: Tensor
    slope: float  # g'd
    square: float  # d'd


class _Iterations:
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
        self, objective: Objective, history: InverseBFGS, settings: _Settings, start: _Point
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
        self.point = _Point(evaluation, loss, grad_norm)

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
        candidate = _Candidate(_Point(evaluation, loss, grad_norm), y, y_y, y_d)
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

    def _learn(self, t: float, line: _Line, candidate: _Candidate, point: _Point) -> None:
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
