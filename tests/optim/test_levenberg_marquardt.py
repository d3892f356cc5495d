"""The method of Levenberg and Marquardt."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.closures import closure_of, standard, start_at
from tests.support.residual_problems import (
    RESIDUAL_PROBLEMS,
    RESIDUAL_PROBLEMS_BY_NAME,
    ResidualProblem,
)
from torch_secondorder import (
    DatasetClosure,
    FunctionalObjective,
    LevenbergMarquardt,
    LevenbergMarquardtInfo,
    StepStatus,
    mark_outputs,
)
from torch_secondorder._foundation import memory
from torch_secondorder._foundation.memory import TooLarge
from torch_secondorder.globalization import (
    Armijo,
    MarquardtDamping,
    NielsenDamping,
    SearchStatus,
)

SOLVERS = ["primal", "dual", "cg"]
SCALINGS = ["identity", "marquardt", "more"]
#: The method of the textbook.
PLAIN: dict[str, Any] = {"scaling": "identity", "acceleration": None}
each_solver = pytest.mark.parametrize("solver", SOLVERS)


class Fit:
    """A small network fitted to data; its residuals are one for each sample and output."""

    def __init__(self, samples: int = 20, device: torch.device | str = "cpu") -> None:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(samples, 2, generator=generator).double()
        self.x = x.to(device)
        self.y = torch.stack((x.prod(1), torch.sin(x.sum(1))), 1).to(device)
        torch.manual_seed(2)
        self.model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
        self.model.to(device, torch.float64)

    @property
    def params(self) -> list[Tensor]:
        return list(self.model.parameters())

    def loss(self) -> Tensor:
        return F.mse_loss(self.model(self.x), self.y)

    def values(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.params])

    def train(self, steps: int = 1, **arguments: Any) -> LevenbergMarquardt:
        optimizer = LevenbergMarquardt(self.params, **(PLAIN | arguments))
        for _ in range(steps):
            optimizer.step(standard(optimizer, self.loss))
        return optimizer

    def residuals_and_jacobian(self) -> tuple[Tensor, Tensor]:
        """`r` and `J` with the loss `|r|^2 / 2`, by `torch.func`."""
        names = [name for name, _ in self.model.named_parameters()]

        def residuals(*params: Tensor) -> Tensor:
            values = dict(zip(names, params, strict=True))
            z = torch.func.functional_call(self.model, values, self.x)
            return ((z - self.y) * math.sqrt(2.0 / self.y.numel())).reshape(-1)

        params = tuple(p.detach() for p in self.params)
        blocks = torch.func.jacrev(residuals, argnums=tuple(range(len(params))))(*params)
        return residuals(*params), torch.cat([b.reshape(len(b), -1) for b in blocks], 1)


def solve(
    problem: ResidualProblem, start: Tensor | None = None, **arguments: Any
) -> tuple[LevenbergMarquardt, Tensor]:
    """Solves a problem in one step."""
    x = (problem.start if start is None else start).clone().requires_grad_()
    options = {"max_iter": 500, "tolerance_grad": 1e-9, "tolerance_change": 1e-14} | arguments
    optimizer = LevenbergMarquardt([x], **options)
    optimizer.step(standard(optimizer, lambda: squares(problem.residuals(x))))
    return optimizer, x


def squares(r: Tensor) -> Tensor:
    return mark_outputs(r).square().sum()


def info_of(optimizer: LevenbergMarquardt) -> LevenbergMarquardtInfo:
    assert optimizer.info is not None
    return optimizer.info


# Steps against the formulas.


@pytest.mark.parametrize("scaling", SCALINGS)
@each_solver
def test_a_step_is_that_of_the_formula(
    solver: Any, scaling: Any, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr("torch_secondorder.solvers.damped_least_squares._Iterative.tolerance", 0.0)
    fit = Fit(device=device)
    before = fit.values()
    r, J = fit.residuals_and_jacobian()
    normal = J.T @ J
    D = torch.eye(len(normal)).to(J) if scaling == "identity" else torch.diag(normal.diagonal())
    expected = before - torch.linalg.solve(normal + 0.7 * D, J.T @ r)
    optimizer = fit.train(damping=0.7, solver=solver, scaling=scaling)
    torch.testing.assert_close(fit.values(), expected, rtol=1e-7, atol=1e-9)
    info = info_of(optimizer)
    assert (info.solver, info.rows, info.jacobians, info.rejected) == (solver, 40, 1, 0)
    assert (info.iterations, info.evaluations) == (1, 2)
    assert info.solver_iterations > 0 if solver == "cg" else info.solver_iterations == 0


@pytest.mark.parametrize("scaling", SCALINGS)
def test_solvers_take_the_same_way(scaling: Any) -> None:
    found = []
    for solver in ("primal", "dual"):
        fit = Fit()
        fit.train(4, solver=solver, scaling=scaling, damping="nielsen")
        found.append(fit.values())
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)


def test_moré_scales_by_the_largest_so_far() -> None:
    fit = Fit()
    optimizer = LevenbergMarquardt(fit.params, scaling="more", damping=2.0, acceleration=None)
    largest = torch.zeros(len(fit.values())).double()
    for _ in range(3):
        before, damping = fit.values(), optimizer._damping or 2.0
        r, J = fit.residuals_and_jacobian()
        largest = torch.maximum(largest, J.square().sum(0))
        optimizer.step(standard(optimizer, fit.loss))
        assert info_of(optimizer).rejected == 0
        step = -torch.linalg.solve(J.T @ J + damping * torch.diag(largest), J.T @ r)
        torch.testing.assert_close(fit.values(), before + step, rtol=1e-7, atol=1e-9)


def test_groups_and_weight_decay(device: torch.device) -> None:
    """Weight decay is part of the matrix; a smaller rate shrinks its part of the metric."""
    fit = Fit(device=device)
    before = fit.values()
    r, J = fit.residuals_and_jacobian()
    rates = torch.cat(
        [torch.full((p.numel(),), 1.0 if i else 0.25) for i, p in enumerate(fit.params)]
    )
    scale = rates.double().sqrt().to(device)
    decay = 0.3 * torch.ones_like(before)
    normal = torch.diag(scale) @ (J.T @ J + torch.diag(decay)) @ torch.diag(scale)
    step = -torch.linalg.solve(
        normal + 0.5 * torch.eye(len(normal)).to(J), scale * (J.T @ r + decay * before)
    )
    groups = [{"params": fit.params[:1], "lr": 0.25}, {"params": fit.params[1:]}]
    optimizer = LevenbergMarquardt(groups, damping=0.5, weight_decay=0.3, **PLAIN)
    optimizer.step(standard(optimizer, fit.loss))
    torch.testing.assert_close(fit.values(), before + scale * step, rtol=1e-8, atol=1e-10)


# Momentum and mini-batches.


@pytest.mark.parametrize("solver", ["primal", "dual"])
def test_momentum_is_that_of_spring(solver: Any) -> None:
    fit = Fit(samples=6)  # 12 residuals, 22 parameters
    optimizer = LevenbergMarquardt(
        fit.params, 0.4, 0.05, solver=solver, momentum=0.9, globalization=None
    )
    phi = torch.zeros(len(fit.values())).double()
    for _ in range(4):
        before = fit.values()
        r, J = fit.residuals_and_jacobian()
        kernel = J @ J.T + 0.05 * torch.eye(len(J)).double()
        phi = 0.9 * phi + J.T @ torch.linalg.solve(kernel, -r - 0.9 * J @ phi)
        optimizer.step(standard(optimizer, fit.loss))
        torch.testing.assert_close(fit.values(), before + 0.4 * phi, rtol=1e-8, atol=1e-9)
        info = info_of(optimizer)
        assert (info.evaluations, info.iterations, info.status) == (1, 1, StepStatus.MOVED)
        assert (info.step_length, info.loss_after) == (0.4, None)


def test_steps_without_a_search_and_several_iterations() -> None:
    """The last point is not evaluated."""
    one, other = Fit(), Fit()
    arguments = {"damping": 0.1, "globalization": None, "lr": 0.5}
    optimizer = one.train(1, max_iter=3, **arguments)
    assert (info_of(optimizer).evaluations, info_of(optimizer).iterations) == (3, 3)
    other.train(3, **arguments)
    torch.testing.assert_close(one.values(), other.values(), rtol=1e-12, atol=1e-14)


def test_a_step_that_leads_where_nothing_is_finite_is_taken_back() -> None:
    x = start_at(0.5)
    optimizer = LevenbergMarquardt([x], 1e6, 1e-3, max_iter=2, globalization=None)
    optimizer.step(standard(optimizer, lambda: squares(torch.log(x) + 5.0)))
    info = info_of(optimizer)
    assert (info.status, info.nonfinite_trials) == (StepStatus.NONFINITE_TRIALS, 1)
    assert x.item() == 0.5


@pytest.mark.parametrize("search", ["armijo", "strong_wolfe", Armijo(c1=0.1)])
def test_a_line_search_on_the_damped_direction(search: Any) -> None:
    fit = Fit()
    before = fit.loss().item()
    optimizer = fit.train(25, globalization=search, damping=1e-2)
    info = info_of(optimizer)
    assert isinstance(info.search_status, SearchStatus)
    assert info.search_status.accepted
    assert info.damping == 1e-2
    assert fit.loss().item() < 0.05 * before


def test_a_constant_damping_is_a_share_of_the_first_curvature() -> None:
    fit = Fit()
    _, J = fit.residuals_and_jacobian()
    largest = float(J.square().sum(0).max())
    optimizer = fit.train(2, globalization="armijo")
    assert info_of(optimizer).damping == pytest.approx(1e-3 * largest)


def test_momentum_that_leads_uphill_is_left_out() -> None:
    fit = Fit()
    optimizer = LevenbergMarquardt(fit.params, momentum=0.9, damping=10.0)
    optimizer.step(standard(optimizer, fit.loss))
    optimizer._direction = 1e3 * torch.ones_like(fit.values())
    before = fit.loss().item()
    optimizer.step(standard(optimizer, fit.loss))
    assert fit.loss().item() < before


def test_momentum_is_left_out_after_a_rejected_step() -> None:
    """A large damping would lead back to it, whatever the loss there."""
    x = start_at(0.0)
    optimizer = LevenbergMarquardt([x], damping=1.0, momentum=0.9)
    optimizer._damping = optimizer._start = 1.0
    optimizer._direction = torch.ones(1).double()
    optimizer.step(standard(optimizer, lambda: squares(x - 1.0 + 50.0 * x**3)))
    info = info_of(optimizer)
    assert info.rejected >= 1
    assert info.iterations == 1
    assert info.loss_after < info.loss


# Problems.


@pytest.mark.parametrize("problem", RESIDUAL_PROBLEMS, ids=lambda problem: problem.name)
def test_the_classical_problems(problem: ResidualProblem) -> None:
    for start in problem.starts[:1]:
        optimizer, x = solve(problem, start)
        info = info_of(optimizer)
        assert info.status.name.startswith("CONVERGED") or info.status is StepStatus.STALLED
        value = float(problem.residuals(x.detach()).square().sum())
        assert info.loss_after == pytest.approx(value)
        assert problem.is_minimum(value)
        assert info.iterations <= info.jacobians <= info.iterations + 1
        tries = info.iterations + info.rejected
        assert tries < info.evaluations <= 2 * tries + 1


@pytest.mark.parametrize("name", ["rosenbrock", "bard", "kowalik_osborne", "powell_singular"])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("damping", ["nielsen", "marquardt"])
@pytest.mark.parametrize("solver", ["primal", "dual", "cg"])
def test_each_way_solves(name: str, scaling: Any, damping: Any, solver: Any) -> None:
    problem = RESIDUAL_PROBLEMS_BY_NAME[name]
    optimizer, _ = solve(problem, scaling=scaling, damping=damping, solver=solver)
    assert problem.is_minimum(info_of(optimizer).loss_after or 0.0)


@pytest.mark.parametrize("scaling", ["identity", "more"])
def test_geodesic_acceleration_saves_jacobians_on_a_differential_equation(scaling: Any) -> None:
    """Where residuals bend much more than they grow."""
    plain, geodesic, auto = (
        poisson(acceleration=acceleration, scaling=scaling, max_iter=40)
        for acceleration in (None, "geodesic", "auto")
    )
    assert plain.bend is None
    assert geodesic.bend is not None
    assert geodesic.loss_after < 0.1 * plain.loss_after
    assert auto.loss_after < 0.1 * plain.loss_after


def poisson(**arguments: Any) -> Any:
    """The equation of Poisson on an interval, by a network with one hidden layer."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(1, 10), nn.Tanh(), nn.Linear(10, 1)).double()
    x = torch.linspace(0, 1, 40).double()[:, None].requires_grad_()
    force = math.pi**2 * torch.sin(math.pi * x.detach())

    def loss() -> Tensor:
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        ends = mark_outputs(model(torch.tensor([[0.0], [1.0]]).double()))
        return mark_outputs(bend + force).square().mean() + ends.square().sum()

    optimizer = LevenbergMarquardt(model.parameters(), **arguments)
    optimizer.step(standard(optimizer, loss))
    return info_of(optimizer)


