"""Convolutions whose second derivatives cost what they have to.

The double backward that PyTorch has for a convolution computes derivatives that nobody asked for
(by the data, in the first layer), and one of the others as a convolution with kernels as large as
the image. For a small network that is a fifth of a gradient and a Hessian product together. Here
each is one call of a kernel made for it, where it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from torch_secondorder._foundation.private_torch import (
    executes,
    forward_mode_active,
    innermost_transform,
    is_batched_gradient,
)

#: The functions that `convolution` stands in for, with the number of spatial dimensions.
CONVOLUTIONS: dict[Callable[..., Any], int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}

# Stride, padding, dilation, groups.
_Geometry = tuple[list[int], list[int], list[int], int]


def convolution(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """Calls one of `torch.conv1d`, `torch.conv2d`, `torch.conv3d`.

    Args:
        func: Which one.
        *args: Its arguments.
        **kwargs: Its arguments.

    Returns:
        The same values; derivatives of any order are right, and the second is faster.
    """
    result = _substituted(CONVOLUTIONS[func], *args, **kwargs)
    if result is None:
        result = func(*args, **kwargs)
    return result


def _substituted(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    plain = (
        weight.requires_grad
        and input.dim() == dims + 2
        and not isinstance(padding, str)
        and input.dtype == weight.dtype
        and not input.is_complex()
        and not torch.is_autocast_enabled(input.device.type)
        and not torch.compiler.is_compiling()
        # Transforms of torch.func go by rules of their own, and so does forward mode.
        and innermost_transform() is None
        and not forward_mode_active()
    )
    if not plain:
        return None
    geometry = (*(_each(n, dims) for n in (stride, padding, dilation)), groups)
    result: Tensor = _Convolution.apply(input, weight, bias, geometry)  # type: ignore[no-untyped-call]
    return result


def _batched(gradient: Tensor) -> bool:
    """True for several gradients at once, for `torch.func.vmap` or for `is_grads_batched`."""
    return innermost_transform() is not None or is_batched_gradient(gradient)


def with_second_derivatives(
    node: Any, derivatives: Sequence[Tensor | None], cotangent: Tensor
) -> tuple[Tensor | None, ...] | None:
    """The derivatives that a convolution's node has computed, with the faster second derivatives.

    Args:
        node: `ConvolutionBackward0`.
        derivatives: By input, weight and bias.
        cotangent: What the node was given.

    Returns:
        The same values; None for a convolution that is left as it is.
    """
    try:
        x, w = node._saved_input, node._saved_weight
    except RuntimeError:  # inside a checkpoint, which gives what was saved only once
        return None
    if node._saved_transposed or not 3 <= x.dim() <= 5 or x.dtype != w.dtype or x.is_complex():
        return None
    geometry = (
        *(list(n) for n in (node._saved_stride, node._saved_padding, node._saved_dilation)),
        node._saved_groups,
    )
    wanted = (*(d is not None for d in derivatives),)
    found: tuple[Tensor | None, ...] = _KnownBackward.apply(  # type: ignore[no-untyped-call]
        cotangent, x, w, geometry, wanted, [None if d is None else d.detach() for d in derivatives]
    )
    return found


def geometry_of(node: Any) -> tuple[Tensor, _Geometry] | None:
    """The input and the geometry of a convolution in a graph; None for a transposed one.

    Args:
        node: `ConvolutionBackward0`, or that of `convolution`.
    """
    if type(node).__name__ == _NODE:
        return node.saved_tensors[0].detach(), node.geometry
    if node._saved_transposed:
        return None
    parts = (node._saved_stride, node._saved_padding, node._saved_dilation)
    stride, padding, dilation = map(list, parts)
    return node._saved_input.detach(), (stride, padding, dilation, node._saved_groups)


def _each(value: Any, dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def _forward(x: Tensor, w: Tensor, b: Tensor | None, geometry: _Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    return torch.convolution(x, w, b, stride, padding, dilation, False, [0] * len(stride), groups)


def _backward(
    g: Tensor, x: Tensor, w: Tensor, geometry: _Geometry, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Derivatives by input, weight and bias, None where not wanted."""
    stride, padding, dilation, groups = geometry
    results: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
        g,
        x,
        w,
        [g.shape[1]],
        stride,
        padding,
        dilation,
        False,
        [0] * len(stride),
        groups,
        list(wanted),
    )
    by_input, by_weight, by_bias = results
    return by_input, by_weight, by_bias


def _executes(ctx: Any, index: int) -> bool:
    """True if the pass that is running needs the derivative by an input."""
    edges = ctx.next_functions  # of tensors among the inputs; a bias comes last or is none
    node = edges[index][0] if index < len(edges) else None
    if node is None or hasattr(node, "variable"):  # of a leaf the engine does not tell
        return node is not None
    return bool(executes(node))


class _Convolution(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry
        return _forward(x, w, b, geometry)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        wanted = (_executes(ctx, 0), _executes(ctx, 1), _executes(ctx, 2))
        # Where several gradients are made in one pass the graph of a function here would be lost.
        again = torch.is_grad_enabled() and not _batched(g)
        derive = _ConvolutionBackward.apply if again else _backward
        return (*derive(g, x, w, ctx.geometry, wanted), None)


#: The name of the node that `convolution` makes.
_NODE = "_ConvolutionBackward"


class _ConvolutionBackward(Function):
    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        w: Tensor,
        geometry: _Geometry,
        wanted: tuple[bool, bool, bool],
    ) -> Any:
        ctx.save_for_backward(g, x, w)
        ctx.set_materialize_grads(False)
        ctx.geometry = geometry
        return _backward(g, x, w, geometry, wanted)

    @staticmethod
    def backward(ctx: Any, v_x: Tensor | None, v_w: Tensor | None, v_b: Tensor | None) -> Any:
        g, x, w = ctx.saved_tensors
        geometry = ctx.geometry
        by_g = by_x = by_w = None
        if _executes(ctx, 0):
            by_g = _pushed(x, w, v_x, v_w, v_b, geometry, g)
        if v_w is not None and _executes(ctx, 1):
            by_x = _backward(g, x, v_w, geometry, (True, False, False))[0]
        if v_x is not None and _executes(ctx, 2):
            by_w = _backward(g, v_x, w, geometry, (False, True, False))[1]
        return by_g, by_x, by_w, None, None


class _KnownBackward(_ConvolutionBackward):
    """The same where the values are there already."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        g: Tensor,
        x: Tensor,
        w: Tensor,
        geometry: _Geometry,
        wanted: tuple[bool, bool, bool],
        values: list[Tensor | None],
    ) -> Any:
        ctx.save_for_backward(g, x, w)
        ctx.set_materialize_grads(False)
        ctx.geometry = geometry
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return (*_ConvolutionBackward.backward(ctx, *cotangents), None)


def _pushed(
    x: Tensor,
    w: Tensor,
    v_x: Tensor | None,
    v_w: Tensor | None,
    v_b: Tensor | None,
    geometry: _Geometry,
    like: Tensor,
) -> Tensor | None:
    """The change of the output with those of input, weight and bias."""
    result = None
    if v_w is not None:
        result = _forward(x, v_w, v_b, geometry)
    elif v_b is not None:
        result = v_b.view(-1, *[1] * (like.dim() - 2)).expand_as(like)
    if v_x is None:
        return result
    other = _forward(v_x, w, None, geometry)
    return other if result is None else other + result
