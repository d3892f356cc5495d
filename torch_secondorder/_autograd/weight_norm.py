"""Weight normalization with the right second derivative.

PyTorch's fused operation saves the norms, and its second derivative takes them for constants. Both
`torch.nn.utils.parametrizations.weight_norm` and `torch.nn.utils.weight_norm` call it.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

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


# The modules of PyTorch that look the function up when they are called.
_HOLDERS = (torch, importlib.import_module("torch.nn.utils.weight_norm"))


def replace_weight_norm() -> list[Any]:
    """Lets modules of PyTorch that normalize weights call `weight_norm`, in all threads.

    It costs nothing an operation.

    Returns:
        The functions that were there, for `restore_weight_norm`.
    """
    # Assignments alone: they are made around each small Jacobian.
    before = [holder._weight_norm for holder in _HOLDERS]
    for holder in _HOLDERS:
        setattr(holder, "_weight_norm", weight_norm)  # noqa: B010
    return before


def restore_weight_norm(before: list[Any]) -> None:
    """Puts back the functions that `replace_weight_norm` found."""
    for holder, function in zip(_HOLDERS, before, strict=True):
        setattr(holder, "_weight_norm", function)  # noqa: B010
