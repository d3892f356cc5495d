"""Levenberg-Marquardt steps on batches that change: momentum, limits of length, bad batches."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.closures import standard
from torch_secondorder import LevenbergMarquardt, LevenbergMarquardtInfo, StepStatus, mark_outputs

SIZES = (6, 3, 9, 1, 12)  # residuals of the batches, below and above the number of parameters
STEP_AS_IT_IS: dict[str, Any] = {"globalization": None, "momentum": 0.9}


class Regression:
    """A small network with one output, and batches of its data."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
        self.model.to(device, torch.float64)
        generator = torch.Generator().manual_seed(4)
        x = torch.randn(sum(SIZES), 2, generator=generator).double().to(device)
        self.batches = list(zip(x.split(SIZES), torch.sin(x.sum(1)).split(SIZES), strict=True))
        self.params = list(self.model.parameters())

    def loss(self, i: int) -> Tensor:
        x, y = self.batches[i % len(SIZES)]
        return F.mse_loss(self.model(x).squeeze(1), y)

    def values(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.params])

    def optimizer(self, **arguments: Any) -> LevenbergMarquardt:
        return LevenbergMarquardt(self.params, **arguments)

    def step(self, optimizer: LevenbergMarquardt, i: int) -> LevenbergMarquardtInfo:
        optimizer.step(standard(optimizer, lambda: self.loss(i)))
        assert optimizer.info is not None
        return optimizer.info

    def residuals_and_jacobian(self, i: int) -> tuple[Tensor, Tensor]:
        """`r` and `J` of a batch, with the loss `|r|^2 / 2`, one backward pass for each row."""
        x, y = self.batches[i]
        r = (self.model(x).squeeze(1) - y) * math.sqrt(2.0 / len(y))
        rows = [torch.autograd.grad(entry, self.params, retain_graph=True) for entry in r]
        return r.detach(), torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


@pytest.mark.parametrize("solver", ["primal", "dual", "auto"])
def test_momentum_with_batches_of_any_size(solver: Any, device: torch.device) -> None:
    """`phi <- mom phi + J'(JJ' + mu I)^-1 (-r - mom J phi)`; steps are `phi`, at most so long."""
    fit = Regression(device)
    optimizer = fit.optimizer(lr=0.1, damping=0.02, max_norm=0.17, solver=solver, **STEP_AS_IT_IS)
    phi, shortened = torch.zeros_like(fit.values()), 0
    for i in range(len(SIZES)):
        before = fit.values()
        r, J = fit.residuals_and_jacobian(i)
        kernel = J @ J.T + 0.02 * torch.eye(len(r)).to(J)
        phi = 0.9 * phi + J.T @ torch.linalg.solve(kernel, -r - 0.9 * J @ phi)
        share = min(0.1, 0.17 / float(phi.norm()))
        shortened += share < 0.1
        info = fit.step(optimizer, i)
        torch.testing.assert_close(fit.values(), before + share * phi, rtol=1e-9, atol=1e-11)
        assert info.step_length == pytest.approx(share)
        assert (info.rows, info.evaluations, info.loss_after) == (SIZES[i], 1, None)
        if solver == "auto":
            assert info.solver == ("dual" if SIZES[i] < len(phi) else "primal")
    assert 0 < shortened < len(SIZES)


@pytest.mark.parametrize("scaling", ["identity", "marquardt"])
@pytest.mark.parametrize("solver", ["primal", "dual", "cg"])
def test_the_damping_of_a_batch_is_a_share_of_its_mean_eigenvalue(
    solver: Any, scaling: Any, device: torch.device
) -> None:
    fit = Regression(device)
    optimizer = fit.optimizer(globalization=None, lr=0.1, solver=solver, scaling=scaling)
    for i in (0, 4):
        _, J = fit.residuals_and_jacobian(i)
        if scaling == "marquardt":
            J = J / J.norm(dim=0)
        values = torch.linalg.svdvals(J).square()
        assert fit.step(optimizer, i).damping == pytest.approx(1e-2 * values.mean().item())


def test_a_given_damping_is_kept() -> None:
    fit = Regression()
    optimizer = fit.optimizer(globalization=None, damping=0.25)
    assert [fit.step(optimizer, i).damping for i in range(3)] == [0.25] * 3


@pytest.mark.parametrize("solver", ["primal", "dual", "cg"])
def test_a_batch_with_no_slope_needs_no_damping(solver: Any) -> None:
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = LevenbergMarquardt([w], solver=solver, **STEP_AS_IT_IS)
    x = torch.zeros(2, 3).double()
    optimizer.step(standard(optimizer, lambda: mark_outputs(x @ w - 1.0).square().sum()))
    assert torch.equal(w, torch.ones(3).double())


@pytest.mark.parametrize("lr", [0.1, 0.2])
def test_momentum_makes_batches_of_a_linear_system_solve_it_faster(lr: float) -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(60, 12, generator=generator).double()
    errors = {}
    for momentum in (0.0, 0.8):
        w = torch.zeros(12, dtype=torch.float64, requires_grad=True)
        optimizer = LevenbergMarquardt([w], lr, momentum=momentum, damping=1e-6, globalization=None)
        for rows in A.split(3) * 10:
            optimizer.step(standard(optimizer, partial(squares_of_differences, rows, w)))
        errors[momentum] = float((w.detach() - 1.0).norm())
    assert errors[0.8] < 0.01 * errors[0.0]


def squares_of_differences(rows: Tensor, w: Tensor) -> Tensor:
    """The loss of a few rows of a linear system that ones solve."""
    return mark_outputs(rows @ w - rows.sum(1)).square().mean()


