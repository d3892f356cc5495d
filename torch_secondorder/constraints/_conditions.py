"""The conditions of Karush, Kuhn and Tucker as residuals, absolute and relative.

With a loss `f`, constraints `c` (equalities and inequalities), multipliers `y` and the slope
`r = grad f + J'y` of the Lagrangian:

* stationarity: `|r|`, at bounds of the parameters as far as a step `-r` leads before it meets one;
  relative to the largest of 1, `|grad f|` and all `|y_i grad c_i|`, which cancel in it;
* feasibility: by how much a constraint is violated; relative to the larger of 1 and `|grad c_i|`,
  so that it is a distance where gradients are steep;
* signs: `-y_i` where a multiplier of an inequality is negative; relative as `|y_i grad c_i|` to
  what stationarity is relative to;
* complementarity: `|y_i|` times the slack of an inequality; relative to the larger of 1 and `|f|`.

All sizes are largest absolute entries. The relative numbers do not depend on the units of a steep
constraint, and little on those of the loss. Ipopt scales likewise: constraints by their gradients,
stationarity by the multipliers (Waechter and Biegler 2006, sections 2.1 and 3.8). As in SNOPT only
the slack counts in complementarity, so that a violation is one of feasibility alone (Gill, Murray
and Saunders 2005, section 2.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from torch_secondorder._params.box import Box
from torch_secondorder.constraints._estimates import AtBounds, estimated_multipliers
from torch_secondorder.constraints._evaluation import FirstOrder

Name: TypeAlias = Literal["stationarity", "feasibility", "signs", "complementarity"]

# Gradients cancel if this share of them is left.
_PARALLEL = 1e-3
# Entries this close to a bound are at it, relative to the larger of 1 and the entry.
_AT_BOUND = 1e-8


@dataclass(frozen=True, slots=True)
class Condition:
    """The residual of one of the conditions.

    Attributes:
        value: The largest residual.
        relative: The largest relative one.
        index: Where the relative one is largest: an entry of the parameters for stationarity, else
            a constraint; -1 if the condition holds exactly or says nothing.
        at: The residual there.
    """

    value: float
    relative: float
    index: int
    at: float


def _condition(residuals: Tensor, sizes: Tensor | float) -> Condition:
    if not residuals.numel():
        return Condition(0.0, 0.0, -1, 0.0)
    largest, index = (residuals / sizes).max(0)
    if float(largest) <= 0:
        return Condition(0.0, 0.0, -1, 0.0)
    at = int(index)
    return Condition(float(residuals.max()), float(largest), at, float(residuals[at]))


class Conditions:
    """The conditions at a point, for any multipliers.

    Args:
        point: Values and derivatives there.
        inequality: A mask, `(m,)`.
        box: The bounds of the parameters; None for none.

    Attributes:
        inequality: A mask, `(m,)`, on the device of the values.
        slack: How far each inequality is from its bound, `(m,)`; else zero.
        violation: By how much each constraint is violated, `(m,)`.
        steepness: The largest entry of each constraint's gradient, `(m,)`.
        at_bounds: The entries at bounds; None for no bounds.
    """

    def __init__(self, point: FirstOrder, inequality: Tensor, box: Box | None) -> None:
        values = point.values
        self.point = point
        self.inequality = inequality.to(values.device)
        self.slack = torch.where(self.inequality, (-values).clamp(min=0), 0.0)
        self.violation = torch.where(self.inequality, values.clamp(min=0), values.abs())
        self.steepness = _largest(point.jacobian)
        self.at_bounds: AtBounds | None = None
        self._below = self._above = point.position.new_full((), torch.inf)
        self.outside = point.position.new_zeros(0)
        if box is not None:
            low, high = (bound.to(point.position) for bound in (box.low, box.high))
            near = _AT_BOUND * point.position.abs().clamp(min=1.0)
            self._below, self._above = point.position - low, high - point.position
            self.at_bounds = AtBounds(self._below <= near, self._above <= near)
            self.outside = -torch.minimum(self._below, self._above).clamp(max=0)

    def slope(self, y: Tensor) -> Tensor:
        """The gradient of the Lagrangian, `(n,)`."""
        return self.point.grad + self.point.jacobian.T @ y

    def held(self, slope: Tensor) -> Tensor:
        """The parts of a slope that bounds hold, which are their multipliers, `(n,)`."""
        return slope - self._moving(slope)

    def _moving(self, slope: Tensor) -> Tensor:
        low = -self._above.clamp(min=0)
        return torch.minimum(torch.maximum(slope, low), self._below.clamp(min=0))

    def size(self, y: Tensor) -> float:
        """The size that slopes are relative to."""
        forces = [self.point.grad.abs().max(), *(y.abs() * self.steepness)]
        return max(1.0, *map(float, forces))

    def stationarity(self, y: Tensor) -> Condition:
        """The condition on the slope of the Lagrangian."""
        return _condition(self._moving(self.slope(y)).abs(), self.size(y))

    def feasibility(self) -> Condition:
        """The condition on the constraints; indices from `m` on are parameters out of bounds."""
        sizes = self.steepness.clamp(min=1.0)
        outside = self.outside
        return _condition(
            torch.cat([self.violation, outside]), torch.cat([sizes, torch.ones_like(outside)])
        )

    def signs(self, y: Tensor) -> Condition:
        """The condition on the signs of the multipliers."""
        negative = torch.where(self.inequality, y.clamp(max=0).abs(), 0.0)
        found = _condition(negative * self.steepness, self.size(y))
        at = float(negative[found.index]) if found.index >= 0 else 0.0
        value = float(negative.max()) if len(negative) else 0.0
        return Condition(value, found.relative, found.index, at)

    def complementarity(self, y: Tensor) -> Condition:
        """The condition that an inequality with slack has no multiplier."""
        return _condition(y.abs() * self.slack, max(1.0, abs(self.point.loss)))

    def all(self, y: Tensor) -> dict[Name, Condition]:
        """All four, for multipliers `(m,)`."""
        return {
            "stationarity": self.stationarity(y),
            "feasibility": self.feasibility(),
            "signs": self.signs(y),
            "complementarity": self.complementarity(y),
        }

    def active(self, tolerance: float) -> Tensor:
        """The inequalities without slack, a mask `(m,)`.

        Args:
            tolerance: The slack allowed, relative as a violation is.
        """
        return self.inequality & (self.slack <= tolerance * self.steepness.clamp(min=1.0))

    def contradict(self, tolerance: float) -> bool:
        """True if no step lessens all violations and keeps the other constraints.

        That is so to the first order if weights of the violated constraints, none negative and not
        all zero, and multipliers of the other active ones make a sum of gradients that vanishes
        (Motzkin's theorem of the alternative).

        Args:
            tolerance: The relative violation, or slack, that counts as none.
        """
        violated = self.violation > tolerance * self.steepness.clamp(min=1.0)
        kept = (~self.inequality | self.active(tolerance)) & ~violated
        if not bool(violated.any()):
            return False
        sign = torch.where(self.inequality | (self.point.values >= 0), 1.0, -1.0)
        rows = self.point.jacobian * sign[:, None] / self.steepness.clamp(min=1e-300)[:, None]
        chosen = violated | kept
        # The sum of the weights is an entry of its own, which is to be one.
        rows = torch.cat([rows, violated.to(rows)[:, None]], 1)[chosen]
        wanted = torch.zeros_like(rows[0])
        wanted[-1] = -1.0
        at = self.at_bounds
        if at is not None:
            no = torch.zeros_like(at.low[:1])
            at = AtBounds(torch.cat([at.low, no]), torch.cat([at.high, no]))
        weights = estimated_multipliers(
            rows,
            wanted,
            torch.zeros_like(rows[:, 0]),
            (self.inequality | violated)[chosen],
            at,
            self.point.precision,
        )
        total = rows.T @ weights
        left = total[:-1] if at is None else (total * at.free(total))[:-1]
        return bool(left.abs().max() <= _PARALLEL * total[-1])


def _largest(rows: Tensor) -> Tensor:
    return rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))
