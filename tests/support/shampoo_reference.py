"""Shampoo written down block by block, after the paper and without the package.

One Python loop over parameters and blocks, no stacks, no flat vectors, eigenvalues by a singular
value decomposition. For float64 tensors on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor


def matrix_of(tensor: Tensor, merge_dims: bool) -> Tensor:
    """A tensor as a stack of matrices `(count, rows, columns)`, a view where there is one."""
    if merge_dims:
        return tensor.reshape(1, tensor.shape[0], -1)
    return tensor.reshape(prod(tensor.shape[:-2]), *tensor.shape[-2:])


def cuts(size: int, block_size: int | None) -> list[slice]:
    """Equal parts of a side, up to twice as many as needed; else the first are one longer."""
    if block_size is None or size <= block_size:
        return [slice(0, size)]
    least = ceil(size / block_size)
    equal = [count for count in range(least, 2 * least + 1) if size % count == 0]
    count = min(equal, default=least)
    short, longer = divmod(size, count)
    ends = [0]
    for i in range(count):
        ends.append(ends[-1] + short + (i < longer))
    return [slice(a, b) for a, b in pairwise(ends)]


class Side:
    """The factor of one side of a block, and its inverse root."""

    def __init__(self, dim: int, size: int) -> None:
        self.dim = dim
        self.factor = torch.zeros(size, size, dtype=torch.float64)
        self.root = torch.eye(size, dtype=torch.float64)

    def apply(self, matrix: Tensor) -> Tensor:
        return self.root @ matrix if self.dim == 0 else matrix @ self.root


class Piece:
    """A block of a parameter: moments, and factors of the sides that have one."""

    def __init__(self, shape: tuple[int, int], with_factor: tuple[bool, bool]) -> None:
        self.average = torch.zeros(shape, dtype=torch.float64)
        self.squares = torch.zeros(shape, dtype=torch.float64)
        self.sides = [Side(dim, shape[dim]) for dim in (0, 1) if with_factor[dim]]


class PlainShampoo:
    """The reference; hyperparameters as those of the optimizer, all to be given.

    Args:
        groups: Parameters with their hyperparameters.
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self.groups = groups
        self.pieces: dict[Tensor, list[Piece]] = {}
        self.counts: dict[Tensor, int] = {}

    @torch.no_grad()
    def step(self, loss: Callable[[], Tensor] | None = None) -> None:
        """One step; gradients by the loss, or those that are there."""
        params = [p for group in self.groups for p in group["params"]]
        if loss is not None:
            for p in params:
                p.grad = None
            with torch.enable_grad():
                loss().backward()
        for group in self.groups:
            for p in group["params"]:
                if p.grad is not None and p.requires_grad:
                    sign = -1.0 if group["maximize"] else 1.0
                    self._update(p, sign * p.grad, group)

    def _update(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        step = self.counts[p] = self.counts.get(p, 0) + 1
        p.mul_(1 - group["lr"] * group["weight_decay"])
        if p.dim() < 2:
            pieces = self.pieces.setdefault(p, [Piece((1, p.numel()), (False, False))])
            change = self._direction(pieces[0], gradient.reshape(1, -1), step, group)
            p.sub_(group["lr"] * change.reshape(p.shape))
            return
        matrices = matrix_of(gradient, group["merge_dims"])
        change = torch.empty_like(matrices)
        rows, columns = (self._cuts(size, group) for size in matrices.shape[1:])
        limit = group["max_precond_dim"]
        has = [size > 1 and (limit is None or size <= limit) for size in matrices.shape[1:]]
        places = [(i, r, c) for i in range(len(matrices)) for r in rows for c in columns]
        if p not in self.pieces:
            self.pieces[p] = [
                Piece(tuple(matrices[place].shape), (has[0], has[1])) for place in places
            ]
        for place, piece in zip(places, self.pieces[p], strict=True):
            change[place] = self._direction(piece, matrices[place], step, group)
        p.sub_(group["lr"] * change.reshape(p.shape))

    def _cuts(self, size: int, group: dict[str, Any]) -> list[slice]:
        limit = group["max_precond_dim"]
        if limit is not None and size > limit:
            return [slice(0, size)]
        return cuts(size, group["block_size"])

    def _direction(self, piece: Piece, g: Tensor, step: int, group: dict[str, Any]) -> Tensor:
        beta1, beta2 = group["betas"]
        factor_beta = beta2 if group["shampoo_beta"] is None else group["shampoo_beta"]
        piece.average = beta1 * piece.average + (1 - beta1) * g
        piece.squares = beta2 * piece.squares + (1 - beta2) * g**2
        average = piece.average / (1 - beta1**step)
        adam = average / ((piece.squares / (1 - beta2**step)).sqrt() + group["eps"])
        direction = adam
        if piece.sides:
            for side in piece.sides:
                gram = g @ g.T if side.dim == 0 else g.T @ g
                side.factor = factor_beta * side.factor + (1 - factor_beta) * gram
            if self._refreshes(step, group):
                for side in piece.sides:
                    side.root = root_of(
                        side.factor / (1 - factor_beta**step), len(piece.sides), group
                    )
            direction = average
            for side in piece.sides:
                direction = side.apply(direction)
            graft = {"adam": adam, "sgd": average, None: None}[group["grafting"]]
            if graft is not None and direction.norm() > 0:
                direction = direction * (graft.norm() / direction.norm())
        return direction

    def _refreshes(self, step: int, group: dict[str, Any]) -> bool:
        if step < group["update_period"]:
            return step in (1, 2, 4, 8, 16, 32, 64, 128)
        return step % group["update_period"] == 0


def root_of(factor: Tensor, sides: int, group: dict[str, Any]) -> Tensor:
    """The inverse root of a factor, of degree `-1 / (2 * sides)` in it."""
    usual = 1 / (2 * sides)
    power = usual if group["exponent"] is None else group["exponent"]
    u, values, _ = torch.linalg.svd(factor)
    if not values.max() > 0:
        return torch.eye(len(factor), dtype=factor.dtype)
    values = values + group["matrix_eps"] * values.max()
    return factor.trace() ** (power - usual) * (u * values**-power) @ u.T
