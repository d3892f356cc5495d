"""Holds the problems with constraints to values of the book and to SciPy's solutions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.constrained_problems import (
    CONSTRAINED_BY_NAME,
    CONSTRAINED_PROBLEMS,
    ConstrainedProblem,
    make_constrained_problems,
)

each_problem = pytest.mark.parametrize("problem", CONSTRAINED_PROBLEMS, ids=lambda p: p.name)


def scipy_solution(problem: ConstrainedProblem, start: np.ndarray) -> torch.Tensor:
    optimize = pytest.importorskip("scipy.optimize")

    def of(function, sign=1.0):
        def value(x):
            return sign * function(torch.from_numpy(x)).numpy()

        def jacobian(x):
            return sign * torch.func.jacrev(function)(torch.from_numpy(x)).numpy()

        return {"fun": value, "jac": jacobian}

    constraints = [
        {"type": "eq"} | of(problem.all_equalities),
        {"type": "ineq"} | of(problem.all_inequalities, -1.0),
    ]
    result = optimize.minimize(
        **of(problem.function),
        x0=start,
        method="SLSQP",
        constraints=constraints,
        options={"ftol": 1e-10, "maxiter": 300},
    )
    return torch.from_numpy(result.x)


def test_there_are_enough_of_every_kind() -> None:
    assert len(CONSTRAINED_BY_NAME) == len(CONSTRAINED_PROBLEMS) >= 50
    kinds = [(p.equalities is None, p.inequalities is None) for p in CONSTRAINED_PROBLEMS]
    assert min(kinds.count(kind) for kind in ((True, False), (False, True))) >= 15
    assert kinds.count((False, False)) >= 3
    assert sum(p.low is not None or p.high is not None for p in CONSTRAINED_PROBLEMS) >= 15


@each_problem
def test_start_and_shapes(problem: ConstrainedProblem) -> None:
    x = problem.start
    value = problem.function(x)
    assert value.ndim == 0
    assert value.dtype == x.dtype == torch.float64
    assert value.item() == pytest.approx(problem.start_value, rel=1e-7, abs=1e-12)
    assert problem.all_equalities(x).ndim == problem.all_inequalities(x).ndim == 1
    for bound in (problem.low, problem.high):
        assert bound is None or bound.shape == x.shape


@each_problem
def test_minimum_is_that_of_scipy(problem: ConstrainedProblem) -> None:
    start = problem.start.numpy()
    if problem.name == "hs61":  # SLSQP gives up where linearized constraints contradict each other
        start = np.array([5.0, -2.0, 3.0])
    x = scipy_solution(problem, start)
    assert problem.violation(x) < 1e-6
    assert problem.is_minimum(problem.function(x).item(), 1e-5)


def test_residual_of_a_known_solution() -> None:
    problem = CONSTRAINED_BY_NAME["hs28"]
    x, y = torch.tensor([0.5, -0.5, 0.5], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert problem.kkt_residual(x, y, y[:0]) < 1e-15
    assert problem.kkt_residual(x + 0.1, y, y[:0]) > 0.1
    assert problem.kkt_residual(x, y + 0.1, y[:0]) == pytest.approx(0.3)


def test_signs_and_complementarity_of_inequalities() -> None:
    problem = CONSTRAINED_BY_NAME["hs35"]
    x = torch.tensor([4 / 3, 7 / 9, 4 / 9], dtype=torch.float64)
    y = torch.tensor([2 / 9, 0, 0, 0], dtype=torch.float64)
    none = y[:0]
    assert problem.kkt_residual(x, none, y) < 1e-14
    assert problem.kkt_residual(x, none, y + torch.tensor([0, 1, 0, 0])) > 1
    assert problem.kkt_residual(x, none, -y) > 0.1


@pytest.mark.parametrize("name", ["hs71", "hs111"])
def test_device(name: str, device: torch.device) -> None:
    table = {p.name: p for p in make_constrained_problems(device)}
    problem = table[name]
    assert problem.function(problem.start).device.type == device.type
    assert problem.violation(problem.start) == pytest.approx(
        CONSTRAINED_BY_NAME[name].violation(CONSTRAINED_BY_NAME[name].start)
    )
