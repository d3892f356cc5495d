"""Training steps with `Constrained` and `Projected`, beside the same steps written by hand.

By hand means: the terms of the augmented Lagrangian in the closure, and the multipliers' update
after the step; or tangent gradients before the optimizer's step and a projection after it. Both
take the same steps.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_secondorder import LBFGS, AdaHessian, Constrained

from .harness import Ratio, alternate, progress, ratio, say
from .networks import Case, chain, cnn, mlp
from .registry import Options
from .report import Report, Table, seconds

BAR = 0.10
RATE = 1e-6  # so small that the networks hardly change
PENALTY = 1.0
ITERATIONS = 5


def small_mlp(device: torch.device) -> Case:
    """64-64-10 for small images: the overhead of calls counts."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(64, 64), torch.randint(10, (64,))
    model = chain([64, 64, 10], nn.ReLU).to(device)
    return Case("MLP 64-64-10", model, nn.CrossEntropyLoss(), inputs.to(device), targets.to(device))


NETWORKS: tuple[Callable[[torch.device], Case], ...] = (
    small_mlp,
    partial(mlp, batch=128),
    partial(cnn, batch=64),
)


def norms(weight: Tensor, m: int) -> Tensor:
    """Squared norms of `m` pieces of a weight, less a half of what they are at the start."""
    pieces = weight.flatten()[: weight.numel() // m * m].reshape(m, -1)
    return pieces.square().mean(1) - 0.01


@dataclass(frozen=True)
class Constraints:
    """Constraints on the first weight of a network.

    Attributes:
        name: Name in the tables.
        counts: The number of entries that each function returns.
    """

    name: str
    counts: tuple[int, ...]

    def functions(self, weight: Tensor) -> list[Callable[[], Tensor]]:
        """The functions."""
        return [partial(norms, weight, m) for m in self.counts]


KINDS = (
    Constraints("1", (1,)),
    Constraints("10", (10,)),
    Constraints("100", (100,)),
    Constraints("10 functions", (1,) * 10),
)


class ByHand:
    """A step with an augmented Lagrangian of inequalities, written by hand.

    Args:
        optimizer: The optimizer.
        functions: The constraints.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, functions: list[Callable[[], Tensor]]
    ) -> None:
        self.optimizer, self.functions = optimizer, functions
        self.y = torch.zeros_like(self.values().detach())

    def values(self) -> Tensor:
        """The values of the constraints."""
        if len(self.functions) == 1:
            return self.functions[0]()
        return torch.cat([function() for function in self.functions])

    def term(self) -> Tensor:
        """The term that is added to the loss."""
        self.last = values = self.values()
        shifted = (self.y + PENALTY * values).clamp(min=0.0)
        return (shifted.square() - self.y.square()).sum() / (2 * PENALTY)

    def step(self, closure: Callable[[], Tensor]) -> None:
        """A step, and one of the multipliers by the values of the last evaluation."""
        self.optimizer.step(closure)
        with torch.no_grad():
            self.y = (self.y + PENALTY * self.last.detach()).clamp(min=0.0)


class ProjectedByHand:
    """A step whose weights keep rows of norm one, written by hand.

    Args:
        optimizer: The optimizer.
        weights: The weights, whose rows have norm one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, weights: list[nn.Parameter]) -> None:
        self.optimizer, self.weights = optimizer, weights
        self.project()

    @torch.no_grad()
    def project(self) -> None:
        """Goes to the nearest unit rows."""
        for w in self.weights:
            w.div_(torch.linalg.vector_norm(w, dim=1, keepdim=True))

    @torch.no_grad()
    def tangent(self) -> None:
        """Takes out of the gradients what is normal to the rows."""
        for w in self.weights:
            assert w.grad is not None
            w.grad.sub_(w * (w * w.grad).sum(1, keepdim=True))

    def step(self, closure: Callable[[], Tensor]) -> None:
        """A step along the tangents, and the projection."""

        def tangential() -> Tensor:
            loss = closure()
            self.tangent()
            return loss

        self.optimizer.step(tangential)
        self.project()


Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, tuple[Make, bool]] = {
    "Adam": (partial(torch.optim.Adam, lr=RATE), False),
    "AdaHessian": (partial(AdaHessian, lr=RATE), False),
    # A new one for each call, from the same parameters: the iterations are the same then.
    "LBFGS": (partial(LBFGS, max_iter=ITERATIONS), True),
}


