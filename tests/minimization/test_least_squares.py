"""Nonlinear least squares in one call, beside SciPy's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_secondorder import (
    LeastSquaresResult,
    LevenbergMarquardtInfo,
    OptimizeResult,
    least_squares,
    mark_outputs,
    minimize,
)
from torch_secondorder.minimization._robust import cost_of

LOSSES = ["linear", "huber", "soft_l1", "cauchy", "arctan"]
T = torch.linspace(0.0, 3.0, 20, dtype=torch.float64)
NOISE = torch.randn(20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def decay(x: Tensor) -> Tensor:
    return x[0] * torch.exp(-x[1] * T) + x[2]


# Data with noise, and three outliers.
DATA = decay(torch.tensor([2.0, 1.5, 0.3]).double()) + 0.05 * NOISE
DATA[[3, 9, 15]] += torch.tensor([1.0, -0.8, 1.5]).double()


def residuals(x: Tensor) -> Tensor:
    return decay(x) - DATA


def rosenbrock(x: Tensor) -> Tensor:
    return torch.stack([10.0 * (x[1] - x[0] ** 2), 1.0 - x[0]])


def never(*_: Any) -> Any:
    raise AssertionError("fun was called")


def by_scipy(fun: Any, x0: Any, **arguments: Any) -> Any:
    def call(x: Any) -> Any:
        return fun(torch.from_numpy(x)).numpy()

    def jacobian(x: Any) -> Any:
        return torch.func.jacrev(fun)(torch.from_numpy(x)).numpy()

    tight = {"ftol": 1e-15, "xtol": 1e-15, "gtol": 1e-15, "max_nfev": 2000}
    return scipy.optimize.least_squares(call, x0, jacobian, **(tight | arguments))


# Solutions.


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_agrees_with_scipy(loss: Any, scale: float) -> None:
    start = [1.8, 1.3, 0.2]  # "arctan" has another minimum, for a start that is farther away
    result = least_squares(residuals, start, loss=loss, f_scale=scale)
    theirs = by_scipy(residuals, start, loss=loss, f_scale=scale)
    assert result.success, result
    assert result.cost == pytest.approx(theirs.cost, rel=1e-12)
    assert torch.allclose(result.x, torch.from_numpy(theirs.x), rtol=1e-6)
    assert torch.allclose(result.fun, residuals(result.x), atol=1e-14)
    assert result.optimality <= 1e-6


@pytest.mark.parametrize("loss", ["linear", "soft_l1"])
@pytest.mark.parametrize(
    ("low", "high"),
    [
        (-math.inf, [2.0, 1.0, 1.0]),
        ([0.0, 2.0, -1.0], math.inf),
        ([0.0, 0.0, 0.4], [1.8, 5.0, 1.0]),
    ],
)
def test_agrees_with_scipy_within_bounds(loss: Any, low: Any, high: Any) -> None:
    start = [1.0, 1.0 if low == -math.inf or low[1] == 0.0 else 2.5, 0.5]
    seen = []

    def fun(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return residuals(x)

    result = least_squares(fun, start, bounds=(low, high), loss=loss, f_scale=0.2)
    theirs = by_scipy(residuals, start, bounds=(low, high), loss=loss, f_scale=0.2)
    assert result.success, result
    assert result.cost == pytest.approx(theirs.cost, rel=1e-7)
    assert torch.allclose(result.x, torch.from_numpy(theirs.x), atol=1e-4)
    assert result.cost <= theirs.cost * (1 + 1e-12)
    lower, upper = (torch.tensor(b, dtype=torch.float64) for b in (low, high))
    for x in seen:
        assert bool(((lower <= x) & (x <= upper)).all())
    assert torch.equal(result.active_mask == -1, result.x == lower)
    assert torch.equal(result.active_mask == 1, result.x == upper)
    assert int(result.active_mask.abs().sum()) >= 1


@pytest.mark.parametrize("scaling", ["jac", 1.0])
def test_residuals_without_a_rest(scaling: Any, device: torch.device) -> None:
    start = torch.tensor([-1.2, 1.0], dtype=torch.float64, device=device)
    result = least_squares(rosenbrock, start, x_scale=scaling)
    assert result.success and result.cost < 1e-25
    assert torch.allclose(result.x, torch.ones_like(start), atol=1e-12)
    assert result.x.device == start.device


@pytest.mark.parametrize("unit", [1e-8, 1e8])
def test_the_scaling_by_the_jacobian_makes_steps_independent_of_units(unit: float) -> None:
    units = torch.tensor([unit, 1.0, 1.0 / unit]).double()
    plain = least_squares(residuals, torch.tensor([1.0, 1.0, 0.5]).double())
    scaled = least_squares(lambda x: residuals(x * units), torch.tensor([1.0, 1.0, 0.5]) / units)
    assert scaled.success and scaled.njev == plain.njev
    assert torch.allclose(scaled.x * units, plain.x, rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6))
def test_linear_residuals(rows: int, size: int, seed: int) -> None:
    """The solution is the one of smallest length, from the origin, where there are several."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    b = torch.randn(rows, generator=generator, dtype=torch.float64)
    result = least_squares(lambda x: A @ x - b, torch.zeros(size).double(), x_scale=1.0)
    assert result.success, result
    wanted = torch.linalg.lstsq(A, b, driver="gelsd").solution
    assert torch.allclose(result.x, wanted, rtol=1e-6, atol=1e-7)


