"""Stiefel manifolds: matrices with orthonormal columns, or rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_secondorder.constraints._sets import Manifold, check_numbers

__all__ = ["Orthogonal"]


class Orthogonal(Manifold):
    """Matrices with orthonormal columns if they are tall or square, orthonormal rows if wide.

    The nearest point is the polar factor: `U V'` of the singular value decomposition `U S V'`
    (Fan and Hoffman 1955). If the rank is not full there are several, of which one is taken. A
    tensor of more than two dimensions is a batch of matrices. Complex matrices are unitary.

    >>> Orthogonal().project(torch.tensor([[0.0, 2.0], [-3.0, 0.0], [0.0, 0.0]]))
    tensor([[ 0.,  1.],
            [-1.,  0.],
            [ 0.,  0.]])
    """

    def check(self, tensor: Tensor) -> None:
        """See `TensorSet.check`."""
        check_numbers(tensor, "Orthogonal")
        if tensor.dim() < 2:
            raise ValueError(
                f"Orthogonal is a set of matrices, got shape {tuple(tensor.shape)}; vectors "
                "of norm one are UnitNorm()"
            )
        if not tensor.numel():
            raise ValueError(f"Orthogonal has no empty tensor, got shape {tuple(tensor.shape)}")

    def _project(self, x: Tensor) -> Tensor:
        if not _is_tall(x):
            return self._project(x.mH).mH
        return _polar(x)

    def _tangent(self, x: Tensor, v: Tensor) -> Tensor:
        if not _is_tall(x):
            return self._tangent(x.mH, v.mH).mH
        return v - x @ _hermitian(x.mH @ v)

    def _differential(self, w: Tensor, v: Tensor) -> Tensor:
        if not _is_tall(w):
            return self._differential(w.mH, v.mH).mH
        return _differential(w, v)

    def _weingarten(self, x: Tensor, v: Tensor, gradient: Tensor) -> Tensor:
        if not _is_tall(x):
            return self._weingarten(x.mH, v.mH, gradient.mH).mH
        return self._tangent(x, -v @ _hermitian(x.mH @ gradient))

    def __repr__(self) -> str:
        return "Orthogonal()"


def _is_tall(x: Tensor) -> bool:
    return x.shape[-2] >= x.shape[-1]


def _hermitian(a: Tensor) -> Tensor:
    return (a + a.mH) / 2


def _polar(x: Tensor) -> Tensor:
    """The polar factor of tall matrices."""
    result: Tensor = _Polar.apply(x)  # type: ignore[no-untyped-call]
    return result


class _Polar(torch.autograd.Function):
    """The polar factor of tall matrices.

    The derivative of `U V'` through the decomposition fails if singular values are equal, as they
    are on the manifold itself; that of the polar factor is smooth wherever the rank is full.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        finite = _finite(x)
        # The decomposition raises an error on a NaN.
        u, _, vh = torch.linalg.svd(torch.where(finite, x, 0), full_matrices=False)
        ctx.save_for_backward(x)
        q = u @ vh
        # A Newton-Schulz step takes most of the rounding out, which shows as noise in the loss.
        eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
        q = q - 0.5 * q @ (q.mH @ q - eye)
        return torch.where(finite, q, torch.nan)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _differential(x, grads[0])


def _differential(w: Tensor, v: Tensor) -> Tensor:
    """The derivative of the polar factor `Q` of `w = Q P` along `v`, in terms that have one too.

    It is `Q K + (v - Q Q'v) / P`, where `K P + P K = Q'v - v'Q` (Higham 2008, "Functions of
    Matrices", 8.1).
    """
    q = _polar(w)
    p = _hermitian(q.mH @ w)
    inside = q.mH @ v
    k: Tensor = _Lyapunov.apply(p, inside - inside.mH)  # type: ignore[no-untyped-call]
    outside = v - q @ inside
    divided: Tensor = _Divide.apply(outside, p)  # type: ignore[no-untyped-call]
    return q @ k + divided


class _Lyapunov(torch.autograd.Function):
    """The solution `K` of `K P + P K = A` with a positive semidefinite `P`.

    Where two eigenvalues add up to zero there is no solution, and that part of `K` is zero.
    """

    @staticmethod
    def forward(ctx: Any, p: Tensor, a: Tensor) -> Tensor:
        values, q = _eigh(p)
        sums = values.unsqueeze(-1) + values.unsqueeze(-2)
        largest = values.abs().amax(-1, keepdim=True).unsqueeze(-1)
        fine = sums > _cutoff(p) * largest
        inverse = torch.where(fine, 1 / torch.where(fine, sums, 1), 0)
        k: Tensor = q @ ((q.mH @ a @ q) * inverse) @ q.mH
        ctx.save_for_backward(p, k)
        return k

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        p, k = ctx.saved_tensors
        of_a: Tensor = _Lyapunov.apply(p, grads[0])  # type: ignore[no-untyped-call]
        return -(k.mH @ of_a + of_a @ k.mH), of_a


class _Divide(torch.autograd.Function):
    """The product of a matrix with the pseudoinverse of a positive semidefinite `P`."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, p: Tensor) -> Tensor:
        values, q = _eigh(p)
        largest = values.abs().amax(-1, keepdim=True)
        fine = values > _cutoff(p) * largest
        inverse = torch.where(fine, 1 / torch.where(fine, values, 1), 0)
        y: Tensor = (z @ q) * inverse.unsqueeze(-2) @ q.mH
        ctx.save_for_backward(y, p)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        y, p = ctx.saved_tensors
        of_z: Tensor = _Divide.apply(grads[0], p)  # type: ignore[no-untyped-call]
        return of_z, -(y.mH @ of_z)


def _finite(a: Tensor) -> Tensor:
    """A mask of the matrices that are finite, `(..., 1, 1)`."""
    return a.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)


def _eigh(p: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors; NaN for a matrix that is not finite."""
    finite = _finite(p)
    values, vectors = torch.linalg.eigh(torch.where(finite, p, 0))
    return torch.where(finite[..., 0], values, torch.nan), vectors


def _cutoff(p: Tensor) -> float:
    """Eigenvalues below this share of the largest count as zero."""
    return p.shape[-1] * torch.finfo(p.dtype).eps
