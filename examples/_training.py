"""Training loop of the examples: any optimizer, the same closure, a time limit."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from _report import Curve

if TYPE_CHECKING:
    from tqdm import tqdm

Loss = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Contender:
    """An optimizer in a comparison, with its batch size.

    Attributes:
        label: Its name in the table and the plot.
        make: Makes it for the parameters of a network.
        batch_size: Number of samples in a closure call, drawn anew for each step; None for all.
        schedule: Takes the share of the time that is over, returns a factor of the learning rate;
            None for a constant rate.
    """

    label: str
    make: Callable[[Iterable[nn.Parameter]], Optimizer]
    batch_size: int | None = None
    schedule: Callable[[float], float] | None = None


@dataclass(frozen=True)
class Task:
    """A training problem.

    Attributes:
        model: The initial network; each optimizer trains a copy.
        losses: Takes a batch size, yields the losses of the steps without end.
        measure: Measures the loss over the whole data and the score of a network.
        describe: Formats loss and score for the progress bar.
        interval: Ratio between the times of two measurements, which are not counted as training.
    """

    model: nn.Module
    losses: Callable[[int | None], Iterator[Loss]]
    measure: Callable[[nn.Module], tuple[float, float]]
    describe: Callable[[float, float], str]
    interval: float = 1.1


@dataclass
class Run:
    """The result of training with one optimizer.

    Attributes:
        contender: The optimizer.
        model: The trained network.
        curve: Loss and score along the way.
        seconds: Time used for training.
        steps: Calls of `step()`.
        evaluations: Calls of the closure.
        products: Products with the curvature, if the optimizer reports them.
        ending: Reason for ending before the time limit; empty if there is none.
    """

    contender: Contender
    model: nn.Module
    curve: Curve = field(default_factory=Curve)
    seconds: float = 0.0
    steps: int = 0
    evaluations: int = 0
    products: int = 0
    ending: str = ""


def take_step(model: nn.Module, optimizer: Optimizer, loss_of: Loss) -> int:
    """Takes one step of any optimizer; they all take the same closure.

    Returns:
        Number of closure evaluations.
    """
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.step(closure)
    return evaluations


def train(
    task: Task,
    contenders: Mapping[str, Contender],
    name: str,
    *,
    seconds: float,
    target: float | None = None,
) -> Run:
    """Trains until the time limit, or until training cannot go on.

    Args:
        task: The problem.
        contenders: All optimizers of the comparison, for labels of equal width.
        name: Name of the one to train with.
        seconds: Time for training. The last step begins before it is over.
        target: Ends the training once the score is at most this.
    """
    contender = contenders[name]
    warm_up(task, contender)
    run = Run(contender, copy.deepcopy(task.model))
    optimizer = contender.make(run.model.parameters())
    losses = task.losses(contender.batch_size)
    fixed = contender.batch_size is None
    rates = [group["lr"] for group in optimizer.param_groups]
    device = next(run.model.parameters()).device
    next_measurement = 0.0
    with progress_bar(contenders, contender.label, seconds) as bar:
        measure(task, run, bar)
        while run.seconds < seconds and not run.ending:
            before = copy_parameters(run.model) if fixed else None
            loss_of = next(losses)
            if contender.schedule is not None:
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * contender.schedule(run.seconds / seconds)
            start = clock(device)
            run.evaluations += take_step(run.model, optimizer, loss_of)
            run.seconds += clock(device) - start
            run.steps += 1
            run.products += reported(optimizer, "products") or 0
            if before is not None and same_parameters(run.model, before):
                info = getattr(optimizer, "info", None)
                run.ending = info.status.value if info else "the last step changed nothing"
            if run.seconds >= next_measurement:
                measure(task, run, bar)
                next_measurement = task.interval * run.seconds
                if target is not None and run.curve.score[-1] <= target:
                    run.ending = f"the target {target:g} is reached"
            if not math.isfinite(run.curve.loss[-1]):
                run.ending = "the loss is not finite"
        measure(task, run, bar)
    return run


def reported(optimizer: Optimizer, name: str) -> Any:
    """A field of the optimizer's report on its last step; None if it has none."""
    info = getattr(optimizer, "info", None)
    return None if info is None else info.as_dict().get(name)


def warm_up(task: Task, contender: Contender) -> None:
    """Takes steps on a copy, so that one-time costs of torch are not counted."""
    model = copy.deepcopy(task.model)
    optimizer = contender.make(model.parameters())
    losses = task.losses(contender.batch_size)
    for _ in range(2):
        take_step(model, optimizer, next(losses))


@torch.no_grad()
def measure(task: Task, run: Run, bar: tqdm) -> None:
    """Records loss and score of a run; this is not counted as training time."""
    if run.curve.seconds and run.curve.seconds[-1] == run.seconds:
        return
    run.curve.add(run.seconds, run.evaluations, *task.measure(run.model), run.steps)
    bar.set_postfix_str(task.describe(run.curve.loss[-1], run.curve.score[-1]), refresh=False)
    bar.update(min(run.seconds, bar.total) - bar.n)


def batches(
    tensors: tuple[Tensor, ...], batch_size: int | None, seed: int
) -> Iterator[tuple[Tensor, ...]]:
    """Yields batches without end: random ones, reshuffled each epoch, or always all samples."""
    first = tensors[0]
    if batch_size is None:
        while True:
            yield tensors
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(first), generator=generator).to(first.device)
        for indices in order.split(batch_size):
            yield tuple(t[indices] for t in tensors)


def clock(device: torch.device) -> float:
    """Reads the time, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def copy_parameters(model: nn.Module) -> list[Tensor]:
    """Copies the parameters, for `same_parameters`."""
    return [p.detach().clone() for p in model.parameters()]


def same_parameters(model: nn.Module, before: list[Tensor]) -> bool:
    """True if no parameter has changed: the optimizer has converged, or is stuck."""
    return all(map(torch.equal, model.parameters(), before))


def progress_bar(contenders: Mapping[str, Contender], label: str, seconds: float) -> tqdm:
    """A progress bar over seconds of training; it updates rarely if stderr is not a terminal."""
    from tqdm import tqdm  # here, so that benchmarks can take tasks without it

    return tqdm(
        total=seconds,
        desc=label.ljust(max(len(c.label) for c in contenders.values())),
        bar_format="{desc} {percentage:3.0f}%|{bar:24}| {n:.1f}/{total:.1f} s{postfix}",
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
    )


def endings(runs: Iterable[Run]) -> str:
    """One line for each run that ended before the time limit, with the reason."""
    return "".join(
        f"{run.contender.label} ended after {run.seconds:.1f} s: {run.ending}\n"
        for run in runs
        if run.ending
    )
