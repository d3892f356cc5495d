"""Steps to a loss on a small network whose inputs come in bad units, beside a tuned Adam."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .harness import load_ours, progress
from .networks import chain
from .registry import Options
from .report import Report, Table, seconds

SEEDS = (0, 1, 2)
DECADES = 2.0  # between the largest and the smallest unit
TARGETS = (0.1, 0.01)
LIMIT = 2000
ADAM_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
RATES = (0.03, 0.1, 0.15, 0.3, 0.6, 1.0)
SOPHIA_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


@dataclass(frozen=True)
class Problem:
    """A regression, all of it in one batch.

    Attributes:
        model: The network at the start.
        inputs: Independent, each in a unit of its own.
        targets: What a network of the same kind makes of the inputs in good units.
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor


def problem(seed: int) -> Problem:
    """Twenty inputs, thirty hidden units."""
    torch.manual_seed(seed)
    x = torch.randn(1000, 20)
    teacher = chain([20, 30, 1], nn.Tanh)
    with torch.no_grad():
        y = teacher(x)
    units = 10 ** torch.linspace(-DECADES, 0, 20)[torch.randperm(20)]
    return Problem(chain([20, 30, 1], nn.Tanh), x * units, (y - y.mean()) / y.std())


def steps_to(make: Callable[..., Any], seed: int, limit: int) -> list[tuple[int, float]]:
    """Steps and seconds to each target; the limit where one is not reached."""
    made = problem(seed)
    optimizer = make(made.model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(made.model(made.inputs), made.targets)
        loss.backward()
        return loss

    reached: list[tuple[int, float]] = []
    start = time.perf_counter()
    for step in range(limit):
        loss = float(optimizer.step(closure).detach())
        while len(reached) < len(TARGETS) and loss < TARGETS[len(reached)]:
            reached.append((step, time.perf_counter() - start))
        if len(reached) == len(TARGETS):
            break
    used = time.perf_counter() - start
    return reached + [(limit, used)] * (len(TARGETS) - len(reached))


def run(options: Options, report: Report) -> None:
    """Tunes everybody's learning rate on each target, and compares medians over seeds."""
    adahessian = load_ours("torch_secondorder", "AdaHessian")
    sophia = load_ours("torch_secondorder", "Sophia")
    if adahessian is None or sophia is None:
        return
    often = partial(sophia, estimator="gnb", update_period=1, gamma=1.0)
    contenders = {
        "Adam": (torch.optim.Adam, ADAM_RATES),
        "AdaHessian": (adahessian, RATES),
        "AdaHessian, 10 probes": (partial(adahessian, n_samples=10), RATES),
        "Sophia-G, each step, gamma 1": (often, SOPHIA_RATES),
    }
    limit, seeds = (50, SEEDS[:1]) if options.quick else (LIMIT, SEEDS)
    table = Table(
        f"Steps to a loss on a network with units {DECADES:g} decades apart (best rate)",
        ["optimizer", *(f"{t:g}" for t in TARGETS), *(f"time to {t:g}" for t in TARGETS)],
    )
    for name in progress(list(contenders), "diagonal scaling"):
        kind, rates = contenders[name]
        found = {
            rate: [steps_to(partial(kind, lr=rate), seed, limit) for seed in seeds]
            for rate in rates
        }
        steps, times, best = [], [], []
        for i in range(len(TARGETS)):
            medians = {
                rate: statistics.median(runs[i][0] for runs in results)
                for rate, results in found.items()
            }
            rate = min(medians, key=lambda r: medians[r])
            steps.append(medians[rate])
            best.append(rate)
            times.append(statistics.median(runs[i][1] for runs in found[rate]))
        cells = [
            f"{s:.0f} (lr {r:g})" if s < limit else "-" for s, r in zip(steps, best, strict=True)
        ]
        table.add(name, *cells, *map(seconds, times))
        report.record(f"diagonal.scaling.{name}", {"steps": steps, "rates": best, "times": times})
    report.show(table)