def test_a_rank_deficient_jacobian() -> None:
    result = least_squares(lambda x: (x[0] + x[1]) * T - DATA, [1.0, 3.0])
    assert result.success
    assert float(result.x.sum()) == pytest.approx(float(T @ DATA / (T @ T)), rel=1e-12)


def test_shapes_and_dtypes() -> None:
    a = torch.arange(6.0).view(2, 3)

    def fun(x: Tensor) -> Tensor:
        assert x.shape == (2, 1) and x.dtype == torch.float32
        return (x * a - 2 * a + 0.1).T

    result = least_squares(fun, torch.ones(2, 1))
    assert result.success and result.x.dtype == torch.float32
    assert result.fun.shape == (3, 2) and result.jac.shape == (3, 2, 2, 1)
    assert torch.equal(result.jac, torch.func.jacrev(fun)(result.x))
    assert result.grad.shape == result.x.shape == result.active_mask.shape
    assert torch.allclose(result.x, (2 * a - 0.1).mul(a).sum(1, True) / a.square().sum(1, True))


@pytest.mark.parametrize("x0", [1, 1.0, torch.tensor(1.0).double()])
def test_numbers(x0: Any) -> None:
    result = least_squares(lambda x: x * x - 2.0, x0)
    assert result.x.dtype == torch.float64 and result.x.shape == ()
    assert float(result.x) == pytest.approx(math.sqrt(2.0), rel=1e-14)
    assert result.fun.shape == () and result.jac.shape == ()


def test_trees() -> None:
    start = {"scale": torch.ones(1).double(), "rate": torch.ones(()).double()}

    def fun(p: dict[str, Tensor]) -> Tensor:
        return p["scale"] * torch.exp(-p["rate"] * T) - torch.exp(-2.0 * T)

    result = least_squares(fun, start, bounds=({"scale": 0.0, "rate": 0.5}, None))
    assert result.success
    assert float(result.x["rate"]) == pytest.approx(2.0, rel=1e-8)
    assert result.jac["scale"].shape == (20, 1) and result.jac["rate"].shape == (20,)
    wanted = torch.func.jacrev(fun)(result.x)
    assert all(torch.allclose(result.jac[name], wanted[name]) for name in start)
    assert start["rate"] == 1.0


