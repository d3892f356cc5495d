"""Levenberg-Marquardt steps on mini-batches of unequal parts, on two ranks and in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tests.support.ranks import on_both, run_on_ranks
from torch_secondorder import LevenbergMarquardt, StepStatus

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed"),
]

#: The samples of both ranks in each step.
SIZES = ((5, 2), (1, 6), (12, 9), (3, 3), (2, 20))
BAD = 3  # the step in which a sample of the second rank is not finite

CASES: dict[str, dict[str, Any]] = {
    "momentum": {"lr": 0.3, "momentum": 0.9, "max_norm": 0.3, "globalization": None},
    "momentum, primal": {
        **{"lr": 0.3, "momentum": 0.9, "damping": 0.1, "globalization": None},
        "solver": "primal",
    },
    "damping": {"damping": 1.0, "scaling": "identity"},
    "search": {"damping": 0.5, "momentum": 0.5, "globalization": "armijo"},
}


def parts(step: int) -> list[tuple[Tensor, Tensor]]:
    """The samples of each rank."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(sum(SIZES[step]), 3, generator=generator, dtype=torch.float64)
    y = torch.sin(x.sum(1, keepdim=True))
    if step == BAD:
        x[-1, 0] = torch.nan
    return list(zip(x.split(SIZES[step]), y.split(SIZES[step]), strict=True))


def train(name: str, rank: int, ranks: int) -> dict[str, Any]:
    """Losses, kinds of endings and weights of a case; one process averages over both parts."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    model = plain if ranks == 1 else DistributedDataParallel(plain)
    optimizer = LevenbergMarquardt(model.parameters(), **CASES[name])
    losses, statuses, rows = [], [], []
    for step in range(len(SIZES)):
        mine = parts(step) if ranks == 1 else [parts(step)[rank]]

        def closure(mine: list[tuple[Tensor, Tensor]] = mine) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = sum(F.mse_loss(model(x), y) for x, y in mine) / len(mine)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
        assert optimizer.info is not None
        statuses.append(list(StepStatus).index(optimizer.info.status))
        rows.append(optimizer.info.rows)
    values = [p.detach().clone() for p in plain.parameters()]
    return {"losses": losses, "statuses": statuses, "rows": rows, "values": values}


def every_case(rank: int, ranks: int) -> dict[str, Any]:
    return {name: train(name, rank, ranks) for name in CASES}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks([every_case], tmp_path_factory.mktemp("batches"))


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_as_one_process(name: str, ranks: list[dict[str, Any]]) -> None:
    found, alone = on_both(ranks, "every_case")[name], train(name, 0, 1)
    assert found["statuses"] == alone["statuses"]
    assert list(StepStatus)[alone["statuses"][BAD]] is StepStatus.NONFINITE_START
    assert found["rows"] == alone["rows"]
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-8, nan_ok=True)
    torch.testing.assert_close(found["values"], alone["values"], rtol=1e-8, atol=1e-9)
