"""Steps within a trust radius for linearized residuals, with corrections by the same Jacobian."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import Any, get_args

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_choice
from torch_secondorder._objective.base import EvaluationsSpent
from torch_secondorder._optim.flat import Descent, Point
from torch_secondorder._optim.info import StepStatus
from torch_secondorder._optim.quadratic_model import Move, Proposal, Trials
from torch_secondorder._optim.residual_model import Region, gain_ratio_of
from torch_secondorder.globalization import (
    DampingRule,
    LineSearch,
    LineSearchName,
    TrustRegion,
    resolve_line_search,
)
from torch_secondorder.solvers._residual_region import RegionStep

# Most steps that are tried with one Jacobian.
_ATTEMPTS = 40
# A correction follows a step of at least this gain ratio, is no longer than this share of it, and
# lowers the loss by at least this share of what its slope promises.
_GOOD, _REACH, _SUFFICIENT = 0.5, 0.5, 1e-4
# The rule of a trust region: a step that gained too little halves the radius. In curved valleys the
# best radius changes little from step to step.
_REGION = TrustRegion(shrink=0.5)


@dataclass(frozen=True, slots=True)
class Outlook:
    """Numbers of the last step, by which one tells convergence.

    Attributes:
        gained: The decrease of the loss, relative to the loss before.
        predicted: The predicted one, likewise.
        moved: The length of the step relative to the parameters, in the metric.
        size: The length of the parameters.
        fall: The decrease that the next step promises with the same Jacobian, relative to the loss;
            infinite if unknown.
        length: Its length relative to the parameters; likewise.
        cosine: The largest cosine between the residuals and a column of their Jacobian before.
    """

    gained: float = inf
    predicted: float = inf
    moved: float = inf
    size: float = 0.0
    fall: float = inf
    length: float = inf
    cosine: float = inf


@dataclass(slots=True)
class RadiusMemory:
    """The radius, and counts of the steps within it.

    Attributes:
        radius: The radius of the next step; 0 before the first one.
        start: The first radius, which the rule's limit is relative to.
        outlook: Numbers of the last step.
        rejected: Steps tried and not taken.
        corrections: Further steps taken with one Jacobian.
    """

    radius: float
    start: float
    outlook: Outlook = Outlook()
    rejected: int = 0
    corrections: int = 0


def within_radius(
    region: Region,
    trials: Trials,
    rule: TrustRegion,
    memory: RadiusMemory,
    descent: Descent,
    corrections: int,
    cosine: float = inf,
) -> Move | StepStatus:
    """The best step within a radius, which is shortened until the step lowers the loss.

    Args:
        region: The quadratic.
        trials: Evaluates steps.
        rule: The rule of the radius.
        memory: The radius.
        descent: The step of the optimizer.
        corrections: Most further steps with the same Jacobian.
        cosine: See `Outlook`.
    """
    size = region.length_of(descent.objective.position)
    memory.outlook = Outlook(size=size, cosine=cosine)
    if not memory.radius:
        first = size or rule.begun(region.along_gradient()) or 1.0
        memory.radius = memory.start = first if rule.initial is None else rule.initial
    for _ in range(_ATTEMPTS):
        step = region.within(memory.radius)
        if not 0 < step.decrease < inf:
            return StepStatus.NO_DECREASE
        proposal = Proposal(step.x, step.slope, step.decrease, step.held)
        trial = trials.trial(proposal, descent.lr)
        ratio = gain_ratio_of(trials, proposal, trial)
        memory.radius = rule.updated(memory.radius, ratio, step.length, memory.start)
        move = Move(proposal, trial, ratio)
        memory.outlook = _outlook(move, step, trials.point.loss, size, cosine)
        if ratio > rule.accept:
            if corrections and ratio >= _GOOD:
                move = _corrected(move, region, step, trials, memory, corrections)
            return move
        memory.rejected += 1
        if trials.unresolved(proposal):
            return StepStatus.STALLED
    return StepStatus.NO_DECREASE if trial.finite else StepStatus.NONFINITE_TRIALS


def largest_cosine(diagonal: Tensor, residuals: Tensor, descent: Descent) -> float:
    """The largest cosine between the residuals and a column of their Jacobian.

    Within bounds the gradient is projected first.

    Args:
        diagonal: That of `J'J`, the squared lengths of the columns.
        residuals: The residuals.
        descent: Has the gradient.
    """
    objective, grad = descent.objective, descent.point.grad
    assert grad is not None
    if objective.box is not None:
        grad = objective.box.projected(objective.position, grad)
    shares = torch.where(diagonal > 0, grad / diagonal.sqrt(), 0.0)
    largest, norm = descent.space.to_host(largest=(shares,), norms=(residuals.norm(),))
    return largest / norm if norm else 0.0


def _outlook(move: Move, step: RegionStep, loss: float, size: float, cosine: float) -> Outlook:
    """The numbers of a step that was tried at a point of some loss."""
    if not loss:
        return Outlook(0.0, 0.0, 0.0, size, cosine=0.0)
    gained = (loss - move.trial.loss) / loss if move.trial.finite else -inf
    moved = step.length / size if size else inf
    return Outlook(gained, step.decrease / loss, moved, size, cosine=cosine)


def _corrected(
    move: Move, region: Region, step: RegionStep, trials: Trials, memory: RadiusMemory, most: int
) -> Move:
    """A good step, and further ones with the same Jacobian while the loss falls.

    Each of them takes an evaluation, and begins with the gradient where the last one ended. One
    that is too long is not taken: the Jacobian is no longer right there. The last one that is
    looked at tells how much another Jacobian could still gain.
    """
    space = trials.space
    for count in range(most + 1):
        point: Point = move.trial.payload
        assert point.grad is not None and trials.point.grad is not None
        so_far = move.proposal.direction * move.trial.t
        more = region.further(point.grad, so_far)
        whole = so_far + more
        length = region.length_of(more)
        fall, slope = space.to_host(sums=(point.grad @ more, trials.point.grad @ whole))
        memory.outlook = replace(
            memory.outlook,
            fall=-fall / point.loss if point.loss else 0.0,
            length=length / memory.outlook.size if memory.outlook.size else inf,
        )
        if count == most or not 0 < length <= _REACH * step.length:
            break
        try:
            tried = trials.trial(move.proposal._replace(direction=whole, slope=slope), 1.0)
        except EvaluationsSpent:
            break
        gained = point.loss - tried.loss
        if not (tried.finite and gained > max(-_SUFFICIENT * fall, trials.allowance)):
            break
        move = Move(move.proposal._replace(direction=whole, slope=slope), tried, move.gain_ratio)
        memory.corrections += 1
    return move


def resolved_globalization(spec: Any) -> LineSearch | TrustRegion | None:
    """The globalization from its name; None where there is none, or a damping."""
    if spec is None or isinstance(spec, TrustRegion):
        return spec
    if isinstance(spec, DampingRule):
        raise TypeError(f"globalization is no damping rule here: pass damping={spec!r}")
    if isinstance(spec, (str, type)) or not callable(spec):
        known = ("damping", "trust_region", *get_args(LineSearchName))
        check_choice("globalization", spec, known, "an instance such as StrongWolfe(), or None")
    if isinstance(spec, str) and spec in ("damping", "trust_region"):
        return _REGION if spec == "trust_region" else None
    return resolve_line_search(spec, "globalization")
