"""Closures as frameworks pass them: objects that are made anew for each step, and idle ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_secondorder import AdaHessian, FunctionalObjective, NewtonCG, Sophia


class Closure:
    """What a loop makes of a function for each step."""

    def __init__(self, run: Callable[[], Tensor], *extra: Any) -> None:
        self._run, self._extra, self._result = run, extra, None

    def __call__(self) -> Tensor:
        self._result = self._run()
        return self._result


def problem() -> tuple[nn.Module, Callable[..., Tensor]]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(7, 3)

    def run(model: nn.Module = model) -> Tensor:
        model.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    return model, run


@pytest.mark.parametrize("kind", [AdaHessian, partial(NewtonCG, curvature="hessian")])
def test_objects_made_anew_are_known_by_what_they_hold(kind: Any) -> None:
    model, run = problem()
    optimizer = kind(model.parameters())
    for _ in range(5):
        optimizer.step(partial(lambda closure: closure(), Closure(partial(run, model))))
    around = optimizer._registry
    noted = sum(map(len, around._known.values()))
    assert 0 < noted + len(around.graphs) <= 2


def test_objects_are_told_apart_by_modules_and_class() -> None:
    model, run = problem()
    optimizer = AdaHessian(model.parameters())
    optimizer.step(Closure(partial(run, model)))
    knows = optimizer._registry.knows
    assert knows(Closure(partial(run, model)), "modules")
    assert not knows(Closure(partial(run, copy.deepcopy(model))), "modules")
    assert not knows(type("Other", (Closure,), {})(partial(run, model)), "modules")


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph")
@pytest.mark.parametrize("kind", [AdaHessian, Sophia])
def test_an_idle_closure_is_none_where_gradients_are_there(kind: Any) -> None:
    weights = []
    for idle in (None, lambda: None):
        torch.manual_seed(0)
        model, _ = problem()
        x = torch.randn(7, 3)
        optimizer = kind(model.parameters(), update_period=2)
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward(create_graph=optimizer.curvature_due)
            assert optimizer.step(idle) is None
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_closure_that_forgets_to_return_is_not_idle() -> None:
    model, run = problem()
    optimizer = AdaHessian(model.parameters(), update_period=2)
    with pytest.raises(TypeError, match="must return the loss, got NoneType"):
        optimizer.step(lambda: None)  # no gradients either
    run()
    with pytest.raises(TypeError, match="end it with `return loss`"):
        optimizer.step(lambda: (run(), None)[1])
    run()
    function = FunctionalObjective(lambda _: None, dict(model.named_parameters()))
    with pytest.raises(TypeError, match="NoneType"):
        optimizer.step(function)


@pytest.mark.parametrize("kind", [AdaHessian, partial(NewtonCG, curvature="hessian")])
def test_the_report_is_carried_by_copies(kind: Any) -> None:
    model, run = problem()
    optimizer = kind(model.parameters())
    assert optimizer.info is None
    optimizer.step(run)
    assert copy.deepcopy(optimizer).info == optimizer.info is not None
