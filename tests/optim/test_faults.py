"""Processes that die: killed at any moment, a training goes on as if nothing had happened."""

from __future__ import annotations

import multiprocessing
import random
import signal
import sys
import time
from collections import Counter
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import crashing_training
from tests.support.processes import start_server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL"),
]

STEPS = 56  # an attempt gets no further than four
#: Kills that have to hit, while it trains and while it writes a checkpoint.
WANTED = {"training": 5, "saving": 3}
ATTEMPTS = 14


def train(path: Path, pipe: Connection) -> None:
    """The process that is killed; it waits after each report until it may go on."""

    def report(what: str, step: int) -> None:
        pipe.send((what, step))
        pipe.recv()

    crashing_training.run(path, STEPS, report)
    pipe.send(("done", STEPS))


class Victim:
    """A training process, and what it says it does."""

    def __init__(self, path: Path) -> None:
        context = multiprocessing.get_context(start_server())
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=train, args=(path, theirs))
        self.process.start()
        theirs.close()

    def says(self) -> tuple[str, int]:
        assert self._pipe.poll(60), "the process says nothing"
        said: tuple[str, int] = self._pipe.recv()
        return said

    def go_on(self) -> None:
        self._pipe.send(None)

    def wait_for(self, file: Path) -> None:
        """Until the file is there, or it is too late for that."""
        while not (file.exists() or self._pipe.poll(0)):
            pass

    def kill(self) -> bool:
        """Whether that hit it at work, and not where it waits."""
        assert self.process.is_alive()
        self.process.kill()
        self.process.join(60)
        assert self.process.exitcode == -signal.SIGKILL
        try:
            self._pipe.recv()
        except EOFError:
            return True
        return False


def kill_at(victim: Victim, what: str, fraction: float, temporary: Path) -> tuple[int, bool]:
    """Kills a training at some moment of a step or of the writing of a checkpoint.

    Args:
        victim: The training, just begun.
        what: `"training"` or `"saving"`.
        fraction: When, from 0 to 1; some are too late.
        temporary: The file that a checkpoint is written to.

    Returns:
        The step that it began at, and whether it was at work.
    """
    said, start = victim.says()
    assert said == "training"
    step, begun = start, time.perf_counter()
    last = {"training": 0.01, "saving": 0.002}  # seconds that these took
    # Beyond the first checkpoint, so that each process gets further than the one before it.
    while step < start + 2 * crashing_training.PERIOD or said != what:
        victim.go_on()
        following, step = victim.says()
        last[said] = time.perf_counter() - begun
        said, begun = following, time.perf_counter()
    victim.go_on()
    if what == "saving":
        victim.wait_for(temporary)
    time.sleep(fraction * last[what] / 2)
    return start, victim.kill()


def identical(first: Any, second: Any) -> bool:
    """Whether two checkpoints are the same bit for bit."""
    if isinstance(first, Tensor):
        same = first.dtype == second.dtype and first.shape == second.shape
        return same and torch.equal(first.nan_to_num(), second.nan_to_num())
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(
            identical(value, second[key]) for key, value in first.items()
        )
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(identical, first, second))
    return type(first) is type(second) and first == second


def test_killed_trainings_end_where_they_would_have(tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed.pt", tmp_path / "killed.pt"
    temporary = killed.with_suffix(".tmp")
    moments = random.Random(0)
    missing, starts = Counter(WANTED), []
    for _ in range(ATTEMPTS):
        what = moments.choice(sorted(missing.elements()))
        start, hit = kill_at(Victim(killed), what, moments.random(), temporary)
        starts.append(start)
        # A file that is left behind was being written.
        if hit and (what == "training" or temporary.exists()):
            missing[what] -= 1
        temporary.unlink(missing_ok=True)
        if not missing.total():
            break
    assert not missing.total(), missing
    assert starts[0] == 0
    assert all(a < b for a, b in pairwise(starts))

    for path in (killed, undisturbed):
        victim = Victim(path)
        while victim.says()[0] != "done":
            victim.go_on()
        victim.process.join(60)
        assert victim.process.exitcode == 0
    states = [torch.load(path, weights_only=True) for path in (killed, undisturbed)]
    assert states[0]["steps"] == STEPS
    for part, found in states[0].items():
        assert identical(found, states[1][part]), part


def test_what_is_compared_can_differ() -> None:
    state = {"a": [torch.ones(2), 1.0]}
    assert identical(state, {"a": [torch.ones(2), 1.0]})
    for other in (
        {"a": [torch.ones(2).nextafter(torch.tensor(2.0)), 1.0]},
        {"a": [torch.ones(2).double(), 1.0]},
        {"a": [torch.ones(2), 1]},
        {"a": [torch.ones(2)]},
        {"b": []},
    ):
        assert not identical(state, other)
