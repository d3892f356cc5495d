"""Sums of squares, whose derivatives take one pass.

The derivative that PyTorch has for a square makes a tensor of twice the argument and multiplies it
by an expanded gradient. Beside a training step on a CPU that is most of what a penalty in closed
form costs, where every pass over the weights counts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from torch_secondorder._foundation.private_torch import innermost_transform

__all__ = ["logistic_slope", "squared_sum"]

# Numbers from which on a pass takes longer than a function in Python.
_WORTHWHILE = 2**15


def squared_sum(t: Tensor, dim: int | None = None) -> Tensor:
    """The sum of the squares of all numbers, or along one dimension.

    >>> squared_sum(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 1)
    tensor([ 5., 25.])
    """
    if not _pays(t):
        return t.square().sum(dim)
    result: Tensor = _SquaredSum.apply(t, dim)  # type: ignore[no-untyped-call]
    return result


def logistic_slope(h: Tensor) -> Tensor:
    """The derivative of the logistic function, from its value.

    >>> logistic_slope(torch.tensor([0.5, 1.0]))
    tensor([0.2500, 0.0000])
    """
    if not _pays(h):
        return h * (1 - h)
    result: Tensor = _LogisticSlope.apply(h)  # type: ignore[no-untyped-call]
    return result


def _pays(t: Tensor) -> bool:
    # Transforms of torch.func go by rules of their own.
    return t.numel() >= _WORTHWHILE and innermost_transform() is None


class _SquaredSum(Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, dim: int | None) -> Tensor:
        ctx.save_for_backward(t)
        ctx.dim = dim
        # Norms and dot products make no tensor of the squares, but add up with less care: of 1.6
        # million numbers in float32 a norm has four right digits, this sum seven.
        return t.square().sum(dim)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (t,) = ctx.saved_tensors
        twice = 2 * g
        return (twice if ctx.dim is None else twice.unsqueeze(ctx.dim)) * t, None


class _LogisticSlope(Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return torch.addcmul(h, h, h, value=-1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        result: Tensor = g * (1 - 2 * h)
        return result
