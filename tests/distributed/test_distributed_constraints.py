"""Constraints on two ranks with half a batch each are those of one process with all of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tests.support.ranks import on_both, run_on_ranks
from torch_secondorder import BFGS, LBFGS, AdaHessian, Constrained, NewtonCG, Projected
from torch_secondorder._optim.flat import FlatOptimizer
from torch_secondorder.constraints import NormBall, UnitNorm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed"),
]

STEPS = 8

INNER: dict[str, Callable[..., Any]] = {
    "adam": partial(torch.optim.Adam, lr=0.05),
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.5),
    "lbfgs": partial(LBFGS, max_iter=3, weight_decay=0.1),
    "bfgs": partial(BFGS, max_iter=3, weight_decay=0.1),
    "newton": partial(NewtonCG, max_cg_iter=4, weight_decay=0.1, damping=1.0),
    "newton_hessian": partial(
        NewtonCG,
        curvature="hessian",
        globalization="damping",
        damping=1.0,
        max_cg_iter=4,
        weight_decay=0.1,
    ),
    "adahessian": partial(AdaHessian, lr=0.02, eps=0.01),
}
KINDS = ("parameters", "batch", "both")
CASES = [(inner, kind) for inner in INNER for kind in KINDS]
# Where the constraints are on the batch, the curvature of the square of a mean is the mean of the
# ranks' own: the way is another, the solution is the same.
SOLVED = [(name, kind) for name in ("newton", "newton_hessian") for kind in ("batch", "both")]
BY_ESTIMATES = [("adahessian", "batch"), ("adahessian", "both")]


class Task:
    """A linear classifier, its part of the batch, and constraints."""

    def __init__(self, rank: int, ranks: int) -> None:
        torch.manual_seed(7)
        self.plain = nn.Linear(4, 3).double()
        self.model: Any = self.plain if ranks == 1 else DistributedDataParallel(self.plain)
        x, y = torch.randn(16, 4, dtype=torch.float64), torch.randint(3, (16,))
        self.x, self.y = x.chunk(ranks)[rank], y.chunk(ranks)[rank]
        self.outputs: Tensor | None = None

    def loss(self) -> Tensor:
        self.outputs = self.model(self.x)
        return F.cross_entropy(self.outputs, self.y)

    def centred(self) -> Tensor:
        return self.plain.bias.sum() - 0.3

    def short(self) -> Tensor:
        return self.plain.weight.square().sum(1) - 0.2

    def balanced(self) -> Tensor:
        """A mean over the batch, of outputs that are there already."""
        assert self.outputs is not None
        p = self.outputs.softmax(-1).mean(0)
        return p[:2] - 0.25

    def constrained(self, inner: Any, kind: str) -> Constrained:
        equalities = None if kind == "batch" else {"centred": self.centred}
        inequalities: dict[str, Any] = {} if kind == "batch" else {"short": self.short}
        if kind != "parameters":
            inequalities["balanced"] = self.balanced
        return Constrained(inner, equalities, inequalities)


def train(rank: int, ranks: int, name: str, kind: str) -> dict[str, Any]:
    """Losses, weights and multipliers of a case."""
    task = Task(rank, ranks)
    optimizer = task.constrained(INNER[name](task.model.parameters()), kind)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = task.loss()
        value.backward()
        return value

    for _ in range(60 if (name, kind) in SOLVED else STEPS):
        optimizer.step(closure)
    assert optimizer.info is not None
    return {
        "values": [p.detach().clone() for p in task.plain.parameters()],
        "multipliers": dict(optimizer.multipliers),
        "violation": optimizer.info.violation,
    }


def every_case(rank: int, ranks: int) -> dict[str, Any]:
    return {f"{name}, {kind}": train(rank, ranks, name, kind) for name, kind in CASES}


def resumed(rank: int, ranks: int) -> dict[str, Any]:
    """A checkpoint made on the first rank goes on, on all of them."""
    task = Task(rank, ranks)
    optimizer = task.constrained(LBFGS(task.model.parameters(), max_iter=3), "both")

    def closure() -> Tensor:
        task.model.zero_grad()
        value = task.loss()
        value.backward()
        return value

    for _ in range(3):
        optimizer.step(closure)
    states = [task.plain.state_dict(), optimizer.state_dict()]
    if ranks > 1:
        dist.broadcast_object_list(states, 0)
    other = Task(rank, ranks)
    other.plain.load_state_dict(states[0])
    second = other.constrained(LBFGS(other.model.parameters(), max_iter=3), "both")
    second.load_state_dict(states[1])

    def closure_of_other() -> Tensor:
        other.model.zero_grad()
        value = other.loss()
        value.backward()
        return value

    for _ in range(3):
        optimizer.step(closure)
        second.step(closure_of_other)
    assert torch.equal(task.plain.weight, other.plain.weight)
    assert all(torch.equal(y, second.multipliers[k]) for k, y in optimizer.multipliers.items())
    return {"values": [p.detach().clone() for p in other.plain.parameters()]}


def in_sets(rank: int, ranks: int) -> dict[str, Any]:
    """Parameters on spheres and in balls."""
    found = {}
    for name, make in INNER.items():
        task = Task(rank, ranks)
        inner = make(task.model.parameters())
        sets: list[Any] = [(task.plain.weight, UnitNorm(dim=1))]
        if not isinstance(inner, FlatOptimizer):
            sets.append((task.plain.bias, NormBall(0.2)))
        optimizer = Projected(inner, sets)

        def closure(task: Task = task) -> Tensor:
            task.model.zero_grad()
            value = task.loss()
            value.backward()
            return value

        losses = [optimizer.step(closure).item() for _ in range(STEPS)]
        assert losses[-1] < losses[0]
        assert optimizer.info is not None and optimizer.info.violation < 1e-12
        found[name] = [p.detach().clone() for p in task.plain.parameters()]
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks([in_sets, every_case, resumed], tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_weights_and_multipliers_are_those_of_one_process(
    ranks: list[dict[str, Any]], name: str, kind: str
) -> None:
    found = on_both(ranks, "every_case")[f"{name}, {kind}"]
    expected = train(0, 1, name, kind)
    tolerance = 1e-9
    if (name, kind) in SOLVED:
        assert found["violation"] < 1e-3
        tolerance = 2e-3
    if (name, kind) not in BY_ESTIMATES:
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert any(y.abs().max() > 0 for y in found["multipliers"].values())


def test_a_checkpoint_goes_on_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    found = on_both(ranks, "resumed")
    torch.testing.assert_close(found, resumed(0, 1), rtol=1e-9, atol=1e-9)


def test_sets_are_kept_alike(ranks: list[dict[str, Any]]) -> None:
    found = on_both(ranks, "in_sets")
    torch.testing.assert_close(found, in_sets(0, 1), rtol=1e-9, atol=1e-9)
