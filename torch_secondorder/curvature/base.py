"""The one thing solvers know of curvature: a symmetric operator that multiplies."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["LinearOperator"]


class LinearOperator(ABC):
    """A symmetric `n x n` matrix that is never formed.

    Attributes:
        size: `n`.
    """

    size: int

    @abstractmethod
    def matvec(self, v: Tensor) -> Tensor:
        """The product with a vector: shape `(n,)` to `(n,)`."""

    def matmat(self, V: Tensor) -> Tensor:
        """The product with several vectors at once: shape `(n, k)` to `(n, k)`.

        One by one here; an operator that can do them in one pass overrides it.
        """
        return torch.stack([self.matvec(v) for v in V.unbind(1)], dim=1)

    def __matmul__(self, other: Tensor) -> Tensor:
        self._check(other)
        return self.matvec(other) if other.dim() == 1 else self.matmat(other)

    def _check(self, other: Tensor) -> None:
        if other.dim() not in (1, 2) or other.shape[0] != self.size:
            raise ValueError(
                f"this operator multiplies shapes ({self.size},) and ({self.size}, k), got "
                f"{tuple(other.shape)}"
            )
