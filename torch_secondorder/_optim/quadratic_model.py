"""The quadratic model of the loss at a point, and the three ways to turn it into a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf, isfinite, nan, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_secondorder._objective.base import Curvature, Evaluation, Objective
from torch_secondorder._optim.flat import Descent, Point
from torch_secondorder._optim.info import StepStatus
from torch_secondorder.curvature import Damped, Diagonal, FiniteDifference, LinearOperator
from torch_secondorder.curvature._masked import Masked
from torch_secondorder.globalization import (
    Armijo,
    DampingRule,
    LineSearch,
    SearchResult,
    SearchStatus,
    Trial,
    TrustRegion,
    falls_without_end,
)
from torch_secondorder.globalization.line_search import ROUNDING
from torch_secondorder.solvers import CG, Iterate, SolveResult, SolveStatus
from torch_secondorder.solvers._units import Rescaled, unit_of

# Most systems that are solved at one point.
_ATTEMPTS = 12
# The line search along a damped direction: that of Martens 2010, with fewer trials.
_BACKTRACKING = Armijo(c1=1e-2, max_evaluations=8)


def point_of(evaluation: Evaluation, objective: Objective) -> Point:
    """The point of an evaluation with its graph, where the objective stands; one synchronization.

    With bounds, the norms of the gradient are those of the projected gradient.
    """
    grad, space = evaluation.grad, objective.vector.space
    measured = grad if objective.box is None else objective.box.projected(objective.position, grad)
    norms = torch.linalg.vector_norm(measured), torch.linalg.vector_norm(objective.position)
    grad_norm, length, size, loss = space.to_host(
        largest=(measured,), norms=norms, whole=(evaluation.loss,)
    )
    length = space.true_norm(measured, grad_norm, length)
    return Point(loss, grad_norm, grad, evaluation, length, size=size)


@dataclass(slots=True)
class Memory:
    """Numbers and vectors that NewtonCG keeps from one step to the next.

    Attributes:
        damping: The damping of the next system; 0 before the first one.
        radius: The trust radius of the next model; 0 before the first one.
        direction: The last solution, where the next solver begins.
        length: The norm of the gradient at the start of the last iteration.
        start: The damping or radius that the rule began with.
        sizes: The largest absolute values of the parameters so far; None unless products are
            finite differences.
        rule: The globalization that the damping or radius belongs to.
    """

    damping: float
    radius: float
    direction: Tensor | None = None
    length: float = inf
    start: float = 0.0
    sizes: Tensor | None = None
    rule: object = None

    def begin_anew(self, fresh: Memory) -> None:
        """Takes damping and radius from another memory, and drops the last solution."""
        self.damping, self.radius, self.start = fresh.damping, fresh.radius, fresh.start
        self.rule, self.direction = fresh.rule, None

    def noted_sizes(self, position: Tensor) -> Tensor:
        """The sizes, with those at another position taken into account."""
        now = position.abs()
        if self.sizes is not None and self.sizes.shape == now.shape:
            torch.maximum(now, self.sizes.to(now), out=now)
        self.sizes = now
        return now


@dataclass(slots=True)
class Tally:
    """Counts and findings of a step."""

    products: int = 0
    solver_iterations: int = 0
    solver_status: SolveStatus | None = None
    negative_curvature: float = 0.0
    unbounded: bool = False  # the loss falls without end
    repair: str = ""


class Proposal(NamedTuple):
    """A direction `d`, and the model along it.

    Attributes:
        direction: `d`.
        slope: `g'd`.
        decrease: The decrease that the undamped model predicts for all of `d`.
        held: Whether the damping or the radius keeps `d` short.
        curvature: `d'A d / d'd`.
    """

    direction: Tensor
    slope: float
    decrease: float
    held: bool = False
    curvature: float = inf


class Move(NamedTuple):
    """A step to take.

    Attributes:
        proposal: The direction.
        trial: The accepted trial along it; its payload is a `Point`.
        gain_ratio: The decrease at the first trial over the one that the model predicted.
        search_status: The outcome of the line search, if there was one.
    """

    proposal: Proposal
    trial: Trial
    gain_ratio: float
    search_status: SearchStatus | None = None


class Trials:
    """Proposals for a step from a point, and evaluations of them.

    Inner products with the gradient are made in a unit of about its size (see `unit_of`), so that
    they stay in the range of float32 whatever unit the loss has. Arguments and results are in the
    unit of the loss.

    Args:
        descent: The step; proposals begin at its current point.
        tally: The counts of the step.
        keeps_graphs: Whether trials keep their graph, and which, see `Objective.evaluate`. Keeping
            it costs much less than another evaluation.
        keeps_gradients: Whether trials without a graph keep their gradient.

    Attributes:
        allowance: Changes of the loss up to this are rounding errors.
        space: Makes inner products.
        longest: The longest step along a proposal.
    """

    def __init__(
        self,
        descent: Descent,
        tally: Tally,
        keeps_graphs: Curvature = False,
        keeps_gradients: bool = False,
    ) -> None:
        point, objective = descent.point, descent.objective
        assert point.grad is not None
        self._keeps_graphs, self._keeps_gradients = keeps_graphs, keeps_gradients
        self.point = point
        self.tally = tally
        self.precision = objective.noise
        self._descent = descent
        self._objective = objective
        self.space = descent.space
        self._unit = unit = unit_of(point.length, point.grad.dtype)
        self._grad = point.grad if unit == 1.0 else point.grad / unit
        self.allowance = ROUNDING * self.precision * abs(point.loss)
        # Proposals end in the box, if there is one.
        self.longest = inf if objective.box is None else 1.0

    def propose(self, direction: Tensor, decrease: float, damping: float) -> Proposal:
        """A proposal along a solution of the damped system, whose quadratic fell by `decrease`."""
        slope, square = self.space.to_host(sums=(self._grad @ direction, direction @ direction))
        slope, lifted = slope * self._unit, damping * square
        decrease += 0.5 * lifted
        curvature = -2.0 * (slope + decrease) / square if square else inf
        held = lifted > -0.5 * slope  # more than half of the curvature along it is damping
        return Proposal(direction, slope, decrease, held, curvature)

    def trial(self, proposal: Proposal, t: float) -> Trial:
        """Evaluates `t` along a proposal; the payload is a `Point`."""
        evaluation = self._objective.trial(proposal.direction, t, curvature=self._keeps_graphs)
        grad, unit = evaluation.grad, self._unit
        scaled, measured, box = grad if unit == 1.0 else grad / unit, grad, self._objective.box
        if box is not None:
            there = box.moved(self._objective.position, proposal.direction, t)
            measured = box.projected(there, grad)
        slope, grad_norm, length, loss = self.space.to_host(
            sums=(scaled @ proposal.direction,),
            largest=(measured,),
            norms=(torch.linalg.vector_norm(measured),),
            whole=(evaluation.loss,),
        )
        length = self.space.true_norm(measured, grad_norm, length)
        # The gradient is a vector: without a graph it is not kept, and computed anew if needed.
        kept = evaluation.linearization is not None
        point = Point(
            loss,
            grad_norm,
            grad if kept or self._keeps_gradients else None,
            evaluation if kept else None,
            length,
            evaluation.ambient if kept or self._keeps_gradients else None,
        )
        if not (isfinite(loss) and isfinite(grad_norm) and isfinite(length)):
            self._descent.nonfinite_trials += 1
            self.tally.unbounded |= loss == -inf
        return Trial(t, loss, slope * unit if isfinite(length) else inf, point)

    def gain_ratio(self, proposal: Proposal, trial: Trial) -> float:
        """The decrease at a trial over the one that the model predicted; NaN if undefined."""
        if not (isfinite(trial.loss) and isfinite(trial.slope)):
            return nan
        gained = self.point.loss - trial.loss
        if abs(gained) <= self.allowance:
            # The difference is rounding error: the slopes at both ends say more (trapezoidal rule).
            gained = -0.5 * trial.t * (proposal.slope + trial.slope)
        # The model's decrease along the direction: -t g'd - t^2 d'A d / 2.
        t, slope = trial.t, proposal.slope
        predicted = -t * slope - t * t * (-slope - proposal.decrease)
        return gained / predicted if predicted > 0 else nan

    def unresolved(self, proposal: Proposal) -> bool:
        """True if the predicted decrease is below the rounding error of the loss."""
        return proposal.decrease <= self.allowance


class Model(Trials):
    """The quadratic model of the objective at a point, and trials of its proposals.

    Systems are solved in a unit of about the gradient's size (see `unit_of`), so that inner
    products stay in the range of float32 whatever unit the loss has. Arguments and results are in
    the unit of the loss.

    Args:
        descent: The step; the model is of its objective at its current point.
        operator: The curvature there.
        solve: Solves a system with it, see `LinearSolver`.
        inverse: Gives a preconditioner for a damping; None for none.
        tally: The counts of the step.
        keeps_graphs: Whether trials keep their graph, for the next model. Keeping it costs much
            less than another evaluation.
    """

    def __init__(
        self,
        descent: Descent,
        operator: LinearOperator,
        solve: Callable[..., SolveResult],
        inverse: Callable[[float], LinearOperator] | None,
        tally: Tally,
        keeps_graphs: bool = False,
    ) -> None:
        super().__init__(descent, tally, keeps_graphs)
        unit = self._unit
        self._operator = operator if unit == 1.0 else Rescaled(operator, unit)
        self._first: Tensor | None = None  # A P g with the last preconditioner P
        self._repaired = False
        self._kept: Tensor | None = None  # coordinates with a curvature, if not all have one
        self._solve = solve
        self._inverse = inverse

    def solve(
        self, damping: float, *, x0: Tensor | None = None, radius: float | None = None
    ) -> SolveResult:
        """Solves `(A + damping I) x = -g`.

        Args:
            damping: Of at least zero.
            x0: The start, which is used up; zero by default.
            radius: The trust radius; none by default.
        """
        unit, operator = self._unit, self._operator
        if damping:
            operator = Damped(operator, damping / unit)
        inverse, stretch = None, 1.0
        if self._inverse is not None:
            inverse, stretch = self._preconditioner(damping)
        # For the gradient itself, and then negated in place: a vector less.
        more: dict[str, Any] = {}
        if x0 is not None:
            more["x0"] = x0.neg_()
        elif self._first is not None and isinstance(self._solve, CG):
            more["first_product"] = self._first
        if radius is not None:
            more["radius"] = radius * stretch
        self._first = None
        result = self._solve(operator, self._grad, preconditioner=inverse, **more)
        iterates = []
        for x, decrease, length in result.iterates:
            iterates.append(Iterate(x.neg_(), decrease * unit, length / stretch))
        result = replace(
            result,
            x=result.x.neg_(),
            decrease=result.decrease * unit,
            length=result.length / stretch,
            negative_curvature=result.negative_curvature * unit,
            iterates=tuple(iterates),
        )
        tally = self.tally
        tally.products += result.products
        tally.solver_iterations += result.iterations
        tally.solver_status = result.status
        if result.negative_curvature < 0.0:
            # Of the operator itself: the damping has lifted what the solver saw.
            curvature = result.negative_curvature - damping
            tally.negative_curvature = min(tally.negative_curvature, curvature)
        if result.status is SolveStatus.NONFINITE and not result.iterations and self._repair():
            del result, operator, inverse, iterates
            more.clear()
            return self.solve(damping, radius=radius)
        return result

    def _repair(self) -> bool:
        """Replaces curvature that is not finite, see `repaired`; returns True if that helped."""
        if self._repaired:
            return False
        self._repaired = True
        repair = repaired(self._operator, self._objective, self._grad, self._unit)
        self._operator, self._kept = repair.operator, repair.kept
        self.tally.products += repair.products
        report = repair.report
        if not report and self._inverse is not None:
            self._inverse = None
            report = "a product of the preconditioner was not finite, it was left out"
        self.tally.repair = report or self.tally.repair
        return bool(report)

    def _preconditioner(self, damping: float) -> tuple[LinearOperator | None, float]:
        """The preconditioner, and the factor between its metric and the lengths of a radius."""
        if self._inverse is None:
            return None, 1.0
        inverse = self._inverse(damping)
        if self._kept is not None:
            v = torch.where(self._kept, self._grad, 0.0)
            before, after = self.space.to_host(largest=(v, inverse.matvec(v)))
            inverse = Masked(inverse, self._kept, after / before if before and after else 1.0)
        if self._unit == 1.0:
            return inverse, 1.0
        before, after = self.space.to_host(largest=(self._grad, inverse.matvec(self._grad)))
        unit = unit_of(after / before if before else 1.0, inverse.dtype)
        return Rescaled(inverse, unit), sqrt(unit)

    def along_gradient(self, damping: float, metric: bool) -> tuple[float, float]:
        """The curvature along the gradient, and the length of the step that minimizes with it.

        The curvature is `|A g| / |g|`, which is positive even if `g'A g` is not. A quadratic with
        this curvature has its minimum along the gradient after a step of length `|g|^2 / |A g|`.
        Without curvature the step is as long as the parameters, or one. The next system reuses the
        product.

        Args:
            damping: A multiple of the identity, added to `A`.
            metric: Whether norms are those of the preconditioner, and the gradient is multiplied
                by it.
        """
        inverse, stretch = self._preconditioner(damping) if metric else (None, 1.0)
        z = self._grad if inverse is None else inverse.matvec(self._grad)
        image = self._operator.matvec(z)
        if damping:
            image = image.add(z, alpha=damping / self._unit)
        self.tally.products += 1
        (largest,) = self.space.to_host(largest=(image,))
        if not isfinite(largest) and self._repair():
            return self.along_gradient(damping, metric)
        if metric or self._inverse is None:
            self._first = image
        unit = unit_of(largest, image.dtype)
        scaled = image / unit
        of_scaled = scaled if inverse is None else inverse.matvec(scaled)
        squares = self.space.to_host(sums=(self._grad @ z, scaled @ of_scaled))
        norm, change = (sqrt(max(square, 0.0)) for square in squares)
        if 0.0 < change < inf and norm > 0.0:
            change *= unit
            return change / norm * self._unit, norm * (norm / change) / stretch
        (size,) = self.space.to_host(norms=[torch.linalg.vector_norm(self._objective.position)])
        return self.point.length / (size or 1.0), size or 1.0


def take(descent: Descent, move: Move) -> None:
    """Moves the parameters, and records the iteration."""
    proposal, trial = move.proposal, move.trial
    point: Point = trial.payload
    objective = descent.objective
    objective.accept(proposal.direction, trial.t, point.evaluation)
    norm_of = torch.linalg.vector_norm
    norm, size = descent.space.to_host(
        norms=(norm_of(proposal.direction), norm_of(objective.position))
    )
    moved = abs(trial.t) * norm
    # A step below the rounding of the parameters counts as no move, however it was held.
    held = proposal.held and moved > objective.vector.precision * size
    descent.arrive(point, trial.t, moved, held=held)
    descent.search_status = move.search_status


# The three ways to turn the model into a step: damping, a trust radius, a line search.


def damped(model: Model, rule: DampingRule, memory: Memory, lr: float) -> Move | StepStatus:
    """A step with Levenberg-Marquardt damping, as in Martens 2010.

    The solver keeps some iterates. Going back from the last one, the step takes the first at which
    the loss stops falling. If no part of it lowers the loss enough, the damping is raised and the
    system is solved again.
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
            # Enough to make the curvature along the direction found positive.
            lifted = max(rule.raised(damping, 1, start), damping - 2 * result.negative_curvature)
            memory.damping = min(lifted, rule.largest * start)
        if not 0 < result.decrease < float("inf"):
            memory.direction = None
            if result.status is SolveStatus.NEGATIVE_CURVATURE:
                memory.damping = max(memory.damping, rule.rejected(damping, failures, start))
                del result
                continue
            return _hopeless(result)
        memory.direction = result.x
        proposal, first = _best_iterate(model, result, damping, lr)
        found = search_along(model, _BACKTRACKING, proposal, first)
        ratio = model.gain_ratio(proposal, first)
        if found.status.accepted:
            after: float = found.trial.payload.length
            ratios = (ratio, after / model.point.length)
            if result.status is SolveStatus.NONFINITE:
                memory.damping = rule.raised(damping, 1, start)
            elif not indefinite:
                memory.damping = rule.updated(damping, *ratios, start, proposal.curvature)
            return Move(proposal, found.trial, ratio, found.status)
        memory.direction = None
        if model.unresolved(proposal):
            anew = (
                rule.relative(model.along_gradient(0.0, metric=False)[0]) if proposal.held else inf
            )
            if not anew < damping:
                return StepStatus.STALLED
            # The model may be fine: the damping leaves only steps too short to test it.
            memory.damping = memory.start = start = anew
        else:
            raised = rule.rejected(damping, failures, start)
            memory.damping = max(memory.damping, raised)
        del result, proposal  # frees their vectors before the next ones are made
    hopeful = first is None or first.finite
    return StepStatus.NO_DECREASE if hopeful else StepStatus.NONFINITE_TRIALS


