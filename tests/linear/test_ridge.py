"""Ridge regression against the normal equations, its degrees of freedom, and its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.rectangular import falls, gaussian, graded
from torch_secondorder.linear import lstsq, ridge

SHAPES = [(9, 4), (4, 9), (5, 5)]


def normal_equations(A: Tensor, b: Tensor, penalty: float) -> tuple[Tensor, float]:
    """The solution, and the trace of the matrix that maps `b` to `A x`."""
    inverse = torch.linalg.inv(A.T @ A + penalty * torch.eye(A.shape[1], dtype=A.dtype))
    return inverse @ A.T @ b, float(torch.trace(A @ inverse @ A.T))


@pytest.mark.parametrize("penalty", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_normal_equations(
    m: int, n: int, rank: int | None, penalty: float, device: torch.device
) -> None:
    A, b = graded(m, n, 10.0, rank=rank), gaussian(m, seed=3)
    expected, freedom = normal_equations(A, b, penalty)
    result = ridge(A.to(device), b.to(device), penalty)
    torch.testing.assert_close(result.x.cpu(), expected, rtol=1e-9, atol=1e-12)
    assert float(result.degrees_of_freedom) == pytest.approx(freedom, rel=1e-10)
    residual = float((A @ expected - b).norm())
    assert float(result.residual_norm) == pytest.approx(residual, rel=1e-10)
    assert float(result.norm) == pytest.approx(float(expected.norm()), rel=1e-10)
    assert float(result.penalty) == penalty
    assert float(result.gcv) == pytest.approx(m * (residual / (m - freedom)) ** 2, rel=1e-9)
    numbers = (result.penalty, result.norm, result.residual_norm, result.gcv)
    assert {t.shape for t in numbers} == {torch.Size()}


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_one_decomposition_serves_many_penalties(m: int, n: int, device: torch.device) -> None:
    A, B = graded(m, n, 10.0).to(device), gaussian(m, 3, seed=3).to(device)
    penalties = torch.tensor([0.1, 1.0, 10.0], dtype=A.dtype, device=device)
    along = ridge(A, B[:, 0], penalties)  # one right-hand side, a path of penalties
    each = ridge(A, B, penalties)  # a penalty for each right-hand side
    shared = ridge(A, B, 1.0)
    for k, penalty in enumerate(penalties.tolist()):
        for result, b in ((along, B[:, 0]), (each, B[:, k])):
            alone = ridge(A, b, penalty)
            torch.testing.assert_close(result.x[:, k], alone.x)
            torch.testing.assert_close(result.gcv[k], alone.gcv)
            torch.testing.assert_close(result.penalty[k], alone.penalty)
            torch.testing.assert_close(result.degrees_of_freedom[k], alone.degrees_of_freedom)
        torch.testing.assert_close(shared.x[:, k], ridge(A, B[:, k], 1.0).x)
    assert shared.penalty.shape == shared.degrees_of_freedom.shape == (3,)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 10**6))
def test_larger_penalties_shrink_the_solution(m: int, n: int, seed: int) -> None:
    A, b = graded(m, n, 30.0, seed), gaussian(m, seed=seed + 1)
    result = ridge(A, b, torch.logspace(-4, 4, 12, dtype=A.dtype))
    assert falls(result.norm.tolist())
    assert falls(result.residual_norm.flip(0).tolist())
    assert falls(result.degrees_of_freedom.tolist())
    assert float(result.degrees_of_freedom[0]) <= min(m, n)
    assert float(result.norm[0]) <= float(lstsq(A, b).norm) * (1 + 1e-12)


def test_a_small_penalty_leads_to_the_minimum_norm(device: torch.device) -> None:
    A, b = graded(6, 8, 10.0, rank=4).to(device), gaussian(6).to(device)
    torch.testing.assert_close(
        ridge(A, b, 1e-12).x, lstsq(A, b, rcond=1e-8).x, rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("shape", [(4, 3), (0, 3), (3, 0)])
def test_a_zero_or_empty_matrix(shape: tuple[int, int], device: torch.device) -> None:
    result = ridge(torch.zeros(shape, device=device), torch.ones(shape[0], device=device), 1.0)
    assert result.x.shape == shape[1:] and not result.x.any()
    assert float(result.degrees_of_freedom) == 0.0


def test_squares_may_leave_the_range_of_the_dtype(device: torch.device) -> None:
    for values, penalty, expected in (
        ([1e25, 1e22], 1e30, [1e-25, 1e-22]),
        ([1e-25, 1e-28], 1e-30, [1e5, 1e2]),
    ):
        A = torch.diag(torch.tensor(values, device=device))
        x = ridge(A, torch.ones(2, device=device), penalty).x
        torch.testing.assert_close(x, torch.tensor(expected, device=device), atol=0.0, rtol=1e-5)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(("m", "n"), [(5, 3), (3, 5)])
def test_everything_can_be_differentiated_twice(
    m: int, n: int, many: bool, device: torch.device
) -> None:
    A, B = graded(m, n, 5.0).to(device), gaussian(m, 2).to(device)
    penalty = torch.tensor([0.3, 2.0] if many else 0.3, dtype=A.dtype, device=device)
    inputs = (A.requires_grad_(), B.requires_grad_(), penalty.requires_grad_())

    def results(A: Tensor, B: Tensor, penalty: Tensor) -> tuple[Tensor, ...]:
        result = ridge(A, B, penalty)
        return result.x, result.norm, result.degrees_of_freedom, result.gcv

    assert torch.autograd.gradcheck(results, inputs)
    assert torch.autograd.gradgradcheck(results, inputs)


def test_a_penalty_can_be_chosen_by_its_gradient(device: torch.device) -> None:
    """Generalized cross-validation, minimized over the logarithm of the penalty."""
    A, truth = graded(40, 15, 1e3).to(device), gaussian(15, seed=1).to(device)
    b = A @ truth + 0.05 * gaussian(40, seed=2).to(device)
    grid = torch.logspace(-6, 1, 200, dtype=A.dtype, device=device)
    lowest = float(ridge(A, b, grid).gcv.min())
    logarithm = torch.tensor(-2.0, dtype=A.dtype, device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS([logarithm], line_search_fn="strong_wolfe", max_iter=50)

    def closure() -> Tensor:
        optimizer.zero_grad()
        score = ridge(A, b, logarithm.exp()).gcv
        score.backward()
        return score

    optimizer.step(closure)
    assert float(closure().detach()) == pytest.approx(lowest, rel=1e-3)


A32, B32 = torch.ones(3, 2), torch.ones(3)


@pytest.mark.parametrize(
    ("b", "penalty", "message"),
    [
        (B32, 0.0, "penalty must be a finite number above 0, got 0.0"),
        (B32, torch.inf, "penalty must be a finite number above 0, got inf"),
        (B32, torch.tensor([1.0, -1.0]), "all entries of penalty must be finite and above 0"),
        (B32, torch.tensor([1.0, torch.nan]), "all entries of penalty must be finite and above 0"),
        (B32, torch.ones(2, 2), r"penalty must be a number or have shape \(\) or \(k,\), got "),
        (A32, torch.ones(3), r"or have shape \(\) or \(2,\), got shape \(3,\)"),
        (B32[:2], 1.0, r"b must have shape \(3,\) or \(3, k\)"),
    ],
)  # fmt: skip
def test_errors(b: Tensor, penalty: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ridge(A32, b, penalty)
