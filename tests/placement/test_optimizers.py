"""Optimizers on a device: no tensor of the host meets one of the device, and steps are the same."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_secondorder
from tests.support.placement import Problem, TwoDevices, assert_same
from torch_secondorder import (
    BFGS,
    KFAC,
    LBFGS,
    SOAP,
    AdaHessian,
    AdaSecant,
    Constrained,
    Contractive,
    LevenbergMarquardt,
    Newton,
    NewtonCG,
    NonlinearCG,
    Projected,
    SecondOrderOptimizer,
    Shampoo,
    Sophia,
)
from torch_secondorder._optim.flat import FlatOptimizer
from torch_secondorder.constraints import Box, NormBall, Orthogonal, Simplex, UnitNorm
from torch_secondorder.curvature import GaussNewtonBartlett, Hutchinson
from torch_secondorder.solvers import Nystrom, dense

SHORT = {"max_iter": 3}
# Two of every kind at least: what a step does depends on its options.
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LBFGS": (LBFGS, SHORT),
    "LBFGS, weight decay": (LBFGS, {**SHORT, "weight_decay": 0.1, "history_size": 3}),
    "LBFGS, damping": (LBFGS, {**SHORT, "powell_damping": True, "line_search_fn": "hager_zhang"}),
    "LBFGS without a search": (LBFGS, {**SHORT, "line_search_fn": None, "lr": 0.3}),
    "LBFGS, ssbroyden": (LBFGS, {**SHORT, "update": "ssbroyden", "history_size": 20}),
    "LBFGS, bounds": (LBFGS, {**SHORT, "bounds": (-0.3, 0.3)}),
    "LBFGS, ssbroyden, bounds": (LBFGS, {**SHORT, "update": "ssbroyden", "bounds": (-0.3, 0.3)}),
    "BFGS": (BFGS, SHORT),
    "BFGS, bounds": (BFGS, {**SHORT, "bounds": (-0.3, 0.3)}),
    "BFGS, ssbroyden": (BFGS, {**SHORT, "update": "ssbroyden"}),
    "NonlinearCG": (NonlinearCG, SHORT),
    "NonlinearCG, beta": (NonlinearCG, {**SHORT, "beta": "polak_ribiere"}),
    "NonlinearCG, preconditioner": (NonlinearCG, {**SHORT, "preconditioner": lambda v: 0.5 * v}),
    "NewtonCG": (NewtonCG, {"max_iter": 1}),
    "NewtonCG, Hessian": (NewtonCG, {"max_iter": 1, "curvature": "hessian"}),
    "NewtonCG, line search": (NewtonCG, {"max_iter": 1, "globalization": "line_search"}),
    "NewtonCG, trust region": (NewtonCG, {"max_iter": 1, "globalization": "trust_region"}),
    "NewtonCG, MINRES": (
        NewtonCG,
        {"max_iter": 1, "curvature": "hessian", "solver": "minres", "globalization": "line_search"},
    ),
    "NewtonCG, Martens": (NewtonCG, {"max_iter": 1, "preconditioner": "martens"}),
    "NewtonCG, Nystrom": (NewtonCG, {"max_iter": 1, "preconditioner": Nystrom(10)}),
    "NewtonCG, KFAC": (NewtonCG, {"max_iter": 1, "preconditioner": "kfac"}),
    "Newton": (Newton, {"max_iter": 1}),
    "Newton, line search": (Newton, {"max_iter": 1, "globalization": "line_search"}),
    "Newton, damping": (Newton, {"max_iter": 1, "globalization": "damping"}),
    "Newton, bounds": (Newton, {"max_iter": 1, "bounds": (-0.3, 0.3)}),
    "LevenbergMarquardt": (LevenbergMarquardt, {"max_iter": 2}),
    "LevenbergMarquardt, trust region": (
        LevenbergMarquardt,
        {"max_iter": 2, "globalization": "trust_region"},
    ),
    "LevenbergMarquardt, geodesic": (LevenbergMarquardt, {"acceleration": "geodesic"}),
    "LevenbergMarquardt, mini-batches": (
        LevenbergMarquardt,
        {"lr": 0.1, "momentum": 0.9, "max_norm": 0.5, "globalization": None},
    ),
    "LevenbergMarquardt, bounds": (LevenbergMarquardt, {"max_iter": 2, "bounds": (-0.3, 0.3)}),
    "AdaSecant": (AdaSecant, {}),
    "AdaHessian": (AdaHessian, {"update_period": 2, "weight_decay": 0.1}),
    "AdaHessian, labels": (AdaHessian, {"estimator": GaussNewtonBartlett(2)}),
    "AdaHessian, in parts": (AdaHessian, {"accumulation_steps": 2, "estimator": Hutchinson(2)}),
    "Sophia": (Sophia, {"lr": 0.01, "weight_decay": 0.1}),
    "Sophia, Hutchinson": (Sophia, {"lr": 0.01, "estimator": "hutchinson"}),
    "Sophia, gamma": (Sophia, {"lr": 0.01, "gamma": 1.0}),
    "SOAP": (SOAP, {"update_period": 2, "weight_decay": 0.1}),
    "SOAP, cut": (SOAP, {"update_period": 2, "block_size": 3, "max_precond_dim": 4}),
    "Shampoo": (Shampoo, {"update_period": 2, "weight_decay": 0.1}),
    "Shampoo, Newton": (Shampoo, {"root_method": "newton", "grafting": None, "block_size": 3}),
    "KFAC": (KFAC, {"update_period": 2, "weight_decay": 0.1}),
}


def is_optimizer(value: Any) -> bool:
    return (
        inspect.isclass(value)
        and issubclass(value, SecondOrderOptimizer)
        and value is not SecondOrderOptimizer
    )


def test_all_optimizers_are_here() -> None:
    public = [vars(torch_secondorder)[name] for name in torch_secondorder.__all__]
    exported = set(filter(is_optimizer, public))
    wrappers = {Constrained, Contractive, Projected}
    assert exported - wrappers == {kind for kind, _ in OPTIMIZERS.values()}


def trained(
    kind: Any, options: dict[str, Any], problem: Problem, params: Any = None
) -> tuple[Any, list[Any]]:
    """Some steps and one after a checkpoint; the optimizer, losses and parameters."""
    make: Callable[[], Any] = lambda: kind(params or problem.params, **options)  # noqa: E731
    optimizer, results = make(), []
    parts = options.get("accumulation_steps", 1)

    def closure() -> Tensor:
        problem.net.zero_grad()
        for _ in range(parts):
            loss = problem.loss()
            (loss / parts).backward()
        return loss

    last = 1 if issubclass(kind, FlatOptimizer) else 2
    for step in range(last + 1):
        if step == last:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = make()
            optimizer.load_state_dict(state)
        results.append(optimizer.step(closure))
        results.append(optimizer.info.grad_norm)
    return optimizer, [*results, *problem.params]


@pytest.fixture(autouse=True)
def _dense_as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Newton factorizes matrices on a device that it would diagonalize on the CPU."""
    monkeypatch.setattr(dense, "_SMALL", dense._SMALL_ON_DEVICE)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_stay_on_the_device(name: str) -> None:
    kind, options = OPTIMIZERS[name]

    def case(device: torch.device) -> list[Any]:
        optimizer, results = trained(kind, options, Problem(device))
        for state in optimizer.state.values():
            check_places(state, device)
        return results

    assert_same(case)


