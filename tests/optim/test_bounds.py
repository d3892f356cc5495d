"""Bounds of parameters: every evaluation inside, the minimum within, and clear errors."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.bounded_problems import BOUNDED_BY_NAME, BOUNDED_PROBLEMS, BoundedProblem
from torch_secondorder import (
    BFGS,
    LBFGS,
    AdaHessian,
    FunctionalObjective,
    Newton,
    NewtonCG,
    Sophia,
)
from torch_secondorder.globalization import SearchResult, SearchStatus, StrongWolfe, Trial
from torch_secondorder.optim.extending import StepStatus

INF = math.inf
KINDS = {
    "lbfgs": LBFGS,
    "bfgs": BFGS,
    "ssbroyden": lambda params, **more: BFGS(params, update="ssbroyden", **more),
    "trust_region": Newton,
    "damping": lambda params, **more: Newton(params, globalization="damping", **more),
    "line_search": lambda params, **more: Newton(params, globalization="line_search", **more),
}
QUASI = ["lbfgs", "bfgs", "ssbroyden"]
by_kind = pytest.mark.parametrize("kind", KINDS)


def closure_of(optimizer: Any, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def solved(kind: str, problem: BoundedProblem, tolerance: float, **more: Any) -> Any:
    """An optimizer after one long step, each of whose evaluations was inside."""
    x = problem.start.clone().requires_grad_()
    settings = {"max_iter": 5000, "tolerance_grad": tolerance, "tolerance_change": 0.0}
    if kind in QUASI:
        settings["max_eval"] = 5000
    optimizer = KINDS[kind]([x], bounds=(problem.low, problem.high), **settings | more)

    def loss() -> Tensor:
        assert ((x >= problem.low) & (x <= problem.high)).all()
        return problem.function(x)

    optimizer.step(closure_of(optimizer, loss))
    return optimizer


def largest_curvature(problem: BoundedProblem, x: Tensor) -> float:
    hessian = torch.autograd.functional.hessian(problem.function, x)
    return float(torch.linalg.eigvalsh(hessian)[-1])


def pairs() -> list[Any]:
    """All problems for three kinds, a few for the others."""
    few = ("hs2", "hs25", "bounded_wood", "exponential", "obstacle")
    result = []
    for kind in KINDS:
        for name in BOUNDED_BY_NAME if kind in ("lbfgs", "bfgs", "trust_region") else few:
            slow = name in ("nonscomp", "torsion", "bounded_rosenbrock", "journal_bearing")
            marks = [pytest.mark.slow] if slow else []
            result.append(pytest.param(kind, name, marks=marks, id=f"{kind}-{name}"))
    return result


@pytest.mark.parametrize(("kind", "name"), pairs())
def test_minimum_within_bounds(kind: str, name: str) -> None:
    problem = BOUNDED_BY_NAME[name]
    # The loss of `cornered_powell` is of fourth order at its minimum. What is left of its Hessian
    # is rounding before the eighth digit is reached.
    flat = name == "cornered_powell"
    digits = 1e-6 if flat and kind == "trust_region" else 1e-8
    optimizer = solved(kind, problem, 1e-10 if not flat else 0.1 * digits**3)
    (x,) = optimizer.param_groups[0]["params"]
    info, x = optimizer.info, x.detach()
    # Losses are rounded, and line searches may end before the tolerance is reached: at the latest
    # where all that is left to gain is less than the rounding error.
    if not (info.status is StepStatus.CONVERGED_GRADIENT or info.projected_grad_norm < 1e-7):
        left = info.projected_grad_norm**2 / (2 * largest_curvature(problem, x))
        assert left < torch.finfo(x.dtype).eps * abs(info.loss_after), info
    projected = float(problem.projected_gradient(x).abs().max())
    assert info.projected_grad_norm == pytest.approx(projected, rel=1e-3, abs=1e-13)
    assert info.active_bounds == int(((x == problem.low) | (x == problem.high)).sum())
    inside = bool(((problem.start >= problem.low) & (problem.start <= problem.high)).all())
    assert info.start_projected is not inside
    assert problem.is_minimum(info.loss_after)
    first = abs(info.loss_after - problem.minima[0]) <= 1e-8 * max(1.0, abs(problem.minima[0]))
    if problem.solution is not None and first:
        distance = (x - problem.solution).abs() / problem.solution.abs().clamp(min=1.0)
        assert float(distance.max()) <= digits


@pytest.mark.slow
def test_evaluations_are_as_few_as_those_of_scipy() -> None:
    """`scripts/bench.py quasi_newton --part bounds` is the measurement."""
    optimize = pytest.importorskip("scipy.optimize")
    ratios = []
    for problem in BOUNDED_PROBLEMS:
        count = 0

        def both(point: Any, problem: BoundedProblem = problem) -> Any:
            nonlocal count
            count += 1
            x = torch.from_numpy(point.copy()).requires_grad_()
            value = problem.function(x)
            return value.item(), torch.autograd.grad(value, x)[0].numpy()

        bounds = list(zip(problem.low.tolist(), problem.high.tolist(), strict=True))
        options = {"ftol": 0.0, "gtol": 1e-6, "maxcor": 20, "maxiter": 5000, "maxfun": 5000}
        optimize.minimize(
            both, problem.start.numpy(), jac=True, method="L-BFGS-B", bounds=bounds, options=options
        )
        ours = solved("lbfgs", problem, 1e-6, history_size=20)
        ratios.append(ours.info.evaluations / count)
    # Rounding differs from one processor to the next, and so does the path.
    assert math.exp(sum(map(math.log, ratios)) / len(ratios)) <= 1.1


# Forms of the option.


def quadratic(x: Tensor, target: float = 3.0) -> Tensor:
    return ((x - target) ** 2).sum()


@pytest.mark.parametrize(
    ("bounds", "wanted"),
    [
        ((None, 1.0), 1.0),
        ((4, None), 4.0),
        ((torch.tensor(4.0), None), 4.0),
        ([0.0, torch.tensor([1.0, 2.0, 9.0])], [1.0, 2.0, 3.0]),
        ((None, [torch.tensor([1.0, 2.0, 9.0])]), [1.0, 2.0, 3.0]),
        ((torch.tensor([0, 5, 0]), INF), [3.0, 5.0, 3.0]),
        ((2.0, 2.0), 2.0),
        ((-INF, INF), 3.0),
        ((None, None), 3.0),
        (None, 3.0),
    ],
)
@by_kind
def test_forms_of_bounds(kind: str, bounds: Any, wanted: Any, device: torch.device) -> None:
    x = torch.zeros(3, dtype=torch.float64, device=device, requires_grad=True)
    optimizer = KINDS[kind]([x], bounds=bounds, max_iter=50)
    optimizer.step(closure_of(optimizer, lambda: quadratic(x)))
    torch.testing.assert_close(x.detach(), torch.zeros_like(x) + torch.tensor(wanted).to(x))


@pytest.mark.parametrize("bounds", [(None, None), (-INF, INF), (torch.full((4,), -INF), None)])
@by_kind
def test_infinite_bounds_are_none(kind: str, bounds: Any) -> None:
    problem, points = BOUNDED_BY_NAME["bounded_wood"], []
    for option in (None, bounds):
        x = problem.start.clone().requires_grad_()
        optimizer = KINDS[kind]([x], bounds=option, max_iter=7)
        optimizer.step(closure_of(optimizer, lambda x=x: problem.function(x)))
        info = optimizer.info
        assert info.active_bounds is info.projected_grad_norm is info.start_projected is None
        points.append(x.detach())
    assert torch.equal(*points)


@by_kind
def test_groups_have_bounds_of_their_own(kind: str) -> None:
    a, b, c = (torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    b.requires_grad_(False)
    groups = [
        {"params": [a], "bounds": (None, 1.0), "lr": 1.0},
        {"params": [b, c], "bounds": ([7.0, -1.0], None), "lr": 0.1},
    ]
    optimizer = KINDS[kind](groups, max_iter=200)

    def loss() -> Tensor:
        assert (a <= 1.0).all() and (c >= -1.0).all()
        return quadratic(a) + quadratic(c, -5.0) + (a * c).sum() / 10

    optimizer.step(closure_of(optimizer, loss))
    assert a.tolist() == [1.0, 1.0] and c.tolist() == [-1.0, -1.0]  # to the last bit
    assert b.tolist() == [0.0, 0.0]  # frozen
    assert optimizer.info.active_bounds == 4


@by_kind
def test_a_group_that_does_not_move(kind: str) -> None:
    a, b = (torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    groups = [{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.0}]
    optimizer = KINDS[kind](groups, bounds=(0.0, 1.0), max_iter=50)
    optimizer.step(closure_of(optimizer, lambda: quadratic(a) + quadratic(b) + (a * b).sum()))
    assert a.tolist() == [1.0, 1.0] and b.tolist() == [0.0, 0.0]


@by_kind
def test_weight_decay_and_maximize(kind: str) -> None:
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    bounds = (None, torch.tensor([1.0, 9.0, 9.0]))
    optimizer = KINDS[kind](
        [x], bounds=bounds, weight_decay=1.0, maximize=True, max_iter=60, tolerance_grad=1e-10
    )
    optimizer.step(closure_of(optimizer, lambda: -quadratic(x)))
    torch.testing.assert_close(x.tolist(), [1.0, 2.0, 2.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@by_kind
def test_narrow_parameters_stay_inside_to_the_last_bit(kind: str, dtype: torch.dtype) -> None:
    x = torch.linspace(-1.0, 1.0, 5).to(dtype).requires_grad_()
    low, high = torch.linspace(-0.3, 0.1, 5).double() / 3, torch.linspace(0.2, 0.9, 5).double() / 3
    optimizer = KINDS[kind]([x], bounds=(low, high), max_iter=20)

    def loss() -> Tensor:
        held = x.detach().double()
        assert ((held >= low) & (held <= high)).all()
        return ((x.float() - torch.tensor([-2.0, 0.01, 2.0, 0.1, 2.0])) ** 2).sum()

    for _ in range(3):
        optimizer.step(closure_of(optimizer, loss))
    held = x.detach().double()
    precision = torch.finfo(dtype).eps
    assert float((held - low)[0]) <= precision
    assert float((high - held)[[2, 4]].max()) <= precision
    assert optimizer.info.active_bounds == 3


def test_numbers_bound_narrow_parameters_as_comparisons_do() -> None:
    x = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    optimizer = LBFGS([x], bounds=(None, 0.1))
    optimizer.step(closure_of(optimizer, lambda: quadratic(x.float())))
    assert (x <= 0.1).all() and torch.equal(x.detach(), torch.full((3,), 0.1).bfloat16())
    optimizer.step(closure_of(optimizer, lambda: quadratic(x.float())))
    assert optimizer.info.start_projected is False


def test_a_pure_function() -> None:
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for kind in KINDS:
        x.data.zero_()
        optimizer = KINDS[kind]([x], bounds=(None, 1.0), max_iter=20)
        optimizer.step(FunctionalObjective(lambda p: quadratic(p["x"]), {"x": x}))
        assert x.tolist() == [1.0] * 3


# Line searches.


class OwnSearch:
    """A line search that knows of no longest step."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, float]] = []

    def __call__(
        self, phi: Callable[[float], Trial], start: Trial, t0: float, *, precision: float
    ) -> SearchResult:
        t, best = 8 * t0, start
        while t > 1e-6:
            trial = phi(t)
            self.asked.append((t, trial.t))
            if trial.loss < best.loss:
                return SearchResult(trial, SearchStatus.ARMIJO, len(self.asked), 0)
            t /= 2
        return SearchResult(start, SearchStatus.NO_DECREASE, len(self.asked), 0)


