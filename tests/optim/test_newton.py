"""Newton's method with the exact Hessian."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import inf, log10
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.closures import GLOBALIZATIONS, closure_of, rosenbrock, standard, start_at
from tests.support.custom_functions import Cube, NanCurvature
from tests.support.oracles import dense_hessian, make_case
from tests.support.problems import PROBLEMS, PROBLEMS_BY_NAME, Problem
from torch_secondorder import (
    DatasetClosure,
    FunctionalObjective,
    MissingSecondDerivative,
    Newton,
    StepStatus,
)
from torch_secondorder._foundation import memory
from torch_secondorder._foundation.memory import TooLarge
from torch_secondorder.globalization import MarquardtDamping, SearchStatus, TrustRegion

each_globalization = pytest.mark.parametrize("globalization", GLOBALIZATIONS)


def minimize(problem: Problem, **arguments: Any) -> tuple[Newton, Tensor]:
    """Minimizes a problem in one step."""
    x = problem.start.clone().requires_grad_()
    options = {"max_iter": 300, "tolerance_grad": 1e-6, "tolerance_change": 0.0} | arguments
    optimizer = Newton([x], **options)
    optimizer.step(standard(optimizer, lambda: problem.function(x)))
    return optimizer, x


# Test functions.


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_the_classical_functions(problem: Problem) -> None:
    optimizer, x = minimize(problem)
    info = optimizer.info
    assert info is not None
    assert info.status is StepStatus.CONVERGED_GRADIENT
    (gradient,) = torch.autograd.grad(problem.function(x), x)
    assert float(gradient.abs().max()) <= 1e-6
    assert problem.is_minimum(info.loss_after)
    assert info.hessians == info.iterations <= 75
    assert info.products == problem.size * info.hessians


@each_globalization
@pytest.mark.parametrize("name", ["rosenbrock", "wood", "chebyquad", "powell_singular"])
def test_each_globalization(name: str, globalization: Any) -> None:
    problem = PROBLEMS_BY_NAME[name]
    optimizer, _ = minimize(problem, globalization=globalization)
    info = optimizer.info
    assert info is not None
    assert info.status is StepStatus.CONVERGED_GRADIENT
    assert problem.is_minimum(info.loss_after)
    assert bool(info.damping) == (globalization == "damping")
    assert bool(info.trust_radius) == (globalization == "trust_region")
    assert (info.search_status is not None) == (globalization == "line_search")


def test_corrections_save_hessians() -> None:
    """Also where rejected trials are counted, and evaluations do not pay for it twice."""
    counts = []
    for corrections in (0, 3):
        found = [minimize(p, corrections=corrections)[0].info for p in PROBLEMS[:8]]
        counts.append([sum(getattr(i, a) for i in found if i) for a in ("hessians", "evaluations")])
    (plain, plain_evaluations), (corrected, evaluations) = counts
    assert corrected <= 0.6 * plain
    assert evaluations <= 2.0 * plain_evaluations


def test_a_correction_mends_a_step_that_fails() -> None:
    """The first full step goes to a loss of 5e38."""
    problem = PROBLEMS_BY_NAME["box_3d"]
    plain, mended = (minimize(problem, max_iter=1, corrections=c)[0].info for c in (0, 1))
    assert plain is not None and mended is not None
    assert plain.evaluations > 3  # the radius shrinks
    assert (mended.evaluations, mended.corrections) == (3, 1)
    assert mended.loss_after < mended.loss


def test_corrections_of_rejected_steps_are_not_counted() -> None:
    x = start_at(-1.1753, 1.3807)
    optimizer = Newton([x], globalization=TrustRegion(initial=1e3), corrections=1)
    optimizer.step(standard(optimizer, lambda: rosenbrock(x)))
    assert optimizer.info is not None
    assert optimizer.info.evaluations == 7
    assert optimizer.info.corrections == 1


def digits(name: str, **arguments: Any) -> list[float]:
    """The correct digits of the minimizer after each iteration, up to rounding."""
    problem = PROBLEMS_BY_NAME[name]
    _, solution = minimize(problem, tolerance_grad=1e-13, globalization="line_search")
    x = problem.start.clone().requires_grad_()
    optimizer = Newton([x], tolerance_grad=1e-13, tolerance_change=0.0, **arguments)
    found = []
    for _ in range(60):
        optimizer.step(standard(optimizer, lambda: problem.function(x)))
        error = float((x - solution).detach().norm() / solution.detach().norm())
        if error < 1e-13:
            break
        found.append(-log10(error))
    return found


@each_globalization
@pytest.mark.parametrize("name", ["rosenbrock", "brown_dennis", "beale", "dixon_price"])
def test_the_number_of_digits_doubles(name: str, globalization: Any) -> None:
    """Quadratic convergence: near the solution the error is squared, up to a constant."""
    found = [d for d in digits(name, globalization=globalization, corrections=0) if d > 2.5]
    assert len(found) >= 2
    for before, after in pairwise(found):
        assert after >= min(2.0 * before - 2.0, 11.0)


def test_corrections_bring_more_digits() -> None:
    plain, corrected = (len(digits("dixon_price", corrections=count)) for count in (0, 3))
    assert corrected <= 0.7 * plain


# Quadratics: one Hessian is enough, and what it does is known.


def quadratic(values: list[float], seed: int = 0) -> tuple[Tensor, Tensor]:
    """A symmetric matrix with some eigenvalues, and a vector."""
    n = len(values)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]
    matrix = (basis * torch.tensor(values, dtype=torch.float64)) @ basis.T
    return (matrix + matrix.T) / 2, torch.randn(n, dtype=torch.float64, generator=generator)


def one_step(
    a: Tensor, b: Tensor, groups: Callable[[list[nn.Parameter]], Any] = list, **arguments: Any
) -> tuple[Newton, Tensor]:
    """One step on `x'A x / 2 - b'x` from ones, with a parameter for each half."""
    x = [nn.Parameter(part) for part in torch.ones_like(b).tensor_split(2)]
    optimizer = Newton(groups(x), **arguments)
    sign = -1.0 if arguments.get("maximize") else 1.0

    def loss() -> Tensor:
        whole = torch.cat(x)
        return sign * (0.5 * whole @ (a @ whole) - b @ whole)

    optimizer.step(standard(optimizer, loss))
    return optimizer, torch.cat([part.detach() for part in x])


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("size", [6, 140])  # diagonalized, and factorized
def test_one_step_solves_a_quadratic(
    size: int, weight_decay: float, maximize: bool, device: torch.device
) -> None:
    a, b = (t.to(device) for t in quadratic(torch.linspace(1.0, 5.0, size).tolist()))
    optimizer, x = one_step(a, b, weight_decay=weight_decay, maximize=maximize)
    regularized = a + weight_decay * torch.eye(size, dtype=a.dtype, device=device)
    torch.testing.assert_close(x, torch.linalg.solve(regularized, b))
    info = optimizer.info
    assert info is not None
    assert info.definiteness == "positive definite"
    assert info.gain_ratio == pytest.approx(1.0)
    assert (info.hessians, info.products, info.corrections) == (1, size, 0)
    if size == 6:
        assert info.smallest_eigenvalue == pytest.approx(1.0 + weight_decay)
    else:
        assert info.smallest_eigenvalue is None


def test_a_learning_rate_is_a_share_of_the_step() -> None:
    a, b = quadratic([1.0, 2.0, 3.0, 4.0])
    _, x = one_step(a, b, lr=0.5, corrections=0)
    torch.testing.assert_close(x, 0.5 * (1 + torch.linalg.solve(a, b)))
    optimizer, x = one_step(a, b, lr=0.0)
    torch.testing.assert_close(x, torch.ones_like(x))
    assert optimizer.info is not None
    assert optimizer.info.status is StepStatus.ZERO_LEARNING_RATE


def test_learning_rates_of_groups_scale_the_metric() -> None:
    """Newton's step does not depend on a metric; that of a trust region does."""
    a, b = quadratic([1.0, 2.0, 3.0, 4.0])

    def groups(x: list[nn.Parameter]) -> Any:
        return [{"params": x[:1]}, {"params": x[1:], "lr": 0.01}]

    _, x = one_step(a, b, groups, globalization=TrustRegion(initial=1e6))
    torch.testing.assert_close(x, torch.linalg.solve(a, b))
    _, x = one_step(a, b, groups, globalization=TrustRegion(initial=1e-6), corrections=0)
    moved = (x - 1).tensor_split(2)
    scaled = torch.cat([moved[0], moved[1] / 0.1])  # the square root of the ratio of rates
    assert float(scaled.norm()) == pytest.approx(1e-6)
    gradient = (a.sum(1) - b) * torch.tensor([1.0, 1.0, 0.1, 0.1])
    expected = -1e-6 * gradient / gradient.norm()
    torch.testing.assert_close(scaled, expected, rtol=1e-3, atol=1e-9)