def check_places(value: Any, device: torch.device, name: str = "") -> None:
    """State lives with the parameters, but for small matrices and counts of the host."""
    if isinstance(value, Tensor):
        assert value.device == device or not value.dim() or "matrix" in name, name
    elif isinstance(value, dict):
        for key, part in value.items():
            check_places(part, device, f"{name}.{key}")


# One of each kind, and those with sums over all parameters of their own.
ON_TWO = [name for name in OPTIMIZERS if "," not in name]
ON_TWO += ["LBFGS, bounds", "LBFGS, ssbroyden", "NewtonCG, KFAC", "NewtonCG, Martens"]
ON_TWO += ["AdaHessian, labels", "SOAP, cut"]


@pytest.mark.parametrize("name", ON_TWO)
def test_parameters_on_two_devices(name: str) -> None:
    kind, options = OPTIMIZERS[name]
    assert_same(lambda device: trained(kind, options, TwoDevices(device))[1])


@pytest.mark.parametrize("name", ["LBFGS", "NewtonCG, Hessian", "LevenbergMarquardt", "SOAP"])
def test_groups_with_rates_of_their_own(name: str) -> None:
    """The scale of the flat vector, which such groups have, is on the device."""
    kind, options = OPTIMIZERS[name]

    def case(device: torch.device) -> list[Any]:
        problem = Problem(device)
        groups = [
            {"params": problem.params[:2], "lr": 0.5, "weight_decay": 0.01},
            {"params": problem.params[2:], "lr": 0.1},
        ]
        return trained(kind, options, problem, groups)[1]

    assert_same(case)


