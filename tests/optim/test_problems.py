"""Holds the test functions to published values, to finite differences and to SciPy's minima."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.problems import NONCONVEX, PROBLEMS, PROBLEMS_BY_NAME, Problem, make_problems

each_problem = pytest.mark.parametrize(
    "problem", [*PROBLEMS, *NONCONVEX], ids=lambda problem: problem.name
)


def value_and_gradient(problem: Problem, x: np.ndarray) -> tuple[float, np.ndarray]:
    """Evaluates a problem for NumPy."""
    point = torch.from_numpy(x).requires_grad_()
    loss = problem.function(point)
    loss.backward()
    assert point.grad is not None
    return loss.item(), point.grad.numpy()


def test_names_are_unique() -> None:
    assert len(PROBLEMS_BY_NAME) == len(PROBLEMS) >= 20


@each_problem
def test_start(problem: Problem) -> None:
    value = problem.function(problem.start)
    assert value.ndim == 0
    assert value.dtype == torch.float64
    if problem.start_value is not None:
        assert value.item() == pytest.approx(problem.start_value, rel=1e-9)


@each_problem
def test_gradient_is_that_of_central_differences(problem: Problem) -> None:
    generator = np.random.default_rng(0)
    start = problem.start.numpy()
    # Away from the start, where symmetry may hide a wrong term.
    x = start + 0.01 * generator.standard_normal(start.shape)
    value, gradient = value_and_gradient(problem, x)
    differences = np.empty_like(x)
    for i in range(x.size):
        # In the waves of this one, however far away.
        step = 1e-5 * (1.0 if problem.name == "loghairy" else max(1.0, abs(x[i])))
        high, low = x.copy(), x.copy()
        high[i] += step
        low[i] -= step
        rise = value_and_gradient(problem, high)[0] - value_and_gradient(problem, low)[0]
        differences[i] = rise / (2.0 * step)
    # Rounding of the function value, of about 1e-16 / 1e-5 of it, bounds what can be asked.
    tolerance = 1e-6 * np.abs(gradient).max() + 1e-10 * abs(value)
    np.testing.assert_allclose(gradient, differences, rtol=1e-6, atol=tolerance)


@each_problem
def test_scipy_reaches_a_known_minimum(problem: Problem) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    if not problem.minima:
        pytest.skip("it has too many")
    result = optimize.minimize(
        lambda x: value_and_gradient(problem, x),
        problem.start.numpy().copy(),
        jac=True,
        method="BFGS" if problem.size <= 200 else "L-BFGS-B",  # no matrices of a million entries
        options={"gtol": 1e-8, "maxiter": 20_000},
    )
    assert problem.is_minimum(result.fun, rtol=1e-5, atol=1e-10), result


def test_condition_of_the_quadratic() -> None:
    problem = PROBLEMS_BY_NAME["ill_conditioned_quadratic"]
    hessian = torch.autograd.functional.hessian(problem.function, problem.start)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    assert problem.size == 200
    torch.testing.assert_close(eigenvalues[-1] / eigenvalues[0], torch.tensor(1e6).double())


def test_the_chain_of_one_link_is_the_function_of_wood() -> None:
    chainwoo = next(problem for problem in NONCONVEX if problem.name == "chainwoo")
    x = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wood = PROBLEMS_BY_NAME["wood"].function(x)
    torch.testing.assert_close(chainwoo.function(x), 1.0 + wood)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_problems_on_cuda_match_those_on_cpu() -> None:
    for here, there in zip(PROBLEMS, make_problems("cuda"), strict=True):
        value = there.function(there.start)
        assert value.is_cuda
        torch.testing.assert_close(value.cpu(), here.function(here.start), rtol=1e-9, atol=0.0)