def test_a_singular_hessian() -> None:
    """The step goes to the nearest minimizer, and nowhere along the flat direction."""
    a = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    optimizer, x = one_step(a, torch.tensor([4.0, 4.0], dtype=torch.float64))
    torch.testing.assert_close(x, torch.tensor([2.0, 2.0], dtype=torch.float64))
    assert optimizer.info is not None
    assert optimizer.info.definiteness == "singular"


@each_globalization
def test_a_linear_function_has_no_minimum(globalization: Any) -> None:
    zero, b = torch.zeros(2, 2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    optimizer, x = one_step(zero, b, globalization=globalization, max_iter=20)
    info = optimizer.info
    assert info is not None
    assert info.loss_after < info.loss
    assert info.definiteness == "singular"
    assert bool(x.isfinite().all())


def saddle(x: Tensor) -> Tensor:
    return x[0] ** 2 - x[1] ** 2 + x[1] ** 4


def test_the_hard_case_leaves_a_saddle() -> None:
    """The gradient points at the saddle, along the bottom of the valley that leads to it."""
    x = start_at(1.0, 0.0)
    optimizer = Newton([x], max_iter=30)
    optimizer.step(standard(optimizer, lambda: saddle(x)))
    info = optimizer.info
    assert info is not None
    assert info.hard_case
    assert info.loss_after == pytest.approx(-0.25)
    assert info.definiteness == "positive definite"


@pytest.mark.parametrize("globalization", ["damping", "line_search"])
def test_without_a_trust_region_a_step_may_end_at_a_saddle(globalization: Any) -> None:
    x = start_at(1.0, 0.0)
    optimizer = Newton([x], max_iter=50, globalization=globalization)
    optimizer.step(standard(optimizer, lambda: saddle(x)))
    info = optimizer.info
    assert info is not None
    assert info.loss_after == pytest.approx(0.0, abs=1e-12)
    assert info.definiteness == "indefinite"  # which is how you know
    assert info.smallest_eigenvalue == pytest.approx(-2.0)
    with torch.no_grad():
        x[1] = 1e-3  # off the ridge, all of them leave it
    optimizer.step(standard(optimizer, lambda: saddle(x)))
    assert optimizer.info is not None
    assert optimizer.info.loss_after == pytest.approx(-0.25)


@each_globalization
def test_an_unbounded_function(globalization: Any) -> None:
    x = start_at(0.5, -0.25)
    optimizer = Newton([x], max_iter=100, globalization=globalization)
    optimizer.step(standard(optimizer, lambda: -(x**4).sum()))
    info = optimizer.info
    assert info is not None
    assert info.status is not StepStatus.CONVERGED_GRADIENT
    assert info.loss_after < -1e3
    assert bool(x.isfinite().all())


# Numbers that are not finite.


@each_globalization
def test_trials_that_are_not_finite(globalization: Any) -> None:
    x = start_at(5.0)
    optimizer = Newton([x], max_iter=50, globalization=globalization)
    optimizer.step(standard(optimizer, lambda: (x - 0.9 * x.log()).sum()))
    assert optimizer.info is not None
    assert optimizer.info.nonfinite_trials > 0
    assert optimizer.info.status is StepStatus.CONVERGED_GRADIENT
    assert x.item() == pytest.approx(0.9)


@each_globalization
def test_entries_of_the_hessian_that_are_not_finite(globalization: Any) -> None:
    """A norm has a first derivative at zero, by convention, and no second."""
    x = start_at(0.0, 0.0, 3.0, 2.0)
    goal = torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64)
    optimizer = Newton([x], globalization=globalization)

    def loss() -> Tensor:
        return (x - goal).square().sum() + 0.1 * x[:2].norm()

    optimizer.step(standard(optimizer, loss))
    info = optimizer.info
    assert info is not None
    assert info.repair.startswith("2 of 4 entries of a product were not finite")
    assert info.loss_after < info.loss
    assert info.products == 1 + 2 * 4
    for _ in range(8):
        optimizer.step(standard(optimizer, loss))
    assert optimizer.info is not None
    assert optimizer.info.repair == ""
    assert optimizer.info.grad_norm < 1e-6