def test_straight_steps_are_not_corrected() -> None:
    """Near a solution all steps are straight, and evaluations are saved."""
    problem = RESIDUAL_PROBLEMS_BY_NAME["bard"]
    geodesic, auto = (
        info_of(solve(problem, acceleration=acceleration)[0])
        for acceleration in ("geodesic", "auto")
    )
    assert auto.loss_after == pytest.approx(geodesic.loss_after, rel=1e-9)
    assert auto.evaluations < geodesic.evaluations
    x = start_at(5.0, 1.0, 2.0)
    matrix = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double()
    optimizer = LevenbergMarquardt([x], max_iter=20)
    optimizer.step(standard(optimizer, lambda: squares(matrix @ x + 1.0)))
    info = info_of(optimizer)
    assert info.evaluations < 2 * info.iterations + 1


def test_geodesic_acceleration_follows_a_bent_valley() -> None:
    """A step along the tangent of a canyon leaves it; its correction leads back."""
    ends = []
    for acceleration in (None, "geodesic"):
        x = start_at(3.0, 9.0)
        optimizer = LevenbergMarquardt(
            [x], damping=3.0, scaling="identity", acceleration=acceleration
        )
        optimizer.step(closure_of(lambda x=x: squares(valley(x)), x))
        assert info_of(optimizer).rejected == 0
        ends.append((x[1] - x[0].square()).item())
    assert abs(ends[1]) < 0.05 * abs(ends[0])


