"""The certificate on two ranks, each with a part of the batch, and in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.ranks import on_both, run_on_ranks
from tests.support.shares import Share
from torch_secondorder import kkt_residuals

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed"),
]


def certified(rank: int, ranks: int) -> dict[str, Any]:
    """Numbers of the report, with a constraint on outputs and one on weights."""
    share = Share(rank, ranks)
    outputs: list[Tensor] = []
    weight = next(share.plain.parameters())

    def closure() -> Tensor:
        share.model.zero_grad()
        outputs[:] = [share.model(share.x)]
        loss = torch.nn.functional.cross_entropy(outputs[0], share.y)
        loss.backward()
        return loss

    report = kkt_residuals(
        closure,
        share.plain.named_parameters(),
        {"rate": lambda: outputs[0].mean(0)},
        {"size": lambda: weight.square().sum() - 1},
        second_order=True,
    )
    found = report.as_dict()
    numbers = ("loss", "stationarity", "feasibility", "complementarity", "curvature")
    return {
        **{name: found[name] for name in numbers},
        "rate": report.multipliers["rate"],
        "size": report.multipliers["size"],
        "gradient": weight.grad is None,
    }


def test_ranks_give_the_report_of_the_whole_batch(tmp_path: Path) -> None:
    shared = on_both(run_on_ranks([certified], tmp_path), "certified")
    torch.testing.assert_close(shared, certified(0, 1), rtol=1e-8, atol=1e-10)
    assert shared["gradient"]
