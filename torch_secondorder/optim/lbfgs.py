"""L-BFGS with a line search, a compact history and named endings."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_integer, check_number
from torch_secondorder._foundation.types import ParamsT
from torch_secondorder._objective.base import Objective
from torch_secondorder._optim.flat import (
    Candidate,
    Descent,
    DescentInfo,
    FlatOptimizer,
    Line,
    Point,
)
from torch_secondorder._optim.info import StepStatus
from torch_secondorder._optim.state import ModelField, Number, Pieces, check_size, copied, declare
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.curvature import InverseBFGS
from torch_secondorder.globalization import (
    FixedStep,
    LineSearch,
    LineSearchName,
    SearchResult,
    SearchStatus,
    falls_without_end,
    resolve_line_search,
)

__all__ = ["LBFGS", "LBFGSInfo"]

# The memory of the history by default, unless twenty pairs take more.
_HISTORY_BYTES = 256 * 2**20
# Powell's constant: the smallest share of the expected curvature that a corrected pair has.
_LEAST_CURVATURE = 0.2


@dataclass(frozen=True, slots=True)
class LBFGSInfo(DescentInfo):
    """Report of one step of `LBFGS`.

    Attributes:
        skipped_pairs: Pairs that failed the curvature test and were left out of the history.
        damped_pairs: Pairs that were changed by Powell's damping.
        history_reset: Why the history was dropped during the step; empty if it was not.
    """

    skipped_pairs: int = 0
    damped_pairs: int = 0
    history_reset: str = ""


class _History(ModelField):
    """The pairs of `LBFGS`; takes those of `torch.optim.LBFGS` as well."""

    small_names = (
        *("history_size", "count", "_room", "_newest", "_pending"),
        *("scales", "inverse", "diagonal"),
    )
    vector_names = ("steps", "differences")
    foreign_names = (
        *("d", "t", "ro", "al", "H_diag", "old_dirs", "old_stps"),
        *("prev_flat_grad", "prev_loss"),
    )
    of_vector = True

    def save(self, optimizer: LBFGS) -> dict[str, Any]:
        """See `ModelField.save`."""
        inverse = self.get(optimizer)
        return {self.name: {} if inverse is None else inverse.state_dict()}

    def cut(self, optimizer: LBFGS) -> Pieces:
        """See `ModelField.cut`."""
        vector = ParameterVector(optimizer._trainable)
        inverse, size = self.get(optimizer), optimizer._history_size(vector)
        if inverse is None or (inverse.size, inverse.history_size) != (vector.size, size):
            inverse = _history(vector, size)
        small, steps, differences = inverse.split_state()
        return small, {"steps": (steps, size), "differences": (differences, size)}

    def load(self, found: Mapping[str, Any], optimizer: LBFGS) -> InverseBFGS | None:
        """See `ModelField.load`."""
        vector = optimizer._known_vector()
        if vector is None:
            return None
        history = found.get(self.name)
        if "steps" in found:
            history = InverseBFGS.join_state(dict(found), found["steps"], found["differences"])
        if history:
            # If all parameters are frozen there is nothing to compare it with; the next step does.
            if optimizer._trainable:
                check_size(history["size"], vector)
            inverse = _history(vector, history["history_size"], history["size"])
            inverse.load_state_dict(copied(history))
            return inverse
        if not found.get("old_stps"):
            return None
        inverse = _history(vector, optimizer._history_size(vector))
        for y, s in zip(found["old_dirs"], found["old_stps"], strict=True):
            check_size(s.numel(), vector)
            inverse.push(s.to(vector.device, vector.dtype), y.to(vector.device, vector.dtype))
        return inverse


class LBFGS(FlatOptimizer):
    """Limited-memory BFGS, a drop-in for `torch.optim.LBFGS`.

    Its constructor accepts every call that `torch.optim.LBFGS` accepts, with the same meaning. Two
    defaults differ: a line search is on, and the tolerances are relative to scale, so that a small
    loss does not end the training silently.

    Reference: Liu and Nocedal 1989, "On the limited memory BFGS method for large scale
    optimization"; the direction follows Byrd, Nocedal and Schnabel 1994 (see
    `torch_secondorder.curvature.InverseBFGS`).

    Args:
        params: Parameters or groups. A group may have its own `lr` and `weight_decay`.
        lr: The first step that a line search tries along the quasi-Newton direction; without a line
            search, the step. If groups differ, the largest one is this step, and each group's
            share of it scales the group's part of the initial inverse Hessian.
        max_iter: Iterations per `step()`.
        max_eval: Closure evaluations per `step()`, `max_iter * 5 // 4` by default. Checked between
            iterations: a line search always finishes.
        tolerance_grad: The step ends once no entry of the gradient is larger. By default `1e-7`,
            times the largest entry seen so far if that is below one. If groups differ in `lr`, the
            gradient is that of the scaled parameters.
        tolerance_change: The step ends once an iteration changes both the loss and the parameters
            by no more than this, relative to their size.
        history_size: Pairs kept; each takes twice the memory of the parameters. By default as many
            as fit into 256 MiB, at least 20 and at most 200.
        line_search_fn: `"strong_wolfe"`, `"hager_zhang"`, `"armijo"`, a `LineSearch`, or None for
            steps of length `lr` without a search.
        weight_decay: Coefficient of `|theta|^2 / 2`, added to the loss.
        maximize: Whether to maximize the closure's loss.
        powell_damping: Whether a pair with too little curvature is corrected (Powell 1978) instead
            of left out.
        damping: Old name of `powell_damping`.

    Raises:
        TypeError: A parameter is neither floating-point nor complex, or `line_search_fn` has a
            wrong type.
        ValueError: A hyperparameter is out of range, or the name of a line search is unknown.

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

    info: LBFGSInfo | None
    _info_type = LBFGSInfo
    _renamed: ClassVar = {"damping": "powell_damping"}
    _recognized_by = "max_iter"
    _state_fields = declare(n_iter=Number(0), func_evals=Number(0), history=_History("_inverse"))
    _n_iter: int
    _func_evals: int
    _inverse: InverseBFGS | None
    _carried = ("line_search", "_reset_reason")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float | None = None,
        tolerance_change: float = 1e-9,
        history_size: int | None = None,
        line_search_fn: LineSearchName | LineSearch | None = "strong_wolfe",
        *,
        weight_decay: float = 0.0,
        maximize: bool = False,
        powell_damping: bool = False,
        damping: bool | None = None,
    ) -> None:
        if damping is not None:
            warnings.warn(
                "LBFGS(damping=...) is called powell_damping now; the old name will be gone in the "
                "next release",
                DeprecationWarning,
                stacklevel=2,
            )
            powell_damping = damping
        check_integer("max_iter", max_iter, whole_floats=True)
        if history_size is not None:
            check_integer("history_size", history_size, whole_floats=True)
        check_number("tolerance_change", tolerance_change, low=0.0)
        check_number("tolerance_grad", tolerance_grad, low=0.0, optional=True)
        check_integer("max_eval", max_eval, optional=True, whole_floats=True)
        self.line_search = resolve_line_search(line_search_fn, "line_search_fn")
        self._reset_reason = ""
        defaults = {
            "lr": lr,
            "max_iter": max_iter,
            "max_eval": max_eval,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "history_size": history_size,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "powell_damping": powell_damping,
        }
        super().__init__(params, defaults)

    def _begin(self, descent: Descent) -> None:
        group, vector = self.param_groups[0], descent.objective.vector
        descent.max_eval = group["max_eval"] or group["max_iter"] * 5 // 4
        searches = not isinstance(self.line_search, FixedStep)
        if not searches:
            descent.patience = inf  # without a search the loss may climb for a while
        size, inverse = self._history_size(vector), self._inverse
        if inverse is not None and (inverse.size, inverse.history_size) != (vector.size, size):
            self._forget("history_size or the trainable parameters changed")
        history = self._inverse or self._start_history(vector)
        history.largest_scale = searches
        self._skipped = self._damped = 0

    def _finish(self, objective: Objective, descent: Descent | None) -> dict[str, Any]:
        self._func_evals += objective.evaluations
        further: dict[str, Any] = {}
        if descent is None:
            super()._finish(objective, descent)
        else:
            self._n_iter += descent.count
            further = {"skipped_pairs": self._skipped, "damped_pairs": self._damped}
        further["history_reset"] = self._reset_reason
        self._reset_reason = ""
        return further

    def _iterate(self, descent: Descent) -> StepStatus | None:
        if descent.objective.renewed:
            # Trials and pairs must belong to one function, and it has changed.
            _, descent.point = self._evaluate(descent.objective)
            if descent.point.grad_norm <= descent.tolerance_grad:
                return StepStatus.CONVERGED_GRADIENT
        line = self._line(descent)
        precision = descent.objective.vector.precision
        result = self.line_search(line, line.start, descent.lr, precision=precision)
        descent.search_status = result.status
        descent.nonfinite_trials += result.nonfinite
        unbounded = line.bottomless or (
            result.status is SearchStatus.UNBOUNDED and falls_without_end(line.slope, result)
        )
        if result.status.accepted:
            before = descent.point
            candidate = line.accept(result.trial)
            if self._inverse is not None:
                self._learn(self._inverse, line, result.trial.t, before, candidate)
        if unbounded:
            return StepStatus.UNBOUNDED
        return None if result.status.accepted else self._failed(result)

    def _failed(self, result: SearchResult) -> StepStatus | None:
        """Drops the history after a search in vain; without one the step is over."""
        if self._inverse is not None and self._inverse.count:
            self._drop_history(f"the line search ended with {result.status.name}")
            return None
        if result.status is SearchStatus.NONFINITE:
            self._drop_history("no trial of a line search was finite")
            return StepStatus.NONFINITE_TRIALS
        return StepStatus.NO_DECREASE

    def _line(self, descent: Descent) -> Line:
        """The line of the next search; one synchronization."""
        grad, history = descent.point.grad, self._inverse
        assert grad is not None
        if history is None:
            history = self._start_history(descent.objective.vector)
        if history.count:
            direction = history.direction(grad)
            slope, square = descent.space.to_host(sums=(grad @ direction, direction @ direction))
            if -inf < slope < 0 and isfinite(square):
                return Line(descent, direction, slope, square)
            self._drop_history("the history gave a direction of ascent")
        # The scale is not known yet. Without a search, the step is the same as in torch: the
        # negative gradient, cut to a 1-norm of at most one. With a search, it goes to where the
        # tangent meets a loss of zero, but no farther than the parameters are long.
        loss, largest = descent.point.loss, descent.point.grad_norm
        unit = grad / -largest  # no square of it overflows
        square, total = descent.space.to_host(sums=(unit @ unit, unit.abs().sum()))
        if isinstance(self.line_search, FixedStep):
            length = min(largest, 1 / total)
        else:
            length = max(1.0, descent.size) / sqrt(square)
            if loss:
                length = min(length, 2 * abs(loss) / (largest * square))
        return Line(descent, unit * length, -largest * square * length, square * length**2)

    def _learn(
        self, history: InverseBFGS, line: Line, t: float, before: Point, candidate: Candidate
    ) -> None:
        """Enters a pair into the history if it shows curvature, or can be made to.

        Args:
            history: The history.
            line: The line; its direction is overwritten.
            t: The accepted step.
            before: The point where the line begins.
            candidate: The accepted trial.
        """
        assert candidate.point is not None and candidate.point.grad is not None
        y, y_y = candidate.y, candidate.y_y
        assert before.grad is not None
        if y is None:
            y = candidate.point.grad - before.grad
        precision = torch.finfo(y.dtype)
        if not precision.tiny < y_y < inf and y.dtype == torch.float32:
            # The square is beyond the range of float32.
            (y_y,) = history.space.to_host(sums=[y.double() @ y.double()])
        s_y, s_s = t * candidate.y_d, t * t * line.square
        # H g = -d and so B s = -t g: the curvature that B expects is known without B.
        expected = -t * t * line.slope
        step = line.direction if t == 1.0 else line.direction.mul_(t)
        if self.param_groups[0]["powell_damping"] and s_y < _LEAST_CURVATURE * expected:
            keep = (1 - _LEAST_CURVATURE) * expected / (expected - s_y)
            history.push(step, y.mul_(keep).sub_(before.grad, alpha=(1 - keep) * t))
            self._damped += 1
        elif s_y > 10 * precision.eps * sqrt(s_s) * sqrt(y_y) and y_y > 0:
            history.push(step, y, s_y / y_y)
        else:
            self._skipped += 1

    def _drop_history(self, reason: str) -> None:
        """Drops the pairs during a step."""
        self._reset_reason = reason
        if self._inverse is not None:
            self._inverse.reset()

    # The history and its place in checkpoints.

    def _start_history(self, vector: ParameterVector) -> InverseBFGS:
        """A history without pairs: there is none at first, or once a closure has loaded a state."""
        self._inverse = _history(vector, self._history_size(vector))
        self._inverse.largest_scale = not isinstance(self.line_search, FixedStep)
        return self._inverse

    def _forget(self, reason: str) -> None:
        super()._forget(reason)
        self._reset_reason = reason

    def _history_size(self, vector: ParameterVector) -> int:
        """The number of pairs to keep; by default as many as fit into the memory set aside."""
        size: int | None = self.param_groups[0]["history_size"]
        if size:
            return size
        # The size of the whole vector counts: all ranks keep the same number of pairs, however many
        # ranks there are.
        pair = 2 * vector.whole_size * torch.finfo(vector.dtype).bits // 8
        return max(20, min(200, _HISTORY_BYTES // pair))


def _history(vector: ParameterVector, history_size: int, size: int | None = None) -> InverseBFGS:
    size = vector.size if size is None else size
    return InverseBFGS(size, history_size, vector.dtype, vector.device, space=vector.space)
