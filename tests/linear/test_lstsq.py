"""The solution of minimum norm against the pseudoinverse, and decisions about the rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.rectangular import gaussian, graded, with_singular_values
from torch_secondorder.linear import lstsq

SHAPES = [(9, 4), (4, 9), (6, 6), (1, 5), (5, 1), (1, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [None, 1, 3])
@pytest.mark.parametrize("lost", [0, 1, 3])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_it_is_the_pseudoinverse(
    m: int, n: int, lost: int, columns: int | None, dtype: torch.dtype, device: torch.device
) -> None:
    rank = max(min(m, n) - lost, 0)
    exact = graded(m, n, 50.0, rank=rank)
    b = gaussian(m, *([] if columns is None else [columns]), seed=5)
    result = lstsq(exact.to(device, dtype), b.to(device, dtype))
    expected = torch.linalg.pinv(exact, rtol=1e-6) @ b
    accuracy = 1e-11 if dtype == torch.float64 else 2e-3
    torch.testing.assert_close(
        result.x.cpu().double(), expected, rtol=accuracy, atol=accuracy, check_dtype=False
    )
    assert result.x.dtype == dtype and result.x.device.type == device.type
    assert result.rank == rank
    assert result.singular_values.shape == (min(m, n),)
    assert result.condition == pytest.approx(50.0 if rank > 1 else 1.0, rel=1e-3)
    shape = () if columns is None else (columns,)
    assert result.norm.shape == result.residual_norm.shape == shape
    residual = torch.linalg.vector_norm(exact @ expected - b, dim=0)
    torch.testing.assert_close(
        result.residual_norm.cpu().double(), residual, rtol=accuracy, atol=accuracy
    )
    norm = torch.linalg.vector_norm(expected, dim=0)
    torch.testing.assert_close(result.norm.cpu().double(), norm, rtol=accuracy, atol=accuracy)


def test_it_agrees_with_numpy(device: torch.device) -> None:
    A, b = graded(12, 7, 1e5, rank=5), gaussian(12, 2)
    x, _, rank, s = np.linalg.lstsq(A.numpy(), b.numpy(), rcond=None)
    result = lstsq(A.to(device), b.to(device))
    assert result.rank == rank
    np.testing.assert_allclose(result.x.cpu().numpy(), x, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(result.singular_values.cpu().numpy(), s, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("shape", [(4, 3), (0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("columns", [(), (2,), (0,)])
def test_a_zero_or_empty_matrix(
    shape: tuple[int, int], columns: tuple[int, ...], device: torch.device
) -> None:
    m, n = shape
    b = torch.ones(m, *columns, device=device)
    result = lstsq(torch.zeros(m, n, device=device), b)
    assert result.rank == 0 and result.condition == 1.0
    assert result.x.shape == (n, *columns) and not result.x.any()
    torch.testing.assert_close(result.residual_norm, torch.full(columns, m**0.5, device=device))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 8), st.integers(0, 10**6))
def test_pythagoras_and_orthogonality(m: int, n: int, rank: int, seed: int) -> None:
    """`b` splits into `A x` and a residual at right angles; `x` has nothing of the null space."""
    A = graded(m, n, 30.0, seed, rank=min(rank, m, n))
    b = gaussian(m, seed=seed + 1)
    result = lstsq(A, b)
    image = A @ result.x
    square = float(b @ b)
    assert float(image @ image) + float(result.residual_norm) ** 2 == pytest.approx(square)
    assert float((A.T @ (b - image)).norm()) <= 1e-13 * square**0.5
    null = torch.eye(n, dtype=A.dtype) - torch.linalg.pinv(A, rtol=1e-8) @ A
    assert float((null @ result.x).norm()) <= 1e-12 * (1 + float(result.norm))
    other = result.x + null @ gaussian(n, seed=seed + 2)
    assert float((b - A @ other).norm()) == pytest.approx(float(result.residual_norm), abs=1e-12)
    assert float(other.norm()) >= float(result.norm) * (1 - 1e-12)


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-9, 0.5), st.floats(0.05, 0.9), st.integers(0, 10**6))
def test_the_rank_is_decided_at_rcond(rcond: float, share: float, seed: int) -> None:
    """Values on both sides of the cutoff, and a solution that has only those above it."""
    s = [1.0, min(rcond / share, 1.0), rcond * share]
    A, b = with_singular_values(6, 4, s, seed), gaussian(6, seed=seed)
    result = lstsq(A, b, rcond=rcond)
    assert result.rank == 2 and result.rcond == rcond
    assert result.condition == pytest.approx(1.0 / s[1], rel=1e-5)
    expected = torch.linalg.pinv(A, rtol=rcond) @ b
    assert float((result.x - expected).norm()) <= 1e-9 * float(expected.norm())


def test_without_a_cutoff_every_value_counts(device: torch.device) -> None:
    A = torch.diag(torch.tensor([1.0, 1e-30], dtype=torch.float64, device=device))
    result = lstsq(A, A.new_ones(2), rcond=0.0)
    assert result.rank == 2 and result.rcond == 0.0
    torch.testing.assert_close(result.x, A.new_tensor([1.0, 1e30]))
    assert lstsq(A, A.new_ones(2)).rank == 1


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_the_units_do_not_matter(scale: float, device: torch.device) -> None:
    A, b = graded(7, 4, 20.0).to(device), gaussian(7).to(device)
    expected = lstsq(A, b).x
    torch.testing.assert_close(lstsq(A * scale, b).x * scale, expected)
    large = lstsq(A, b * scale)
    torch.testing.assert_close(large.x / scale, expected)
    torch.testing.assert_close(large.norm / scale, torch.linalg.vector_norm(expected))


@pytest.mark.parametrize(("m", "n", "rank"), [(5, 3, 3), (3, 5, 3), (4, 4, 4)])
def test_it_can_be_differentiated_twice(m: int, n: int, rank: int, device: torch.device) -> None:
    A = graded(m, n, 5.0, rank=rank).to(device).requires_grad_()
    b = gaussian(m, 2).to(device).requires_grad_()

    def solution(A: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        result = lstsq(A, b)
        return result.x, result.norm

    assert torch.autograd.gradcheck(solution, (A, b))
    assert torch.autograd.gradgradcheck(solution, (A, b))


def test_it_can_be_differentiated_along_matrices_of_one_rank(device: torch.device) -> None:
    """Factors keep the rank, and repeated singular values divide by no difference."""
    left, right = gaussian(6, 2).to(device), gaussian(2, 4, seed=1).to(device)
    b = gaussian(6, seed=2).to(device)
    inputs = (left.requires_grad_(), right.requires_grad_(), b.requires_grad_())
    assert torch.autograd.gradcheck(lambda c, d, b: lstsq(c @ d, b, rcond=1e-6).x, inputs)
    A = torch.eye(3, dtype=torch.float64, device=device).requires_grad_()
    b = gaussian(3).to(device)
    assert torch.autograd.gradcheck(lambda A: lstsq(A, b).x, A)


def test_the_gradient_has_the_rank_of_the_value(device: torch.device) -> None:
    A = torch.diag(torch.tensor([1.0, 0.5, 1e-8], dtype=torch.float64, device=device))
    b = torch.ones_like(A[0]).requires_grad_()
    result = lstsq(A, b, rcond=1e-4)
    (found,) = torch.autograd.grad(result.x.sum(), b)
    torch.testing.assert_close(found, A.new_tensor([1.0, 2.0, 0.0]))


def test_the_value_does_not_depend_on_whether_a_gradient_is_wanted(device: torch.device) -> None:
    A, b = graded(8, 5, 1e6).to(device), gaussian(8).to(device)
    with_graph = lstsq(A.clone().requires_grad_(), b)
    assert torch.equal(lstsq(A, b).x, with_graph.x)
    assert not with_graph.singular_values.requires_grad
    with torch.no_grad():
        assert not lstsq(A.requires_grad_(), b).x.requires_grad


def test_it_prints_as_a_table() -> None:
    A = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5, 0.25]))
    text = str(lstsq(A, torch.ones(5)))
    assert text.startswith("LstsqResult\n  x                from 0.333333 to 4, shape (5,)\n")
    assert "rank             5\n  singular_values  from 0.25 to 3, shape (5,)" in text
    found = lstsq(A[:1, :1], torch.ones(1)).as_dict()
    assert found["rank"] == 1 and found["singular_values"] == [3.0]


A32, B32 = torch.ones(3, 2), torch.ones(3)
NAN = torch.tensor([1.0, torch.nan, 0.0])


@pytest.mark.parametrize(
    ("A", "b", "rcond", "error", "message"),
    [
        ([[1.0]], B32, None, TypeError, r"A must be a tensor, got list: pass torch.as_tensor\(A\)"),
        (len, B32, None, TypeError, "A must be a tensor, got builtin.*: lsqr and lsmr take"),
        (A32, [1.0], None, TypeError, r"b must be a tensor, got list: pass torch.as_tensor\(b\)"),
        (A32.to_sparse(), B32, None, TypeError, "A must be dense, got torch.sparse_coo; lsqr"),
        (A32.int(), B32, None, TypeError, "A must be float32 or float64, got torch.int32: pass A"),
        (A32, B32.bfloat16(), None, TypeError, "b must be float32 or float64, got torch.bfloat16"),
        (A32[None], B32, None, ValueError, r"A must be a matrix .*got shape \(1, 3, 2\)"),
        (A32, B32[:2], None, ValueError, r"b must have shape \(3,\) or \(3, k\).*got \(2,\)"),
        (A32, B32[:, None, None], None, ValueError, r"b must have shape .*got \(3, 1, 1\)"),
        (A32, B32[0], None, ValueError, r"b must have shape .*got \(\)"),
        (A32, B32.double(), None, ValueError, "one dtype and device, got torch.float32 on cpu and"),
        (A32, B32, 1.0, ValueError, r"rcond must lie in \[0, 1\) or None, got 1.0"),
        (A32, B32, -1e-3, ValueError, r"rcond must lie in \[0, 1\) or None, got -0.001"),
        (A32 * torch.inf, B32, None, ValueError, "A has entries that are not finite"),
        (A32, NAN, None, ValueError, "b has entries that are not finite"),
    ],
)  # fmt: skip
def test_errors(A: Any, b: Any, rcond: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lstsq(A, b, rcond=rcond)
