"""Restoration: the search for the least violation where constraints seem to contradict each other.

Where the violation has hardly fallen for several iterations while multipliers have grown, quadratic
programs lead nowhere. Then half the sum of squares of the violated values, `|u|^2 / 2` with the
gradient `J'u`, takes the place of the loss until it is a tenth of what it was, or stationary: the
constraints contradict each other there. This is the restoration phase of Fletcher and Leyffer 2002,
"Nonlinear programming without a penalty function".
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from torch_secondorder._optim.sequential_line import (
    COARSE,
    ConstrainedLine,
    Linearization,
)
from torch_secondorder._params.space import to_cpu
from torch_secondorder.constraints._lagrangian import violations
from torch_secondorder.constraints._program import Program

# Restoration begins after so many iterations without a violation below this share of the lowest
# one, if multipliers are larger than this, times their natural size, and if the violation is not
# that of a step as short as this, over the length of the parameters.
_PATIENCE, _FALL, _GROWN, _SHORT = 5, 0.9, 100.0, 1e-4
# It ends where the violation has fallen to this share.
_ENOUGH = 0.1


class Restoration:
    """The progress of the violation over the iterations, and whether restoration runs.

    All of it is in the program, and so in checkpoints.

    Args:
        program: The constraints.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._inequality = program.functions.inequality

    @property
    def runs(self) -> bool:
        """True between the beginning and the end of a restoration."""
        return self._state()[2] > 0

    def arrived(self, values: Tensor) -> None:
        """Takes note of an accepted step, outside of restorations."""
        lowest, waited, _ = self._state()
        length = self._length(values)
        if length <= _FALL * lowest:
            self._set(length, 0.0, 0.0)
        else:
            self._set(lowest, waited + 1, 0.0)

    def is_due(self, around: Linearization, y: Tensor, of_loss: float, size: float) -> bool:
        """True if quadratic programs lead nowhere.

        Args:
            around: The constraints at the point.
            y: The multipliers of the quadratic program there, `(m,)`.
            of_loss: The length of the loss's gradient.
            size: The length of the parameters, at least one.
        """
        if self._state()[1] < _PATIENCE:
            return False
        if not (y.abs() * around.lengths).max().item() > _GROWN * of_loss:
            return False
        short = violations(around.values, self._inequality) <= _SHORT * size * around.lengths
        return not bool(short.all())

    def begin(self, values: Tensor) -> None:
        """Begins at a point that violates constraints."""
        self._set(inf, 0.0, self._length(values))

    def is_done(self, values: Tensor) -> bool:
        """True if the violation has fallen enough."""
        return self._length(values) <= _ENOUGH * self._state()[2]

    def end(self) -> None:
        """Ends."""
        self._program.restoration = None

    def _length(self, values: Tensor) -> float:
        length: float = torch.linalg.vector_norm(violations(values, self._inequality)).item()
        return length

    def _state(self) -> list[float]:
        state = self._program.restoration
        numbers: list[float] = [inf, 0.0, 0.0] if state is None else state.tolist()
        return numbers

    def _set(self, lowest: float, waited: float, start: float) -> None:
        numbers = [lowest, waited, start]
        self._program.restoration = torch.tensor(numbers, dtype=torch.float64)


class RestorationLine(ConstrainedLine):
    """Half the squared violation along a direction, up to its end."""

    def _gradient(self, grad: Tensor, around: Linearization) -> Tensor:
        return slope_of_violation(around, self._owner.inequality)

    def _merit_of(
        self, loss: float, slope: float, values: Tensor, along: Tensor, t: float
    ) -> tuple[float, float]:
        unmet = unmet_values(values, self._owner.inequality)
        return 0.5 * (unmet @ unmet).item(), (unmet @ along).item()

    def _keep(self, t: float) -> None:
        pass

    @property
    def precision(self) -> float:
        """The rounding error of the squared violation, relative to its value at the start."""
        objective, here = self._descent.objective, self._owner.here
        unmet = unmet_values(here.values, self._owner.inequality)
        size = torch.linalg.vector_norm(objective.position).item()
        terms = size * (unmet.abs() @ here.lengths).item()
        relative: float = objective.vector.precision * (1.0 + terms / self.start.loss)
        return min(relative, COARSE)


def unmet_values(values: Tensor, inequality: Tensor) -> Tensor:
    """The values that are to be zero: `u`, zero for inequalities that hold, `(m,)`."""
    return torch.where(inequality, values.clamp(min=0), values)


def slope_of_violation(around: Linearization, inequality: Tensor) -> Tensor:
    """The gradient of half the squared violation, `J'u`, `(n,)`."""
    rows = around.jacobian
    return rows.T @ unmet_values(around.values, inequality).to(rows)


def first_scale(around: Linearization, inequality: Tensor, slope: Tensor, most: float) -> float:
    """The length of the first step over that of the gradient: to the least linearized violation.

    Args:
        around: The constraints at the point.
        inequality: A mask of the inequalities.
        slope: `J'u`.
        most: The longest step.
    """
    rows = around.jacobian
    along, square = to_cpu(rows @ slope, slope @ slope)
    along = along[unmet_values(around.values, inequality) != 0]
    bend, length = (along @ along).item(), square.item()
    if not length > 0 or not bend > 0:
        return 1.0
    scale: float = min(length / bend, most / length**0.5)
    return scale
