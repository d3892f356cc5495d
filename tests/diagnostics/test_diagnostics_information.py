"""Standard errors against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_secondorder import FunctionalObjective
from torch_secondorder.curvature import Diagonal
from torch_secondorder.diagnostics import from_closure, from_model, observed_information
from torch_secondorder.solvers import CG, MINRES


def breast_cancer(columns: int) -> tuple[Tensor, Tensor]:
    """Standardized measurements, and labels 0 and 1 as numbers."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_breast_cancer(return_X_y=True)
    x = torch.from_numpy(x)[:, :columns]
    return (x - x.mean(0)) / x.std(0, correction=0), torch.from_numpy(y).double()


def fitted(x: Tensor, y: Tensor, penalty: float) -> tuple[nn.Linear, Tensor]:
    """A logistic regression at its maximum, and the closed form of its information matrix."""
    design = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    theta = torch.zeros(design.shape[1]).double()
    for _ in range(30):  # Newton's method
        p = torch.sigmoid(design @ theta)
        information = design.T @ ((p * (1 - p))[:, None] * design)
        information = information + penalty * torch.eye(len(theta)).double()
        theta = theta - torch.linalg.solve(information, design.T @ (p - y) + penalty * theta)
    model = nn.Linear(x.shape[1], 1).double()
    with torch.no_grad():
        model.weight.copy_(theta[:-1][None])
        model.bias.copy_(theta[-1:])
    return model, information


@pytest.mark.parametrize(("columns", "penalty"), [(10, 0.0), (30, 1.0)])
def test_logistic_regression_has_the_standard_errors_of_the_closed_form(
    columns: int, penalty: float, device: torch.device
) -> None:
    """All thirty columns separate the classes, and need a prior."""
    x, y = breast_cancer(columns)
    model, information = fitted(x, y, penalty)
    model.to(device)
    expected = torch.linalg.inv(information)
    count = len(y)

    def mean_loss(z: Tensor, y: Tensor) -> Tensor:
        prior = sum(p.square().sum() for p in model.parameters())
        mean = F.binary_cross_entropy_with_logits(z[:, 0], y)
        return mean + 0.5 * penalty / count * prior

    data = (x, y)
    mean = from_model(model, mean_loss, data)
    total = from_model(model, lambda z, y: count * mean_loss(z, y), [data], reduction="sum")
    for found in (observed_information(mean, scale=count), observed_information(total)):
        errors = found.standard_errors
        relative = (errors - expected.diagonal().sqrt()).abs() / expected.diagonal().sqrt()
        assert float(relative.max()) < 1e-6
        torch.testing.assert_close(found.covariance, expected, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found.information, information, rtol=1e-9, atol=1e-9)
        assert found.newton_decrement < 1e-6 and found.products == columns + 1
    named = mean.named(errors)
    assert named["weight"].shape == (1, columns) and float(named["bias"]) == float(errors[-1])
    contrasts = torch.zeros(columns + 1, 2).double()
    contrasts[0, 0], contrasts[1, 0], contrasts[-1, 1] = 1, -1, 1
    for solver in (None, CG(500, 1e-10), MINRES(500, 1e-10)):
        some = observed_information(mean, scale=count, directions=contrasts, solver=solver)
        torch.testing.assert_close(
            some.covariance, contrasts.T @ expected @ contrasts, rtol=1e-6, atol=1e-9
        )
        assert some.information is None and some.newton_decrement is None
    one = observed_information(mean, scale=count, directions=contrasts[:, 0], largest=1)
    assert float(one.standard_errors) == pytest.approx(float(some.standard_errors[0]), rel=1e-6)


def test_observed_information_in_float32_away_from_the_estimate() -> None:
    data = torch.tensor([1.0, 2.0, 6.0])
    loss = FunctionalObjective(lambda m: 0.5 * ((data - m) ** 2).sum(), torch.tensor([4.0]))
    found = observed_information(loss)
    assert float(found.standard_errors) == pytest.approx(3**-0.5)
    assert found.newton_decrement == pytest.approx(3**0.5)  # one off, with an error of 3 ** -0.5
    mean = FunctionalObjective(lambda m: 0.5 * ((data - m) ** 2).mean(), torch.tensor([4.0]))
    scaled = observed_information(mean, scale=3)
    assert scaled.newton_decrement == pytest.approx(3**0.5)
    assert float(scaled.standard_errors) == pytest.approx(3**-0.5)
    assert observed_information(Diagonal(torch.ones(2))).newton_decrement is None


W = torch.ones(3, requires_grad=True)
FLAT = from_closure(lambda: (W.sum() - 3) ** 2, [W])
SADDLE = from_closure(lambda: W[0] ** 2 + W[1] ** 2 - W[2] ** 2, [W])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: observed_information(Diagonal(torch.ones(2001))),
            ValueError,
            r"2001 parameters are too many .* GiB: choose some directions=.* largest=2000",
        ),
        (lambda: observed_information(FLAT), ValueError, "not positive definite: its eigenvalues"),
        (lambda: observed_information(SADDLE), ValueError, "reach from -2 to 2"),
        (
            lambda: observed_information(SADDLE, directions=torch.ones(3)),
            ValueError,
            "not positive definite: it has a curvature of",
        ),
        (
            lambda: observed_information(FLAT, directions=torch.tensor([1.0, -1.0, 0.0])),
            (ValueError, RuntimeError),
            "not positive definite|was not solved",
        ),
        (
            lambda: observed_information(
                Diagonal(torch.logspace(-5, 5, 50).double()),
                directions=torch.ones(50),
                solver=CG(max_iterations=2),
            ),
            RuntimeError,
            r"direction 0 was not solved after 2 iterations \(MAX_ITERATIONS, residual",
        ),
        (lambda: observed_information(FLAT, scale=0.0), ValueError, "scale must be .* got 0.0"),
        (
            lambda: observed_information(FLAT, scale=math.inf),
            ValueError,
            "scale must be a finite number above 0",
        ),
        (lambda: observed_information(FLAT, largest=0), ValueError, "largest .* got 0"),
        (
            lambda: observed_information(FLAT, directions=torch.ones(2)),
            ValueError,
            r"directions must have shape \(3,\) or \(3, k\), got \(2,\)",
        ),
        (
            lambda: observed_information(FLAT, directions=torch.zeros(3)),
            ValueError,
            "directions must be finite and not zero",
        ),
    ],
)
def test_errors(make: Callable[[], object], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()
