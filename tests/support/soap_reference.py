"""SOAP, parameter by parameter and block by block, without the package."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def cuts(size: int, longest: int | None) -> list[slice]:
    """The parts of a side: equal ones if at most twice as many suffice, longer ones first."""
    if longest is None or size <= longest:
        return [slice(0, size)]
    least = -(-size // longest)
    equal = [parts for parts in range(least, 2 * least + 1) if size % parts == 0]
    lengths = (
        [size // equal[0]] * equal[0]
        if equal
        else [size // least + (place < size % least) for place in range(least)]
    )
    ends = [sum(lengths[:place]) for place in range(len(lengths) + 1)]
    return [slice(*pair) for pair in pairwise(ends)]


def ramped(factor: Tensor) -> Tensor:
    """A factor with a largest diagonal entry of one, and a ramp that breaks ties."""
    largest = factor.diagonal().max()
    ramp = torch.linspace(torch.finfo(factor.dtype).eps ** 0.75, 0, len(factor)).to(factor)
    return factor / (largest if largest > 0 else 1.0) + ramp.diag()


class Block:
    """One block of a matrix, with its own Adam; without factors for a parameter of one dimension.

    Attributes:
        exact: The number of exact decompositions.
    """

    exact = 0

    def __init__(self, shape: tuple[int, ...], like: Tensor, has_factor: Iterable[bool]) -> None:
        self.m, self.v = torch.zeros(shape).to(like), torch.zeros(shape).to(like)
        self.factors = [
            torch.zeros(n, n).to(like) if has else None
            for n, has in zip(shape, has_factor, strict=True)
        ]
        self.bases = [None if f is None else torch.eye(len(f)).to(f) for f in self.factors]
        self.step = 0

    def rotated(self, x: Tensor, *, back: bool = False) -> Tensor:
        left, right = self.bases
        if left is not None:
            x = left @ x if back else left.T @ x
        if right is not None:
            x = x @ right.T if back else x @ right
        return x

    def direction(self, g: Tensor, group: dict[str, Any]) -> Tensor:
        """The direction of a step, and new bases after it."""
        self.step += 1
        t, (b1, b2), period = self.step, group["betas"], group["update_period"]
        b = b2 if group["shampoo_beta"] is None else group["shampoo_beta"]
        grams = (g @ g.T, g.T @ g) if self.factors else ()
        for factor, gram in zip(self.factors, grams, strict=True):
            if factor is not None:
                factor.mul_(b).add_((1 - b) * gram)
        projected = self.rotated(g) if self.factors else g
        self.m = b1 * self.m + (1 - b1) * projected
        self.v = b2 * self.v + (1 - b2) * projected**2
        step = (self.m / (1 - b1**t)) / ((self.v / (1 - b2**t)).sqrt() + group["eps"])
        step = self.rotated(step, back=True) if self.factors else step
        if self.factors and t == min(10, period):
            for dim, factor in enumerate(self.factors):
                if factor is not None:
                    self.bases[dim] = self.eigenvectors(factor)
            self.m, self.v = torch.zeros_like(self.m), torch.zeros_like(self.v)
        elif self.factors and t > min(10, period) and t % period == 0:
            self.refresh()
        return step

    def eigenvectors(self, factor: Tensor) -> Tensor:
        self.exact += 1
        return torch.linalg.eigh(ramped(factor))[1].flip(1)

    def refresh(self) -> None:
        mean = self.rotated(self.m, back=True)
        for dim, (factor, basis) in enumerate(zip(self.factors, self.bases, strict=True)):
            if factor is None:
                continue
            inside = basis.T @ ramped(factor) @ basis
            order = inside.diagonal().argsort(descending=True)
            self.v = self.v.index_select(dim, order)
            off = 1 - inside.diagonal().square().sum() / inside.square().sum()
            if off > 0.5:
                self.bases[dim] = self.eigenvectors(factor)
            else:
                self.bases[dim] = torch.linalg.qr(ramped(factor) @ basis[:, order])[0]
        self.m = self.rotated(mean)


class SOAPReference:
    """The algorithm of `torch_secondorder.SOAP` on groups of parameters that have gradients."""

    def __init__(self, groups: list[dict[str, Any]], **defaults: Any) -> None:
        usual = {
            "lr": 3e-3,
            "betas": (0.95, 0.95),
            "eps": 1e-8,
            "weight_decay": 0.0,
            "shampoo_beta": None,
            "update_period": 10,
            "block_size": 256,
            "max_precond_dim": 10000,
            "merge_dims": True,
            "maximize": False,
        }
        self.groups = [usual | defaults | group for group in groups]
        self.blocks: dict[Tensor, list[tuple[Any, Block]]] = {}

    def parts(self, p: Tensor, group: dict[str, Any]) -> list[tuple[Any, Block]]:
        """The blocks of a parameter, with their places in `matrices(p)`."""
        if p.dim() < 2:
            return [(..., Block(tuple(p.shape), p, ()))] if p.dim() == 0 else self.vector(p)
        count, rows, cols = self.matrices(p, group).shape
        limit = group["max_precond_dim"]
        has = [n > 1 and (limit is None or n <= limit) for n in (rows, cols)]
        if not any(has):
            return self.vector(p)
        size = group["block_size"]
        return [
            ((k, i, j), Block((i.stop - i.start, j.stop - j.start), p, has))
            for k in range(count)
            for i in cuts(rows, size if has[0] else None)
            for j in cuts(cols, size if has[1] else None)
        ]

    @staticmethod
    def vector(p: Tensor) -> list[tuple[Any, Block]]:
        block = Block((), p, ())
        block.m, block.v = torch.zeros_like(p), torch.zeros_like(p)
        return [(..., block)]

    @staticmethod
    def matrices(x: Tensor, group: dict[str, Any]) -> Tensor:
        if group["merge_dims"]:
            return x.reshape(1, len(x), -1)
        return x.reshape(-1, *x.shape[-2:])

    @property
    def exact(self) -> int:
        """The number of exact decompositions."""
        return sum(block.exact for parts in self.blocks.values() for _, block in parts)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p not in self.blocks:
                    self.blocks[p] = self.parts(p, group)
                g = -p.grad if group["maximize"] else p.grad
                whole = torch.empty_like(g)
                plain = len(self.blocks[p]) == 1 and self.blocks[p][0][0] is ...
                source = g if plain else self.matrices(g, group)
                target = whole if plain else self.matrices(whole, group)
                for place, block in self.blocks[p]:
                    target[place] = block.direction(source[place], group)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * target.reshape(p.shape))
