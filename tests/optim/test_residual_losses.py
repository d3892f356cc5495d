"""Levenberg-Marquardt on losses of all kinds: those that it minimizes and those it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_secondorder import FunctionalObjective, LevenbergMarquardt, mark_outputs
from torch_secondorder.curvature import InseparableLoss, UnknownOutputs

DOUBLE = torch.float64


class Curve:
    """A damped oscillation with three parameters, and data of which some are far off."""

    def __init__(self) -> None:
        self.theta = nn.Parameter(torch.tensor([0.8, 0.4, 1.8], dtype=DOUBLE))
        self.t = torch.linspace(0, 4, 40, dtype=DOUBLE)
        self.y = torch.exp(-0.5 * self.t) * torch.sin(2 * self.t)
        self.y[::8] += 3.0

    def model(self) -> Tensor:
        a, rate, frequency = self.theta.unbind()
        return a * torch.exp(-rate * self.t) * torch.sin(frequency * self.t)


ROBUST: dict[str, Callable[[Curve], Tensor]] = {
    "huber": lambda c: F.huber_loss(c.model(), c.y, delta=0.01),
    "smooth l1": lambda c: F.smooth_l1_loss(c.model(), c.y, beta=0.01),
    "l1": lambda c: F.l1_loss(c.model(), c.y),
    "target": lambda c: F.huber_loss(c.y, c.model(), delta=0.01),
    "cauchy": lambda c: (10 * mark_outputs(c.model() - c.y)).square().log1p().mean(),
    "log cosh": lambda c: (50 * mark_outputs(c.model() - c.y)).cosh().log().mean(),
}


@pytest.mark.parametrize("name", ROBUST)
def test_points_far_off_do_not_matter(name: str) -> None:
    curve = Curve()
    optimizer = LevenbergMarquardt([curve.theta], max_iter=60)
    optimizer.step(lambda: ROBUST[name](curve))
    exact = torch.tensor([1.0, 0.5, 2.0], dtype=DOUBLE)
    assert float((curve.theta.detach() - exact).abs().max()) < 0.03


def nan_curvature(curve: Curve) -> Tensor:
    """Loss and gradient are finite, the second derivative is infinite where a residual is zero."""
    residual = curve.model() - curve.y
    return mark_outputs(residual - residual.detach()).abs().pow(1.5).sum() + residual.mean()


def test_a_curvature_that_is_not_finite_ends_the_step() -> None:
    curve = Curve()
    before = curve.theta.detach().clone()
    optimizer = LevenbergMarquardt([curve.theta])
    optimizer.step(lambda: nan_curvature(curve))
    assert optimizer.info is not None and optimizer.info.status.name == "NONFINITE_PRODUCTS"
    assert torch.equal(curve.theta, before)


REFUSED: dict[str, tuple[Callable[[Curve], Tensor], type[Exception], str]] = {
    "root": (
        lambda c: F.mse_loss(c.model(), c.y).sqrt(),
        InseparableLoss,
        "mse_loss.z, y. for mse_loss.z, y..sqrt",
    ),
    "nothing marked": (
        lambda c: (c.model() - c.y).square().mean(),
        UnknownOutputs,
        "shows no residuals",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_losses_without_residuals_are_refused(name: str) -> None:
    loss, kind, message = REFUSED[name]
    curve = Curve()
    before = curve.theta.detach().clone()
    optimizer = LevenbergMarquardt([curve.theta])
    with pytest.raises(kind, match=message):
        optimizer.step(lambda: loss(curve))
    assert torch.equal(curve.theta, before)
    optimizer.step(lambda: F.mse_loss(curve.model(), curve.y))  # it can go on
    assert not torch.equal(curve.theta, before)


def test_compiled_functions_are_refused() -> None:
    theta = nn.Parameter(torch.ones(3))
    objective = FunctionalObjective(lambda w: w.square().sum(), theta, compile={"backend": "eager"})
    with pytest.raises(RuntimeError, match="leave compile out"):
        LevenbergMarquardt([theta]).step(objective)
    assert torch.equal(theta, torch.ones(3))
