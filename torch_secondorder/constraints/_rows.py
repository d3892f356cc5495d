"""The Jacobian of constraints, row by row or several rows in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_secondorder._autograd.vectorized import (
    AT_ONCE,
    Parts,
    in_turn,
    several,
    vectorizing_pays,
)


def jacobian_rows(values: Tensor, params: Sequence[Tensor]) -> Parts:
    """The rows of a Jacobian, in parts shaped like the parameters; the graph stays.

    Args:
        values: `(m,)`, with their graph, `m > 0`.
        params: The parameters.

    Returns:
        For each parameter a tensor `(m, *shape)`, or None if no value depends on it.
    """

    def multiply(directions: Parts, batched: bool) -> Parts:
        return torch.autograd.grad(
            values,
            params,
            directions,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )

    m = len(values)
    size = sum(p.numel() for p in params)
    unit = torch.eye(m, dtype=values.dtype, device=values.device)
    if m == 1 or not vectorizing_pays(size, values.device):
        return in_turn(multiply, [unit])
    chunks = [several(multiply, [rows]) for rows in unit.split(AT_ONCE)]
    return [
        None if any(part is None for part in parts) else torch.cat(list(parts))
        for parts in zip(*chunks, strict=True)
    ]
