"""`Constrained` finds optimum and multipliers, by the rules of the method of multipliers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.constrained_problems import CONSTRAINED_BY_NAME, ConstrainedProblem
from torch_secondorder import (
    BFGS,
    LBFGS,
    AdaHessian,
    Constrained,
    LevenbergMarquardt,
    Newton,
    NewtonCG,
    NonlinearCG,
)
from torch_secondorder.constraints._lagrangian import (
    Signs,
    augmented,
    inverses,
    is_slow,
    next_multipliers,
    shortfalls,
)

ITERATING: dict[str, Callable[..., Any]] = {
    "lbfgs": LBFGS,
    "bfgs": BFGS,
    "nonlinear_cg": partial(NonlinearCG, max_iter=50),
    "newton": Newton,
    "newton_cg": NewtonCG,
    "torch_lbfgs": partial(
        torch.optim.LBFGS, line_search_fn="strong_wolfe", tolerance_change=1e-15
    ),
}
SINGLE: dict[str, Callable[..., Any]] = {
    "sgd": partial(torch.optim.SGD, lr=0.03),
    "adam": partial(torch.optim.Adam, lr=0.03),
    "adahessian": partial(AdaHessian, lr=0.1),
}
#: The point of the unit disk on the line x0 = 2 x1 that is nearest to (2, 2), and its multipliers.
NEAREST = (2 / math.sqrt(5), 1 / math.sqrt(5))
MULTIPLIERS = {"line": -0.8, "disk": 3 / math.sqrt(5) * 2 - 1}


def nearest(make: Callable[..., Any], device: Any = "cpu", **more: Any) -> tuple[Any, Any, Tensor]:
    """The optimizer, the closure and the parameter of the problem of the nearest point."""
    x = torch.zeros(2, dtype=torch.float64, device=device, requires_grad=True)
    target = torch.tensor([2.0, 2.0], dtype=torch.float64, device=device)
    more = {"method": "augmented_lagrangian"} | more
    optimizer = Constrained(
        make([x]), {"line": lambda: x[0] - 2 * x[1]}, {"disk": lambda: x @ x - 1}, **more
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (x - target).square().sum()
        loss.backward()
        return loss

    return optimizer, closure, x


@pytest.mark.parametrize("name", ITERATING)
def test_iterating_optimizers_reach_the_optimum(name: str, device: torch.device) -> None:
    optimizer, closure, x = nearest(ITERATING[name], device)
    for _ in range(40):
        optimizer.step(closure)
    torch.testing.assert_close(x.tolist(), list(NEAREST), rtol=1e-7, atol=0.0)
    for key, value in optimizer.multipliers.items():
        torch.testing.assert_close(value.item(), _multiplier(key), rtol=1e-6, atol=0.0)
    info = optimizer.info
    assert info.feasible and info.violation < 1e-8 and not info.note
    assert info.multiplier == max(abs(v.item()) for v in optimizer.multipliers.values())


def _multiplier(key: str) -> float:
    """From the conditions of Karush, Kuhn and Tucker at `NEAREST`, by a 2 x 2 system."""
    x = torch.tensor(NEAREST, dtype=torch.float64)
    J = torch.stack([torch.tensor([1.0, -2.0], dtype=torch.float64), 2 * x])
    y = torch.linalg.solve(J.T, -2 * (x - 2))
    return {"line": y[0].item(), "disk": y[1].item()}[key]


@pytest.mark.parametrize("name", SINGLE)
def test_single_evaluations_reach_the_optimum(name: str) -> None:
    optimizer, closure, x = nearest(SINGLE[name], penalty=2.0, multiplier_lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 250, 0.1)
    for _ in range(750):
        optimizer.step(closure)
        schedule.step()
    torch.testing.assert_close(x.tolist(), list(NEAREST), rtol=0.0, atol=1e-2)
    for key, value in optimizer.multipliers.items():
        assert value.item() == pytest.approx(_multiplier(key), abs=5e-2)


SEVERAL = ["hs6", "hs10", "hs14", "hs27", "hs35", "hs39", "hs43", "hs65", "hs71", "hs78", "hs93"]


@pytest.mark.parametrize("make", [LBFGS, NewtonCG], ids=["lbfgs", "newton_cg"])
@pytest.mark.parametrize("name", SEVERAL)
def test_hock_schittkowski(name: str, make: Callable[..., Any]) -> None:
    problem: ConstrainedProblem = CONSTRAINED_BY_NAME[name]
    x = problem.start.clone().requires_grad_()
    h, g = problem.all_equalities, problem.all_inequalities
    optimizer = Constrained(
        make([x]),
        (lambda: h(x)) if h(x).numel() else None,
        (lambda: g(x)) if g(x).numel() else None,
        "augmented_lagrangian",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.function(x)
        loss.backward()
        return loss

    for _ in range(300):
        optimizer.step(closure)
        if optimizer.info.violation < 1e-9:
            values = optimizer._program.functions()
            lagrangian = problem.function(x) + optimizer._program.multipliers @ values
            (grad,) = torch.autograd.grad(lagrangian, x)
            if grad.abs().max() < 1e-7:
                break
    with torch.no_grad():
        error = abs(problem.function(x) - problem.minimum) / max(1.0, abs(problem.minimum))
    assert error < 1e-6 and optimizer.info.violation < 1e-8


def test_the_penalty_method_leaves_what_its_penalty_allows() -> None:
    optimizer, closure, _ = nearest(LBFGS, method="penalty", penalty=1.0, max_penalty=1e4)
    seen = []
    for _ in range(12):
        optimizer.step(closure)
        seen.append(optimizer.info.penalty)
    assert seen[-1] == 1e4 and sorted(seen) == seen
    assert all(not y.any() for y in optimizer.multipliers.values())
    # The violation of a quadratic penalty is the multiplier by the penalty.
    expected = _multiplier("disk") / 1e4
    assert optimizer.violations["disk"].item() == pytest.approx(expected, rel=1e-2)


# The rules.


def test_the_augmented_lagrangian_is_that_of_the_book() -> None:
    torch.manual_seed(0)
    c = torch.randn(6, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([False, False, True, True, True, True])
    y = torch.randn(6, dtype=torch.float64)
    y[mask] = torch.tensor([0.0, 0.3, 2.0, 1.0], dtype=torch.float64)
    rho = torch.rand(6, dtype=torch.float64) * 3 + 0.1
    signs = Signs(mask, y)
    floor = signs.floor(y, inverses(rho))
    term = augmented(c, y, rho / 2, floor)
    shifted = torch.where(mask, (y + rho * c).clamp(min=0), y + rho * c)
    book = torch.where(
        mask, (shifted.square() - y.square()) / (2 * rho), y * c + rho / 2 * c.square()
    )
    torch.testing.assert_close(term, book.sum())
    (derivative,) = torch.autograd.grad(term, c)
    torch.testing.assert_close(derivative, shifted)
    torch.testing.assert_close(next_multipliers(c.detach(), y, rho, signs), shifted.detach())
    # What the multipliers change by, in units of the penalties.
    torch.testing.assert_close(shortfalls(c, floor) * rho, (shifted - y).abs())


def test_without_penalty_it_is_the_lagrangian() -> None:
    y, c = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, -3.0])
    signs = Signs(torch.tensor([True, True]), y)
    zero = torch.zeros(2)
    floor = signs.floor(y, inverses(zero))
    assert augmented(c, y, zero, floor).item() == -6.0
    assert augmented(-c, y, zero, floor).item() == 6.0


def test_each_penalty_rises_by_itself() -> None:
    before, now = torch.tensor([1.0, 1.0, 1e-9]), torch.tensor([0.2, 0.3, 1e-9])
    assert is_slow(now, before, 1e-8).tolist() == [False, True, False]


def test_multipliers_move_only_at_the_solution_of_a_subproblem() -> None:
    optimizer, closure, _ = nearest(partial(LBFGS, max_iter=1))
    optimizer.step(closure)
    assert not optimizer.multipliers["disk"].any()
    for _ in range(20):
        optimizer.step(closure)
    assert optimizer.multipliers["disk"].item() > 0.1


def test_multipliers_move_after_many_iterations_at_last() -> None:
    """The gradient of a loss with noise does not fall, and the multipliers have to move."""
    torch.manual_seed(0)
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = Constrained(
        LBFGS([x], max_iter=5, tolerance_change=0.0),
        lambda: x.sum() - 1,
        None,
        "augmented_lagrangian",
    )

    def step() -> None:
        noise = 10 * torch.randn(3, dtype=torch.float64)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (x.square().square() + noise * x).sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    for _ in range(40):
        step()
    assert optimizer.multipliers["equalities"].item() != 0


def test_a_rate_takes_the_place_of_the_method_of_multipliers() -> None:
    optimizer, closure, _ = nearest(partial(LBFGS, max_iter=1), multiplier_lr=0.5)
    before = optimizer._program
    optimizer.step(closure)
    values = optimizer._program.values
    assert before is optimizer._program and values is not None
    expected = (0.5 * values).tolist()
    expected[1] = max(0.0, expected[1])
    found = [optimizer.multipliers[key].item() for key in ("line", "disk")]
    assert found == pytest.approx(expected)


def test_an_augmented_lagrangian_without_minimum_is_begun_again() -> None:
    x = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    optimizer = Constrained(
        LBFGS([x], max_iter=200), None, lambda: x - 1, "augmented_lagrangian", penalty=0.01
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -x.square().sum() - x.square().sum() * x.clamp(max=50).square().sum() / 500
        loss.backward()
        return loss

    notes = []
    for _ in range(30):
        optimizer.step(closure)
        notes.append(optimizer.info.note)
    assert any("fell without end" in note for note in notes)
    assert x.item() == pytest.approx(1.0, abs=1e-6) and optimizer.info.penalty > 0.01


def test_maximize(device: torch.device) -> None:
    x = torch.zeros(2, dtype=torch.float64, device=device, requires_grad=True)
    optimizer = Constrained(
        LBFGS([x], maximize=True), None, lambda: x @ x - 1, "augmented_lagrangian"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = x.sum()
        loss.backward()
        return loss

    for _ in range(25):
        optimizer.step(closure)
    torch.testing.assert_close(x.tolist(), [math.sqrt(0.5)] * 2, rtol=1e-6, atol=0.0)
    assert optimizer.multipliers["inequalities"].item() == pytest.approx(math.sqrt(0.5), rel=1e-5)


def test_levenberg_marquardt_takes_the_term_as_a_residual_or_says_why_not() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1).double()
    inputs, targets = torch.randn(20, 3).double(), torch.randn(20, 1).double()
    optimizer = Constrained(
        LevenbergMarquardt(model.parameters()), {"sum": lambda: model.weight.sum() - 1}
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        return loss

    for _ in range(30):
        optimizer.step(closure)
    with torch.no_grad():
        A = torch.cat([inputs, torch.ones(20, 1).double()], 1)
        K = torch.zeros(5, 5).double()
        K[:4, :4] = 2 * A.T @ A / 20
        K[4, :3] = K[:3, 4] = 1
        rhs = torch.cat([2 * A.T @ targets[:, 0] / 20, torch.ones(1).double()])
        expected = torch.linalg.solve(K, rhs)
    torch.testing.assert_close(model.weight[0], expected[:3], rtol=1e-6, atol=1e-8)
    assert optimizer.multipliers["sum"].item() == pytest.approx(expected[4].item(), rel=1e-5)


def test_the_default_method() -> None:
    x = torch.zeros(2, requires_grad=True)
    for make, takes in ((NewtonCG, False), (torch.optim.Adam, False)):
        method = Constrained(make([x]), lambda: x.sum()).method
        assert (method == "sqp") is takes
    able = getattr(LBFGS, "_takes_constraints", False)
    assert (Constrained(LBFGS([x]), lambda: x.sum()).method == "sqp") is able


def test_pairs_of_torch_lbfgs_belong_to_one_augmented_lagrangian() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, dtype=torch.float64, generator=generator)
    hessian = root @ root.T + torch.eye(5, dtype=torch.float64)
    rows = torch.randn(2, 5, dtype=torch.float64, generator=generator)
    x = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    inner = torch.optim.LBFGS([x], line_search_fn="strong_wolfe", max_iter=10)
    optimizer = Constrained(inner, lambda: rows @ x - 1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = x @ hessian @ x / 2 - x.sum()
        loss.backward()
        return loss

    updates = 0
    for _ in range(8):
        before = optimizer.multipliers, optimizer.penalties
        optimizer.step(closure)
        updates += bool(before[0]) and not torch.equal(
            before[0]["equalities"], optimizer.multipliers["equalities"]
        )
        penalties = before[1]["equalities"] if before[1] else torch.full((2,), 10.0)
        whole = hessian + rows.T @ (penalties.double()[:, None] * rows)
        state = inner.state[x]
        for difference, step in zip(state["old_dirs"], state["old_stps"], strict=True):
            torch.testing.assert_close(difference, whole @ step, rtol=1e-6, atol=1e-9)
    assert updates > 2


def test_torch_lbfgs_goes_on_after_an_error_in_a_constraint() -> None:
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    inner = torch.optim.LBFGS([x], line_search_fn="strong_wolfe")
    calls = 0

    def disk() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyError("gone")
        return x @ x - 1

    optimizer = Constrained(inner, inequalities=disk)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (x - torch.tensor([2.0, 1.0], dtype=torch.float64)).square().sum()
        loss.backward()
        return loss

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert x.tolist() == [0.0, 0.0]
    for _ in range(20):
        optimizer.step(closure)
    torch.testing.assert_close(x.tolist(), list(NEAREST), rtol=1e-6, atol=0.0)
