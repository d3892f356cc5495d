"""Constraints of `minimize` in SciPy's forms, beside SciPy itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from scipy.optimize import LinearConstraint, NonlinearConstraint
from torch import Tensor

from tests.support.constrained_problems import CONSTRAINED_PROBLEMS, ConstrainedProblem
from torch_secondorder import OptimizeResult, minimize
from torch_secondorder.minimization._methods import METHODS

inf = float("inf")
START = torch.tensor([-1.2, 1.0], dtype=torch.float64)
ABLE = [name for name, row in METHODS.items() if row.takes_constraints]


def rosenbrock(x: Any) -> Any:
    """Of a tensor or of an array."""
    return 100.0 * (x[1] - x[0] ** 2) ** 2 + (1.0 - x[0]) ** 2


def never(x: Any) -> Tensor:
    raise AssertionError("the function was called")


def disk(x: Any) -> Any:
    return 1.0 - x[0] ** 2 - x[1] ** 2


def line(x: Any) -> Any:
    return x[0] + x[1] - 1.0


DISK = {"type": "ineq", "fun": disk}


def close(result: OptimizeResult, x: Any, tolerance: float = 1e-5) -> bool:
    return bool(torch.allclose(result.x, torch.as_tensor(x).to(result.x), atol=tolerance, rtol=0))


# The same constraints in both.

# What SciPy says of constraints that SLSQP takes apart, and of linear ones.
QUIET = pytest.mark.filterwarnings(
    "ignore::scipy.optimize.OptimizeWarning", "ignore:delta_grad|Singular Jac:UserWarning"
)

FORMS: dict[str, Any] = {
    "a dict": DISK,
    "an equality": {"type": "eq", "fun": line},
    "types in capitals": {"type": "EQ", "fun": line},
    "arguments": {"type": "ineq", "fun": lambda x, r, s: r - s * x[0] ** 2, "args": (0.25, 1.0)},
    "a jac": {"type": "ineq", "fun": disk, "jac": lambda x: [-2.0 * x[0], -2.0 * x[1]]},
    "a tuple": (DISK, {"type": "eq", "fun": lambda x: x[0] - 2.0 * x[1]}),
    "several values": NonlinearConstraint(
        lambda x: [x[0] ** 2 + x[1], x[0] ** 2 - x[1]], -inf, 1.0
    ),
    "an equality and an inequality": NonlinearConstraint(
        lambda x: [x[0] ** 2 + x[1], x[0] ** 2 - x[1]], [0.5, -inf], [0.5, 0.3]
    ),
    "both sides": NonlinearConstraint(lambda x: x[0] * x[1], -0.5, 0.1),
    "both sides, the lower one active": NonlinearConstraint(lambda x: x[0] * x[1], 2.0, 3.0),
    "a matrix": LinearConstraint([[1.0, 2.0], [2.0, 1.0]], [-inf, 1.0], [1.0, 1.0]),
    "one row": LinearConstraint([1.0, 2.0], ub=1.0),
    "SciPy's tutorial": [
        LinearConstraint([[1.0, 2.0], [2.0, 1.0]], [-inf, 1.0], [1.0, 1.0]),
        NonlinearConstraint(lambda x: [x[0] ** 2 + x[1], x[0] ** 2 - x[1]], -inf, 1.0),
    ],
    "nothing active": NonlinearConstraint(lambda x: x[0], -10.0, 10.0),
    "no bounds at all": NonlinearConstraint(lambda x: x[0], -inf, inf),
    "values without a graph": NonlinearConstraint(lambda x: float(x[0]) ** 2, -inf, 0.5),
    "NumPy": NonlinearConstraint(
        lambda x: np.array([x[0] ** 2 + x[1], np.exp(x[0])]), -inf, [1.0, 2.0], jac="3-point"
    ),
    "NumPy and a jac": NonlinearConstraint(
        lambda x: np.array([float(x[0]) ** 2 + float(x[1])]),
        -inf,
        1.0,
        jac=lambda x: np.array([[2.0 * float(x[0]), 1.0]]),
    ),
}


@QUIET
@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_beside_scipy(form: str, bounded: bool) -> None:
    constraints = FORMS[form]
    bounds = scipy.optimize.Bounds([-0.5, -1.0], [0.75, 2.0]) if bounded else None
    if bounded and "lower one" in form:
        bounds = scipy.optimize.Bounds([0.0, 0.0], [1.3, 9.0])
    theirs = scipy.optimize.minimize(
        rosenbrock, START.numpy(), method="SLSQP", constraints=constraints, bounds=bounds,
        options={"ftol": 1e-14, "maxiter": 500},
    )  # fmt: skip
    result = minimize(rosenbrock, START, constraints=constraints, bounds=bounds)
    assert result.success and result.status == 0, result
    assert result.fun <= theirs.fun + 1e-6
    assert result.constr_violation <= 1e-8 and result.optimality < 1e-5
    if bounds is not None:
        assert (result.x.numpy() >= bounds.lb).all() and (result.x.numpy() <= bounds.ub).all()


@QUIET
@pytest.mark.parametrize("form", ["SciPy's tutorial", "both sides", "an equality", "a dict"])
@pytest.mark.parametrize("bounded", [False, True])
def test_multipliers_beside_those_of_trust_constr(form: str, bounded: bool) -> None:
    bounds = scipy.optimize.Bounds([-0.5, -1.0], [0.3, 2.0]) if bounded else None
    arguments: dict[str, Any] = {"constraints": FORMS[form], "bounds": bounds}
    theirs = scipy.optimize.minimize(
        rosenbrock, START.numpy(), method="trust-constr", **arguments,
        options={"gtol": 1e-9, "xtol": 1e-12, "barrier_tol": 1e-9, "maxiter": 3000},
    )  # fmt: skip
    ours = minimize(rosenbrock, START, **arguments)
    assert close(ours, theirs.x, 1e-4)
    assert len(ours.v) == len(theirs.v) and len(ours.constr) == len(theirs.constr)
    for v, w, c, d in zip(ours.v, theirs.v, ours.constr, theirs.constr, strict=True):
        np.testing.assert_allclose(v.reshape(-1), w, atol=2e-3, rtol=1e-3)
        np.testing.assert_allclose(c.reshape(-1), d, atol=1e-4)


@pytest.mark.parametrize("problem", CONSTRAINED_PROBLEMS, ids=lambda p: p.name)
def test_problems_of_hock_and_schittkowski(problem: ConstrainedProblem) -> None:
    constraints = []
    if problem.equalities is not None:
        constraints.append({"type": "eq", "fun": problem.equalities})
    if problem.inequalities is not None:
        constraints.append(NonlinearConstraint(problem.inequalities, -inf, 0.0))
    bounds = None
    if problem.low is not None or problem.high is not None:
        bounds = (problem.low, problem.high)
    result = minimize(problem.function, problem.start, constraints=constraints, bounds=bounds)
    assert result.success, result
    assert problem.is_minimum(result.fun), (result.fun, problem.minimum)
    assert result.constr_violation <= 1e-8 and problem.violation(result.x) <= 1e-8