def test_a_hessian_without_finite_entries() -> None:
    x = start_at(1.0, 2.0)
    optimizer = Newton([x])
    optimizer.step(standard(optimizer, lambda: NanCurvature.apply(x).sum()))
    assert optimizer.info is not None
    assert optimizer.info.repair.startswith("no entry of a product was finite, products were diff")
    torch.testing.assert_close(x.detach(), torch.zeros_like(x), atol=1e-6, rtol=0)


def test_a_start_that_is_not_finite() -> None:
    x = start_at(-1.0)
    optimizer = Newton([x])
    optimizer.step(standard(optimizer, lambda: x.log().sum()))
    assert optimizer.info is not None
    assert optimizer.info.status is StepStatus.NONFINITE_START
    assert x.item() == -1.0


# The limits of a step.


def test_the_limit_of_evaluations_keeps_what_was_found() -> None:
    x = start_at(-1.2, 1.0)
    for most in range(1, 8):
        with torch.no_grad():
            x.copy_(torch.tensor([-1.2, 1.0]))
        optimizer = Newton([x], max_iter=50, max_eval=most)
        optimizer.step(standard(optimizer, lambda: rosenbrock(x)))
        info = optimizer.info
        assert info is not None
        assert info.evaluations == most
        assert info.status is StepStatus.MAX_EVALUATIONS
        assert info.loss_after == pytest.approx(rosenbrock(x).item())
        assert (info.loss_after < info.loss) == (most > 1)


