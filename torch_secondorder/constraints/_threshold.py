"""Thresholds of sums of positive parts, which projections onto simplices and 1-norm balls need."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from torch_secondorder.constraints._sets import all_dims


def threshold(a: Tensor, total: float, free: Tensor | None, dims: tuple[int, ...] | None) -> Tensor:
    """The number `theta` at which `sum(max(a - theta, 0))` is `total`, by sorting.

    Held, Wolfe and Crowder 1974, "Validation of subgradient optimization"; Duchi and others 2008,
    "Efficient projections onto the l1-ball for learning in high dimensions".

    Args:
        a: Any numbers.
        total: At least zero.
        free: A mask of entries that count as `a - theta`, whatever the sign; None for none.
        dims: The dimensions that the sum is over; None for all.

    Returns:
        `theta`, with these dimensions kept.
    """
    flat, shape = flattened(a, dims)
    size = flat.shape[-1]
    order = flat
    if free is None:
        at_first, count_first = flat.new_zeros(()), 0 * flat[..., :1]
    else:
        mask = flattened(free, dims)[0]
        at_first = torch.where(mask, flat, 0).sum(-1, keepdim=True)
        count_first = mask.sum(-1, keepdim=True).to(flat.dtype)
        order = torch.where(mask, -torch.inf, flat)
    order = order.sort(dim=-1, descending=True).values
    counts = count_first + torch.arange(1, size + 1, dtype=flat.dtype, device=flat.device)
    finite = torch.where(order.isneginf(), 0, order)
    candidates = (finite.cumsum(-1) + at_first - total) / counts
    taken = (order > candidates).sum(-1, keepdim=True)
    none = (at_first - total) / count_first.clamp(min=1)
    theta = torch.where(taken > 0, candidates.gather(-1, (taken - 1).clamp(min=0)), none)
    return theta.reshape(shape)


def flattened(a: Tensor, dims: tuple[int, ...] | None) -> tuple[Tensor, list[int]]:
    """A tensor with some dimensions as the last one, `(..., k)`, and the shape that keeps them."""
    along = [d % a.dim() for d in all_dims(a, dims)]
    others = [d for d in range(a.dim()) if d not in along]
    shape = [1 if d in along else a.shape[d] for d in range(a.dim())]
    moved = a.permute(*others, *along)
    return moved.reshape(*moved.shape[: len(others)], prod(a.shape[d] for d in along)), shape


def reduced(a: Tensor, total: float, dims: tuple[int, ...] | None) -> Tensor:
    """The numbers less their `threshold`: those above zero add up to the total."""
    # The largest becomes zero, exactly: what is left does not cancel, however large they are.
    along = all_dims(a, dims)
    shifted = a - a.detach().amax(along, keepdim=True) if along else a - a.detach()
    return shifted - threshold(shifted, total, None, dims)
