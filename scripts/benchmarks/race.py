"""Timed training: one optimizer after the other from the same start.

Tasks and contenders are those of `examples/_training.py`. The runs here also record how the time
was used, and end when it is up, even in the middle of a step.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from torch_secondorder import NewtonCG

from .harness import load_peer, progress, synchronize
from .registry import Options
from .report import Report, Table, number
from .watch import Watch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
KINDS = ("products", "evaluations", "trials")
# Consecutive steps on the full data without a change of the parameters.
STALLED = 3

Loss = Callable[[nn.Module], Tensor]
Advance = Callable[[Loss], None]


@dataclass(frozen=True)
class Contender:
    """An optimizer in a comparison, with an option that the examples do not have.

    Attributes:
        make: Makes it for the parameters of a network.
        batch_size: Number of samples in a step; None for all.
        by_forward: True if `step` takes a function that returns loss and outputs instead of a
            closure, as in PyTorchHessianFree.
    """

    make: Callable[[Iterable[nn.Parameter]], Any]
    batch_size: int | None = None
    by_forward: bool = False


class _TimeUpError(Exception):
    """Ends a run from inside a step."""


@dataclass
class Run:
    """One contender's run; the clock stops during measurements.

    Attributes:
        limit: Time limit in seconds.
        device: The device of the network.
        seconds: Time by kind of work: products, first evaluations of steps, other evaluations.
        calls: Number of calls by kind of work; products are counted by vectors.
        steps: Number of finished steps.
        iterations: Number of iterations of linear solvers, in finished steps.
        history: Seconds, loss over all data, and score.
        seen: Seconds and loss of evaluations on all data.
        ended: Reason for the end of the run.
    """

    limit: float
    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    calls: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    steps: int = 0
    iterations: int = 0
    history: list[tuple[float, float, float]] = field(default_factory=list)
    seen: list[tuple[float, float]] = field(default_factory=list)
    ended: str = ""
    used: float = 0.0
    _since: float | None = None

    def now(self) -> float:
        """Seconds on the clock."""
        if self._since is None:
            return self.used
        synchronize(self.device)
        return self.used + time.perf_counter() - self._since

    @contextmanager
    def running(self) -> Iterator[None]:
        """Lets the clock run."""
        synchronize(self.device)
        self._since = time.perf_counter()
        try:
            yield
        finally:
            self.used, self._since = self.now(), None

    @contextmanager
    def doing(self, kind: str) -> Iterator[None]:
        """Adds up the time of one kind of work; ends the run if no time is left."""
        start = self.now()
        if start > self.limit:
            raise _TimeUpError
        try:
            yield
        finally:
            self.seconds[kind] += self.now() - start

    def within(self) -> list[tuple[float, float, float]]:
        """The history up to the limit; a step that cannot be interrupted may exceed it."""
        return [entry for entry in self.history if entry[0] <= 1.01 * self.limit]

    @property
    def loss(self) -> float:
        """The lowest loss over all data within the limit."""
        seen = [loss for at, loss in self.seen if at <= self.limit]
        return min(seen + [loss for _, loss, _ in self.within()])

    @property
    def score(self) -> float:
        """The score at the limit."""
        return self.within()[-1][2]

    def reached(self, score: float) -> float:
        """The time when the score first fell below a value; NaN if it never did."""
        return next((at for at, _, value in self.within() if value < score), float("nan"))

    def shares(self) -> dict[str, float]:
        """Shares of the time by kind of work, with the rest."""
        shares = {kind: spent / max(self.used, 1e-9) for kind, spent in self.seconds.items()}
        return {**shares, "rest": 1.0 - sum(shares.values())}

    def as_dict(self) -> dict[str, Any]:
        """The content of the JSON file."""
        fields = {key: value for key, value in vars(self).items() if key not in ("seen", "_since")}
        fields |= {"device": str(self.device), "loss": self.loss, "score": self.score}
        return {**fields, "shares": self.shares()}


def _by_closure(optimizer: Any, model: nn.Module, run: Run, full: bool) -> Advance:
    """A step of any optimizer with the standard closure."""

    def advance(loss_of: Loss) -> None:
        kind = "evaluations"

        def closure() -> Tensor:
            nonlocal kind
            with run.doing(kind):
                run.calls[kind] += 1
                optimizer.zero_grad()
                loss = loss_of(model)
                loss.backward()
            kind = "trials"
            if full:
                run.seen.append((run.now(), loss.item()))
            return loss

        optimizer.step(closure)

    return advance


def _by_forward(optimizer: Any, model: nn.Module, run: Run, full: bool) -> Advance:
    """A step of PyTorchHessianFree, whose products cannot be observed."""
    outputs: list[Tensor] = []
    model.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))

    def advance(loss_of: Loss) -> None:
        kind = "evaluations"

        def forward() -> tuple[Tensor, Tensor]:
            nonlocal kind
            outputs.clear()
            with run.doing(kind):
                run.calls[kind] += 1
                loss = loss_of(model)
            kind = "trials"
            if full:
                run.seen.append((run.now(), loss.item()))
            return loss, outputs[-1]

        optimizer.step(forward=forward)

    return advance


def _parameters(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@torch.no_grad()
def _put_back(model: nn.Module, parameters: list[Tensor]) -> None:
    for p, before in zip(model.parameters(), parameters, strict=True):
        p.copy_(before)


def train(task: Any, contender: Any, limit: float, device: torch.device, interval: float) -> Run:
    """Trains a copy of the task's network.

    Args:
        task: The problem: has `model`, `losses(batch_size)` and `measure(model)`.
        contender: The optimizer: has `make` and `batch_size`.
        limit: Time limit in seconds.
        device: The device of the network.
        interval: Smallest number of seconds between two measurements.
    """
    model, run = copy.deepcopy(task.model), Run(limit, device)
    optimizer = contender.make(model.parameters())
    watch = None
    if isinstance(optimizer, NewtonCG) and optimizer.curvature == "ggn":
        watch = optimizer.curvature = Watch(partial(run.doing, "products"))
    full = contender.batch_size is None
    by = _by_forward if getattr(contender, "by_forward", False) else _by_closure
    advance, losses = by(optimizer, model, run, full), task.losses(contender.batch_size)

    def measure() -> None:
        with torch.no_grad():
            loss, score = task.measure(model)
        run.history.append((run.used, loss, score))

    measure()
    still = 0
    while not run.ended:
        before = _parameters(model) if full else None
        with run.running():
            try:
                advance(next(losses))
                run.steps += 1
                info = getattr(optimizer, "info", None)
                run.iterations += getattr(info, "solver_iterations", 0)
            except _TimeUpError:
                run.ended = "time is up"
        if run.ended and before is not None:
            _put_back(model, before)  # trial points of a search are not results
        if before is not None:
            still = still + 1 if all(map(torch.equal, before, _parameters(model))) else 0
        if run.used > limit:
            run.ended = "time is up"
        elif still == STALLED:
            run.ended = "stalled"
        if run.ended or run.used - run.history[-1][0] >= interval:
            measure()
    run.calls["products"] = watch.products if watch is not None else 0
    return run


def race(
    task: Any,
    contenders: dict[str, Any],
    options: Options,
    title: str,
    measurements: int,
    seconds: float = 60.0,
) -> dict[str, Run]:
    """Trains with each contender in turn: some seconds each, a third on a GPU, 0.2 if quick."""
    limit = 0.2 if options.quick else seconds if options.device.type == "cpu" else seconds / 3.0
    limit = options.share(limit, len(contenders))
    runs = {}
    for name, contender in progress(contenders.items(), title):
        train(task, contender, min(limit, 0.5), options.device, limit)  # the warm-up
        runs[name] = train(task, contender, limit, options.device, limit / measurements)
    return runs


def show(
    runs: dict[str, Run],
    title: str,
    results: dict[str, Callable[[Run], float]],
    key: str,
    report: Report,
) -> None:
    """Prints the results of a race, and the use of its time."""
    header = ["optimizer", *results, "seconds", "steps", *KINDS, "solver iterations", "ended"]
    table = Table(f"{title}; trials: all evaluations except the first of a step", header)
    shares = Table("Shares of the time", ["optimizer", *KINDS, "rest"])
    for name, run in runs.items():
        found = [number(result(run)) for result in results.values()]
        counts = (f"{run.calls[kind]:,}" for kind in KINDS)
        table.add(
            name, *found, f"{run.used:.1f}", run.steps, *counts, f"{run.iterations:,}", run.ended
        )
        shares.add(name, *(f"{share:.0%}" for share in run.shares().values()))
        made = {result: of(run) for result, of in results.items()}
        report.record(f"{key}.{name}", {**run.as_dict(), "results": made})
    report.show(table)
    report.show(shares)


def load_example(name: str) -> ModuleType | None:
    """Imports one of the examples, or prints one line that it is skipped."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return load_peer(name, f"examples/{name}.py or a package that it needs")
