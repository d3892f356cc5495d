"""Equalities that are samples of a smooth function, such as a network along a boundary."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_secondorder import BFGS, LBFGS, Constrained
from torch_secondorder._optim.sequential_line import ConstrainedLine

OPTIMIZERS = {"lbfgs": LBFGS, "bfgs": BFGS}


class Curve:
    """A network on `[-1, 1]`, fitted to a sine, with its values given along the left half."""

    def __init__(self, n_samples: int = 30) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(
            *(nn.Linear(1, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 1))
        ).double()
        self.x = torch.linspace(-1, 1, 50, dtype=torch.float64)[:, None]
        self.left = torch.linspace(-1, 0, n_samples, dtype=torch.float64)[:, None]
        self.evaluations = 0

    def boundary(self) -> Tensor:
        return self.net(self.left)[:, 0]

    def closure(self, optimizer: torch.optim.Optimizer) -> Any:
        def closure() -> Tensor:
            self.evaluations += 1
            optimizer.zero_grad()
            error = self.net(self.x) - torch.sin(math.pi * self.x).clamp(min=0)
            loss = error.square().mean()
            loss.backward()
            return loss

        return closure


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_samples_get_the_augmented_lagrangian(kind: str) -> None:
    curve = Curve()
    optimizer = Constrained(OPTIMIZERS[kind](curve.net.parameters()), {"left": curve.boundary})
    assert optimizer.method == "sqp"
    closure = curve.closure(optimizer)
    start = curve.boundary().abs().max().item()
    for i in range(60):
        optimizer.step(closure)
        if i == 0:
            assert optimizer.info is not None and optimizer.info.inner is not None
            assert optimizer.method == "augmented_lagrangian"
            assert "augmented_lagrangian" in repr(optimizer)
            # One evaluation has shown it.
            assert curve.evaluations == optimizer.info.inner.evaluations + 1
            assert bool((optimizer.penalties["left"] == 10).all())
    assert curve.boundary().abs().max() < 0.02 * start
    assert closure().item() < 1e-3


def test_what_was_set_before_survives() -> None:
    curve = Curve()
    optimizer = Constrained(LBFGS(curve.net.parameters(), max_iter=1), {"left": curve.boundary})
    optimizer.multipliers = {"left": 0.25}
    optimizer.penalties = {"left": 3.0}
    optimizer.step(curve.closure(optimizer))
    assert optimizer.method == "augmented_lagrangian"
    assert bool((optimizer.multipliers["left"] == 0.25).all())
    assert bool((optimizer.penalties["left"] == 3.0).all())


def test_few_samples_and_independent_constraints_stay() -> None:
    curve = Curve(5)
    optimizer = Constrained(LBFGS(curve.net.parameters()), {"left": curve.boundary})
    optimizer.step(curve.closure(optimizer))
    assert optimizer.method == "sqp"
    x = torch.ones(30, dtype=torch.float64, requires_grad=True)
    other = Constrained(LBFGS([x]), {"all": lambda: x[:20] - torch.arange(20)})

    def closure() -> Tensor:
        other.zero_grad()
        loss = x.square().sum()
        loss.backward()
        return loss

    for _ in range(5):
        other.step(closure)
    assert other.method == "sqp" and other.info is not None and other.info.feasible
    torch.testing.assert_close(x.detach()[:20], torch.arange(20, dtype=torch.float64))


def test_samples_of_inequalities_stay() -> None:
    curve = Curve()
    optimizer = Constrained(LBFGS(curve.net.parameters()), inequalities={"left": curve.boundary})
    for _ in range(3):
        optimizer.step(curve.closure(optimizer))
    assert optimizer.method == "sqp"


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_method_that_was_asked_for_stays_and_does_not_crash(kind: str) -> None:
    curve = Curve()
    inside = OPTIMIZERS[kind](curve.net.parameters(), max_iter=50)
    optimizer = Constrained(inside, {"left": curve.boundary}, method="sqp")
    closure = curve.closure(optimizer)
    for _ in range(6):
        optimizer.step(closure)
    assert optimizer.method == "sqp"
    assert all(bool(p.isfinite().all()) for p in curve.net.parameters())


def test_training_goes_on_bit_for_bit() -> None:
    curve, resumed = Curve(), Curve()
    optimizer = Constrained(LBFGS(curve.net.parameters()), {"left": curve.boundary})
    for _ in range(4):
        optimizer.step(curve.closure(optimizer))
    fresh = Constrained(LBFGS(resumed.net.parameters()), {"left": resumed.boundary})
    resumed.net.load_state_dict(curve.net.state_dict())
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.method == "augmented_lagrangian"
    for _ in range(4):
        optimizer.step(curve.closure(optimizer))
        fresh.step(resumed.closure(fresh))
    assert all(
        torch.equal(p, q)
        for p, q in zip(curve.net.parameters(), resumed.net.parameters(), strict=True)
    )


@pytest.mark.parametrize("multiplier", [1.0, 1e20])
def test_a_merit_function_of_rounding_alone(multiplier: float) -> None:
    """Line searches take precisions below one only."""
    one = torch.ones(1, dtype=torch.float64)
    line = SimpleNamespace(
        _owner=SimpleNamespace(
            here=SimpleNamespace(values=one, lengths=one), inequality=torch.zeros(1).bool()
        ),
        _merit=SimpleNamespace(penalties=one),
        _descent=SimpleNamespace(
            objective=SimpleNamespace(vector=SimpleNamespace(precision=1e-16), position=one)
        ),
        _step=SimpleNamespace(multipliers=multiplier * one),
        start=SimpleNamespace(loss=1.0),
    )
    precision = ConstrainedLine.precision.fget(line)  # type: ignore[attr-defined]
    assert 0 < precision < 1 and (precision < 1e-15) == (multiplier == 1.0)
