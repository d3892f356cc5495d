"""The augmented Lagrangian of constraints `h = 0` and `g <= 0`, and the rules for its parameters.

With multipliers `y` and penalties `rho`, a value `h` of an equality adds `y h + rho h^2 / 2` to the
loss, and a value `g` of an inequality adds `(max(0, y + rho g)^2 - y^2) / (2 rho)`. The derivative
by the value is the next multiplier. Hestenes 1969, Powell 1969, Rockafellar 1973; Nocedal and
Wright 2006, "Numerical Optimization", 17.4; Bertsekas 1982, "Constrained Optimization and Lagrange
Multiplier Methods", 2.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: A penalty is raised if the violation of its constraint did not fall to this share.
_REQUIRED_FALL = 0.25


class Signs:
    """The signs that multipliers may have: those of inequalities are not negative.

    Args:
        inequality: A mask of the inequalities, `(m,)`.
        like: A tensor of the dtype and device of the multipliers.
    """

    def __init__(self, inequality: Tensor, like: Tensor) -> None:
        self.free = not bool(inequality.any())
        self._none_free = bool(inequality.all())
        self._mask = inequality.to(like.device)
        # -inf and 0; such a vector is needed only where there are both kinds.
        self._lower = torch.where(self._mask, 0.0, -torch.inf).to(like.dtype)

    def clipped(self, y: Tensor) -> Tensor:
        """The nearest multipliers with these signs; a new tensor may be overwritten."""
        if self.free:
            return y
        return y.clamp_(min=0.0) if self._none_free else torch.maximum(y, self._lower)

    def floor(self, y: Tensor, inverse: Tensor) -> Tensor:
        """The value of each constraint below which it adds a constant, `(m,)`; see `augmented`.

        Args:
            y: The multipliers, `(m,)`.
            inverse: See `inverses`.
        """
        floor = y * inverse
        return floor if self._none_free else torch.where(self._mask, floor, -torch.inf)


def inverses(rho: Tensor) -> Tensor:
    """`-1 / rho`, finite also for a penalty of zero."""
    return (-1 / rho).clamp_(min=-1e30)


def augmented(values: Tensor, y: Tensor, half: Tensor, floor: Tensor | None) -> Tensor:
    """The sum of the terms, 0-dim, with the graph of the values.

    Written as `c (y + rho c / 2)` with `c = max(value, -y / rho)` for inequalities, which is the
    same as above: it takes fewer operations, loses no digits to a difference of squares, and needs
    no penalty above zero.

    Args:
        values: `(m,)`.
        y: The multipliers, `(m,)`; those of inequalities are not negative.
        half: Half the penalties, `(m,)`.
        floor: See `Signs.floor`; None without inequalities.
    """
    if floor is not None:
        values = torch.maximum(values, floor)
    return torch.addcmul(y, values, half).dot(values)


def next_multipliers(values: Tensor, y: Tensor, rate: Tensor | float, signs: Signs) -> Tensor:
    """The multipliers after a step of ascent, `(m,)`.

    Args:
        values: The values of the constraints.
        y: The multipliers.
        rate: The step: a number, or the penalties for the method of multipliers.
        signs: The signs of multipliers.
    """
    if isinstance(rate, Tensor):
        return signs.clipped(torch.addcmul(y, values, rate))
    return signs.clipped(torch.add(y, values, alpha=rate))


def violations(values: Tensor, inequality: Tensor) -> Tensor:
    """The violations of the constraints, `(m,)`."""
    return torch.where(inequality.to(values.device), values.clamp(min=0), values.abs())


def shortfalls(values: Tensor, floor: Tensor | None) -> Tensor:
    """The distances of the constraints from feasible and complementary, `(m,)`.

    `|h|` for an equality and `|max(g, -y / rho)|` for an inequality: what an inequality lacks whose
    multiplier should be zero counts as well. The change of the multiplier is that times `rho`.

    Args:
        values: The values of the constraints.
        floor: See `Signs.floor`; None without inequalities.
    """
    return (values if floor is None else torch.maximum(values, floor)).abs()


def is_slow(now: Tensor, before: Tensor, tolerance: float) -> Tensor:
    """A mask of the constraints that did not improve by a factor of four, `(m,)`.

    Args:
        now: See `shortfalls`; at the solution of the present subproblem.
        before: The same of the last one.
        tolerance: Shortfalls up to here need no improvement.
    """
    return (now > _REQUIRED_FALL * before) & (now > tolerance)
