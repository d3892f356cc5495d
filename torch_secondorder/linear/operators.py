"""Rectangular matrices that are known by their products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_callable, check_instance
from torch_secondorder.curvature import LinearOperator, ResidualJacobian
from torch_secondorder.func.transforms import vjp

__all__ = ["OperatorLike", "RectangularOperator", "as_operator", "jacobian_operator"]

Product: TypeAlias = Callable[[Tensor], Tensor]


@runtime_checkable
class RectangularOperator(Protocol):
    """An `m x n` matrix `A` that multiplies from both sides, and need not be formed.

    Vectors may be tensors of any shape: the columns of `A` are shaped like `b`, its rows like `x`,
    and inner products are sums over all entries.

    >>> A = as_operator(torch.tensor([[1.0, 2.0], [0.0, 1.0], [0.0, 0.0]]))
    >>> A.matvec(torch.ones(2)), A.rmatvec(torch.ones(3))
    (tensor([3., 1., 0.]), tensor([1., 3.]))
    """

    def matvec(self, v: Tensor) -> Tensor:
        """`A v`, shaped like `b`."""
        ...  # pragma: no cover - a protocol

    def rmatvec(self, u: Tensor) -> Tensor:
        """`A'u`, shaped like `x`."""
        ...  # pragma: no cover - a protocol


#: Arguments that stand for a matrix: a tensor (dense or sparse), an object with `matvec` and
#: `rmatvec`, a pair of such functions, a symmetric operator, or the Jacobian of a loss's residuals.
OperatorLike: TypeAlias = (
    Tensor | RectangularOperator | tuple[Product, Product] | LinearOperator | ResidualJacobian
)


@dataclass(frozen=True, slots=True)
class Products:
    """A matrix as its two products.

    Attributes:
        multiply: `A v`.
        multiply_transposed: `A'u`.
    """

    multiply: Product
    multiply_transposed: Product

    def matvec(self, v: Tensor) -> Tensor:
        """See `RectangularOperator.matvec`."""
        return self.multiply(v)

    def rmatvec(self, u: Tensor) -> Tensor:
        """See `RectangularOperator.rmatvec`."""
        return self.multiply_transposed(u)


def as_operator(A: OperatorLike) -> RectangularOperator:
    """A matrix in any of its forms as an operator.

    Args:
        A: A tensor of shape `(m, n)`, dense or sparse; an object with methods `matvec` and
            `rmatvec`; a pair of such functions; a symmetric `LinearOperator`; or a
            `ResidualJacobian`.

    Returns:
        An operator that multiplies with the matrix and with its transpose.

    Raises:
        TypeError: It is none of these.
        ValueError: The tensor is not a matrix.

    >>> pair = (lambda v: v.cumsum(0), lambda u: u.flip(0).cumsum(0).flip(0))
    >>> as_operator(pair).rmatvec(torch.ones(3))
    tensor([3., 2., 1.])
    """
    if isinstance(A, Tensor):
        if A.dim() != 2:
            raise ValueError(f"A must be a matrix of shape (m, n), got shape {tuple(A.shape)}")
        matrix = A.detach()
        transposed = matrix.mT
        return Products(lambda v: matrix @ v, lambda u: transposed @ u)
    if isinstance(A, ResidualJacobian):
        return Products(A.push, A.pull)
    if isinstance(A, LinearOperator):
        return Products(A.matvec, A.matvec)
    if isinstance(A, tuple) and len(A) == 2 and all(map(callable, A)):
        return Products(*A)
    if isinstance(A, RectangularOperator):
        return A
    got = f"a {type(A).__name__} without rmatvec" if hasattr(A, "matvec") else type(A).__name__
    raise TypeError(
        "A must be a tensor, a pair of functions (matvec, rmatvec), an object with these methods, "
        f"a LinearOperator or a ResidualJacobian, got {got}"
    )


def jacobian_operator(function: Callable[[Tensor], Tensor], x: Tensor) -> RectangularOperator:
    """The Jacobian of a function at a point, as an operator.

    The function is called once. Products with the transpose are backward passes through its graph,
    products with the Jacobian are backward passes through these (the derivative of a linear map by
    its argument), so that no operation needs a rule for forward mode.

    Args:
        function: Takes a tensor and returns one, of any shapes.
        x: The point.

    Returns:
        An operator whose columns are shaped like the function's value and whose rows are shaped
            like `x`.

    Raises:
        TypeError: `function` is not callable, or returns no tensor.

    >>> A = jacobian_operator(lambda x: x[:2] * x[1:], torch.tensor([1.0, 2.0, 3.0]))
    >>> A.matvec(torch.tensor([1.0, 0.0, 0.0])), A.rmatvec(torch.tensor([1.0, 1.0]))
    (tensor([2., 0.]), tensor([2., 4., 2.]))
    """
    check_callable("function", function)
    with torch.enable_grad():
        value, pull = vjp(function, x.detach())
        check_instance("the value of the function", value, Tensor, "a tensor")
        # Of a linear map the derivative is the same at every point.
        _, push = vjp(lambda u: pull(u)[0], torch.zeros_like(value))
    return Products(lambda v: _first(push(v)), lambda u: _first(pull(u)))


def _first(found: tuple[Any, ...]) -> Tensor:
    product: Tensor = found[0]
    return product.detach()


def preconditioned(A: RectangularOperator, P: RectangularOperator | None) -> RectangularOperator:
    """`A P`."""
    if P is None:
        return A
    return Products(lambda z: A.matvec(P.matvec(z)), lambda u: P.rmatvec(A.rmatvec(u)))