@pytest.mark.parametrize("search", ["strong_wolfe", "hager_zhang", "armijo", "own", None])
@pytest.mark.parametrize("name", ["hs4", "bounded_wood", "obstacle", "hs45"])
@pytest.mark.parametrize("kind", ["lbfgs", "bfgs"])
def test_line_searches_end_at_the_bounds(kind: str, name: str, search: Any) -> None:
    problem, own = BOUNDED_BY_NAME[name], OwnSearch()
    if search is None and name == "bounded_wood":
        pytest.skip("steps without a search do not converge there without bounds either")
    optimizer = solved(
        kind, problem, 1e-7, max_iter=400, line_search_fn=own if search == "own" else search
    )
    assert problem.is_minimum(optimizer.info.loss_after, 1e-6)
    if search == "own" and name == "hs4":
        assert any(asked > made for asked, made in own.asked)


def test_whole_steps_beyond_which_the_loss_falls_are_taken() -> None:
    """A search that ends at a bound says so, and is no sign of a bottomless loss."""
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = LBFGS([x], bounds=(0.0, 1.0), max_iter=5, line_search_fn=StrongWolfe(c2=0.1))
    optimizer.step(closure_of(optimizer, lambda: -x.sum() * 1e3))
    assert x.tolist() == [1.0, 1.0]
    info = optimizer.info
    assert info.status is StepStatus.CONVERGED_GRADIENT
    assert info.search_status is SearchStatus.LONGEST
    assert info.projected_grad_norm == 0.0 and info.grad_norm == 1e3
    assert info.evaluations == 3