def _best_iterate(
    model: Model, result: SolveResult, damping: float, lr: float
) -> tuple[Proposal, Trial]:
    """The solution or an earlier iterate, as long as the loss falls on the way back."""
    proposal = model.propose(result.x, result.decrease, damping)
    trial = model.trial(proposal, lr)
    for iterate in reversed(result.iterates):
        earlier = model.propose(iterate.x, iterate.decrease, damping)
        tried = model.trial(earlier, lr)
        if trial.finite and not tried.loss < trial.loss:
            break
        proposal, trial = earlier, tried
    return proposal, trial


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
        proposal = model.propose(result.x, result.decrease, memory.damping)
        proposal = proposal._replace(held=result.length >= 0.99 * radius)
        trial = model.trial(proposal, lr)
        ratio = model.gain_ratio(proposal, trial)
        memory.radius = rule.updated(radius, ratio, result.length, memory.start)
        if not ratio > rule.accept and result.iterates:
            # A direction of negative curvature (or of rounding error alone) led to the radius. The
            # iterate before it does not depend on that direction.
            interior = result.iterates[-1]
            proposal = model.propose(interior.x, interior.decrease, memory.damping)._replace(
                held=False
            )
            trial = model.trial(proposal, lr)
            ratio = model.gain_ratio(proposal, trial)
            if ratio > rule.accept:
                memory.radius = max(memory.radius, interior.length)
        if ratio > rule.accept:
            return Move(proposal, trial, ratio)
        if model.unresolved(proposal):
            return StepStatus.STALLED
        del result, proposal  # frees their vectors before the next ones are made
    assert trial is not None
    return StepStatus.NO_DECREASE if trial.finite else StepStatus.NONFINITE_TRIALS


