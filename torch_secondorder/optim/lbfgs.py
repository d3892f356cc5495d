"""L-BFGS with a line search, a compact history and named endings."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_choice, check_integer
from torch_secondorder._foundation.types import ParamsT
from torch_secondorder._objective.base import Objective
from torch_secondorder._optim.flat import BoundedInfo, Candidate, Descent, Line, Point
from torch_secondorder._optim.line_search import LineSearchOptimizer, curvature_pair
from torch_secondorder._optim.state import ModelField, Pieces, check_size, copied, declare
from torch_secondorder._params.bounds import Bounds
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.curvature import InverseBFGS, LinearOperator, ReducedBroyden
from torch_secondorder.globalization import LineSearch, LineSearchName
from torch_secondorder.solvers._box_quadratic import CompactBFGS, FaceModel, ReducedModel

__all__ = ["LBFGS", "LBFGSInfo"]

#: Updates of the inverse Hessian.
Update: TypeAlias = Literal["bfgs", "ssbfgs", "ssbroyden"]
History: TypeAlias = InverseBFGS | ReducedBroyden

# The memory of the history by default, unless twenty pairs take more.
_HISTORY_BYTES = 256 * 2**20
# How many times the newest scale the largest of the history may count. A step that is too long in
# some entries ends at their bounds: over 25 bounded problems 2 takes 6% fewer evaluations than 5.
_BOLDEST, _BOLDEST_IN_BOX = 5.0, 2.0
# On a manifold, pairs are of different tangent spaces and an old scale says less: for principal
# components, 1.5 takes half to three quarters of the evaluations of 5; elsewhere it makes little
# difference.
_BOLDEST_ALONG = 1.5


@dataclass(frozen=True, slots=True)
class LBFGSInfo(BoundedInfo):
    """Report of one step of `LBFGS`.

    Attributes:
        skipped_pairs: Pairs that failed the curvature test and were left out of the history.
        damped_pairs: Pairs that were changed by Powell's damping.
        history_reset: Why the history was dropped during the step; empty if it was not.

    >>> x = torch.tensor([3.0, 1.0], dtype=torch.float64, requires_grad=True)
    >>> optimizer = LBFGS([x])
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = (x**4).sum()
    ...     loss.backward()
    ...     return loss
    >>> loss = optimizer.step(closure)
    >>> optimizer.info.iterations, optimizer.info.skipped_pairs, optimizer.info.history_reset
    (20, 0, '')
    """

    skipped_pairs: int = 0
    damped_pairs: int = 0
    history_reset: str = ""


class _History(ModelField):
    """The curvature that `LBFGS` has learned; takes pairs of `torch.optim.LBFGS` as well."""

    small_names = (
        *("history_size", "count", "_room", "_newest", "_pending"),
        *("scales", "inverse", "diagonal"),
        *("rank", "scale", "tau", "phi", "ratio", "matrix", "expected", "initial", "is_pending"),
    )
    vector_names = ("steps", "differences", "basis", "pair")
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
        inverse = self.get(optimizer)
        if inverse is None or not optimizer._fits(inverse, vector):
            inverse = optimizer._new_history(vector)
        if isinstance(inverse, ReducedBroyden):
            small, basis, pair = inverse.split_state()
            return small, {"basis": (basis, inverse.capacity), "pair": (pair, 2)}
        small, steps, differences = inverse.split_state()
        size = inverse.history_size
        return small, {"steps": (steps, size), "differences": (differences, size)}

    def load(self, found: Mapping[str, Any], optimizer: LBFGS) -> History | None:
        """See `ModelField.load`."""
        vector = optimizer._known_vector()
        if vector is None:
            return None
        history, inverse = found.get(self.name), None
        if "steps" in found:
            history = InverseBFGS.join_state(dict(found), found["steps"], found["differences"])
        elif "basis" in found:
            history = ReducedBroyden.join_state(dict(found), found["basis"], found["pair"])
        if history:
            # If all parameters are frozen there is nothing to compare it with; the next step does.
            if optimizer._trainable:
                check_size(history["size"], vector)
            kind = ReducedBroyden if "basis" in history else InverseBFGS
            inverse = _history(kind, vector, history["history_size"], history["size"])
            inverse.load_state_dict(copied(history))
        elif found.get("old_stps"):
            inverse = optimizer._new_history(vector)
            for y, s in zip(found["old_dirs"], found["old_stps"], strict=True):
                check_size(s.numel(), vector)
                inverse.push(s.to(vector.device, vector.dtype), y.to(vector.device, vector.dtype))
        return inverse


class LBFGS(LineSearchOptimizer):
    """Limited-memory BFGS, a drop-in for `torch.optim.LBFGS`.

    Its constructor accepts every call that `torch.optim.LBFGS` accepts, with the same meaning. Two
    defaults differ: a line search is on, and the tolerances are relative to scale, so that a small
    loss does not end the training silently.

    An iteration moves by `-t H g`, with the gradient `g`, a length `t` from the line search, and an
    estimate `H` of the inverse Hessian: a multiple of the identity after the BFGS updates by the
    last `m` pairs of a step and its change of the gradient. It takes about `4 m n` multiplications.

    Reference: Liu and Nocedal 1989, "On the limited memory BFGS method for large scale
    optimization"; the direction follows Byrd, Nocedal and Schnabel 1994 (see
    `torch_secondorder.curvature.InverseBFGS`). For the self-scaled updates see
    `torch_secondorder.curvature.ReducedBroyden`.

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
        update: `"bfgs"`, or one of the self-scaled updates `"ssbfgs"` and `"ssbroyden"` (Al-Baali
            1998). `"ssbroyden"` is for physics-informed networks and other long trainings to high
            precision: within some hundred evaluations its loss is lower, in the end by orders of
            magnitude, above all with a history of 100 pairs or more. `"bfgs"` is for classical
            problems. The memory is the same; an iteration takes two to three times the time.
        weight_decay: Coefficient of `|theta|^2 / 2`, added to the loss.
        maximize: Whether to maximize the closure's loss.
        bounds: Lower and upper bounds `(low, high)` of the parameters, or None. Each is a number, a
            tensor that broadcasts to every parameter of the group, a list with one of these for
            each parameter, or None for no bound. The closure is only evaluated within the bounds:
            parameters outside are moved to the nearest point within first, and
            `info.start_projected` says so. `tolerance_grad` is about the projected gradient then.
            A group may have its own bounds.
        powell_damping: Whether a pair with too little curvature is corrected (Powell 1978) instead
            of left out.
        damping: Old name of `powell_damping`.

    Raises:
        TypeError: A parameter is neither floating-point nor complex, or `line_search_fn` or a
            bound has a wrong type.
        ValueError: A hyperparameter is out of range, the name of a line search or an update is
            unknown, or bounds cross, are NaN, or do not fit their parameters.

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
    _takes_bounds = True
    _takes_constraints = True
    _faces: CompactBFGS | None = None  # the history on faces of the box
    _renamed: ClassVar = {"damping": "powell_damping"}
    _state_fields = declare(history=_History("_inverse"))
    _carried: ClassVar[tuple[str, ...]] = ("update",)
    _inverse: History | None

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
        update: Update = "bfgs",
        weight_decay: float = 0.0,
        maximize: bool = False,
        bounds: Bounds = None,
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
        if history_size is not None:
            check_integer("history_size", history_size, whole_floats=True)
        check_choice("update", update, Update)
        self.update: Update = update
        defaults = {
            "lr": lr,
            "max_iter": max_iter,
            "max_eval": max_eval,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "history_size": history_size,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "bounds": bounds,
            "powell_damping": powell_damping,
        }
        super().__init__(params, line_search_fn, defaults)

    def _begin(self, descent: Descent) -> None:
        super()._begin(descent)
        vector = descent.objective.vector
        if self._inverse is not None and not self._fits(self._inverse, vector):
            self._forget("update, history_size or the trainable parameters changed")
        history = self._inverse or self._start_history(vector)
        self._set_up(history)
        if isinstance(history, InverseBFGS):
            objective = descent.objective
            history.boldness = _BOLDEST if objective.box is None else _BOLDEST_IN_BOX
            if objective.manifold is not None:
                history.boldness = _BOLDEST_ALONG
        self._skipped = self._damped = 0
        self._faces = None

    def _finish(self, objective: Objective, descent: Descent | None) -> dict[str, Any]:
        further = super()._finish(objective, descent)
        self._faces = None  # made anew in each step, so that a loaded state goes on bit for bit
        if descent is not None:
            further |= {"skipped_pairs": self._skipped, "damped_pairs": self._damped}
        return further

    def _direction(self, descent: Descent) -> Tensor | None:
        history, grad = self._inverse, descent.point.grad
        if history is None:
            history = self._start_history(descent.objective.vector)
        return history.direction(grad) if history.count and grad is not None else None

    def _first_step(self, descent: Descent, line: Line) -> float:
        inverse = self._inverse
        if not self._searches or not isinstance(inverse, ReducedBroyden):
            return descent.lr
        # As `BFGS` does: H is too large in general, and the last line knows by how much.
        return descent.lr * min(1.0, inverse.ratio)

    def _inverse_hessian(self) -> LinearOperator | None:
        history = self._inverse
        return history if history is not None and history.count else None

    def _face_model(self, descent: Descent) -> FaceModel | None:
        history = self._inverse
        if history is None:
            history = self._start_history(descent.objective.vector)
        if not history.count:
            return None
        if not isinstance(history, InverseBFGS):
            return ReducedModel(history)
        if self._faces is None or self._faces.inverse is not history:
            self._faces = CompactBFGS(history)
        return self._faces

    def _learn(self, descent: Descent, line: Line, t: float, before: Point, to: Candidate) -> None:
        """Enters the pair into the history if it shows curvature, or can be made to."""
        history = self._inverse
        if history is None:  # the closure has loaded a state
            return
        # The Lagrangian need not be convex where the constraints are kept.
        damping = self.param_groups[0]["powell_damping"] or self._sequential is not None
        pair = curvature_pair(descent, line, t, before, to, damping=damping)
        if pair is None:
            self._skipped += 1
            return
        self._damped += pair.damped
        if isinstance(history, InverseBFGS):
            history.push(pair.s, pair.y, pair.scale)
        else:
            # On a manifold the step is the tangent part of a direction only.
            along = descent.objective.manifold is None
            expected = t * t * line.bend if along else None
            # The first step went along the negative gradient, the direction for this H.
            slope = line.slope if self._sequential is None else -line.bend
            history.push(pair.s, pair.y, expected=expected, initial=line.square / -slope)

    def _restart(self) -> bool:
        if self._inverse is None or not self._inverse.count:
            return False
        self._inverse.reset()
        return True

    # The history and its place in checkpoints.

    def _start_history(self, vector: ParameterVector) -> History:
        """A history without pairs: there is none at first, or once a closure has loaded a state."""
        self._inverse = self._new_history(vector)
        self._set_up(self._inverse)
        return self._inverse

    def _new_history(self, vector: ParameterVector) -> History:
        return _history(self._history_kind, vector, self._history_size(vector))

    @property
    def _history_kind(self) -> type[History]:
        return InverseBFGS if self.update == "bfgs" else ReducedBroyden

    def _fits(self, history: History, vector: ParameterVector) -> bool:
        """True if the history is for these parameters and the hyperparameters of now."""
        sizes = (history.size, history.history_size) == (vector.size, self._history_size(vector))
        return sizes and isinstance(history, self._history_kind)

    def _set_up(self, history: History) -> None:
        if isinstance(history, InverseBFGS):
            history.largest_scale = self._searches
        else:
            history.update = self.update

    def _history_size(self, vector: ParameterVector) -> int:
        """The number of pairs to keep; by default as many as fit into the memory set aside."""
        size: int | None = self.param_groups[0]["history_size"]
        if size:
            return size
        # The size of the whole vector counts: all ranks keep the same number of pairs, however many
        # ranks there are.
        pair = 2 * vector.whole_size * torch.finfo(vector.dtype).bits // 8
        return max(20, min(200, _HISTORY_BYTES // pair))


def _history(
    kind: type[History], vector: ParameterVector, history_size: int, size: int | None = None
) -> History:
    size = vector.size if size is None else size
    return kind(size, history_size, vector.dtype, vector.device, space=vector.space)