@pytest.mark.parametrize("solver", ["primal", "dual"])
def test_a_batch_that_is_not_finite_is_skipped(solver: Any) -> None:
    """The steps around it are as if it had not been there."""
    fit, without = Regression(), Regression()
    arguments = {"damping": 0.1, "lr": 0.5, "solver": solver, **STEP_AS_IT_IS}
    optimizer, other = fit.optimizer(**arguments), without.optimizer(**arguments)
    for i in (0, 1, 2):
        fit.step(optimizer, i)
        without.step(other, i)
        before = fit.values()
        x, y = fit.batches[4]
        fit.batches[4] = (torch.where(x == x[0], math.nan, x), y)
        info = fit.step(optimizer, 4)
        assert info.status is StepStatus.NONFINITE_START
        assert math.isnan(info.loss)
        assert torch.equal(fit.values(), before)
    assert torch.equal(fit.values(), without.values())


def test_an_empty_batch_is_skipped() -> None:
    fit = Regression()
    optimizer = fit.optimizer(**STEP_AS_IT_IS)
    fit.step(optimizer, 0)
    before = fit.values()
    fit.batches[1] = (torch.zeros(0, 2).double(), torch.zeros(0).double())
    assert fit.step(optimizer, 1).status is StepStatus.NONFINITE_START
    assert torch.equal(fit.values(), before)
    assert fit.step(optimizer, 2).status is StepStatus.MOVED


@pytest.mark.parametrize(
    "arguments",
    [{}, {"momentum": 0.9}, {"globalization": "armijo", "momentum": 0.9}, {"scaling": "more"}],
)
def test_no_batch_is_fitted_worse(arguments: dict[str, Any]) -> None:
    """With a globalization, a step lowers the loss of its batch or says that it did not move."""
    fit = Regression()
    optimizer = fit.optimizer(**arguments)
    moved = 0
    for i in range(4 * len(SIZES)):
        before, values = fit.loss(i).item(), fit.values()
        info = fit.step(optimizer, i)
        after = fit.loss(i).item()
        assert info.loss == pytest.approx(before, rel=1e-12)
        if info.iterations:
            moved += 1
            assert after < before
            assert info.loss_after == pytest.approx(after, rel=1e-12)
        else:
            assert torch.equal(fit.values(), values)
    assert moved > 2 * len(SIZES)


@pytest.mark.parametrize(
    "arguments", [STEP_AS_IT_IS | {"max_norm": 0.1}, {"momentum": 0.9}, {"scaling": "more"}]
)
def test_a_checkpoint_between_batches(arguments: dict[str, Any]) -> None:
    fit = Regression()
    optimizer = fit.optimizer(**arguments)
    for i in range(4):
        fit.step(optimizer, i)
    file = io.BytesIO()
    torch.save((fit.model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other = Regression()
    other.model.load_state_dict(weights)
    resumed = other.optimizer(**arguments)
    resumed.load_state_dict(state)
    for i in range(4, 9):
        fit.step(optimizer, i)
        other.step(resumed, i)
    assert torch.equal(fit.values(), other.values())


def test_a_scheduler_shortens_steps_below_the_limit() -> None:
    """The limit holds while `lr` is large, then `lr` alone decides."""
    fit = Regression()
    optimizer = fit.optimizer(lr=1.0, max_norm=1e-3, **STEP_AS_IT_IS)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 1e-3)
    lengths, rates = [], []
    for i in range(3):
        before = fit.values()
        rates.append(optimizer.param_groups[0]["lr"])
        info = fit.step(optimizer, i)
        lengths.append(float((fit.values() - before).norm()))
        scheduler.step()
    assert lengths[0] == pytest.approx(1e-3)
    assert lengths[-1] < 1e-3
    assert info.step_length == rates[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"max_norm": 0.3},
            "max_norm limits steps that are taken as they are: give globalization=",
        ),
        ({"max_norm": 0.3, "globalization": "armijo"}, "max_norm limits steps"),
        ({"max_norm": 0.0, "globalization": None}, "max_norm must be a finite number above 0"),
        ({"max_norm": math.nan, "globalization": None}, "max_norm must"),
    ],
)
def test_limits_that_are_rejected(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Regression().optimizer(**arguments)


def test_a_limit_that_is_changed_to_a_wrong_one_is_rejected() -> None:
    fit = Regression()
    optimizer = fit.optimizer(max_norm=0.3, **STEP_AS_IT_IS)
    optimizer.param_groups[0]["max_norm"] = -1.0
    before = fit.values()
    with pytest.raises(ValueError, match="max_norm must be a finite number above 0"):
        fit.step(optimizer, 0)
    assert torch.equal(fit.values(), before)


def digits(batch: int) -> tuple[nn.Sequential, Callable[[], Tensor], Callable[[], float]]:
    """A classifier of handwritten digits, losses of batches, and its accuracy on other images."""
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    x = torch.from_numpy(images).float()[order] / 16.0
    y = torch.from_numpy(labels)[order]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))

    def loss() -> Tensor:
        chosen = torch.randint(1300, (batch,), generator=generator)
        return F.cross_entropy(model(x[chosen]), y[chosen])

    @torch.no_grad()
    def accuracy() -> float:
        return float((model(x[1300:]).argmax(1) == y[1300:]).double().mean())

    return model, loss, accuracy


def test_a_classifier_learns_from_batches() -> None:
    """Cross-entropy has residuals as well: 9 for each image."""
    model, loss, accuracy = digits(batch=64)
    optimizer = LevenbergMarquardt(model.parameters(), lr=0.3, max_norm=0.5, **STEP_AS_IT_IS)
    for _ in range(40):
        optimizer.step(standard(optimizer, loss))
    assert optimizer.info is not None
    assert optimizer.info.rows == 9 * 64
    assert accuracy() > 0.9
