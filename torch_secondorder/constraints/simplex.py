"""Simplices: numbers of at least zero with a given sum."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_number
from torch_secondorder.constraints._sets import (
    ConvexSet,
    Dims,
    check_dims,
    check_numbers,
    checked_dims,
    shown,
)
from torch_secondorder.constraints._threshold import reduced, threshold

__all__ = ["Simplex"]


class Simplex(ConvexSet):
    """Tensors of numbers of at least zero that add up to a total, such as probabilities.

    The nearest point is found by sorting (Held, Wolfe and Crowder 1974; Duchi and others 2008).

    Args:
        total: The sum.
        dim: The dimensions that the sum is over: 1 for rows, 0 for columns, None for the whole
            tensor.

    Raises:
        TypeError: `dim` is no integer, sequence of integers, or None.
        ValueError: The total is not positive, or `dim` is empty or has a dimension twice.

    >>> Simplex().project(torch.tensor([0.5, 1.0, -1.0]))
    tensor([0.2500, 0.7500, 0.0000])
    """

    def __init__(self, total: float = 1.0, dim: Dims = None) -> None:
        check_number("total", total, above=0.0)
        self.total = float(total)
        self.dim = checked_dims(dim)

    def check(self, tensor: Tensor) -> None:
        """See `TensorSet.check`."""
        check_numbers(tensor, "Simplex", real=True)
        check_dims(tensor, self.dim, "Simplex")

    def _project(self, x: Tensor) -> Tensor:
        return reduced(x, self.total, self.dim).clamp(min=0)

    def _kept(self, x: Tensor) -> Tensor:
        return x.clamp(min=0)  # a logarithm or root of a number just below zero is NaN

    def _tangent(self, x: Tensor, v: Tensor) -> Tensor:
        inside = x > 0
        moved = v - threshold(v, 0.0, inside, self.dim)
        return torch.where(inside, moved, moved.clamp(min=0))

    def __repr__(self) -> str:
        return f"Simplex(total={self.total:g}, dim={shown(self.dim)})"
