"""The merit function of sequential quadratic programming: the augmented Lagrangian.

With values `c`, multipliers `y` and penalties `rho` (each `(m,)`, float64, on the CPU) the terms

    s (y + rho s / 2),    s = c for equalities,    s = max(c, -y / rho) for inequalities

are added to the loss. It is searched along a direction of the parameters and of the multipliers
together (Schittkowski 1982; Gill, Murray, Saunders 2005, "SNOPT: An SQP algorithm for large-scale
constrained optimization", section 2.4).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The share of `d'B d` by which the merit function is to fall along the line, to first order.
_SHARE = 0.5
# The least penalty, as a multiple of the inverse curvature along the constraint's gradient; and how
# many times the penalty needed now a penalty may be before it is lowered. If penalties are lowered
# faster, full steps are rejected more often; if they are not, one that was huge once lets only tiny
# steps through for ever.
_LEAST, _EXCESS = 0.3, 30.0
_DOUBLINGS = 80


@dataclass(slots=True)
class Merit:
    """The terms along a line, where the multipliers move as well.

    Attributes:
        inequality: A mask of the inequalities.
        multipliers: At the start of the line.
        change: Of the multipliers, along the whole line.
        penalties: Above zero.
    """

    inequality: Tensor
    multipliers: Tensor
    change: Tensor
    penalties: Tensor

    def terms(self, values: Tensor, t: float) -> float:
        """The terms at `t`."""
        y, shifted = self._shifted(values, t)
        total: float = (shifted @ (y + 0.5 * self.penalties * shifted)).item()
        return total

    def slope(self, values: Tensor, along: Tensor, t: float) -> float:
        """The derivative of the terms by `t`.

        Args:
            values: `c` at `t`.
            along: The derivative of `c` along the direction there.
            t: The place on the line.
        """
        y, shifted = self._shifted(values, t)
        total: float = ((y + self.penalties * shifted) @ along + shifted @ self.change).item()
        return total

    def _shifted(self, values: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """The multipliers at `t`, and `s`."""
        y = self.multipliers + t * self.change
        shifted = torch.maximum(values, -y / self.penalties)
        return y, torch.where(self.inequality, shifted, values)

    def raise_penalties(
        self, values: Tensor, along: Tensor, slope: float, bend: float, curvatures: Tensor
    ) -> bool:
        """Chooses the penalties for which the merit function falls enough; False if there are none.

        Penalties that are far larger than needed are lowered.

        Args:
            values: `c` at the start.
            along: Its derivative along the direction.
            slope: That of the loss.
            bend: `d'B d`.
            curvatures: `a'B^-1 a` with the gradients `a` of the constraints.
        """
        before = self.penalties
        self.penalties = least = _LEAST / curvatures
        if not self._falls(values, along, slope, bend):
            self.penalties = least.clone()
            # Of least norm to first order, where those of constraints that are kept do nothing.
            kept = self.inequality & (self.multipliers + least * values <= 0)
            squares = torch.where(kept, 0, values.square())
            missing = slope + self._slope_without(values, along) + _SHARE * bend
            scale = (squares @ squares).item()
            if missing > 0 and scale > 0:
                self.penalties = torch.maximum(least, 1.01 * missing * squares / scale)
        for _ in range(_DOUBLINGS):
            if self._falls(values, along, slope, bend):
                break
            self.penalties = 2 * self.penalties
        else:
            return False
        needed = self.penalties
        lowered = torch.where(before < _EXCESS * needed, before, (_EXCESS * before * needed).sqrt())
        self.penalties = torch.maximum(needed, lowered)
        if not self._falls(values, along, slope, bend):
            self.penalties = needed
        return True

    def _falls(self, values: Tensor, along: Tensor, slope: float, bend: float) -> bool:
        return slope + self.slope(values, along, 0.0) <= -_SHARE * bend

    def _slope_without(self, values: Tensor, along: Tensor) -> float:
        """The slope of the terms with penalties of zero."""
        total: float = (self.multipliers @ along + values @ self.change).item()
        return total