@pytest.mark.parametrize("lr", [0.3, 5.0])
@by_kind
def test_learning_rates_do_not_lead_outside(kind: str, lr: float) -> None:
    problem = BOUNDED_BY_NAME["hs45"]
    optimizer = solved(kind, problem, 1e-8, lr=lr)
    assert problem.is_minimum(optimizer.info.loss_after)


@pytest.mark.parametrize("kind", QUASI)
def test_damped_pairs(kind: str) -> None:
    problem = BOUNDED_BY_NAME["bounded_wood"]
    optimizer = solved(kind, problem, 1e-8, powell_damping=True)
    assert problem.is_minimum(optimizer.info.loss_after)
    x = torch.tensor([0.1, 0.2], dtype=torch.float64, requires_grad=True)
    optimizer = KINDS[kind]([x], bounds=(-2.0, 2.0), powell_damping=True, max_iter=20)
    optimizer.step(closure_of(optimizer, lambda: -torch.cosh(x).sum()))  # concave
    assert x.abs().tolist() == [2.0, 2.0]
    assert optimizer.info.damped_pairs + optimizer.info.skipped_pairs > 0 or (
        optimizer.info.iterations == 1
    )


# Starts, and bounds that change.


@by_kind
def test_a_start_outside_is_projected_and_reported(kind: str) -> None:
    x = torch.tensor([-9.0, 0.5, 9.0], dtype=torch.float64, requires_grad=True)
    optimizer, seen = KINDS[kind]([x], bounds=(0.0, 1.0), max_iter=1), []

    def loss() -> Tensor:
        seen.append(x.detach().clone())
        return quadratic(x, 0.5)

    optimizer.step(closure_of(optimizer, loss))
    assert seen[0].tolist() == [0.0, 0.5, 1.0]
    assert optimizer.info.start_projected is True
    optimizer.step(closure_of(optimizer, loss))
    assert optimizer.info.start_projected is False


