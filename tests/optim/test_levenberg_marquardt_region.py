"""`LevenbergMarquardt` within a trust region."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.residual_problems import RESIDUAL_PROBLEMS
from torch_secondorder import LevenbergMarquardt, mark_outputs
from torch_secondorder.globalization import TrustRegion

T = torch.linspace(0.0, 3.0, 15, dtype=torch.float64)
DATA = 2.0 * torch.exp(-1.5 * T) + 0.3 + 0.05 * torch.sin(17.0 * T)
START = torch.tensor([1.0, 0.2, 0.0], dtype=torch.float64)


def residuals(x: Tensor) -> Tensor:
    return x[0] * torch.exp(-x[1] * T) + x[2] - DATA


def made(start: Tensor = START, **arguments: Any) -> tuple[Tensor, LevenbergMarquardt, Any]:
    """Parameters, their optimizer within a region, and its closure."""
    x = start.clone().requires_grad_()
    given: dict[str, Any] = {"globalization": "trust_region", "scaling": "more"} | arguments
    optimizer = LevenbergMarquardt([x], **given)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * mark_outputs(residuals(x)).square().sum()
        loss.backward()
        return loss

    return x, optimizer, closure


def test_corrections_save_jacobians() -> None:
    problem = next(p for p in RESIDUAL_PROBLEMS if p.name == "wood")
    jacobians, ends = [], []
    for corrections in (0, 2):
        x = problem.start.clone().requires_grad_()
        optimizer = LevenbergMarquardt(
            [x],
            max_iter=200,
            globalization="trust_region",
            scaling="more",
            corrections=corrections,
        )

        def closure(x: Tensor = x) -> Tensor:
            return 0.5 * mark_outputs(problem.residuals(x)).square().sum()

        optimizer.step(closure)
        info = optimizer.info
        assert info is not None and info.status.name == "CONVERGED_GRADIENT"
        assert (info.corrections > 0) == (corrections > 0)
        assert info.trust_radius > 0 and info.damping == 0.0
        jacobians.append(info.jacobians)
        ends.append(x.detach())
    assert jacobians[1] < 0.8 * jacobians[0]
    assert torch.allclose(ends[0], ends[1], atol=1e-6)


@pytest.mark.parametrize("scaling", ["identity", "marquardt", "more"])
def test_the_first_step_is_as_long_as_the_radius(scaling: Any) -> None:
    x, optimizer, closure = made(
        globalization=TrustRegion(initial=1e-3), scaling=scaling, corrections=0
    )
    optimizer.step(closure)
    J = torch.func.jacrev(residuals)(START)
    units = torch.ones(3).double() if scaling == "identity" else J.norm(dim=0)
    assert float((units * (x.detach() - START)).norm()) == pytest.approx(1e-3, rel=2e-3)
    assert optimizer.info is not None and optimizer.info.trust_radius == pytest.approx(
        2e-3, rel=0.01
    )


def test_the_first_radius_is_the_size_of_the_parameters() -> None:
    x, optimizer, closure = made(corrections=0)
    optimizer.step(closure)
    J = torch.func.jacrev(residuals)(START)
    size = float((J.norm(dim=0) * START).norm())
    moved = float((J.norm(dim=0) * (x.detach() - START)).norm())
    assert moved <= size * (1 + 2e-3)
    assert optimizer.info is not None
    assert optimizer.info.trust_radius in (pytest.approx(size), pytest.approx(2 * size))


def test_a_start_at_zero() -> None:
    x, optimizer, closure = made(torch.zeros(3).double(), max_iter=60)
    optimizer.step(closure)
    reference, other, its = made(max_iter=60)
    other.step(its)
    assert torch.allclose(x, reference, atol=1e-6)


def test_rejected_steps_leave_the_parameters_better() -> None:
    x, optimizer, closure = made(torch.tensor([50.0, 9.0, -30.0]).double(), max_iter=1)
    before = closure().item()
    for _ in range(30):
        optimizer.step(closure)
        after = closure().item()
        assert after <= before
        before = after
    assert optimizer.info is not None
    assert before == pytest.approx(float(residuals(x.detach()).square().sum()) / 2)


def test_a_checkpoint_continues_bit_for_bit() -> None:
    x, optimizer, closure = made()
    for _ in range(3):
        optimizer.step(closure)
    y, other, its = made(x.detach())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(4):
        optimizer.step(closure)
        other.step(its)
    assert torch.equal(x, y)
    assert other.info == optimizer.info


def test_bounds() -> None:
    x, optimizer, closure = made(max_iter=60, bounds=(None, START.new_tensor([5.0, 1.2, 5.0])))
    optimizer.step(closure)
    assert x[1].item() == 1.2
    held = residuals(x.detach())
    J = torch.func.jacrev(residuals)(x.detach())
    slopes = J.T @ held
    assert float(slopes[[0, 2]].abs().max()) < 1e-6 and float(slopes[1]) < 0


def test_evaluations_are_limited() -> None:
    for most in (1, 2, 3, 5):
        _, optimizer, closure = made(max_iter=60, max_eval=most)
        optimizer.step(closure)
        assert optimizer.info is not None and optimizer.info.evaluations <= most
        assert optimizer.info.status.name == "MAX_EVALUATIONS"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damping": 1.0}, "a trust region has a radius in place of damping and momentum"),
        ({"momentum": 0.9}, "a trust region has a radius in place of damping and momentum"),
        ({"solver": "dual"}, "a trust region needs solver='primal', got 'dual'"),
        ({"acceleration": "geodesic"}, "geodesic"),
        ({"corrections": -1}, "corrections"),
    ],
)
def test_arguments_that_do_not_go_together(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**arguments)