def test_steps_go_on_where_the_last_one_ended() -> None:
    """One iteration per step and several are the same, but for an evaluation at each start."""
    runs = []
    for max_iter in (1, 12):
        x = start_at(-1.2, 1.0)
        optimizer = Newton([x], max_iter=max_iter)
        for _ in range(12 // max_iter):
            optimizer.step(standard(optimizer, lambda: rosenbrock(x)))  # noqa: B023
        runs.append(x.detach().clone())
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-12, atol=0)


def test_other_parameters_make_it_begin_anew() -> None:
    x, y = start_at(-1.2, 1.0), start_at(3.0)
    optimizer = Newton([x, y])
    optimizer.step(standard(optimizer, lambda: rosenbrock(x) + y.square().sum()))
    assert optimizer.info is not None
    start = optimizer.state_dict()["state"][0]["start"]
    optimizer.step(standard(optimizer, lambda: rosenbrock(x) + y.square().sum()))
    assert optimizer.state_dict()["state"][0]["start"] == start
    y.requires_grad_(False)
    optimizer.step(standard(optimizer, lambda: rosenbrock(x) + y.square().sum()))
    assert optimizer.state_dict()["state"][0]["start"] != start


# Sources of the loss.


def test_a_function_and_a_data_set_give_the_steps_of_a_closure(device: torch.device) -> None:
    case = make_case("mlp", device)
    start = [p.detach().clone() for p in case.params()]

    def run(make: Callable[[Newton], Any]) -> list[Tensor]:
        with torch.no_grad():
            for p, value in zip(case.params(), start, strict=True):
                p.copy_(value)
        optimizer = Newton(case.params(), weight_decay=0.01)
        for _ in range(4):
            optimizer.step(make(optimizer))
        return [p.detach().clone() for p in case.params()]

    names = [name for name, _ in case.model.named_parameters()]

    def function(params: dict[str, Tensor]) -> Tensor:
        return case.loss(torch.func.functional_call(case.model, params, (case.x,)), case.y)

    expected = run(lambda _: case.closure())
    tree = dict(zip(names, case.params(), strict=True))
    function_steps = run(lambda _: FunctionalObjective(function, tree))
    batches = [(case.x[i : i + 3], case.y[i : i + 3]) for i in range(0, len(case.x), 3)]
    data_steps = run(lambda _: DatasetClosure(case.model, case.loss, batches))
    for found in (function_steps, data_steps):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["mlp", "attention", "pinn"])
