"""Time to a gradient tolerance on L2-regularized softmax regression, float32.

`compare` is for any optimizers; `run` is for L-BFGS.
"""

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
# Consecutive steps without a change of the parameters, after which a run counts as stalled.
STALLED = 3


class _ReachedError(Exception):
    """Ends a run from inside its closure: the last threshold is met, or time is up."""


@dataclass
class Run:
    """One run to the last threshold.

    Attributes:
        seconds: For each threshold, the time when an evaluation first met it.
        evaluations: For each threshold, the number of evaluations up to then.
        products: The same for products, if the optimizer counts them.
        best: The smallest |g|_inf of all evaluations.
        total: Number of all evaluations.
        ended: Reason for the end of the run.
    """

    seconds: dict[float, float] = field(default_factory=dict)
    evaluations: dict[float, int] = field(default_factory=dict)
    products: dict[float, int] = field(default_factory=dict)
    best: float = float("inf")
    total: int = 0
    ended: str = ""


@dataclass(frozen=True)
class Data:
    """Images and labels on the device."""

    inputs: Tensor
    labels: Tensor


Make = Callable[[list[Tensor]], Any]


@dataclass(frozen=True)
class Contest:
    """A comparison of optimizers.

    Attributes:
        name: Name of the recorded results.
        thresholds: Thresholds for the largest entry of the gradient, decreasing; a run ends at the
            last.
        table: The optimizers. If the `curvature` of one has a number `products`, it is recorded.
        pairs: Pairs whose times are divided.
    """

    name: str
    thresholds: tuple[float, ...]
    table: dict[str, Make]
    pairs: tuple[tuple[str, str], ...]


# Only the gradient ends a run.
TOLERANCES: dict[str, Any] = {"tolerance_grad": 0.0, "tolerance_change": 0.0}


def optimizers() -> dict[str, Make]:
    """The optimizers with default settings."""
    table: dict[str, Make] = {}
    ours = load_ours("torch_secondorder", "LBFGS")
    if ours is not None:
        table["ours"] = partial(ours, **TOLERANCES)
    theirs = partial(torch.optim.LBFGS, line_search_fn="strong_wolfe", **TOLERANCES)
    table["torch h=100"] = theirs
    table["torch h=20"] = partial(theirs, history_size=20)
    return table


def descend(make: Make, data: Data, thresholds: tuple[float, ...], limit: float) -> Run:
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
        # Every evaluation counts, accepted or not: one test for all, with one sync each.
        norm = torch.stack([p.grad.abs().max() for p in model.parameters() if p.grad is not None])
        run.total += 1
        _note(run, norm.max().item(), time.perf_counter() - start, thresholds, optimizer)
        if time.perf_counter() - start > limit:
            raise _ReachedError(f"stopped after {limit:g} s")
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


def _note(
    run: Run, norm: float, elapsed: float, thresholds: tuple[float, ...], optimizer: Any
) -> None:
    run.best = min(run.best, norm)
    for threshold in thresholds:
        if norm <= threshold and threshold not in run.seconds:
            run.seconds[threshold] = elapsed
            run.evaluations[threshold] = run.total
            curvature = getattr(optimizer, "curvature", None)
            run.products[threshold] = getattr(curvature, "products", 0)
    if thresholds[-1] in run.seconds:
        raise _ReachedError("reached the last threshold")


def _timing(runs: list[Run], threshold: float) -> Timing | None:
    """The times to a threshold; None if a run did not reach it."""
    if not all(threshold in run.seconds for run in runs):
        return None
    return Timing(tuple(run.seconds[threshold] for run in runs))


def _cell(runs: list[Run], threshold: float) -> str:
    timing = _timing(runs, threshold)
    if timing is None:
        return "not reached"
    products = runs[0].products[threshold]
    count = f"{runs[0].evaluations[threshold]}" + (f"+{products}" if products else "")
    return f"{count} {seconds(timing.median)}"


def _show(contest: Contest, runs: dict[str, list[Run]], title: str, report: Report) -> None:
    header = ["optimizer", *(f"|g| <= {t:g}" for t in contest.thresholds), "best |g|", "ended"]
    has_products = any(any(made[0].products.values()) for made in runs.values())
    counted = "evaluations + products" if has_products else "evaluations"
    table = Table(f"{title}: {counted}, time", header)
    for name, made in runs.items():
        cells = [_cell(made, threshold) for threshold in contest.thresholds]
        table.add(name, *cells, f"{min(run.best for run in made):.2e}", made[0].ended)
    report.show(table)
    ratios: dict[str, Any] = {}
    for name, base in contest.pairs:
        for threshold in contest.thresholds:
            ours, theirs = _timing(runs[name], threshold), _timing(runs[base], threshold)
            if ours and theirs:
                compared = ratio(ours, theirs)
                say(f"time to {threshold:g}, {name} / {base}: {compared}")
                ratios[f"{name} / {base} to {threshold:g}"] = compared.as_dict()
    report.record(f"{contest.name}.ratios", ratios)


def compare(contest: Contest, options: Options, report: Report) -> None:
    """Runs the optimizers in turns; the time includes the evaluations."""
    count, limit = (400, 5.0) if options.quick else (20_000, 60.0)
    inputs, labels, source = images(count)
    data = Data(inputs.to(options.device), labels.to(options.device))
    table, thresholds = contest.table, contest.thresholds
    limit = options.share(limit, len(table) * min(options.repeat, 3))
    descend(next(iter(table.values())), data, thresholds, 1.0)  # warm-up
    runs: dict[str, list[Run]] = {name: [] for name in table}
    # A run takes seconds, so three are as good as many short ones.
    turns = [(turn, name) for turn in range(min(options.repeat, 3)) for name in table]
    for _, name in progress(turns, "softmax regression"):
        runs[name].append(descend(table[name], data, thresholds, limit))
    _show(contest, runs, f"Softmax regression, {count} images, {source}, float32", report)
    report.record(contest.name, {"data": source, "images": count})
    recorded = {name: [vars(one) for one in made] for name, made in runs.items()}
    report.record(f"{contest.name}.runs", recorded)


def run(options: Options, report: Report) -> None:
    """Runs the L-BFGS implementations."""
    table = optimizers()
    base, *others = table
    pairs = tuple((base, other) for other in others)
    compare(Contest("lbfgs.softmax", (1e-4, 3e-5, 1e-5), table, pairs), options, report)