@by_kind
def test_an_error_in_the_closure_leaves_the_start(kind: str) -> None:
    x = torch.tensor([-9.0, 9.0], dtype=torch.float64, requires_grad=True)
    optimizer = KINDS[kind]([x], bounds=(0.0, 1.0))

    def closure() -> Tensor:
        raise KeyError("no data")

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert x.tolist() == [-9.0, 9.0]


@by_kind
def test_a_start_that_is_not_finite_is_left_alone(kind: str) -> None:
    x = torch.tensor([-9.0, 9.0], dtype=torch.float64, requires_grad=True)
    optimizer = KINDS[kind]([x], bounds=(0.0, 1.0))
    optimizer.step(closure_of(optimizer, lambda: x.sum() * math.nan))
    assert optimizer.info.status is StepStatus.NONFINITE_START
    assert optimizer.info.start_projected is True
    assert x.tolist() == [-9.0, 9.0]
    # An infinite slope towards a bound is not finite either, though its projection is.
    x.data.fill_(0.5)
    optimizer.step(closure_of(optimizer, lambda: x.sum() + (x[0] - 0.5).sqrt()))
    assert optimizer.info.status is StepStatus.NONFINITE_START


@by_kind
def test_losses_that_are_not_finite_beyond_the_bounds_do_not_matter(kind: str) -> None:
    x = torch.tensor([0.5, 0.5], dtype=torch.float64, requires_grad=True)
    optimizer = KINDS[kind]([x], bounds=(1e-3, None), max_iter=100)
    optimizer.step(closure_of(optimizer, lambda: (x * x.log() + 3 * x).sum()))
    assert optimizer.info.nonfinite_trials == 0
    torch.testing.assert_close(x.tolist(), [math.exp(-4)] * 2, rtol=1e-5, atol=0)


