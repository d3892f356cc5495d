"""Linearized residuals at a point, and what is asked of them for a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from torch_secondorder._optim.flat import Descent, Point
from torch_secondorder._optim.quadratic_model import Proposal, Trials
from torch_secondorder.curvature import ResidualJacobian
from torch_secondorder.globalization import Trial
from torch_secondorder.solvers import DampedLeastSquares, DampedStep
from torch_secondorder.solvers._residual_region import BoxedRegion, ResidualRegion

#: The quadratic for steps within a radius.
Region: TypeAlias = ResidualRegion | BoxedRegion

# The share of a step after which residuals are looked at for their bend.
_PROBE = 0.1
# Differences of losses up to this multiple of their rounding error may be rounding of residuals.
_NOISE = 1e3


@dataclass(frozen=True, slots=True)
class ResidualModel:
    """The linearized residuals at a point, with what a step is measured by.

    Attributes:
        system: The residuals.
        metric: The metric of the damping; None for the identity.
        center: What the step is drawn to; None for zero.
        room: The smallest and largest step within bounds; None without any.
    """

    system: DampedLeastSquares
    metric: Tensor | None
    center: Tensor | None
    room: tuple[Tensor, Tensor] | None

    def solve(self, damping: float) -> DampedStep:
        """The step with a damping."""
        if self.room is None:
            return self.system.solve(damping, self.metric, self.center)
        return self.system.solve_in(damping, self.metric, *self.room)

    def region(self, point: Point) -> Region:
        """The quadratic for steps within a radius."""
        jacobian, grad = self.system.jacobian, point.grad
        assert grad is not None
        if self.room is None:
            return ResidualRegion(jacobian, grad, self.metric)
        return BoxedRegion(jacobian, grad, self.metric, *self.room)


def gain_ratio_of(trials: Trials, proposal: Proposal, trial: Trial) -> float:
    """See `Trials.gain_ratio`; in the rounding errors of large residuals by the slopes alone.

    Near a minimum where residuals are left, they cancel in the loss long before the gradient is
    exact.
    """
    noise = _NOISE * trials.allowance
    predicted = -trial.t * (proposal.slope - trial.t * (proposal.slope + proposal.decrease))
    settled = 0.0 < predicted <= noise and abs(trials.point.loss - trial.loss) <= noise
    if not (settled and trial.finite):
        return trials.gain_ratio(proposal, trial)
    return -0.5 * trial.t * (proposal.slope + trial.slope) / predicted


def proposal_of(step: DampedStep) -> Proposal:
    """A step as a proposal."""
    return Proposal(step.x, step.slope, step.decrease, step.held, step.curvature)


def bend_along(
    jacobian: ResidualJacobian, x: Tensor, image: Tensor, descent: Descent
) -> Tensor | None:
    """The second derivative of the residuals along a step, by a difference; None if not finite.

    Args:
        jacobian: At the current point.
        x: The step.
        image: `J x`.
        descent: The step.
    """
    probe = descent.objective.trial(x, _PROBE, curvature="jacobian")
    moved = jacobian.change_to(probe)
    bend = (moved / _PROBE - image) * (2.0 / _PROBE)
    return bend if bool(bend.isfinite().all()) else None
