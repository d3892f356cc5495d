"""The augmented Lagrangian of constraints `h = 0` and `g <= 0`, and the multipliers' update.

With multipliers `y` and penalties `rho`, a value `h` of an equality adds `y h + rho h^2 / 2` to the
loss, and a value `g` of an inequality adds `(max(0, y + rho g)^2 - y^2) / (2 rho)`. The derivative
by the value is the next multiplier. Hestenes 1969, Powell 1969, Rockafellar 1973; Nocedal and
Wright 2006, "Numerical Optimization", 17.4.
"""

from __future__ import annotations

import torch
from torch import Tensor


def augmented(values: Tensor, y: Tensor, rho: Tensor, inequality: Tensor) -> Tensor:
    """The sum of the terms, 0-dim, with the graph of the values.

    Args:
        values: `(m,)`.
        y: The multipliers, `(m,)`; those of inequalities are not negative.
        rho: The penalties, `(m,)`, above zero.
        inequality: A mask, `(m,)`.
    """
    shifted = next_multipliers(values, y, rho, inequality)
    return ((shifted.square() - y.square()) / (2 * rho)).sum()


def next_multipliers(values: Tensor, y: Tensor, rho: Tensor, inequality: Tensor) -> Tensor:
    """The multipliers after a step of the method of multipliers, `(m,)`; see `augmented`."""
    shifted = y + rho * values
    return torch.where(inequality, shifted.clamp(min=0), shifted)


def violations(values: Tensor, inequality: Tensor) -> Tensor:
    """By how much each constraint is violated, `(m,)`."""
    return torch.where(inequality, values.clamp(min=0), values.abs())