# Steps without a closure, and wrappers.

WITHOUT_CLOSURE = ["AdaHessian", "AdaHessian, labels", "Sophia", "SOAP", "Shampoo", "KFAC"]


@pytest.mark.parametrize("name", WITHOUT_CLOSURE)
def test_steps_without_a_closure(name: str) -> None:
    kind, options = OPTIMIZERS[name]

    def case(device: torch.device) -> list[Any]:
        problem = Problem(device, torch.bfloat16)
        optimizer = kind(problem.params, **options)
        for _ in range(3):
            optimizer.zero_grad()
            problem.loss().backward()
            nn.utils.clip_grad_norm_(problem.params, 0.5)
            optimizer.step()
        return [problem.params, optimizer.info.grad_norm]

    assert_same(case, 1e-2)


def wrapped(device: torch.device, wrap: Callable[[Problem], Any]) -> list[Any]:
    """Three steps of a wrapper and one after a checkpoint."""
    problem = Problem(device)
    optimizer = wrap(problem)
    losses = [optimizer.step(problem.closure()) for _ in range(2)]
    state = copy.deepcopy(optimizer.state_dict())
    optimizer = wrap(problem)
    optimizer.load_state_dict(state)
    losses.append(optimizer.step(problem.closure()))
    assert optimizer.info
    return [losses, problem.params]


INSIDE = {
    "LBFGS": lambda p: LBFGS(p, max_iter=3),
    "BFGS": lambda p: BFGS(p, max_iter=3),
    "NewtonCG": lambda p: NewtonCG(p, max_iter=1),
    "AdaHessian": lambda p: AdaHessian(p, lr=0.02),
    "SOAP": lambda p: SOAP(p, lr=0.02),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.02),
}


@pytest.mark.parametrize("name", INSIDE)
def test_contractive_stays_on_the_device(name: str) -> None:
    noise = 0.1 if name in ("BFGS", "Adam") else None

    def wrap(problem: Problem) -> Contractive:
        return Contractive(INSIDE[name](problem.params), problem.encoder, 0.1, noise=noise)

    assert_same(lambda device: wrapped(device, wrap))


@pytest.mark.parametrize("name", ["LBFGS", "BFGS", "AdaHessian", "Adam"])
@pytest.mark.parametrize("kind", ["equality", "both"])
def test_constrained_stays_on_the_device(name: str, kind: str) -> None:
    def wrap(problem: Problem) -> Constrained:
        first, last = problem.encoder[0].weight, problem.net[1].weight
        equalities = {"norm": lambda: first.square().sum() - 4}
        inequalities = {"rows": lambda: last.square().sum(1) - 0.5, "sum": lambda: first.sum()}
        options = {
            "equality": {"equalities": equalities},
            "both": {"equalities": equalities, "inequalities": inequalities},
        }
        return Constrained(INSIDE[name](problem.params), **options[kind])

    assert_same(lambda device: wrapped(device, wrap), 1e-5)


SETS = {
    "Box": Box(-0.2, 0.2),
    "NormBall": NormBall(0.5),
    "NormBall, rows": NormBall(0.5, 1, dim=1),
    "Orthogonal": Orthogonal(),
    "Simplex": Simplex(dim=1),
    "UnitNorm": UnitNorm(dim=1),
}


# Line searches stay on manifolds, and in boxes, which `bounds` are for.
PROJECTED = [("Adam", chosen) for chosen in SETS]
PROJECTED += [("LBFGS", "Orthogonal"), ("BFGS", "UnitNorm"), ("SOAP", "NormBall")]
PROJECTED += [("AdaHessian", "Orthogonal")]


@pytest.mark.parametrize(("name", "chosen"), PROJECTED)
def test_projected_stays_on_the_device(name: str, chosen: str) -> None:
    def wrap(problem: Problem) -> Projected:
        weight = problem.net[1].weight
        return Projected(INSIDE[name](problem.params), [(weight, SETS[chosen])])

    assert_same(lambda device: wrapped(device, wrap), 1e-5)