@by_kind
def test_bounds_may_change_between_steps(kind: str) -> None:
    high = torch.tensor([1.0, 1.0])
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = KINDS[kind]([x], bounds=(None, high), max_iter=20)
    closure = closure_of(optimizer, lambda: quadratic(x))
    optimizer.step(closure)
    assert x.tolist() == [1.0, 1.0]
    high[0] = 2.0  # in place
    optimizer.step(closure)
    assert x.tolist() == [2.0, 1.0]
    optimizer.param_groups[0]["bounds"] = (None, 0.5)
    optimizer.step(closure)
    assert x.tolist() == [0.5, 0.5] and optimizer.info.start_projected
    optimizer.param_groups[0]["bounds"] = None
    optimizer.step(closure)
    torch.testing.assert_close(x.tolist(), [3.0, 3.0])
    assert optimizer.info.active_bounds is None
    with torch.no_grad():
        x.copy_(torch.tensor([7.0, 7.0]))
    optimizer.param_groups[0]["bounds"] = (5.0, None)
    x.data = x.data.float()  # another precision
    optimizer.step(closure)
    assert x.tolist() == [5.0, 5.0]


# Checkpoints.


def first_half(kind: str, x: Tensor, bounds: Any) -> Any:
    optimizer = KINDS[kind]([x], bounds=bounds, max_iter=3)
    problem = BOUNDED_BY_NAME["bounded_rosenbrock"]
    for _ in range(3):
        optimizer.step(closure_of(optimizer, lambda: problem.function(x)))
    return optimizer


@by_kind
def test_training_resumes_bit_for_bit(kind: str) -> None:
    problem = BOUNDED_BY_NAME["bounded_rosenbrock"]
    x = problem.start.clone().requires_grad_()
    optimizer = first_half(kind, x, (problem.low, problem.high))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    y = x.detach().clone().requires_grad_()
    loaded = KINDS[kind]([y], max_iter=3)  # the bounds come with the state
    loaded.load_state_dict(torch.load(file, weights_only=True))
    low, high = loaded.param_groups[0]["bounds"]
    assert torch.equal(low, problem.low) and torch.equal(high, problem.high)
    for _ in range(3):
        for o, p in ((optimizer, x), (loaded, y)):
            o.step(closure_of(o, lambda p=p: problem.function(p)))
            assert o.info.active_bounds is not None
        assert torch.equal(x, y)


def test_copies_have_bounds() -> None:
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = LBFGS([x], bounds=(None, torch.tensor([1.0, 2.0])))
    optimizer.step(closure_of(optimizer, lambda: quadratic(x)))
    copied = copy.deepcopy(optimizer)
    (p,) = copied.param_groups[0]["params"]
    with torch.no_grad():
        p.zero_()
    copied.step(closure_of(copied, lambda: quadratic(p)))
    assert p.tolist() == [1.0, 2.0]


