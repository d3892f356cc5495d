"""Balls: tensors, rows or columns of a norm of at most the radius."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_number
from torch_secondorder.constraints._sets import (
    ConvexSet,
    Dims,
    check_dims,
    check_numbers,
    checked_dims,
    inner,
    shown,
    widened,
)
from torch_secondorder.constraints._threshold import reduced, threshold
from torch_secondorder.constraints.unit_norm import scaled_norm

__all__ = ["NormBall"]

# A point this close to the boundary is on it, in units of the relative precision.
_ON_BOUNDARY = 16.0


class NormBall(ConvexSet):
    """Tensors of a norm of at most the radius, as a whole or along some dimensions.

    Args:
        radius: The radius.
        p: The norm: 2 for the Euclidean one, 1 for the sum of absolute values, `math.inf` for the
            largest absolute value.
        dim: The dimensions that the norm is taken over, as in `torch.linalg.vector_norm`: 1 for
            rows, 0 for columns, None for the whole tensor.

    Raises:
        TypeError: `dim` is no integer, sequence of integers, or None.
        ValueError: The radius is not positive, the norm is another one, or `dim` is empty or has a
            dimension twice.

    >>> NormBall(2.0).project(torch.tensor([3.0, 4.0]))
    tensor([1.2000, 1.6000])
    >>> NormBall(2.0, p=1).project(torch.tensor([3.0, -4.0]))
    tensor([ 0.5000, -1.5000])
    """

    def __init__(self, radius: float = 1.0, p: float = 2, dim: Dims = None) -> None:
        check_number("radius", radius, above=0.0)
        if isinstance(p, bool) or p not in (1, 2, inf):
            raise ValueError(f"p must be 1, 2 or math.inf, got {p!r}")
        self.radius, self.p = float(radius), float(p)
        self.dim = checked_dims(dim)

    def check(self, tensor: Tensor) -> None:
        """See `TensorSet.check`."""
        check_numbers(tensor, f"NormBall(p={self.p:g})", real=self.p != 2)
        check_dims(tensor, self.dim, "NormBall")

    def _project(self, x: Tensor) -> Tensor:
        if self.p == inf:
            return x.clamp(-self.radius, self.radius)
        if self.p == 1:
            size = x.abs()
            outside = size.sum(self.dim, keepdim=True) > self.radius
            shrunk = x.sgn() * reduced(size, self.radius, self.dim).clamp(min=0)
            return torch.where(outside, shrunk, x)
        unit, scaled, norm = scaled_norm(x, self.dim)
        outside = norm > self.radius / unit
        shrunk = scaled * (self.radius / torch.where(outside, norm, 1))
        return torch.where(outside, shrunk, x)

    def _tangent(self, x: Tensor, v: Tensor) -> Tensor:
        edge = self.radius * (1 - _ON_BOUNDARY * torch.finfo(x.dtype).eps)
        if self.p == inf:
            blocked = ((x >= edge) & (v > 0)) | ((x <= -edge) & (v < 0))
            return torch.where(blocked, 0, v)
        if self.p == 1:
            dims = self.dim
            on = x.abs().sum(dims, keepdim=True) >= edge
            inside = x != 0
            outward = torch.where(inside, x.sgn() * v, v.abs())
            theta = threshold(outward, 0.0, inside, dims).clamp(min=0)
            moved = torch.where(
                inside, v - x.sgn() * theta, v.sgn() * (v.abs() - theta).clamp(min=0)
            )
            return torch.where(on, moved, v)
        unit, scaled, norm = scaled_norm(x, self.dim)
        n = scaled / norm.masked_fill(norm == 0, 1)
        outward = inner(n, v, self.dim).clamp(min=0)
        return torch.where(norm >= edge / unit, v - n * outward, v)

    def pressed(self, point: Tensor, v: Tensor) -> Tensor | None:
        """See `ConvexSet.pressed`."""
        if self.p == inf:
            return None
        x, v = widened(point), widened(v)
        edge = self.radius * (1 - _ON_BOUNDARY * torch.finfo(point.dtype).eps)
        return (self._norm(x) >= edge) & (inner(x, v - self._tangent(x, v), self.dim) > 0)

    def on_boundary(self, tensor: Tensor, where: Tensor) -> Tensor:
        """See `ConvexSet.on_boundary`."""
        x = widened(tensor)
        norm = self._norm(x)
        raised = x * (self.radius / torch.where(norm == 0, 1, norm))
        return torch.where(where & (norm > 0), raised, self._project(x)).to(tensor.dtype)

    def _norm(self, x: Tensor) -> Tensor:
        if self.p == 1:
            return x.abs().sum(self.dim, keepdim=True)
        unit, _, norm = scaled_norm(x, self.dim)
        return unit * norm

    def __repr__(self) -> str:
        return f"NormBall(radius={self.radius:g}, p={self.p:g}, dim={shown(self.dim)})"
