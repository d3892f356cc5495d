"""Checks of the hyperparameters that matrices of blocks have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from torch_secondorder._foundation.checks import check_integer


def check_blocks(group: Mapping[str, Any]) -> None:
    """Raises a ValueError if a hyperparameter of blocks and their factors is out of range.

    Args:
        group: Has `block_size`, `max_precond_dim`, `merge_dims` and `factor_dtype`.

    >>> blocks = {"block_size": 0, "max_precond_dim": None}
    >>> check_blocks(blocks | {"merge_dims": True, "factor_dtype": None})
    Traceback (most recent call last):
        ...
    ValueError: block_size must be an integer of at least 1 or None, got 0
    """
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
