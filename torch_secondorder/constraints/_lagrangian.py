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


def floor_of(y: Tensor, rho: Tensor, lower: Tensor) -> Tensor:
    """The value of each constraint below which it adds a constant, `(m,)`; see `augmented`.

    Args:
        y: The multipliers, `(m,)`.
        rho: The penalties, `(m,)`.
        lower: The least multiplier of each constraint, see `lower_bounds`.
    """
    # Without a penalty there is none, and a multiplier of zero adds nothing.
    return torch.where(lower == 0, (-y / rho).nan_to_num(nan=-torch.inf, neginf=-torch.inf), lower)


def augmented(values: Tensor, y: Tensor, half: Tensor, floor: Tensor | None) -> Tensor:
    """The sum of the terms, 0-dim, with the graph of the values.

    Written as `c (y + rho c / 2)` with `c = max(value, -y / rho)` for inequalities, which is the
    same as above: it takes fewer operations, loses no digits to a difference of squares, and needs
    no penalty above zero.

    Args:
        values: `(m,)`.
        y: The multipliers, `(m,)`; those of inequalities are not negative.
        half: Half the penalties, `(m,)`.
        floor: See `floor_of`; None without inequalities.
    """
    if floor is not None:
        values = torch.maximum(values, floor)
    return torch.addcmul(y, values, half).dot(values)


def lower_bounds(inequality: Tensor, like: Tensor) -> Tensor:
    """The least multiplier of each constraint: zero for inequalities, minus infinity for others.

    Args:
        inequality: A mask, `(m,)`.
        like: A tensor of the wanted dtype and device.
    """
    bounds = torch.full(inequality.shape, -torch.inf, dtype=like.dtype, device=like.device)
    return bounds.masked_fill_(inequality.to(like.device), 0.0)


def next_multipliers(values: Tensor, y: Tensor, rate: Tensor | float, lower: Tensor) -> Tensor:
    """The multipliers after a step of ascent, `(m,)`.

    Args:
        values: The values of the constraints.
        y: The multipliers.
        rate: The step: the penalties for the method of multipliers.
        lower: See `lower_bounds`.
    """
    return torch.maximum(y + rate * values, lower)


def violations(values: Tensor, inequality: Tensor) -> Tensor:
    """The violations of the constraints, `(m,)`."""
    return torch.where(inequality.to(values.device), values.clamp(min=0), values.abs())


def shortfalls(values: Tensor, floor: Tensor) -> Tensor:
    """The distances of the constraints from feasible and complementary, `(m,)`.

    `|h|` for an equality and `|max(g, -y / rho)|` for an inequality: what an inequality lacks whose
    multiplier should be zero counts as well. The change of the multiplier is that times `rho`.

    Args:
        values: The values of the constraints.
        floor: See `floor_of`.
    """
    return torch.maximum(values, floor).abs()


def is_slow(now: Tensor, before: Tensor, tolerance: float) -> Tensor:
    """A mask of the constraints that did not improve by a factor of four, `(m,)`.

    Args:
        now: See `shortfalls`; at the solution of the present subproblem.
        before: The same of the last one.
        tolerance: Shortfalls up to here need no improvement.
    """
    return (now > _REQUIRED_FALL * before) & (now > tolerance)
