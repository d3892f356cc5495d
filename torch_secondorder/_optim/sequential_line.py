"""The search of sequential quadratic programming along the solution of a quadratic program."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite, nan
from typing import Protocol

import torch
from torch import Tensor

from torch_secondorder._objective.base import Objective
from torch_secondorder._optim.flat import Candidate, Descent, Line, Point
from torch_secondorder._optim.sequential_merit import Merit
from torch_secondorder._params.space import to_cpu
from torch_secondorder.constraints._program import Program
from torch_secondorder.globalization import Trial

#: The largest relative rounding error that a line search takes.
COARSE = 0.5


@dataclass(slots=True)
class Linearization:
    """The constraints around a point.

    Attributes:
        values: `c`, `(m,)`, float64 on the CPU.
        jacobian: `J`, `(m, n)`, in the work space.
        lengths: Of the rows of `J`, `(m,)`, float64 on the CPU; not finite if `J` is not.
    """

    values: Tensor
    jacobian: Tensor
    lengths: Tensor

    @property
    def finite(self) -> bool:
        """True if values and Jacobian are finite."""
        return bool((self.values.isfinite() & self.lengths.isfinite()).all())


@dataclass(slots=True)
class Step:
    """The solution of the quadratic program at a point.

    Attributes:
        direction: `d`, `(n,)`.
        multipliers: Of the constraints, `(m,)`, float64 on the CPU.
        residual: `-B d`, the gradient of the Lagrangian with the multipliers of bounds, `(n,)`.
        gradient: The gradient of the Lagrangian of the constraints alone, `(n,)`.
        along: `J d`, `(m,)`, float64 on the CPU.
        slope: `g'd`.
        bend: `d'B d`.
        square: `d'd`.
        curvatures: `a'H a` for the gradients `a` of the constraints, `(m,)`, all above zero.
    """

    direction: Tensor
    multipliers: Tensor
    residual: Tensor
    gradient: Tensor
    along: Tensor
    slope: float
    bend: float
    square: float
    curvatures: Tensor


@dataclass(slots=True)
class ConstrainedCandidate(Candidate):
    """A trial with the constraints around it."""

    around: Linearization


class Owner(Protocol):
    """The quadratic programs of a step as their lines see them, see `SequentialQuadratic`."""

    program: Program
    inequality: Tensor
    here: Linearization
    step: Step | None

    def linearized(self, objective: Objective) -> Linearization:  # pragma: no cover - a protocol
        """The constraints around the last evaluation."""

    def arrived(self) -> None:  # pragma: no cover - a protocol
        """Takes note of an accepted step."""


class ConstrainedLine(Line):
    """The merit function along the solution of a quadratic program, up to its end.

    The losses and slopes of its trials are those of the merit function; the pair that is learned is
    that of the Lagrangian with the new multipliers.

    Args:
        descent: See `Line`.
        owner: The quadratic programs.
        step: The solution.
        merit: The terms of the merit function along the line.
    """

    least_curvature = 0.3

    def __init__(self, descent: Descent, owner: Owner, step: Step, merit: Merit) -> None:
        super().__init__(descent, step.direction, step.slope, step.square)
        self.product, self.bend = step.residual.neg(), step.bend
        self._before = step.gradient
        self._owner, self._step, self._merit = owner, step, merit
        loss, self.slope = self._merit_of(
            descent.point.loss, step.slope, owner.here.values, step.along, 0.0
        )
        self._lowest_loss = loss
        self.start = Trial(0.0, loss, self.slope, longest=1.0)

    @property
    def precision(self) -> float:
        """The rounding error of the merit function, relative to its value at the start."""
        owner, merit, objective = self._owner, self._merit, self._descent.objective
        precision, loss = objective.vector.precision, abs(self.start.loss)
        if not loss:
            return precision
        y = self._step.multipliers
        weights = y.abs() + merit.penalties * owner.here.values.abs()
        counted = ~owner.inequality | (y > 0)
        size = torch.linalg.vector_norm(objective.position).item()
        terms = size * (weights * owner.here.lengths)[counted].sum().item()
        # A merit function that is rounding alone is as coarse as a line search takes it.
        relative: float = min(precision * (1.0 + terms / loss), COARSE)
        return relative

    def __call__(self, t: float) -> Trial:
        """Evaluates the merit function at `t`, at most one."""
        t = min(t, 1.0)
        if self._newest is not None and self._newest is not self._lowest:
            self._newest.point = None
        self._newest = None
        objective, direction = self._descent.objective, self.direction
        evaluation = objective.trial(direction, t)
        grad, around = evaluation.grad, self._owner.linearized(objective)
        gradient = self._gradient(grad, around)
        y = gradient - self._before
        numbers = torch.stack((grad @ direction, y @ y, y @ direction, gradient.abs().amax()))
        along, numbers, of_loss = to_cpu(around.jacobian @ direction, numbers, evaluation.loss)
        (slope, y_y, y_d, grad_norm), loss = numbers.tolist(), of_loss.item()
        if loss == -inf:
            self.bottomless = True
        candidate = ConstrainedCandidate(Point(loss, grad_norm, grad), y, y_y, y_d, around)
        self._newest = candidate
        if not (isfinite(grad_norm) and isfinite(loss) and around.finite):
            return Trial(t, nan, inf, candidate)
        merit, slope = self._merit_of(loss, slope, around.values, along, t)
        if merit < self._lowest_loss and isfinite(merit) and isfinite(slope):
            if self._lowest is not None:
                self._lowest.point = None
            self._lowest_loss, self._lowest = merit, candidate
        return Trial(t, merit, slope, candidate)

    def accept(self, trial: Trial) -> Candidate:
        """See `Line.accept`; multipliers and penalties are kept as well."""
        candidate = super().accept(trial)
        assert isinstance(candidate, ConstrainedCandidate)
        self._owner.here, self._owner.step = candidate.around, None
        self._keep(trial.t)
        return candidate

    def _gradient(self, grad: Tensor, around: Linearization) -> Tensor:
        """The gradient that the pair is learned from: of the Lagrangian."""
        rows = around.jacobian
        return torch.addmv(grad, rows.T, self._step.multipliers.to(rows))

    def _merit_of(
        self, loss: float, slope: float, values: Tensor, along: Tensor, t: float
    ) -> tuple[float, float]:
        """The merit function and its slope, from those of the loss."""
        merit = self._merit
        return loss + merit.terms(values, t), slope + merit.slope(values, along, t)

    def _keep(self, t: float) -> None:
        """Enters multipliers and penalties of the accepted trial into the program."""
        program, merit = self._owner.program, self._merit
        program.multipliers = merit.multipliers + t * merit.change
        program.penalties = merit.penalties
        self._owner.arrived()
