"""Sums over the residuals of a loss, where their Jacobian itself is not to be had."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class NormalEquations(ABC):
    """`J'J` of residuals whose Jacobian `J` is never there as a whole, such as those of a data set.

    Attributes:
        rows: The number of residuals.
        size: `n`.
        finite: Whether the residuals are finite.
        rest_diagonal: See `ResidualJacobian`.
        rest_is_diagonal: Likewise.
    """

    rows: int
    size: int
    finite: bool
    rest_diagonal: float | Tensor
    rest_is_diagonal: bool

    @abstractmethod
    def normal_matrix(self) -> Tensor:
        """`J'J`, shape `(n, n)`, symmetric to the last bit; do not write into it."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """The diagonal of `J'J`, shape `(n,)`."""
