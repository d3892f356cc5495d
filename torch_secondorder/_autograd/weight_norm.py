"""Weight normalization with the right second derivative.

PyTorch's fused operation saves the norms, and its second derivative takes them for constants. Both
`torch.nn.utils.parametrizations.weight_norm` and `torch.nn.utils.weight_norm` call it.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import Tensor

from torch_secondorder._foundation.private_torch import (
    FUSED_WEIGHT_NORM,
    WEIGHT_NORM_HOLDERS,
    WEIGHT_NORM_NAME,
)

__all__ = ["WEIGHT_NORM", "replace_weight_norm", "restore_weight_norm", "weight_norm"]

#: The function that `weight_norm` stands in for.
WEIGHT_NORM = FUSED_WEIGHT_NORM


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


_get = attrgetter(WEIGHT_NORM_NAME)


def replace_weight_norm() -> list[Any]:
    """Lets modules of PyTorch that normalize weights call `weight_norm`, in all threads.

    It costs nothing an operation.

    Returns:
        The functions that were there, for `restore_weight_norm`.
    """
    # Assignments alone: they are made around each small Jacobian.
    before = list(map(_get, WEIGHT_NORM_HOLDERS))
    for holder in WEIGHT_NORM_HOLDERS:
        setattr(holder, WEIGHT_NORM_NAME, weight_norm)
    return before


def restore_weight_norm(before: list[Any]) -> None:
    """Puts back the functions that `replace_weight_norm` found."""
    for holder, function in zip(WEIGHT_NORM_HOLDERS, before, strict=True):
        setattr(holder, WEIGHT_NORM_NAME, function)
