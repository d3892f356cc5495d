"""Conjugate gradients within a trust radius, and where the curvature is negative."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.dense_operators import (
    EXACT,
    Dense,
    Identity,
    check_numbers,
    metric,
    spectrum,
    symmetric,
    vector_of,
)
from torch_secondorder.curvature import Diagonal
from torch_secondorder.solvers import CG, SolveStatus


def trust_region_decrease(a: Tensor, b: Tensor, radius: float) -> float:
    """The most that a convex quadratic falls within a ball, by bisection of the multiplier."""
    values, q = torch.linalg.eigh(a)
    c = q.T @ b
    low, high = 0.0, float(b.norm()) / radius
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (c / (values + middle)).norm() > radius else (low, middle)
    x = c / (values + high)
    return float(c @ x - (values * x * x).sum() / 2)


@given(
    size=st.integers(1, 15),
    radius=st.floats(1e-3, 1e3),
    preconditioned=st.booleans(),
    seed=st.integers(0, 1000),
)
@example(15, 151.5, True, 177)
@example(15, 33.769438313933136, True, 272)
@example(14, 80.17987260240841, True, 893)
@settings(deadline=None, max_examples=80)
def test_at_least_half_of_what_the_radius_allows(
    size: int, radius: float, preconditioned: bool, seed: int
) -> None:
    """Yuan 2000, "On the truncated conjugate gradient method"."""
    a, b = symmetric(spectrum(size), seed), vector_of(size, seed)
    m = metric(size, seed + 1) if preconditioned else torch.eye(size, dtype=torch.float64)
    result = EXACT(Dense(a), b, preconditioner=Dense(m) if preconditioned else None, radius=radius)
    check_numbers(result, a, b)
    length = float(result.x @ torch.linalg.solve(m, result.x)) ** 0.5
    # Without the inverse of the preconditioner the length comes from a recursion, which takes
    # directions for conjugate: off by at most 6.6e-6 in 1,500 problems of 12 to 15 unknowns.
    assert result.length == pytest.approx(length, rel=2e-5) and length <= radius * (1 + 2e-5)
    root = torch.linalg.cholesky(m)  # x = root y with |y| the length of x
    best = trust_region_decrease(root.T @ a @ root, root.T @ b, radius)
    assert best / 2 * (1 - 1e-9) <= result.decrease <= best * (1 + 1e-6)
    if result.status is SolveStatus.BOUNDARY:
        assert length == pytest.approx(radius, rel=2e-5)
        before = torch.zeros_like(b)
        if result.iterations > 1:
            solver = CG(result.iterations - 1, 1e-10)
            before = solver(Dense(a), b, preconditioner=Dense(m)).x
        # On the way from that iterate to the next one, which is beyond.
        beyond = CG(result.iterations, 1e-10)(Dense(a), b, preconditioner=Dense(m)).x
        whole, part = beyond - before, result.x - before
        share = float(whole @ part / (whole @ whole))
        assert -1e-9 <= share <= 1 + 1e-6
        torch.testing.assert_close(part, share * whole, rtol=1e-6, atol=1e-6 * radius)
    else:
        assert result.status is SolveStatus.CONVERGED


@pytest.mark.parametrize("curvature", [1e-10, 1e-30, 1e-45])  # the step to the last is infinite
def test_a_radius_far_shorter_than_the_step(curvature: float, device: torch.device) -> None:
    """In float32, going there and back again would end anywhere."""
    entries = torch.tensor([curvature, 1.0], device=device)
    b = torch.tensor([1.0, 0.0], device=device)
    for a in (Diagonal(entries), Dense(torch.tensor([[curvature, 1.0], [1.0, 2.0]]).to(b))):
        result = CG()(a, b, radius=2.0)
        assert result.status is SolveStatus.BOUNDARY and result.length == 2.0
        torch.testing.assert_close(result.x, 2 * b)
        assert result.decrease == pytest.approx(2.0)


def test_a_radius_of_zero(device: torch.device) -> None:
    b = vector_of(5).to(device)
    result = CG()(Identity(), b, radius=0.0)
    assert result.status is SolveStatus.BOUNDARY and not result.x.any() and result.decrease == 0


@given(
    size=st.integers(2, 12),
    lowest=st.floats(-3.0, -1e-2),
    radius=st.none() | st.floats(1e-2, 1e2),
    preconditioned=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=80)
def test_negative_curvature(
    size: int, lowest: float, radius: float | None, preconditioned: bool, seed: int
) -> None:
    eigenvalues = torch.linspace(lowest, 4.0, size, dtype=torch.float64)
    a, b = symmetric(eigenvalues, seed), vector_of(size, seed)
    m = metric(size, seed + 1)
    p_or_none = Dense(m) if preconditioned else None
    operator = Dense(a)
    result = EXACT(operator, b, preconditioner=p_or_none, radius=radius)
    assert operator.products == result.products
    check_numbers(result, a, b)
    if result.status is not SolveStatus.NEGATIVE_CURVATURE:
        assert radius is not None and result.status is SolveStatus.BOUNDARY
        return
    p, free = result.negative_direction, EXACT(Dense(a), b, preconditioner=p_or_none)
    assert float(p @ (a @ p)) <= 0 and float(p @ b) > 0
    torch.testing.assert_close(free.negative_direction, p)
    if radius is None:
        assert result.products == result.iterations + 1 and result.length == 0.0
        assert (result.iterations == 0) == (not result.x.any())
        return
    assert result.iterations == free.iterations + 1
    inverse = torch.linalg.inv(m) if preconditioned else torch.eye(size, dtype=torch.float64)
    x = free.x
    half, room = float(p @ inverse @ x), radius**2 - float(x @ inverse @ x)
    square = float(p @ inverse @ p)
    larger_root = (-half + math.sqrt(half**2 + square * room)) / square
    torch.testing.assert_close(result.x, x + larger_root * p, rtol=1e-6, atol=1e-6 * radius)
    assert result.length == radius and result.decrease >= free.decrease


def test_negative_curvature_at_once(device: torch.device) -> None:
    b = torch.tensor([3.0, 4.0], device=device)
    result = CG()(Dense(-torch.eye(2, device=device)), b)
    assert result.status is SolveStatus.NEGATIVE_CURVATURE and not result.x.any()
    assert (result.iterations, result.products, result.decrease) == (0, 1, 0.0)
    assert torch.equal(result.negative_direction, b) and result.negative_curvature == -1.0
    held = CG()(Dense(-torch.eye(2, device=device)), b, radius=10.0)
    torch.testing.assert_close(held.x, 2 * b)
    assert held.decrease == pytest.approx(2 * 25 + 50) and held.iterations == 1
    zero = CG()(Dense(torch.zeros(2, 2, device=device)), b)
    assert zero.status is SolveStatus.NEGATIVE_CURVATURE and zero.negative_curvature == 0.0


@pytest.mark.parametrize("lowest", [-1e-15, 0.0, 1e-17])
def test_curvature_lost_in_rounding_ends_the_solve(lowest: float, device: torch.device) -> None:
    """A step along it would be 1e14 long, and up the quadratic as likely as down."""
    a = torch.tensor([lowest, 3.0], dtype=torch.float64, device=device).diag()
    b = vector_of(2).to(device)
    result = CG()(Dense(a), b)
    assert result.status is SolveStatus.NEGATIVE_CURVATURE and result.iterations == 1
    assert result.decrease > 0 and torch.linalg.vector_norm(result.x) < 100
    check_numbers(result, a, b)