def steps(case: Case, make: Make, kind: Constraints, way: str, fresh: bool) -> Callable[[], None]:
    """A step in one of three ways: without constraints, by hand, by the wrapper.

    Args:
        case: The network, which is copied.
        make: Makes the optimizer.
        kind: The constraints.
        way: "without", "by hand" or "wrapper".
        fresh: Begins anew at each call.
    """
    model = copy.deepcopy(case.model)
    params = list(model.parameters())
    weight = next(p for p in params if p.dim() > 1)
    start = [p.detach().clone() for p in params]
    functions = kind.functions(weight)

    def made() -> Any:
        optimizer = make(params)
        if way == "by hand":
            return ByHand(optimizer, functions)
        if way == "wrapper":
            # Without a method of their own, which would be another step.
            return Constrained(
                optimizer,
                inequalities=functions,
                method="augmented_lagrangian",
                penalty=PENALTY,
            )
        return optimizer

    current = made()

    def closure() -> Tensor:
        for p in params:
            p.grad = None
        loss: Tensor = case.loss(model(case.inputs), case.targets)
        if way == "by hand":
            loss = loss + current.term()
        loss.backward()
        return loss

    def call() -> None:
        nonlocal current
        if fresh:
            with torch.no_grad():
                torch._foreach_copy_(params, start)
            current = made()
        current.step(closure)

    return call


def projected_steps(case: Case, make: Make, way: str) -> Callable[[], None]:
    """A step with weights of unit rows: without, by hand, by the wrapper."""
    model = copy.deepcopy(case.model)
    params = list(model.parameters())
    weights = [p for p in params if p.dim() == 2]
    made: Any = make(params)
    if way == "by hand":
        made = ProjectedByHand(made, weights)
    elif way == "wrapper":
        from torch_secondorder import Projected
        from torch_secondorder.constraints import UnitNorm

        made = Projected(made, [(weights, UnitNorm(dim=1))])

    def closure() -> Tensor:
        for p in params:
            p.grad = None
        loss: Tensor = case.loss(model(case.inputs), case.targets)
        loss.backward()
        return loss

    return lambda: made.step(closure)


def _percent(found: Ratio) -> str:
    low, high = (f"{100.0 * (value - 1.0):.1f}" for value in (found.minimum, found.maximum))
    return f"{100.0 * (found.of_medians - 1.0):.1f}% [{low} {high}]"


def run(options: Options, report: Report) -> None:
    """Measures each network, optimizer and number of constraints."""
    networks = NETWORKS[:1] if options.quick else NETWORKS
    kinds = KINDS[:1] if options.quick else KINDS
    ways = ("without", "by hand", "wrapper")
    table = Table(
        "A step with constraints: added by the wrapper to one written by hand",
        ["network", "optimizer", "constraints", *ways, "added"],
    )
    chosen = options.chosen(OPTIMIZERS)
    cases: list[tuple[Callable[[torch.device], Case], str, Constraints | None]] = [
        (make, name, kind) for make in networks for name in chosen for kind in kinds
    ]
    # L-BFGS has no such step by hand: its line search would leave the set.
    cases += [(m, name, None) for m in networks for name in chosen if not OPTIMIZERS[name][1]]
    within = 0
    for make_case, name, kind in progress(cases, "constrained steps"):
        case = make_case(options.device)
        make, fresh = OPTIMIZERS[name]
        calls = {
            way: projected_steps(case, make, way)
            if kind is None
            else steps(case, make, kind, way, fresh)
            for way in ways
        }
        title = "unit rows" if kind is None else kind.name
        # On a CPU its own time: small differences do not survive other processes.
        clock = time.process_time if options.device.type == "cpu" else time.perf_counter
        timings = alternate(calls, 4 * options.repeat, options.device, 0.03, clock)
        added = ratio(timings["wrapper"], timings["by hand"])
        within += added.of_medians - 1.0 <= BAR
        times = (seconds(timings[way].median) for way in ways)
        table.add(case.name, name, title, *times, _percent(added))
        report.record(
            f"constraints.overhead.{case.name}.{name}.{title}",
            {**{way: t.as_dict() for way, t in timings.items()}, "added": added.as_dict()},
        )
    report.show(table)
    say(
        f"added: of medians [within a round]; the bar, {BAR:.0%}, holds in {within} of {len(cases)}"
    )
