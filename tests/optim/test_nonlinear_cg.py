"""Nonlinear conjugate gradients: formulas, conjugacy, restarts, preconditioners, checkpoints."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from tests.support.closures import SEARCHES, rosenbrock, standard, start_at
from tests.support.dense_operators import Dense, rotation
from tests.support.problems import NONCONVEX, make_problems
from torch_secondorder import LBFGS, FunctionalObjective, NonlinearCG, NonlinearCGInfo, StepStatus
from torch_secondorder._params import space, vector
from torch_secondorder.curvature import Diagonal
from torch_secondorder.globalization import (
    Armijo,
    HagerZhang,
    Phi,
    SearchResult,
    SearchStatus,
    StrongWolfe,
    Trial,
)
from torch_secondorder.optim.nonlinear_cg import _FORMULAS, BetaName, Products
from torch_secondorder.solvers import CG

BETAS: tuple[BetaName, ...] = get_args(BetaName)
each_beta = pytest.mark.parametrize("beta", BETAS)


def gradient_of(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(function(x), x)
    return gradient


def minimized(
    function: Callable[[Tensor], Tensor], start: Tensor, **arguments: Any
) -> tuple[Tensor, NonlinearCGInfo]:
    """Where one step ends, and its report."""
    x = nn.Parameter(start.clone())
    optimizer = NonlinearCG([x], **({"max_eval": 10**6, "tolerance_change": 0.0} | arguments))
    optimizer.step(standard(optimizer, lambda: function(x)))
    assert optimizer.info is not None
    return x.detach(), optimizer.info


@dataclass
class Exact:
    """The minimum along a line of a quadratic, from one trial; it notes the points that it takes.

    Attributes:
        share: What the minimizer is multiplied by.
        steps: The steps that were taken.
        firsts: The first steps that were tried.
        slopes: The slopes at the starts.
    """

    share: float = 1.0
    steps: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    slopes: list[float] = field(default_factory=list)

    def __call__(self, phi: Phi, start: Trial, t0: float, *, precision: float) -> SearchResult:
        trial = phi(t0)
        t = self.share * t0 * start.slope / (start.slope - trial.slope)
        self.firsts.append(t0)
        self.slopes.append(start.slope)
        self.steps.append(t)
        return SearchResult(phi(t), SearchStatus.WOLFE, 2, 0)


def quadratic(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A positive definite matrix with eigenvalues from 1 to 10, and a right-hand side."""
    basis = rotation(size, seed)
    matrix = (basis * torch.logspace(0, 1, size, dtype=torch.float64)) @ basis.T
    generator = torch.Generator().manual_seed(seed + 1)
    return matrix, torch.randn(size, dtype=torch.float64, generator=generator)


def path(
    matrix: Tensor, b: Tensor, iterations: int, share: float = 1.0, **arguments: Any
) -> list[Tensor]:
    """The points of exact searches on a quadratic, one for each iteration."""
    x = nn.Parameter(torch.zeros_like(b))
    search = Exact(share)
    optimizer = NonlinearCG([x], max_iter=1, line_search_fn=search, tolerance_grad=0.0, **arguments)
    closure = standard(optimizer, lambda: 0.5 * x @ (matrix @ x) - b @ x)
    points = [x.detach().clone()]
    for _ in range(iterations):
        optimizer.step(closure)
        points.append(x.detach().clone())
    return points


# Quadratics.