def searched(model: Model, search: LineSearch, memory: Memory, lr: float) -> Move | StepStatus:
    """A step by a line search along the solution, or along a direction of negative curvature."""
    result = model.solve(memory.damping, x0=memory.direction)
    memory.direction = None
    if 0 < result.decrease < float("inf"):
        memory.direction = result.x
        proposal = model.propose(result.x, result.decrease, memory.damping)
    elif result.negative_direction is not None:
        proposal = model.propose(result.negative_direction, 0.0, 0.0)
        if proposal.slope > 0:
            proposal = Proposal(-proposal.direction, -proposal.slope, 0.0)
    else:
        return _hopeless(result)
    first = model.trial(proposal, lr)
    found = search_along(model, search, proposal, first)
    if found.status.accepted:
        return Move(proposal, found.trial, model.gain_ratio(proposal, first), found.status)
    memory.direction = None
    if found.status is SearchStatus.NONFINITE:
        return StepStatus.NONFINITE_TRIALS
    return StepStatus.STALLED if model.unresolved(proposal) else StepStatus.NO_DECREASE


def search_along(
    model: Trials, search: LineSearch, proposal: Proposal, first: Trial
) -> SearchResult:
    """A line search along a proposal whose first trial has been evaluated already."""

    def phi(t: float) -> Trial:
        t = min(t, model.longest)
        return first if t == first.t else model.trial(proposal, t)

    start = Trial(0.0, model.point.loss, proposal.slope, longest=model.longest)
    found = search(phi, start, first.t, precision=model.precision)
    if found.status is SearchStatus.UNBOUNDED:
        model.tally.unbounded |= falls_without_end(proposal.slope, found)
    return found