def test_the_smallest_eigenvalue(name: str, device: torch.device) -> None:
    case = make_case(name, device)
    values = torch.linalg.eigvalsh(dense_hessian(case.pure(), case.params()))
    optimizer = Newton(case.params())
    optimizer.step(case.closure())
    info = optimizer.info
    assert info is not None
    assert info.smallest_eigenvalue is not None
    small = len(values) <= 128
    relative = 1e-6 if small else 0.1  # of a large matrix it is an approximation
    assert info.smallest_eigenvalue == pytest.approx(float(values[0]), rel=relative)
    assert info.definiteness == "indefinite"


# Errors.


def test_too_many_parameters_are_refused_before_anything_is_done() -> None:
    x = nn.Parameter(torch.zeros(60_000))
    optimizer = Newton([x])
    calls = []
    with pytest.raises(TooLarge, match=r"4 x 60,000 x 60,000 = .* 53\.6 GiB.*: use NewtonCG or L"):
        optimizer.step(lambda: calls.append(1))  # type: ignore[arg-type, return-value]
    assert not calls


def test_memory_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    x = nn.Parameter(torch.zeros(2000, dtype=torch.float64))
    monkeypatch.setattr(memory, "free_memory", lambda device: 2.0**26)
    with pytest.raises(TooLarge, match=r"0\.1 GiB, and 0\.1 GiB are free: use NewtonCG or LBFGS"):
        Newton([x]).step(closure_of(lambda: x.square().sum(), x))


def test_sharded_parameters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Newton, "_sharded", True)
    with pytest.raises(
        ValueError, match=r"Newton needs the whole Hessian in each process.*NewtonC"
    ):
        Newton([start_at(1.0)])


def test_a_missing_second_derivative() -> None:
    x = start_at(1.0, 2.0)
    with pytest.raises(MissingSecondDerivative, match="Cube"):
        Newton([x]).step(closure_of(lambda: Cube.apply(x).sum(), x))
    torch.testing.assert_close(x.detach(), start_at(1.0, 2.0).detach())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"corrections": -1}, "corrections"),
        ({"max_iter": 0}, "max_iter"),
        ({"max_eval": 0}, "max_eval"),
        ({"tolerance_grad": -1.0}, "tolerance_grad"),
        ({"tolerance_change": -1.0}, "tolerance_change"),
        ({"globalization": "trust"}, "globalization.*trust_region"),
        ({"lr": -1.0}, "lr"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Newton([start_at(1.0)], **arguments)


def test_instances_of_globalizations() -> None:
    x = start_at(-1.2, 1.0)
    for rule in (TrustRegion(initial=0.1), MarquardtDamping(initial=10.0)):
        with torch.no_grad():
            x.copy_(torch.tensor([-1.2, 1.0]))
        optimizer = Newton([x], globalization=rule, corrections=0)
        optimizer.step(standard(optimizer, lambda: rosenbrock(x)))
        assert optimizer.info is not None
        assert optimizer.state_dict()["state"][0]["start"] == rule.initial
    searched = Newton([x], globalization="hager_zhang")
    searched.step(standard(searched, lambda: rosenbrock(x)))
    assert searched.info is not None
    assert isinstance(searched.info.search_status, SearchStatus)
    assert searched.info.loss_after < inf


@each_globalization
@pytest.mark.parametrize("size", [2, 150])
def test_losses_with_a_kink_end_without_an_exception(globalization: Any, size: int) -> None:
    x = torch.linspace(-0.3, 1.0, size, dtype=torch.float64).requires_grad_()
    optimizer = Newton([x], globalization=globalization, max_iter=200, tolerance_change=0.0)
    loss = float(optimizer.step(standard(optimizer, lambda: x.abs().sum())))
    assert x.isfinite().all() and float(x.detach().abs().sum()) < loss
