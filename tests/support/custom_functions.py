"""Custom autograd functions, with second derivatives and without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Scalar = Callable[[Tensor], Tensor]


def custom_function(value: Scalar, slope: Scalar, kind: str = "right") -> Any:
    """A custom function, right or wrong in one of the ways that are met."""

    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.slope = slope(x)
        return value(x)

    def right(ctx: Any, g: Tensor) -> Tensor:
        return slope(ctx.saved_tensors[0]) * g

    def no_graph(ctx: Any, g: Tensor) -> Tensor:
        with torch.no_grad():
            return slope(ctx.saved_tensors[0]) * g

    def saved(ctx: Any, g: Tensor) -> Tensor:
        result: Tensor = ctx.slope * g
        return result

    def detached(ctx: Any, g: Tensor) -> Tensor:
        return slope(ctx.saved_tensors[0]) * g.detach()

    backward = {
        "right": right,
        "no_graph": no_graph,
        "saved": saved,
        "detached": detached,
        "once": once_differentiable(right),
    }[kind]
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"Custom_{kind}", (Function,), methods)


def cube(x: Tensor) -> Tensor:
    return x**3


def slope_of_cube(x: Tensor) -> Tensor:
    return 3 * x**2


class Cube(Function):
    """The cube; its backward pass cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * grad


class NanCurvature(Function):
    """The square, with a second derivative that is not a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * NanSlope.apply(x)


class NanSlope(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * torch.nan
