"""The method of Levenberg and Marquardt, with the Jacobian of residuals from the closure."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from math import inf, isfinite, nan, sqrt
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_choice, check_integer, check_number
from torch_secondorder._foundation.types import ParamsT
from torch_secondorder._objective.base import Evaluation, EvaluationsSpent, Objective
from torch_secondorder._optim.flat import BoundedInfo, Descent, FlatOptimizer, Point
from torch_secondorder._optim.info import StepStatus
from torch_secondorder._optim.quadratic_model import (
    Move,
    Proposal,
    Tally,
    Trials,
    point_of,
    search_along,
    take,
)
from torch_secondorder._optim.residual_model import (
    ResidualModel,
    bend_along,
    gain_ratio_of,
    proposal_of,
)
from torch_secondorder._optim.residual_region import (
    Outlook,
    RadiusMemory,
    largest_cosine,
    resolved_globalization,
    within_radius,
)
from torch_secondorder._optim.residuals import check_batches, over_batches, residuals_at
from torch_secondorder._optim.state import Number, Vector, declare
from torch_secondorder._params.bounds import Bounds
from torch_secondorder.curvature.residual_jacobian import JacobianMethod
from torch_secondorder.globalization import (
    DampingName,
    DampingRule,
    LineSearch,
    LineSearchName,
    SearchStatus,
    TrustRegion,
    resolve_damping,
)
from torch_secondorder.solvers.damped_least_squares import (
    DampedLeastSquares,
    DampedStep,
    LeastSquaresSolverName,
    suited_solver,
)

__all__ = [
    "AccelerationName",
    "DampingName",
    "LevenbergMarquardt",
    "LevenbergMarquardtInfo",
    "ScalingName",
]

ScalingName: TypeAlias = Literal["auto", "identity", "marquardt", "more"]
AccelerationName: TypeAlias = Literal["auto", "geodesic"]

# Iterations without a new best loss or gradient after which only rounding error is left.
_PATIENCE = 5
# Most systems that are solved with one Jacobian.
_ATTEMPTS = 40
# Columns of J below so many roundings of the longest may be zeros but for rounding, as those of
# biases before a normalization or of the keys of attention.
_FLAT = 64
# The gain ratio from which a step is taken.
_ACCEPT = 1e-4
# The largest ratio of a geodesic correction to the step (Transtrum and Sethna 2012); and the change
# of the residuals by their bend, as a share of them, below which the next steps are not corrected.
_BEND, _STRAIGHT = 0.75, 0.1
# The smallest norm of residuals that a tolerance of the gradient shrinks with.
_SMALL = 1e-5
# A constant damping, as a share of the largest curvature along a coordinate at the first step; and
# that of steps which are taken as they are, as a share of the batch's mean eigenvalue.
_CONSTANT, _OF_MEAN = 1e-3, 1e-2


@dataclass(frozen=True, slots=True)
class LevenbergMarquardtInfo(BoundedInfo):
    """Report of one step of `LevenbergMarquardt`.

    Attributes:
        jacobians: Jacobians computed.
        rejected: Steps tried and not taken.
        gain_ratio: The decrease of the loss in the last move over the one that the linear residuals
            predicted; None if undefined.
        damping: The damping of the next system; 0 without any.
        trust_radius: The trust radius of the next step; 0 without one.
        corrections: Further steps taken with a Jacobian that had given one already.
        bend: Twice the length of the last geodesic correction as a share of the step's, in the
            metric; above 0.75 the correction was left out. None without one.
        solver: The last linear solver: `"primal"`, `"dual"` or `"cg"`; empty before the first one.
        factorization: Of the last system: `"cholesky"`, `"qr"`, `"eigen"` or `"none"`.
        solver_iterations: Iterations of conjugate gradients.
        rows: Residuals of the last Jacobian, those of all ranks.
        jacobian: The way to the last Jacobian, see `ResidualJacobian`.
        reason: The reason why no faster way to it was taken, such as autograd's name of an
            operation; empty if there is none.

    >>> from torch_secondorder import least_squares
    >>> least_squares(lambda x: x**2 - 4, torch.ones(1)).info.solver
    'primal'
    """

    jacobians: int = 0
    rejected: int = 0
    gain_ratio: float | None = None
    damping: float = 0.0
    trust_radius: float = 0.0
    corrections: int = 0
    bend: float | None = None
    solver: str = ""
    factorization: str = ""
    solver_iterations: int = 0
    rows: int = 0
    jacobian: str = ""
    reason: str = ""


_UNMARKED = """\
a term of the loss is in none of the residuals, and more than a penalty on single parameters: its \
gradient is in the steps, its curvature is not, and they may become short. If it is a sum of \
squares, mark its residuals as well:
    r = torch_secondorder.mark_outputs(residual(model, x))
    loss = loss + r.square().mean()"""


class LevenbergMarquardt(FlatOptimizer):
    """The method of Levenberg and Marquardt for losses that are sums of squared residuals.

    In each iteration the residuals `r` are linearized, and the step minimizes
    `|r + J s|^2 / 2 + damping * s'D s / 2`. The Jacobian `J` comes from the graph of the standard
    closure. Losses with a convex curvature by the model's outputs, such as cross-entropy, have
    residuals as well: a root of that curvature makes them, and the steps are those of the
    generalized Gauss-Newton method. Other terms of the loss add their gradient, and penalties on
    single parameters their curvature as well; a warning tells of those whose curvature is left out.

    Loss functions of torch show their residuals. If the closure squares residuals itself, mark
    them, those of each term: `r = mark_outputs(model(x) - y)`.

    For mini-batches, use
    `LevenbergMarquardt(params, 0.3, momentum=0.9, max_norm=0.5, globalization=None)`: these are
    steps of SPRING, with one evaluation each. Let a scheduler lower `lr`, as with Adam; good values
    of `max_norm` are about a tenth of the parameters' norm. A damping that adapts and line searches
    fit each batch at the expense of the others. With momentum, steps diverge from `lr` of about
    `4 * (1 - momentum)` on, even on linear problems.

    References: Levenberg 1944; Marquardt 1963; Moré 1978, "The Levenberg-Marquardt algorithm:
    implementation and theory"; Madsen, Nielsen and Tingleff 2004, "Methods for non-linear least
    squares problems"; Transtrum and Sethna 2012, arXiv 1201.5885; Goldshlager, Abrahamsen and Lin
    2024, arXiv 2401.10190.

    Args:
        params: Parameters or groups. A group may have its own `lr` and `weight_decay`.
        lr: The share of each step that is tried first. If groups differ, each group's part of the
            metric is scaled by its share of the largest.
        damping: `"nielsen"`, which is the default, `"marquardt"`, or a `DampingRule` for a damping
            that follows the gain ratio; a number is the first one, in the units of `J'J` by the
            scaling. With another globalization than `"damping"` the damping is constant: a number,
            by default a thousandth of the largest curvature along a coordinate at the first step.
            Without a globalization the default is a hundredth of the mean eigenvalue, of each
            batch.
        max_iter: Iterations per `step()`. More than one make sense on the full data only.
        solver: `"primal"` (a system of `n` equations, by QR or Cholesky), `"dual"` (one equation
            for each residual), `"cg"` (products alone), or `"auto"` by size and memory.
        scaling: `D`: `"identity"`; `"marquardt"` for the diagonal of `J'J`; `"more"` for its
            largest values so far, so that steps do not depend on the units of the parameters.
            `"auto"` is `"more"` with the primal solver and a damping that adapts or a trust region,
            and else `"identity"`, for which the dual solver needs no Jacobian. It holds back
            parameters that change the loss by rounding errors alone, which the others do not.
        acceleration: `"geodesic"` for steps that follow the bend of the residuals to second
            order, for one more evaluation each; None for none. `"auto"` does so where a damping
            decides about steps of the primal solver, unless the residuals hardly bend.
        momentum: The share of the last step that the next one is drawn to, in directions that the
            residuals say nothing about (SPRING); for mini-batches.
        max_norm: The longest move; a step that is longer, multiplied with `lr`, is shortened. It
            needs `globalization=None`, and such steps need it where residuals are far from linear.
        globalization: `"damping"`; `"trust_region"` or a `TrustRegion` for the best step within a
            radius, measured by the scaling and as long as the parameters at first, which is the
            method of MINPACK; the name of a line search, or a `LineSearch`; or None to take each
            step as it is, with one evaluation: for mini-batches.
        corrections: Most further steps with one Jacobian, where a trust region is used. Each takes
            an evaluation, and a Jacobian is saved in exchange.
        max_eval: Most evaluations of the closure per `step()`; unlimited by default.
        tolerance_grad: The step ends once no entry of the gradient is larger. By default `1e-7`,
            times the largest entry seen so far where that is below one, and times the norm of the
            residuals, down to `1e-5`, where that is: a product with small residuals is small.
        tolerance_change: The step ends once an iteration changes both the loss and the parameters
            by no more than this, relative to their size.
        weight_decay: Coefficient of `|theta|^2 / 2`, added to the loss.
        maximize: For compatibility: residuals can only be made small, True is refused.
        bounds: Lower and upper bounds `(low, high)` of the parameters, or None; see `LBFGS`. They
            need the primal solver.
        factor_dtype: `torch.float32` for Cholesky factors of float64 problems in float32, with
            iterative refinement to the digits of float64: for GPUs with slow float64.

    Raises:
        TypeError: A parameter is neither floating-point nor complex, or a strategy or a bound has a
            wrong type.
        ValueError: A hyperparameter is out of range, a name is unknown, arguments do not go
            together, or the parameters are sharded. In `step()`, a subclass of it if a matrix does
            not fit into memory.

    >>> from torch_secondorder import mark_outputs
    >>> x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
    >>> optimizer = LevenbergMarquardt([x], max_iter=50)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     r = mark_outputs(torch.stack((10 * (x[1] - x[0] ** 2), 1 - x[0])))
    ...     loss = r.square().sum()
    ...     loss.backward()
    ...     return loss
    >>> round(float(optimizer.step(closure)), 6)
    24.2
    >>> optimizer.info.status.name, [round(v, 6) for v in x.tolist()]
    ('CONVERGED_GRADIENT', [1.0, 1.0])
    >>> optimizer.info.solver, optimizer.info.rows
    ('primal', 2)
    """

    info: LevenbergMarquardtInfo | None
    _info_type = LevenbergMarquardtInfo
    _takes_bounds = True
    _takes_manifolds = True
    _recognized_by = "momentum"
    _state_fields = declare(
        damping=Number(0.0),
        radius=Number(0.0),
        start=Number(0.0),
        bend=Number(inf),
        largest=Vector(),
        direction=Vector(),
    )
    factor_dtype: torch.dtype | None = None
    _damping: float  # of the next system; 0 before the first one
    _radius: float  # of the next step; 0 before the first one
    _start: float  # the first damping or radius, which the rules' limits are relative to
    _bend: float  # what to expect of the next step, to skip corrections of straight ones
    _largest: Tensor | None  # the largest values of the diagonal of J'J so far
    _way: JacobianMethod | None = None  # to the Jacobian, once the fastest one has failed in a step
    _told: bool = False  # whether terms without residuals have been looked for
    _outlook: Outlook  # of the last step within a radius
    _direction: Tensor | None  # the last step, for the momentum
    _carried = ("globalization", "damping", "solver", "scaling", "acceleration", "factor_dtype")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        damping: DampingName | DampingRule | float | None = None,
        max_iter: int = 1,
        *,
        solver: LeastSquaresSolverName = "auto",
        scaling: ScalingName = "auto",
        acceleration: AccelerationName | None = "auto",
        momentum: float = 0.0,
        max_norm: float | None = None,
        globalization: (
            Literal["damping", "trust_region"] | TrustRegion | LineSearchName | LineSearch | None
        ) = "damping",
        corrections: int = 2,
        max_eval: int | None = None,
        tolerance_grad: float | None = None,
        tolerance_change: float = 1e-9,
        weight_decay: float = 0.0,
        maximize: bool = False,
        bounds: Bounds = None,
        factor_dtype: torch.dtype | None = None,
    ) -> None:
        if factor_dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"factor_dtype must be float32, float64 or None, got {factor_dtype!r}")
        self.factor_dtype = factor_dtype
        check_choice("solver", solver, LeastSquaresSolverName)
        check_choice("scaling", scaling, ScalingName)
        if acceleration is not None:
            check_choice("acceleration", acceleration, AccelerationName, "None")
        check_number("momentum", momentum, low=0.0, below=1.0)
        check_number("max_norm", max_norm, above=0.0, optional=True)
        if max_norm is not None and globalization is not None:
            raise ValueError(
                "max_norm limits steps that are taken as they are: give globalization=None, or "
                "leave max_norm out"
            )
        self.solver, self.scaling, self.acceleration = solver, scaling, acceleration
        check_integer("corrections", corrections, low=0, whole_floats=True)
        self.globalization = resolved_globalization(globalization)
        if isinstance(self.globalization, TrustRegion):
            self._check_within_radius(damping, momentum)
        self.damping = resolve_damping(damping, globalization == "damping")
        if acceleration == "geodesic" and globalization != "damping":
            raise ValueError(
                "geodesic acceleration needs a damping that a large bend can raise: leave "
                "globalization or acceleration out"
            )
        defaults = {
            "lr": lr,
            "max_iter": max_iter,
            "momentum": momentum,
            "max_norm": max_norm,
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
                "LevenbergMarquardt needs whole rows of the Jacobian in each process, and the "
                "parameters are sharded: use NewtonCG or LBFGS, which work on shards, or leave "
                "fully_shard out (DistributedDataParallel is fine)"
            )

    def _check_within_radius(self, damping: object, momentum: float) -> None:
        if damping is not None or momentum:
            raise ValueError(
                "a trust region has a radius in place of damping and momentum: leave them out, or "
                "leave globalization out"
            )
        if self.solver not in ("auto", "primal"):
            raise ValueError(
                f"a trust region needs solver='primal', got {self.solver!r}: leave solver or "
                "globalization out"
            )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group.get("maximize"):
            raise ValueError(
                "LevenbergMarquardt makes residuals small and cannot maximize a sum of their "
                "squares: leave maximize out, or use NewtonCG with curvature='hessian'"
            )
        check_number("momentum", group.get("momentum", 0.0), low=0.0, below=1.0)
        check_number("max_norm", group.get("max_norm"), above=0.0, optional=True)

    # The course of a step.

    def _evaluate(self, objective: Objective) -> tuple[Evaluation, Point]:
        most = self.param_groups[0]["max_eval"]
        objective.limit = inf if most is None else most
        if objective.box is not None:
            self._check_bounded()
        region = isinstance(self.globalization, TrustRegion)
        check_batches(objective, self.solver, self.acceleration, region)
        evaluation = objective.evaluate(curvature="jacobian")
        return evaluation, point_of(evaluation, objective)

    def _check_bounded(self) -> None:
        if self.solver not in ("auto", "primal"):
            raise ValueError(
                f"bounds need solver='primal', got {self.solver!r}: leave bounds or solver out"
            )
        if self.param_groups[0]["momentum"] or self.acceleration == "geodesic":
            raise ValueError(
                "bounds go with neither momentum nor acceleration, whose steps may leave them: "
                "leave one of them out"
            )

    def _begin(self, descent: Descent) -> None:
        descent.patience = _PATIENCE
        if descent.objective.box is not None:
            descent.lr = min(descent.lr, 1.0)  # a whole step ends in the box, a longer one may not
        self._tally, self._report = Tally(), _Report()
        self._tolerance = descent.tolerance_grad
        self._tighten(descent)
        self._way, self._reason, self._outlook = None, "", Outlook()

    def _tighten(self, descent: Descent) -> None:
        """Makes the default of the tolerance fit the residuals."""
        if self.param_groups[0]["tolerance_grad"] is None:
            size = sqrt(max(2.0 * descent.point.loss, 0.0))
            descent.tolerance_grad = self._tolerance * min(max(size, _SMALL), 1.0)

    def _iterate(self, descent: Descent) -> StepStatus | None:
        """One iteration: a Jacobian, and the steps tried with it."""
        try:
            system = self._system(descent)
            if system is None:
                return StepStatus.NONFINITE_PRODUCTS
            problem = self._problem(system, descent)
            if self.globalization is None and not isinstance(self.damping, DampingRule):
                return self._unsearched(problem, descent)
            trials = self._trials(descent)
            if isinstance(self.globalization, TrustRegion):
                found = self._within_radius(problem, trials, self.globalization, descent)
            elif isinstance(self.damping, DampingRule):
                found = self._damped(problem, trials, self.damping, descent)
            else:
                assert self.globalization is not None
                found = self._searched(problem, trials, self.globalization, descent)
        except EvaluationsSpent:
            return StepStatus.MAX_EVALUATIONS
        finally:
            self._report.solver_iterations = self._tally.solver_iterations
        if isinstance(found, Move):
            self._take(descent, found)
        if self._tally.unbounded:
            return StepStatus.UNBOUNDED
        return None if isinstance(found, Move) else found

    def _step(self, objective: Objective, lr: float) -> Tensor:
        loss = super()._step(objective, lr)
        if self._info.status is StepStatus.MOVED:  # nothing was evaluated where it ended
            self._info = replace(self._info, loss_after=None)
        return loss

    def _finish(self, objective: Objective, descent: Descent | None) -> dict[str, Any]:
        if descent is None:
            return {}
        report = self._report
        return {
            "jacobians": report.jacobians,
            "rejected": report.rejected,
            "gain_ratio": report.gain_ratio if isfinite(report.gain_ratio) else None,
            "damping": self._damping,
            "trust_radius": self._radius,
            "corrections": report.corrections,
            "bend": report.bend,
            "solver": report.solver,
            "factorization": report.factorization,
            "solver_iterations": report.solver_iterations,
            "rows": report.rows,
            "jacobian": report.jacobian,
            "reason": report.reason,
        }

    # The linearized residuals at a point.

    def _system(self, descent: Descent) -> DampedLeastSquares | None:
        """The linearized residuals at the current point; None if they are not finite."""
        objective, point = descent.objective, descent.point
        if point.evaluation is None:  # the trial has given loss and gradient, but no graph
            evaluation = objective.evaluate(curvature="jacobian")
            point = descent.point = point_of(evaluation, objective)
        assert point.evaluation is not None and point.grad is not None
        jacobian = residuals_at(objective, point.evaluation, self._way)
        if not self._told and jacobian.finite:
            self._told = True
            if not jacobian.rest_is_diagonal:
                warnings.warn(_UNMARKED, stacklevel=2)
        if jacobian.reason:  # it will not do at the next point either
            self._way, self._reason = jacobian.method, jacobian.reason
        solver = self.solver
        batches = over_batches(objective)
        if batches or objective.box is not None or isinstance(self.globalization, TrustRegion):
            solver = "primal"
        if solver == "auto":
            device = objective.vector.device
            solver = suited_solver(jacobian.rows, jacobian.size, objective.vector.dtype, device)
            if objective.ranks.any(solver == "cg", device):
                solver = "cg"  # memory may be short on one rank
        system = DampedLeastSquares.of(jacobian, point.grad, solver, self.factor_dtype)
        report = self._report
        report.jacobians += 1
        report.rows, report.solver = jacobian.rows, system.name
        report.jacobian, report.reason = jacobian.method, jacobian.reason or self._reason
        return system if jacobian.finite and system.finite else None

    def _problem(self, system: DampedLeastSquares, descent: Descent) -> ResidualModel:
        """The system with metric, center and bounds; makes the first damping."""
        metric: Tensor | None = None
        scaling, floor = self.scaling, 0.0
        if scaling == "auto":
            eps = descent.objective.vector.precision
            floor = min(_FLAT * eps, eps**0.75) ** 2
            adapts = isinstance(self.damping, DampingRule)
            adapts = adapts or isinstance(self.globalization, TrustRegion)
            scaling = "more" if adapts and system.name == "primal" else "identity"
        if scaling != "identity":
            metric = system.diagonal
            if scaling == "more" and self._largest is not None:
                metric = torch.maximum(metric, self._largest.to(metric))
            if scaling == "more":
                self._largest = metric
            # A parameter that no residual depends on may have any metric.
            largest = metric.amax()
            rest = torch.where(largest > 0, largest, 1.0)
            metric = torch.where(metric > floor * largest, metric, rest)
        if self.globalization is None and self.damping is None:  # the batches may differ
            self._damping = self._start = _OF_MEAN * (system.mean_curvature(metric) or 1.0)
        elif not self._damping and not isinstance(self.globalization, TrustRegion):
            curvature = system.diagonal if metric is None else system.diagonal / metric
            (size,) = descent.space.to_host(largest=(curvature,))
            rule = self.damping
            if isinstance(rule, DampingRule):
                first = rule.begun(size or 1.0)
            else:
                first = _CONSTANT * (size or 1.0) if rule is None else rule
            self._damping = self._start = first
        center = None
        momentum = self.param_groups[0]["momentum"]
        if momentum and self._direction is not None:
            center = momentum * self._direction
        box = descent.objective.box
        room = None if box is None else box.room(descent.objective.position)
        return ResidualModel(system, metric, center, room)

    def _trials(self, descent: Descent) -> Trials:
        """Evaluations of steps; they keep their graphs where the next iteration can use them."""
        objective = descent.objective
        keeps = descent.count + 1 < descent.max_iter and objective.has_room_for_a_graph()
        return Trials(descent, self._tally, "jacobian" if keeps else False, keeps_gradients=True)

    def _solved(self, problem: ResidualModel, descent: Descent) -> DampedStep | StepStatus:
        """The step with the present damping, one of descent."""
        step = problem.solve(self._damping)
        falls = step.slope < 0 and step.decrease > 0
        if problem.center is not None and isfinite(step.decrease) and not falls:
            problem = replace(problem, center=None)  # the momentum leads uphill
            step = problem.solve(self._damping)
        self._tally.solver_iterations += step.iterations
        self._report.factorization = problem.system.factorization
        if not (isfinite(step.decrease) and isfinite(step.length)):
            return StepStatus.NONFINITE_PRODUCTS
        return step if step.slope < 0 else StepStatus.NO_DECREASE

    # Three ways to a step.

    def _damped(
        self, problem: ResidualModel, trials: Trials, rule: DampingRule, descent: Descent
    ) -> Move | StepStatus:
        """A step with a damping that is raised until it lowers the loss."""
        first = self._damping
        for failures in range(1, _ATTEMPTS + 1):
            damping = self._damping
            step = self._solved(problem, descent)
            if isinstance(step, StepStatus):
                return step
            proposal = proposal_of(step)
            if self._accelerates(problem):
                proposal = self._accelerated(problem, step, descent)
            trial = trials.trial(proposal, descent.lr)
            ratio = gain_ratio_of(trials, proposal, trial)
            if ratio > _ACCEPT:
                after: float = trial.payload.length / trials.point.length
                self._damping = rule.updated(damping, ratio, after, self._start, proposal.curvature)
                return Move(proposal, trial, ratio)
            self._report.rejected += 1
            self._bend = inf
            if trials.unresolved(proposal_of(step)):
                self._damping = first
                return StepStatus.STALLED
            self._damping = rule.rejected(damping, failures, self._start)
            # A large damping leads to the center, which need not be a step of descent.
            problem = replace(problem, center=None)
        return StepStatus.NO_DECREASE if trial.finite else StepStatus.NONFINITE_TRIALS

    def _within_radius(
        self, problem: ResidualModel, trials: Trials, rule: TrustRegion, descent: Descent
    ) -> Move | StepStatus:
        """The best step within a radius, and corrections."""
        most = self.param_groups[0]["corrections"]
        memory = RadiusMemory(self._radius, self._start)
        system = problem.system
        cosine = largest_cosine(system.diagonal, system.jacobian.residuals, descent)
        try:
            return within_radius(
                problem.region(trials.point), trials, rule, memory, descent, int(most), cosine
            )
        finally:
            self._radius, self._start, self._outlook = memory.radius, memory.start, memory.outlook
            self._report.rejected += memory.rejected
            self._report.corrections += memory.corrections

    def _searched(
        self, problem: ResidualModel, trials: Trials, rule: LineSearch, descent: Descent
    ) -> Move | StepStatus:
        """A line search along the step."""
        step = self._solved(problem, descent)
        if isinstance(step, StepStatus):
            return step
        proposal = proposal_of(step)
        first = trials.trial(proposal, descent.lr)
        found = search_along(trials, rule, proposal, first)
        if found.status.accepted:
            return Move(proposal, found.trial, trials.gain_ratio(proposal, first), found.status)
        if found.status is SearchStatus.NONFINITE:
            return StepStatus.NONFINITE_TRIALS
        return StepStatus.STALLED if trials.unresolved(proposal) else StepStatus.NO_DECREASE

    def _unsearched(self, problem: ResidualModel, descent: Descent) -> StepStatus | None:
        """The step as it is; the loss after it is evaluated if there is another iteration."""
        step = problem.solve(self._damping)
        self._report.factorization = problem.system.factorization
        self._tally.solver_iterations += step.iterations
        if not (isfinite(step.decrease) and isfinite(step.length)):
            return StepStatus.NONFINITE_PRODUCTS
        lr, most = descent.lr, self.param_groups[0].get("max_norm")
        if most is not None and lr * step.length > most:
            lr = most / step.length
        if descent.count + 1 < descent.max_iter:
            proposal, trials = proposal_of(step), self._trials(descent)
            trial = trials.trial(proposal, lr)
            if not trial.finite:
                return StepStatus.NONFINITE_TRIALS
            self._take(descent, Move(proposal, trial, trials.gain_ratio(proposal, trial)))
            return None
        descent.objective.accept(step.x, lr)
        self._keep(step.x)
        descent.count += 1
        descent.step_length = lr
        return StepStatus.MOVED

    def _accelerates(self, problem: ResidualModel) -> bool:
        """True if the bend along the next step is to be looked at."""
        if self.acceleration != "auto":
            return self.acceleration is not None
        system = problem.system
        if problem.room is not None or system.name != "primal" or not system.has_rows:
            return False
        straight = self._bend < _STRAIGHT
        self._bend *= 2.0  # skipped a few times only
        return not straight

    def _accelerated(self, problem: ResidualModel, step: DampedStep, descent: Descent) -> Proposal:
        """The step with a geodesic correction; without it where it is too large."""
        system, metric = problem.system, problem.metric
        image = system.products_along(step.x)
        bend = bend_along(system.jacobian, step.x, image, descent)
        if bend is None:
            return proposal_of(step)
        half = system.accelerate(self._damping, metric, bend).mul_(0.5)
        scaled = (half, step.x) if metric is None else (metric * half, metric * step.x)
        residuals = system.jacobian.residuals
        size, length, of_bend, of_residuals = descent.space.to_host(
            sums=(scaled[0] @ half, scaled[1] @ step.x, bend @ bend, residuals @ residuals)
        )
        ratio = 2.0 * sqrt(size / length) if length else inf
        self._report.bend = ratio
        self._bend = 0.5 * sqrt(of_bend / of_residuals) if of_residuals else inf
        plain = proposal_of(step)
        # The linear residuals say nothing about the correction, which cancels their bend: what they
        # predict for the step is what both together are to achieve.
        return plain._replace(direction=step.x + half) if ratio <= _BEND else plain

    # The end of an iteration.

    def _keep(self, direction: Tensor) -> None:
        """Keeps a step for the momentum."""
        self._direction = direction if self.param_groups[0]["momentum"] else None

    def _take(self, descent: Descent, move: Move) -> None:
        """Moves the parameters."""
        take(descent, move)
        self._keep(move.proposal.direction)
        self._tighten(descent)
        self._report.gain_ratio = move.gain_ratio

    def _forget(self, reason: str) -> None:
        super()._forget(reason)
        self._bend = inf
        self._damping = self._radius = self._start = 0.0


@dataclass(slots=True)
class _Report:
    """Findings of the iterations of a step, see `LevenbergMarquardtInfo`."""

    jacobians: int = 0
    rejected: int = 0
    gain_ratio: float = nan
    corrections: int = 0
    bend: float | None = None
    solver: str = ""
    factorization: str = ""
    solver_iterations: int = 0
    rows: int = 0
    jacobian: str = ""
    reason: str = ""
