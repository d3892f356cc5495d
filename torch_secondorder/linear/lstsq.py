"""The solution of minimum norm, by the pseudoinverse."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_secondorder._foundation.report import Report
from torch_secondorder.linear._dense import (
    Decomposition,
    check_dense,
    column_norms,
    needs_gradient,
    with_gradient,
)

__all__ = ["LstsqResult", "lstsq"]


@dataclass(frozen=True, slots=True)
class LstsqResult(Report):
    """The least-squares solution of minimum norm.

    Attributes:
        x: `A^+ b`, shape `(n,)` or `(n, k)`.
        rank: The numerical rank: how many singular values are larger than `rcond` times the
            largest one.
        singular_values: All `min(m, n)`, in descending order.
        condition: The ratio of the largest singular value to the smallest within the rank.
        rcond: The cutoff that was used.
        residual_norm: `|b - A x|`, shape `()` or `(k,)`.
        norm: `|x|`, likewise.

    >>> result = lstsq(torch.eye(2), torch.tensor([1.0, 2.0]))
    >>> result.rank, result.condition
    (2, 1.0)
    """

    x: Tensor
    rank: int
    singular_values: Tensor
    condition: float
    rcond: float
    residual_norm: Tensor
    norm: Tensor


def lstsq(A: Tensor, b: Tensor, *, rcond: float | None = None) -> LstsqResult:
    """The shortest of all `x` that minimize `|A x - b|`, by the pseudoinverse: `x = A^+ b`.

    `A` may be tall, wide, rank-deficient, zero or empty, on any device. (`torch.linalg.lstsq` takes
    rank-deficient matrices on the CPU alone.) It takes one singular value decomposition, about
    `4 m n^2 + 22 n^3` operations if `m >= n` (Golub and Van Loan 2013, section 8.6), and is
    backward stable.

    The solution can be differentiated any number of times, in reverse and forward mode, which takes
    a second decomposition. Derivatives by `A` are those along matrices of the same rank: where the
    rank changes, `A^+` is not continuous.

    Args:
        A: Shape `(m, n)`, float32 or float64.
        b: Shape `(m,)`, or `(m, k)` for several right-hand sides.
        rcond: Singular values up to `rcond` times the largest one count as zero; by default
            `max(m, n)` times machine epsilon. If the entries of `A` are known to `d` digits, pass
            `10^-d`.

    Returns:
        The solution with the rank and the singular values.

    Raises:
        TypeError: `A` or `b` is not a dense tensor of float32 or float64.
        ValueError: Shapes, dtypes or devices do not fit, an entry is not finite, or `rcond` is
            not in [0, 1).

    >>> A = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    >>> print(lstsq(A, torch.tensor([1.0, 3.0], dtype=torch.float64)))
    LstsqResult
      x                [1, 1]
      rank             1
      singular_values  [2, ...]
      condition        1
      rcond            4.44089e-16
      residual_norm    1.41421
      norm             1.41421
    """
    check_dense(A, b, rcond)
    factors = Decomposition(A, rcond)
    columns = b if b.dim() == 2 else b[:, None]
    x = factors.filtered(columns, columns.new_zeros(1))
    if needs_gradient(A, b):
        # Its derivative has no differences of singular values, as that of the decomposition has.
        x = with_gradient(x, torch.linalg.pinv(A, rtol=factors.rcond) @ columns)
    x = x if b.dim() == 2 else x[:, 0]
    return LstsqResult(
        x=x,
        rank=factors.rank,
        singular_values=factors.singular_values,
        condition=factors.condition,
        rcond=factors.rcond,
        residual_norm=column_norms(b - A @ x),
        norm=column_norms(x),
    )
