"""Dense problems: checked arguments, the decomposition, and solutions that have gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from torch_secondorder._foundation.checks import check_number
from torch_secondorder.solvers._units import power_of_two

DTYPES = (torch.float32, torch.float64)


def check_dense(A: Any, b: Any, rcond: float | None) -> None:
    """Raises unless `A` is a finite matrix and `b` one or several right-hand sides for it."""
    for name, tensor in (("A", A), ("b", b)):
        if not isinstance(tensor, Tensor):
            hint = f"pass torch.as_tensor({name}), in float32 or float64"
            if callable(tensor) or hasattr(tensor, "matvec"):
                hint = "lsqr and lsmr take matrix-free operators"
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}: {hint}")
        if tensor.layout != torch.strided:
            raise TypeError(
                f"{name} must be dense, got {tensor.layout}; lsqr and lsmr take sparse matrices"
            )
        if tensor.dtype not in DTYPES:
            hint = "" if tensor.is_complex() else f": pass {name}.double()"
            raise TypeError(f"{name} must be float32 or float64, got {tensor.dtype}{hint}")
    if A.dim() != 2:
        raise ValueError(f"A must be a matrix of shape (m, n), got shape {tuple(A.shape)}")
    if b.dim() not in (1, 2) or len(b) != len(A):
        raise ValueError(
            f"b must have shape ({len(A)},) or ({len(A)}, k), as A has {len(A)} rows, got "
            f"{tuple(b.shape)}"
        )
    if A.dtype != b.dtype or A.device != b.device:
        raise ValueError(
            f"A and b must have one dtype and device, got {A.dtype} on {A.device} and {b.dtype} "
            f"on {b.device}"
        )
    check_number("rcond", rcond, low=0, below=1, optional=True)
    for name, tensor in (("A", A), ("b", b)):
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} has entries that are not finite")


def column_parameter(name: str, value: float | Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A positive number for each right-hand side.

    Args:
        name: The argument's name.
        value: A number, or a tensor of shape `()` or `(k,)`.
        b: Shape `(m,)` or `(m, k)`.

    Returns:
        The right-hand sides, shape `(m, 1)` or `(m, k)`, and the numbers in their dtype: shape
        `(1,)` if they are one for all, else `(k,)`.
    """
    columns = b if b.dim() == 2 else b[:, None]
    if not isinstance(value, Tensor):
        check_number(name, value, above=0)
        return columns, torch.tensor([float(value)], dtype=b.dtype, device=b.device)
    fits = value.dim() == 0 or (
        value.dim() == 1 and (b.dim() == 1 or value.shape == columns.shape[1:])
    )
    if not fits:
        allowed = "() or (k,)" if b.dim() == 1 else f"() or ({columns.shape[1]},)"
        raise ValueError(
            f"{name} must be a number or have shape {allowed}, got shape {tuple(value.shape)}"
        )
    if not bool(((value > 0) & value.isfinite()).all()):
        raise ValueError(f"all entries of {name} must be finite and above 0")
    numbers = value.to(b.device, b.dtype).reshape(-1)
    return columns.expand(-1, len(numbers)) if b.dim() == 1 else columns, numbers


class Decomposition:
    """The singular value decomposition of a matrix, `A = U diag(s) V'`.

    Attributes:
        singular_values: All `min(m, n)`, in descending order.
        rcond: The cutoff, relative to the largest one.
        rank: How many are larger than the cutoff.
        U: Of these, shape `(m, rank)`.
        s: Likewise, `(rank,)`.
        Vh: Likewise, `(rank, n)`.
    """

    def __init__(self, A: Tensor, rcond: float | None) -> None:
        if rcond is None:
            rcond = min(max(A.shape) * torch.finfo(A.dtype).eps, 0.5)
        U, s, Vh = torch.linalg.svd(A.detach(), full_matrices=False)
        self.singular_values, self.rcond = s, float(rcond)
        self.rank = int((s > rcond * s[0]).sum()) if len(s) else 0
        self.U, self.s, self.Vh = U[:, : self.rank], s[: self.rank], Vh[: self.rank]

    @property
    def condition(self) -> float:
        """The ratio of the largest singular value to the smallest that counts; 1 if none does."""
        return float(self.s[0] / self.s[-1]) if self.rank else 1.0

    def filtered(self, columns: Tensor, penalties: Tensor) -> Tensor:
        """`(A'A + penalty I)^-1 A'b` for each column, with a penalty of zero by the pseudoinverse.

        Args:
            columns: Shape `(m, k)`.
            penalties: Shape `(1,)` or `(k,)`, at least zero.
        """
        s = self.s[:, None]
        # As it is written, squares of singular values cannot leave the range of the dtype.
        filters = 1.0 / (s + penalties / s)
        x: Tensor = self.Vh.T @ (filters * (self.U.T @ columns.detach()))
        return x


class Regularized(NamedTuple):
    """Solutions of `(A'A + penalty I) x = A'b` with gradients.

    Attributes:
        x: Shape `(n, k)`.
        bend: `x'(A'A + penalty I)^-1 x`, `(k,)`.
        freedom: The trace of `A (A'A + penalty I)^-1 A'`, `(1,)` or `(k,)`.
    """

    x: Tensor
    bend: Tensor
    freedom: Tensor


def regularized(A: Tensor, columns: Tensor, penalties: Tensor) -> Regularized:
    """Solutions by an orthogonal factorization, which can be differentiated any number of times.

    Args:
        A: Shape `(m, n)`.
        columns: Shape `(m, k)`.
        penalties: Shape `(1,)` or `(k,)`, above zero.
    """
    tall = A.shape[0] >= A.shape[1]
    M = A if tall else A.mT
    count, (rows, size) = len(penalties), M.shape
    # One system for each penalty; with a single one all right-hand sides belong to it.
    b = columns[None] if count == 1 else columns.T[:, :, None]
    roots = penalties.sqrt()[:, None, None] * torch.eye(size, dtype=A.dtype, device=A.device)
    Q, R = torch.linalg.qr(torch.cat([M.expand(count, rows, size), roots], dim=1))
    Q = Q[:, :rows]
    if tall:
        x = torch.linalg.solve_triangular(R, Q.mT @ b, upper=True)
        image = torch.linalg.solve_triangular(R.mT, x, upper=False)
        bend = image.square().sum(1)
    else:
        half = torch.linalg.solve_triangular(R.mT, b, upper=False)
        x = Q @ half
        w = torch.linalg.solve_triangular(R, half, upper=True)
        bend = (x * (Q @ torch.linalg.solve_triangular(R.mT, w, upper=False))).sum(1)
    x, bend = (x[0], bend[0]) if count == 1 else (x[:, :, 0].T, bend[:, 0])
    return Regularized(x, bend, Q.square().sum((1, 2)))


def column_norms(columns: Tensor) -> Tensor:
    """Euclidean norms along the first dimension, whose squares may leave the range of the dtype."""
    if not columns.numel():
        return columns.new_zeros(columns.shape[1:])
    unit = power_of_two(columns.detach().abs().amax(0))
    norms: Tensor = torch.linalg.vector_norm(columns / unit, dim=0) * unit
    return norms


def needs_gradient(*tensors: Tensor) -> bool:
    """True if the result is to be differentiated, in reverse or forward mode."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return True
    return any(unpack_dual(t).tangent is not None for t in tensors)


def with_gradient(value: Tensor, differentiable: Tensor) -> Tensor:
    """A value with the derivatives of another expression for it."""
    return value.detach() + (differentiable - differentiable.detach())
