"""Training along a learning-rate schedule, for a time or a number of steps."""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import dataclass, field

import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from _training import Contender, Run, Task, clock, reported, take_step, warm_up

RISE, FLOOR = 0.05, 0.05  # part of a run with rising rate; final rate, relative to its peak
MEASUREMENTS = 15  # evenly spaced along a run
WIDEST = 36  # label of a progress bar


@dataclass
class Scheduled(Run):
    """A run with a learning-rate schedule.

    Attributes:
        rate: The peak learning rate; None for the optimizer's own.
        unclipped: Shares of the entries that were not clipped, if the optimizer reports them.
    """

    rate: float | None = None
    unclipped: list[float] = field(default_factory=list)

    @property
    def final(self) -> float:
        """The final validation loss; infinite instead of NaN."""
        loss = self.curve.score[-1]
        return math.inf if math.isnan(loss) else loss


def schedule(used: float) -> float:
    """The learning rate relative to its peak, when a part of the run is over.

    >>> [round(schedule(used), 3) for used in (0.0, 0.025, 0.05, 0.525, 1.0)]
    [0.0, 0.5, 1.0, 0.525, 0.05]
    """
    if used < RISE:
        return used / RISE
    cosine = (1 + math.cos(math.pi * min(1.0, (used - RISE) / (1 - RISE)))) / 2
    return FLOOR + (1 - FLOOR) * cosine


def train(
    task: Task,
    chosen: Contender,
    rate: float | None,
    *,
    seconds: float | None = None,
    steps: int | None = None,
    measurements: int = MEASUREMENTS,
    note: str = "",
    silent: bool = False,
) -> Scheduled:
    """Trains along the schedule, for a number of seconds or of steps.

    A run ends early if its loss is not finite any more.

    Args:
        task: The problem.
        chosen: The optimizer.
        rate: The peak learning rate; None for the optimizer's own.
        seconds: Time for training, without the measurements.
        steps: Number of steps instead.
        measurements: Number of measurements along the run.
        note: Text after the optimizer's name in the progress bar.
        silent: No progress bar.
    """
    warm_up(task, chosen)
    run = Scheduled(chosen, copy.deepcopy(task.model), rate=rate)
    optimizer = chosen.make(run.model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] if rate is None else rate

    def used() -> float:
        return run.steps / steps if steps else run.seconds / (seconds or 1.0)

    scheduler = LambdaLR(optimizer, lambda _: schedule(used()))
    losses = task.losses(chosen.batch_size)
    device = next(run.model.parameters()).device
    with progress_bar(f"{chosen.label}{note}", silent=silent) as bar:
        measure(task, run, bar, 0.0)
        while used() < 1 and math.isfinite(run.curve.loss[-1]):
            loss_of = next(losses)
            start, before = clock(device), used()
            run.evaluations += take_step(run.model, optimizer, loss_of)
            run.seconds += clock(device) - start
            run.steps += 1
            scheduler.step()
            if int(before * measurements) < int(used() * measurements):
                measure(task, run, bar, used())
                share = reported(optimizer, "unclipped")
                run.unclipped += [] if share is None else [share]
    return run


@torch.no_grad()
def measure(task: Task, run: Scheduled, bar: tqdm, used: float) -> None:
    """Records the losses of a run; this is not counted as training time."""
    run.curve.add(run.seconds, run.evaluations, *task.measure(run.model), run.steps)
    said = task.describe(run.curve.loss[-1], run.curve.score[-1])
    bar.set_postfix_str(f"{run.steps:,} steps, {run.seconds:.1f} s: {said}", refresh=False)
    bar.update(min(used, 1.0) - bar.n)


def progress_bar(label: str, *, silent: bool) -> tqdm:
    """A progress bar over one run; it updates rarely if stderr is not a terminal."""
    return tqdm(
        total=1.0,
        desc=label.ljust(WIDEST),
        bar_format="{desc} {percentage:3.0f}%|{bar:24}|{postfix}",
        disable=silent,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
    )
