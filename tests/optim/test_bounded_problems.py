"""Holds the bounded test functions to their conditions of optimality and to SciPy's minima."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.bounded_problems import (
    BOUNDED_BY_NAME,
    BOUNDED_PROBLEMS,
    BoundedProblem,
    make_bounded_problems,
    polished,
)

each_problem = pytest.mark.parametrize("problem", BOUNDED_PROBLEMS, ids=lambda p: p.name)


def gradient_of(problem: BoundedProblem, x: torch.Tensor) -> torch.Tensor:
    return torch.func.grad(problem.function)(x)


def scipy_minimum(problem: BoundedProblem) -> torch.Tensor:
    optimize = pytest.importorskip("scipy.optimize")

    def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.from_numpy(x.copy())
        return problem.function(point).item(), gradient_of(problem, point).numpy()

    result = optimize.minimize(
        value_and_gradient,
        problem.start.numpy(),
        jac=True,
        method="L-BFGS-B",
        bounds=optimize.Bounds(problem.low.numpy(), problem.high.numpy()),
        options={"gtol": 1e-9, "ftol": 0.0, "maxiter": 5_000, "maxfun": 20_000, "maxls": 50},
    )
    return torch.from_numpy(result.x)


def test_there_are_enough_of_every_kind() -> None:
    assert len(BOUNDED_BY_NAME) == len(BOUNDED_PROBLEMS) >= 20
    assert sum(problem.degenerate for problem in BOUNDED_PROBLEMS) >= 3
    assert any((p.low == p.high).any() for p in BOUNDED_PROBLEMS)


@each_problem
def test_start_and_box(problem: BoundedProblem) -> None:
    value = problem.function(problem.start)
    assert value.ndim == 0
    assert value.dtype == problem.low.dtype == problem.high.dtype == torch.float64
    assert problem.low.shape == problem.high.shape == problem.start.shape
    assert (problem.low <= problem.high).all()
    assert problem.function(problem.feasible_start).isfinite()
    if problem.start_value is not None:
        assert value.item() == pytest.approx(problem.start_value, rel=1e-9, abs=1e-12)


@each_problem
def test_scipy_and_newton_on_the_active_set_reach_a_known_minimum(problem: BoundedProblem) -> None:
    x = polished(problem, scipy_minimum(problem))
    low, high, gradient = problem.low, problem.high, gradient_of(problem, x)
    assert ((low <= x) & (x <= high)).all()
    scale = max(1.0, problem.function(x).abs().item())
    assert problem.projected_gradient(x).abs().max() <= 1e-8 * scale
    assert (gradient[(x == low) & (x < high)] >= -1e-8 * scale).all()
    assert (gradient[(x == high) & (x > low)] <= 1e-8 * scale).all()
    assert problem.is_minimum(problem.function(x).item(), 1e-10)


@each_problem
def test_recorded_solution(problem: BoundedProblem) -> None:
    x = problem.solution
    if x is None:
        pytest.skip("it has no short form")
    assert ((problem.low <= x) & (x <= problem.high)).all()
    assert problem.projected_gradient(x).abs().max() <= 1e-10
    value = problem.function(x).item()
    assert abs(value - problem.minima[0]) <= 1e-12 * max(1.0, abs(problem.minima[0]))
    assert problem.minima[0] == min(problem.minima)
    # Multipliers of zero, exactly where they are announced.
    active = (x == problem.low) | (x == problem.high)
    zero = gradient_of(problem, x)[active].abs() < 1e-9
    assert zero.any() == problem.degenerate


@each_problem
def test_gradient_is_that_of_central_differences(problem: BoundedProblem) -> None:
    x, low, high = problem.feasible_start, problem.low, problem.high
    # Inside the box, where all functions are defined, and away from the symmetry of the start.
    room = torch.minimum(torch.minimum(x - low, high - x).clamp(max=1.0), x.abs() + 0.1)
    x = torch.where(low < high, x.clamp(low + 1e-3, high - 1e-3) + 0.01 * room, x)
    gradient = gradient_of(problem, x)
    directions = torch.randn(
        3, x.numel(), dtype=x.dtype, generator=torch.Generator().manual_seed(0)
    )
    for direction in directions / directions.norm(dim=1, keepdim=True):
        step = 1e-5 * direction
        rise = (problem.function(x + step) - problem.function(x - step)) / 2e-5
        scale = gradient.norm() + 1e-4 * problem.function(x).abs()
        assert (rise - gradient.dot(direction)).abs() <= 1e-6 * scale


def test_the_degenerate_quadratic_has_each_kind_of_variable() -> None:
    problem = BOUNDED_BY_NAME["degenerate_quadratic"]
    solution = problem.high - 10.0
    active = solution < problem.low + 1e-12
    multipliers = gradient_of(problem, solution)
    assert (~active).sum() == 14
    assert (multipliers[active].abs() < 1e-12).sum() == 13
    assert ((multipliers[active] - 1.0).abs() < 1e-12).sum() == 13


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_problems_on_cuda_match_those_on_cpu() -> None:
    for here, there in zip(BOUNDED_PROBLEMS, make_bounded_problems("cuda"), strict=True):
        value = there.function(there.start)
        assert value.is_cuda
        torch.testing.assert_close(value.cpu(), here.function(here.start), rtol=1e-9, atol=1e-12)
