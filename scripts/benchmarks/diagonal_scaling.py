"""Steps to a loss on a small network with badly scaled inputs, compared with a tuned Adam."""

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

SEEDS = (0, 1, 2, 3, 4)
# Inputs, hidden units, and decades between the largest and the smallest unit.
SIZES = ((2, 8, 3.0), (20, 30, 2.0))
TARGETS = (0.1, 0.03)
LIMIT = 600
ADAM_RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
RATES = (0.1, 0.15, 0.3, 0.6, 1.0, 2.0, 4.0)
SOPHIA_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


@dataclass(frozen=True)
class Problem:
    """A regression problem in one batch.

    Attributes:
        model: The initial network.
        inputs: Independent inputs, each in a different unit.
        targets: Outputs of a similar network for the inputs in good units.
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor


def problem(inputs: int, hidden: int, decades: float, seed: int) -> Problem:
    """A regression on the outputs of a network of the same size, with badly scaled inputs."""
    torch.manual_seed(seed)
    x = torch.randn(1000, inputs)
    widths = [inputs, hidden, 1]
    teacher = chain(widths, nn.Tanh)
    with torch.no_grad():
        y = teacher(x)
    units = 10 ** torch.linspace(-decades, 0, inputs)[torch.randperm(inputs)]
    return Problem(chain(widths, nn.Tanh), x * units, (y - y.mean()) / y.std())


def steps_to(make: Callable[..., Any], made: Problem, limit: int) -> list[tuple[int, float]]:
    """Steps and seconds to each target; the limit for targets that are not reached."""
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
    """Tunes each learning rate for each target, and compares medians over seeds."""
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
    for inputs, hidden, decades in SIZES[:1] if options.quick else SIZES:
        name = f"{inputs}-{hidden}-1"
        table = Table(
            f"Steps to a loss, {name}, units {decades:g} decades apart (median; best rate)",
            ["optimizer", *(f"{t:g}" for t in TARGETS), *(f"time to {t:g}" for t in TARGETS)],
        )
        times: dict[str, float] = {}
        for contender in progress(list(contenders), f"diagonal scaling {name}"):
            kind, rates = contenders[contender]
            found = {}
            for rate in rates:
                made = partial(problem, inputs, hidden, decades)
                make = partial(kind, lr=rate)
                found[rate] = [steps_to(make, made(seed), limit) for seed in seeds]
            best = [_best(found, i) for i in range(len(TARGETS))]
            cells = [
                f"{steps:.0f} (lr {rate:g})" if steps < limit else "-" for steps, _, rate in best
            ]
            table.add(contender, *cells, *(seconds(time) for _, time, _ in best))
            reached = {
                f"to {target:g}": {"steps": steps, "seconds": time, "rate": rate}
                for target, (steps, time, rate) in zip(TARGETS, best, strict=True)
                if steps < limit
            }
            for target, cell in reached.items():
                first = times.setdefault(target, cell["seconds"])  # Adam is the first
                cell["time over Adam"] = cell["seconds"] / first
            report.record(f"diagonal.scaling.{name}.{contender}", reached)
        report.show(table)


def _best(found: dict[float, list[list[tuple[int, float]]]], i: int) -> tuple[float, float, float]:
    """Median steps and seconds to a target at the fastest learning rate, and that rate."""
    medians = {
        rate: statistics.median(reached[i][0] for reached in runs) for rate, runs in found.items()
    }
    rate = min(medians, key=lambda r: medians[r])
    return medians[rate], statistics.median(reached[i][1] for reached in found[rate]), rate
