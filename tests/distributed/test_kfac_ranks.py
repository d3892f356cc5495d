"""K-FAC on two real ranks with DistributedDataParallel, against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tests.support.ranks import on_both, run_on_ranks
from torch_secondorder import KFAC

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed"),
]

OPTIONS: tuple[dict[str, Any], ...] = (
    {"update_period": 2},
    {"update_period": 1, "ekfac": True},
    {"update_period": 1, "max_precond_dim": 8},
)


def one_run(rank: int, ranks: int, options: dict[str, Any]) -> list[Any]:
    torch.manual_seed(2)
    plain = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Softplus(), nn.Flatten(), nn.LayerNorm(27), nn.Linear(27, 3)
    ).double()
    x, y = torch.randn(60, 1, 5, 5).double(), torch.randint(3, (60,))
    x, y = x.chunk(ranks)[rank], y.chunk(ranks)[rank]
    model = plain if ranks == 1 else DistributedDataParallel(plain)
    optimizer = KFAC(plain.parameters(), **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    return [losses, *(p.detach().clone() for p in plain.parameters())]


def train(rank: int, ranks: int) -> list[Any]:
    return [value for options in OPTIONS for value in one_run(rank, ranks, options)]


def test_two_ranks_make_the_steps_of_one_process(tmp_path: Path) -> None:
    together = on_both(run_on_ranks([train], tmp_path), "train")
    for ours, alone in zip(together, train(0, 1), strict=True):
        torch.testing.assert_close(
            torch.as_tensor(ours), torch.as_tensor(alone), rtol=1e-9, atol=1e-9
        )
