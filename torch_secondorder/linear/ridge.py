"""Ridge regression, also called Tikhonov regularization."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_secondorder._foundation.report import Report
from torch_secondorder.linear._dense import (
    Decomposition,
    check_dense,
    column_norms,
    column_parameter,
    needs_gradient,
    regularized,
    with_gradient,
)

__all__ = ["RidgeResult", "ridge"]


@dataclass(frozen=True, slots=True)
class RidgeResult(Report):
    """The solution of a least-squares problem with a penalty on its norm.

    Attributes:
        x: Shape `(n,)` or `(n, k)`.
        penalty: Shape `()` or `(k,)`.
        residual_norm: `|b - A x|`, likewise.
        norm: `|x|`, likewise.
        degrees_of_freedom: The trace of the matrix that maps `b` to `A x`, `sum s^2 / (s^2 +
            penalty)` over the singular values `s`; likewise.
        gcv: The score of generalized cross-validation, `m |b - A x|^2 / (m -
            degrees_of_freedom)^2`, which a good penalty makes small (Golub, Heath and Wahba 1979);
            likewise.

    >>> result = ridge(torch.eye(2), torch.tensor([2.0, 4.0]), penalty=1.0)
    >>> result.x, result.degrees_of_freedom.item()
    (tensor([1., 2.]), 1.0)
    """

    x: Tensor
    penalty: Tensor
    residual_norm: Tensor
    norm: Tensor
    degrees_of_freedom: Tensor
    gcv: Tensor


def ridge(A: Tensor, b: Tensor, penalty: float | Tensor) -> RidgeResult:
    """Minimizes `|A x - b|^2 + penalty |x|^2`.

    One singular value decomposition serves all penalties and right-hand sides: for the solutions
    along a path of penalties pass them as a vector. Everything can be differentiated any number of
    times, in reverse and forward mode, by `A`, `b` and `penalty`; that takes an orthogonal
    factorization for each penalty.
    Singular values that rounding cannot tell from zero count as zero, as in `lstsq`, whose solution
    is the limit for small penalties.

    Args:
        A: Shape `(m, n)`, float32 or float64.
        b: Shape `(m,)` or `(m, k)`.
        penalty: Above 0: a number for all columns of `b`, or a vector with one for each. With a
            vector `b` of shape `(m,)`, there is a solution for each entry.

    Returns:
        The solution with the degrees of freedom and the score of cross-validation.

    Raises:
        TypeError: `A` or `b` is not a dense tensor of float32 or float64.
        ValueError: Shapes, dtypes or devices do not fit, an entry is not finite, or a penalty is
            not above 0 (for a penalty of zero call `lstsq`).

    >>> A = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> result = ridge(A, torch.tensor([3.0, 2.0]), torch.tensor([1.0, 9.0]))
    >>> result.x
    tensor([[0.9000, 0.5000],
            [1.0000, 0.2000]])
    >>> result.degrees_of_freedom
    tensor([1.4000, 0.6000])
    """
    check_dense(A, b, None)
    columns, penalties = column_parameter("penalty", penalty, b)
    factors = Decomposition(A, None)
    x = factors.filtered(columns, penalties.detach())
    s = factors.s[:, None]
    freedom = (s / (s + penalties.detach() / s)).sum(0)
    if needs_gradient(A, b, penalties):
        solution = regularized(A, columns, penalties)
        x, freedom = with_gradient(x, solution.x), with_gradient(freedom, solution.freedom)
    residual_norm = column_norms(columns - A @ x)
    gcv = len(A) * (residual_norm / (len(A) - freedom)).square()
    one = b.dim() == 1 and not (isinstance(penalty, Tensor) and penalty.dim())
    shape = torch.Size() if one else x.shape[1:]
    return RidgeResult(
        x=x[:, 0] if one else x,
        penalty=penalties.expand(x.shape[1:]).reshape(shape),
        residual_norm=residual_norm.reshape(shape),
        norm=column_norms(x).reshape(shape),
        degrees_of_freedom=freedom.expand(x.shape[1:]).reshape(shape),
        gcv=gcv.reshape(shape),
    )
