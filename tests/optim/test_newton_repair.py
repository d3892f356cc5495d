"""NewtonCG where some entries of the curvature are no numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.closures import GLOBALIZATIONS, closure_of
from tests.support.custom_functions import NanCurvature
from tests.support.dense_operators import Dense, symmetric, vector_of
from torch_secondorder import Newton, NewtonCG, mark_outputs
from torch_secondorder.curvature._masked import Masked
from torch_secondorder.solvers import CG


def test_a_masked_operator(device: torch.device) -> None:
    a = symmetric(torch.linspace(1.0, 5.0, 5, dtype=torch.float64)).to(device)
    kept = torch.tensor([True, False, True, True, False], device=device)
    spoilt = torch.where(kept[:, None] & kept, a, torch.nan)
    expected = torch.where(kept[:, None] & kept, a, 0.0) + (~kept).to(a).diag() * 7.0
    masked = Masked(Spoilt(spoilt, kept), kept, 7.0)
    found = masked @ torch.eye(5, dtype=torch.float64, device=device)
    torch.testing.assert_close(found, expected)
    v = vector_of(5).to(device)
    torch.testing.assert_close(masked @ v, expected @ v)


class Spoilt(Dense):
    """As an autograd product is: rows are no numbers, whatever is multiplied."""

    def __init__(self, a: Tensor, kept: Tensor) -> None:
        super().__init__(torch.where(kept[:, None] & kept, a, 0.0))
        self.kept, self.dtype, self.device = kept, a.dtype, a.device

    def matvec(self, v: Tensor) -> Tensor:
        return torch.where(self.kept, super().matvec(v), torch.nan)


class Points:
    """Points that repel each other, two of which are in the same place."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        points = torch.randn(5, 2, generator=generator, dtype=torch.float64)
        points[1] = points[0]
        self.points = nn.Parameter(points.to(device, dtype))
        self.goals = torch.randn(5, 2, generator=generator, dtype=torch.float64).to(device, dtype)

    def value(self) -> Tensor:
        i, j = torch.triu_indices(5, 5, 1).unbind()
        distances = (self.points[i] - self.points[j]).norm(dim=1)
        return (self.points - self.goals).square().sum() + 0.1 * distances.square().sum()

    def closure(self) -> Any:
        return closure_of(self.value, self.points)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("globalization", GLOBALIZATIONS)
@pytest.mark.parametrize("preconditioner", [None, "nystrom"])
def test_points_in_the_same_place(
    preconditioner: str | None, globalization: str, dtype: torch.dtype, device: torch.device
) -> None:
    problem = Points(device, dtype)
    optimizer = NewtonCG(
        [problem.points],
        curvature="hessian",
        globalization=globalization,
        preconditioner=preconditioner,
    )
    optimizer.step(problem.closure())
    info = optimizer.info
    assert info.repair.endswith("4 of 10 entries of a product were not finite, the step follows "
                                "the gradient there")  # fmt: skip
    assert info.loss_after < info.loss
    for _ in range(15):
        optimizer.step(problem.closure())
        assert bool(problem.points.isfinite().all())
    assert optimizer.info.repair == ""  # they have separated
    assert optimizer.info.grad_norm < (1e-6 if dtype == torch.float64 else 1e-3)


