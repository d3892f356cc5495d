"""Steps within a radius for linearized residuals, beside a dense oracle."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_secondorder.solvers import DenseQuadratic
from torch_secondorder.solvers._residual_region import BoxedRegion, ResidualRegion


def jacobian(J: Tensor, r: Tensor, rest: Any = 0.0, gradient: Tensor | None = None) -> Any:
    """What the regions use of a `ResidualJacobian`."""
    return SimpleNamespace(
        rows=len(J),
        size=J.shape[1],
        residuals=r,
        rest_diagonal=rest,
        rest_gradient=gradient,
        dense=lambda: J,
        normal_matrix=lambda: J.T @ J,
    )


def problem(rows: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    J = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    r = torch.randn(rows, generator=generator, dtype=torch.float64)
    metric = torch.rand(size, generator=generator, dtype=torch.float64) * 9 + 0.1
    return J, r, metric


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 5), st.integers(0, 10**6), st.sampled_from([1e-3, 0.1, 10.0])
)
def test_steps_are_those_of_the_dense_quadratic(
    rows: int, size: int, seed: int, share: float
) -> None:
    J, r, metric = problem(rows, size, seed)
    units = metric.sqrt()
    grad = J.T @ r
    region = ResidualRegion(jacobian(J, r), grad, metric)
    radius = share * float((units * (torch.linalg.pinv(J / units) @ r) / units).norm() + 1e-9)
    step = region.within(radius)
    assert step.length <= radius * (1 + 2e-3)
    assert step.length == pytest.approx(float((units * step.x).norm()), rel=1e-8, abs=1e-14)
    assert step.slope == pytest.approx(float(grad @ step.x), rel=1e-8)
    image = J @ step.x
    assert step.decrease == pytest.approx(
        float(-(grad @ step.x) - 0.5 * image @ image), rel=1e-6, abs=1e-13
    )
    scaled = J / units
    best = DenseQuadratic.of(scaled.T @ scaled, grad / units).within(radius)
    assert step.decrease >= best.decrease * (1 - 5e-3) - 1e-12
    assert step.held == (step.length >= 0.99 * radius and share < 1) or share > 1


def test_the_whole_step_is_that_of_gauss_and_newton() -> None:
    J, r, metric = problem(9, 4)
    step = ResidualRegion(jacobian(J, r), J.T @ r, metric).within(1e9)
    assert torch.allclose(step.x, -torch.linalg.lstsq(J, r).solution, rtol=1e-12)
    assert not step.held


def test_digits_that_normal_equations_lose() -> None:
    """Columns that agree to nine digits: the squares of the singular values agree to eighteen."""
    J, r, _ = problem(20, 3)
    J[:, 2] = J[:, 1] + 1e-9 * J[:, 2]
    truth = torch.tensor([1.0, -2.0, 3.0]).double()
    r = -J @ truth
    step = ResidualRegion(jacobian(J, r), J.T @ r).within(1e9)
    assert torch.allclose(step.x, truth, atol=1e-5)


def test_columns_that_are_zero_stay() -> None:
    J, r, _ = problem(6, 3)
    J[:, 1] = 0.0
    step = ResidualRegion(jacobian(J, r), J.T @ r).within(1e9)
    assert step.x[1] == 0.0 and bool(step.x.isfinite().all())
    still = ResidualRegion(jacobian(torch.zeros(2, 3).double(), r[:2]), torch.zeros(3).double())
    assert still.within(1.0).decrease == 0.0 and still.along_gradient() == 0.0


def test_terms_beside_the_residuals() -> None:
    J, r, metric = problem(8, 3)
    rest, gradient = torch.tensor([0.5, 0.0, 2.0]).double(), torch.tensor([1.0, -1.0, 0.3]).double()
    grad = J.T @ r + gradient
    region = ResidualRegion(jacobian(J, r, rest, gradient), grad, metric)
    A = J.T @ J + torch.diag(rest)
    assert torch.allclose(region.within(1e9).x, -torch.linalg.solve(A, grad))
    assert region.length_of(grad) == pytest.approx(float((metric.sqrt() * grad).norm()))
    held = region.within(0.1)
    multiplier = float(-(grad + A @ held.x) @ held.x / (held.x @ (metric * held.x)))
    assert torch.allclose((A + multiplier * torch.diag(metric)) @ held.x, -grad, rtol=1e-8)
    assert held.held and held.length == pytest.approx(0.1, rel=2e-3)


def test_along_the_gradient() -> None:
    J, r, metric = problem(8, 3)
    direction = (J.T @ r) / metric  # of steepest descent in the metric
    t = float((J.T @ r) @ direction / (J @ direction).square().sum())
    wanted = t * float((metric.sqrt() * direction).norm())
    region = ResidualRegion(jacobian(J, r), J.T @ r, metric)
    assert region.along_gradient() == pytest.approx(wanted)


@pytest.mark.parametrize("radius", [0.05, 1e9])
def test_further_steps_use_the_same_system(radius: float) -> None:
    J, r, metric = problem(8, 3)
    region = ResidualRegion(jacobian(J, r), J.T @ r, metric)
    first = region.within(radius)
    again = region.further(J.T @ r, torch.zeros(3).double())
    assert torch.allclose(again, first.x, rtol=1e-10)


def test_within_bounds() -> None:
    J, r, metric = problem(8, 3)
    free = ResidualRegion(jacobian(J, r), J.T @ r, metric).within(1e9).x
    wide = torch.full((3,), math.inf).double()
    region = BoxedRegion(jacobian(J, r), J.T @ r, metric, -wide, wide)
    assert torch.allclose(region.within(1e9).x, free, rtol=1e-9)
    held = region.within(0.1)
    assert held.held and held.length == pytest.approx(0.1)
    assert held.length == pytest.approx(region.length_of(held.x))
    assert float((metric.sqrt() * held.x).abs().max()) <= 0.1 * (1 + 1e-9)
    low = torch.where(free < 0, 0.5 * free, -1.0)
    high = torch.where(free > 0, 0.5 * free, 1.0)
    step = BoxedRegion(jacobian(J, r), J.T @ r, metric, low, high).within(1e9).x
    assert bool(((low <= step) & (step <= high)).all())
    assert region.along_gradient() > 0
