"""Runs of a `Constrained` optimizer until the conditions of Karush, Kuhn and Tucker hold."""

from __future__ import annotations

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
    violation_is_rounding,
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
_PENALTY = 10.0  # that of `Constrained`, for optimizers that iterate inside a step
_INFEASIBLE = 5
# The function counts as unbounded below this, relative to the start.
_BOTTOM = -1e20
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
        feasibility, least = settings.feasibility, max(_FEASIBILITY, _EPSILONS * problem.eps)
        self._feasibility = least if feasibility is None else feasibility
        self._nit = self._evaluations = self._certificates = self._products = 0
        self._start = [p.detach().clone() for p in problem.params]
        self._value_at_start: Tensor | None = None
        self._scale_at_start: float | None = None  # the largest entry of the gradient, up to one
        self._violation_at_start = constraints.violation_at_start
        self._recent: list[tuple[list[Tensor], Tensor]] = []
        #: The best ends of steps so far: how good, the conditions, and the point.
        self._best: tuple[tuple[float, float], Certificate, list[Tensor]] | None = None
        self._restarts = 0
        self._attempt(settings.constrained)

    def _attempt(self, arguments: dict[str, Any]) -> None:
        """Makes a new optimizer, for the parameters as they stand."""
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
        arguments = {"tolerance": 0.5 * self._feasibility, **arguments}
        self._optimizer = optimizer
        self._constrained = Constrained(optimizer, *functions, **arguments)
        # Augmented Lagrangians have their turn where sequential quadratic programs have failed.
        self._constrained._program.may_refuse = False
        self._inner: float | None = None  # the tolerance of the next subproblem
        self._raised = 0  # penalties, after the function has fallen without end
        self._without = 0  # steps without progress
        self._lowest = (inf, inf)  # the violation, and what violates the conditions
        self._last = inf  # the function after the last step

    # The loop.

    def run(self) -> OptimizeResult:
        """Minimizes, and makes the result."""
        while True:
            before = [p.detach().clone() for p in self._problem.params]
            info = self._step()
            if info.status is StepStatus.UNBOUNDED and self._raises_penalties(before):
                continue
            here = self._certificate()
            status = self._ending(info, here)
            if status is None and self._has_settled(before, here):
                status = StepStatus.CONVERGED_CHANGE
            if status is None and not self._progresses(here):
                status = self._next_attempt(here)
            if status is StepStatus.STALLED:
                here = self._best_end(here)
            if status is not None:
                return self._result(status, here, info)

    def _progresses(self, here: Certificate) -> bool:
        """True if steps have lessened the violation or the error in the conditions recently."""
        found = here.violation, self._error(here)
        rank = (here.violation if here.violation > self._feasibility else 0.0), found[1]
        if self._best is None or rank < self._best[0]:
            self._best = rank, here, [p.detach().clone() for p in self._problem.params]
        improved = any(now < 0.9 * then for now, then in zip(found, self._lowest, strict=True))
        self._without = 0 if improved else self._without + 1
        self._lowest = min(found[0], self._lowest[0]), min(found[1], self._lowest[1])
        self._last = here.value
        return self._without < (_PATIENCE if self._lagrangian else 1)

    def _next_attempt(self, here: Certificate) -> StepStatus | None:
        """Begins another attempt after one that has failed; the status if there is none left."""
        lost = here.violation > self._feasibility
        if lost and self._settings.feasibility is None and self._rounds(here):
            return StepStatus.CONVERGED_CHANGE
        if not self._lagrangian:
            # Sequential quadratic programs have failed.
            if lost:
                self._move(self._start)
            self._attempt_multipliers()
            return None
        # Perhaps the function has led to where the constraints cannot be satisfied.
        most = _MOST_RESTARTS if here.violation > self._violation_at_start else 1
        if lost and self._restarts < most:
            self._restarts += 1
            self._move(self._start)
            given = self._settings.constrained.get("penalty")
            penalty = _PENALTY if given is None else given
            self._attempt_multipliers(penalty=penalty * _FARTHER**self._restarts)
            return None
        return StepStatus.STALLED

    def _rounds(self, here: Certificate) -> bool:
        """True if the conditions hold but for rounding errors of the constraints."""
        conditions = self._error(replace(here, violation=0.0)) <= _CLOSE
        return conditions and violation_is_rounding(self._problem, self._constraints)

    def _attempt_multipliers(self, **more: Any) -> None:
        """Goes on from here with augmented Lagrangians."""
        method = {"method": "augmented_lagrangian"}
        self._attempt({**self._settings.constrained, **method, **more})

    def _raises_penalties(self, before: Sequence[Tensor]) -> bool:
        """Goes back and raises penalties, for they were too small; False if they were not.

        Args:
            before: Where the step began in which the function fell without end.
        """
        if not self._lagrangian or self._raised >= _MOST_RAISED:
            return False
        self._raised += 1
        pairs = zip(self._problem.params, before, strict=True)
        if not all(torch.equal(p.detach(), b) for p, b in pairs):  # else it has gone back itself
            self._move(before)
            raised = {name: 10.0 * rho for name, rho in self._constrained.penalties.items()}
            self._constrained.penalties = raised
        return True

    def _best_end(self, here: Certificate) -> Certificate:
        """The best end of a step, to which the parameters go."""
        assert self._best is not None
        _, best, leaves = self._best
        if best is not here:
            self._move(leaves)
        return best

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
        group["max_eval"] = max(most - self._evaluations - self._certificates, 1)
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
        if info.status is StepStatus.UNBOUNDED:
            return info.status
        settings = self._settings
        assert settings.max_iter is not None
        if self._nit >= settings.max_iter:
            return StepStatus.MAX_ITERATIONS
        done = self._evaluations + self._certificates
        if done * self._problem.cost >= (settings.max_eval or inf):
            return StepStatus.MAX_EVALUATIONS
        goes_on = (
            StepStatus.CONVERGED_GRADIENT,
            StepStatus.CONVERGED_CHANGE,
            StepStatus.STALLED,
            StepStatus.NO_DECREASE,
            StepStatus.INFEASIBLE,
        )
        return None if info.status in goes_on else info.status

    def _has_settled(self, before: Sequence[Tensor], here: Certificate) -> bool:
        """True if a step has changed nothing any more, close to where the conditions hold.

        Args:
            before: Where the step began.
            here: The conditions where it ended.
        """
        if here.violation > self._feasibility or self._error(here) > _CLOSE:
            return False
        ftol = self._settings.tolerance_change
        ftol = self._problem.ftol if ftol is None else ftol
        pairs = list(zip(before, self._problem.params, strict=True))
        moved = max((largest([b - p.detach()]) for b, p in pairs), default=0.0)
        size = largest(before)
        return moved <= ftol * size and abs(self._last - here.value) <= ftol * abs(here.value)

    # The conditions.

    def _gtol(self, scale: float) -> float:
        """The tolerance of the Lagrangian's gradient, beside the function's of size `scale`."""
        gtol = self._settings.tolerance_grad
        if gtol is not None:
            return gtol
        return self._problem.gtol * max(scale, self._scale_at_start or 0.0)

    def _holds(self, here: Certificate) -> bool:
        return self._error(here) <= 1.0

    def _error(self, here: Certificate) -> float:
        """The largest of what violates the conditions, over its tolerance."""
        gtol, given = self._gtol(here.scale), self._settings.tolerance_grad
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
        first = descent.point
        if self._scale_at_start is None:
            self._scale_at_start = min(1.0, self._scale(descent))
        descent.tolerance_grad = self._gtol(self._scale(descent))
        if self._lagrangian:
            inner = _TIGHTER * (first.grad_norm if self._inner is None else self._inner)
            self._inner = descent.tolerance_grad = max(inner, 0.5 * descent.tolerance_grad)
        bottom = _BOTTOM * max(1.0, abs(first.loss))

        def observed(descent: Descent) -> StepStatus | None:
            before = descent.count
            status = iterate(descent)
            if descent.count > before:
                if not self._lagrangian:
                    descent.tolerance_grad = self._gtol(self._scale(descent))
                if self._report is not None and self._stops(descent):
                    return StepStatus.STOPPED
                if descent.point.loss < bottom:
                    return StepStatus.UNBOUNDED
            return status

        return observed

    def _scale(self, descent: Descent) -> float:
        """The largest entry of the gradient, with sequential quadratic programs the function's."""
        grad = descent.point.grad
        if self._lagrangian or grad is None:
            return descent.point.grad_norm
        return largest([grad])

    def _stops(self, descent: Descent) -> bool:
        """Reports an iteration to the callback; says whether that ends the minimization."""
        leaves = self._leaves_at(descent)
        value = self._value_at(leaves)
        assert self._report is not None
        try:
            with torch.enable_grad():
                self._report(self._problem.tree(leaves), value)
        except StopIteration:
            return True
        return False

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
            elif here.violation > tol and number == 0:
                message += f"; {violated}, which is rounding error"
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
    pairs = zip(constraints.spread(here.y), here.values, strict=True)
    constr, v = list(here.values), [each.to(like) for each, like in pairs]
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