@pytest.mark.parametrize("loss", LOSSES)
def test_costs(loss: Any) -> None:
    """Value and slope are SciPy's; the curvature is exact unless it is small beside the weight."""
    r = torch.tensor([-3.0, -0.2, 0.0, 0.45, 40.0], dtype=torch.float64, requires_grad=True)
    cost = cost_of(r, loss, 0.5)
    (slope,) = torch.autograd.grad(cost, r, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), r)
    value, slope = cost.detach(), slope.detach()
    here = r.detach()
    theirs = scipy.optimize.least_squares(
        lambda x: here.numpy() + 0 * x, 0.0, loss=loss, f_scale=0.5
    )
    assert float(value) == pytest.approx(theirs.cost, rel=1e-14)
    h = 1e-6
    for k in range(len(here)):
        unit = torch.zeros_like(here)
        unit[k] = h
        up, down = (cost_of(here + s * unit, loss, 0.5) for s in (1, -1))
        # Of a cost of some hundred, to the sixth digit after division by the step.
        assert float(up - down) / (2 * h) == pytest.approx(float(slope[k]), abs=1e-6)
    weights = torch.where(here == 0, 1.0, slope / torch.where(here == 0, 1.0, here))
    z = (here / 0.5).square()
    exact = {
        "linear": torch.ones_like(z),
        "huber": (z <= 1).double(),
        "soft_l1": (1 + z) ** -1.5,
        "cauchy": (1 - z) / (1 + z) ** 2,
        "arctan": (1 - 3 * z * z) / (1 + z * z) ** 2,
    }[loss]
    assert torch.allclose(bend, torch.maximum(exact, 0.1 * weights), rtol=1e-12)


# Jacobians that autograd does not make.


def arrays(x: Tensor) -> Any:
    """The residuals as an array of NumPy."""
    return residuals(x).numpy()