@each_beta
@pytest.mark.parametrize("preconditioned", [False, True])
def test_directions_are_conjugate_and_n_of_them_solve_a_quadratic(
    beta: BetaName, preconditioned: bool
) -> None:
    n = 10
    matrix, b = quadratic(n)
    weights = torch.linspace(1, 3, n, dtype=torch.float64)
    preconditioner = Diagonal(weights) if preconditioned else None
    points = path(matrix, b, n, beta=beta, preconditioner=preconditioner)
    steps = torch.stack([after - before for before, after in pairwise(points)])
    products = steps @ matrix @ steps.T
    norms = products.diagonal().sqrt()
    deviation = products / torch.outer(norms, norms) - torch.eye(n, dtype=torch.float64)
    assert deviation.abs().max() < 1e-8
    solution = torch.linalg.solve(matrix, b)
    assert (points[-1] - solution).norm() < 1e-10 * solution.norm()
    assert (points[n // 2] - solution).norm() > 1e-3 * solution.norm()


@each_beta
@pytest.mark.parametrize("preconditioned", [False, True])
def test_iterates_are_those_of_linear_conjugate_gradients(
    beta: BetaName, preconditioned: bool
) -> None:
    n = 10
    matrix, b = quadratic(n, seed=3)
    preconditioner = Diagonal(torch.linspace(1, 3, n, dtype=torch.float64))
    inverse = preconditioner if preconditioned else None
    points = path(matrix, b, n, beta=beta, preconditioner=inverse)
    for count in range(1, n):
        solver = CG(count, tolerance=0.0, recompute=0)
        expected = solver(Dense(matrix), b, preconditioner=inverse).x
        assert (points[count] - expected).norm() < 1e-10 * expected.norm(), count


# The formulas, against plain ones.


def plain_beta(name: str, g: Tensor, h: Tensor, d: Tensor, P: Tensor, inverse: Tensor) -> Tensor:
    """The formulas as they are printed, with vectors before and after a step along `d`."""
    y = h - g
    zero = torch.zeros((), dtype=g.dtype)
    if name in ("hager_zhang", "dai_kou"):
        theta = 2 if name == "hager_zhang" else 1
        along = P @ y - theta * d * (y @ P @ y) / (d @ y)
        eta, grad = (0.4, g) if name == "hager_zhang" else (0.5, h)
        return torch.maximum(along @ h / (d @ y), eta * (d @ grad) / (d @ inverse @ d))
    if name == "polak_ribiere":
        return torch.maximum(zero, (h @ P @ y) / (g @ P @ g))
    if name == "hestenes_stiefel":
        return torch.maximum(zero, (h @ P @ y) / (d @ y))
    if name == "fletcher_reeves":
        return (h @ P @ h) / (g @ P @ g)
    if name == "dai_yuan":
        return (h @ P @ h) / (d @ y)
    hestenes, yuan = (h @ P @ y) / (d @ y), (h @ P @ h) / (d @ y)
    if name == "hestenes_stiefel_dai_yuan":
        return torch.maximum(zero, torch.minimum(hestenes, yuan))
    polak, reeves = (h @ P @ y) / (g @ P @ g), (h @ P @ h) / (g @ P @ g)
    assert name == "fletcher_reeves_polak_ribiere"
    return torch.maximum(-reeves, torch.minimum(polak, reeves))


def updated(H: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """The BFGS update of an inverse Hessian."""
    left = torch.eye(len(s), dtype=s.dtype) - torch.outer(s, y) / (s @ y)
    return left @ H @ left.T + torch.outer(s, s) / (s @ y)


@pytest.mark.parametrize("beta", [beta for beta in BETAS if beta != "shanno"])
def test_formulas_are_those_in_print_also_at_their_bounds(beta: BetaName) -> None:
    """Random vectors, which no search has chosen."""
    generator = torch.Generator().manual_seed(1)
    bounds = 0
    for _ in range(60):
        g, h, d = torch.randn(3, 4, dtype=torch.float64, generator=generator)
        root = torch.randn(4, 4, dtype=torch.float64, generator=generator)
        P = root @ root.T + torch.eye(4, dtype=torch.float64)
        inverse, d = torch.linalg.inv(P), d * torch.sign(d @ (h - g))
        y = h - g
        numbers = (h @ P @ h, h @ P @ y, g @ P @ g, y @ P @ y, d @ y, d @ h, d @ g, d @ inverse @ d)
        found = _FORMULAS[beta](Products(*map(float, numbers)))
        expected = float(plain_beta(beta, g, h, d, P, inverse))
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)
        share = {"hager_zhang": 0.4 * d @ g, "dai_kou": 0.5 * d @ h}.get(beta)
        lowest = 0.0 if share is None else float(share / (d @ inverse @ d))
        bounds += found == pytest.approx(lowest, rel=1e-12, abs=1e-15)
    unbounded = ("fletcher_reeves", "dai_yuan", "fletcher_reeves_polak_ribiere")
    assert (bounds == 0) == (beta in unbounded)


class Plain:
    """Nonlinear conjugate gradients with dense matrices, for given steps."""

    def __init__(self, beta: str, restart: float | None, P: Tensor) -> None:
        self.beta, self.restart, self.P, self.inverse = beta, restart, P, torch.linalg.inv(P)
        self.restarts = 0
        self.base: tuple[Tensor, Tensor] | None = None

    def direction(self, g: Tensor, h: Tensor, d: Tensor, s: Tensor, fresh: bool) -> Tensor:
        """The next direction, after a step `s` along `d` that was the first one if `fresh`."""
        y, shanno = h - g, self.beta == "shanno"
        metric = torch.eye(len(h), dtype=h.dtype) if shanno else self.P
        far = self.restart is not None and (h @ metric @ g).abs() >= self.restart * (h @ metric @ h)
        if not shanno:
            self.restarts += bool(far)
            if far:
                return -self.P @ h
            return -self.P @ h + plain_beta(self.beta, g, h, d, self.P, self.inverse) * d
        if far or self.base is None:
            self.restarts += bool(far) and not fresh
            self.base = s, y
        first_s, first_y = self.base
        scale = (first_s @ first_y) / (first_y @ self.P @ first_y)
        H = updated(updated(scale * self.P, first_s, first_y), s, y)
        return -H @ h


def bowl(size: int) -> Callable[[Tensor], Tensor]:
    """A convex function that is no quadratic."""
    basis = rotation(size, 5)
    scales = torch.logspace(0, 1, size, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        inside = basis @ x - 1.0
        return (scales * torch.logaddexp(inside, -inside)).sum() + 0.1 * (inside**4).sum()

    return function


@each_beta
@pytest.mark.parametrize("restart", [None, 0.2])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_directions_are_those_of_the_plain_formulas(
    beta: BetaName, restart: float | None, preconditioned: bool
) -> None:
    n, iterations = 30, 24
    function = bowl(n)
    P = torch.eye(n, dtype=torch.float64)
    if preconditioned:
        basis = rotation(n, 7)
        P = (basis * torch.linspace(0.5, 2.0, n, dtype=torch.float64)) @ basis.T
    x = nn.Parameter(torch.linspace(-2.0, 3.0, n, dtype=torch.float64))
    optimizer = NonlinearCG(
        [x],
        max_iter=1,
        beta=beta,
        restart=restart,
        preconditioner=Dense(P) if preconditioned else None,
        line_search_fn=Exact(0.9),  # not quite at the minimum: the formulas differ
        tolerance_grad=0.0,
    )
    closure = standard(optimizer, lambda: function(x))
    plain = Plain(beta, restart, P)
    at, restarts = x.detach().clone(), 0
    g = gradient_of(function, at)
    d, fresh = -P @ g, True
    for count in range(iterations):
        optimizer.step(closure)
        assert optimizer.info is not None
        assert optimizer.info.iterations == 1
        restarts += optimizer.info.restarts
        # The length of the step is the optimizer's, its direction is that of the formula.
        t = (x.detach() - at).norm() / d.norm()
        s = t * d
        assert (x.detach() - at - s).norm() < 1e-12 * at.norm(), count
        assert g @ s < 0
        at = at + s
        h = gradient_of(function, at)
        g, d, fresh = h, plain.direction(g, h, d, s, fresh), False
    assert h.norm() > 1e-10  # it was still under way
    assert abs(restarts - plain.restarts) <= 1  # the last direction has not been asked for
    if restart is None:
        assert restarts == 0


@each_beta
def test_beta_is_reported(beta: BetaName) -> None:
    """On a quadratic all formulas are equal, after the second direction also in scale."""
    matrix, b = quadratic(6)
    x = nn.Parameter(torch.zeros_like(b))
    optimizer = NonlinearCG(
        [x], max_iter=1, beta=beta, line_search_fn=Exact(), restart=None, tolerance_grad=0.0
    )
    closure = standard(optimizer, lambda: 0.5 * x @ (matrix @ x) - b @ x)
    gradients = []
    for _ in range(3):
        gradients.append(matrix @ x.detach() - b)
        optimizer.step(closure)
        assert optimizer.info is not None
        if len(gradients) == 1:
            assert optimizer.info.beta == 0.0
    *_, g, h = gradients
    if beta != "shanno":  # its directions have another length
        assert optimizer.info.beta == pytest.approx(float(h @ h / (g @ g)), rel=1e-9)
    assert optimizer.info.beta > 0.0


# Restarts.


def test_gradients_that_are_not_orthogonal_restart() -> None:
    """After steps that are much too short, successive gradients are nearly the same."""
    matrix, b = quadratic(8)
    for restart, expected in ((0.2, 5), (None, 0)):
        x = nn.Parameter(torch.zeros_like(b))
        optimizer = NonlinearCG(
            [x],
            max_iter=6,
            beta="polak_ribiere",
            restart=restart,
            line_search_fn=Exact(0.1),
            tolerance_grad=0.0,
        )
        optimizer.step(standard(optimizer, lambda x=x: 0.5 * x @ (matrix @ x) - b @ x))
        assert optimizer.info is not None
        assert optimizer.info.restarts == expected
        reason = "successive gradients were far from orthogonal" if restart else ""
        assert optimizer.info.restart_reason == reason


@each_beta
def test_a_step_without_curvature_restarts(beta: BetaName) -> None:
    """Steps without a search cross from where the function is convex to where it is not."""
    x = start_at(-0.7)
    optimizer = NonlinearCG([x], lr=1.6, max_iter=6, beta=beta, line_search_fn=None, restart=None)
    optimizer.step(standard(optimizer, lambda: (0.5 * torch.sin(2 * x) - x).sum()))
    assert optimizer.info is not None
    assert optimizer.info.restarts > 0
    assert optimizer.info.restart_reason == "the last step showed no curvature"


def test_a_search_in_vain_restarts() -> None:
    class Fails:
        """Fails once, in the third search."""

        count = 0

        def __call__(self, phi: Phi, start: Trial, t0: float, *, precision: float) -> SearchResult:
            self.count += 1
            if self.count == 3:
                return SearchResult(start, SearchStatus.NO_DECREASE, 0, 0)
            return StrongWolfe(c2=0.1)(phi, start, t0, precision=precision)

    x = start_at(-1.2, 1.0)
    optimizer = NonlinearCG([x], max_iter=200, line_search_fn=Fails(), restart=None)
    optimizer.step(standard(optimizer, lambda: rosenbrock(x)))
    assert optimizer.info is not None
    assert optimizer.info.status is StepStatus.CONVERGED_GRADIENT
    assert optimizer.info.restarts == 1
    assert optimizer.info.restart_reason == "the line search ended with NO_DECREASE"


def test_a_direction_of_ascent_restarts() -> None:
    """Without a search, steps that are too long make directions that point uphill."""
    x = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    scales = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    optimizer = NonlinearCG(
        [x], lr=0.015, max_iter=30, beta="fletcher_reeves", line_search_fn=None, restart=None
    )
    optimizer.step(standard(optimizer, lambda: 0.5 * (scales * x * x).sum()))
    assert optimizer.info is not None
    assert optimizer.info.restarts > 0
    assert optimizer.info.restart_reason == "the history gave a direction of ascent"
    assert torch.isfinite(x).all()


# Line searches and first steps.


def test_searches_by_name_are_sharper_than_elsewhere() -> None:
    x = start_at(1.0)
    assert NonlinearCG([x]).line_search == StrongWolfe(c2=0.3)
    assert NonlinearCG([x], beta="dai_yuan").line_search == StrongWolfe(c2=0.1)
    named = NonlinearCG([x], beta="hager_zhang", line_search_fn="hager_zhang")
    assert named.line_search == HagerZhang(sigma=0.1)
    assert NonlinearCG([x], line_search_fn="armijo").line_search == Armijo()
    given = StrongWolfe(c2=0.5)
    assert NonlinearCG([x], line_search_fn=given).line_search is given


@each_beta
def test_lr_multiplies_the_first_steps(beta: BetaName) -> None:
    matrix, b = quadratic(5)
    firsts = []
    for lr in (1.0, 0.5):
        x = nn.Parameter(torch.zeros_like(b))
        search = Exact()
        optimizer = NonlinearCG([x], lr=lr, max_iter=4, beta=beta, line_search_fn=search)
        optimizer.step(standard(optimizer, lambda x=x: 0.5 * x @ (matrix @ x) - b @ x))
        firsts.append(search.firsts)
    torch.testing.assert_close(torch.tensor(firsts[0]), 2 * torch.tensor(firsts[1]))


@each_beta
def test_first_steps_follow_from_the_last_ones(beta: BetaName) -> None:
    """The same first-order change as in the last step; with Shanno's method at most one."""
    matrix, b = quadratic(9)
    share = 0.4 if beta == "shanno" else 1.0
    x, search = nn.Parameter(torch.zeros_like(b)), Exact(share)
    optimizer = NonlinearCG([x], max_iter=7, beta=beta, line_search_fn=search, restart=None)
    optimizer.step(standard(optimizer, lambda: 0.5 * x @ (matrix @ x) - b @ x))
    assert search.firsts[0] == 1.0
    most = 1.0 if beta == "shanno" else float("inf")
    changes = [t * slope for t, slope in zip(search.steps, search.slopes, strict=True)]
    expected = [
        min(most, change / slope) for change, slope in zip(changes, search.slopes[1:], strict=False)
    ]
    assert search.firsts[1:] == pytest.approx(expected, rel=1e-9)
    if beta == "shanno":
        assert min(expected) < 1.0


def test_the_first_step_after_a_restart_is_between_two_guesses() -> None:
    """By the curvature of the last step, and by the minimum along it."""
    matrix, b = quadratic(9)
    x, search = nn.Parameter(torch.zeros_like(b)), Exact(0.1)
    optimizer = NonlinearCG([x], max_iter=2, beta="polak_ribiere", line_search_fn=search)
    optimizer.step(standard(optimizer, lambda: 0.5 * x @ (matrix @ x) - b @ x))
    assert optimizer.info is not None
    assert optimizer.info.restarts == 1
    unit = search.slopes[0] / -float(b @ b)  # directions are that multiple of the gradient
    y = search.steps[0] * unit * (matrix @ b)
    of_curvature = float(search.steps[0] * b @ y / (y @ y))
    of_minimum = search.steps[0] / 0.1 * search.slopes[0] / search.slopes[1]
    assert of_curvature < 0.9 * of_minimum
    assert search.firsts[1] == pytest.approx((of_curvature * of_minimum) ** 0.5, rel=1e-9)


@pytest.mark.parametrize("beta", ["hager_zhang", "polak_ribiere"])
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("search", [Exact(0.9), None])
def test_the_bounds_know_the_length_of_the_direction(
    beta: BetaName, preconditioned: bool, search: Any
) -> None:
    """`d'P^-1 d` by recurrence; without a preconditioner `P` is a number."""
    matrix, b = quadratic(9)
    weights = torch.linspace(1, 3, 9, dtype=torch.float64)
    x = nn.Parameter(torch.zeros_like(b))
    optimizer = NonlinearCG(
        [x],
        lr=1.0 if search else 0.02,
        max_iter=5,
        beta=beta,
        restart=0.2 if search else None,
        line_search_fn=search,
        preconditioner=Diagonal(weights) if preconditioned else None,
    )
    optimizer.step(standard(optimizer, lambda: 0.5 * x @ (matrix @ x) - b @ x))
    d = optimizer._direction_before
    assert d is not None
    P = weights if preconditioned else optimizer._unit
    assert optimizer._square == pytest.approx(float((d * d / P).sum()), rel=1e-10)


def test_first_steps_are_of_the_scale_of_the_last_ones() -> None:
    """In other units of the loss, the searches see the same numbers."""
    matrix, b = quadratic(10)
    for beta in BETAS:
        evaluations = []
        for unit in (1.0, 1e-6, 1e6):
            function = lambda x, unit=unit: unit * (0.5 * x @ (matrix @ x) - b @ x)  # noqa: E731
            _, info = minimized(
                function, torch.zeros_like(b), beta=beta, max_iter=8, tolerance_grad=0.0
            )
            evaluations.append(info.evaluations)
        assert max(evaluations) <= min(evaluations) + 2, beta


def test_steps_without_a_search_have_length_lr() -> None:
    matrix, b = quadratic(6)
    for beta in BETAS:
        _, info = minimized(
            lambda x: 0.5 * x @ (matrix @ x) - b @ x,
            torch.zeros_like(b),
            beta=beta,
            lr=1e-3,
            max_iter=7,
            line_search_fn=None,
        )
        assert info.evaluations == 8
        assert info.step_length == 1e-3
        assert info.search_status is SearchStatus.FIXED


def test_evaluations_are_bounded() -> None:
    matrix, b = quadratic(9)
    exact = Exact()

    def wasteful(phi: Phi, start: Trial, t0: float, *, precision: float) -> SearchResult:
        """Five evaluations."""
        for _ in range(3):
            phi(t0)
        return exact(phi, start, t0, precision=precision)

    for bounds, iterations in (({}, 2), ({"max_eval": 15}, 3)):  # ten by default
        x = nn.Parameter(torch.zeros_like(b))
        optimizer = NonlinearCG([x], max_iter=4, line_search_fn=wasteful, **bounds)
        optimizer.step(standard(optimizer, lambda x=x: 0.5 * x @ (matrix @ x) - b @ x))
        assert optimizer.info is not None
        assert optimizer.info.status is StepStatus.MAX_EVALUATIONS
        assert optimizer.info.iterations == iterations
        assert optimizer.info.evaluations == 1 + 5 * iterations


def test_a_direction_takes_two_synchronizations(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []
    to_host = space.Space.to_host

    def counted(self: Any, *args: Any, **kwargs: Any) -> list[float]:
        waits.append(1)
        return to_host(self, *args, **kwargs)

    monkeypatch.setattr(space.Space, "to_host", counted)
    for beta in BETAS:
        counts = []
        for iterations in (4, 12):
            waits.clear()
            matrix, b = quadratic(30)
            _, info = minimized(
                lambda x, matrix=matrix, b=b: 0.5 * x @ (matrix @ x) - b @ x,
                torch.zeros_like(b),
                beta=beta,
                max_iter=iterations,
                tolerance_grad=0.0,
            )
            assert info.iterations == iterations
            counts.append(len(waits) - info.evaluations)
        assert counts[1] - counts[0] == 2 * 8, beta


# The classical problems.


@pytest.mark.parametrize("name", [p.name for p in make_problems()])
def test_solves_classical_problems(name: str, device: torch.device) -> None:
    if name == "ill_conditioned_quadratic":
        pytest.skip("a test of its own")
    (problem,) = [p for p in make_problems(device) if p.name == name]
    x, info = minimized(problem.function, problem.start, max_iter=5_000, tolerance_grad=1e-6)
    assert info.status is StepStatus.CONVERGED_GRADIENT, info
    assert gradient_of(problem.function, x).abs().max() <= 1e-6
    assert problem.is_minimum(float(problem.function(x)))


@each_beta
def test_all_formulas_solve_some_classical_problems(beta: BetaName) -> None:
    for problem in make_problems():
        if problem.name in ("rosenbrock", "wood", "trigonometric", "broyden_tridiagonal"):
            _, info = minimized(
                problem.function, problem.start, beta=beta, max_iter=500, tolerance_grad=1e-6
            )
            assert info.status is StepStatus.CONVERGED_GRADIENT, (problem.name, info)


@pytest.mark.slow
def test_solves_an_ill_conditioned_quadratic() -> None:
    (problem,) = [p for p in make_problems() if p.name == "ill_conditioned_quadratic"]
    _, info = minimized(problem.function, problem.start, max_iter=50_000, tolerance_grad=1e-6)
    assert info.status is StepStatus.CONVERGED_GRADIENT


@pytest.mark.slow
def test_solves_problems_with_negative_curvature() -> None:
    for problem in NONCONVEX:
        _, info = minimized(problem.function, problem.start, max_iter=5_000, tolerance_grad=1e-6)
        assert info.status is StepStatus.CONVERGED_GRADIENT, problem.name


@pytest.mark.parametrize("beta", ["shanno", "hager_zhang"])
@pytest.mark.parametrize("search", [*SEARCHES, StrongWolfe(c2=0.01), None])
def test_any_search_makes_progress(beta: BetaName, search: Any) -> None:
    x = start_at(-1.2, 1.0)
    lr = 1.0 if search is not None else 0.5 if beta == "shanno" else 1e-3
    optimizer = NonlinearCG([x], lr=lr, max_iter=30, beta=beta, line_search_fn=search)
    before = optimizer.step(standard(optimizer, lambda: rosenbrock(x)))
    assert optimizer.info is not None
    assert rosenbrock(x) < 0.2 * before


@each_beta
def test_float32_comes_to_its_precision(beta: BetaName, device: torch.device) -> None:
    matrix, b = (tensor.to(device, torch.float32) for tensor in quadratic(20))
    x, _ = minimized(
        lambda x: 0.5 * x @ (matrix @ x) - b @ x, torch.zeros_like(b), beta=beta, max_iter=300
    )
    solution = torch.linalg.solve(matrix.double(), b.double())
    assert (x.double() - solution).norm() < 1e-3 * solution.norm()
    assert torch.isfinite(x).all()


@each_beta
def test_tiny_and_huge_numbers_in_float32(beta: BetaName) -> None:
    """Where squares of gradients leave the range, steps are still taken."""
    matrix, b = (tensor.float() for tensor in quadratic(8))
    for unit in (1e-24, 1e-18, 1e18, 1e24):
        x, info = minimized(
            lambda x, unit=unit: unit * (0.5 * x @ (matrix @ x) - b @ x),
            torch.zeros_like(b),
            beta=beta,
            max_iter=40,
            tolerance_grad=0.0,
        )
        assert torch.isfinite(x).all()
        gap = float(0.5 * x @ (matrix @ x) - b @ x + 0.5 * b @ torch.linalg.solve(matrix, b))
        assert gap < 1e-3 * float(b @ b), (unit, info)


def test_long_vectors_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long vectors do not keep differences of gradients with each trial."""
    function = bowl(12)
    start = torch.linspace(-2.0, 3.0, 12, dtype=torch.float64)
    for beta in ("shanno", "hager_zhang"):
        short, _ = minimized(function, start, beta=beta, max_iter=8)
        with monkeypatch.context() as patch:
            patch.setattr(vector, "SHORT", 5)
            long, _ = minimized(function, start, beta=beta, max_iter=8)
        torch.testing.assert_close(short, long, rtol=1e-9, atol=1e-9)


# Preconditioners.


def test_preconditioners_of_all_kinds_give_the_same() -> None:
    matrix, b = quadratic(9)
    weights = 1 / matrix.diagonal()
    of_kinds = [
        path(matrix, b, 5, share=0.9, preconditioner=P)[-1]
        for P in (Diagonal(weights), lambda v: v * weights, Dense(torch.diag(weights)))
    ]
    for other in of_kinds[1:]:
        torch.testing.assert_close(of_kinds[0], other, rtol=1e-12, atol=1e-12)


@each_beta
def test_a_preconditioner_may_return_its_argument(beta: BetaName) -> None:
    matrix, b = quadratic(9)
    same = path(matrix, b, 6, share=0.9, beta=beta, preconditioner=lambda v: v)
    plain = path(matrix, b, 6, share=0.9, beta=beta)
    torch.testing.assert_close(same[-1], plain[-1], rtol=1e-10, atol=1e-10)


@each_beta
def test_what_a_preconditioner_returns_is_not_changed(beta: BetaName) -> None:
    matrix, b = quadratic(9)
    returned: list[tuple[Tensor, Tensor]] = []

    def preconditioner(v: Tensor) -> Tensor:
        product = 2.0 * v
        returned.append((product, product.clone()))
        return product

    path(matrix, b, 6, share=0.9, beta=beta, preconditioner=preconditioner)
    assert len(returned) > 6
    for product, copied in returned:
        assert torch.equal(product, copied)


@each_beta
def test_a_good_preconditioner_saves_evaluations(beta: BetaName) -> None:
    n = 20
    scales = torch.logspace(0, 4, n, dtype=torch.float64)
    start = torch.ones(n, dtype=torch.float64) / scales.sqrt()
    function = lambda x: 0.5 * (scales * x * x).sum() + 0.1 * (scales**2 * x**4).sum()  # noqa: E731
    evaluations = []
    for P in (None, Diagonal(7.0 / scales)):  # of another scale than the inverse Hessian
        _, info = minimized(
            function, start, beta=beta, preconditioner=P, max_iter=1000, tolerance_grad=1e-4
        )
        evaluations.append(info.evaluations)
    assert evaluations[1] < 0.4 * evaluations[0]


@each_beta
def test_learning_rates_of_groups_are_a_preconditioner(beta: BetaName) -> None:
    """Steps are those in other units of the parameters."""
    n = 6
    matrix, b = quadratic(n)
    rates = torch.tensor([1.0] * 3 + [0.25] * 3, dtype=torch.float64)
    first, second = (nn.Parameter(part) for part in torch.zeros(2, 3, dtype=torch.float64))
    groups = [{"params": [first]}, {"params": [second], "lr": 0.25}]
    optimizer = NonlinearCG(groups, max_iter=4, beta=beta, line_search_fn=Exact(0.9))

    def loss() -> Tensor:
        x = torch.cat([first, second])
        return 0.5 * x @ (matrix @ x) - b @ x

    optimizer.step(standard(optimizer, loss))
    found = torch.cat([first, second]).detach()
    scaled = matrix * torch.outer(rates.sqrt(), rates.sqrt())
    expected = rates.sqrt() * path(scaled, b * rates.sqrt(), 4, share=0.9, beta=beta)[-1]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# Several steps, checkpoints.


@each_beta
def test_one_step_of_many_iterations_is_many_steps_of_one(beta: BetaName) -> None:
    function = bowl(8)
    start = torch.linspace(-2.0, 3.0, 8, dtype=torch.float64)
    once, _ = minimized(function, start, beta=beta, max_iter=9)
    x = nn.Parameter(start.clone())
    optimizer = NonlinearCG([x], max_iter=1, beta=beta)
    for _ in range(9):
        optimizer.step(standard(optimizer, lambda: function(x)))
    assert torch.equal(once, x.detach())


@each_beta
def test_training_goes_on_bit_for_bit_from_a_checkpoint(beta: BetaName) -> None:
    function = bowl(8)
    start = torch.linspace(-2.0, 3.0, 8, dtype=torch.float64)

    def make(values: Tensor) -> tuple[nn.Parameter, NonlinearCG]:
        x = nn.Parameter(values.clone())
        return x, NonlinearCG([x], max_iter=2, beta=beta)

    x, optimizer = make(start)
    for steps in range(4):
        file = io.BytesIO()
        torch.save({"x": x.detach(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        other, loaded = make(saved["x"])
        loaded.load_state_dict(saved["optimizer"])
        again = copy.deepcopy(optimizer)
        third = again.param_groups[0]["params"][0]
        for p, of in ((x, optimizer), (other, loaded), (third, again)):
            for _ in range(3):
                of.step(standard(of, lambda p=p: function(p)))
        assert torch.equal(x, other), steps
        assert torch.equal(x, third), steps


def test_another_function_in_each_step() -> None:
    """Mini-batches: pairs stay those of one function, and the loss falls."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(64, 5, dtype=torch.float64, generator=generator)
    target = data @ torch.arange(5.0, dtype=torch.float64)
    for beta in BETAS:
        x = nn.Parameter(torch.zeros(5, dtype=torch.float64))
        optimizer = NonlinearCG([x], max_iter=2, beta=beta)
        for step in range(12):
            part = slice(16 * (step % 4), 16 * (step % 4) + 16)
            optimizer.step(
                standard(optimizer, lambda x=x, p=part: (data[p] @ x - target[p]).square().mean())
            )
        assert (data @ x - target).square().mean() < 1e-2, beta


def test_a_pure_function() -> None:
    x = start_at(-1.2, 1.0)
    optimizer = NonlinearCG([x], max_iter=100)
    optimizer.step(FunctionalObjective(rosenbrock, x))
    assert optimizer.info is not None
    assert optimizer.info.status is StepStatus.CONVERGED_GRADIENT


# Wrong arguments.


def test_wrong_arguments_are_refused() -> None:
    x = start_at(1.0, 2.0)
    with pytest.raises(ValueError, match="beta must be one of 'shanno', 'hager_zhang'"):
        NonlinearCG([x], beta="newton")  # type: ignore[arg-type]
    for restart in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="restart must be a finite number above 0 or None"):
            NonlinearCG([x], restart=restart)
    with pytest.raises(TypeError, match="preconditioner must be callable, got str"):
        NonlinearCG([x], preconditioner="kfac")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="line_search_fn must be one of"):
        NonlinearCG([x], line_search_fn="newton")  # type: ignore[arg-type]
    optimizer = NonlinearCG([x])
    optimizer.param_groups[0]["restart"] = 0
    with pytest.raises(ValueError, match="restart must be"):
        optimizer.step(standard(optimizer, lambda: x.square().sum()))
    assert x.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("beta", ["shanno", "dai_kou"])
def test_wrong_preconditioners_are_refused(beta: BetaName) -> None:
    wrong: list[tuple[Any, str]] = [
        (lambda v: v[:1], r"must return a tensor of shape \(2,\), got \(1,\)"),
        (lambda v: 3.0, r"must return a tensor of shape \(2,\), got float"),
        (lambda v: -v, "the preconditioner is not positive definite: g'P g is -"),
        (lambda v: v * float("nan"), "the preconditioner returned numbers that are not finite"),
    ]
    for preconditioner, message in wrong:
        x = start_at(1.0, 2.0)
        optimizer = NonlinearCG([x], beta=beta, preconditioner=preconditioner)
        with pytest.raises(ValueError, match=message):
            optimizer.step(standard(optimizer, lambda x=x: x.square().sum()))
        assert x.tolist() == [1.0, 2.0]


@each_beta
def test_a_preconditioner_that_is_indefinite_later_is_refused(beta: BetaName) -> None:
    """It shows along the change of the gradient; the parameters go back to the step's start."""
    scales = torch.tensor([1.0, 30.0], dtype=torch.float64)
    P = torch.tensor([1.0, -0.2], dtype=torch.float64)
    x = start_at(60.0, 1.0)
    optimizer = NonlinearCG([x], max_iter=5, beta=beta, preconditioner=lambda v: P * v)
    optimizer.param_groups[0]["tolerance_grad"] = 0.0
    with pytest.raises(ValueError, match=r"the preconditioner is not positive definite: [gy]'P"):
        optimizer.step(standard(optimizer, lambda: 0.5 * (scales * x * x).sum()))
    assert x.tolist() == [60.0, 1.0]


def test_states_of_other_optimizers_are_refused() -> None:
    x = start_at(1.0)
    with pytest.raises(ValueError, match=r"no state of NonlinearCG.*lack 'restart'"):
        NonlinearCG([x]).load_state_dict(LBFGS([x]).state_dict())


def test_the_report_prints() -> None:
    _, info = minimized(bowl(4), torch.ones(4, dtype=torch.float64), max_iter=3)
    text = str(info)
    assert text.startswith("NonlinearCGInfo")
    assert "restarts" in text
    assert set(info.as_dict()) >= {"beta", "restarts", "restart_reason"}
