"""Spheres: tensors, rows or columns of norm one."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_secondorder.constraints._sets import (
    Dims,
    Manifold,
    all_dims,
    check_dims,
    check_numbers,
    checked_dims,
    inner,
    shown,
)

__all__ = ["UnitNorm"]


class UnitNorm(Manifold):
    """Tensors whose Euclidean norm is one, as a whole or along some dimensions.

    The nearest point to a tensor is the tensor over its norm. All points are equally near to zero;
    of these the one with equal entries is taken. A complex number counts as two real ones.

    Args:
        dim: The dimensions that the norm is taken over, as in `torch.linalg.vector_norm`: 1 for
            rows of norm one, 0 for columns, None for the whole tensor.

    Raises:
        TypeError: `dim` is no integer, sequence of integers, or None.
        ValueError: `dim` is empty or has a dimension twice.

    >>> UnitNorm(dim=1).project(torch.tensor([[3.0, 4.0], [0.0, 0.5]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 1.0000]])
    >>> UnitNorm().distance(torch.tensor([3.0, 4.0]))
    tensor(4.)

    A unit vector in the plane has one angle, which a parametrization may train instead:

    >>> from torch.nn.utils.parametrize import register_parametrization
    >>> class Angle(torch.nn.Module):
    ...     def forward(self, theta):
    ...         return torch.cat([theta.cos(), theta.sin()])
    ...
    ...     def right_inverse(self, x):
    ...         return torch.atan2(x[1:], x[:1])
    >>> model = torch.nn.Module()
    >>> model.x = torch.nn.Parameter(torch.tensor([0.0, 1.0]))
    >>> model = register_parametrization(model, "x", Angle(), unsafe=True)
    >>> model.x.norm().item(), [tuple(p.shape) for p in model.parameters()]
    (1.0, [(1,)])
    """

    def __init__(self, dim: Dims = None) -> None:
        self.dim = checked_dims(dim)

    def check(self, tensor: Tensor) -> None:
        """See `TensorSet.check`."""
        check_numbers(tensor, "UnitNorm")
        check_dims(tensor, self.dim, "UnitNorm")

    def _project(self, x: Tensor) -> Tensor:
        _, scaled, norm = scaled_norm(x, self.dim)
        zero, count = norm == 0, x.numel() // norm.numel()
        return (scaled / norm.masked_fill(zero, 1)).masked_fill(zero, count**-0.5)

    def _tangent(self, x: Tensor, v: Tensor) -> Tensor:
        return v - x * (inner(x, v, self.dim) / inner(x, x, self.dim))

    def _differential(self, w: Tensor, v: Tensor) -> Tensor:
        unit, scaled, norm = scaled_norm(w, self.dim)
        zero = norm == 0
        divisor = norm.masked_fill(zero, 1)
        w = scaled / divisor
        along = (v - w * inner(w, v, self.dim)) / unit / divisor
        return along.masked_fill(zero, 0)

    def _weingarten(self, x: Tensor, v: Tensor, gradient: Tensor) -> Tensor:
        return v * -inner(x, gradient, self.dim)

    def __repr__(self) -> str:
        return f"UnitNorm(dim={shown(self.dim)})"


def scaled_norm(x: Tensor, dims: tuple[int, ...] | None) -> tuple[Tensor, Tensor, Tensor]:
    """A unit near the largest entries, the tensor in that unit, and its norms.

    Unit and norms keep the dimensions. No square overflows.
    """
    along = all_dims(x, dims)
    largest = x.detach().abs()
    largest = largest.amax(along, keepdim=True) if along else largest
    unit = largest.masked_fill(largest == 0, 1)
    scaled = x / unit
    if not along:
        return unit, scaled, scaled.abs()
    return unit, scaled, torch.linalg.vector_norm(scaled, dim=along, keepdim=True)
