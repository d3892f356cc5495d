"""Certificates of what optimizers have found, with the constraints and multipliers they keep."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.constrained_problems import CONSTRAINED_PROBLEMS, ConstrainedProblem
from torch_secondorder import (
    BFGS,
    LBFGS,
    AdaHessian,
    Constrained,
    Contractive,
    FunctionalObjective,
    NewtonCG,
    Projected,
    kkt_residuals,
)
from torch_secondorder.constraints import UnitNorm


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def nearest(optimizer: Any, x: Tensor) -> Any:
    """A closure for the distance to (1.2, 1.6)."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (x - torch.tensor([1.2, 1.6])).square().sum()
        loss.backward()
        return loss

    return closure


def on_the_ball(x: Tensor, inner: Any = None, **options: Any) -> Constrained:
    optimizer = LBFGS([x]) if inner is None else inner
    return Constrained(optimizer, inequalities={"ball": lambda: x.square().sum() - 1}, **options)


@pytest.mark.parametrize("problem", CONSTRAINED_PROBLEMS, ids=lambda p: p.name)
def test_what_sequential_quadratic_programming_finds_is_certified(
    problem: ConstrainedProblem,
) -> None:
    x = problem.start.clone().requires_grad_()
    constraints: dict[str, Any] = {}
    if problem.equalities is not None:
        constraints["equalities"] = lambda: problem.equalities(x)  # type: ignore[misc]
    if len(problem.all_inequalities(x)):
        constraints["inequalities"] = lambda: problem.all_inequalities(x)
    optimizer = Constrained(LBFGS([x], max_iter=200), **constraints)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.function(x)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    kept = optimizer.kkt_residuals(closure)
    assert not kept.estimated and kept.satisfied(1e-6), kept
    estimated = kkt_residuals(closure, [x], **constraints, second_order=True)
    assert estimated.satisfied(1e-6) and estimated.verdict in ("minimum", "undecided"), estimated


@pytest.mark.parametrize(
    ("inner", "method"),
    [
        (LBFGS, "sqp"),
        (BFGS, "sqp"),
        (LBFGS, "augmented_lagrangian"),
        (NewtonCG, "augmented_lagrangian"),
    ],
)
def test_an_optimizer_brings_its_constraints_and_multipliers(inner: Any, method: Any) -> None:
    x = tensor(0.0, 0.1)
    optimizer = on_the_ball(x, inner([x]), method=method)
    closure = nearest(optimizer, x)
    assert optimizer.kkt_residuals(closure).estimated  # before the first step
    for _ in range(20):
        optimizer.step(closure)
    report = optimizer.kkt_residuals(closure, second_order=True)
    assert not report.estimated and report.satisfied(1e-6) and report.verdict == "minimum"
    assert report.multipliers["ball"].item() == pytest.approx(1.0, abs=1e-6)
    assert str(report) == str(kkt_residuals(closure, optimizer, second_order=True))
    # What is given here comes first.
    other = kkt_residuals(closure, optimizer, multipliers={"ball": 2.0})
    assert other.worst == "stationarity" and not other.estimated
    none = kkt_residuals(closure, optimizer, {"axis": lambda: x[0] - 0.6}, multipliers=None)
    assert list(none.multipliers) == ["axis"] and none.estimated


def test_beside_a_function() -> None:
    x = tensor(0.0, 0.1)
    function = FunctionalObjective(
        lambda p: (p["x"] - torch.tensor([1.2, 1.6])).square().sum(), {"x": x}
    )
    optimizer = Constrained(LBFGS([x]), inequalities={"ball": lambda p: p["x"].square().sum() - 1})
    optimizer.step(function)
    assert optimizer.kkt_residuals(function).satisfied(1e-6)


def test_penalties_alone_have_estimated_multipliers() -> None:
    x = tensor(0.0, 0.1)
    optimizer = on_the_ball(x, method="penalty", penalty=1e4)
    closure = nearest(optimizer, x)
    for _ in range(5):
        optimizer.step(closure)
    report = optimizer.kkt_residuals(closure)
    assert report.estimated and report.worst == "feasibility"
    assert report.multipliers["ball"].item() == pytest.approx(1.0, rel=1e-2)


def test_steps_go_on_as_if_nobody_had_looked() -> None:
    ends = []
    for looks in (False, True):
        x = tensor(0.0, 0.1)
        optimizer = on_the_ball(x, NewtonCG([x], max_iter=2))
        closure = nearest(optimizer, x)
        for _ in range(4):
            optimizer.step(closure)
            if looks:
                optimizer.kkt_residuals(closure, second_order=True)
        ends.append((x.detach().clone(), optimizer.state_dict()["constrained"]))
    assert torch.equal(ends[0][0], ends[1][0])
    assert str(ends[0][1]) == str(ends[1][1])


def test_an_optimizer_without_constraints_brings_its_options() -> None:
    x = tensor(1.0, 2.0)
    optimizer = LBFGS([x], weight_decay=0.5, bounds=(None, 2.0), maximize=True)
    report = kkt_residuals(lambda: x.sum(), optimizer)
    assert report.loss == -3 + 0.25 * 5 and report.bound_multipliers
    assert report.stationarity == 0.5 and report.where["stationarity"] == "parameter 0[0]"
    # Weight decay that shrinks parameters is no part of the loss.
    assert kkt_residuals(lambda: x.sum(), AdaHessian([x], weight_decay=3.0)).stationarity == 1.0
    inside = Constrained(AdaHessian([x], weight_decay=3.0), equalities=lambda: x.sum() - 3)
    assert inside.kkt_residuals(lambda: x.sum()).largest < 1e-12
    coupled = kkt_residuals(lambda: x.sum(), inside, weight_decay=1.0)
    assert coupled.stationarity == pytest.approx(0.5)


def test_constraints_are_found_behind_other_wrappers() -> None:
    encoder = torch.nn.Linear(2, 2, bias=False).double()
    weight = encoder.weight
    inside = Constrained(LBFGS([weight]), equalities={"sum": lambda: weight.sum()})
    optimizer = Contractive(inside, encoder, 0.1)
    report = kkt_residuals(lambda: weight.square().sum(), optimizer)
    assert list(report.multipliers) == ["sum"]


def test_what_cannot_be_certified_is_refused() -> None:
    x = tensor(0.6, 0.8)
    sets = Constrained(Projected(LBFGS([x]), {x: UnitNorm()}), equalities=lambda: x[0] - x[1])
    with pytest.raises(ValueError, match="keeps parameters in sets"):
        sets.kkt_residuals(lambda: x.sum())
    twice = on_the_ball(x, Constrained(LBFGS([x]), equalities=lambda: x[0], method="penalty"))
    with pytest.raises(ValueError, match="a Constrained inside another one"):
        twice.kkt_residuals(lambda: x.sum())
    assert math.isfinite(kkt_residuals(lambda: x.sum(), [x], lambda: x.norm() - 1).largest)
