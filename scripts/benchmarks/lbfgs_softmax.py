"""Time to a gradient tolerance on L2-regularized softmax regression, float32."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .harness import Timing, load_ours, progress, ratio, say, synchronize
from .networks import images
from .registry import Options
from .report import Report, Table, seconds

PENALTY = 1e-4
THRESHOLDS = (1e-4, 3e-5, 1e-5)
# Steps in a row that leave the parameters where they were, after which a run counts as stalled.
STALLED = 3


class _ReachedError(Exception):
    """Ends a run from inside its closure: the last threshold is met, or the time is up."""


@dataclass
class Run:
    """One run to the last threshold.

    Attributes:
        seconds: For each threshold, when an evaluation first met it.
        evaluations: For each threshold, how many evaluations had been made then.
        best: The smallest |g|_inf of all evaluations.
        total: All evaluations.
        ended: Why the run ended.
    """

    seconds: dict[float, float] = field(default_factory=dict)
    evaluations: dict[float, int] = field(default_factory=dict)
    best: float = float("inf")
    total: int = 0
    ended: str = ""


@dataclass(frozen=True)
class Data:
    """Images and labels on the device."""

    inputs: Tensor
    labels: Tensor


Make = Callable[[list[Tensor]], Any]


def optimizers() -> dict[str, Make]:
    """The optimizers with their defaults, as people run them, but with no other stopping test."""
    table: dict[str, Make] = {}
    tolerances: dict[str, Any] = {"tolerance_grad": 0.0, "tolerance_change": 0.0}
    ours = load_ours("torch_secondorder", "LBFGS")
    if ours is not None:
        table["ours"] = partial(ours, **tolerances)
    theirs = partial(torch.optim.LBFGS, line_search_fn="strong_wolfe", **tolerances)
    table["torch h=100"] = theirs
    table["torch h=20"] = partial(theirs, history_size=20)
    return table


def descend(make: Make, data: Data, limit: float) -> Run:
    """Calls `step` until the last threshold, a stall or the time limit."""
    model = nn.Linear(784, 10).to(data.inputs.device)
    for p in model.parameters():
        nn.init.zeros_(p)
    optimizer = make(list(model.parameters()))
    run = Run()
    synchronize(data.inputs.device)
    start = time.perf_counter()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(data.inputs), data.labels)
        loss = loss + 0.5 * PENALTY * model.weight.square().sum()
        loss.backward()
        # Every evaluation counts, accepted or not: the same test for all, at one sync each.
        norm = torch.stack([p.grad.abs().max() for p in model.parameters() if p.grad is not None])
        _note(run, norm.max().item(), time.perf_counter() - start, limit)
        return loss

    still = 0
    try:
        while still < STALLED:
            before = model.weight.detach().clone()
            optimizer.step(closure)
            still = still + 1 if torch.equal(before, model.weight) else 0
        run.ended = "stalled"
    except _ReachedError as reason:
        run.ended = str(reason)
    return run


def _note(run: Run, norm: float, elapsed: float, limit: float) -> None:
    run.total += 1
    run.best = min(run.best, norm)
    for threshold in THRESHOLDS:
        if norm <= threshold and threshold not in run.seconds:
            run.seconds[threshold] = elapsed
            run.evaluations[threshold] = run.total
    if THRESHOLDS[-1] in run.seconds:
        raise _ReachedError("reached the last threshold")
    if elapsed > limit:
        raise _ReachedError(f"stopped after {limit:g} s")


def _timing(runs: list[Run], threshold: float) -> Timing | None:
    """The times of a threshold; None if a run did not reach it."""
    if not all(threshold in run.seconds for run in runs):
        return None
    return Timing(tuple(run.seconds[threshold] for run in runs))


def _show(runs: dict[str, list[Run]], source: str, count: int, report: Report) -> None:
    base = next(iter(runs))
    header = ["optimizer", *(f"|g| <= {t:g}" for t in THRESHOLDS), "best |g|", "ended"]
    table = Table(
        f"Softmax regression, {count} images, {source}, float32: evaluations, time", header
    )
    for name, made in runs.items():
        cells = []
        for threshold in THRESHOLDS:
            timing = _timing(made, threshold)
            made_by_then = made[0].evaluations.get(threshold, 0)
            text = f"{made_by_then} {seconds(timing.median)}" if timing else "not reached"
            cells.append(text)
        table.add(name, *cells, f"{min(run.best for run in made):.2e}", made[0].ended)
    report.show(table)
    ratios: dict[str, Any] = {}
    for name in list(runs)[1:]:
        for threshold in THRESHOLDS:
            ours, theirs = _timing(runs[base], threshold), _timing(runs[name], threshold)
            if ours and theirs:
                compared = ratio(ours, theirs)
                say(f"time to {threshold:g}, {base} / {name}: {compared}")
                ratios[f"{base} / {name} to {threshold:g}"] = compared.as_dict()
    report.record("lbfgs.softmax.ratios", ratios)


def run(options: Options, report: Report) -> None:
    """Runs every optimizer by turns; the time includes the evaluations."""
    count, limit = (2_000, 10.0) if options.quick else (20_000, 60.0)
    inputs, labels, source = images(count)
    data = Data(inputs.to(options.device), labels.to(options.device))
    table = optimizers()
    descend(next(iter(table.values())), data, 1.0)  # warm-up
    runs: dict[str, list[Run]] = {name: [] for name in table}
    # A run lasts seconds: three tell as much as many of a short one.
    turns = [(turn, name) for turn in range(min(options.repeat, 3)) for name in table]
    for _, name in progress(turns, "softmax regression"):
        runs[name].append(descend(table[name], data, limit))
    _show(runs, source, count, report)
    report.record("lbfgs.softmax", {"data": source, "images": count})
    recorded = {name: [vars(one) for one in made] for name, made in runs.items()}
    report.record("lbfgs.softmax.runs", recorded)
