"""AdaSecant on two real ranks, sharded or with DDP, against one process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support import fully_sharded, shares
from tests.support.fully_sharded import FOLDER, resharded
from tests.support.ranks import on_both, run_on_ranks
from torch_secondorder import AdaSecant, StepStatus

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed"),
]


def sharded(rank: int, ranks: int) -> list[Any]:
    """Parameters of which a rank may have no part; a group that begins later."""
    found: list[Any] = []
    for arguments in ({}, {"secant": "coordinate", "use_adagrad": True, "update_period": 1}):
        share = fully_sharded.Share(rank, ranks)
        layers = list(share.model.children())
        groups = [
            {"params": [*layers[0].parameters(), *layers[2].parameters()], "weight_decay": 0.01},
            {"params": layers[4].parameters(), "lr": 0.0},
        ]
        optimizer = AdaSecant(groups, **arguments)
        for step in range(8):
            if step == 3:
                optimizer.param_groups[1]["lr"] = 0.5
            found.append(optimizer.step(share.closure).item())
            info = optimizer.info
            found += [info.rate, info.gamma, info.memory, info.outliers, info.probes]
        found += [info.grad_norm, *share.values()]
    return found


def reshard(rank: int, ranks: int) -> list[Any]:
    return [resharded(AdaSecant, kind, rank, ranks) for kind in ("plain", "by name")]


def meet_nan(rank: int, ranks: int) -> list[Any]:
    """One rank alone has a batch that is not finite, at the start or after the move."""
    share = fully_sharded.Share(rank, ranks)
    optimizer = AdaSecant(share.model.parameters(), update_period=1)
    found: list[Any] = []
    for bad in (None, 0, None, 1, None):
        calls: list[int] = []

        def closure(bad: int | None = bad, calls: list[int] = calls) -> torch.Tensor:
            optimizer.zero_grad()
            loss = share.loss()
            if rank == max(ranks - 1, 0) and bad == len(calls):
                loss = loss * math.nan
            calls.append(1)
            loss.backward()
            return loss

        optimizer.step(closure)
        info = optimizer.info
        ended = list(StepStatus).index(info.status)
        found += [(ended, info.nonfinite_trials), *share.values()]
    return found


def replicated(rank: int, ranks: int) -> list[Any]:
    share = shares.Share(rank, ranks)
    optimizer = AdaSecant(share.model.parameters())
    return [[optimizer.step(share.closure).item() for _ in range(8)], share.values()]


def _start(rank: int, ranks: int) -> None:
    import tempfile

    folder = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(folder)
    FOLDER.append(folder[0])


CHECKS = (_start, sharded, reshard, meet_nan, replicated)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    return run_on_ranks(CHECKS, folder)


@pytest.mark.parametrize("check", [sharded, reshard], ids=lambda check: check.__name__)
def test_shards_do_what_one_process_does(ranks: list[dict[str, Any]], check: Any) -> None:
    expected = check(0, 0)
    torch.testing.assert_close(on_both(ranks, check.__name__), expected, rtol=1e-9, atol=1e-10)


def test_ranks_stay_together_where_one_is_not_finite(ranks: list[dict[str, Any]]) -> None:
    found = on_both(ranks, "meet_nan")
    statuses = list(StepStatus)
    moved = statuses.index(StepStatus.MAX_ITERATIONS)
    nonfinite = statuses.index(StepStatus.NONFINITE_START)
    # After the bad start comes a move, later one that is shortened.
    expected = [(moved, 0), (nonfinite, 0), (moved, 0), (moved, 1), (moved, 0)]
    assert [x for x in found if isinstance(x, tuple)] == expected
    assert all(x.isfinite().all() for x in found if isinstance(x, torch.Tensor))


def test_two_ranks_do_what_one_process_does(ranks: list[dict[str, Any]]) -> None:
    losses, values = on_both(ranks, "replicated")
    expected_losses, expected = replicated(0, 1)
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-10)
    assert len(losses) == len(expected_losses)