def valley(x: Tensor) -> Tensor:
    """A canyon along a parabola."""
    return torch.stack((x[0], 100.0 * (x[1] - x[0].square())))


def test_the_geodesic_correction_is_that_of_the_formula() -> None:
    x = start_at(1.0, 2.0)
    start = x.detach().clone()
    optimizer = LevenbergMarquardt([x], damping=40.0, scaling="identity", acceleration="geodesic")
    optimizer.step(standard(optimizer, lambda: 0.5 * squares(valley(x))))
    J = torch.tensor([[1.0, 0.0], [-200.0, 100.0]]).double()
    A = J.T @ J + 40.0 * torch.eye(2).double()
    v = -torch.linalg.solve(A, J.T @ valley(start))
    bend = torch.stack((torch.zeros(()).double(), -200.0 * v[0] ** 2))
    a = -torch.linalg.solve(A, J.T @ bend)
    assert info_of(optimizer).rejected == 0
    torch.testing.assert_close(x.detach(), start + v + 0.5 * a, rtol=1e-8, atol=1e-10)
    assert info_of(optimizer).bend == pytest.approx(float(a.norm() / v.norm()))


# Bounds.


def test_bounds(device: torch.device) -> None:
    problem = RESIDUAL_PROBLEMS_BY_NAME["rosenbrock"]
    x = start_at(-1.2, 1.0, device=device)
    optimizer = LevenbergMarquardt([x], max_iter=100, bounds=(-2.0, torch.tensor([0.5, 2.0])))
    optimizer.step(standard(optimizer, lambda: squares(problem.residuals(x))))
    info = info_of(optimizer)
    assert info.status is StepStatus.CONVERGED_GRADIENT
    assert [round(v, 7) for v in x.tolist()] == [0.5, 0.25]
    assert (info.active_bounds, info.solver) == (1, "primal")


