"""Weight normalization with the right second derivative.

PyTorch's fused operation saves the norms, and its second derivative takes them for constants. Both
`torch.nn.utils.parametrizations.weight_norm` and `torch.nn.utils.weight_norm` call it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from torch_secondorder.interception import Substitution

__all__ = ["WEIGHT_NORM", "replacing_weight_norm", "weight_norm"]

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
    return v * (g / torch.norm_except_dim(v, 2, dim))


# The places where modules find the function when they are called.
_substitutions = [
    Substitution(torch, "_weight_norm", lambda _: weight_norm),
    Substitution(
        importlib.import_module("torch.nn.utils.weight_norm"), "_weight_norm", lambda _: weight_norm
    ),
]


@contextmanager
def replacing_weight_norm() -> Iterator[None]:
    """Inside, modules of PyTorch that normalize weights call `weight_norm`.

    It costs nothing an operation, and holds for all threads.
    """
    for substitution in _substitutions:
        substitution.begin()
    try:
        yield
    finally:
        for substitution in _substitutions:
            substitution.end()
