"""How a quadratic model becomes a step: damping, a trust radius, or a line search."""

from __future__ import annotations

from math import inf, isfinite

from torch_secondorder._optim.info import StepStatus
from torch_secondorder._optim.quadratic_model import Line, Memory, Model, Move
from torch_secondorder.globalization import (
    Armijo,
    LevenbergMarquardt,
    LineSearch,
    SearchResult,
    SearchStatus,
    Trial,
    TrustRegion,
    falls_without_end,
)
from torch_secondorder.solvers import SolveResult, SolveStatus

__all__ = ["damped", "searched", "within_radius"]

# Systems that are solved at one point before it is given up.
_ATTEMPTS = 12
# Along a damped direction: what Martens 2010 asks for, in fewer trials.
_BACKTRACKING = Armijo(c1=1e-2, max_evaluations=8)


def damped(model: Model, rule: LevenbergMarquardt, memory: Memory, lr: float) -> Move | StepStatus:
    """A step with Levenberg-Marquardt damping, as in Martens 2010.

    Of the iterates that the solver kept, the one with the lowest loss is taken, looking from the
    last one backwards. Where no part of it lowers the loss enough, the damping is raised and the
    same system solved again.
    """
    if not memory.damping:
        curvature, _ = model.along_gradient(0.0, metric=False)
        memory.damping = memory.start = rule.begun(curvature)
    start, first = memory.start, None
    for failures in range(1, _ATTEMPTS + 1):
        damping = memory.damping
        result = model.solve(damping, x0=memory.direction)
        indefinite = result.negative_curvature < 0
        if indefinite:
            # As much as makes the direction that was met one of positive curvature.
            lifted = max(rule.raised(damping, 1, start), damping - 2 * result.negative_curvature)
            memory.damping = min(lifted, rule.largest * start)
        if not 0 < result.decrease < float("inf"):
            memory.direction = None
            if result.status is SolveStatus.NEGATIVE_CURVATURE:
                memory.damping = max(memory.damping, rule.raised(damping, 2 + failures, start))
                del result
                continue
            return _hopeless(result)
        memory.direction = result.x
        line, first = _best_iterate(model, result, damping, lr)
        found = _search(model, _BACKTRACKING, line, first)
        ratio = model.gain_ratio(line, first)
        if found.status.accepted:
            after: float = found.trial.payload.length
            ratios = (ratio, after / model.point.length)
            if result.status is SolveStatus.NONFINITE:
                memory.damping = rule.raised(damping, 1, start)
            elif not indefinite:
                memory.damping = rule.updated(damping, *ratios, start, line.curvature)
            return Move(line, found.trial, ratio, found.status)
        memory.direction = None
        if model.unresolved(line):
            anew = rule.relative(model.along_gradient(0.0, metric=False)[0]) if line.held else inf
            if not anew < damping:
                return StepStatus.STALLED
            # Nothing is known against the model: the damping leaves no step that could show it.
            memory.damping = memory.start = start = anew
        else:
            raised = rule.raised(damping, 2 + failures, start)
            memory.damping = max(memory.damping, raised)
        del result, line  # and with them vectors, before there are others
    hopeful = first is None or first.finite
    return StepStatus.NO_DECREASE if hopeful else StepStatus.NONFINITE_TRIALS


def _best_iterate(
    model: Model, result: SolveResult, damping: float, lr: float
) -> tuple[Line, Trial]:
    """The solution or an earlier iterate, as long as the loss falls on the way back."""
    line = model.line(result.x, result.decrease, damping)
    trial = model.trial(line, lr)
    for iterate in reversed(result.iterates):
        earlier = model.line(iterate.x, iterate.decrease, damping)
        tried = model.trial(earlier, lr)
        if trial.finite and not tried.loss < trial.loss:
            break
        line, trial = earlier, tried
    return line, trial


def within_radius(model: Model, rule: TrustRegion, memory: Memory, lr: float) -> Move | StepStatus:
    """A step within the trust radius, by Steihaug's conjugate gradients."""
    if not memory.radius:
        _, length = model.along_gradient(memory.damping, metric=True)
        memory.radius = memory.start = rule.begun(length)
    trial = None
    for _ in range(2 * _ATTEMPTS):
        radius = memory.radius
        result = model.solve(memory.damping, radius=radius)
        if not 0 < result.decrease < float("inf"):
            return _hopeless(result)
        line = model.line(result.x, result.decrease, memory.damping)
        line = line._replace(held=result.length >= 0.99 * radius)
        trial = model.trial(line, lr)
        ratio = model.gain_ratio(line, trial)
        memory.radius = rule.updated(radius, ratio, result.length, memory.start)
        if not ratio > rule.accept and result.iterates:
            # What led to the radius was a direction of negative curvature, or of none but rounding;
            # the iterate before it has nothing to do with that.
            interior = result.iterates[-1]
            line = model.line(interior.x, interior.decrease, memory.damping)._replace(held=False)
            trial = model.trial(line, lr)
            ratio = model.gain_ratio(line, trial)
            if ratio > rule.accept:
                memory.radius = max(memory.radius, interior.length)
        if ratio > rule.accept:
            return Move(line, trial, ratio)
        if model.unresolved(line):
            return StepStatus.STALLED
        del result, line  # and with them vectors, before there are others
    assert trial is not None
    return StepStatus.NO_DECREASE if trial.finite else StepStatus.NONFINITE_TRIALS


def searched(model: Model, search: LineSearch, memory: Memory, lr: float) -> Move | StepStatus:
    """A step by a line search along the solution, or along a direction of negative curvature."""
    result = model.solve(memory.damping, x0=memory.direction)
    memory.direction = None
    if 0 < result.decrease < float("inf"):
        memory.direction = result.x
        line = model.line(result.x, result.decrease, memory.damping)
    elif result.negative_direction is not None:
        line = model.line(result.negative_direction, 0.0, 0.0)
        if line.slope > 0:
            line = Line(-line.direction, -line.slope, 0.0)
    else:
        return _hopeless(result)
    first = model.trial(line, lr)
    found = _search(model, search, line, first)
    if found.status.accepted:
        return Move(line, found.trial, model.gain_ratio(line, first), found.status)
    memory.direction = None
    if found.status is SearchStatus.NONFINITE:
        return StepStatus.NONFINITE_TRIALS
    return StepStatus.STALLED if model.unresolved(line) else StepStatus.NO_DECREASE


def _search(model: Model, search: LineSearch, line: Line, first: Trial) -> SearchResult:
    """Searches along a line whose first trial has been made already."""

    def phi(t: float) -> Trial:
        return first if t == first.t else model.trial(line, t)

    found = search(phi, model.start(line), first.t, precision=model.precision)
    model.tally.unbounded |= falls_without_end(line.slope, found)
    return found


def _hopeless(result: SolveResult) -> StepStatus:
    """What it means that a solver has no direction of descent."""
    if result.status is SolveStatus.NONFINITE or not isfinite(result.decrease):
        return StepStatus.NONFINITE_PRODUCTS
    return StepStatus.NO_DECREASE
