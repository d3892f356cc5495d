"""Bounds in our form and in SciPy's, as a lower and an upper bound for each leaf of the tree."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torch_secondorder._foundation.private_torch import pytree
from torch_secondorder._params.bounds import fitted_pair
from torch_secondorder.minimization._trees import as_tensor

#: A bound of one leaf: a number, a tensor that broadcasts to the leaf's shape, or None.
Bound: TypeAlias = "float | Tensor | None"

_FORMS = (
    "bounds must be (low, high), each a number, a tensor, a tree like x0 of these, or None; or as "
    "in SciPy a pair (min, max) for each entry of a 1-d x0, or an object with lb and ub"
)


def resolve_bounds(
    bounds: Any, leaves: Sequence[Tensor], names: Sequence[str], structure: Any
) -> list[tuple[Bound, Bound]]:
    """The lower and the upper bound of each leaf.

    Args:
        bounds: In any of the forms that `minimize` takes.
        leaves: The leaves of `x0`.
        names: Their names in errors.
        structure: Of the tree `x0`; None for one tensor.

    Raises:
        TypeError: The bounds have none of the forms.
        ValueError: Their number or shape does not fit, they cross or are NaN, or belong to complex
            numbers.
    """
    if hasattr(bounds, "lb") and hasattr(bounds, "ub"):
        low, high = bounds.lb, bounds.ub
    elif structure is None and _are_pairs(bounds):
        low, high = _columns(bounds, leaves[0])
    elif isinstance(bounds, (tuple, list)) and len(bounds) == 2:
        low, high = bounds
    else:
        raise TypeError(f"{_FORMS}; got {type(bounds).__name__}")
    lows = _spread(low, leaves, names, structure, "low")
    highs = _spread(high, leaves, names, structure, "high")
    return [
        _checked(leaf, low, high, name)
        for leaf, low, high, name in zip(leaves, lows, highs, names, strict=True)
    ]


def _checked(leaf: Tensor, low: Bound, high: Bound, name: str) -> tuple[Bound, Bound]:
    """The bounds of a leaf, with tensors in its precision, rounded into the box."""
    if low is None and high is None:
        return None, None
    lower, upper = fitted_pair(leaf, low, high, name)
    return lower if isinstance(low, Tensor) else low, upper if isinstance(high, Tensor) else high


def _are_pairs(bounds: Any) -> bool:
    return (
        isinstance(bounds, (tuple, list))
        and len(bounds) > 0
        and all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in bounds)
    )


def _columns(pairs: Sequence[Sequence[Any]], x: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds from pairs, None standing for no bound."""
    if x.dim() != 1:
        raise ValueError(
            f"pairs (min, max) are bounds of a 1-d x0, which has shape {tuple(x.shape)}: pass "
            "(low, high) with tensors of that shape"
        )
    if len(pairs) != len(x):
        raise ValueError(f"x0 has {len(x)} entries, and bounds has {len(pairs)} pairs (min, max)")
    columns = zip(*pairs, strict=True)
    low, high = (
        torch.tensor([end if v is None else float(v) for v in column], dtype=torch.float64)
        for column, end in zip(columns, (-inf, inf), strict=True)
    )
    return low.to(x), high.to(x)


def _spread(
    bound: Any, leaves: Sequence[Tensor], names: Sequence[str], structure: Any, side: str
) -> list[Bound]:
    """One bound for each leaf."""
    found: list[Any]
    if bound is None or isinstance(bound, (int, float)):
        found = [bound] * len(leaves)
    elif structure is None:
        found = [bound]
    elif isinstance(bound, Tensor):
        if bound.dim():
            raise ValueError(
                f"the {side} bound is a tensor of shape {tuple(bound.shape)}, and x0 is a tree: "
                "pass a number, or a tree like x0"
            )
        found = [bound] * len(leaves)
    else:
        found, its = pytree.tree_flatten(bound)
        if its != structure:
            raise ValueError(f"the {side} bound is a tree {its}, but x0 is {structure}")
    triples = zip(found, leaves, names, strict=True)
    return [_fitted(value, leaf, name, side) for value, leaf, name in triples]


def _fitted(bound: Any, leaf: Tensor, name: str, side: str) -> Bound:
    """A bound as a number, or as a tensor of the leaf's shape."""
    if isinstance(bound, (bool, list, tuple)):  # two lists of two would be pairs
        raise TypeError(f"{_FORMS}; the {side} bound of {name} is a {type(bound).__name__}")
    if bound is None or isinstance(bound, (int, float)):
        return bound
    try:
        found = as_tensor(bound)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{_FORMS}; the {side} bound of {name} is {type(bound).__name__}"
        ) from error
    try:
        return found.to(leaf.device).broadcast_to(leaf.shape)
    except RuntimeError as error:
        raise ValueError(
            f"the {side} bound of {name} has shape {tuple(found.shape)}, which does not broadcast "
            f"to {tuple(leaf.shape)}"
        ) from error
