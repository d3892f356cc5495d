"""Rectangular matrices with chosen singular values."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def with_singular_values(m: int, n: int, values: Sequence[float] | Tensor, seed: int = 0) -> Tensor:
    """A random matrix with these singular values, and zero for those that are not given."""
    s = torch.as_tensor(values, dtype=torch.float64)
    U = torch.linalg.qr(gaussian(m, m, seed=2 * seed))[0][:, : len(s)]
    V = torch.linalg.qr(gaussian(n, n, seed=2 * seed + 1))[0][:, : len(s)]
    return (U * s) @ V.T


def graded(m: int, n: int, condition: float, seed: int = 0, rank: int | None = None) -> Tensor:
    """A random matrix whose singular values fall from 1 to `1 / condition`."""
    rank = min(m, n) if rank is None else rank
    s = torch.tensor(condition, dtype=torch.float64) ** -torch.linspace(0, 1, rank).double()
    return with_singular_values(m, n, s, seed)


class Counting:
    """A matrix as an operator that counts its products and spoils one of them."""

    def __init__(self, matrix: Tensor, spoil: int = -1) -> None:
        self.matrix, self.spoil = matrix, spoil
        self.products = 0

    def matvec(self, v: Tensor) -> Tensor:
        return self._counted(self.matrix @ v)

    def rmatvec(self, u: Tensor) -> Tensor:
        return self._counted(self.matrix.T @ u)

    def _counted(self, product: Tensor) -> Tensor:
        self.products += 1
        if self.products == self.spoil:
            product[0] = torch.nan
        return product


def falls(values: Sequence[float], slack: float = 1e-10) -> bool:
    """True if a sequence never grows."""
    return all(b <= a * (1 + slack) for a, b in pairwise(values))
