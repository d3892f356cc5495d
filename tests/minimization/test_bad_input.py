"""Errors of `minimize`: each says what is wrong and what to do, before anything has happened."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torch_secondorder import BFGS, Contractive, minimize
from torch_secondorder.minimization._methods import METHODS

START = torch.tensor([-1.2, 1.0], dtype=torch.float64)


def square(x: Tensor) -> Tensor:
    return x.square().sum()


def never(x: Any) -> Tensor:
    raise AssertionError("the function was called")


@pytest.mark.parametrize(
    ("x0", "kind", "message"),
    [
        (torch.tensor([1, 2]), TypeError, r"x0 has dtype torch.int64.*pass x0.double\(\)"),
        ({"n": torch.tensor(True)}, TypeError, r"x0\['n'\] has dtype torch.bool"),
        ([1.0, 2.0], TypeError, r"x0\[0\] is float, not a tensor.*torch.tensor\("),
        (np.ones(2), TypeError, "x0 is ndarray, not a tensor"),
        ({"a": START, "b": [None]}, TypeError, r"x0\['b'\]\[0\] is NoneType"),
        (3.0, TypeError, "x0 is float"),
        ({"s": torch.eye(2).to_sparse()}, TypeError, r"x0\['s'\] has layout .*pass x0\['s'\].to_d"),
        ({}, ValueError, "x0 holds no tensor"),
    ],
)
def test_starts(x0: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        minimize(never, x0)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"method": "simplex"}, ValueError, "unknown method 'simplex': choose one of 'bfgs', .*'s"),
        ({"method": 3}, TypeError, "method must be a name, one of 'bfgs'.*got 3"),
        ({"method": torch.optim.SGD}, TypeError, "optimizer class of torch_secondorder"),
        ({"method": BFGS([torch.ones(1)])}, TypeError, "own, a BFGS: pass the class BFGS, and its"),
        ({"method": Contractive}, TypeError, "optimizer class of torch_secondorder"),
        ({"jac": "cs"}, ValueError, "exact gradient by autograd is as accurate: leave jac out"),
        ({"jac": "4-point"}, ValueError, "'2-point' or '3-point', got '4-point'"),
        ({"jac": False}, ValueError, "got False"),
        ({"callback": 3}, TypeError, "callback must be callable or None, got int"),
        ({"tol": -1.0}, ValueError, "tol must be a finite number of at least 0 or None, got -1.0"),
        ({"options": [1]}, TypeError, "options must be a dict, got list"),
        ({"options": {"gtoll": 1}}, ValueError, "unknown option 'gtoll' of method 'bfgs'; it has"),
        ({"options": {"maxcor": 1}}, ValueError, "unknown option 'maxcor'"),
        ({"options": {"maxiter": 0}}, ValueError, r"options\['maxiter'\] must be an integer of"),
        ({"options": {"maxfun": 1.5}}, ValueError, r"options\['maxfun'\] must be an integer of"),
        ({"options": {"gtol": "a"}}, ValueError, r"options\['gtol'\] must be a finite number of"),
        ({"options": {"xtol": -1}}, ValueError, r"options\['xtol'\] must be a finite number of"),
        ({"options": {"finite_diff_rel_step": 0}}, ValueError, "must be a finite number above 0"),
        (
            {"options": {"maxiter": 1, "max_iter": 2}},
            ValueError,
            "options 'maxiter' and 'max_iter' are the same: give one",
        ),
        ({"options": {"maximize": True}}, ValueError, "minimize the negative of fun instead"),
        ({"options": {"weight_decay": 1}}, ValueError, "add the penalty to fun instead"),
        ({"options": {"bounds": (0, 1)}}, ValueError, "bounds is an argument of minimize itself"),
        ({"options": {"update": "x"}}, ValueError, "update must be one of 'bfgs'"),
        ({"options": {"lr": -1}}, ValueError, "lr"),
        (
            {"compile": True, "jac": "2-point"},
            ValueError,
            "compile goes with gradients by auto",
        ),
        ({"compile": True, "method": "sophia"}, ValueError, "does not go with compile"),
    ],
)
def test_arguments(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        minimize(never, START, **arguments)


def test_an_unknown_option_lists_those_of_the_method() -> None:
    with pytest.raises(ValueError, match=r"gtol, ftol, xtol, maxiter, maxfun, disp.*history_size"):
        minimize(never, START, "lbfgs", options={"m": 3})
    with pytest.raises(ValueError, match="max_cg_iter") as error:
        minimize(never, START, "newton-cg", options={"m": 3})
    for hidden in ("params", "maximize", "weight_decay", "tolerance_grad", "bounds"):
        assert hidden not in str(error.value)


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.twice])
def test_second_derivatives_need_more_than_differences(method: str) -> None:
    with pytest.raises(ValueError, match=f"method '{method}' takes second derivatives.*'lbfgs'"):
        minimize(never, START, method, jac="2-point")


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if not row.takes_bounds])
def test_methods_that_cannot_take_bounds(method: str) -> None:
    able = [name for name, row in METHODS.items() if row.takes_bounds]
    with pytest.raises(ValueError, match=f"method '{method}' cannot take bounds") as error:
        minimize(never, START, method, bounds=(0, 1))
    assert all(repr(name) in str(error.value) for name in able)


@pytest.mark.parametrize(
    ("fun", "kind", "message"),
    [
        (3, TypeError, "fun must be callable, got int"),
        (
            lambda x: 2 * x,
            ValueError,
            r"real scalar, got shape \(2,\).*, or call least_squ",
        ),
        (lambda x: x.sum() * 1j, ValueError, "real scalar, got .* torch.complex128"),
        (lambda x: np.sum(np.asarray(x)), TypeError, "hands x to NumPy, .*or pass jac='2-point'"),
        (lambda x: x.sum().item(), TypeError, "a float, which has no deriv.*or pass jac='2-point'"),
        (lambda x: np.float64(2), TypeError, "a float64, which has no derivatives"),
        (lambda x: None, TypeError, "fun must return a scalar, got NoneType"),
        (lambda x: "a", TypeError, "fun must return a scalar, got str"),
        (lambda x: square(x.detach()), ValueError, "does not depend on x by operations"),
        (lambda x: torch.ones(()), ValueError, "does not depend on x by operations"),
    ],
)
def test_values(fun: Any, kind: type[Exception], message: str) -> None:
    for method in ("bfgs", "lbfgs", "newton-cg", "sophia"):
        start = START.clone()
        with pytest.raises(kind, match=message):
            minimize(fun, start, method)
        assert torch.equal(start, START)


@pytest.mark.parametrize("method", ["bfgs", "newton"])
def test_a_value_of_other_tensors(method: str) -> None:
    model = torch.nn.Linear(2, 1)
    with pytest.raises(RuntimeError, match=r"no gradient reached.*functional_call") as error:
        minimize(lambda p: model(torch.ones(1, 2)).sum(), dict(model.named_parameters()), method)
    assert "closure" not in str(error.value)


def test_values_of_a_function_to_be_compiled() -> None:
    with pytest.raises(ValueError, match="fun must return a real scalar"):
        minimize(lambda x: 2 * x, START, compile={"backend": "eager"})


@pytest.mark.parametrize(
    ("fun", "message"),
    [
        (lambda x: None, "fun must return a scalar, got NoneType"),
        (lambda x: x, "fun must return a real scalar"),
        (lambda x: np.ones(2), "fun must return a scalar, got ndarray"),
        (lambda x: "3", "fun must return a scalar, got str"),
    ],
)
def test_values_for_differences(fun: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        minimize(fun, START, jac="2-point")


@pytest.mark.parametrize(
    ("fun", "jac", "kind", "message"),
    [
        (square, True, TypeError, r"fun must return the pair \(value, gradient\), got Tensor"),
        (
            lambda x: torch.func.grad_and_value(square)(x),
            True,
            ValueError,
            "the gradient comes first: torch.func.grad_and_value",
        ),
        (lambda x: (x, x), True, ValueError, "fun must return a real scalar"),
        (square, lambda x: x[:1], ValueError, r"jac returned a gradient of shape \(1,\)"),
        (lambda x: (1.0, [1.0]), True, ValueError, r"fun returned a gradient of shape \(1,\)"),
        (square, lambda x: x * 1j, ValueError, "dtype torch.complex128"),
        (square, lambda x: "a", TypeError, "jac must return a gradient like x0, got str"),
        (square, lambda x: None, TypeError, "jac must return a gradient like x0, got NoneType"),
    ],
)
def test_gradients(fun: Any, jac: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        minimize(fun, START, jac=jac)


def test_gradients_of_another_tree() -> None:
    with pytest.raises(ValueError, match=r"jac returned a gradient .*, but x0 is"):
        minimize(lambda p: square(p["x"]), {"x": START}, jac=lambda p: [p["x"]])


def test_an_exception_in_the_function_comes_through() -> None:
    with pytest.raises(AssertionError, match="was called"):
        minimize(never, START)
