"""Optimizers of parameters that the loss does not depend on say so, whichever way they look."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_secondorder import LBFGS, AdaHessian, Contractive, DatasetClosure, NewtonCG, Sophia

MAKERS: dict[str, Callable[..., Any]] = {
    "lbfgs": LBFGS,
    "newton": NewtonCG,
    "newton_hessian": partial(NewtonCG, curvature="hessian"),
    "newton_fisher": partial(NewtonCG, curvature="empirical_fisher"),
    "newton_differences": partial(
        NewtonCG, curvature="hessian", curvature_products="finite_difference"
    ),
    "adahessian": AdaHessian,
    "adahessian_rarely": partial(AdaHessian, update_period=10),
    "sophia": Sophia,
    "sophia_gnb": partial(Sophia, estimator="gnb", update_period=2),
}
X = torch.linspace(-1, 1, 15).view(5, 3)


class Model:
    """A model that is rebuilt after some steps, while the optimizer keeps the old parameters."""

    def __init__(self) -> None:
        self.now = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
        self.old = self.now

    def rebuild(self) -> None:
        self.now = nn.Sequential(nn.Linear(3, 2), nn.Tanh())

    def loss(self) -> Tensor:
        return nn.functional.mse_loss(self.now(X), torch.ones(5, 2))

    def own_loss(self) -> Tensor:
        return (self.now(X) ** 2).mean()


@pytest.mark.parametrize("good", [0, 2])
@pytest.mark.parametrize("way", ["backward", "returned", "dataset", "no zero_grad", "own loss"])
@pytest.mark.parametrize("name", MAKERS)
def test_no_gradient_reaches_them(name: str, way: str, good: int) -> None:
    model = Model()
    optimizer = MAKERS[name](model.old.parameters())

    def closure() -> Tensor:
        if way != "no zero_grad":
            optimizer.zero_grad()
        loss = (
            model.own_loss() if way == "own loss" and model.now is not model.old else model.loss()
        )
        if way != "returned":
            loss.backward()
        return loss

    def step() -> None:
        given: Any = closure
        if way == "dataset":
            given = DatasetClosure(model.now, nn.functional.mse_loss, [(X, torch.ones(5, 2))])
        optimizer.step(given)

    for _ in range(good):
        step()
    model.rebuild()
    before = [p.detach().clone() for p in model.old.parameters()]
    for _ in range(3):
        with pytest.raises(RuntimeError, match="no gradient reached any of the optimizer's"):
            step()
    assert all(map(torch.equal, before, model.old.parameters()))


@pytest.mark.parametrize("name", ["lbfgs", "newton_hessian", "adahessian", "sophia_gnb"])
def test_a_wrapped_optimizer_says_the_same(name: str) -> None:
    model = Model()
    optimizer = Contractive(MAKERS[name](model.old.parameters()), model.old, weight=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.no_grad():
            model.old(X)
        loss = model.loss()
        loss.backward()
        return loss

    optimizer.step(closure)
    model.rebuild()
    with pytest.raises(RuntimeError, match=r"no gradient reached|was not called with gradients"):
        optimizer.step(closure)


def test_curvature_closures_and_loops_without_one() -> None:
    model = Model()
    newton = NewtonCG(model.old.parameters())
    other = Model()
    with pytest.raises(RuntimeError, match="no gradient reached any of the optimizer's"):
        newton.step(model.loss, curvature_closure=other.loss)
    for make in (AdaHessian, partial(Sophia, estimator="gnb")):
        optimizer = make(model.old.parameters())
        optimizer.zero_grad()
        with optimizer.watching():
            other.loss().backward()
        with pytest.raises(RuntimeError, match="no gradient reached any of the optimizer's"):
            optimizer.step()


def trained(*, beside: bool) -> list[Tensor]:
    torch.manual_seed(0)
    model, other = Model(), Model()
    optimizer = Sophia(model.old.parameters(), lr=0.1, estimator="gnb", update_period=1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        if beside:
            other.own_loss().backward()
        loss = model.loss()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    return [p.detach() for p in model.old.parameters()]


def test_a_loss_of_others_adds_nothing() -> None:
    """Closures may train another model beside, as adversarial ones do."""
    assert all(map(torch.equal, trained(beside=True), trained(beside=False)))
