"""A box in the space of the parameters: bounds on every entry, and points that stay inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_secondorder._params.vector import ParameterVector

# Positions this close to a bound that they move to are on it, in units of the relative precision:
# `x + (bound - x)` need not be the bound.
_ON_BOUND = 4.0


class Box:
    """Lower and upper bounds of the parameters of a vector.

    Positions are those of the parameters; steps, gradients and distances are in the work space,
    with the scale of the vector.

    Args:
        vector: The parameters.
        low: Lower bounds, `(n,)`; minus infinity for none.
        high: Upper bounds, `(n,)`, not below the lower ones.
    """

    def __init__(self, vector: ParameterVector, low: Tensor, high: Tensor) -> None:
        self.low, self.high = low, high
        self._scale = vector.scale
        self._rounding = _ON_BOUND * torch.finfo(vector.dtype).eps

    def project(self, position: Tensor) -> Tensor:
        """The point of the box next to a position."""
        return torch.clamp(position, self.low, self.high)

    def moved(self, position: Tensor, step: Tensor, t: float) -> Tensor:
        """The position `t` times a step away, in the box to the last bit."""
        move = step if self._scale is None else step * self._scale
        there = torch.add(position, move, alpha=t)
        # What has gone too far counts as arrived as well.
        near = torch.maximum(position.abs(), there.abs()).mul_(self._rounding)
        arrived = (there - self.low <= near) & (move < 0)
        there = torch.where(arrived, self.low, there)
        arrived = (self.high - there <= near) & (move > 0)
        return torch.where(arrived, self.high, there)

    def room(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and largest step from a position in the box, entry by entry."""
        low, high = self.low - position, self.high - position
        if self._scale is None:
            return low, high
        # What has a scale of zero does not move: no step is too long.
        free = self._scale == 0
        return (
            torch.where(free, -torch.inf, low / self._scale),
            torch.where(free, torch.inf, high / self._scale),
        )

    def projected(self, position: Tensor, grad: Tensor) -> Tensor:
        """The projected gradient: how far a step of the negative gradient gets in the box.

        It is zero where the conditions of first order hold.
        """
        low, high = self.room(position)
        # An infinite slope towards a bound stays what it is: no step could stand on it.
        return torch.where(grad.isinf(), grad, torch.clamp(-grad, low, high))

    def active(self, position: Tensor) -> Tensor:
        """The number of entries at a bound, 0-dim."""
        return ((position == self.low) | (position == self.high)).sum()


def inward(bound: Tensor, dtype: torch.dtype, *, up: bool) -> Tensor:
    """A bound in the precision of a parameter, rounded into the box.

    Args:
        bound: The bound, in any precision.
        dtype: The parameter's.
        up: Whether to round up, as for a lower bound.
    """
    near = bound.to(dtype)
    if torch.promote_types(dtype, bound.dtype) == dtype:
        return near
    back = near.to(bound.dtype)
    outside = back < bound if up else back > bound
    towards = torch.full_like(near, torch.inf if up else -torch.inf)
    return torch.where(outside, torch.nextafter(near, towards), near)


def cut_bounds(low: Any, high: Any, p: Tensor) -> tuple[Tensor, Tensor]:
    """The bounds of a parameter in its own precision and shape, as values that it can have.

    Args:
        low: A lower bound: a number, a tensor that broadcasts to the parameter, or None.
        high: An upper bound.
        p: The parameter.
    """
    pair = []
    for bound, up in ((low, True), (high, False)):
        if bound is None:
            bound = -torch.inf if up else torch.inf
        if isinstance(bound, Tensor) and bound.dim():
            # On the CPU: other devices lack some precisions and operations, and it is done once.
            cut = inward(bound.detach().cpu(), p.dtype, up=up).to(p.device)
        else:  # a number is rounded as torch does where it compares tensors with numbers
            cut = torch.tensor(float(bound), dtype=p.dtype, device=p.device)
        pair.append(cut.broadcast_to(p.shape))
    lower, upper = pair
    # Between two bounds there may be no number of this precision.
    crossed = lower > upper
    nearest = torch.as_tensor(low if low is not None else -torch.inf).to(p.device, p.dtype)
    return torch.where(crossed, nearest, lower), torch.where(crossed, nearest, upper)
