"""One call that minimizes: methods, trees, dtypes, callbacks and results, beside SciPy's."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.problems import PROBLEMS_BY_NAME
from torch_secondorder import (
    LBFGS,
    LBFGSInfo,
    NewtonCG,
    OptimizeResult,
    StepStatus,
    minimize,
)
from torch_secondorder.minimization._methods import METHODS, read_options
from torch_secondorder.optim.extending import FlatOptimizer

# "lm" is for functions that show residuals, see test_least_squares.py.
OF_ANY_FUNCTION = [name for name in METHODS if name != "lm"]
ITERATING = [name for name in OF_ANY_FUNCTION if METHODS[name].iterates]
FIRST_ORDER = [name for name in ITERATING if not METHODS[name].twice]
START = torch.tensor([-1.2, 1.0], dtype=torch.float64)


def rosenbrock(x: Tensor) -> Tensor:
    a, b = x.unbind()
    return 100.0 * (b - a * a).square() + (1.0 - a).square()


def through_numpy(function: Callable[[Tensor], Tensor]) -> Callable[[Any], tuple[float, Any]]:
    """Value and gradient for SciPy."""

    def call(x: Any) -> tuple[float, Any]:
        point = torch.from_numpy(x).requires_grad_()
        value = function(point)
        (gradient,) = torch.autograd.grad(value, point)
        return value.item(), gradient.numpy()

    return call


@pytest.mark.parametrize("method", ITERATING)
def test_every_method_finds_the_minimum(method: str, device: torch.device) -> None:
    start = START.to(device)
    result = minimize(rosenbrock, start, method)
    assert result.success and result.status == 0, result
    assert result.x.device == device or result.x.device.type == device.type
    assert torch.allclose(result.x, torch.ones_like(start), atol=1e-6)
    assert result.fun == pytest.approx(rosenbrock(result.x).item(), abs=1e-15)
    assert torch.allclose(result.jac, torch.func.grad(rosenbrock)(result.x), atol=1e-12)
    assert result.nfev == result.njev >= result.nit > 5
    assert (result.nhev > 0) == METHODS[method].twice
    assert torch.equal(start.cpu(), START)


@pytest.mark.parametrize("method", ["adahessian", "sophia"])
def test_methods_for_noisy_losses_go_down(method: str, device: torch.device) -> None:
    def quadratic(x: Tensor) -> Tensor:
        return (x * x * torch.tensor([1.0, 50.0], device=device)).sum()

    start = torch.tensor([1.03, -1.07], device=device)
    result = minimize(quadratic, start, method, options={"lr": 0.1, "maxiter": 60})
    assert result.fun < 0.1 * quadratic(start).item()
    assert result.fun == pytest.approx(quadratic(result.x).item(), rel=1e-6)
    assert torch.allclose(result.jac, torch.func.grad(quadratic)(result.x), rtol=1e-5)
    assert (result.status, result.nit, result.nfev) == (1, 60, 61)
    assert result.nhev > 0


def test_methods_for_noisy_losses_stop_at_a_small_gradient() -> None:
    start = torch.tensor([1.0, -1.0], dtype=torch.float64)
    result = minimize(
        lambda x: x.square().sum(), start, "adahessian", tol=1e-3, options={"lr": 1.0}
    )
    assert result.success and result.nit < 100
    assert result.jac.abs().max() <= 1e-3
    assert torch.equal(result.jac, 2 * result.x)


@pytest.mark.parametrize("name", ["rosenbrock", "wood", "beale", "powell_singular"])
@pytest.mark.parametrize("jac", [None, "2-point", "3-point"])
def test_agrees_with_scipy(name: str, jac: Any) -> None:
    problem = PROBLEMS_BY_NAME[name]
    result = minimize(problem.function, problem.start, jac=jac)
    theirs = scipy.optimize.minimize(
        through_numpy(problem.function), problem.start.numpy(), jac=True, options={"gtol": 1e-8}
    )
    assert result.success, result
    # Near its minimum the value of Powell's function is the power 4/3 of the gradient.
    rough = name == "powell_singular" and jac == "2-point"
    assert result.fun == pytest.approx(theirs.fun, abs=1e-6 if rough else 1e-8)
    if name != "powell_singular":  # its Hessian is singular: values say little about the point
        assert result.x.numpy() == pytest.approx(theirs.x, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("method", FIRST_ORDER)
def test_with_and_without_the_exact_gradient(method: str) -> None:
    with_it, without = (
        minimize(rosenbrock, START, method),
        minimize(rosenbrock, START, method, jac="2-point"),
    )
    assert with_it.success and without.success
    assert without.nfev == 3 * without.njev
    assert torch.allclose(with_it.x, without.x, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**20), st.sampled_from(ITERATING))
def test_convex_quadratics_are_solved(size: int, seed: int, method: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    matrix = root @ root.T + torch.eye(size, dtype=torch.float64)
    b = torch.randn(size, generator=generator, dtype=torch.float64)
    result = minimize(lambda x: 0.5 * x @ matrix @ x - b @ x, torch.zeros_like(b), method)
    assert result.success, result
    assert torch.allclose(result.x, torch.linalg.solve(matrix, b), atol=1e-5)


# Trees.


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


def of_tree(tree: dict[str, Any]) -> Tensor:
    w, (b, c) = tree["w"], tree["rest"]
    return (w - 1).square().sum() + (b.sum() - 2 + w[0, 0]) ** 2 + (c.abs() - 1).square() + b @ b


@pytest.mark.parametrize("jac", [None, "2-point", "3-point"])
def test_a_tree_gives_a_tree(jac: Any, device: torch.device) -> None:
    make = {"dtype": torch.float64, "device": device}
    tree = {
        "w": torch.zeros(2, 2, **make),
        "rest": [torch.ones(3, **make), torch.tensor(2.0, **make)],
    }
    before = copy.deepcopy(tree)
    result = minimize(of_tree, tree, jac=jac)
    assert result.success
    for like in (result.x, result.jac):
        assert like.keys() == tree.keys() and isinstance(like["rest"], list)
        assert like["w"].shape == (2, 2) and like["rest"][1].shape == ()
        assert like["w"].dtype == torch.float64 and like["w"].device.type == device.type
        assert not like["w"].requires_grad
    flat = torch.cat([result.jac["w"].flatten(), *(t.flatten() for t in result.jac["rest"])])
    assert flat.abs().max() < 2e-5
    assert torch.allclose(result.x["rest"][1], torch.ones((), **make))
    assert torch.equal(tree["w"], before["w"]) and torch.equal(tree["rest"][0], before["rest"][0])
    if jac is not None:
        assert result.nfev == result.njev * (1 + 8 * (1 + (jac == "3-point")))


def test_a_named_tuple_stays_one() -> None:
    start = Pair(torch.zeros(2, dtype=torch.float64), torch.zeros((), dtype=torch.float64))
    result = minimize(lambda p: (p.a - 1).square().sum() + (p.b + 2) ** 2, start)
    assert isinstance(result.x, Pair) and isinstance(result.jac, Pair)
    assert result.x.b.item() == pytest.approx(-2)


def test_a_module_is_called_as_a_function(device: torch.device) -> None:
    model = torch.nn.Linear(3, 1).to(device)
    x = torch.randn(20, 3, device=device)
    y = x.sum(1, keepdim=True)
    params = dict(model.named_parameters())
    before = copy.deepcopy(model.state_dict())

    def loss(p: dict[str, Tensor]) -> Tensor:
        return torch.nn.functional.mse_loss(torch.func.functional_call(model, p, (x,)), y)

    for method in ITERATING:
        result = minimize(loss, params, method)
        assert result.fun < 1e-8, method
        assert torch.allclose(result.x["weight"], torch.ones(1, 3, device=device), atol=1e-3)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_entries_that_do_not_matter_stay() -> None:
    tree = {"x": START, "unused": torch.ones(2), "empty": torch.zeros(0)}
    for method in ("bfgs", "adahessian"):
        result = minimize(lambda p: rosenbrock(p["x"]), tree, method, options={"maxiter": 3})
        assert torch.equal(result.x["unused"], torch.ones(2))
        assert torch.equal(result.jac["unused"], torch.zeros(2))
        assert result.x["empty"].shape == result.jac["empty"].shape == (0,)
        assert result.fun < 24.2


def test_everything_empty_is_a_success() -> None:
    result = minimize(lambda x: x.sum() + 3, torch.zeros(0), jac="2-point")
    assert result.success and result.fun == 3.0 and result.nfev == 1
    assert result.x.shape == result.jac.shape == (0,)
    assert result.info.status is StepStatus.NOTHING_TO_TRAIN


# Dtypes and shapes.


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
@pytest.mark.parametrize("jac", [None, "2-point", "3-point"])
def test_shapes(shape: tuple[int, ...], jac: Any) -> None:
    start = torch.full(shape, 3.0, dtype=torch.float64)
    for method in FIRST_ORDER if jac else ITERATING:
        result = minimize(
            lambda x: (x - 1).pow(2).sum() + (x - 1).pow(4).sum(), start, method, jac=jac
        )
        assert result.success and result.x.shape == result.jac.shape == shape
        assert torch.allclose(result.x, torch.ones_like(start), atol=1e-5)


@pytest.mark.parametrize("method", ITERATING)
def test_single_precision_converges(method: str, device: torch.device) -> None:
    start = START.float().to(device)
    result = minimize(rosenbrock, start, method)
    assert result.success, result
    assert result.x.dtype == result.jac.dtype == torch.float32
    assert torch.allclose(result.x, torch.ones_like(start), atol=1e-2)


def test_single_precision_by_differences() -> None:
    result = minimize(lambda x: (x - 1).square().sum(), torch.zeros(3), jac="3-point")
    assert result.success and torch.allclose(result.x, torch.ones(3), atol=1e-2)


def test_half_precision() -> None:
    result = minimize(
        lambda x: (x.float() - 1).square().sum(), torch.zeros(3, dtype=torch.bfloat16)
    )
    assert result.success and result.x.dtype == torch.bfloat16
    assert torch.allclose(result.x.float(), torch.ones(3), atol=1e-2)


@pytest.mark.parametrize("jac", [None, "2-point", "3-point"])
def test_complex_numbers(jac: Any, device: torch.device) -> None:
    aim = torch.tensor([1.0 + 2.0j, -3.0j], dtype=torch.complex128, device=device)

    def distance(z: Tensor) -> Tensor:
        return (z - aim).abs().square().sum() + (z[0] * z[0].conj()).real / 2

    result = minimize(distance, torch.zeros_like(aim), jac=jac)
    assert result.success and result.x.dtype == torch.complex128
    assert torch.allclose(result.x, aim * torch.tensor([2 / 3, 1.0]).to(aim), atol=1e-5)
    if jac is not None:
        assert result.nfev == result.njev * (1 + 4 * (1 + (jac == "3-point")))


@pytest.mark.parametrize("make", [torch.nn.Parameter, lambda x: x.requires_grad_()])
def test_the_start_is_left_alone(make: Callable[[Tensor], Tensor]) -> None:
    start = make(START.clone())
    result = minimize(rosenbrock, start)
    assert torch.equal(start.detach(), START) and start.grad is None and start.requires_grad
    assert type(result.x) is Tensor and not result.x.requires_grad


def test_an_expanded_start() -> None:
    result = minimize(lambda x: (x - torch.arange(3)).square().sum(), torch.zeros(1).expand(3))
    assert torch.allclose(result.x, torch.arange(3.0), atol=1e-4)


def test_autograd_inside_the_function() -> None:
    def slope_at_one(x: Tensor) -> Tensor:
        t = torch.ones((), dtype=x.dtype, requires_grad=True)
        (slope,) = torch.autograd.grad(x[0] * t + x[1] * t**2, t, create_graph=True)
        return (slope - 3).square() + x @ x

    exact, estimated = minimize(slope_at_one, START), minimize(slope_at_one, START, jac="2-point")
    assert torch.allclose(exact.x, torch.tensor([0.5, 1.0], dtype=torch.float64))
    assert torch.allclose(exact.x, estimated.x, atol=1e-5)


def test_under_no_grad() -> None:
    with torch.no_grad():
        for method in ("bfgs", "newton-cg", "adahessian"):
            assert minimize(rosenbrock, START, method, options={"maxiter": 2}).fun < 24.2


def test_further_arguments() -> None:
    def shifted(x: Tensor, by: float, scale: Tensor) -> Tensor:
        return (scale * (x - by)).square().sum()

    for jac in (None, "2-point", torch.func.grad(shifted)):
        result = minimize(shifted, START, args=(2.0, torch.tensor([1.0, 3.0])), jac=jac)
        assert torch.allclose(result.x, torch.full_like(START, 2.0), atol=1e-5)


@pytest.mark.parametrize("only", [2.0, torch.tensor([2.0, 3.0]), 0.0, [2.0, 3.0]])
def test_a_single_further_argument_needs_no_tuple(only: Any) -> None:
    def shifted(x: Tensor, by: Any) -> Tensor:
        return (x - torch.as_tensor(by)).square().sum()

    result = minimize(shifted, START, args=only)
    assert torch.allclose(result.x, torch.as_tensor(only).to(START), atol=1e-6)


def test_compiled() -> None:
    result = minimize(rosenbrock, START, compile={"backend": "eager"})
    assert result.success and torch.allclose(result.x, torch.ones_like(START), atol=1e-6)


# Methods and options.


@pytest.mark.parametrize("alias", ["L-BFGS-B", "l_bfgs", "LBFGS", "Lbfgs"])
def test_names_in_any_case(alias: str) -> None:
    assert isinstance(minimize(rosenbrock, START, alias).info, LBFGSInfo)


def test_optimizer_classes() -> None:
    by_class, by_name = minimize(rosenbrock, START, LBFGS), minimize(rosenbrock, START, "lbfgs")
    assert torch.equal(by_class.x, by_name.x) and by_class.nfev == by_name.nfev
    curvature = {"curvature": "hessian"}
    assert minimize(rosenbrock, START, NewtonCG, options=curvature).info.curvature == "hessian"


class Steepest(FlatOptimizer):
    """Gradient descent without a search, as a user may write it."""

    def __init__(self, params: Any, lr: float = 1.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "maximize": False})

    def _iterate(self, descent: Any) -> None:
        descent.objective.accept(-descent.point.grad, descent.lr)
        _, point = self._evaluate(descent.objective)
        descent.arrive(point, descent.lr, descent.lr * descent.point.grad_norm)


def test_optimizers_of_your_own() -> None:
    result = minimize(lambda x: x @ x, START, Steepest, options={"lr": 0.25, "maxiter": 4})
    assert result.nit == 4
    assert torch.allclose(result.x, START / 2**4)


def test_the_method_by_default() -> None:
    assert type(minimize(rosenbrock, START).info).__name__ == "BFGSInfo"
    many = minimize(lambda x: (x - 1).square().sum(), torch.zeros(1001))
    assert type(many.info).__name__ == "LBFGSInfo"


def test_options_by_the_names_of_scipy_and_of_the_optimizer() -> None:
    short = minimize(rosenbrock, START, "lbfgs", options={"maxiter": 3})
    assert (short.nit, short.status, short.success) == (3, 1, False)
    assert "maxiter" in short.message
    same = minimize(rosenbrock, START, "lbfgs", options={"max_iter": 3})
    assert torch.equal(short.x, same.x)
    few = minimize(rosenbrock, START, "lbfgs", options={"maxfun": 10})
    assert 10 <= few.nfev <= 13 and few.status == 1 and "maxfun" in few.message
    few = minimize(rosenbrock, START, "lbfgs", jac="2-point", options={"maxfun": 30})
    assert 30 <= few.nfev <= 40
    memory = minimize(rosenbrock, START, "lbfgs", options={"maxcor": 2})
    assert memory.nfev != minimize(rosenbrock, START, "lbfgs").nfev
    for both in ({"ftol": 0.2, "xtol": 0.3}, {"xtol": 0.3, "ftol": 0.2}):
        assert read_options(both, None, "lbfgs", METHODS["lbfgs"]).tolerance_change == 0.2
    flat = minimize(rosenbrock, START, "lbfgs", options={"gtol": 0, "ftol": 0.2, "xtol": 0.3})
    assert flat.success and flat.info.status is StepStatus.CONVERGED_CHANGE


@pytest.mark.parametrize("method", ITERATING)
def test_a_tolerance(method: str) -> None:
    rough = minimize(rosenbrock, START, method, tol=1e-1)
    fine = minimize(rosenbrock, START, method, options={"gtol": 1e-9})
    assert fine.jac.abs().max() <= 1e-9 < rough.jac.abs().max() <= 1e-1
    assert rough.nfev < fine.nfev


def test_the_default_tolerance_scales_with_small_functions() -> None:
    result = minimize(lambda x: 1e-9 * rosenbrock(x), START)
    assert torch.allclose(result.x, torch.ones_like(START), atol=1e-4)


def test_disp_prints_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    minimize(rosenbrock, START, options={"maxiter": 2})
    assert capsys.readouterr().out == ""
    minimize(rosenbrock, START, options={"disp": True, "maxiter": 2})
    line = capsys.readouterr().out
    assert "maxiter" in line and "2 iterations" in line and line.count("\n") == 1


# Callbacks.


@pytest.mark.parametrize("method", [*ITERATING, "adahessian"])
def test_a_callback_sees_each_iterate(method: str) -> None:
    seen: list[OptimizeResult] = []

    def watch(intermediate_result: OptimizeResult) -> None:
        seen.append(intermediate_result)

    options = {"maxiter": 12}
    result = minimize(rosenbrock, START, method, callback=watch, options=options)
    assert len(seen) == result.nit
    for found in seen:
        assert found.fun == pytest.approx(rosenbrock(found.x).item(), rel=1e-12)
    assert torch.equal(seen[-1].x, result.x) and seen[-1].fun == result.fun
    plain = minimize(rosenbrock, START, method, options=options)
    assert torch.equal(plain.x, result.x) and plain.nfev == result.nfev


def test_a_callback_of_the_old_style_gets_the_point() -> None:
    seen: list[Any] = []
    result = minimize(lambda p: rosenbrock(p["x"]), {"x": START}, callback=seen.append)
    assert len(seen) == result.nit and torch.equal(seen[-1]["x"], result.x["x"])
    assert not torch.equal(seen[0]["x"], seen[1]["x"])


@pytest.mark.parametrize("method", ["bfgs", "cg", "newton", "adahessian"])
def test_a_callback_may_write_into_its_point(method: str) -> None:
    x0 = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    options = {"maxiter": 3}
    plain = minimize(rosenbrock, x0, method, options=options)
    written = minimize(rosenbrock, x0, method, callback=lambda x: x.fill_(77.0), options=options)
    assert torch.equal(written.x, plain.x)


def test_a_callback_may_keep_points_of_any_length() -> None:
    """The position of a long vector moves in place."""
    seen: list[Tensor] = []
    start = torch.ones(100_000)
    minimize(lambda x: (x**4).mean(), start, callback=seen.append, options={"maxiter": 3})
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise([start, *seen]))


@pytest.mark.parametrize("method", [*ITERATING, "sophia"])
def test_a_callback_ends_the_minimization(method: str) -> None:
    points: list[Tensor] = []

    def stop(x: Tensor) -> None:
        points.append(x)
        if len(points) == 3:
            raise StopIteration

    result = minimize(rosenbrock, START, method, callback=stop)
    assert (result.status, result.success, result.nit) == (99, False, 3)
    assert "StopIteration" in result.message
    assert torch.equal(result.x, points[-1])
    assert result.fun == rosenbrock(result.x).item()
    assert torch.allclose(result.jac, torch.func.grad(rosenbrock)(result.x))


def test_an_exception_in_a_callback_comes_through() -> None:
    def fail(x: Tensor) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        minimize(rosenbrock, START, callback=fail)


# Endings.


def test_a_start_that_is_not_finite() -> None:
    start = torch.tensor([float("nan"), 1.0])
    for method in OF_ANY_FUNCTION:
        result = minimize(lambda x: x.square().sum(), start, method)
        assert (result.status, result.success, result.nit) == (3, False, 0)
        assert torch.equal(result.x, start) or result.x.isnan()[0]
        assert "x0" in result.message


def test_a_function_without_a_minimum() -> None:
    result = minimize(lambda x: -x.exp().sum(), torch.zeros(2, dtype=torch.float64), "lbfgs")
    assert not result.success and result.status in (3, 4)


@pytest.mark.parametrize("method", FIRST_ORDER)
def test_a_gradient_that_is_wrong_is_no_success(method: str) -> None:
    """It ends as where rounding errors hide the direction of descent."""
    ascent = torch.func.grad(lambda x: -rosenbrock(x))
    result = minimize(rosenbrock, START, method, jac=ascent)
    assert result.status == 2 and not result.success and "no lower value" in result.message
    assert result.fun <= rosenbrock(START).item()


def test_a_start_at_the_minimum() -> None:
    result = minimize(rosenbrock, torch.ones(2, dtype=torch.float64))
    assert (result.success, result.nit, result.nfev) == (True, 0, 1)
    assert torch.equal(result.jac, torch.zeros(2, dtype=torch.float64))


# Results.


def test_a_result_is_a_dict_with_attributes() -> None:
    result = minimize(rosenbrock, START)
    assert result["x"] is result.x and set(result) <= set(dir(result))
    assert list(result)[:3] == ["x", "fun", "jac"] and len(result) == 11
    for twin in (copy.copy(result), copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert type(twin) is OptimizeResult and torch.equal(twin.x, result.x)
        assert twin.message == result.message
    result.note = "mine"
    assert result["note"] == "mine"
    del result.note
    with pytest.raises(AttributeError, match="no 'hess', it has x, fun, jac"):
        _ = result.hess


def test_a_result_prints_as_a_table() -> None:
    text = str(minimize(lambda p: rosenbrock(p["x"]), {"x": START}))
    lines = text.splitlines()
    assert lines[0].startswith("      x: {'x': tensor([1.")
    assert "success: True" in lines and " status: 0" in lines
    assert lines[-1] == "   info: BFGSInfo with status CONVERGED_GRADIENT"
    assert repr(OptimizeResult()) == "OptimizeResult()"


def test_counts_are_those_of_calls() -> None:
    calls = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return rosenbrock(x)

    for method in OF_ANY_FUNCTION:
        for jac in (None, "2-point"):
            if jac and METHODS[method].twice:
                continue
            calls = 0
            result = minimize(counted, START, method, jac=jac, options={"maxiter": 8})
            assert result.nfev == calls, (method, jac)


def test_numbers_are_like_those_of_scipy() -> None:
    theirs = scipy.optimize.minimize(through_numpy(rosenbrock), START.numpy(), jac=True)
    ours = minimize(rosenbrock, START)
    assert {"x", "fun", "jac", "success", "status", "message", "nit", "nfev", "njev"} <= set(ours)
    assert set(theirs) - set(ours) == {"hess_inv"}
    for name in ("fun", "success", "status", "nit", "nfev", "njev"):
        assert isinstance(ours[name], type(theirs[name])) or np.isscalar(theirs[name])