def test_bounds_that_are_not_met_change_nothing() -> None:
    one, other = Fit(), Fit()
    one.train(4, solver="primal", damping=0.1)
    other.train(4, bounds=(-1e3, 1e3), damping=0.1)
    torch.testing.assert_close(one.values(), other.values(), rtol=1e-7, atol=1e-9)


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"solver": "lu"}, ValueError, "solver must be one of 'auto'"),
        ({"scaling": "unit"}, ValueError, "scaling must be one of 'auto', 'identity'"),
        (
            {"acceleration": "fast"},
            ValueError,
            "acceleration must be one of 'auto', 'geodesic', or None",
        ),
        ({"damping": "fletcher"}, ValueError, "damping must be one of 'nielsen', 'marquardt'"),
        ({"damping": 0.0}, ValueError, "damping must be a finite number above 0 or None, got 0.0"),
        ({"damping": math.nan}, ValueError, "damping must be"),
        ({"damping": -1.0, "globalization": None}, ValueError, "damping must be"),
        ({"damping": "nielsen", "globalization": None}, ValueError, "damping is constant"),
        ({"damping": NielsenDamping(), "globalization": "armijo"}, ValueError, "is constant"),
        ({"momentum": 1.0}, ValueError, r"momentum must lie in \[0, 1\)"),
        ({"momentum": -0.1}, ValueError, "momentum must"),
        ({"globalization": "newton"}, ValueError, "one of 'damping', 'trust_region', 'strong_w"),
        ({"globalization": NielsenDamping()}, TypeError, r"no damping rule.*pass damping=Nielsen"),
        ({"globalization": 3}, TypeError, "globalization must be one of"),
        (
            {"globalization": "armijo", "acceleration": "geodesic"},
            ValueError,
            "geodesic acceleration needs a damping",
        ),
        ({"max_iter": 0}, ValueError, "max_iter must be"),
        ({"maximize": True}, ValueError, "cannot maximize a sum of their squares"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LevenbergMarquardt([start_at(1.0)], **arguments)
    if {"momentum", "maximize"} & set(arguments):
        with pytest.raises(error, match=message):
            LevenbergMarquardt([{"params": [start_at(1.0)], **arguments}])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "dual"}, "bounds need solver='primal', got 'dual'"),
        ({"momentum": 0.5}, "neither momentum nor acceleration"),
        ({"acceleration": "geodesic"}, "neither momentum nor acceleration"),
    ],
)
def test_bounds_with_what_they_do_not_go_with(arguments: dict[str, Any], message: str) -> None:
    x = start_at(1.0)
    optimizer = LevenbergMarquardt([x], bounds=(0.0, 2.0), **arguments)
    with pytest.raises(ValueError, match=message):
        optimizer.step(standard(optimizer, lambda: squares(x)))
    assert x.item() == 1.0