def test_states_without_bounds_load() -> None:
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    old = LBFGS([x]).state_dict()
    del old["param_groups"][0]["bounds"]  # of the last release
    optimizer = LBFGS([x], bounds=(None, 1.0))
    optimizer.load_state_dict(old)
    assert optimizer.param_groups[0]["bounds"] == (None, 1.0)


# Errors.

WRONG = [
    (3.0, TypeError, r"must be a pair \(low, high\).*got 3.0"),
    ((1.0,), TypeError, r"must be a pair .*got \(1.0,\)"),
    (torch.zeros(2), TypeError, "must be a pair"),
    (("0", 1.0), TypeError, "got '0' as one of them"),
    ((False, 1.0), TypeError, "got False as one of them"),
    ((torch.tensor([True]), 1.0), TypeError, "got a tensor of torch.bool"),
    ((2.0, 1.0), ValueError, "parameter 0 of shape .3, 2. leave no number: they are 2 and 1"),
    ((torch.tensor([0.0, 5.0]), 1.0), ValueError, r"leave no number: at \[1\] they are 5 and 1"),
    ((INF, None), ValueError, "leave no number: they are inf and inf"),
    ((None, -INF), ValueError, "leave no number: they are -inf and -inf"),
    ((math.nan, 1.0), ValueError, "a bound of parameter 0 of shape .3, 2. is NaN; None stands"),
    ((None, torch.tensor([1.0, math.nan])), ValueError, "is NaN"),
    ((torch.zeros(3), None), ValueError, r"shape \(3,\) does not broadcast to parameter 0"),
    ((torch.zeros(1, 3, 2), None), ValueError, r"shape \(1, 3, 2\) does not broadcast"),
    (([0.0, 0.0], None), ValueError, "got 2 for 1 param.* of a parameter are a tensor"),
]


@pytest.mark.parametrize(("bounds", "kind", "message"), WRONG)
def test_wrong_bounds_are_refused_before_anything_changes(
    bounds: Any, kind: type[Exception], message: str
) -> None:
    x = torch.full((3, 2), 5.0, requires_grad=True)
    for make in KINDS.values():
        with pytest.raises(kind, match=message):
            make([x], bounds=bounds)
    optimizer = LBFGS([torch.zeros(1, requires_grad=True)])
    with pytest.raises(kind, match=message):
        optimizer.add_param_group({"params": [x], "bounds": bounds})
    assert len(optimizer.param_groups) == 1
    optimizer = LBFGS([x], bounds=(0.0, 1.0))
    optimizer.param_groups[0]["bounds"] = bounds
    evaluated = []
    with pytest.raises(kind, match=message):
        optimizer.step(closure_of(optimizer, lambda: evaluated.append(1) or x.sum()))
    assert not evaluated and (x == 5.0).all()


def test_tensors_that_become_wrong_are_refused() -> None:
    x, low = torch.zeros(2, requires_grad=True), torch.zeros(2)
    optimizer = LBFGS([x], bounds=(low, 1.0))
    closure = closure_of(optimizer, lambda: quadratic(x))
    optimizer.step(closure)
    low[1] = 2.0
    with pytest.raises(ValueError, match="leave no number"):
        optimizer.step(closure)


def test_complex_parameters_have_no_bounds() -> None:
    z = torch.zeros(2, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(ValueError, match="is complex, and complex numbers have no order: hold it"):
        LBFGS([z], bounds=(0.0, 1.0))
    # In a group of their own they are fine.
    x = torch.zeros(2, requires_grad=True)
    optimizer = LBFGS([{"params": [x], "bounds": (0.0, 1.0)}, {"params": [z]}])
    optimizer.step(closure_of(optimizer, lambda: quadratic(x) + (z - 2j).abs().square().sum()))
    assert x.tolist() == [1.0, 1.0]
    torch.testing.assert_close(z.detach(), torch.full((2,), 2j, dtype=z.dtype))


def test_other_optimizers_take_no_bounds() -> None:
    x = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="NewtonCG takes no bounds: use LBFGS"):
        NewtonCG([{"params": [x], "bounds": (0.0, 1.0)}])
    optimizer = NewtonCG([x])
    optimizer.param_groups[0]["bounds"] = (0.0, 1.0)
    with pytest.raises(ValueError, match="takes no bounds"):
        optimizer.step(closure_of(optimizer, lambda: quadratic(x)))


