"""Wrappers that add a term to the loss of any optimizer: the seat for new ones."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam
from torch.optim.optimizer import register_optimizer_step_post_hook

from torch_secondorder import LBFGS, AdaHessian, FunctionalObjective, NewtonCG
from torch_secondorder._autograd import backward_hook
from torch_secondorder._optim.wrapper import WrapperOptimizer


class SumValues:
    """The squared distance of the parameters' sum from a target, once for each evaluation."""

    def __init__(self, params: list[Tensor], target: float) -> None:
        self.taken: list[Tensor] = []
        self._params, self._target = params, target

    def take(self) -> Tensor | None:
        if self.taken:
            return None
        value = (sum(p.sum() for p in self._params) - self._target) ** 2
        self.taken.append(value.detach())
        return value


class SumTerm:
    def __init__(self, params: list[Tensor], target: float) -> None:
        self.params, self.target = params, target

    @contextmanager
    def watching(self, seed: int, tree: Any = None) -> Iterator[SumValues]:
        yield SumValues(self.params if tree is None else [tree], self.target)

    def missing(self) -> RuntimeError:
        return RuntimeError("the term has no value")


class SumPenalty(WrapperOptimizer):
    """Draws the sum of all parameters to a target, a soft constraint."""

    _entry = "sum"
    _saved: ClassVar = {"strength": "strength", **WrapperOptimizer._saved}
    _carried = (*WrapperOptimizer._carried, "strength", "term")

    def __init__(self, optimizer: Any, strength: float, target: float) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self.strength = strength
        self.term = SumTerm(params, target)
        super().__init__(optimizer, self.term)

    def _factor(self) -> float:
        return self.strength

    def _present_term(self) -> Tensor:
        with self.term.watching(0) as values:
            return values.take()


INNER = {
    "sgd": lambda params: SGD(params, lr=0.01),
    "adam": lambda params: Adam(params, lr=0.1),
    "lbfgs": lambda params: LBFGS(params),
    "newton": lambda params: NewtonCG(params),
    "adahessian": lambda params: AdaHessian(params),
}
TARGET = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def parameter() -> Tensor:
    return torch.tensor([0.3, 0.1, -0.2], dtype=torch.float64, requires_grad=True)


def loss_of(x: Tensor) -> Tensor:
    return ((x - TARGET) ** 2).sum() + (x**4).sum()


def penalized(x: Tensor) -> Tensor:
    return loss_of(x) + 3.0 * (x.sum() - 1.0) ** 2


def step(optimizer: Any, x: Tensor, loss: Any, how: str) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(x)
        if how != "closure without backward":
            value.backward()
        return value

    if how == "function":
        optimizer.step(FunctionalObjective(loss, x))
    elif how == "loop":
        closure()
        optimizer.step()
    else:
        optimizer.step(closure)


#: The optimizers that each way suits. A loop adds the gradient of the term, not its curvature.
WAYS = {
    "closure": list(INNER),
    "closure without backward": ["lbfgs", "newton", "adahessian"],
    "function": ["lbfgs", "newton", "adahessian"],
    "loop": ["sgd", "adam"],
}


@pytest.mark.parametrize(("how", "name"), [(how, n) for how, names in WAYS.items() for n in names])
def test_the_term_is_part_of_the_loss_however_it_is_given(name: str, how: str) -> None:
    x, y = parameter(), parameter()
    optimizer, expected = SumPenalty(INNER[name]([x]), 3.0, 1.0), INNER[name]([y])
    for _ in range(5):
        step(optimizer, x, loss_of, how)
        step(expected, y, penalized, how)
    assert not torch.equal(x, parameter())
    torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


def test_checkpoints_and_copies_carry_the_declared_attributes() -> None:
    x = parameter()
    optimizer = SumPenalty(Adam([x]), 3.0, 1.0)
    loss_of(x).backward()
    optimizer.step()
    state = optimizer.state_dict()
    assert state["sum"] == {"strength": 3.0, "seed": 0, "steps": 1}
    other = SumPenalty(Adam([parameter()]), 1.0, 1.0)
    other.load_state_dict(state)
    assert (other.strength, other._steps) == (3.0, 1)
    assert copy.deepcopy(optimizer).strength == 3.0


def test_a_step_without_a_closure_and_without_gradients_is_that_of_the_optimizer_inside() -> None:
    x = parameter()
    SumPenalty(Adam([x], lr=0.1), 1.5, 1.0).step()
    assert torch.equal(x, parameter())
    with pytest.raises(RuntimeError, match="no gradient reached"):
        SumPenalty(AdaHessian([x]), 1.5, 1.0).step()
    assert torch.equal(x, parameter())


def test_profilers_and_hooks_see_its_steps() -> None:
    x = torch.ones(2, requires_grad=True)
    optimizer = SumPenalty(SGD([x], lr=0.1), 0.5, 0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = x.square().sum()
        loss.backward()
        return loss

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step(closure)
    names = {event.key for event in profile.key_averages()}
    assert {"Optimizer.step#SumPenalty.step", "Optimizer.step#SGD.step"} <= names
    seen: list[Any] = []
    everywhere = register_optimizer_step_post_hook(lambda who, *_: seen.append(type(who)))
    optimizer.step(closure)
    everywhere.remove()
    assert seen == [SGD, SumPenalty]
    optimizer.register_step_pre_hook(lambda who, *_: seen.append("before"))
    optimizer.step(closure)
    assert seen == [SGD, SumPenalty, "before"]


def test_backward_stays_replaced_from_its_first_closure_until_it_dies() -> None:
    x = torch.ones(2, requires_grad=True)
    gc.collect()
    users, seen = backward_hook._method._users, []
    optimizer = SumPenalty(SGD([x], lr=0.1), 0.5, 0.0)
    assert backward_hook._method._users == users

    def closure() -> Tensor:
        x.grad = None
        seen.append(Tensor.backward)
        loss = x.square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
        assert Tensor.backward is seen[0]
    copied = copy.deepcopy(optimizer)
    copied.step(closure)
    assert backward_hook._method._users == users + 2 and len(set(seen)) == 1
    del optimizer, copied
    gc.collect()
    assert backward_hook._method._users == users
