"""Eigenbases of the factors of blocks, and moments in their coordinates."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_secondorder._optim.kronecker.stacks import Stack


def into(stack: Stack, blocks: Tensor, basis: str, out: Tensor | None = None) -> Tensor:
    """`Q_L' X Q_R`, the blocks in the coordinates of the bases."""
    for side in stack.sides:
        q = side[basis]
        blocks = torch.bmm(q.mT, blocks) if side.dim == 0 else torch.bmm(blocks, q)
    return blocks


def out_of(stack: Stack, blocks: Tensor, basis: str) -> Tensor:
    """`Q_L X Q_R'`, the inverse of `into`."""
    for side in stack.sides:
        q = side[basis]
        blocks = torch.bmm(q, blocks) if side.dim == 0 else torch.bmm(blocks, q.mT)
    return blocks
