"""BFGS and its self-scaled relatives, with a dense inverse Hessian and a line search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_choice
from torch_secondorder._foundation.types import ParamsT
from torch_secondorder._objective.base import Objective
from torch_secondorder._optim.flat import BoundedInfo, Candidate, Descent, Line, Point
from torch_secondorder._optim.line_search import LineSearchOptimizer, curvature_pair
from torch_secondorder._optim.state import Matrix, ModelField, Pieces, check_size, declare
from torch_secondorder._params.bounds import Bounds
from torch_secondorder._params.vector import ParameterVector
from torch_secondorder.curvature import InverseBroyden, LinearOperator
from torch_secondorder.curvature.inverse_broyden import SELF_SCALED, BroydenUpdate
from torch_secondorder.globalization import LineSearch, LineSearchName
from torch_secondorder.solvers._box_quadratic import FaceModel, InverseOnFaces

__all__ = ["BFGS", "BFGSInfo"]


@dataclass(frozen=True, slots=True)
class BFGSInfo(BoundedInfo):
    """Report of one step of `BFGS`.

    Attributes:
        skipped_pairs: Pairs that failed the curvature test and were left out.
        damped_pairs: Pairs that were changed by Powell's damping.
        history_reset: Why the inverse Hessian was dropped during the step; empty if it was not.
        tau: The scaling of the last update, 1 for none; see `InverseBroyden`.
        phi: The member of the Broyden family that the last update was: 1 for BFGS, 0 for DFP.

    >>> x = torch.tensor([3.0, 1.0], dtype=torch.float64, requires_grad=True)
    >>> optimizer = BFGS([x])
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = (x**4).sum()
    ...     loss.backward()
    ...     return loss
    >>> loss = optimizer.step(closure)
    >>> optimizer.info.skipped_pairs, optimizer.info.history_reset, optimizer.info.phi
    (0, '', 1.0)
    """

    skipped_pairs: int = 0
    damped_pairs: int = 0
    history_reset: str = ""
    tau: float = 1.0
    phi: float = 1.0


class _InverseHessian(ModelField):
    """The inverse Hessian of `BFGS`."""

    of_vector = True

    def check_sharded(self, optimizer: str) -> None:
        """See `ModelField.check_sharded`."""
        Matrix().check_sharded(optimizer)

    def save(self, optimizer: BFGS) -> dict[str, Any]:
        """See `ModelField.save`."""
        inverse = self.get(optimizer)
        return {self.name: {} if inverse is None else inverse.state_dict()}

    def cut(self, optimizer: BFGS) -> Pieces:
        """See `ModelField.cut`."""
        return self.save(optimizer), {}

    def load(self, found: Mapping[str, Any], optimizer: BFGS) -> InverseBroyden | None:
        """See `ModelField.load`."""
        vector, state = optimizer._known_vector(), found.get(self.name)
        if vector is None or not state:
            return None
        if optimizer._trainable:
            check_size(state["size"], vector)
        inverse = InverseBroyden(state["size"], vector.dtype, vector.device)
        inverse.load_state_dict(state)
        return inverse


class BFGS(LineSearchOptimizer):
    """BFGS and its self-scaled relatives, for up to tens of thousands of parameters.

    An iteration moves by `-t H g`, with the gradient `g` and a length `t` from the line search. `H`
    is a dense approximation of the inverse Hessian, which takes `n^2` numbers of the dtype of the
    parameters (at least float32): 0.2 GB for 5,000 of them in float64, 3.2 GB for 20,000. If they
    do not fit, the first step says how much they would take, and `LBFGS` is the way out. An
    iteration costs little more than one product with this matrix, besides the evaluations.

    Which `update` for what:

    - `"bfgs"`, the default, needs the fewest evaluations on classical test functions, and a little
      less than `LBFGS`.
    - `"ssbroyden"` is for badly conditioned losses that are to be minimized to high precision, such
      as those of physics-informed networks in float64: there its error is smaller than that of the
      other updates, and by orders of magnitude smaller than that of `LBFGS`. On classical functions
      it needs about a fifth more evaluations.
    - `"ssbfgs"` lies between the two. `"dfp"` is there for comparison: it is slow.

    Arguments are those of `LBFGS`, which is a drop-in for `torch.optim.LBFGS`, without
    `history_size`. When a search along the quasi-Newton direction finds nothing, or rounding has
    made the matrix indefinite, it is dropped, and `info.history_reset` says why.

    Reference: Nocedal and Wright 2006, "Numerical Optimization", chapter 6; for the self-scaled
    updates see `torch_secondorder.curvature.InverseBroyden`.

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
        line_search_fn: `"strong_wolfe"`, `"hager_zhang"`, `"armijo"`, a `LineSearch`, or None for
            steps of length `lr` without a search.
        update: `"bfgs"`, `"ssbfgs"`, `"ssbroyden"` or `"dfp"`. With the self-scaled ones a search
            first tries the length, at most `lr`, at which the last line had its minimum.
        weight_decay: Coefficient of `|theta|^2 / 2`, added to the loss.
        maximize: Whether to maximize the closure's loss.
        bounds: Lower and upper bounds `(low, high)` of the parameters, or None; see `LBFGS`. A step
            with `k` entries at bounds also costs `k^3 / 3` operations.
        powell_damping: Whether a pair with too little curvature is corrected (Powell 1978) instead
            of left out.

    Raises:
        TypeError: A parameter is neither floating-point nor complex, or `line_search_fn` or a
            bound has a wrong type.
        ValueError: A hyperparameter is out of range, the name of a line search or an update is
            unknown, bounds cross or are NaN, or parameters are sharded. In `step()`, a subclass of
            it if the matrix does not fit into memory.

    >>> x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
    >>> optimizer = BFGS([x], max_iter=100)
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

    info: BFGSInfo | None
    _info_type = BFGSInfo
    _takes_bounds = True
    _takes_constraints = True
    _state_fields = declare(inverse_hessian=_InverseHessian("_inverse"))
    _carried: ClassVar[tuple[str, ...]] = ("update",)
    _inverse: InverseBroyden | None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float | None = None,
        tolerance_change: float = 1e-9,
        line_search_fn: LineSearchName | LineSearch | None = "strong_wolfe",
        *,
        update: BroydenUpdate = "bfgs",
        weight_decay: float = 0.0,
        maximize: bool = False,
        bounds: Bounds = None,
        powell_damping: bool = False,
    ) -> None:
        check_choice("update", update, BroydenUpdate)
        self.update = update
        # The gradient whose product with H is known already, and minus this product.
        self._known: tuple[Tensor, Tensor] | None = None
        defaults = {
            "lr": lr,
            "max_iter": max_iter,
            "max_eval": max_eval,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "bounds": bounds,
            "powell_damping": powell_damping,
        }
        super().__init__(params, line_search_fn, defaults)

    def _current_vector(self, params: Any, rates: Any) -> ParameterVector:
        vector = super()._current_vector(params, rates)
        if self._inverse is not None and self._inverse.size != vector.size:
            self._forget("the trainable parameters changed")  # since the state was loaded
        if self._inverse is None:
            inverse = InverseBroyden(vector.size, vector.dtype, vector.device)
            inverse.check_fits()  # before anything is evaluated
            self._inverse = inverse
        return vector

    def _begin(self, descent: Descent) -> None:
        super()._begin(descent)
        self._known = None
        self._skipped = self._damped = 0

    def _finish(self, objective: Objective, descent: Descent | None) -> dict[str, Any]:
        further = super()._finish(objective, descent)
        self._known = None
        if descent is not None:
            further |= {"skipped_pairs": self._skipped, "damped_pairs": self._damped}
        if self._inverse is not None:
            further |= {"tau": self._inverse.tau, "phi": self._inverse.phi}
        return further

    def _direction(self, descent: Descent) -> Tensor | None:
        inverse, grad, known = self._inverse, descent.point.grad, self._known
        self._known = None
        if inverse is None or not inverse.count or grad is None:
            return None
        if known is not None and known[0] is grad:
            return known[1]
        return inverse.direction(grad)

    def _first_step(self, descent: Descent, line: Line) -> float:
        inverse = self._inverse
        if not self._searches or inverse is None or self.update not in SELF_SCALED:
            return descent.lr
        # Scaling up alone makes H too large in general, and the last line knows by how much: it had
        # its minimum at this multiple of the direction.
        return descent.lr * min(1.0, inverse.ratio)

    def _learn(self, descent: Descent, line: Line, t: float, before: Point, to: Candidate) -> None:
        """Updates the inverse Hessian, if the pair shows curvature or can be made to."""
        inverse = self._inverse
        assert to.point is not None and to.point.grad is not None
        grad, known = to.point.grad, None
        if inverse is None:  # the closure has loaded a state
            vector = descent.objective.vector
            inverse = self._inverse = InverseBroyden(vector.size, vector.dtype, vector.device)
        inverse.update = self.update
        # The Lagrangian need not be convex where the constraints are kept.
        damping = self.param_groups[0]["powell_damping"] or self._sequential is not None
        pair = curvature_pair(descent, line, t, before, to, damping=damping)
        if pair is None:
            self._skipped += 1
            return
        expected = t * t * line.bend
        if not inverse.count:
            # The step went along the negative gradient, which is the direction for this H.
            initial = line.square / line.bend
            learned = inverse.push(pair.s, pair.y, expected=expected, initial=initial)
        elif pair.damped or line.product is not None or descent.objective.manifold is not None:
            learned = inverse.push(pair.s, pair.y, expected=expected)
        else:
            # H y is the difference of H g, and the old one is the step: one product serves for y
            # and for the next direction.
            known = inverse.matvec(grad)
            of_y = torch.add(known, pair.s, alpha=1 / t)
            learned = inverse.push(pair.s, pair.y, expected=expected, of_y=of_y)
        if not learned:
            self._restart()
            self._reset_reason = "the inverse Hessian was no longer positive definite"
            return
        self._damped += pair.damped
        if known is not None:
            self._known = grad, inverse.advance(known, grad).neg_()

    def _inverse_hessian(self) -> LinearOperator | None:
        return self._inverse if self._inverse is not None and self._inverse.count else None

    def _face_model(self, descent: Descent) -> FaceModel | None:
        inverse = self._inverse
        return None if inverse is None or not inverse.count else InverseOnFaces(inverse)

    def _restart(self) -> bool:
        if self._inverse is None or not self._inverse.count:
            return False
        self._inverse.reset()
        return True
