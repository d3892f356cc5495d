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
    {"update_period": 1, "max_size": 8},
)


def train(rank: int, ranks: int) -> list[Any]:
    found: list[Any] = []
    for options in OPTIONS:
        torch.manual_seed(2)
        model: nn.Module = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.Softplus(), nn.Flatten(), nn.LayerNorm(27), nn.Linear(27, 3)
        ).double()
        params = list(model.parameters())
        x, y = torch.randn(60, 1, 5, 5).double(), torch.randint(3, (60,))
        share = slice(rank * 60 // ranks, (rank + 1) * 60 // ranks)
        if ranks > 1:
            model = DistributedDataParallel(model)
        optimizer = KFAC(params, **options)

        def closure(model: nn.Module = model, optimizer: KFAC = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[share]), y[share])
            loss.backward()
            return loss

        found += [[optimizer.step(closure).item() for _ in range(5)]]
        found += [p.detach().clone() for p in params]
    return found


def test_two_ranks_make_the_steps_of_one_process(tmp_path: Path) -> None:
    together = on_both(run_on_ranks([train], tmp_path), "train")
    for ours, alone in zip(together, train(0, 1), strict=True):
        torch.testing.assert_close(
            torch.as_tensor(ours), torch.as_tensor(alone), rtol=1e-9, atol=1e-9
        )
