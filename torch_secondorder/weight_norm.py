"""Weight normalization with the right second derivative.

PyTorch's fused operation saves the norms, and its second derivative takes them for constants. Both
`torch.nn.utils.parametrizations.weight_norm` and `torch.nn.utils.weight_norm` call it.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from torch_secondorder.interception import Substitution

__all__ = ["WEIGHT_NORM", "replace_weight_norm", "restore_weight_norm", "weight_norm"]

#: The function that `weight_norm` stands in for.
WEIGHT_NORM = torch._weight_norm


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """`g * v / |v|` with derivatives of any order.

    Args:
        v: The direction.
        g: The length for each index of a dimension, broadcast to `v`.
        dim: Which one; -1 for one length of all.

    Returns:
        Shaped like `v`.
    """
    others = [i for i in range(v.dim()) if dim == -1 or i != dim % v.dim()]
    if not others:
        return v * (g / v.abs())
    # Of operations that have all rules: those of `vector_norm` fail inside vmap of jvp.
    squares = (v * v).sum(others, keepdim=dim != -1)
    return v * (g / squares.sqrt())


# The places where modules find the function when they are called.
_substitutions = [
    Substitution(torch, "_weight_norm", lambda _: weight_norm),
    Substitution(
        importlib.import_module("torch.nn.utils.weight_norm"), "_weight_norm", lambda _: weight_norm
    ),
]


def replace_weight_norm() -> None:
    """Lets modules of PyTorch that normalize weights call `weight_norm`, in all threads.

    It costs nothing an operation. Each call needs one of `restore_weight_norm`.
    """
    for substitution in _substitutions:
        substitution.begin()


def restore_weight_norm() -> None:
    """Ends what `replace_weight_norm` began; with the last of them all is as it was."""
    for substitution in _substitutions:
        substitution.end()
