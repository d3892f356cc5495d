"""Hyperparameters of matrices of blocks: their checks, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from torch_secondorder._foundation.checks import check_integer, check_number


def check_blocks(group: Mapping[str, Any]) -> None:
    """Raises a ValueError if a hyperparameter of blocks and their factors is out of range.

    Args:
        group: Has `shampoo_beta`, `block_size`, `max_precond_dim`, `merge_dims` and `factor_dtype`.

    >>> blocks = {"shampoo_beta": None, "block_size": 0, "max_precond_dim": None}
    >>> check_blocks(blocks | {"merge_dims": True, "factor_dtype": None})
    Traceback (most recent call last):
        ...
    ValueError: block_size must be an integer of at least 1 or None, got 0
    """
    check_number("shampoo_beta", group["shampoo_beta"], low=0.0, below=1.0, optional=True)
    for name in ("block_size", "max_precond_dim"):
        check_integer(name, group[name], optional=True)
    merges, dtype = group["merge_dims"], group["factor_dtype"]
    if not isinstance(merges, bool):
        raise ValueError(f"merge_dims must be True or False, got {merges!r}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(
            f"factor_dtype must be a floating-point dtype, such as torch.bfloat16, or None, "
            f"got {dtype!r}"
        )


def factor_beta(group: Mapping[str, Any]) -> float:
    """The decay rate of the factors.

    >>> factor_beta({"shampoo_beta": None, "betas": (0.9, 0.95)})
    0.95
    """
    beta: float | None = group["shampoo_beta"]
    return float(group["betas"][1]) if beta is None else beta