def test_what_is_finite_gets_its_newton_step(device: torch.device) -> None:
    problem = Points(device, torch.float64)
    points = problem.points
    hessian = torch.autograd.functional.hessian(
        lambda p: (
            F.mse_loss(p, problem.goals, reduction="sum")
            + 0.1 * sum((p[i] - p[j]).square().sum() for i in range(5) for j in range(i))
        ),
        points.detach(),
    ).reshape(10, 10)
    loss = problem.value()
    (grad,) = torch.autograd.grad(loss, points)
    before, g = points.detach().flatten().clone(), grad.flatten()
    optimizer = NewtonCG(
        [points], curvature="hessian", globalization="line_search", solver=CG(50, tolerance=1e-13)
    )
    optimizer.step(problem.closure())
    step = points.detach().flatten() - before
    kept = slice(4, 10)
    expected = -torch.linalg.solve(hessian[kept, kept], g[kept])
    torch.testing.assert_close(step[kept] / optimizer.info.step_length, expected)
    along = (hessian @ g)[kept].norm() / g.norm()
    torch.testing.assert_close(step[:4] / optimizer.info.step_length, -g[:4] / along)


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("globalization", GLOBALIZATIONS)
def test_a_network_all_of_whose_products_are_no_numbers(
    globalization: str, curvature: str, device: torch.device
) -> None:
    """Two samples are the same, and so is what the network makes of them, for ever."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double().to(device)
    x, y = (torch.randn(20, k, dtype=torch.float64, device=device) for k in (3, 2))
    x[1] = x[0]

    def value() -> Tensor:
        z = mark_outputs(net(x))
        return (z - y).square().mean() + 0.1 * (z[0] - z[1]).norm() ** 2

    start = value().item()
    optimizer = NewtonCG(net.parameters(), curvature=curvature, globalization=globalization)
    for _ in range(10):
        optimizer.step(closure_of(value, *net.parameters()))
        assert optimizer.info.repair != ""
        assert optimizer.info.loss_after < optimizer.info.loss
    assert value().item() < 0.8 * start
    assert all(bool(p.isfinite().all()) for p in net.parameters())


def test_differences_take_the_place_of_all(device: torch.device) -> None:
    """The first step is that of the optimizer which asks for them."""
    found = []
    for products in ("autograd", "finite_difference"):
        x = nn.Parameter(torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64, device=device))
        breaks = products == "autograd"

        def value(x: Tensor = x, breaks: bool = breaks) -> Tensor:
            return (NanCurvature.apply(x - 1) if breaks else torch.square(x - 1)).square().sum()

        optimizer = NewtonCG([x], curvature="hessian", curvature_products=products)
        optimizer.step(closure_of(value, x))
        found.append(x.detach().clone())
        assert bool(optimizer.info.repair) is (products == "autograd")
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("globalization", GLOBALIZATIONS)
def test_where_differences_are_no_numbers_either(globalization: str, device: torch.device) -> None:
    x = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64, device=device))

    def value() -> Tensor:  # no number beyond a wall that is closer than any step
        return NanCurvature.apply(x - 3).sum() + 1e-8 * (x[0] - (1 - 1e-12)).sqrt()

    optimizer = NewtonCG([x], curvature="hessian", globalization=globalization)
    optimizer.step(closure_of(value, x))
    assert optimizer.info.repair.startswith("no entry of a product was finite, products were diff")
    assert optimizer.info.repair.endswith("the step follows the gradient there")
    assert optimizer.info.loss_after < optimizer.info.loss
    assert bool(x.isfinite().all())


@pytest.mark.parametrize("globalization", GLOBALIZATIONS)
def test_the_whole_of_it_without_a_way_out(globalization: str, device: torch.device) -> None:
    """Neither products nor differences: what is left is the gradient."""
    x = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64, device=device))
    start = x.detach().clone()

    class Nothing(Dense):
        def matvec(self, v: Tensor) -> Tensor:
            return v * torch.nan

    def value() -> Tensor:
        away = (x.detach() - start).norm()
        return x.square().sum() * torch.where((away > 0) & (away < 1e-3), torch.nan, 1.0)

    operator = Nothing(torch.eye(2, dtype=torch.float64, device=device))
    operator.dtype, operator.device = x.dtype, x.device
    optimizer = NewtonCG([x], curvature=lambda _: operator, globalization=globalization)
    optimizer.step(closure_of(value, x))
    assert optimizer.info.repair == "no product was finite, the step follows the gradient"
    assert optimizer.info.loss_after < optimizer.info.loss
    assert bool(x.isfinite().all())


def test_a_curvature_beyond_float32() -> None:
    """The gradient over the parameters, which stands for the curvature, is beyond it as well."""
    x = nn.Parameter(torch.tensor([3e-10]))
    optimizer = Newton([x])
    optimizer.step(closure_of(lambda: 1e20 * (x / 1e-10).square().sum(), x))
    assert optimizer.info is not None
    assert optimizer.info.repair == "no product was finite, the step follows the gradient"
    assert optimizer.info.loss_after is not None
    assert optimizer.info.loss_after <= optimizer.info.loss
    assert bool(x.isfinite().all())