@pytest.mark.parametrize("kind", [AdaHessian, Sophia])
def test_optimizers_of_one_update_take_no_bounds(kind: Any) -> None:
    x = torch.zeros(2, requires_grad=True)
    message = f"{kind.__name__} takes no bounds: use LBFGS, or leave the bounds out"
    with pytest.raises(ValueError, match=message):
        kind([{"params": [x], "bounds": (0.0, 1.0)}])
    optimizer = kind([{"params": [x], "bounds": None}])
    closure = closure_of(optimizer, lambda: quadratic(x))
    optimizer.step(closure)
    moved = x.detach().clone()
    optimizer.param_groups[0]["bounds"] = (0.0, 1.0)
    with pytest.raises(ValueError, match=message):
        optimizer.step(closure)
    assert torch.equal(x, moved)


def test_empty_parameters_and_groups() -> None:
    x, empty = torch.zeros(2, requires_grad=True), torch.zeros(0, requires_grad=True)
    optimizer = LBFGS([x, empty], bounds=([0.0, None], [torch.ones(2), None]))
    optimizer.step(closure_of(optimizer, lambda: quadratic(x)))
    assert x.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("kind", QUASI)
@pytest.mark.parametrize("size", [1e-35, 1e-20, 1e30])
def test_losses_of_any_size_in_float32(kind: str, size: float) -> None:
    """Products of steps and gradients, and their quotients, are beyond the range of float32."""
    x = torch.tensor([3e4, -2e4, 1e4], requires_grad=True)
    optimizer = KINDS[kind]([x], max_iter=50, bounds=(-1e4, None))
    optimizer.step(closure_of(optimizer, lambda: size * ((x / 1e4 - 0.5) ** 2).sum()))
    assert optimizer.info.status in (StepStatus.CONVERGED_GRADIENT, StepStatus.CONVERGED_CHANGE)
    torch.testing.assert_close(x.detach(), torch.full((3,), 5e3), rtol=1e-4, atol=0)


def test_no_end_within_bounds_in_float32() -> None:
    """The squared length of the next step is beyond the range of float32."""
    x = torch.tensor([1.0, -1.0], requires_grad=True)
    optimizer = LBFGS([x], max_iter=3, bounds=(None, 2.0))
    for _ in range(6):
        optimizer.step(closure_of(optimizer, x.sum))
    assert optimizer.info is not None
    assert optimizer.info.status in (StepStatus.UNBOUNDED, StepStatus.NO_DECREASE)
    assert bool(x.isfinite().all())


def test_no_line_where_numbers_end() -> None:
    """A gradient at the end of float32 leaves no line; the step says so."""
    x = torch.tensor([1e-3, 0.5, -1e-4], requires_grad=True)
    optimizer = LBFGS([x], bounds=(-1e-3, None))
    optimizer.step(closure_of(optimizer, lambda: 3e38 * x.sum()))
    assert optimizer.info is not None
    assert optimizer.info.status is StepStatus.NO_DECREASE
    assert bool(x.isfinite().all())


def test_damping_of_a_large_loss_in_float32() -> None:
    """Squares of the entries of `H g` are beyond the range of float32."""
    x = torch.tensor([0.3, -0.4], requires_grad=True)
    optimizer = Newton([x], globalization="damping", max_iter=30, bounds=(None, 5.0))
    optimizer.step(closure_of(optimizer, lambda: 1e20 * ((x - 1) ** 4 + x**2).sum()))
    assert optimizer.info is not None
    assert 0 < optimizer.info.damping < INF
    assert optimizer.info.projected_grad_norm is not None
    assert optimizer.info.projected_grad_norm < 1e15
