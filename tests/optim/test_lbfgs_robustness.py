"""L-BFGS where things go wrong: numbers that are not finite, exceptions, memory."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support.closures import SEARCHES, rosenbrock, standard, start_at
from tests.support.oracles import make_case
from torch_secondorder import LBFGS, StepStatus

# Numbers that are not finite.


def spoiled(kind: str, loss: Tensor, x: Tensor) -> Tensor:
    """A closure's tail in which the loss, or only the gradient, is not finite."""
    if kind == "loss":
        loss = loss * math.nan
    if kind == "infinite loss":
        loss = loss + math.inf
    loss.backward()
    if kind == "gradient":
        x.grad[0] = math.nan
    if kind == "infinite gradient":
        x.grad[0] = -math.inf
    return loss


@pytest.mark.parametrize("kind", ["loss", "infinite loss", "gradient", "infinite gradient"])
@pytest.mark.parametrize("at", [0, 1, 6])
def test_a_step_that_starts_non_finite(kind: str, at: int, device: torch.device) -> None:
    x = start_at(-1.2, 1.0, device=device)
    optimizer = LBFGS([x], max_iter=2)
    bad = False

    def closure() -> Tensor:
        optimizer.zero_grad()
        return spoiled(kind if bad else "", rosenbrock(x), x)

    for _ in range(at):
        optimizer.step(closure)
    before, bad = x.detach().clone(), True
    optimizer.step(closure)
    assert torch.equal(x, before)
    info = optimizer.info
    assert (info.status, info.evaluations) == (StepStatus.NONFINITE_START, 1)
    assert "not finite" in info.history_reset
    bad = False
    optimizer.step(closure)
    assert not optimizer.info.history_reset
    assert optimizer.info.loss_after < optimizer.info.loss
    optimizer.param_groups[0].update(max_iter=200, max_eval=400)
    optimizer.step(closure)
    torch.testing.assert_close(x.detach(), torch.ones_like(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["loss", "infinite loss", "gradient", "infinite gradient"])
@pytest.mark.parametrize("search", [*SEARCHES, None])
def test_trials_beyond_a_wall(search: str | None, kind: str, device: torch.device) -> None:
    """The minimum, at 0.001, lies close to where the function ends."""
    x = start_at(1.0, 0.5, device=device)
    optimizer = LBFGS([x], max_iter=100, line_search_fn=search)

    def closure() -> Tensor:
        optimizer.zero_grad()
        assert x.isfinite().all()
        outside = bool((x <= 0).any())
        values = x.abs().clamp(min=1e-9)
        return spoiled(kind if outside else "", (1e3 * values - values.log()).sum(), x)

    optimizer.step(closure)
    assert optimizer.info.nonfinite_trials > 0
    assert (x > 0).all()
    if search is not None:
        assert optimizer.info.loss_after < optimizer.info.loss
        optimizer.step(closure)
        torch.testing.assert_close(x.detach(), torch.full_like(x, 1e-3), rtol=1e-4, atol=0)


@pytest.mark.parametrize("search", [*SEARCHES, None])
def test_a_closure_that_turns_non_finite_within_a_step(search: str | None) -> None:
    """Whatever has been accepted stays, and is finite."""
    x = start_at(-1.2, 1.0)
    optimizer = LBFGS([x], max_iter=50, max_eval=100, line_search_fn=search, lr=0.5)
    calls, best = 0, math.inf

    def closure() -> Tensor:
        nonlocal calls, best
        optimizer.zero_grad()
        calls += 1
        loss = spoiled("loss" if calls > 10 else "", rosenbrock(x), x)
        best = min(best, loss.item())
        return loss

    optimizer.step(closure)
    info = optimizer.info
    assert info.status is StepStatus.NONFINITE_TRIALS
    assert info.history_reset
    assert math.isfinite(info.loss_after)
    assert rosenbrock(x).item() == info.loss_after
    if search is not None:
        assert info.loss_after == best


# What a step leaves behind.


@pytest.mark.parametrize("where", [1, 2, 5])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_an_exception_leaves_the_parameters(
    where: int, steps_before: int, device: torch.device
) -> None:
    case = make_case("mlp", device)
    optimizer = LBFGS(case.model.parameters(), max_iter=10)
    calls = -1000

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == where:
            raise KeyError("mine")
        return case.closure()()

    for _ in range(steps_before):
        optimizer.step(closure)
    before, info, calls = [p.detach().clone() for p in case.params()], optimizer.info, 0
    with pytest.raises(KeyError, match="mine"):
        optimizer.step(closure)
    assert all(torch.equal(p, q) for p, q in zip(case.params(), before, strict=True))
    assert optimizer.info is info
    calls = 1000
    optimizer.step(closure)
    assert optimizer.info.loss_after < optimizer.info.loss


def test_no_graph_outlives_a_step() -> None:
    case = make_case("mlp", torch.device("cpu"))
    optimizer = LBFGS(case.model.parameters(), max_iter=2, history_size=3, tolerance_grad=0)
    closure = case.closure()

    def tensors() -> int:
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    counts = []
    gc.collect()
    gc.disable()  # a cycle that only the collector frees would keep memory growing
    try:
        for _ in range(5):
            for _ in range(10):
                loss = optimizer.step(closure)
            counts.append(tensors())
    finally:
        gc.enable()
    assert not loss.requires_grad
    assert all(p.grad is not None and p.grad.grad_fn is None for p in case.params())
    assert counts[-1] == counts[0]


# Losses without a lower bound.

FALLING = {
    "linear": lambda x: x.sum(),
    "parabola": lambda x: -x.square().sum(),
    "saddle": lambda x: x[0] ** 2 - x[1] ** 2,
    "exponential": lambda x: -x.exp().sum(),
    "wave": lambda x: (x + x.sin()).sum(),
}
BOUNDED = {
    "exponential": lambda x: (-x).exp().sum(),
    "softplus": lambda x: F.softplus(x).sum(),
    "reciprocal": lambda x: 1 / x.abs().sum(),
    "two wells": lambda x: (x**4 - x**2).sum(),
    "far away": lambda x: (1e-12 * x - 1).square().sum(),
    "far and steep": lambda x: (x - 1e8).square().sum(),
    "hinge": lambda x: (F.relu(1 - x) + 0.1 * F.relu(x)).sum(),
    "large offset": lambda x: x.square().sum() - 1e12,
    # These fall for ever, and ever more slowly: nothing tells them from the first ones above.
    "logarithm": lambda x: -x.square().log1p().sum(),
    "root": lambda x: -(1 + x.abs()).sqrt().sum(),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("search", ["strong_wolfe", "hager_zhang"])
@pytest.mark.parametrize("name", FALLING)
def test_a_loss_that_falls_without_end(
    name: str, search: str, dtype: torch.dtype, device: torch.device
) -> None:
    if name == "wave" and dtype == torch.float32:
        return  # far out it is made of rounding: how it ends depends on the machine's sine
    x = torch.tensor([1.0, 2.0], dtype=dtype, device=device, requires_grad=True)
    optimizer = LBFGS([x], line_search_fn=search, max_iter=60, max_eval=1000)
    closure = standard(optimizer, lambda: FALLING[name](x))
    optimizer.step(closure)
    info = optimizer.info
    assert info.status is StepStatus.UNBOUNDED and "without end" in info.status.value
    assert x.isfinite().all() and math.isfinite(info.loss_after)
    assert info.loss_after < -1e10
    assert closure().item() == info.loss_after
    for _ in range(8):  # and from there on
        optimizer.step(closure)
        assert x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("search", [*SEARCHES, None])
@pytest.mark.parametrize("name", BOUNDED)
def test_a_bounded_loss_is_not_called_unbounded(
    name: str, search: str | None, dtype: torch.dtype
) -> None:
    x = torch.tensor([1.0, 2.0], dtype=dtype, requires_grad=True)
    optimizer = LBFGS([x], line_search_fn=search, lr=1.0 if search else 0.1)
    closure = standard(optimizer, lambda: BOUNDED[name](x))
    for _ in range(5):
        optimizer.step(closure)
        assert optimizer.info.status is not StepStatus.UNBOUNDED
        assert optimizer.info.loss_after <= optimizer.info.loss or search is None
        assert x.isfinite().all()


def test_steps_without_a_search_end_at_minus_infinity() -> None:
    x = torch.tensor([80.0], requires_grad=True)
    optimizer = LBFGS([x], line_search_fn=None, lr=1.0, max_iter=100, max_eval=1000)
    optimizer.step(standard(optimizer, lambda: -x.exp().sum()))
    assert optimizer.info.status is StepStatus.UNBOUNDED
    assert x.isfinite().all() and math.isfinite(optimizer.info.loss_after)


def test_a_reason_of_a_broken_off_step_is_not_reported_later() -> None:
    """A step that raised makes no report, and the next one does not report for it."""
    x = start_at(-1.2, 1.0)
    optimizer = LBFGS([x], max_iter=2)
    optimizer.step(standard(optimizer, lambda: rosenbrock(x)))
    state = optimizer.state_dict()
    optimizer.param_groups[0]["history_size"] = 3  # the history is dropped, and then:
    calls = []

    def broken() -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return standard(optimizer, lambda: rosenbrock(x))()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(broken)
    optimizer.load_state_dict(state)
    optimizer.step(standard(optimizer, lambda: rosenbrock(x)))
    assert optimizer.info is not None
    assert not optimizer.info.history_reset