def test_a_loss_that_shows_no_residuals() -> None:
    x = start_at(1.0, 2.0)
    optimizer = LevenbergMarquardt([x])
    with pytest.raises(RuntimeError, match=r"mark_outputs(.|\n)*NewtonCG|NewtonCG(.|\n)*mark"):
        optimizer.step(standard(optimizer, lambda: (x**4).sum()))
    assert x.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("solver", ["primal", "dual"])
def test_matrices_that_do_not_fit(solver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 10_000.0)  # the Jacobian fits
    monkeypatch.setattr(memory, "_SMALL", 0)
    fit = Fit()
    before = fit.values()
    with pytest.raises(TooLarge, match=rf"the {solver} system with its factorization"):
        fit.train(solver=solver)
    assert torch.equal(fit.values(), before)
    assert info_of(fit.train(solver="auto")).solver == "cg"


class NanWhereFlat(torch.autograd.Function):
    """The identity; its derivative is NaN where nothing comes back, as that of many roots is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.where(grad == 0, math.nan, grad)


@each_solver
def test_a_jacobian_that_is_not_finite(solver: Any) -> None:
    x = start_at(0.5, 1.0)
    optimizer = LevenbergMarquardt([x], solver=solver)
    optimizer.step(standard(optimizer, lambda: squares(NanWhereFlat.apply(x).square())))
    info = info_of(optimizer)
    assert info.status is StepStatus.NONFINITE_PRODUCTS
    assert x.tolist() == [0.5, 1.0]


@pytest.mark.parametrize("solver", ["dual", "cg"])
def test_a_jacobian_whose_squares_overflow(solver: Any) -> None:
    x = start_at(1e-300)
    optimizer = LevenbergMarquardt([x], solver=solver, tolerance_grad=0.0)
    optimizer.step(standard(optimizer, lambda: squares(1e200 * x)))
    assert info_of(optimizer).status is StepStatus.NONFINITE_PRODUCTS
    assert x.item() == 1e-300


def test_trials_that_are_not_finite_are_stepped_back_from() -> None:
    x = start_at(0.1)
    optimizer = LevenbergMarquardt([x], damping=1e-8, max_iter=50)
    optimizer.step(standard(optimizer, lambda: squares(torch.sqrt(x) - 2.0 + x)))
    info = info_of(optimizer)
    assert info.status is StepStatus.CONVERGED_GRADIENT
    assert x.item() == pytest.approx(1.0, abs=1e-6)


@each_solver
def test_zero_residuals_and_zero_jacobians(solver: Any) -> None:
    x = start_at(1.0, 1.0)
    optimizer = LevenbergMarquardt([x], solver=solver)
    optimizer.step(standard(optimizer, lambda: squares(x - 1.0)))
    assert info_of(optimizer).status is StepStatus.CONVERGED_GRADIENT
    y = start_at(0.0)
    optimizer = LevenbergMarquardt([y], solver=solver)
    optimizer.step(standard(optimizer, lambda: squares(y.square() + 1.0)))
    assert info_of(optimizer).status is StepStatus.CONVERGED_GRADIENT


@each_solver
def test_parameters_that_no_residual_depends_on(solver: Any) -> None:
    for scaling in SCALINGS:
        x = start_at(3.0, 7.0)
        optimizer = LevenbergMarquardt([x], solver=solver, scaling=scaling, max_iter=30)
        optimizer.step(closure_of(lambda x=x: squares(x[:1] - 1.0) + 0.0 * x[1], x))
        assert info_of(optimizer).status is StepStatus.CONVERGED_GRADIENT
        assert x.tolist() == [pytest.approx(1.0, abs=1e-5), 7.0]


def test_frozen_parameters_and_a_change_of_them() -> None:
    fit = Fit()
    optimizer = LevenbergMarquardt(fit.params, scaling="more", momentum=0.5, damping=1.0)
    closure = standard(optimizer, fit.loss)
    optimizer.step(closure)
    fit.params[0].requires_grad_(False)
    before, loss = fit.params[0].clone(), fit.loss().item()
    optimizer.step(closure)
    assert torch.equal(fit.params[0], before)
    assert fit.loss().item() < loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_parameters(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).to(dtype), torch.randn(10, 3).to(dtype)
    optimizer = LevenbergMarquardt(model.parameters(), max_iter=5)
    before = F.mse_loss(model(x), torch.ones(10, 2).to(dtype)).item()
    closure = standard(optimizer, lambda: F.mse_loss(model(x), torch.ones(10, 2).to(dtype)))
    optimizer.step(closure)
    after = info_of(optimizer).loss_after
    assert after is not None
    assert after < 0.1 * before


def test_complex_parameters() -> None:
    w = torch.tensor([1.0 + 2.0j, 1.0 - 0.5j], dtype=torch.complex128, requires_grad=True)
    target = torch.tensor([0.3 - 1.0j, 2.0 + 0.0j], dtype=torch.complex128)
    optimizer = LevenbergMarquardt([w], max_iter=40, tolerance_change=0.0)
    optimizer.step(
        standard(optimizer, lambda: squares(torch.view_as_real(w * w - target).reshape(-1)))
    )
    assert info_of(optimizer).status is StepStatus.CONVERGED_GRADIENT
    torch.testing.assert_close(w.detach() ** 2, target, rtol=1e-6, atol=1e-8)


@each_solver
def test_scales_of_loss_and_dtype(solver: Any) -> None:
    """Powers of two change nothing but the exponents."""
    found = []
    for unit in (1.0, 2.0**-20, 2.0**20):
        fit = Fit()
        optimizer = LevenbergMarquardt(fit.params, solver=solver)
        for _ in range(3):
            optimizer.step(closure_of(lambda unit=unit, fit=fit: unit * fit.loss(), *fit.params))
        found.append(fit.values())
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found[2], found[0], rtol=1e-9, atol=1e-11)


# Functions, data sets, budgets.


def test_a_function_in_place_of_the_closure() -> None:
    fit, other = Fit(), Fit()
    fit.train(3)
    optimizer = LevenbergMarquardt(other.params, **PLAIN)
    params = dict(other.model.named_parameters())

    def function(values: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(torch.func.functional_call(other.model, values, other.x), other.y)

    for _ in range(3):
        optimizer.step(FunctionalObjective(function, params))
    torch.testing.assert_close(other.values(), fit.values(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_the_budget_of_evaluations(most: int) -> None:
    fit = Fit()
    optimizer = fit.train(max_iter=50, max_eval=most)
    info = info_of(optimizer)
    assert info.status is StepStatus.MAX_EVALUATIONS
    assert info.evaluations == most


def test_rejected_steps_take_no_jacobian() -> None:
    problem = RESIDUAL_PROBLEMS_BY_NAME["rosenbrock"]
    optimizer, _ = solve(problem, damping=1e-8)
    info = info_of(optimizer)
    assert info.rejected > 0
    assert info.jacobians == info.iterations


@pytest.mark.parametrize(
    "arguments",
    [
        {"scaling": "more", "acceleration": "auto"},
        {"momentum": 0.9, "globalization": None, "damping": 0.1},
        {"momentum": 0.5, "damping": MarquardtDamping()},
    ],
)
def test_a_checkpoint_goes_on_bit_for_bit(arguments: dict[str, Any]) -> None:
    fit = Fit()
    optimizer = fit.train(3, **arguments)
    file = io.BytesIO()
    torch.save((fit.model.state_dict(), optimizer.state_dict()), file)
    for _ in range(3):
        optimizer.step(standard(optimizer, fit.loss))
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other = Fit()
    other.model.load_state_dict(weights)
    resumed = LevenbergMarquardt(other.params, **(PLAIN | arguments))
    resumed.load_state_dict(state)
    for _ in range(3):
        resumed.step(standard(resumed, other.loss))
    assert torch.equal(fit.values(), other.values())


@pytest.mark.parametrize("damping", ["nielsen", "marquardt"])
@pytest.mark.parametrize("name", ["bard", "kowalik_osborne", "osborne_2", "watson_6"])
def test_the_step_ends_where_only_rounding_is_left(name: str, damping: Any) -> None:
    problem = RESIDUAL_PROBLEMS_BY_NAME[name]
    optimizer, _ = solve(problem, damping=damping, tolerance_grad=0.0, tolerance_change=0.0)
    info = info_of(optimizer)
    assert info.status in (StepStatus.STALLED, StepStatus.NO_DECREASE)
    assert info.grad_norm < 1e-10


def loss_of_two_terms(model: nn.Module, x: Tensor, *, mark: bool) -> Tensor:
    r = model(x[:3])
    beside = mark_outputs(r) if mark else r
    return mark_outputs(model(x) - 1.0).square().mean() + beside.square().mean()


def test_a_term_whose_residuals_are_not_marked_is_told_once() -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 3)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = LevenbergMarquardt(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of_two_terms(model, x, mark=False)
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match="a term of the loss is in none.*mark its residuals"):
        optimizer.step(closure)
    optimizer.step(closure)  # warnings are errors in these tests


@pytest.mark.parametrize("penalty", ["marked", "squares", "absolute values"])
def test_no_warning_where_nothing_is_left_out(penalty: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 3)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = LevenbergMarquardt(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        if penalty == "marked":
            loss = loss_of_two_terms(model, x, mark=True)
        else:
            power = 2 if penalty == "squares" else 1
            loss = F.mse_loss(model(x), torch.ones(9, 1))
            loss = loss + 1e-2 * sum(p.abs().pow(power).sum() for p in model.parameters())
        loss.backward()
        return loss

    before = float(optimizer.step(closure))
    assert float(closure().detach()) < before


def test_terms_of_a_data_set_whose_residuals_are_not_marked_are_told() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    data = [(torch.randn(9, 3), torch.ones(9, 1)), (torch.randn(9, 3), torch.ones(9, 1))]

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(z, y) + model(torch.ones(2, 3)).square().mean()

    with pytest.warns(UserWarning, match="a term of the loss is in none"):
        LevenbergMarquardt(model.parameters()).step(DatasetClosure(model, loss, data))


class WithoutEffect(nn.Module):
    """The biases of keys change nothing, nor does one before a normalization, but by rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.before = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.before(self.attention(x, x, x, need_weights=False)[0].mean(1)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("globalization", ["damping", "trust_region"])
def test_parameters_without_effect_do_not_run_away(globalization: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = WithoutEffect().to(dtype)
    x, y = torch.randn(60, 5, 4, dtype=dtype), torch.randn(60, 3, dtype=dtype)
    optimizer = LevenbergMarquardt(model.parameters(), globalization=globalization)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert optimizer.info is not None and optimizer.info.solver == "primal"
    keys = model.attention.in_proj_bias.detach()[4:8]
    assert float(keys.abs().max()) < 1 and float(model.before.bias.detach().abs().max()) < 2


@pytest.mark.parametrize("size", [4, 200])
def test_clipped_gradients_leave_the_jacobian_as_it_is(size: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, size), nn.Tanh(), nn.Linear(size, 2)).double()
    x, y = torch.randn(50, 3).double(), torch.randn(50, 2).double()
    optimizer = LevenbergMarquardt(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        return loss

    before = float(optimizer.step(closure).detach())
    assert optimizer.info is not None
    assert (optimizer.info.jacobian, optimizer.info.reason) == ("graph", "")
    assert float(closure().detach()) < before


def test_inputs_of_very_different_units_are_not_taken_for_parameters_without_effect() -> None:
    torch.manual_seed(0)
    x = torch.randn(100, 3, dtype=torch.float64)
    y, units = x.sum(1, keepdim=True), torch.tensor([1e-6, 1.0, 1e6], dtype=torch.float64)
    weight = nn.Parameter(torch.zeros(3, 1, dtype=torch.float64))
    optimizer = LevenbergMarquardt([weight], max_iter=30)
    optimizer.step(lambda: F.mse_loss((x * units) @ weight, y))
    assert torch.allclose(weight.detach()[:, 0] * units, torch.ones_like(units), rtol=1e-3)
