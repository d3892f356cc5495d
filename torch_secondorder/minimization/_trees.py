"""Starts: a tensor, or a tree of tensors; and numbers or arrays as tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_secondorder._foundation.private_torch import pytree


def leaves_of(x0: Any) -> tuple[list[Tensor], list[str], Any]:
    """The leaves, their names, and the structure (None for one tensor).

    Args:
        x0: The tree.

    Raises:
        TypeError: A leaf is no dense tensor of real or complex numbers.
        ValueError: There are no leaves.
    """
    if isinstance(x0, Tensor):
        leaves, names, structure = [x0], ["x0"], None
    else:
        found, structure = pytree.tree_flatten_with_path(x0)
        names = ["x0" + pytree.keystr(path) for path, _ in found]
        leaves = [leaf for _, leaf in found]
    for name, leaf in zip(names, leaves, strict=True):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{name} is {type(leaf).__name__}, not a tensor: x0 must be a tensor or a dict, "
                "list or tuple of tensors, such as torch.tensor([1.0, 2.0], dtype=torch.float64)"
            )
        if leaf.layout is not torch.strided:
            raise TypeError(
                f"{name} has layout {leaf.layout}: pass {name}.to_dense(), or only its values and "
                "make the sparse tensor of them in fun"
            )
        if not (leaf.is_floating_point() or leaf.is_complex()):
            raise TypeError(
                f"{name} has dtype {leaf.dtype}, and a minimization moves real or complex numbers: "
                f"pass {name}.double(), or close over it if it is a constant"
            )
    if not leaves:
        raise ValueError("x0 holds no tensor: there is nothing to minimize over")
    return leaves, names, structure


def as_tensor(found: Any) -> Tensor:
    """Numbers in float64, or an array, as a tensor; a copy of an array, which may be read-only."""
    if isinstance(found, Tensor):
        return found
    if hasattr(found, "__array__"):
        return torch.as_tensor(found.copy() if hasattr(found, "copy") else found)
    return torch.as_tensor(found, dtype=torch.float64)
