"""Factors in float32 with refinement, beside direct solutions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torch_secondorder.solvers._cholesky import Cholesky, RefinedCholesky, cholesky

DOUBLE, SINGLE = torch.float64, torch.float32
EPS = torch.finfo(DOUBLE).eps


def matrix_of(condition: float, size: int = 60) -> Tensor:
    """Symmetric, with eigenvalues between one and the condition."""
    torch.manual_seed(1)
    Q = torch.linalg.qr(torch.randn(size, size, dtype=DOUBLE))[0]
    values = condition ** torch.linspace(0, 1, size, dtype=DOUBLE)
    A = (Q * values) @ Q.T
    return 0.5 * (A + A.T)


@pytest.mark.parametrize("exponent", range(13))
@pytest.mark.parametrize("weights", [0.0, 0.5])
def test_as_accurate_as_the_direct_solution(
    exponent: int, weights: float, device: torch.device
) -> None:
    condition = 10.0**exponent
    A = matrix_of(condition).to(device)
    before, b = A.clone(), torch.linspace(-1, 1, len(A), dtype=DOUBLE).to(device)
    whole = A + weights * torch.eye(len(A), dtype=DOUBLE, device=device)
    direct = torch.linalg.solve(whole, b)
    factor = cholesky(A, weights, SINGLE)
    assert isinstance(factor, RefinedCholesky) or exponent >= 7
    x = factor.solve(b)
    refines = isinstance(factor, RefinedCholesky) and factor.refines
    assert torch.equal(A, before) and x.dtype == DOUBLE
    residual = (whole @ x - b).norm() / (torch.linalg.matrix_norm(whole) * x.norm() + b.norm())
    assert residual.item() <= 4 * EPS
    error = ((x - direct).norm() / direct.norm()).item()
    assert error <= 100 * condition * EPS
    if exponent <= 5 or exponent >= 9:
        assert refines is (exponent <= 5)
    # The decision holds for further right sides.
    assert ((factor.solve(2 * b) - 2 * x).norm() / x.norm()).item() <= 100 * condition * EPS


@pytest.mark.parametrize("scale", [1e-150, 1e-20, 1.0, 1e20, 1e150])
def test_scales_beyond_the_range_of_float32(scale: float, device: torch.device) -> None:
    A = scale * matrix_of(100.0).to(device)
    b = torch.ones(len(A), dtype=DOUBLE, device=device)
    factor = cholesky(A, 0.0, SINGLE)
    x = factor.solve(b)
    assert factor.refines
    torch.testing.assert_close(scale * x, torch.linalg.solve(A / scale, b), rtol=1e-11, atol=0)


def test_rows_of_different_scale(device: torch.device) -> None:
    """They do not count: the diagonal is scaled to ones first."""
    A = matrix_of(100.0).to(device)
    d = torch.logspace(-12, 12, len(A), dtype=DOUBLE).to(device)
    b = torch.ones(len(A), dtype=DOUBLE, device=device)
    factor = cholesky(d[:, None] * A * d, 0.0, SINGLE)
    x = factor.solve(d * b)
    assert factor.refines
    torch.testing.assert_close(d * x, torch.linalg.solve(A, b), rtol=1e-11, atol=0)


def test_only_a_narrower_dtype_is_refined() -> None:
    A = matrix_of(10.0)
    for dtype in (None, DOUBLE):
        assert isinstance(cholesky(A, 0.0, dtype), Cholesky)
    assert isinstance(cholesky(A.float(), 0.0, SINGLE), Cholesky)


def test_not_positive_definite() -> None:
    A = matrix_of(10.0)
    A[3, 3] = -1.0
    assert cholesky(A, 0.0) is None and cholesky(A, 0.0, SINGLE) is None


def test_a_matrix_that_only_few_digits_show_as_positive_definite() -> None:
    A = torch.tensor([[1.0, 1 + 1e-12], [1 + 1e-12, 1.0]], dtype=DOUBLE)
    A += torch.diag(torch.tensor([0.0, 1e-13], dtype=DOUBLE))
    factor = RefinedCholesky(A, 0.0, SINGLE)
    factor.refines, factor._narrow = True, Cholesky(torch.eye(2))  # of another matrix
    assert factor.solve(torch.tensor([1.0, -1.0], dtype=DOUBLE)) is None
    assert not factor.refines


def test_zeros_and_what_is_not_finite() -> None:
    A = matrix_of(10.0)
    zeros = torch.zeros(len(A), dtype=DOUBLE)
    assert torch.equal(cholesky(A, 0.0, SINGLE).solve(zeros), zeros)
    assert bool(cholesky(A, 0.0, SINGLE).solve(zeros + torch.nan).isnan().all())
