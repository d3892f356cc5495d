"""Gradients by finite differences, and those that the user gives, as derivatives of a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from scipy.optimize._numdiff import approx_derivative
from torch import Tensor

from torch_secondorder import MissingSecondDerivative, minimize
from torch_secondorder.minimization._gradients import Counts, Differences, given

START = torch.tensor([-1.2, 1.0], dtype=torch.float64)
SCHEMES = ["2-point", "3-point"]


def rosenbrock(x: Tensor) -> Tensor:
    a, b = x.unbind()
    return 100.0 * (b - a * a).square() + (1.0 - a).square()


def wavy(x: Tensor) -> Tensor:
    return (x.sin() * torch.arange(1, len(x) + 1)).sum() + x.prod().exp() + x[0] ** 3


def gradient_of(function: Callable[[Any], Tensor], x: Tensor) -> Tensor:
    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(point), point)
    return gradient


# Finite differences.

numbers = st.floats(-100, 100, allow_subnormal=False)


@settings(max_examples=150, deadline=None)
@drawn(
    st.lists(st.tuples(numbers, st.floats(0, 2), st.floats(0, 2)), min_size=1, max_size=4),
    st.sampled_from(SCHEMES),
    st.sampled_from([None, 1e-6, 1e-3]),
    st.sampled_from([0.0, 1e-9, 1e-7, 1.0]),
)
def test_points_are_those_of_scipy(
    entries: list[tuple[float, float, float]], scheme: Any, rel_step: float | None, unit: float
) -> None:
    """Also where bounds are closer than a step, or leave no room at all."""
    x = np.array([entry[0] for entry in entries]) + 0.0  # no -0.0, whose sign is a matter of taste
    low = x - unit * np.array([entry[1] for entry in entries])
    high = x + unit * np.array([entry[2] for entry in entries])
    free = low < high  # SciPy divides by zero at the others
    for bounded in (False, True):
        theirs: list[Any] = []
        ours: list[Any] = []

        def record(at: Any, points: list[Any] = theirs) -> Any:
            points.append(np.array(at))
            return float((np.array(at) ** 2).sum())

        limits = None if not bounded else [(torch.from_numpy(low), torch.from_numpy(high))]
        bounds = (low, high) if bounded else (-np.inf, np.inf)
        with np.errstate(all="ignore"):
            approx_derivative(record, x, scheme, rel_step, bounds=bounds)

        def record_ours(at: Tensor, points: list[Any] = ours) -> Any:
            return record(at.numpy(), points)

        estimate = Differences(record_ours, scheme, Counts(), rel_step, limits)
        estimate(torch.from_numpy(x).requires_grad_())
        if not bounded or free.all():
            assert len(ours) == len(theirs)
            for point in theirs:
                assert any(np.array_equal(point, other) for other in ours), (point, ours)
        for point in ours:
            assert not bounded or ((low <= point) & (point <= high)).all()


@pytest.mark.parametrize(("scheme", "accuracy"), [("2-point", 1e-6), ("3-point", 1e-9)])
def test_estimates_are_accurate(scheme: str, accuracy: float, device: torch.device) -> None:
    x = torch.tensor([0.3, -1.7, 2.0], dtype=torch.float64, device=device)

    def function(x: Tensor) -> Tensor:
        return (x.sin() * torch.arange(1, 4, device=device)).sum() + x.prod().exp()

    counts = Counts()
    estimate = gradient_of(Differences(function, scheme, counts), x)
    exact = torch.func.grad(function)(x)
    assert torch.allclose(estimate, exact, rtol=accuracy, atol=accuracy)
    assert (counts.functions, counts.gradients) == (4 if scheme == "2-point" else 7, 1)


def test_more_entries_than_points_are_made_at_a_time() -> None:
    x = torch.linspace(-1, 1, 150, dtype=torch.float64).view(10, 15)
    estimate = gradient_of(Differences(lambda x: x.pow(3).sum(), "3-point", Counts()), x)
    assert torch.allclose(estimate, 3 * x * x, atol=1e-8)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bounds_as_tight_as_a_step(scheme: str) -> None:
    x = torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    low = x - torch.tensor([0.0, 1e-9, 1.0, 0.0], dtype=torch.float64)
    high = x + torch.tensor([1.0, 1e-9, 0.0, 0.0], dtype=torch.float64)
    seen: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        seen.append(x)
        return x.pow(3).sum()

    estimate = gradient_of(Differences(function, scheme, Counts(), None, [(low, high)]), x)
    assert torch.allclose(estimate[:3], torch.full_like(x[:3], 3.0), atol=1e-5)
    assert estimate[3] == 0.0  # it cannot move
    assert all(((low <= point) & (point <= high)).all() for point in seen)


def test_a_value_of_less_precision_gets_longer_steps() -> None:
    x = torch.tensor([2.0], dtype=torch.float64)
    estimate = gradient_of(Differences(lambda x: x.float().square().sum(), "2-point", Counts()), x)
    assert estimate.item() == pytest.approx(4.0, abs=1e-2)


def test_black_boxes_may_return_numbers() -> None:
    def function(x: Tensor) -> float:
        a, b = x.numpy()
        return float(100 * (b - a * a) ** 2 + (1 - a) ** 2)

    for scheme in SCHEMES:
        result = minimize(function, START, jac=scheme)
        assert result.success and torch.allclose(result.x, torch.ones_like(START), atol=1e-4)
    result = minimize(lambda x: np.square(x.numpy()).sum(), START, jac="2-point")  # np.float64
    assert result.success


def test_a_function_may_write_into_what_it_gets() -> None:
    def function(p: dict[str, Tensor]) -> Tensor:
        p["a"].sub_(1.0)
        p["b"].sub_(2.0)
        return p["a"].square().sum() + p["b"].square().sum()

    start = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(1, dtype=torch.float64)}
    result = minimize(function, start, jac="2-point")
    assert torch.allclose(result.x["a"], torch.ones(2).double(), atol=1e-5)
    assert torch.allclose(result.x["b"], torch.full((1,), 2.0).double(), atol=1e-5)
    assert torch.equal(start["a"], torch.zeros(2).double())


def test_all_evaluations_of_a_gradient_draw_the_same_numbers() -> None:
    def noisy(x: Tensor) -> Tensor:
        return (x * (1 + torch.rand(2))).square().sum()

    estimate = gradient_of(Differences(noisy, "2-point", Counts()), START)
    assert estimate.abs().max() < 20
    before = torch.get_rng_state()
    noisy(START)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    gradient_of(Differences(noisy, "2-point", Counts()), START)
    assert torch.equal(torch.get_rng_state(), after)  # as after one evaluation


@pytest.mark.parametrize("scheme", SCHEMES)
def test_points_in_one_call_by_vmap(scheme: str, device: torch.device) -> None:
    calls = 0
    tree = {"a": torch.ones(70).double().to(device), "b": torch.tensor([1j]).cdouble().to(device)}

    def function(p: dict[str, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        return (p["a"] ** 4).sum() * (1 + p["b"].abs().square().sum()) + p["a"].prod()

    def loss(x: Tensor, estimate: Any) -> Tensor:
        found: Tensor = estimate({"a": x, "b": tree["b"]})
        return found

    found = []
    for at_once in (False, True):
        counts, calls = Counts(), 0
        estimate = Differences(function, scheme, counts, at_once=at_once)
        found.append(gradient_of(lambda x, e=estimate: loss(x, e), tree["a"]))
        assert counts.functions == 1 + 72 * (1 + (scheme == "3-point"))
        assert calls == (1 + 3 * (1 + (scheme == "3-point")) if at_once else counts.functions)
    assert torch.allclose(found[0], found[1], rtol=1e-6)
    options = {"finite_diff_vmap": True}
    result = minimize(rosenbrock, START, jac=scheme, options=options)
    assert result.success and result.x.tolist() == pytest.approx([1.0, 1.0], abs=1e-4)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        minimize(lambda x: x.sum().item(), START, jac=scheme, options=options)


def test_rel_step_is_an_option() -> None:
    seen: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return x.square().sum()

    options = {"finite_diff_rel_step": 1e-2, "maxiter": 1}
    minimize(function, START, jac="2-point", options=options)
    assert torch.allclose(seen[1] - START, torch.tensor([-0.012, 0.0]).double())


# Gradients that the user gives.


def value_and_gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    return rosenbrock(x), torch.func.grad(rosenbrock)(x)


def with_numpy(x: Tensor) -> Any:
    a, b = x.detach().numpy()
    return np.array([-400 * a * (b - a * a) - 2 * (1 - a), 200 * (b - a * a)])


@pytest.mark.parametrize("method", ["bfgs", "lbfgs", "newton-cg"])
def test_a_given_gradient_is_as_good_as_the_exact_one(method: str) -> None:
    exact = minimize(rosenbrock, START, method)
    for fun, jac in (
        (rosenbrock, torch.func.grad(rosenbrock)),
        (value_and_gradient, True),
        (lambda x: [v.tolist() if i else v for i, v in enumerate(value_and_gradient(x))], True),
        (lambda x: rosenbrock(x).item(), with_numpy),
        (rosenbrock, lambda x: torch.autograd.grad(rosenbrock(x.requires_grad_()), x)[0]),
    ):
        result = minimize(fun, START, method, jac=jac)
        assert result.success, (method, result)
        assert torch.allclose(result.x, torch.ones_like(START), atol=1e-6)
        if method != "newton-cg":  # which takes differences, where the gradient has no graph
            assert result.nfev == result.njev == pytest.approx(exact.nfev, abs=5)  # rounding


def test_second_derivatives_come_from_the_given_gradient() -> None:
    exact = minimize(rosenbrock, START, "trust-ncg")
    result = minimize(rosenbrock, START, "trust-ncg", jac=torch.func.grad(rosenbrock))
    assert torch.allclose(result.x, exact.x) and result.nhev == exact.nhev
    both = minimize(value_and_gradient, START, "trust-ncg", jac=True)
    assert torch.allclose(both.x, exact.x) and both.nhev == exact.nhev


def test_second_derivatives_of_a_tree() -> None:
    def function(p: dict[str, Tensor]) -> Tensor:
        return (p["a"] ** 4).sum() * p["b"].sum() + p["b"].pow(3).sum()

    tree = {"a": torch.tensor([1.0, 2.0]).double(), "b": torch.tensor([3.0]).double()}
    wrapped = given(function, torch.func.grad(function), Counts(), twice=True)
    for name, point in tree.items():
        other = {k: v for k, v in tree.items() if k != name}

        def partly(f: Any, x: Tensor, name: str = name, other: Any = other) -> Tensor:
            found: Tensor = f(
                {name: x, **{k: v.clone().requires_grad_() for k, v in other.items()}}
            )
            return found

        found = torch.autograd.functional.hessian(lambda x: partly(wrapped, x), point)
        wanted = torch.autograd.functional.hessian(lambda x: partly(function, x), point)
        assert torch.allclose(found, wanted)


def test_a_gradient_without_a_graph_has_no_second_derivative() -> None:
    def detached(x: Tensor) -> Tensor:
        return torch.func.grad(rosenbrock)(x).detach()

    with pytest.raises(MissingSecondDerivative, match="jac gave has no graph"):
        minimize(rosenbrock, START, "trust-ncg", jac=detached)
    with pytest.raises(MissingSecondDerivative, match="jac gave has no graph"):
        minimize(rosenbrock, START, "adahessian", jac=detached)
    differences = minimize(rosenbrock, START, "newton-cg", jac=detached)
    assert differences.success and differences.info.curvature == "hessian by differences"


def test_complex_gradients_have_the_convention_of_torch() -> None:
    aim = torch.tensor([1.0 + 2.0j], dtype=torch.complex128)
    result = minimize(
        lambda z: (z - aim).abs().square().sum(), torch.zeros_like(aim), jac=lambda z: 2 * (z - aim)
    )
    assert result.success and torch.allclose(result.x, aim)


def test_losses_inside_are_not_mistaken_for_the_value() -> None:
    """NewtonCG looks for outputs of standard losses, and these are not those of its graph."""
    aim = torch.tensor([1.0, 2.0]).double()

    def loss(x: Tensor) -> Tensor:
        return torch.nn.functional.mse_loss(x**3, aim)

    exact = minimize(loss, START, "newton-cg", options={"curvature": "hessian"})
    result = minimize(loss, START, "newton-cg", jac=torch.func.grad(loss))
    assert torch.allclose(result.x, exact.x, atol=1e-6) and result.info.curvature == "hessian"


def test_sparse_gradients() -> None:
    result = minimize(lambda x: x @ x, START, jac=lambda x: (2 * x).to_sparse())
    assert result.success and torch.allclose(result.x, torch.zeros_like(START), atol=1e-7)


def test_backward_inside_the_gradient_is_its_own_affair() -> None:
    """An evaluation with curvature intercepts backward(), which this is no part of."""

    def gradient(x: Tensor) -> Tensor:
        point = x.detach().clone().requires_grad_()
        rosenbrock(point).backward()
        assert point.grad is not None
        return point.grad

    result = minimize(rosenbrock, START, "newton-cg", jac=gradient)
    assert result.success and result.info.curvature == "hessian by differences"
    assert torch.allclose(result.x, torch.ones_like(START), atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounding_takes_no_point_beyond_a_bound(scheme: str) -> None:
    x = 1e-9 * torch.randn(20_000, dtype=torch.float64)
    low = x.clamp(max=0) - 1e-8 * torch.rand_like(x)
    high = x.clamp(min=0) + 1e-8 * torch.rand_like(x)
    estimate = Differences(lambda x: x.sum(), scheme, Counts())
    eps = torch.finfo(x.dtype).eps
    for points in estimate._moves(x, eps, (low, high)):
        assert ((low <= points) & (points <= high)).all()


def test_a_function_that_vmap_cannot_evaluate() -> None:
    with pytest.raises(RuntimeError, match="leave the option finite_diff_vmap out"):
        minimize(
            lambda x: float(x.numpy().sum()),
            torch.ones(2),
            jac="2-point",
            options={"finite_diff_vmap": True},
        )


@pytest.mark.parametrize("method", ["bfgs", "lbfgs", "cg"])
@pytest.mark.parametrize("together", [False, True])
def test_functions_that_write_into_their_argument(method: str, together: bool) -> None:
    """As in SciPy, they get a copy."""
    target = torch.tensor([1.0, 2.0], dtype=torch.float64)

    def gradient(x: Tensor) -> Tensor:
        found = 2 * (x - target)
        x.zero_()
        return found

    def value(x: Tensor) -> Any:
        found = (x - target).square().sum()
        return (found, gradient(x)) if together else found * x.fill_(1.0).prod()

    jac: Any = True if together else gradient
    result = minimize(value, torch.full((2,), 5.0, dtype=torch.float64), method, jac=jac)
    assert result.success
    torch.testing.assert_close(result.x, target)
