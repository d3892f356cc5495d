"""L-BFGS: the calls of its counterpart, the classical problems, pairs, endings, and accidents."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.closures import SEARCHES, rosenbrock, standard, start_at
from tests.support.oracles import make_case
from tests.support.problems import NONCONVEX, make_problems
from torch_secondorder import LBFGS, StepStatus
from torch_secondorder._params import space
from torch_secondorder.curvature import InverseBFGS
from torch_secondorder.globalization import (
    FixedStep,
    Phi,
    SearchResult,
    SearchStatus,
    StrongWolfe,
    Trial,
)


def gradient_of(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(function(x), x)
    return gradient


# The calls of torch.optim.LBFGS.


def test_the_signature_begins_with_that_of_torch() -> None:
    theirs = inspect.signature(torch.optim.LBFGS).parameters
    ours = inspect.signature(LBFGS).parameters
    assert [ours[name].kind for name in theirs] == [p.kind for p in theirs.values()]
    # What has no place has no order either: some versions of torch have `maximize` there.
    placed = [name for name, p in theirs.items() if p.kind is not p.KEYWORD_ONLY]
    assert list(ours)[: len(placed)] == placed


def test_keywords_of_newer_versions_mean_the_same() -> None:
    """All of its keywords without a place, of whatever version."""
    theirs = inspect.signature(torch.optim.LBFGS).parameters
    known = {"maximize": True}
    keywords = {name for name, p in theirs.items() if p.kind is p.KEYWORD_ONLY}
    assert keywords <= known.keys()
    for name in keywords:
        ends, returned = [], []
        for make in (torch.optim.LBFGS, LBFGS):
            x = start_at(-1.2, 1.0)
            optimizer = make([x], line_search_fn=None, lr=1e-3, max_iter=3, **{name: known[name]})
            loss = optimizer.step(standard(optimizer, lambda x=x: -rosenbrock(x)))
            ends.append(x.detach())
            returned.append(loss.item())
        torch.testing.assert_close(ends[1], ends[0])
        assert returned == pytest.approx([-24.2, -24.2])


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((0.5,), {}),
        ((0.5, 10, 15, 1e-7, 1e-9, 50, "strong_wolfe"), {}),
        ((1, 4, None, 0, 0, 3, None), {}),
        ((torch.tensor(0.5),), {"line_search_fn": None}),
        ((), {"lr": 1, "max_iter": 20, "max_eval": None, "tolerance_grad": 1e-7}),
        ((), {"tolerance_change": 1e-9, "history_size": 100, "line_search_fn": "strong_wolfe"}),
    ],
)
@pytest.mark.parametrize("form", ["list", "generator", "groups", "named"])
def test_every_call_of_torch_is_accepted(form: str, args: tuple, kwargs: dict) -> None:
    case = make_case("mlp", torch.device("cpu"))
    params = {
        "list": lambda: list(case.model.parameters()),
        "generator": lambda: case.model.parameters(),
        "groups": lambda: [{"params": case.model.parameters()}],
        "named": lambda: case.model.named_parameters(),
    }[form]
    torch.optim.LBFGS(params(), *args, **kwargs)
    optimizer = LBFGS(params(), *args, **kwargs)
    before = optimizer.step(case.closure())
    assert case.value() < before


@pytest.mark.parametrize("per_step", [1, 4, 12])
@pytest.mark.parametrize("problem", ["quadratic", "logistic"])
def test_fixed_steps_follow_torch(problem: str, per_step: int, device: torch.device) -> None:
    """With one pair held, the rules for the initial scale agree; with more they do not."""
    basis = torch.randn(10, 10, dtype=torch.float64)
    matrix = (basis @ basis.T / 10 + torch.eye(10)).to(device)
    signs = torch.randn(10, device=device, dtype=torch.float64).sign()

    def function(x: Tensor) -> Tensor:
        if problem == "quadratic":
            return x @ matrix @ x / 2 - x.sum()
        return F.softplus(-signs * (matrix @ x)).mean() + 0.01 * x @ x

    paths = []
    for make in (torch.optim.LBFGS, LBFGS):
        x = nn.Parameter(torch.linspace(-1, 1, 10, dtype=torch.float64, device=device))
        optimizer = make([x], 0.5, per_step, 1000, 0, 0, 1, None)
        path = []
        for _ in range(12 // per_step):
            optimizer.step(standard(optimizer, lambda x=x: function(x)))
            path.append(x.detach().clone())
        paths.append(torch.stack(path))
    torch.testing.assert_close(paths[1], paths[0], rtol=1e-10, atol=1e-10)


def test_the_first_fixed_step_is_that_of_torch_at_any_history_size() -> None:
    ends = []
    for make in (torch.optim.LBFGS, LBFGS):
        x = start_at(-1.2, 1.0)
        optimizer = make([x], max_iter=1, line_search_fn=None)
        optimizer.step(standard(optimizer, lambda x=x: rosenbrock(x)))
        ends.append(x.detach())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-14, atol=0)


# Classical problems.


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(
    "name",
    [
        "rosenbrock",
        "beale",
        "wood",
        "powell_singular",
        "brown_badly_scaled",
        "extended_rosenbrock",
        "helical_valley",
    ],
)
def test_problems_are_solved(name: str, search: str, device: torch.device) -> None:
    problem = next(p for p in make_problems(device) if p.name == name)
    x = nn.Parameter(problem.start.clone())
    optimizer = LBFGS([x], max_iter=2000, max_eval=4000, tolerance_grad=1e-6, line_search_fn=search)
    optimizer.step(standard(optimizer, lambda: problem.function(x)))
    assert optimizer.info.status is StepStatus.CONVERGED_GRADIENT, optimizer.info
    assert gradient_of(problem.function, x).abs().max() <= 1e-6
    assert problem.is_minimum(problem.function(x).item())


@pytest.mark.parametrize("search", ["strong_wolfe", "hager_zhang"])
def test_the_ill_conditioned_quadratic(search: str) -> None:
    problem = next(p for p in make_problems() if p.name == "ill_conditioned_quadratic")
    x = nn.Parameter(problem.start.clone())
    optimizer = LBFGS([x], max_iter=3000, max_eval=3000, tolerance_grad=1e-6, line_search_fn=search)
    optimizer.step(standard(optimizer, lambda: problem.function(x)))
    assert optimizer.info.status is StepStatus.CONVERGED_GRADIENT, optimizer.info
    assert optimizer.info.evaluations <= 3000


@pytest.mark.parametrize("name", ["cosine", "indefm", "chainwoo", "loghairy"])
def test_negative_curvature_on_the_way_does_not_make_steps_too_long(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest scale of all pairs would take up to four times the evaluations of the newest.

    Where functions have many minima, the way to one of them is decided by rounding: so means are
    compared, over starts that differ in their last digits.
    """
    problem = next(p for p in NONCONVEX if p.name == name)

    def evaluations() -> float:
        generator, counts = torch.Generator().manual_seed(0), []
        for _ in range(4):
            noise = torch.randn(problem.size, dtype=torch.float64, generator=generator)
            x = nn.Parameter(problem.start * (1 + 1e-13 * noise))
            optimizer = LBFGS([x], max_iter=2000, max_eval=2000, tolerance_grad=1e-5)
            optimizer.step(standard(optimizer, lambda x=x: problem.function(x)))
            assert optimizer.info.status is StepStatus.CONVERGED_GRADIENT
            counts.append(math.log(optimizer.info.evaluations))
        return math.exp(sum(counts) / len(counts))

    found = evaluations()
    monkeypatch.setattr("torch_secondorder.curvature.inverse_bfgs._BOLDEST", 1.0)
    assert found <= 2.5 * evaluations()