@pytest.mark.parametrize("fun", [residuals, arrays])
@pytest.mark.parametrize("jac", ["2-point", "3-point", torch.func.jacrev(residuals)])
@pytest.mark.parametrize("loss", ["linear", "soft_l1"])
def test_other_jacobians(fun: Any, jac: Any, loss: Any) -> None:
    calls = 0

    def counted(x: Tensor) -> Any:
        nonlocal calls
        calls += 1
        return fun(x)

    result = least_squares(counted, [1.0, 1.0, 0.0], jac, loss=loss)
    exact = least_squares(residuals, [1.0, 1.0, 0.0], loss=loss)
    assert result.success, result
    assert result.nfev == calls
    each = {"2-point": 4, "3-point": 7}.get(jac, 1) if isinstance(jac, str) else 1
    assert result.nfev == each * result.njev
    assert torch.allclose(result.x, exact.x, rtol=1e-7)
    assert torch.allclose(result.jac, exact.jac, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scheme", ["2-point", "3-point"])
@pytest.mark.parametrize(
    "bounds", [(None, [1.0, 1.0, 1.0]), ([1.0, 1.0, 0.0], None), ([1.0, 1.0, 0.0],) * 2]
)
def test_differences_stay_within_bounds(scheme: Any, bounds: Any) -> None:
    low, high = (
        torch.full((3,), sign * math.inf).double() if b is None else torch.tensor(b).double()
        for sign, b in zip((-1, 1), bounds, strict=True)
    )
    seen = []

    def fun(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return residuals(x)

    result = least_squares(fun, [1.0, 1.0, 0.0], scheme, bounds)
    assert all(bool(((low <= x) & (x <= high)).all()) for x in seen)
    exact = least_squares(residuals, [1.0, 1.0, 0.0], bounds=bounds)
    assert result.cost == pytest.approx(exact.cost, rel=1e-6)


def test_the_jacobian_of_a_tree_and_of_residuals_of_any_shape() -> None:
    start = {"a": torch.ones(2, 1).double(), "b": torch.zeros(()).double()}

    def fun(p: dict[str, Tensor]) -> Tensor:
        return p["a"] * T + p["b"] - DATA

    for jac in (torch.func.jacrev(fun), "2-point"):
        result = least_squares(fun, start, jac)
        wanted = torch.func.jacrev(fun)(result.x)
        assert result.jac["a"].shape == (2, 20, 2, 1)
        assert all(torch.allclose(result.jac[name], wanted[name], atol=1e-6) for name in start)


@pytest.mark.parametrize(
    ("jac", "kind", "message"),
    [
        ("cs", ValueError, "jac must be None for autograd, a function, '2-point'.*got 'cs'"),
        (True, ValueError, "jac must be None for autograd"),
        (lambda x: torch.ones(3, 20), ValueError, r"shape \(3, 20\); .* must be \(20, 3\)"),
        (lambda x: (x, x), ValueError, "jac returned 2 tensors, and x has 1"),
    ],
)
def test_jacobians_that_do_not_fit(jac: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        least_squares(residuals, [1.0, 1.0, 0.0], jac)


# Results and endings.


def test_the_fields() -> None:
    result = least_squares(residuals, [1.0, 1.0, 0.0])
    assert isinstance(result, LeastSquaresResult) and isinstance(result, OptimizeResult)
    theirs = by_scipy(residuals, [1.0, 1.0, 0.0])
    assert set(theirs) <= set(result)
    assert isinstance(result.info, LevenbergMarquardtInfo)
    assert torch.allclose(result.jac, torch.func.jacrev(residuals)(result.x), atol=1e-14)
    assert torch.allclose(result.grad, result.jac.T @ result.fun, atol=1e-13)
    assert result.optimality == float(result.grad.abs().max())
    assert result.cost == pytest.approx(0.5 * float(result.fun @ result.fun), rel=1e-14)
    assert not result.x.requires_grad and not result.fun.requires_grad
    assert result.njev <= theirs.njev
    assert "LevenbergMarquardtInfo" in str(result)


def test_the_jacobian_of_a_robust_loss_has_the_roots_of_its_curvatures() -> None:
    result = least_squares(residuals, [1.0, 1.0, 0.0], loss="soft_l1", f_scale=0.1)
    z = (result.fun / 0.1) ** 2
    curvatures = torch.maximum((1 + z) ** -1.5, 0.1 * (1 + z) ** -0.5)
    J = torch.func.jacrev(residuals)(result.x)
    assert torch.allclose(result.jac, curvatures.sqrt()[:, None] * J, rtol=1e-9)
    assert torch.allclose(result.grad, J.T @ ((1 + z) ** -0.5 * result.fun), atol=1e-9)
    theirs = by_scipy(residuals, result.x.numpy(), loss="soft_l1", f_scale=0.1)
    small = z < 5  # where the curvature is not replaced
    assert torch.allclose(result.jac[small], torch.from_numpy(theirs.jac)[small], rtol=1e-5)


def test_counts_are_those_of_calls() -> None:
    calls = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return residuals(x)

    for loss in ("linear", "huber"):
        calls = 0
        result = least_squares(counted, [1.0, 1.0, 0.0], loss=loss)  # type: ignore[arg-type]
        assert result.nfev == calls
        assert result.njev == result.info.jacobians + 1


def test_most_evaluations() -> None:
    result = least_squares(residuals, [1.0, 1.0, 0.0], max_nfev=3)
    assert (result.status, result.success) == (0, False)
    assert "max_nfev" in result.message and result.nfev <= 4
    assert result.cost == pytest.approx(0.5 * float(residuals(result.x).square().sum()), rel=1e-14)


@pytest.mark.parametrize(
    ("tolerance", "status"), [({"gtol": 1e-3}, 1), ({"ftol": 1e-3}, 2), ({"xtol": 1e-2}, 3)]
)
def test_tolerances(tolerance: dict[str, float], status: int) -> None:
    given: dict[str, Any] = {"ftol": None, "xtol": None, "gtol": None} | tolerance
    result = least_squares(residuals, [1.0, 1.0, 0.0], **given)
    assert (result.status, result.success) == (status, True)
    exact = least_squares(residuals, [1.0, 1.0, 0.0])
    assert result.nfev < exact.nfev and result.cost <= exact.cost * 1.01


def test_a_start_at_the_solution() -> None:
    result = least_squares(rosenbrock, [1.0, 1.0])
    assert (result.status, result.nit, result.cost) == (1, 0, 0.0)
    again = least_squares(residuals, least_squares(residuals, [1.0, 1.0, 0.0]).x)
    assert again.success and again.nit <= 2


def test_residuals_that_no_parameter_changes() -> None:
    result = least_squares(lambda x: 0.0 * x + 1.0, [1.0, 2.0])
    assert result.success and result.x.tolist() == [1.0, 2.0]


def test_trials_that_are_not_finite_are_stepped_back_from() -> None:
    def fun(x: Tensor) -> Tensor:
        return torch.log(x) - 1e-3

    result = least_squares(fun, [4.0])
    assert result.success and float(result.x) == pytest.approx(math.exp(1e-3))
    assert result.info.nonfinite_trials > 0


def test_a_derivative_that_is_not_finite() -> None:
    def fun(x: Tensor) -> Tensor:
        return torch.cat([x.sqrt(), x - 1.0])

    result = least_squares(fun, [0.0])
    assert (result.status, result.success) == (-3, False)
    assert "not finite" in result.message and result.x.tolist() == [0.0]


def test_arguments_of_the_function() -> None:
    def fun(x: Tensor, y: Tensor, *, factor: float) -> Tensor:
        return x - factor * y

    y = torch.tensor([1.0, 2.0]).double()
    for args in (y, (y,)):
        result = least_squares(fun, [0.0, 0.0], args=args, kwargs={"factor": 3.0})
        assert torch.allclose(result.x, 3.0 * y)


def test_callbacks() -> None:
    points, costs = [], []

    def report(intermediate_result: OptimizeResult) -> None:
        points.append(intermediate_result.x)
        costs.append(intermediate_result.cost)
        assert intermediate_result.nit == len(costs)

    result = least_squares(residuals, [1.0, 1.0, 0.0], callback=report)
    assert len(costs) == result.nit and costs == sorted(costs, reverse=True)
    assert torch.equal(points[-1], result.x) and costs[-1] == result.cost

    def stop(x: Tensor) -> None:
        assert isinstance(x, Tensor)
        raise StopIteration

    stopped = least_squares(residuals, [1.0, 1.0, 0.0], callback=stop)
    assert (stopped.status, stopped.success, stopped.nit) == (-2, False, 1)
    assert torch.equal(stopped.x, points[0])


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    result = least_squares(residuals, [1.0, 1.0, 0.0])
    assert capsys.readouterr().out == ""
    least_squares(residuals, [1.0, 1.0, 0.0], verbose=1)
    (line,) = capsys.readouterr().out.splitlines()
    assert f"{result.nfev} evaluations, {result.njev} Jacobians" in line
    least_squares(residuals, [1.0, 1.0, 0.0], verbose=2)
    assert len(capsys.readouterr().out.splitlines()) == result.nit + 1


@pytest.mark.parametrize(
    "options",
    [
        {"corrections": 0},
        {"globalization": "damping", "damping": "marquardt"},
        {"globalization": "damping", "acceleration": "geodesic"},
        {"globalization": "strong_wolfe"},
    ],
)
def test_options_of_the_optimizer(options: dict[str, Any]) -> None:
    result = least_squares(residuals, [1.0, 1.0, 0.0], options=options)
    assert result.success, result
    assert result.cost == pytest.approx(least_squares(residuals, [1.0, 1.0, 0.0]).cost, rel=1e-6)


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"fun": 3}, TypeError, "fun must be callable, got int"),
        ({"loss": "square"}, ValueError, "loss must be .*'linear'.*got 'square'"),
        ({"f_scale": 0.0}, ValueError, "f_scale"),
        ({"x_scale": "more"}, ValueError, "x_scale must be 'jac' or a number, got 'more'"),
        ({"x_scale": -1.0}, ValueError, "x_scale"),
        ({"ftol": -1.0}, ValueError, "ftol"),
        ({"ftol": None, "xtol": None, "gtol": None}, ValueError, "ftol, xtol and gtol are None"),
        ({"max_nfev": 0}, ValueError, "max_nfev"),
        ({"verbose": 3}, ValueError, "verbose must be 0, 1 or 2, got 3"),
        ({"callback": 1}, TypeError, "callback must be callable"),
        ({"x0": "a"}, TypeError, "x0 must be a number, an array .* got str"),
        ({"x0": [[1.0], [1.0, 2.0]]}, TypeError, "x0 must be a number, an array"),
        ({"x0": torch.ones(2).int()}, TypeError, "x0 has dtype torch.int32"),
        ({"x0": [1j]}, TypeError, "x0 is complex: pass torch.view_as_real"),
        ({"x0": []}, ValueError, "x0 has no entries"),
        ({"bounds": 3}, TypeError, "bounds must be .low, high.*got int"),
        ({"bounds": (0, "a")}, TypeError, "a bound must be a number or numbers, got 'a'"),
        ({"bounds": (0, [1.0, 2.0, 3.0])}, ValueError, r"high bound of x0 has shape \(3,\)"),
        ({"bounds": (3, 2)}, ValueError, "cross|above|lower"),
        ({"bounds": (2, 3)}, ValueError, "x0 is outside of the bounds: move it"),
        ({"options": {"max_eval": 3}}, ValueError, "'max_eval' is no option .*: max_nfev"),
        (
            {"options": {"weight_decay": 3}},
            ValueError,
            r"no option .*: return sqrt\(weight_decay\)",
        ),
        ({"options": {"solver": "dual"}}, ValueError, "trust region needs solver='primal'"),
    ],
)
def test_arguments(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        least_squares(**({"fun": never, "x0": [1.0, 1.0]} | arguments))


@pytest.mark.parametrize(
    ("fun", "kind", "message"),
    [
        (lambda x: 1.0, TypeError, "fun must return a tensor of real residuals, got float"),
        (lambda x: [x[0], x[1]], TypeError, "got list; torch.stack or torch.cat"),
        (lambda x: x.int(), TypeError, "got a tensor of torch.int32"),
        (lambda x: 1j * x, TypeError, r"got a tensor of torch.complex128; torch.view_as_real\(r\)"),
        (lambda x: x[:0], ValueError, r"fun returned no residuals, a tensor of shape \(0,\)"),
        (lambda x: x.detach(), ValueError, "do not depend on x by operations"),
        (
            lambda x: x / 0.0,
            ValueError,
            r"residuals are not finite at x0: 2 of 2, the first at \(0",
        ),
        (lambda x: torch.log(x - 1.0), ValueError, "2 of 2"),
        (lambda x: np.array([x[0], x[1]]), TypeError, "hands x to NumPy.*torch.stack for np"),
        (lambda x: x[7], IndexError, "out of bounds"),
    ],
)
def test_residuals(fun: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        least_squares(fun, [1.0, 1.0])


def test_a_number_of_residuals_that_changes() -> None:
    calls = 0

    def fun(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x.expand(1 + calls)

    with pytest.raises(ValueError, match=r"shape \(3,\), and of shape \(2,\) before"):
        least_squares(fun, [1.0])


# minimize(method="lm").


def test_minimize_by_marked_residuals() -> None:
    def cost(x: Tensor) -> Tensor:
        return mark_outputs(residuals(x)).square().sum()

    start = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    for name in ("lm", "Levenberg-Marquardt"):
        result = minimize(cost, start, name)
        assert result.success, result
        wanted = least_squares(residuals, start)
        assert torch.allclose(result.x, wanted.x, rtol=1e-6)
        assert isinstance(result.info, LevenbergMarquardtInfo)
    bounded = minimize(cost, start, "lm", bounds=(None, 1.2))
    assert torch.allclose(
        bounded.x, least_squares(residuals, start, bounds=(None, 1.2)).x, atol=1e-5
    )


def test_minimize_by_a_standard_loss() -> None:
    def cost(x: Tensor) -> Tensor:
        return torch.nn.functional.mse_loss(decay(x), DATA)

    start = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    assert torch.allclose(minimize(cost, start, "lm").x, least_squares(residuals, start).x)


def test_minimize_without_residuals() -> None:
    with pytest.raises(RuntimeError, match="mark_outputs"):
        minimize(lambda x: x.square().sum(), torch.ones(2), "lm")
