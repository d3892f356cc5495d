"""Constraints of `minimize` in SciPy's forms, beside SciPy itself."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, NonlinearConstraint
from torch import Tensor

from tests.support.constrained_problems import CONSTRAINED_PROBLEMS, ConstrainedProblem
from torch_secondorder import FunctionalObjective, OptimizeResult, kkt_residuals, minimize
from torch_secondorder.minimization._constraints import ConstraintSet, read_constraints
from torch_secondorder.minimization._methods import METHODS

inf = float("inf")
START = torch.tensor([0.5, 0.0], dtype=torch.float64)
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
    "values without a graph": NonlinearConstraint(lambda x: float(x[0]) ** 2, -inf, 0.5),
    "NumPy": NonlinearConstraint(
        lambda x: np.array([x[0] ** 2 + x[1], np.exp(np.asarray(x[0]))]),
        -inf,
        [1.0, 2.0],
        jac="3-point",
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
    bounds = scipy.optimize.Bounds([-0.5, -1.0], [0.4, 2.0]) if bounded else None
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


def minimized(problem: ConstrainedProblem) -> OptimizeResult:
    constraints: list[Any] = []
    if problem.equalities is not None:
        constraints.append({"type": "eq", "fun": problem.equalities})
    if problem.inequalities is not None:
        constraints.append(NonlinearConstraint(problem.inequalities, -inf, 0.0))
    bounds = None
    if problem.low is not None or problem.high is not None:
        bounds = (problem.low, problem.high)
    return minimize(problem.function, problem.start, constraints=constraints, bounds=bounds)


@pytest.mark.parametrize("problem", CONSTRAINED_PROBLEMS, ids=lambda p: p.name)
def test_problems_of_hock_and_schittkowski(problem: ConstrainedProblem) -> None:
    result = minimized(problem)
    assert result.success, result
    assert problem.is_minimum(result.fun), (result.fun, problem.minimum)
    assert result.constr_violation <= 1e-8 and problem.violation(result.x) <= 1e-8
    # The multipliers of the result pass another certificate.
    x = result.x.clone()
    names = ("equalities", "inequalities")
    kinds = [name for name in names if getattr(problem, name) is not None]
    report = kkt_residuals(
        FunctionalObjective(problem.function, x),
        [x],
        problem.equalities,
        problem.inequalities,
        dict(zip(kinds, result.v, strict=False)),
        bounds=None if problem.low is problem.high is None else (problem.low, problem.high),
    )
    assert report.satisfied(1e-6), report


# Entries with bounds of all kinds.

KINDS = ("none", "lower", "upper", "both", "equal")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=6), st.integers(0, 10**6))
def test_mixtures_of_bounds(kinds: list[str], seed: int) -> None:
    """A quadratic under `lb <= A x <= ub`, of which every entry has bounds of its own kind."""
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    m, n = len(kinds), 7
    A, a, inside = random(m, n), random(n), random(n)
    middle = A @ inside  # so that something is feasible
    low, high = middle - random(m).abs(), middle + random(m).abs()
    for i, kind in enumerate(kinds):
        low[i] = {"none": -inf, "upper": -inf, "equal": middle[i]}.get(kind, low[i])
        high[i] = {"none": inf, "lower": inf, "equal": middle[i]}.get(kind, high[i])
    scale = 1.0 + random(n).square()
    constraint = LinearConstraint(A.numpy(), low.numpy(), high.numpy())
    result = minimize(
        lambda x: (scale * (x - a).square()).sum() / 2, torch.zeros_like(a), constraints=constraint
    )
    assert result.success, result
    (c,), (v,) = result.constr, result.v
    assert torch.allclose(c, A @ result.x)
    assert bool((c >= low - 1e-8).all()) and bool((c <= high + 1e-8).all())
    gradient = scale * (result.x - a)
    assert torch.allclose(result.jac, gradient)
    torch.testing.assert_close(gradient + A.T @ v, torch.zeros_like(a), atol=1e-5, rtol=0)
    for i, kind in enumerate(kinds):
        assert kind != "none" or v[i] == 0
        assert kind != "lower" or v[i] <= 0
        assert kind != "upper" or v[i] >= 0
        if kind in ("lower", "both") and v[i] < -1e-4:
            assert c[i] <= low[i] + 1e-6
        if kind in ("upper", "both") and v[i] > 1e-4:
            assert c[i] >= high[i] - 1e-6


def test_rows_of_a_mixture() -> None:
    """Which entries become which rows, and how multipliers come back."""
    constraint = SimpleNamespace(
        fun=lambda x: x.reshape(2, 2), lb=[[0.0, -inf], [1.0, 2.0]], ub=[[5.0, 6.0], [1.0, inf]]
    )
    x = torch.tensor([-1.0, 7.0, 3.0, 1.0], dtype=torch.float64)
    found = ConstraintSet(read_constraints(constraint, [x]), x, None)
    equal, unequal = found.rows(found.values(x))
    assert equal.tolist() == [2.0]  # entry (1, 0)
    assert unequal.tolist() == [1.0, 1.0, -6.0, 1.0]  # lower (0, 0), (1, 1); upper (0, 0), (0, 1)
    (v,) = found.spread(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert v.tolist() == [[-2.0 + 4.0, 5.0], [1.0, -3.0]]
    (outside,) = found.violations(found.values(x))
    assert outside.tolist() == [[1.0, 1.0], [2.0, 1.0]]
    assert found.entry(0, 3) == "constraints[1, 1]"


def test_a_constraint_without_bounds() -> None:
    constraint = NonlinearConstraint(lambda x: x[0] * 3.0, -inf, inf)
    result = minimize(rosenbrock, START, constraints=constraint)
    assert result.success and close(result, [1.0, 1.0])
    assert result.constr_violation == 0 and result.v[0] == 0
    assert float(result.constr[0]) == pytest.approx(3.0)


# Trees, dtypes, names.


def test_a_tree() -> None:
    start = {"a": torch.tensor(0.5, dtype=torch.float64), "b": torch.zeros(2, dtype=torch.float64)}
    result = minimize(
        lambda p: (p["a"] - 2).square() + (p["b"] - torch.tensor([1.0, 3.0])).square().sum(),
        start,
        constraints={
            "sum": {"type": "eq", "fun": lambda p: p["a"] + p["b"].sum() - 3.0},
            "rows": LinearConstraint([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], -inf, [5.0, 1.5]),
        },
        bounds=(None, {"a": 1.25, "b": 9.0}),
    )
    # By hand: b[1] = 1.5 and a = 1.25 are at their bounds, or the sum would be larger.
    assert result.success
    assert result.x["a"].item() == pytest.approx(1.25) and result.multipliers["rows"][0] == 0
    torch.testing.assert_close(
        result.x["b"], torch.tensor([0.25, 1.5], dtype=torch.float64), atol=1e-7, rtol=0
    )
    assert list(result.multipliers) == ["sum", "rows"]
    for leaf in ("a", "b"):
        assert result.lagrangian_grad[leaf].shape == start[leaf].shape
    # The gradient by b[0] is balanced by the sum alone: 2 (b - 1) + v = 0.
    assert result.v[0].item() == pytest.approx(1.5, abs=1e-6)
    assert result.v[2]["a"].item() == pytest.approx(0.0, abs=1e-6)
    assert result.constr[2] is not None and start["a"] == 0.5


def test_float32() -> None:
    result = minimize(rosenbrock, START.float(), constraints=DISK)
    assert result.success, result
    assert result.x.dtype == torch.float32 and result.v[0].dtype == torch.float32
    assert close(result, [0.78642, 0.61770], 1e-3)
    assert result.constr_violation < 1e-4


def test_constraints_on_every_device(device: torch.device) -> None:
    x0 = START.to(device) if device.type != "mps" else START.float().to(device)
    result = minimize(rosenbrock, x0, constraints=[DISK, LinearConstraint([1.0, 1.0], ub=1.3)])
    assert result.x.device.type == device.type and result.v[0].device.type == device.type
    assert result.success and close(result, [0.74539, 0.55461], 1e-3), result


def test_the_price_of_a_constraint() -> None:
    """A multiplier is the change of the lowest value with its bound."""
    h = 1e-4

    def lowest(radius: float) -> OptimizeResult:
        constraint = NonlinearConstraint(lambda x: x[0] ** 2 + x[1] ** 2, -inf, radius)
        return minimize(rosenbrock, START, constraints=constraint, tol=1e-10)

    change = (lowest(1.0 + h).fun - lowest(1.0 - h).fun) / (2 * h)
    assert lowest(1.0).v[0].item() == pytest.approx(-change, rel=1e-4)


# Methods.


@pytest.mark.parametrize("method", ABLE)
def test_methods(method: str) -> None:
    bounds = (-2.0, 0.75) if METHODS[method].takes_bounds else None
    x = (0.75, 0.5625) if bounds else (0.78642, 0.61770)
    result = minimize(rosenbrock, START, method, constraints=DISK, bounds=bounds)
    assert result.success, result
    assert close(result, x, 1e-4)


@pytest.mark.parametrize("name", ["SLSQP", "trust-constr", "Trust_Constr"])
def test_names_of_scipy(name: str) -> None:
    first = minimize(rosenbrock, START, constraints=DISK)
    result = minimize(rosenbrock, START, name, constraints=DISK)
    assert torch.equal(result.x, first.x) and type(result.info) is type(first.info)
    assert minimize(rosenbrock, START, name).success  # as in SciPy, without constraints as well


@pytest.mark.parametrize("jac", ["2-point", lambda x: torch.func.grad(rosenbrock)(x)])
def test_gradients_from_elsewhere(jac: Any) -> None:
    result = minimize(rosenbrock, START, jac=jac, constraints=DISK)
    assert result.success and close(result, [0.78642, 0.61770], 1e-4)
    assert result.nfev >= result.njev * (3 if jac == "2-point" else 1)


def test_more_unknowns_than_a_matrix_is_for() -> None:
    n = 1500
    result = minimize(
        lambda x: (x - 1.0).square().sum(),
        torch.zeros(n, dtype=torch.float64),
        constraints={"type": "ineq", "fun": lambda x: 1.0 - x.square().sum()},
    )
    assert result.success and type(result.info).__name__ == "LBFGSInfo"
    assert close(result, torch.full((n,), n**-0.5), 1e-6)


# Callbacks and limits.


@pytest.mark.parametrize("method", ["bfgs", "newton"])
def test_callbacks_see_the_function_itself(method: str) -> None:
    seen: list[OptimizeResult] = []

    def callback(intermediate_result: OptimizeResult) -> None:
        seen.append(intermediate_result)

    result = minimize(rosenbrock, START, method, constraints=DISK, callback=callback)
    plain = minimize(rosenbrock, START, method, constraints=DISK)
    assert len(seen) == result.nit == plain.nit and result.nfev == plain.nfev
    assert all(s.fun == float(rosenbrock(s.x)) for s in seen)
    assert torch.equal(seen[-1].x, result.x)


def test_a_callback_ends_it() -> None:
    calls = 0

    def callback(x: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise StopIteration

    result = minimize(rosenbrock, START, constraints=DISK, callback=callback)
    assert result.status == 99 and not result.success and result.nit == 3


def test_limits() -> None:
    few = minimize(rosenbrock, START, constraints=DISK, options={"maxiter": 3})
    assert (few.nit, few.status, few.success) == (3, 1, False) and "maxiter" in few.message
    few = minimize(rosenbrock, START, constraints=DISK, options={"maxfun": 6})
    assert few.status == 1 and "maxfun" in few.message and few.nfev <= 12


def test_evaluations_are_counted() -> None:
    calls = {"fun": 0, "first": 0, "second": 0}

    def counted(name: str, fun: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def call(x: Any) -> Any:
            calls[name] += 1
            return fun(x)

        return call

    result = minimize(
        counted("fun", rosenbrock),
        START,
        constraints=[
            {"type": "ineq", "fun": counted("first", disk)},
            NonlinearConstraint(counted("second", lambda x: [x[0] - x[1], x[0]]), 0.0, inf),
        ],
    )
    assert result.success
    assert result.nfev == result.njev == calls["fun"]
    assert result.constr_nfev == [calls["first"], calls["second"]] == result.constr_njev


def test_a_line_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    minimize(rosenbrock, START, constraints=DISK, options={"disp": True})
    line = capsys.readouterr().out
    assert "(status 0)" in line and "largest violation" in line


def test_a_tolerance_of_violations() -> None:
    for name in ("feasibility_tol", "catol", "constr_viol_tol"):
        wide = minimize(rosenbrock, START, constraints=DISK, options={name: 1e-2, "gtol": 1e-2})
        assert wide.success and wide.constr_violation <= 1e-2


def test_options_of_constrained() -> None:
    options = {"constraint_method": "augmented_lagrangian", "penalty": 100.0}
    result = minimize(rosenbrock, START, constraints=DISK, options=options)
    assert result.success and close(result, [0.78642, 0.61770])


@pytest.mark.parametrize("method", ["bfgs", "lbfgs"])
def test_samples_of_a_function(method: str) -> None:
    """Of 50 equalities in 20 unknowns, few are independent: quadratic programs cope with that."""
    t = torch.linspace(0, 1, 50, dtype=torch.float64)
    powers, scales = t[:, None] ** torch.arange(20), torch.arange(1, 21)
    result = minimize(
        lambda x: (scales * x).square().sum(),
        torch.zeros(20, dtype=torch.float64),
        method,
        constraints={"type": "eq", "fun": lambda x: powers @ x - torch.sin(t)},
    )
    assert result.success and result.nfev < 400, result
    assert result.constr_violation < 1e-8 and abs(result.fun - 4.4469) < 1e-3


# What goes wrong.

INFEASIBLE: dict[str, Any] = {
    "lines": LinearConstraint([[1.0, 1.0], [1.0, 1.0]], [-inf, 2.0], [1.0, inf]),
    "equalities": LinearConstraint([[1.0, 1.0], [1.0, 1.0]], [1.0, 2.0], [1.0, 2.0]),
    "a circle": {"type": "eq", "fun": lambda x: x.square().sum() + 1.0},
    "a dict and an object": [
        {"type": "ineq", "fun": lambda x: x[0] - 1.0},
        NonlinearConstraint(lambda x: x[0], -inf, 0.5),
    ],
}


@pytest.mark.parametrize("kind", INFEASIBLE)
@pytest.mark.parametrize("method", [None, "lbfgs", "newton"])
def test_infeasible(kind: str, method: str | None) -> None:
    result = minimize(rosenbrock, START, method, constraints=INFEASIBLE[kind])
    assert not result.success and result.status == 5, result
    assert "the constraints could not be satisfied: constraints" in result.message
    assert "is violated by" in result.message and result.constr_violation > 0.1
    assert bool(result.x.isfinite().all()) and result.nfev < 500
    assert "no small move away from x lowers the violations together" in result.message


def test_bounds_that_leave_nothing() -> None:
    result = minimize(rosenbrock, START, constraints={"type": "eq", "fun": line}, bounds=(2, 3))
    assert result.status == 5 and torch.equal(result.x, torch.full_like(START, 2.0))
    assert "no small move" in result.message


def test_a_start_outside_of_the_bounds() -> None:
    """Constraints are evaluated within them only."""

    def root(x: Tensor) -> Tensor:
        assert bool((x >= 0).all())
        return (x + 0.1).sqrt().sum() - 1.5

    result = minimize(
        rosenbrock, -START - 1.0, constraints={"type": "eq", "fun": root}, bounds=(0.0, 2.0)
    )
    assert result.success and result.info.as_dict()["start_projected"] is True
    inside = minimize(rosenbrock, START, constraints=DISK, bounds=(-2.0, 2.0))
    assert inside.info.as_dict()["start_projected"] is False


def test_dependent_constraints() -> None:
    """Multipliers are not unique, the minimum is."""
    result = minimize(
        rosenbrock, START, constraints=[DISK, DISK, {"type": "eq", "fun": lambda x: 0.0 * x[0]}]
    )
    assert result.success and close(result, [0.78642, 0.61770])
    assert sum(v.item() for v in result.v[:2]) == pytest.approx(-0.12150, abs=1e-4)


def test_constraints_that_are_not_finite_at_the_start() -> None:
    constraint = {"type": "ineq", "fun": lambda x: torch.log(x[0] - 1.0)}
    result = minimize(rosenbrock, START, constraints=constraint)
    assert result.status == 3 and not result.success and torch.equal(result.x, START)
    assert result.message == "constraints or its gradient is not finite at x0"
    result = minimize(lambda x: x.sum().log(), -START, constraints=DISK)
    assert result.status == 3 and "the function or its gradient is not finite" in result.message


def test_constraints_that_are_not_finite_at_trials() -> None:
    """They are stepped back from."""
    barrier = {"type": "ineq", "fun": lambda x: torch.log(x[0]) + 3.0}
    result = minimize(lambda x: 100.0 * x[0] + (x[1] - 1.0).square(), START, constraints=barrier)
    assert result.success, result
    assert close(result, [np.exp(-3.0), 1.0])


def test_violations_that_are_rounding_errors() -> None:
    """At 3e18, numbers are 512 apart."""
    goal = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    x = goal * (3e18 / goal.square().sum()).sqrt()
    messages = []
    for third in (1.0, 1e7, 1e8, 5e8, 1e9, 2e9):
        result = minimize(
            lambda x: (x / 1e9 - goal).square().sum(),
            torch.tensor([1e9, 1e9, third], dtype=torch.float64),
            constraints={"type": "eq", "fun": lambda x: x.square().sum() - 3e18},
        )
        assert result.success, result
        assert torch.allclose(result.x, x, rtol=1e-4) and result.constr_violation <= 8 * 512
        messages.append(result.message)
    assert any("constraints is violated by" in m and "rounding error" in m for m in messages)


def test_scales_of_the_function() -> None:
    goal = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    for scale in (1e-8, 1.0, 1e8):
        result = minimize(
            lambda x, scale=scale: scale * (x - goal).square().sum(),
            torch.zeros(3, dtype=torch.float64),
            constraints={"type": "eq", "fun": lambda x: x.sum() - 3},
        )
        assert result.success and close(result, [0.0, 1.0, 2.0])


@pytest.mark.parametrize("method", [None, "lbfgs", "newton", "cg"])
@pytest.mark.parametrize("power", [1, 2, 3])
def test_unbounded(method: str | None, power: int) -> None:
    constraint = {"type": "eq", "fun": lambda x: x[1]}
    result = minimize(lambda x: -(x[0] ** power), START, method, constraints=constraint)
    assert result.status == 4 and not result.success, result
    assert bool(result.x.isfinite().all()) and "falls without end" in result.message


def test_worse_than_the_start_is_said() -> None:
    """With too small a penalty, the first iterations leave the disk in which they began."""
    result = minimize(
        lambda x: -20.0 * x.sum(),
        START,
        constraints=DISK,
        options={"maxiter": 2, "constraint_method": "augmented_lagrangian", "penalty": 1.0},
    )
    assert result.status == 1 and result.constr_violation > 1e-2
    assert "constraints is violated by" in result.message
    assert "more than any was at x0 (0)" in result.message


def test_higher_than_the_start_is_said() -> None:
    """A step from a feasible start may lead to another minimum, which is higher."""
    start = torch.tensor([-1.05, 0.0], dtype=torch.float64)
    result = minimize(
        lambda x: (x[0] ** 2 - 1.0).square() + 0.3 * x[0] + x[1].square(),
        start,
        constraints={"type": "ineq", "fun": lambda x: x[0] + 1.05},
    )
    assert result.success
    higher = result.fun > float((start[0] ** 2 - 1.0).square() + 0.3 * start[0])
    assert ("fun is higher than at x0" in result.message) == higher


def test_evaluations_beside_slsqp() -> None:
    """All evaluations of the function, with that of the result, where both find the minimum."""
    ours = theirs = both = 0
    for problem in CONSTRAINED_PROBLEMS:
        if problem.size > 4:  # these are enough
            continue
        calls, x = slsqp(problem)
        value = float(problem.function(x))
        if problem.is_minimum(value, 1e-5) and problem.violation(x) < 1e-6:
            both += 1
            ours += minimized(problem).nfev
            theirs += calls
    assert both > 30
    assert ours <= 2.0 * theirs


def slsqp(problem: ConstrainedProblem) -> tuple[int, Tensor]:
    """SciPy's evaluations of the function, and where they led."""
    calls = 0

    def function(x: Any) -> tuple[float, Any]:
        nonlocal calls
        calls += 1
        at = torch.tensor(x, requires_grad=True)
        value = problem.function(at)
        value.backward()
        return value.item(), at.grad.numpy()

    def made(fun: Callable[[Tensor], Tensor], kind: str, sign: float) -> dict[str, Any]:
        return {
            "type": kind,
            "fun": lambda x: sign * fun(torch.tensor(x)).numpy(),
            "jac": lambda x: sign * torch.func.jacrev(fun)(torch.tensor(x)).numpy(),
        }

    constraints = []
    if problem.equalities is not None:
        constraints.append(made(problem.equalities, "eq", 1.0))
    if problem.inequalities is not None:
        constraints.append(made(problem.inequalities, "ineq", -1.0))
    low = np.full(problem.size, -inf) if problem.low is None else problem.low.numpy()
    high = np.full(problem.size, inf) if problem.high is None else problem.high.numpy()
    found = scipy.optimize.minimize(
        function, problem.start.numpy(), jac=True, method="SLSQP", constraints=constraints,
        bounds=scipy.optimize.Bounds(low, high), options={"maxiter": 500},
    )  # fmt: skip
    return calls, torch.tensor(found.x)


def test_keep_feasible_is_a_warning() -> None:
    constraint = LinearConstraint([1.0, 1.0], ub=1.0, keep_feasible=True)
    with pytest.warns(UserWarning, match="keep_feasible of constraints is not kept"):
        assert minimize(rosenbrock, START, constraints=constraint).success
