"""Regression tests: each case here went wrong once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from torch_secondorder import LBFGS
from torch_secondorder.curvature import InverseBFGS


def rosenbrock(x: Tensor) -> Tensor:
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def step(optimizer: LBFGS, x: Tensor, factor: float = 1.0) -> float:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = factor * rosenbrock(x)
        loss.backward()
        return loss

    return float(optimizer.step(closure))


def test_a_state_kept_in_memory_stays_what_it_was() -> None:
    x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
    optimizer = LBFGS([x], max_iter=3, history_size=4)
    for _ in range(3):
        step(optimizer, x)
    kept, point = optimizer.state_dict(), x.detach().clone()
    first = [step(optimizer, x) for _ in range(4)]
    optimizer.load_state_dict(kept)
    x.data.copy_(point)
    assert [step(optimizer, x) for _ in range(4)] == first


@pytest.mark.parametrize("factor", [1e-25, 1e-20, 1.0, 1e20, 1e25])
def test_float32_losses_of_any_size_keep_their_history(factor: float) -> None:
    x = torch.tensor([-1.2, 1.0], requires_grad=True)
    optimizer = LBFGS([x], max_iter=60, max_eval=500, tolerance_grad=0, tolerance_change=0)
    step(optimizer, x, factor)
    assert optimizer.info.skipped_pairs <= 3  # the last ones, where rounding is all that is left
    torch.testing.assert_close(x.detach(), torch.ones(2), rtol=0, atol=2e-3)


def test_the_budget_of_evaluations_follows_the_iterations() -> None:
    x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
    optimizer = LBFGS([x], max_iter=2)
    optimizer.param_groups[0]["max_iter"] = 30
    step(optimizer, x)
    assert optimizer.info.iterations > 20


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_a_hyperparameter_spoiled_later(name: str, value: float) -> None:
    x, y = (torch.ones(2, requires_grad=True) for _ in range(2))
    optimizer = LBFGS([{"params": [x]}, {"params": [y]}])
    optimizer.param_groups[1][name] = value
    with pytest.raises(ValueError, match=rf"{name} must be a finite number of at least 0, got"):
        step(optimizer, x)
    assert torch.equal(x, torch.ones(2))


def test_the_checkpoint_of_another_kind_of_optimizer_is_refused() -> None:
    x = torch.ones(2, requires_grad=True)
    adam, optimizer = torch.optim.Adam([x], lr=1e-3), LBFGS([x])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"no state of LBFGS.*'betas'.*lack 'max_iter'"):
        optimizer.load_state_dict(adam.state_dict())
    assert optimizer.state_dict() == before


def test_expanded_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parameter 0 of shape \(3,\) was expanded"):
        LBFGS([nn.Parameter(torch.zeros(1).expand(3))])


def test_without_a_search_the_scale_is_that_of_the_newest_pair() -> None:
    """The largest one is too bold where nothing reins it in."""
    history = InverseBFGS(2, 5, torch.float64, largest_scale=False)
    history.push(torch.tensor([1.0, 0.0]).double(), torch.tensor([0.1, 0.0], dtype=torch.float64))
    history.push(torch.tensor([1.0, 0.0]).double(), torch.tensor([2.0, 0.0]).double())
    assert (history @ torch.tensor([0.0, 1.0]).double()).tolist() == [0, 0.5]
    history.largest_scale = True
    torch.testing.assert_close(
        history @ torch.tensor([0.0, 1.0]).double(), torch.tensor([0.0, 2.5]).double()
    )
    x = torch.tensor([-1.2, 1.0], requires_grad=True)
    for search, bold in ((None, False), ("strong_wolfe", True), ("armijo", True)):
        optimizer = LBFGS([x], line_search_fn=search)
        step(optimizer, x)
        assert optimizer._inverse.largest_scale is bold
