"""L-BFGS with the self-scaled Broyden updates."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from tests.support.bounded_problems import BOUNDED_PROBLEMS
from tests.support.closures import rosenbrock, standard, start_at
from tests.support.problems import make_problems
from torch_secondorder import BFGS, LBFGS, StepStatus
from torch_secondorder.curvature import InverseBFGS, ReducedBroyden

SCALED = ["ssbfgs", "ssbroyden"]


def chain(x: Tensor) -> Tensor:
    """Rosenbrock's function, chained."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


@pytest.mark.parametrize("update", SCALED)
def test_until_the_history_is_full_it_is_the_dense_method(
    update: str, device: torch.device
) -> None:
    paths = []
    for make in (LBFGS, BFGS):
        x = torch.linspace(-1, 1, 40, dtype=torch.float64, device=device).requires_grad_()
        optimizer = make([x], update=update, max_iter=1, max_eval=50)
        path = []
        closure = standard(optimizer, lambda x=x: chain(x))
        for _ in range(20):
            optimizer.step(closure)
            path.append(x.detach().clone())
        paths.append(torch.stack(path))
    torch.testing.assert_close(*paths, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("update", SCALED)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"history_size": 2}, {"line_search_fn": "hager_zhang"}, {"powell_damping": True}],
    ids=["default", "short", "hager_zhang", "damping"],
)
def test_it_solves_classical_problems(arguments: dict, update: str) -> None:
    for problem in make_problems(torch.device("cpu"))[:12]:
        x = problem.start.clone().requires_grad_()
        optimizer = LBFGS(
            [x], update=update, max_iter=2_000, max_eval=3_000, tolerance_grad=1e-6, **arguments
        )
        optimizer.step(standard(optimizer, lambda x=x, f=problem.function: f(x)))
        assert optimizer.info.status is StepStatus.CONVERGED_GRADIENT, problem.name
        assert problem.is_minimum(problem.function(x).item()), problem.name


@pytest.mark.parametrize("update", SCALED)
def test_within_bounds(update: str) -> None:
    for problem in BOUNDED_PROBLEMS:
        if problem.name in ("nonscomp", "bounded_rosenbrock", "journal_bearing"):
            continue  # slower
        x = problem.start.clone().requires_grad_()
        bounds = (problem.low, problem.high)
        optimizer = LBFGS(
            [x], update=update, bounds=bounds, max_iter=999, max_eval=999, tolerance_grad=1e-9
        )
        optimizer.step(standard(optimizer, lambda x=x, f=problem.function: f(x)))
        assert problem.is_minimum(problem.function(x).item()), problem.name


def test_fewer_evaluations_where_curvatures_differ(device: torch.device) -> None:
    """A quadratic whose curvatures span four decades, with a basis that is cut down."""
    counts = {}
    scale = torch.logspace(-2, 2, 300, dtype=torch.float64, device=device)
    for update in ("bfgs", "ssbroyden"):
        x = torch.ones(300, dtype=torch.float64, device=device, requires_grad=True)
        optimizer = LBFGS(
            [x],
            update=update,
            history_size=100,
            max_iter=1_000,
            max_eval=1_000,
            tolerance_grad=1e-6,
            tolerance_change=0,
        )
        optimizer.step(standard(optimizer, lambda x=x: (scale * x * x).sum() / 2))
        assert optimizer.info.status is StepStatus.CONVERGED_GRADIENT
        counts[update] = optimizer.info.evaluations
    assert counts["ssbroyden"] < 0.75 * counts["bfgs"]


def test_a_network_with_derivatives_gets_lower(device: torch.device) -> None:
    """What the updates are for: u'' = -sin on an interval, as a residual of a small network."""
    x = torch.linspace(0, math.pi, 20, dtype=torch.float64, device=device)[:, None]
    losses = {}
    for update in ("bfgs", "ssbroyden"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)).to(device).double()

        def loss(net: nn.Sequential = net) -> Tensor:
            points = x.clone().requires_grad_()
            (first,) = torch.autograd.grad(net(points).sum(), points, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), points, create_graph=True)
            return (second + x.sin()).square().mean() + net(x[[0, -1]]).square().sum()

        optimizer = LBFGS(net.parameters(), update=update, max_iter=1_000, max_eval=300)
        optimizer.step(standard(optimizer, loss))
        losses[update] = loss().item()
    assert losses["ssbroyden"] < losses["bfgs"] / 3


def test_a_changed_update_drops_what_was_learned(device: torch.device) -> None:
    x = start_at(-1.2, 1.0, device=device)
    optimizer = LBFGS([x], max_iter=3, update="ssbroyden")
    closure = standard(optimizer, lambda: rosenbrock(x))
    optimizer.step(closure)
    optimizer.update = "ssbfgs"
    optimizer.step(closure)
    assert not optimizer.info.history_reset  # the same matrix, further with another update
    assert isinstance(optimizer._inverse, ReducedBroyden)
    optimizer.update = "bfgs"
    optimizer.step(closure)
    assert optimizer.info.history_reset.startswith("update")
    assert isinstance(optimizer._inverse, InverseBFGS)


@pytest.mark.parametrize("update", ["bfgs", *SCALED])
def test_checkpoints_go_between_updates(update: str, device: torch.device) -> None:
    """One of the same update continues; one of another begins anew, and says so."""
    x = start_at(-1.2, 1.0, device=device)
    original = LBFGS([x], max_iter=4, update="ssbroyden")
    original.step(standard(original, lambda: rosenbrock(x)))
    state, start = copy.deepcopy(original.state_dict()), x.detach().clone()
    y = start.clone().requires_grad_()
    resumed = LBFGS([y], max_iter=4, update=update)
    resumed.load_state_dict(state)
    resumed.step(standard(resumed, lambda: rosenbrock(y)))
    original.step(standard(original, lambda: rosenbrock(x)))
    assert bool(resumed.info.history_reset) == (update == "bfgs")
    assert torch.equal(x, y) == (update == "ssbroyden")


def test_a_state_of_torch(device: torch.device) -> None:
    x = start_at(-1.2, 1.0, device=device)
    theirs = torch.optim.LBFGS([x], max_iter=5, line_search_fn="strong_wolfe")
    theirs.step(standard(theirs, lambda: rosenbrock(x)))
    optimizer = LBFGS([x], update="ssbroyden", max_iter=100)
    optimizer.load_state_dict(theirs.state_dict())
    assert optimizer._inverse.count
    for _ in range(20):  # the loaded groups have five iterations in a step
        optimizer.step(standard(optimizer, lambda: rosenbrock(x)))
        assert not optimizer.info.history_reset
    assert optimizer.info.status is StepStatus.CONVERGED_GRADIENT


def test_an_unknown_update() -> None:
    x = torch.zeros(2, requires_grad=True)
    with pytest.raises(
        ValueError, match="update must be one of 'bfgs', 'ssbfgs', 'ssbroyden', got 'newton'"
    ):
        LBFGS([x], update="newton")  # type: ignore[arg-type]
