"""Errors of constraints of `minimize`: each names what is wrong, before anything has happened."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from scipy.optimize import LinearConstraint, NonlinearConstraint
from torch import Tensor

from torch_secondorder import minimize

START = torch.tensor([0.5, 0.0], dtype=torch.float64)
inf = float("inf")


def never(x: Any) -> Tensor:
    raise AssertionError("the function was called")


def rosenbrock(x: Tensor) -> Tensor:
    return 100.0 * (x[1] - x[0] ** 2) ** 2 + (1.0 - x[0]) ** 2


def disk(x: Any) -> Any:
    return 1.0 - x[0] ** 2 - x[1] ** 2


DISK = {"type": "ineq", "fun": disk}


@pytest.mark.parametrize(
    ("constraints", "kind", "message"),
    [
        (3, TypeError, "constraints must be a dict {'type': 'eq' or 'ineq'.*; got int"),
        ([DISK, "x"], TypeError, r"constraints\[1\] must be a dict .*; got str"),
        ([disk], TypeError, r"constraints\[0\] must be a dict .*; got function"),
        ({"type": "ineq"}, ValueError, "constraints has no 'fun'"),
        ([{"fun": disk}], ValueError, r"constraints\[0\] has no 'type'"),
        ({"type": "ge", "fun": disk}, ValueError, "'eq' for .* or 'ineq' for .*, got 'ge'"),
        ({"type": 1, "fun": disk}, TypeError, "the type of constraints must be .*, got 1"),
        ({"type": "eq", "fun": 1.0}, TypeError, "fun of constraints must be a function, got float"),
        ({"type": "eq", "func": disk}, ValueError, "unknown keys 'func'"),
        ({"type": "eq", "fun": disk, "lb": 0, "ub": 1}, ValueError, "unknown keys 'lb', 'ub'"),
        ({"disk": {"type": "eq"}}, ValueError, "disk has no 'fun'"),
        ({"type": "eq", "fun": disk, "jac": "exact"}, ValueError, "jac of constraints .* 'exact'"),
        (SimpleNamespace(fun=2, lb=0, ub=1), TypeError, "fun of constraints must be a function"),
        (
            scipy.optimize.Bounds([0, 0], [1, 1]),
            TypeError,
            "neither fun nor A: pass bounds of x as bounds=constraints",
        ),
        (NonlinearConstraint(disk, 1.0, 0.0), ValueError, "lb of constraints is 1.0 and ub is 0.0"),
        (
            NonlinearConstraint(disk, [0.0, 3.0], [1.0, 2.0]),
            ValueError,
            "lb of constraints is 3.0 and ub is 2.0 at 1: no value lies",
        ),
        (NonlinearConstraint(disk, inf, inf), ValueError, "lb of constraints is inf"),
        (NonlinearConstraint(disk, -inf, -inf), ValueError, "and ub is -inf"),
        (NonlinearConstraint(disk, float("nan"), 1.0), ValueError, "lb of constraints is NaN"),
        (NonlinearConstraint(disk, 0.0, [1, np.nan]), ValueError, "ub of constraints is NaN"),
        (SimpleNamespace(fun=disk, lb="a", ub=1), TypeError, "lb of constraints must be a number"),
        (
            SimpleNamespace(fun=disk, lb=[0, 0], ub=[1, 1, 1]),
            ValueError,
            r"lb and ub of constraints have shapes \(2,\) and \(3,\), which do not broadcast",
        ),
        (
            LinearConstraint(np.ones((3, 3)), 0, 1),
            ValueError,
            r"A of constraints has shape \(3, 3\), and x0 has 2 entries: .* \(m, 2\), or \(2,\)",
        ),
        (SimpleNamespace(A="a", lb=0, ub=1), TypeError, "A of constraints must be a matrix"),
        (
            SimpleNamespace(A=[[1.0, inf]], lb=0, ub=1),
            ValueError,
            "A of constraints must hold finite real",
        ),
    ],
)
def test_wrong_forms(constraints: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        minimize(never, START, constraints=constraints)


@pytest.mark.parametrize(
    ("constraint", "kind", "message"),
    [
        ({"type": "eq", "fun": lambda x: "a"}, TypeError, "fun of constraints must return numbers"),
        ({"type": "eq", "fun": lambda x: None}, TypeError, "must return numbers, got NoneType"),
        ({"type": "eq", "fun": lambda x: x[0] * 1j}, TypeError, "must return real numbers"),
        (
            {"type": "eq", "fun": lambda x: x.detach().sum()},
            ValueError,
            "the values of constraints do not depend on x by operations that autograd records",
        ),
        ({"type": "eq", "fun": lambda x: x.sum().item()}, ValueError, "without .detach.*'2-point'"),
        (
            {"type": "eq", "fun": lambda x: np.sin(x.numpy())},
            TypeError,
            "constraints: the function hands x to NumPy",
        ),
        (
            NonlinearConstraint(lambda x: x.detach(), 0, 1, jac="cs"),
            ValueError,
            "jac='cs' of constraints needs a function of complex numbers",
        ),
        (
            NonlinearConstraint(lambda x: x, [0, 0, 0], 1),
            ValueError,
            r"constraints returns values of shape \(2,\), to which .* shape \(3,\) do not",
        ),
        (
            {"type": "eq", "fun": disk, "jac": lambda x: torch.ones(3)},
            ValueError,
            r"jac of constraints returned shape \(3,\); for values of shape \(\) .* be \(2,\)",
        ),
        (
            {"type": "eq", "fun": disk, "jac": lambda x: "a"},
            TypeError,
            "jac of constraints must return numbers, got str",
        ),
    ],
)
def test_wrong_values(constraint: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        minimize(never, START, constraints=constraint)


def test_wrong_jacobian_of_a_tree() -> None:
    tree = {"a": START.clone(), "b": START.clone()}
    constraint = {"type": "eq", "fun": lambda p: 1.0, "jac": lambda p: [START]}
    with pytest.raises(ValueError, match="jac of constraints returned 1 tensors, and x0 has 2"):
        minimize(never, tree, constraints=constraint)


def test_complex_unknowns() -> None:
    start = torch.tensor([0.5 + 0.5j], dtype=torch.complex128)
    result = minimize(
        lambda z: (z - 2.0).abs().square().sum(),
        start,
        constraints={"type": "ineq", "fun": lambda z: 1.0 - z.abs().square()},
    )
    assert result.success and (result.x - 1.0).abs().item() < 1e-6
    with pytest.raises(TypeError, match="A of constraints multiplies real numbers"):
        minimize(never, start, constraints=LinearConstraint([[1.0]], 0, 1))
    with pytest.raises(TypeError, match="constraints must be computed by operations of torch"):
        minimize(never, start, constraints={"type": "eq", "fun": lambda z: 1.0, "jac": lambda z: z})


def test_shapes_that_change() -> None:
    sizes = iter([2, 2, 2, 1])

    def values(x: Tensor) -> Tensor:
        return x[: next(sizes)]

    with pytest.raises(RuntimeError, match=r"shape \(1,\) after some of shape \(2,\)"):
        minimize(rosenbrock, START, constraints={"type": "ineq", "fun": values})


@pytest.mark.parametrize("method", ["adahessian", "sophia", "lm"])
def test_methods_that_cannot(method: str) -> None:
    with pytest.raises(
        ValueError, match=f"method '{method}' cannot take constraints here; .*'bfgs"
    ):
        minimize(never, START, method, constraints=DISK)


def test_other_arguments() -> None:
    with pytest.raises(ValueError, match="compile does not go with constraints"):
        minimize(never, START, constraints=DISK, compile=True)
    with pytest.raises(ValueError, match="unknown option 'feasibility_tol' of method 'bfgs'"):
        minimize(never, START, options={"feasibility_tol": 1e-3})
    with pytest.raises(ValueError, match=r"it has .*feasibility_tol, constraint_method, penalty"):
        minimize(never, START, constraints=DISK, options={"tolerance_constraints": 1})
    with pytest.raises(ValueError, match=r"options\['catol'\] must be a finite number"):
        minimize(never, START, constraints=DISK, options={"catol": -1})
    with pytest.raises(ValueError, match="'catol' and 'feasibility_tol' are the same: give one"):
        minimize(never, START, constraints=DISK, options={"catol": 1, "feasibility_tol": 1})
    for none in (None, (), [], {}):
        assert "v" not in minimize(rosenbrock, START, constraints=none)
