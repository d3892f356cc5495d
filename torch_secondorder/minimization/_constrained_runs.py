"""Runs of a `Constrained` optimizer until the conditions of Karush, Kuhn and Tucker hold."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._objective.functional import FunctionalObjective
from torch_secondorder._optim.flat import BoundedInfo, Descent, FlatOptimizer, Iterate
from torch_secondorder._optim.info import StepInfo, StepStatus
from torch_secondorder.minimization._certificate import (
    Certificate,
    certificate,
    largest,
    violation_is_stationary,
)
from torch_secondorder.minimization._constraints import ConstraintSet, Given
from torch_secondorder.minimization._methods import Method, Settings
from torch_secondorder.minimization._runs import Problem, descend, report_to
from torch_secondorder.minimization.result import ENDINGS, OptimizeResult
from torch_secondorder.optim.constrained import Constrained

# The default of `feasibility_tol`, in float64 and as a multiple of the machine epsilon.
_FEASIBILITY, _EPSILONS = 1e-8, 100.0
# The tolerance of a subproblem's gradient falls by this factor from one step to the next.
_TIGHTER = 0.1
# Steps without a violation that is smaller by a tenth, after which the constraints are given up.
_PATIENCE = 6
# Steps with larger penalties after the function has fallen without end.
_MOST_RAISED = 8
# Fresh starts with penalties that are larger by this factor, after the constraints were lost.
_MOST_RESTARTS, _FARTHER = 2, 100.0
_PENALTY = inspect.signature(Constrained).parameters["penalty"].default
_INFEASIBLE = 5
# The conditions may be off by this multiple of their tolerances where nothing changes any more.
_CLOSE = 100.0


def descend_within(
    problem: Problem,
    given: Sequence[Given],
    method: Method,
    settings: Settings,
    callback: Callable[..., Any] | None,
) -> OptimizeResult:
    """Minimizes under constraints.

    Args:
        problem: The minimization.
        given: The constraints.
        method: The method.
        settings: The options; `max_iter` is set.
        callback: See `minimize`.
    """
    projected = _project(problem)
    tree = problem.tree([p.detach() for p in problem.params])
    constraints = ConstraintSet(given, tree, problem.limits)
    problem.gtol = max([problem.gtol, *map(problem.default_gtol, constraints.schemes)])
    if constraints.n_equalities + constraints.n_inequalities:
        result = _ConstrainedRun(problem, constraints, method, settings, callback).run()
    else:
        result = descend(problem, method, settings, callback, compile=False)
        here = certificate(problem, constraints, None)
        result.nfev += 1
        result.njev += 1
        result.update(constrained_fields(problem, constraints, here))
    if isinstance(result.info, BoundedInfo):
        result.info = replace(result.info, start_projected=projected)
    return result


class _ConstrainedRun:
    """See `descend_within`."""

    def __init__(
        self,
        problem: Problem,
        constraints: ConstraintSet,
        method: Method,
        settings: Settings,
        callback: Callable[..., Any] | None,
    ) -> None:
        self._problem, self._constraints, self._settings = problem, constraints, settings
        self._method = method
        self._report = None if callback is None else report_to(callback)
        self._constrained, self._optimizer = self._make(settings.constrained)
        self._nit = self._evaluations = self._certificates = self._products = 0
        self._start = [p.detach().clone() for p in problem.params]
        self._value_at_start: Tensor | None = None
        self._violation_at_start = constraints.violation_at_start
        self._inner: float | None = None  # the tolerance of the next subproblem
        self._recent: list[tuple[list[Tensor], Tensor]] = []
        feasibility, least = settings.feasibility, max(_FEASIBILITY, _EPSILONS * problem.eps)
        self._feasibility = least if feasibility is None else feasibility

    def _make(self, arguments: dict[str, Any]) -> tuple[Constrained, FlatOptimizer]:
        """The optimizer, and the one inside."""
        problem, constraints, settings = self._problem, self._constraints, self._settings
        change = settings.tolerance_change
        numbers = {"tolerance_change": problem.ftol if change is None else change}
        optimizer = self._method.make(problem.groups(), numbers, settings.arguments)
        assert isinstance(optimizer, FlatOptimizer)
        optimizer.param_groups[0].update(numbers)
        optimizer._observe = self._observe
        functions = (
            {"equalities": constraints.equalities} if constraints.n_equalities else None,
            {"inequalities": constraints.inequalities} if constraints.n_inequalities else None,
        )
        return Constrained(optimizer, *functions, **arguments), optimizer

    # The loop.

    def run(self) -> OptimizeResult:
        """Minimizes, and makes the result."""
        best, last, without, raised, restarts = (inf, inf), inf, 0, 0, 0
        while True:
            before = [p.detach().clone() for p in self._problem.params]
            info = self._step()
            if info.status is StepStatus.UNBOUNDED and raised < _MOST_RAISED and self._lagrangian:
                # The penalties were too small; if they are not, the function falls without end.
                raised += 1
                self._move(before)
                penalties = self._constrained._penalties
                assert penalties is not None
                self._constrained._penalties = 10.0 * penalties
                continue
            here = self._certificate()
            status = self._ending(info, here)
            if status is None and self._has_settled(before, last, here):
                status = StepStatus.CONVERGED_CHANGE
            last = here.value
            found = here.violation, self._error(here)
            improved = any(now < 0.9 * then for now, then in zip(found, best, strict=True))
            without = 0 if improved else without + 1
            best = min(found[0], best[0]), min(found[1], best[1])
            if status is None and without >= (_PATIENCE if self._lagrangian else 1):
                if not self._lagrangian:  # sequential quadratic programs have failed
                    self._go_on_by_multipliers()
                    best, without = (inf, inf), 0
                    continue
                status = StepStatus.STALLED
                if here.violation > max(self._violation_at_start, self._feasibility):
                    # The function has led to where constraints cannot be satisfied.
                    restarts += 1
                    if restarts <= _MOST_RESTARTS:
                        self._begin_again(_FARTHER**restarts)
                        best, without = (inf, inf), 0
                        continue
            if status is not None:
                return self._result(status, here, info)

    def _begin_again(self, factor: float) -> None:
        """Begins again at the start, with larger penalties."""
        self._move(self._start)
        penalty = self._settings.constrained.get("penalty", _PENALTY)
        self._go_on_by_multipliers(penalty=factor * penalty)

    def _go_on_by_multipliers(self, **more: Any) -> None:
        """Goes on from here with new augmented Lagrangians."""
        arguments = {**self._settings.constrained, "method": "augmented_lagrangian", **more}
        self._inner = None
        self._constrained, self._optimizer = self._make(arguments)

    @property
    def _lagrangian(self) -> bool:
        """True if steps minimize an augmented Lagrangian."""
        return self._constrained.method != "sqp"

    def _step(self) -> StepInfo:
        """A step of the optimizer, within what is left of iterations and evaluations."""
        settings, group = self._settings, self._optimizer.param_groups[0]
        assert settings.max_iter is not None
        group["max_iter"] = max(settings.max_iter - self._nit, 1)
        most = (settings.max_eval or sys.maxsize) // self._problem.cost
        group["max_eval"] = max(most - self._evaluations, 1)
        self._constrained.step(FunctionalObjective(self._recorded, self._problem.tree()))
        info = self._optimizer.info
        assert isinstance(info, StepInfo)
        self._nit += info.iterations
        self._evaluations += info.evaluations
        details = info.as_dict()
        self._products += details.get("hessians", details.get("products", 0))
        return info

    def _ending(self, info: StepInfo, here: Certificate) -> StepStatus | None:
        """The reason to end after a step; None to make another one."""
        at_start = info.status is StepStatus.NONFINITE_START and not self._nit
        if at_start or info.status is StepStatus.STOPPED:
            return info.status
        if not here.finite:
            return StepStatus.NONFINITE_TRIALS
        if self._holds(here):
            return StepStatus.CONVERGED_GRADIENT
        settings = self._settings
        assert settings.max_iter is not None
        if self._nit >= settings.max_iter:
            return StepStatus.MAX_ITERATIONS
        if self._evaluations * self._problem.cost >= (settings.max_eval or inf):
            return StepStatus.MAX_EVALUATIONS
        goes_on = (
            StepStatus.CONVERGED_GRADIENT,
            StepStatus.CONVERGED_CHANGE,
            StepStatus.STALLED,
            StepStatus.NO_DECREASE,
        )
        return None if info.status in goes_on else info.status

    def _has_settled(self, before: Sequence[Tensor], value: float, here: Certificate) -> bool:
        """True if a step has changed nothing any more, close to where the conditions hold.

        Args:
            before: Where the step began.
            value: The function there.
            here: The conditions where it ended.
        """
        if here.violation > self._feasibility or self._error(here) > _CLOSE:
            return False
        ftol = self._settings.tolerance_change
        ftol = self._problem.ftol if ftol is None else ftol
        pairs = list(zip(before, self._problem.params, strict=True))
        moved = max((largest([b - p.detach()]) for b, p in pairs), default=0.0)
        size = largest(before)
        return moved <= ftol * size and abs(value - here.value) <= ftol * abs(here.value)

    # The conditions.

    def _gtol(self, here: Certificate) -> float:
        gtol = self._settings.tolerance_grad
        return self._problem.gtol * max(1.0, here.scale) if gtol is None else gtol

    def _holds(self, here: Certificate) -> bool:
        return self._error(here) <= 1.0

    def _error(self, here: Certificate) -> float:
        """The largest of what violates the conditions, over its tolerance."""
        gtol, given = self._gtol(here), self._settings.tolerance_grad
        least = self._problem.gtol if given is None else given
        pairs = (
            (here.violation, self._feasibility),
            (here.optimality, gtol),
            (here.complementarity, least * max(1.0, abs(here.value))),
        )
        return max(inf if e != e else e / t if t else inf if e else 0.0 for e, t in pairs)

    def _certificate(self) -> Certificate:
        """The conditions where the parameters stand, by one evaluation."""
        self._certificates += 1
        return certificate(self._problem, self._constraints, self._constrained._program.multipliers)

    # Points.

    def _move(self, leaves: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for p, leaf in zip(self._problem.params, leaves, strict=True):
                p.copy_(leaf)

    def _recorded(self, tree: Any) -> Tensor:
        """The function, which keeps the values since the last iteration for the callback."""
        value = self._problem.function(tree)
        if self._value_at_start is None:
            self._value_at_start = value.detach()
        if self._report is not None:
            leaves = self._problem.leaves(tree)
            self._recent.append(([leaf.detach().clone() for leaf in leaves], value.detach()))
        return value

    def _observe(self, descent: Descent, iterate: Iterate) -> Iterate:
        """See `FlatOptimizer._observe`."""
        largest = descent.point.grad_norm
        gtol = self._settings.tolerance_grad
        least = self._problem.gtol * max(1.0, largest) if gtol is None else gtol
        if self._lagrangian:
            inner = _TIGHTER * (max(largest, 1e-3) if self._inner is None else self._inner)
            self._inner = max(inner, 0.5 * least)
        descent.tolerance_grad = self._inner or least
        if self._report is None:
            return iterate
        report = self._report

        def reported(descent: Descent) -> StepStatus | None:
            before = descent.count
            status = iterate(descent)
            if descent.count > before:
                leaves = self._leaves_at(descent)
                value = self._value_at(leaves)
                try:
                    with torch.enable_grad():
                        report(self._problem.tree(leaves), value)
                except StopIteration:
                    return StepStatus.STOPPED
            return status

        return reported

    def _leaves_at(self, descent: Descent) -> list[Tensor]:
        objective = descent.objective
        pieces = iter(objective.vector.split(objective.position.clone()))
        return [next(pieces) if p.numel() else p.detach() for p in self._problem.params]

    def _value_at(self, leaves: Sequence[Tensor]) -> float:
        """The function at an iterate, which was evaluated there."""
        for recent, value in reversed(self._recent):
            if all(torch.equal(a, b) for a, b in zip(recent, leaves, strict=True)):
                self._recent = [(recent, value)]
                return value.item()
        self._certificates += 1
        with torch.enable_grad():
            return self._problem.function(self._problem.tree(leaves)).item()

    # The result.

    def _result(
        self,
        status: StepStatus,
        here: Certificate,
        info: StepInfo,
    ) -> OptimizeResult:
        """The result."""
        problem, constraints = self._problem, self._constraints
        info = replace(info, iterations=self._nit, evaluations=self._evaluations)
        leaves = [p.detach() for p in problem.params]
        done = (self._nit, self._evaluations + self._certificates, self._products)
        result = problem.result(status, leaves, here.value, here.gradients, done, info)
        result.update(self._ended(status, here))
        result.update(constrained_fields(problem, constraints, here))
        return result

    def _ended(self, status: StepStatus, here: Certificate) -> dict[str, Any]:
        """The fields that say how it ended."""
        assert self._value_at_start is not None
        value, violation = self._value_at_start.item(), self._violation_at_start
        tol = self._feasibility
        name = here.most_violated
        violated = f"{name} is violated by {here.violation:.3g}"
        if status is StepStatus.STALLED and here.violation > tol:
            number, message = _INFEASIBLE, f"the constraints could not be satisfied: {violated}"
            message += self._why_infeasible(here)
        elif status is StepStatus.CONVERGED_GRADIENT:
            number = 0
            message = (
                "the constraints hold to feasibility_tol, and no entry of the (projected) gradient "
                "of the Lagrangian is larger than gtol"
            )
        else:
            number, message = ENDINGS.get(status, (2, status.value))
            if number == 0 or status is StepStatus.STALLED:
                message += f"; the gradient of the Lagrangian is {here.optimality:.3g} at most"
            if status is StepStatus.NONFINITE_START and isfinite(here.value):
                message = f"{name} or its gradient is not finite at x0"
            elif here.violation > tol:
                message += f"; {violated}"
                if here.violation > max(violation, tol):
                    message += f", more than any was at x0 ({violation:.3g})"
        if violation <= tol and here.violation <= tol and here.value > value:
            message += "; fun is higher than at x0, which satisfied the constraints as well"
        return {"success": number == 0, "status": number, "message": message}

    def _why_infeasible(self, here: Certificate) -> str:
        """A clause on the multipliers, and whether the violation is as small as it gets nearby."""
        if violation_is_stationary(self._problem, self._constraints):
            return (
                ", and no small move away from x lowers the violations together: if the "
                "constraints can be satisfied at all, then far from here, from another x0"
            )
        y = here.y.abs().max().item()
        return (
            f", and the violation falls no more while multipliers grow to {y:.3g}: constraints may "
            "depend on each other at x, or be badly scaled"
        )


def constrained_fields(
    problem: Problem, constraints: ConstraintSet, here: Certificate
) -> dict[str, Any]:
    """The fields of a result that there are with constraints, by SciPy's names where it has them.

    Args:
        problem: The minimization.
        constraints: The constraints.
        here: The conditions at the end.
    """
    constr, v = list(here.values), constraints.spread(here.y)
    fields = {
        "constr_violation": here.violation,
        "multipliers": dict(zip(constraints.names, v, strict=True)),
        "optimality": here.optimality,
        "complementarity": here.complementarity,
        "lagrangian_grad": problem.tree(here.lagrangian),
        "constr_nfev": constraints.nfev,
        "constr_njev": constraints.njev,
    }
    if here.bounds_v is not None:
        constr = [*constr, problem.tree([p.detach() for p in problem.params])]
        v = [*v, problem.tree(here.bounds_v)]
    return {"constr": constr, "v": v, **fields}


def _project(problem: Problem) -> bool:
    """Moves the parameters to the nearest point within the bounds; says whether they moved."""
    moved = False
    for p, (low, high) in zip(problem.params, problem.limits or (), strict=False):
        inside = p.detach()
        inside = inside if low is None else inside.clamp(min=low)
        inside = inside if high is None else inside.clamp(max=high)
        if not torch.equal(inside, p):
            moved = True
            with torch.no_grad():
                p.copy_(inside)
    return moved
