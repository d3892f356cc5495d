"""The transformations of `torch.func` that the others are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import vmap

from torch_secondorder._autograd.twice_differentiable import with_second_derivatives
from torch_secondorder._foundation.private_torch import load_forward_rules

__all__ = ["derivative", "jvp", "pullback", "push", "vectorized", "vjp"]


# Those of torch.func, with attention on the backend that has a forward mode and second derivatives.
jvp = wraps(torch.func.jvp)(with_second_derivatives(torch.func.jvp))
vjp = wraps(torch.func.vjp)(with_second_derivatives(torch.func.vjp))


def derivative(f: Callable[..., Any], inputs: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    """The change of a function's value along a direction, in forward mode.

    Raises:
        NotImplementedError: An operation has no rule for forward mode.
    """
    if not torch.compiler.is_compiling():
        load_forward_rules()
    try:
        return torch.func.jvp(f, inputs, tangents)[1]
    except RuntimeError as error:  # of which NotImplementedError is one
        # The second is what the rule of `mse_loss` says, which writes to zeros without memory.
        if not (isinstance(error, NotImplementedError) or "ZeroTensors" in str(error)):
            raise
        raise NotImplementedError(
            "an operation in the function has no forward mode: take `vhp` in the place of `hvp`, "
            f"and mode='reverse' for a Jacobian ({error})"
        ) from error


def pullback(f: Callable[..., Any], *inputs: Any) -> tuple[Any, Callable[..., tuple[Any, ...]]]:
    """The value of a function, and what multiplies with its Jacobian from the left."""
    return cast("tuple[Any, Callable[..., tuple[Any, ...]]]", torch.func.vjp(f, *inputs))


def push(
    f: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], tangents: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The products of the Jacobian with many directions.

    Args:
        f: A function of tensors, whose outputs are tensors.
        inputs: Where its Jacobian is taken.
        tangents: For each input a tensor of shape `(k, *input.shape)`.

    Returns:
        For each output a tensor of shape `(k, *output.shape)`.

    Raises:
        RuntimeError: `f` draws random numbers, or has an operation without forward mode.
    """

    def one(*tangents: Tensor) -> tuple[Tensor, ...]:
        return cast("tuple[Tensor, ...]", derivative(f, tuple(inputs), tangents))

    return cast("tuple[Tensor, ...]", vectorized(one, *tangents))


def vectorized(f: Callable[..., Any], *arguments: Any) -> Any:
    """`vmap(f)(*arguments)`, with an error that says what to do about random numbers."""
    try:
        return vmap(f)(*arguments)
    except RuntimeError as error:
        if "randomness" not in str(error):
            raise
        raise RuntimeError(
            "the function draws random numbers (dropout in train mode?), which would differ from "
            "one product to the next: put the module into eval mode, draw outside of the function "
            "and close over the numbers, or take jacobian(..., mode='reverse'), which calls the "
            "function once"
        ) from error
