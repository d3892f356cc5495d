"""The one thing solvers know of curvature: a symmetric operator that multiplies."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from torch_secondorder._autograd.graph import Graph, Overwritten
from torch_secondorder._autograd.vectorized import (
    AT_ONCE,
    at_once,
    in_turn,
    many_at_once,
    products_at_once,
    vectorizing_pays,
)
from torch_secondorder._objective.base import Evaluation, Slot
from torch_secondorder._params.space import WHOLE, Space
from torch_secondorder.curvature.kronecker import KroneckerFactors

_T = TypeVar("_T")

__all__ = ["Damped", "Diagonal", "FromOutputs", "LinearOperator", "Linearized"]

# Rows of a matrix that are made symmetric at a time: a whole transpose takes the memory of another.
_ROWS = 256


def symmetrized_(matrix: Tensor) -> Tensor:
    """The mean of a matrix and its transpose, in the memory of the matrix."""
    for start in range(0, len(matrix), _ROWS):
        rows, columns = matrix[start : start + _ROWS, start:], matrix[start:, start : start + _ROWS]
        mean = torch.add(rows, columns.T).mul_(0.5)
        rows.copy_(mean)
        columns.copy_(mean.T)
    return matrix


class LinearOperator(ABC):
    """A symmetric `n x n` matrix that is never formed.

    Attributes:
        size: `n`.
        dtype: Of the vectors it multiplies.
        device: Of the vectors it multiplies.
        space: The space of these vectors, which computes their norms and inner products.

    >>> A = Diagonal(torch.tensor([1.0, 2.0]))
    >>> A @ torch.ones(2), A.size
    (tensor([1., 2.]), 2)
    """

    size: int
    dtype: torch.dtype
    device: torch.device
    space: Space = WHOLE

    @abstractmethod
    def matvec(self, v: Tensor) -> Tensor:
        """The product with a vector: shape `(n,)` to `(n,)`, a new tensor that may be changed."""

    def matmat(self, V: Tensor) -> Tensor:
        """The product with several vectors at once: shape `(n, k)` to `(n, k)`.

        One by one here; an operator that can do them in one pass overrides it.
        """
        return torch.stack([self.matvec(v) for v in V.T.contiguous()]).T

    def dense(self) -> Tensor:
        """The matrix itself, `(n, n)`, from `n` products; symmetric to the last bit."""
        return symmetrized_(self.matmat(torch.eye(self.size, dtype=self.dtype, device=self.device)))

    def __matmul__(self, other: Tensor) -> Tensor:
        self._check(other)
        return self.matvec(other) if other.dim() == 1 else self.matmat(other)

    def _check(self, other: Tensor) -> None:
        if other.dim() not in (1, 2) or other.shape[0] != self.size:
            raise ValueError(
                f"this operator multiplies shapes ({self.size},) and ({self.size}, k), got "
                f"{tuple(other.shape)}"
            )


@runtime_checkable
class FromOutputs(Protocol):
    """A curvature made from model outputs: what preconditioners can ask of it.

    >>> from torch_secondorder import FunctionalObjective
    >>> from torch_secondorder.curvature import GaussNewton
    >>> x, y = torch.tensor([[1.0, 2.0]]), torch.zeros(1)
    >>> loss = FunctionalObjective(lambda w: torch.nn.functional.mse_loss(x @ w, y), torch.ones(2))
    >>> curvature: FromOutputs = GaussNewton(loss.evaluate(curvature=True))
    >>> curvature.diagonal().shape
    torch.Size([2])
    """

    def slots(self) -> list[Slot]:
        """The place of each parameter in the vectors multiplied."""
        ...  # pragma: no cover - a protocol

    def diagonal(self, n_samples: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """See `GaussNewton.diagonal`."""
        ...  # pragma: no cover - a protocol

    def factors(
        self, generator: torch.Generator | None = None, largest: float = math.inf
    ) -> list[KroneckerFactors]:
        """See `GaussNewton.factors`."""
        ...  # pragma: no cover - a protocol


class Diagonal(LinearOperator):
    """A diagonal matrix.

    Args:
        entries: Shape `(n,)`.

    >>> Diagonal(torch.tensor([1.0, 2.0])) @ torch.tensor([3.0, 4.0])
    tensor([3., 8.])
    """

    def __init__(self, entries: Tensor) -> None:
        self.entries = entries
        self.size = len(entries)
        self.dtype, self.device = entries.dtype, entries.device

    def matvec(self, v: Tensor) -> Tensor:
        """See `LinearOperator.matvec`."""
        return self.entries * v

    def matmat(self, V: Tensor) -> Tensor:
        """See `LinearOperator.matmat`."""
        return self.entries[:, None] * V


class Damped(LinearOperator):
    """`A + damping I`, whatever `damping` is at the time of the product.

    Args:
        operator: `A`.
        damping: A number of at least zero.

    >>> Damped(Diagonal(torch.tensor([1.0, 2.0])), 10.0) @ torch.ones(2)
    tensor([11., 12.])
    """

    def __init__(self, operator: LinearOperator, damping: float) -> None:
        self.operator = operator
        self.damping = damping
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device
        self.space = operator.space

    def matvec(self, v: Tensor) -> Tensor:
        """See `LinearOperator.matvec`."""
        product, damping = self.operator.matvec(v), self.damping
        if product is v:  # an operator may be the identity
            return v * (1 + damping)
        return product.add_(v, alpha=damping) if damping else product

    def matmat(self, V: Tensor) -> Tensor:
        """See `LinearOperator.matmat`."""
        product, damping = self.operator.matmat(V), self.damping
        if product is V:
            return V * (1 + damping)
        return product.add_(V, alpha=damping) if damping else product


class Linearized(LinearOperator):
    """An operator made from the retained graph of an evaluation.

    Args:
        evaluation: Made by `Objective.evaluate(curvature=True)`.

    Raises:
        ValueError: The evaluation was made without curvature, or with too little for the operator.
    """

    #: Whether it is made from the gradient's graph, and not from Jacobians alone.
    _twice = True
    #: Whether it is a Hessian, which the curvature of a manifold of parameters is a part of.
    _bends = False

    def __init__(self, evaluation: Evaluation) -> None:
        linearization = evaluation.linearization
        if linearization is None:
            raise ValueError(
                "this evaluation has no curvature: make it with evaluate(curvature=True)"
            )
        linearization.check()
        if self._twice:
            linearization.graph.require_second_derivatives()
        self._linearization = linearization
        self._vectorizes = True
        self._at_once: int | None = None  # vectors in one pass of `matmat`
        self.size = linearization.size
        self.dtype, self.device = evaluation.grad.dtype, evaluation.grad.device

    @abstractmethod
    def _multiply(self, tangents: Sequence[Tensor], batched: bool) -> Sequence[Tensor | None]:
        """The product with parts shaped like the parameters, see `Linearization.product`."""

    def matvec(self, v: Tensor) -> Tensor:
        """See `LinearOperator.matvec`."""
        try:
            return self._linearization.product(v, self._multiply, bends=self._bends)
        except Overwritten:
            if not self._renewed():
                raise
            return self._linearization.product(v, self._multiply, bends=self._bends)

    def matmat(self, V: Tensor) -> Tensor:
        """See `LinearOperator.matmat`; vectorized, some at once, where that pays."""
        if self._at_once is None:
            graph, alone = self._linearization.graph, self._linearization.ranks.count == 1
            if alone:
                self._at_once = products_at_once(graph, self.size, self.dtype, self.device)
            else:  # ranks need the same number
                self._at_once = AT_ONCE if vectorizing_pays(self.size, self.device) else 1
        if self._at_once == 1:
            return super().matmat(V)
        rows = V.T.contiguous().split(self._at_once)
        return torch.cat([self._product_with_rows(r) for r in rows]).T

    def dense(self) -> Tensor:
        """See `LinearOperator.dense`; as many products in a pass as its memory allows."""
        matrix = torch.empty(self.size, self.size, dtype=self.dtype, device=self.device)
        linearization = self._linearization
        # Ranks take part in each other's passes and need the same number of them.
        alone = linearization.ranks.count == 1
        count = many_at_once(linearization.graph, self.device) if alone else AT_ONCE
        for start in range(0, self.size, count):
            rows = matrix[start : start + count]
            if count == 1:
                unit = torch.zeros_like(rows[0])
                unit[start] = 1.0
                rows[0] = self.matvec(unit)
                continue
            units = torch.zeros_like(rows)
            units[:, start:].fill_diagonal_(1.0)
            rows.copy_(self._product_with_rows(units))
        return symmetrized_(matrix)

    def _product_with_rows(self, rows: Tensor) -> Tensor:
        multiply, bends = self._multiply_rows, self._bends
        return self._retried(lambda: self._linearization.product(rows, multiply, bends=bends))

    def _retried(self, use: Callable[[], _T]) -> _T:
        """Uses the graph; once more with a graph of copies if the closure has written into it."""
        try:
            return use()
        except Overwritten:
            if not self._renewed():
                raise
            return use()

    def _renewed(self) -> bool:
        """Goes on with a graph of copies; returns whether there is one."""
        renewed = self._linearization.renew()
        if renewed:
            self._attach(self._linearization.graph)
        return renewed

    def _attach(self, graph: Graph) -> None:
        """Takes what it needs of a graph; most keep nothing."""

    def _multiply_rows(self, tangents: Sequence[Tensor], batched: bool) -> Sequence[Tensor | None]:
        """Some products; one by one where an operation has no batching rule.

        Here, and not outside of `product`: all ranks average the same number of vectors, whichever
        operations they have.
        """
        found = at_once(self._multiply, tangents) if self._vectorizes else None
        if found is None:
            self._vectorizes = False
            found = in_turn(self._multiply, tangents)
        return found
