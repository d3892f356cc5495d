"""Operators some of whose entries are no numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_secondorder.curvature.base import LinearOperator


class Masked(LinearOperator):
    """`A` on some coordinates, a multiple of the identity on the others, and zero in between.

    Args:
        operator: `A`; what it makes of the other coordinates need not be finite.
        kept: Whether a coordinate is one of `A`; shape `(n,)`, bool.
        diagonal: The multiple.

    >>> from torch_secondorder.curvature import Diagonal
    >>> A = Diagonal(torch.tensor([1.0, torch.nan]))
    >>> Masked(A, torch.tensor([True, False]), 5.0) @ torch.tensor([2.0, 3.0])
    tensor([ 2., 15.])
    """

    def __init__(self, operator: LinearOperator, kept: Tensor, diagonal: float) -> None:
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device
        self.space = operator.space
        self._operator, self._kept, self._diagonal = operator, kept, diagonal

    def matvec(self, v: Tensor) -> Tensor:
        """See `LinearOperator.matvec`."""
        inside = self._operator.matvec(torch.where(self._kept, v, 0.0))
        return torch.where(self._kept, inside, self._diagonal * v)
