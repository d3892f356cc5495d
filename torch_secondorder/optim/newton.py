"""Newton's method with the exact dense Hessian."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite, nan
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_integer
from torch_secondorder._foundation.memory import check_fits
from torch_secondorder._foundation.types import ParamsT
from torch_secondorder._objective.base import Evaluation, EvaluationsSpent, Objective
from torch_secondorder._optim.curvature_choice import hessian_at
from torch_secondorder._optim.flat import BoundedInfo, Descent, FlatOptimizer, Point
from torch_secondorder._optim.info import StepStatus
from torch_secondorder._optim.quadratic_model import (
    Move,
    Proposal,
    Tally,
    Trials,
    point_of,
    repaired,
    search_along,
    take,
)
from torch_secondorder._optim.state import Number, declare
from torch_secondorder._params.bounds import Bounds
from torch_secondorder.curvature import LinearOperator
from torch_secondorder.globalization import (
    DampingRule,
    Globalization,
    GlobalizationName,
    LineSearch,
    SearchStatus,
    Trial,
    TrustRegion,
    resolve_globalization,
)
from torch_secondorder.solvers import DefinitenessName, DenseQuadratic, DenseStep
from torch_secondorder.solvers._boxed_dense import BoxedQuadratic

__all__ = ["Newton", "NewtonInfo"]

# Iterations without a new best loss or gradient after which only rounding error is left.
_PATIENCE = 5
# Most steps that are tried with one Hessian.
_ATTEMPTS = 24
# The relative error of the length of a step at the trust radius.
_TOLERANCE = 1e-3
# The gain ratio from which a damped step is taken.
_ACCEPT = 1e-4
# A correction is no longer than this multiple of the step, and lowers the loss by at least this
# share of what its slope promises.
_REACH, _SUFFICIENT = 2.0, 1e-4
# Matrices in memory at a time: the Hessian, the same in other units, and two for a factorization.
_MATRICES = 4


#: The model, without bounds and with them.
Quadratic: TypeAlias = DenseQuadratic | BoxedQuadratic


@dataclass(frozen=True, slots=True)
class NewtonInfo(BoundedInfo):
    """Report of one step of `Newton`.

    Attributes:
        hessians: Hessians computed.
        products: Products with the Hessian in these, one for each parameter.
        corrections: Further steps taken with a Hessian that had given one already.
        gain_ratio: The decrease of the loss in the last move over the one that the quadratic model
            predicted; None if undefined.
        damping: The damping of the next system; 0 without any.
        trust_radius: The trust radius of the next model; 0 without one.
        definiteness: Of the last Hessian: `"positive definite"`, `"singular"` or `"indefinite"`;
            empty before the first one.
        smallest_eigenvalue: Of the last Hessian, see `DenseQuadratic`; None if unknown.
        hard_case: Whether a step of the trust region was completed along the lowest eigenvector,
            because the gradient had no part along it.
        repair: A sentence about entries of a Hessian that were not finite and how they were
            replaced; empty if all were finite.

    >>> x = torch.tensor([3.0, 1.0], dtype=torch.float64, requires_grad=True)
    >>> optimizer = Newton([x])
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = (x**4).sum()
    ...     loss.backward()
    ...     return loss
    >>> loss = optimizer.step(closure)
    >>> optimizer.info.hessians, optimizer.info.definiteness
    (1, 'positive definite')
    """

    hessians: int = 0
    products: int = 0
    corrections: int = 0
    gain_ratio: float | None = None
    damping: float = 0.0
    trust_radius: float = 0.0
    definiteness: Literal["", DefinitenessName] = ""
    smallest_eigenvalue: float | None = None
    hard_case: bool = False
    repair: str = ""


class Newton(FlatOptimizer):
    """Newton's method with the exact Hessian, for up to a few thousand parameters.

    In each iteration the loss is modelled by a quadratic with its exact Hessian, an `n x n` matrix
    from `n` Hessian-vector products. A trust region, damping or a line search decides about the
    step, also where the Hessian is indefinite or singular. Near a minimum with a positive definite
    Hessian the number of correct digits doubles at least with each iteration.

    A Hessian costs as much as many evaluations, and so each one is used more than once: while the
    loss falls, further steps are made with the same Hessian and the gradient at the last point. On
    the classical test functions this halves the number of Hessians. The closure is the standard
    one.

    An iteration takes memory for four matrices and time that grows with the cube of `n`. For more
    parameters, use `NewtonCG`, which needs no matrix.

    References: Moré and Sorensen 1983, "Computing a trust region step"; Shamanskii 1967, "A
    modification of Newton's method"; Nocedal and Wright 2006, "Numerical Optimization", chapters 3
    and 4.

    Args:
        params: Parameters or groups. A group may have its own `lr` and `weight_decay`.
        lr: The share of each step that is tried first; 1 for Newton's step. If groups differ, each
            group's part of the metric is scaled by its share of the largest.
        globalization: `"trust_region"`: the minimizer of the model within a radius.
            `"damping"`: a multiple of the identity is added to the Hessian, with Levenberg's and
            Marquardt's rule for its size; an indefinite Hessian is made semidefinite before.
            `"line_search"` (`"strong_wolfe"`) or the name of a line search: the signs of negative
            eigenvalues are changed (up to 128 parameters), or a multiple of the identity is added
            to an indefinite Hessian. An instance (`TrustRegion`, `MarquardtDamping`, a
            `LineSearch`) has options.
        max_iter: Iterations per `step()`. More than one make sense on the full data only.
        corrections: Most further steps with one Hessian; 0 for Newton's method as in textbooks.
        max_eval: Most evaluations of the closure per `step()`; unlimited by default.
        tolerance_grad: The step ends once no entry of the gradient is larger. By default `1e-7`,
            times the largest entry seen so far where that is below one.
        tolerance_change: The step ends once an iteration changes both the loss and the parameters
            by no more than this, relative to their size.
        weight_decay: Coefficient of `|theta|^2 / 2`, added to the loss.
        maximize: Whether to maximize the closure's loss.
        bounds: Lower and upper bounds `(low, high)` of the parameters, or None; see `LBFGS`. The
            trust radius bounds each entry of a step then. Where the Hessian of the entries that the
            gradient does not hold at a bound is indefinite, the signs of its negative eigenvalues
            are changed.

    Raises:
        TypeError: A parameter is neither floating-point nor complex, or a strategy or a bound has a
            wrong type.
        ValueError: A hyperparameter is out of range, a name is unknown, bounds cross or are NaN, or
            the parameters are sharded. In `step()`, a subclass of it if the matrices do not fit
            into memory.

    >>> x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
    >>> optimizer = Newton([x], max_iter=50)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
    ...     loss.backward()
    ...     return loss
    >>> round(float(optimizer.step(closure)), 6)
    24.2
    >>> optimizer.info.status.name, [round(v, 6) for v in x.tolist()]
    ('CONVERGED_GRADIENT', [1.0, 1.0])
    >>> optimizer.info.definiteness
    'positive definite'
    """

    info: NewtonInfo | None
    _info_type = NewtonInfo
    _takes_manifolds = True
    _takes_bounds = True
    _recognized_by = "corrections"
    _state_fields = declare(damping=Number(0.0), radius=Number(0.0), start=Number(0.0))
    _damping: float  # of the next system; 0 before the first one
    _radius: float  # of the next model; 0 before the first one
    _start: float  # the first damping or radius, which the rules' limits are relative to
    _carried = ("globalization",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        globalization: GlobalizationName | Globalization = "trust_region",
        max_iter: int = 1,
        *,
        corrections: int = 3,
        max_eval: int | None = None,
        tolerance_grad: float | None = None,
        tolerance_change: float = 1e-9,
        weight_decay: float = 0.0,
        maximize: bool = False,
        bounds: Bounds = None,
    ) -> None:
        check_integer("corrections", corrections, low=0, whole_floats=True)
        # Armijo's search only shortens steps, and steps from a modified Hessian may be too short.
        searches = globalization == "line_search"
        self.globalization = resolve_globalization(
            "strong_wolfe" if searches else globalization, None, True
        )
        defaults = {
            "lr": lr,
            "max_iter": max_iter,
            "corrections": corrections,
            "max_eval": max_eval,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "bounds": bounds,
        }
        super().__init__(params, defaults)
        if self._sharded:
            raise ValueError(
                "Newton needs the whole Hessian in each process, and the parameters are sharded: "
                "use NewtonCG or LBFGS, which work on shards, or leave fully_shard out"
            )

    # The course of a step.

    def _evaluate(self, objective: Objective) -> tuple[Evaluation, Point]:
        vector = objective.vector
        check_fits(
            "the Hessian with its factorization",
            (_MATRICES, vector.size, vector.size),
            vector.dtype,
            vector.device,
            "use NewtonCG or LBFGS, which need no matrix",
        )
        most = self.param_groups[0]["max_eval"]
        objective.limit = inf if most is None else most
        evaluation = objective.evaluate(curvature=True)
        return evaluation, point_of(evaluation, objective)

    def _begin(self, descent: Descent) -> None:
        descent.patience = _PATIENCE
        if descent.objective.box is not None:
            descent.lr = min(descent.lr, 1.0)  # a whole step ends in the box, a longer one may not
        self._tally, self._report = Tally(), _Report()

    def _iterate(self, descent: Descent) -> StepStatus | None:
        """One iteration: a Hessian, and the steps made with it."""
        try:
            quadratic = self._model(descent)
            if quadratic is None:
                return StepStatus.NONFINITE_PRODUCTS
            trials = self._trials(descent)
            rule = self.globalization
            if isinstance(rule, TrustRegion):
                found = self._within_radius(quadratic, trials, rule, descent)
            elif isinstance(rule, DampingRule):
                found = self._damped(quadratic, trials, rule, descent)
            else:
                found = self._searched(quadratic, trials, rule, descent)
        except EvaluationsSpent:
            return StepStatus.MAX_EVALUATIONS
        if isinstance(found, Move):
            self._take(descent, found)
        if self._tally.unbounded:
            return StepStatus.UNBOUNDED
        return None if isinstance(found, Move) else found

    def _finish(self, objective: Objective, descent: Descent | None) -> dict[str, Any]:
        if descent is None:
            return {}
        tally, report = self._tally, self._report
        return {
            "hessians": report.hessians,
            "products": tally.products,
            "corrections": report.corrections,
            "gain_ratio": report.gain_ratio if isfinite(report.gain_ratio) else None,
            "damping": self._damping,
            "trust_radius": self._radius,
            "definiteness": report.definiteness,
            "smallest_eigenvalue": report.smallest_eigenvalue,
            "hard_case": report.hard_case,
            "repair": tally.repair,
        }

    # The model at a point.

    def _model(self, descent: Descent) -> Quadratic | None:
        """The quadratic with the Hessian at the current point; None if that is not finite."""
        objective, point = descent.objective, descent.point
        if point.evaluation is None:  # the trial has given loss and gradient, but no graph
            if objective.evaluations >= objective.limit:
                raise EvaluationsSpent
            point = point_of(objective.evaluate(curvature=True), objective)
        assert point.evaluation is not None and point.grad is not None
        operator = hessian_at(objective, point.evaluation)
        hessian = self._hessian(operator, point.grad, objective)
        if hessian is not None and objective.manifold is not None:
            hessian = objective.manifold.completed(objective.position, hessian)
        del operator
        # The graph has served: those of trials take its place.
        descent.point = point._replace(evaluation=None)
        if hessian is None:
            return None
        if objective.box is None:
            quadratic: Quadratic = DenseQuadratic.of(hessian, point.grad, _TOLERANCE)
        else:
            room = objective.box.room(objective.position)
            quadratic = BoxedQuadratic(hessian, point.grad, *room)
        self._report.definiteness = quadratic.definiteness
        self._report.smallest_eigenvalue = quadratic.smallest_eigenvalue
        return quadratic

    def _hessian(
        self, operator: LinearOperator, grad: Tensor, objective: Objective
    ) -> Tensor | None:
        """The Hessian, with entries that are not finite replaced, see `repaired`."""
        hessian = operator.dense()
        self._report.hessians += 1
        self._tally.products += operator.size
        if bool(hessian.isfinite().all()):
            return hessian
        del hessian
        repair = repaired(operator, objective, grad, 1.0)
        hessian = repair.operator.dense()
        self._tally.products += repair.products + operator.size
        self._tally.repair = repair.report
        return hessian if bool(hessian.isfinite().all()) else None

    def _trials(self, descent: Descent) -> Trials:
        """Evaluations of steps; they keep their graphs where the next iteration can use them."""
        objective = descent.objective
        return Trials(
            descent,
            self._tally,
            keeps_graphs=descent.count + 1 < descent.max_iter and objective.has_room_for_a_graph(),
            keeps_gradients=True,
        )

    # Three ways to a step.

    def _within_radius(
        self, quadratic: Quadratic, trials: Trials, rule: TrustRegion, descent: Descent
    ) -> Move | StepStatus:
        """The minimizer of the model within the trust radius."""
        if not self._radius:
            curvature = quadratic.along_gradient()
            length = trials.point.length / curvature if curvature else descent.size or 1.0
            self._radius = self._start = rule.begun(length)
        for _ in range(_ATTEMPTS):
            step = quadratic.within(self._radius)
            self._report.hard_case |= step.hard_case
            if not 0 < step.decrease < inf:
                return StepStatus.NO_DECREASE
            proposal = _proposal(trials, step)
            trial = trials.trial(proposal, descent.lr)
            move = self._corrected(trials, quadratic, step, proposal, trial, rule.accept, descent)
            ratio = move.gain_ratio
            self._radius = rule.updated(self._radius, ratio, step.length, self._start)
            if ratio > rule.accept:
                return move
            if trials.unresolved(proposal):
                return StepStatus.STALLED
        return StepStatus.NO_DECREASE if trial.finite else StepStatus.NONFINITE_TRIALS

    def _damped(
        self, quadratic: Quadratic, trials: Trials, rule: DampingRule, descent: Descent
    ) -> Move | StepStatus:
        """The minimizer of the model with a multiple of the identity added to the Hessian."""
        if not self._damping:
            self._damping = self._start = rule.begun(quadratic.along_gradient() or 1.0)
        for failures in range(1, _ATTEMPTS + 1):
            damping = self._damping
            step = quadratic.damped(damping)
            if not 0 < step.decrease < inf:
                return StepStatus.NO_DECREASE
            proposal = _proposal(trials, step)
            trial = trials.trial(proposal, descent.lr)
            move = self._corrected(trials, quadratic, step, proposal, trial, _ACCEPT, descent)
            if move.gain_ratio > _ACCEPT:
                after: float = move.trial.payload.length / trials.point.length
                self._damping = rule.updated(
                    damping, move.gain_ratio, after, self._start, proposal.curvature
                )
                return move
            if trials.unresolved(proposal):
                return StepStatus.STALLED
            self._damping = rule.rejected(damping, failures, self._start)
        return StepStatus.NO_DECREASE if trial.finite else StepStatus.NONFINITE_TRIALS

    def _searched(
        self, quadratic: Quadratic, trials: Trials, rule: LineSearch, descent: Descent
    ) -> Move | StepStatus:
        """A line search along Newton's direction, or that of a modified Hessian."""
        step = quadratic.modified()
        proposal = _proposal(trials, step)
        first = trials.trial(proposal, descent.lr)
        found = search_along(trials, rule, proposal, first)
        if found.status.accepted:
            move = self._corrected(trials, quadratic, step, proposal, found.trial, -inf, descent)
            return move._replace(search_status=found.status)
        if found.status is SearchStatus.NONFINITE:
            return StepStatus.NONFINITE_TRIALS
        return StepStatus.STALLED if trials.unresolved(proposal) else StepStatus.NO_DECREASE

    def _corrected(
        self,
        trials: Trials,
        quadratic: Quadratic,
        step: DenseStep,
        proposal: Proposal,
        trial: Trial,
        accept: float,
        descent: Descent,
    ) -> Move:
        """A trial, and further steps with the same Hessian while the loss falls.

        Each of them takes an evaluation and no factorization. Two bring Newton's method from second
        to fourth order; far from a minimum they lead back to the bottom of a curved valley. A trial
        that gained too little gets one correction, and is judged by what comes of it.

        Args:
            trials: Evaluates steps.
            quadratic: The model.
            step: What it gave.
            proposal: The same as a proposal.
            trial: The trial along it.
            accept: The gain ratio that a step needs.
            descent: The step.
        """
        move = Move(proposal, trial, trials.gain_ratio(proposal, trial))
        t, slope = trial.t, proposal.slope
        predicted = -t * slope - t * t * (-slope - proposal.decrease)
        for count in range(self.param_groups[0]["corrections"]):
            point: Point = move.trial.payload
            hopeless = count and not move.gain_ratio > accept
            if hopeless or not move.trial.finite or point.grad_norm <= descent.tolerance_grad:
                break
            assert point.grad is not None and trials.point.grad is not None
            if isinstance(quadratic, BoxedQuadratic):
                so_far = move.proposal.direction * move.trial.t
                more = quadratic.further(point.grad, so_far).mul_(descent.lr)
            else:
                more = step.next_from(point.grad).mul_(descent.lr)
            (length,) = descent.space.to_host(norms=(torch.linalg.vector_norm(more),))
            if not 0 < length < inf:
                break
            more.mul_(min(1.0, _REACH * t * step.length / length))
            whole = torch.add(more, move.proposal.direction, alpha=move.trial.t)
            fall, slope = descent.space.to_host(sums=(point.grad @ more, trials.point.grad @ whole))
            try:
                tried = trials.trial(Proposal(whole, slope, predicted, step.held), 1.0)
            except EvaluationsSpent:
                break
            if not _improves(move.trial, tried, fall, trials.allowance):
                break
            further = Proposal(whole, slope, predicted, step.held, proposal.curvature)
            ratio = move.gain_ratio
            if not ratio > accept:
                ratio = trials.gain_ratio(further, tried)
            move = Move(further, tried, ratio)
            self._report.corrections += ratio > accept
        return move

    def _take(self, descent: Descent, move: Move) -> None:
        """Moves the parameters."""
        take(descent, move)
        self._report.gain_ratio = move.gain_ratio

    def _forget(self, reason: str) -> None:
        super()._forget(reason)
        self._damping = self._radius = self._start = 0.0


@dataclass(slots=True)
class _Report:
    """Findings of the iterations of a step, see `NewtonInfo`."""

    hessians: int = 0
    corrections: int = 0
    gain_ratio: float = nan
    definiteness: Literal["", DefinitenessName] = ""
    smallest_eigenvalue: float | None = None
    hard_case: bool = False


def _proposal(trials: Trials, step: DenseStep) -> Proposal:
    return trials.propose(step.x, step.decrease, 0.0)._replace(held=step.held)


def _improves(before: Trial, after: Trial, fall: float, allowance: float) -> bool:
    """True if a correction lowers the loss, or the gradient where only rounding is left of it."""
    if not after.finite:
        return False
    if abs(after.loss - before.loss) <= allowance:
        smaller: bool = after.payload.length < before.payload.length
        return smaller
    return after.loss < before.loss - _SUFFICIENT * abs(fall)
