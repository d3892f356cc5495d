"""Functions that run on two real processes of one gloo group, and what they gave."""

from __future__ import annotations

import datetime
import gc
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support.processes import start_server

RANKS = 2

#: Called with a rank and the number of ranks; one of one is a process with the whole batch.
Check = Callable[[int, int], Any]


def _run(rank: int, checks: Sequence[Check], folder: str) -> None:
    """One process: what each check gives, or how it failed, goes to a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    found: dict[str, Any] = {}
    for check in checks:
        try:
            found[check.__name__] = check(rank, RANKS)
        except Exception:
            found[check.__name__] = traceback.format_exc()
            break  # the ranks are out of step now
    torch.save(found, f"{folder}/rank{rank}")
    gc.collect()  # nothing of the group may outlive it, or its threads end the process
    dist.destroy_process_group()


def start_on_ranks(function: Callable[..., None], *arguments: Any) -> None:
    """Calls a function with a rank and these arguments in each process, and waits for them."""
    torch.multiprocessing.start_processes(function, arguments, RANKS, start_method=start_server())


def run_on_ranks(checks: Sequence[Check], folder: Path) -> list[dict[str, Any]]:
    """What every check gave on each rank, by its name; of one that failed, the traceback."""
    start_on_ranks(_run, list(checks), str(folder))
    return [torch.load(folder / f"rank{rank}") for rank in range(RANKS)]


def on_both(ranks: list[dict[str, Any]], name: str) -> Any:
    """What a check gave, bit for bit the same on both ranks."""
    for found in ranks:
        for failure in found.values():
            assert not isinstance(failure, str), failure
        assert name in found, sorted(found)
    first, second = (found[name] for found in ranks)
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    return first
