"""A line search method outside of the package, made of the public names for extensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.closures import rosenbrock, standard, start_at
from torch_secondorder.optim.extending import (
    Candidate,
    Descent,
    Line,
    LineSearchInfo,
    LineSearchOptimizer,
    Number,
    Point,
    StepStatus,
    declare,
)


class SpectralGradient(LineSearchOptimizer):
    """The negative gradient in the scale of the last pair (Barzilai and Borwein 1988)."""

    _state_fields = declare(curvature=Number(0.0))
    _curvature: float
    info: LineSearchInfo | None

    def __init__(self, params: Any, lr: float = 1.0, **more: Any) -> None:
        defaults = {"lr": lr, "max_iter": 20, "max_eval": None, "tolerance_grad": None}
        defaults |= {"tolerance_change": 1e-9, "weight_decay": 0.0, "maximize": False}
        super().__init__(params, "strong_wolfe", defaults | more)

    def _direction(self, descent: Descent) -> Tensor | None:
        assert descent.point.grad is not None
        return descent.point.grad / -self._curvature if self._curvature else None

    def _learn(self, descent: Descent, line: Line, t: float, before: Point, to: Candidate) -> None:
        self._curvature = max(to.y_d / (t * line.square), 0.0)

    def _restart(self) -> bool:
        known, self._curvature = bool(self._curvature), 0.0
        return known


def test_it_takes_three_methods() -> None:
    x, curvatures = start_at(-1.2, 1.0), torch.tensor([1.0, 30.0], dtype=torch.float64)
    optimizer = SpectralGradient([x], max_iter=500, max_eval=2000)
    optimizer.step(standard(optimizer, lambda: curvatures @ (x - 1).square()))
    assert optimizer.info is not None
    assert optimizer.info.status is StepStatus.CONVERGED_GRADIENT
    assert optimizer.info.history_reset == ""
    assert x.tolist() == pytest.approx([1.0, 1.0], abs=1e-6)


def test_it_goes_on_from_a_checkpoint() -> None:
    def run(optimizer: SpectralGradient, x: Tensor) -> Callable[[], Tensor]:
        return standard(optimizer, lambda: rosenbrock(x))

    x = start_at(-1.2, 1.0)
    optimizer = SpectralGradient([x], max_iter=4)
    optimizer.step(run(optimizer, x))
    y = x.detach().clone().requires_grad_()
    other = SpectralGradient([y], max_iter=4)
    other.load_state_dict(optimizer.state_dict())
    for one, at in ((optimizer, x), (other, y)):
        one.step(run(one, at))
    assert torch.equal(x, y)
    steps = [o.state_dict()["state"][0]["n_iter"] for o in (optimizer, other)]
    assert steps[0] == steps[1] > 4