def _hopeless(result: SolveResult) -> StepStatus:
    """The status of a step whose solver found no direction of descent."""
    if result.status is SolveStatus.NONFINITE or not isfinite(result.decrease):
        return StepStatus.NONFINITE_PRODUCTS
    return StepStatus.NO_DECREASE


# Replacement of curvature that is not finite.


class Repair(NamedTuple):
    """A curvature that is finite along the gradient.

    Attributes:
        operator: The curvature, in the unit asked for.
        kept: A mask of the coordinates that keep the original curvature; None if all do.
        products: The number of products used.
        report: A sentence for the report; empty if there was nothing to replace.
    """

    operator: LinearOperator
    kept: Tensor | None
    products: int
    report: str


def repaired(operator: LinearOperator, objective: Objective, grad: Tensor, unit: float) -> Repair:
    """Finds the entries of a product that are not finite, and replaces the curvature there.

    An operation may have a first derivative at a point where it has no second: a norm at zero, for
    instance. All products are NaN in the coordinates that depend on it. In these, a multiple of the
    identity replaces the curvature, as large as the curvature in the others, so that the step
    follows the gradient there. If no entry is finite, products become differences of gradients.

    Args:
        operator: The curvature, in the unit.
        objective: The objective at the point of the curvature.
        grad: The gradient there, in the unit.
        unit: See `unit_of`.
    """
    size, space = objective.vector.whole_size, operator.space
    differences = FiniteDifference(objective)
    candidates = (operator, differences if unit == 1.0 else Rescaled(differences, unit))
    reports = ("", "no entry of a product was finite, products were differences of gradients")
    for products, (candidate, report) in enumerate(zip(candidates, reports, strict=True), 1):
        image = candidate.matvec(grad)
        kept = image.isfinite()
        image = torch.where(kept, image, 0.0)
        count, square, whole = space.to_host(sums=(kept.sum(), image @ image, grad @ grad))
        lost = size - round(count)
        if not lost:
            return Repair(candidate, None, products, report)
        diagonal = sqrt(square / whole)
        if 0.0 < diagonal < inf:
            along = f"{lost} of {size} entries of a product were not finite, the step follows the "
            return Repair(
                Masked(candidate, kept, diagonal),
                kept,
                products,
                f"{report}; {along}gradient there".removeprefix("; "),
            )
    length, norm = space.to_host(
        norms=[torch.linalg.vector_norm(v) for v in (objective.position, grad)]
    )
    # Of huge gradients the quotient is beyond the range of float32.
    curvature = min(norm / (length or 1.0), torch.finfo(grad.dtype).max)
    steepest = Diagonal(torch.full_like(grad, curvature))
    steepest.space = space
    report = "no product was finite, the step follows the gradient"
    return Repair(steepest, torch.zeros_like(grad, dtype=torch.bool), len(candidates), report)