# Pairs.


def test_pairs_come_from_one_batch_each(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    x = nn.Parameter(torch.ones(6, dtype=torch.float64, device=device))
    batches = list(torch.randn(5, 8, 6, dtype=torch.float64, device=device))
    optimizer = LBFGS([x], max_iter=3, max_eval=100)
    current: Tensor
    distances = []

    def function(at: Tensor) -> Tensor:
        return F.softplus(current @ at).mean() + 0.05 * at @ at

    def spy(self: InverseBFGS, s: Tensor, y: Tensor, scale: float | None = None) -> None:
        there = x.detach()  # the step has been accepted
        expected = gradient_of(function, there) - gradient_of(function, there - s)
        distances.append(float((y - expected).abs().max() / y.abs().max()))
        original(self, s, y, scale)

    original = InverseBFGS.push
    monkeypatch.setattr(InverseBFGS, "push", spy)
    for batch in batches * 2:
        current = batch
        optimizer.step(standard(optimizer, lambda: function(x)))
        assert not optimizer.info.history_reset
        assert optimizer.info.skipped_pairs == 0
    assert len(distances) == 30
    assert max(distances) < 1e-10


@pytest.mark.parametrize("search", [None, FixedStep()])
@pytest.mark.parametrize("damping", [False, True])
def test_pairs_without_curvature(
    damping: bool, search: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a hilltop s'y < 0. Damped pairs keep a fifth of the curvature that H expects."""
    shares = []

    def spy(self: InverseBFGS, s: Tensor, y: Tensor, scale: float | None = None) -> None:
        if self.count:
            expected = s @ torch.linalg.solve(self @ torch.eye(3, dtype=torch.float64), s)
        else:  # the first direction is the negative gradient, at most one long in the 1-norm
            expected = s @ s / min(1.0, 1 / float(first.abs().sum()))
        shares.append(float(s @ y / expected))
        original(self, s, y, scale)

    original = InverseBFGS.push
    monkeypatch.setattr(InverseBFGS, "push", spy)
    x = start_at(0.1, -0.2, 0.3)
    first = gradient_of(lambda x: x.cos().sum(), x)
    optimizer = LBFGS([x], lr=0.1, max_iter=6, line_search_fn=search, powell_damping=damping)
    optimizer.step(standard(optimizer, lambda: x.cos().sum()))
    info = optimizer.info
    assert (info.iterations, info.status) == (6, StepStatus.MAX_ITERATIONS)
    if damping:
        assert info.skipped_pairs == 0
        assert len(shares) == 6
        damped = [share for share in shares if share == pytest.approx(0.2, rel=1e-8)]
        assert len(damped) == info.damped_pairs >= 2
        assert min(shares) >= 0.2 * (1 - 1e-8)
    else:
        assert (info.skipped_pairs, info.damped_pairs) == (6, 0)
        assert not shares


def test_damping_leaves_good_pairs_alone() -> None:
    x = start_at(-1.2, 1.0)
    optimizer = LBFGS([x], max_iter=200, powell_damping=True)
    optimizer.step(standard(optimizer, lambda: rosenbrock(x)))
    assert optimizer.info.status is StepStatus.CONVERGED_GRADIENT
    assert (
        optimizer.info.damped_pairs + optimizer.info.skipped_pairs < optimizer.info.iterations / 2
    )


# Endings.


def climbing(x: Tensor) -> Callable[[], Tensor]:
    """A closure whose gradient points the wrong way."""

    def closure() -> Tensor:
        loss = x @ x
        x.grad = -2 * x.detach()
        return loss

    return closure


def take_it(phi: Phi, start: Trial, t0: float, *, precision: float) -> SearchResult:
    return SearchResult(phi(t0), SearchStatus.FIXED, 1, 0)


def any_step(phi: Phi, start: Trial, t0: float, *, precision: float) -> SearchResult:
    """A line search that takes whatever it finds."""
    return FixedStep()(phi, start, t0, precision=precision)


def finite_once(x: Tensor) -> Callable[[], Tensor]:
    factors = itertools.chain([1.0], itertools.repeat(math.inf))

    def closure() -> Tensor:
        x.grad = 2 * x.detach()
        return (x @ x) * next(factors)

    return closure


def sloped(x: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        x.grad = None
        loss = rosenbrock(x)
        loss.backward()
        return loss

    return closure


def endless(x: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        x.grad = torch.ones_like(x)
        return x.detach().sum()

    return closure


@pytest.mark.parametrize(
    ("status", "make", "arguments", "moves"),
    [
        (StepStatus.ZERO_LEARNING_RATE, sloped, {"lr": 0.0}, False),
        (StepStatus.MAX_ITERATIONS, sloped, {"max_iter": 2, "max_eval": 100}, True),
        (StepStatus.MAX_EVALUATIONS, sloped, {"max_eval": 1}, True),
        (StepStatus.CONVERGED_GRADIENT, sloped, {"tolerance_grad": 1e3}, False),
        (
            StepStatus.CONVERGED_CHANGE,
            sloped,
            {"tolerance_change": 0.5, "tolerance_grad": 0, "max_iter": 100},
            True,
        ),
        (StepStatus.STALLED, climbing, {"line_search_fn": take_it, "max_iter": 100}, True),
        (StepStatus.NO_DECREASE, climbing, {}, False),
        (StepStatus.NONFINITE_START, lambda x: lambda: x.sum() * math.nan, {}, False),
        (StepStatus.NONFINITE_TRIALS, finite_once, {}, False),
        (StepStatus.NONFINITE_TRIALS, finite_once, {"line_search_fn": None}, False),
        (StepStatus.UNBOUNDED, endless, {}, True),
    ],
    ids=lambda value: value.name if isinstance(value, StepStatus) else None,
)
def test_every_ending_has_its_name(
    status: StepStatus, make: Callable, arguments: dict, moves: bool, device: torch.device
) -> None:
    x = start_at(-1.2, 1.0, device=device)
    before = x.detach().clone()
    optimizer = LBFGS([x], **arguments)
    optimizer.step(make(x))
    info = optimizer.info
    assert info.status is status
    assert len(info.status.value.split()) > 5
    assert torch.equal(x, before) is not moves
    assert (info.iterations > 0) is moves
    if status is StepStatus.UNBOUNDED:
        assert info.loss_after < info.loss and info.search_status is SearchStatus.UNBOUNDED
    elif moves and status is not StepStatus.STALLED:
        assert info.loss_after < info.loss
        assert info.search_status is SearchStatus.WOLFE  # it got to finish
        assert info.evaluations > 1


OF_OTHERS = {
    StepStatus.NOTHING_TO_TRAIN,
    StepStatus.NO_CURVATURE,
    StepStatus.NONFINITE_PRODUCTS,
    StepStatus.MOVED,
    StepStatus.MOVED_ON_OLD_CURVATURE,
    StepStatus.STOPPED,
    StepStatus.INFEASIBLE,
}


def test_all_endings_are_tested() -> None:
    (mark,) = test_every_ending_has_its_name.pytestmark
    assert {row[0] for row in mark.args[1]} == set(StepStatus) - OF_OTHERS


def test_the_report() -> None:
    x = start_at(-1.2, 1.0)
    optimizer = LBFGS([x], max_iter=7, max_eval=100)
    assert optimizer.info is None
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return sloped(x)()

    loss = optimizer.step(closure)
    info = optimizer.info
    assert (info.loss, info.loss_after) == (loss.item(), rosenbrock(x).item())
    assert info.grad_norm == gradient_of(rosenbrock, x).abs().max().item()
    assert (info.iterations, info.evaluations) == (7, calls)
    assert info.search_status.accepted
    assert info.step_length > 0


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("scale", [1e-8, 2.0**-40, 2.0**30])
def test_a_small_loss_does_not_end_early(scale: float, search: str) -> None:
    paths = []
    for factor in (1.0, scale):
        x = start_at(-1.2, 1.0)
        optimizer = LBFGS([x], max_iter=1, line_search_fn=search)
        path = []
        for _ in range(20):
            optimizer.step(standard(optimizer, lambda x=x, f=factor: f * rosenbrock(x)))
            assert optimizer.info.status is StepStatus.MAX_ITERATIONS
            path.append(x.detach().clone())
        for _ in range(100):
            optimizer.step(standard(optimizer, lambda x=x, f=factor: f * rosenbrock(x)))
        torch.testing.assert_close(x.detach(), torch.ones_like(x), rtol=0, atol=1e-4)
        paths.append(torch.stack(path))
    exact = math.frexp(scale)[0] == 0.5  # powers of two: not even the rounding differs
    torch.testing.assert_close(paths[1], paths[0], rtol=0, atol=0 if exact else 1e-6)


def test_an_explicit_tolerance_is_absolute() -> None:
    x = start_at(-1.2, 1.0)
    optimizer = LBFGS([x], tolerance_grad=1e-5)
    optimizer.step(standard(optimizer, lambda: 1e-8 * rosenbrock(x)))
    assert optimizer.info.status is StepStatus.CONVERGED_GRADIENT
    assert optimizer.info.evaluations == 1


def test_a_line_search_instance_is_used() -> None:
    class Halving:
        def __call__(self, phi, start, t0, *, precision):
            seen.append((t0, precision))
            return StrongWolfe()(phi, start, 0.5 * t0, precision=precision)

    seen: list[tuple[float, float]] = []
    x = start_at(-1.2, 1.0)
    optimizer = LBFGS([x], lr=0.25, max_iter=3, max_eval=99, line_search_fn=Halving())
    optimizer.step(standard(optimizer, lambda: rosenbrock(x)))
    assert seen == [(0.25, torch.finfo(torch.float64).eps)] * 3


def test_the_host_waits_once_an_iteration_outside_the_line_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = start_at(-1.2, 1.0)
    optimizer = LBFGS([x], max_iter=25, max_eval=1000, tolerance_grad=0)
    searching, waits = False, 0

    to_host = space.Space.to_host

    def counted(self: space.Space, **scalars: Any) -> list[float]:
        nonlocal waits
        waits += not searching
        return to_host(self, **scalars)

    def search(*arguments: Any, **keywords: Any) -> SearchResult:
        nonlocal searching
        searching = True
        try:
            return StrongWolfe()(*arguments, **keywords)
        finally:
            searching = False

    monkeypatch.setattr(space.Space, "to_host", counted)
    optimizer.line_search = search
    optimizer.step(standard(optimizer, lambda: rosenbrock(x)))
    assert optimizer.info.iterations == 25
    # At the start: loss and gradient, and the size of the parameters.
    assert 25 <= waits <= 25 + 2
