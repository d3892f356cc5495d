"""Mistakes with constraints that are easily made: each message says what to do instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_secondorder import LBFGS, Constrained, Contractive, Projected
from torch_secondorder.constraints import UnitNorm


def weight() -> Tensor:
    return torch.ones(3, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("value", [torch.zeros(3), 1.0, True])
def test_a_value_in_place_of_a_function(value: Any) -> None:
    for given in (value, [value], {"size": value}):
        with pytest.raises(TypeError, match="give the function itself, not its value, as in lamb"):
            Constrained(torch.optim.SGD([weight()], lr=0.1), inequalities=given)


@pytest.mark.parametrize("kind", [torch.optim.Adam, LBFGS])
def test_a_function_of_the_parameters_beside_a_closure(kind: Any) -> None:
    w = weight()
    optimizer = Constrained(kind([w]), inequalities={"size": lambda x: x.norm() - 1})

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = w.sum()
        loss.backward()
        return loss

    with pytest.raises(TypeError, match=r"size is called with no argument: missing .* 'x'. Beside"):
        optimizer.step(closure)
    assert torch.equal(w, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.LBFGS])
def test_a_closure_without_backward(kind: Any) -> None:
    w = weight()
    optimizer = Constrained(kind([w]), inequalities=lambda: w.norm() - 1)
    w.grad = torch.ones_like(w)  # of a backward() before the step
    with pytest.raises(RuntimeError, match=r"closure did not call backward\(\), and torch.optim"):
        optimizer.step(lambda: w.sum())
    nested = Constrained(Projected(torch.optim.SGD([w], lr=0.1), {w: UnitNorm()}), lambda: w.sum())
    with pytest.raises(RuntimeError, match=r"and torch.optim.SGD does not either"):
        nested.step(lambda: w.sum())


def test_optimizers_that_differentiate_themselves_take_such_a_closure() -> None:
    w = weight()
    optimizer = Constrained(LBFGS([w]), equalities=lambda: w.sum() - 1)
    for _ in range(3):
        optimizer.step(lambda: w.square().sum())
    torch.testing.assert_close(w.detach(), torch.full((3,), 1 / 3, dtype=torch.float64))


def test_no_closure_for_the_lbfgs_of_torch() -> None:
    layer = nn.Linear(2, 2)
    wrappers = [
        Constrained(torch.optim.LBFGS(layer.parameters()), inequalities=lambda: layer.bias - 1),
        Contractive(torch.optim.LBFGS(layer.parameters()), layer, 0.1),
    ]
    for gradients in (False, True):
        for wrapper in wrappers:
            if gradients:
                layer.weight.grad = torch.ones_like(layer.weight)
            with pytest.raises(RuntimeError, match=r"needs a closure:\n.*def closure"):
                wrapper.step()


@pytest.mark.parametrize("value", ["one", None, [1.0, "b"], object()])
def test_multipliers_that_are_no_numbers(value: Any) -> None:
    w = weight()
    optimizer = Constrained(torch.optim.SGD([w], lr=0.1), {"sum": lambda: w.sum()})
    w.grad = torch.ones_like(w)
    optimizer.step()
    before = optimizer.multipliers["sum"]
    with pytest.raises(TypeError, match=r"multipliers of sum must be a number or a tensor of shap"):
        optimizer.multipliers = {"sum": value}
    assert torch.equal(optimizer.multipliers["sum"], before)


def test_a_set_for_something_that_is_no_parameter() -> None:
    w = weight()
    for sets in ({nn.Linear(2, 2): UnitNorm()}, [(nn.Linear(2, 2), UnitNorm())], {3: UnitNorm()}):
        with pytest.raises(TypeError, match=r"sets must be a list of pairs.* got .* for a param"):
            Projected(torch.optim.SGD([w], lr=0.1), sets)  # type: ignore[arg-type]


@pytest.mark.parametrize("option", [{"penalty": 3.0}, {"multiplier_lr": 0.1}])
def test_options_of_another_method(option: dict[str, float]) -> None:
    w = weight()
    optimizer = Constrained(LBFGS([w]), lambda: w.sum() - 1, **option)  # type: ignore[arg-type]
    assert optimizer.method == "augmented_lagrangian"
    with pytest.raises(ValueError, match=f"{next(iter(option))} is no argument of method='sqp'"):
        Constrained(LBFGS([w]), lambda: w.sum() - 1, method="sqp", **option)  # type: ignore[arg-type]
    assert Constrained(LBFGS([w]), lambda: w.sum() - 1).method == "sqp"
