"""Operators and systems of small dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from torch_secondorder.curvature import LinearOperator
from torch_secondorder.solvers import CG, SolveResult, SolveStatus

EXACT = CG(1000, tolerance=1e-10)


class Dense(LinearOperator):
    """A matrix that counts its products and spoils one of them."""

    def __init__(self, matrix: Tensor, spoil: int = -1, value: float = math.nan) -> None:
        self.matrix, self.size = matrix, len(matrix)
        self.dtype, self.device = matrix.dtype, matrix.device
        self.products, self.spoil, self.value = 0, spoil, value

    def matvec(self, v: Tensor) -> Tensor:
        assert v.dtype == self.matrix.dtype and v.device == self.matrix.device
        self.products += 1
        product = self.matrix @ v
        if self.products == self.spoil:
            product[0] = self.value
        return product


class Identity(LinearOperator):
    """The identity that gives its argument away."""

    size = 5

    def matvec(self, v: Tensor) -> Tensor:
        return v


def rotation(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    q = rotation(len(eigenvalues), seed)
    a = (q * eigenvalues) @ q.T
    return (a + a.T) / 2


def spectrum(size: int, *, negative: bool = False, zeros: bool = False) -> Tensor:
    eigenvalues = torch.logspace(-2, 1, size, dtype=torch.float64)
    if negative:
        eigenvalues[1::3] *= -1
    if zeros:
        eigenvalues[::5] = 0
    return eigenvalues


def metric(size: int, seed: int = 10) -> Tensor:
    """A preconditioner that is nothing special."""
    return symmetric(torch.logspace(-1, 1, size, dtype=torch.float64), seed)


def vector_of(size: int, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, dtype=torch.float64, generator=generator)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense(operator: LinearOperator) -> Tensor:
    eye = torch.eye(operator.size, dtype=operator.dtype, device=operator.device)
    return torch.stack([operator.matvec(e) for e in eye], dim=1)


def smallest_eigenvalue(operator: LinearOperator) -> float:
    """The smallest eigenvalue of the matrix as it multiplies."""
    matrix = dense(operator).double()
    return float(torch.linalg.eigvalsh((matrix + matrix.T) / 2)[0])


def check_numbers(result: SolveResult, a: Tensor, b: Tensor, *, relative: float = 1e-9) -> None:
    """Compares what a result says of its `x` with what `x` is."""
    x = result.x
    assert torch.isfinite(x).all()
    residual = torch.linalg.vector_norm(b - a @ x) / torch.linalg.vector_norm(b)
    assert result.residual_norm == pytest.approx(float(residual), rel=1e-4, abs=relative)
    products = torch.stack([b @ x, x @ (a @ x) / 2])
    scale = float(products.abs().max())
    assert abs(result.decrease - float(products[0] - products[1])) <= relative * scale
    p = result.negative_direction
    assert (p is not None) == (result.status is SolveStatus.NEGATIVE_CURVATURE)
    if p is None:
        assert result.negative_curvature == 0.0
    else:
        quotient = float(p @ (a @ p) / (p @ p))
        magnitude = float(torch.linalg.matrix_norm(a, 2))
        assert quotient <= relative * magnitude
        assert abs(result.negative_curvature - quotient) <= relative * magnitude
        assert result.negative_curvature <= 0.0
