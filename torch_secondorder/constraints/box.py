"""Boxes: tensors with lower and upper bounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_secondorder._params.box import cut_bounds
from torch_secondorder.constraints._sets import ConvexSet, check_numbers, length, widened

__all__ = ["Box"]


class Box(ConvexSet):
    """Tensors within bounds.

    Bounds are rounded into the box where a tensor has less precision than they have.

    Args:
        low: The lower bound: a number, a tensor that broadcasts, or None for none.
        high: The upper bound.

    Raises:
        TypeError: A bound is neither a number, nor a tensor of real numbers, nor None.
        ValueError: Both bounds are None, one is NaN, or they cross.

    >>> Box(0.0, torch.tensor([1.0, 2.0])).project(torch.tensor([-1.0, 3.0]))
    tensor([0., 2.])
    """

    def __init__(self, low: float | Tensor | None = None, high: float | Tensor | None = None):
        if low is None and high is None:
            raise ValueError("a Box needs a lower or an upper bound, got None for both")
        self.low, self.high = _checked("low", low), _checked("high", high)
        if low is not None and high is not None:
            lows, highs = (torch.as_tensor(b, dtype=torch.float64).cpu() for b in (low, high))
            if bool((lows > highs).any()):
                raise ValueError(f"the bounds cross: low is {low}, high is {high}")
        self._cut: tuple[Any, tuple[Tensor, Tensor]] | None = None

    def check(self, tensor: Tensor) -> None:
        """See `TensorSet.check`."""
        check_numbers(tensor, "Box", real=True)
        for bound in (self.low, self.high):
            if isinstance(bound, Tensor):
                try:
                    fits = torch.broadcast_shapes(bound.shape, tensor.shape) == tensor.shape
                except RuntimeError:
                    fits = False
                if not fits:
                    raise ValueError(
                        f"a bound of shape {tuple(bound.shape)} does not broadcast to a tensor of "
                        f"shape {tuple(tensor.shape)}"
                    )

    def _bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The bounds in the precision and shape of a tensor, made once for each kind."""
        kind = (x.dtype, x.device, x.shape)
        if self._cut is None or self._cut[0] != kind:
            self._cut = kind, cut_bounds(self.low, self.high, x)
        return self._cut[1]

    def project(self, tensor: Tensor) -> Tensor:
        """See `TensorSet.project`."""
        self.check(tensor)  # in the tensor's own precision, which bounds are rounded to
        return self._project(tensor)

    def _project(self, x: Tensor) -> Tensor:
        return torch.clamp(x, *self._bounds(x))

    def tangent(self, point: Tensor, v: Tensor) -> Tensor:
        """See `TensorSet.tangent`."""
        self.check(point)
        return self._tangent(point, v)

    def _tangent(self, x: Tensor, v: Tensor) -> Tensor:
        low, high = self._bounds(x)
        return torch.where(((x <= low) & (v < 0)) | ((x >= high) & (v > 0)), 0, v)

    def distance(self, tensor: Tensor) -> Tensor:
        """See `TensorSet.distance`."""
        # Not as in other sets: bounds are rounded to the tensor's own precision first.
        return length(widened(tensor - self.project(tensor)))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_cut": None}

    def __repr__(self) -> str:
        return f"Box(low={_short(self.low)}, high={_short(self.high)})"


def _checked(name: str, bound: Any) -> float | Tensor | None:
    if bound is None:
        return None
    if isinstance(bound, Tensor):
        if bound.is_complex() or bound.dtype == torch.bool:
            raise TypeError(f"{name} must hold real numbers, got a tensor of {bound.dtype}")
        values = bound.detach()
        found: float | Tensor = values if values.is_floating_point() else values.double()
    elif isinstance(bound, (int, float)) and not isinstance(bound, bool):
        found = float(bound)
    else:
        raise TypeError(f"{name} must be a number, a tensor or None, got {type(bound).__name__}")
    if bool(torch.as_tensor(found).isnan().any()):
        raise ValueError(f"{name} is NaN; None stands for no bound")
    return found


def _short(bound: float | Tensor | None) -> str:
    return f"tensor of shape {tuple(bound.shape)}" if isinstance(bound, Tensor) else f"{bound}"
