"""Constraints with mini-batches of Adam: where training ends, and how much it oscillates.

Two tasks: a classifier whose rates of positive predictions in two groups may differ by little,
measured on each batch, and a network whose weights may not be longer than a bound.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_secondorder import LBFGS, Constrained

from .constraints_pca import load_digits
from .harness import load_ours, load_peer, progress, say, threads
from .networks import chain
from .registry import Options
from .report import Report, Table, number

BATCH = 128
EPOCHS, RATE = 40, 3e-3
SEEDS = 5
# Of the multipliers: the best of 0.01, 0.1, 1 and 10 for each way and task; ours is the default.
ASCENT = {"rates": 0.1, "norms": 0.01}
NU_PI = {"rates": 0.01, "norms": 0.01}


class Task:
    """A model with data and constraints.

    Args:
        seed: The seed of the parameters and the batches.

    Attributes:
        model: The model.
        batch: The indices of the present batch; the constraints look at it.
    """

    name: str
    model: nn.Module
    size: int

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self.model, self.size = self.make()
        self.everything = self.batch = torch.arange(self.size)

    def make(self) -> tuple[nn.Module, int]:
        """The model, and the number of samples."""
        raise NotImplementedError

    def loss(self) -> Tensor:
        """The loss on the present batch."""
        raise NotImplementedError

    def values(self) -> Tensor:
        """The constraints on the present batch, zero or less where they hold."""
        raise NotImplementedError

    def batches(self) -> Iterator[None]:
        """Sets one batch after the other."""
        for batch in torch.randperm(self.size, generator=self._generator).split(BATCH):
            self.batch = batch
            yield

    @torch.no_grad()
    def judged(self) -> tuple[float, float]:
        """Loss and largest value of a constraint on all data."""
        before, self.batch = self.batch, self.everything
        found = self.loss().item(), self.values().max().item()
        self.batch = before
        return found


class Rates(Task):
    """Two groups of which one is positive more often; a classifier should not show it."""

    name = "rates"
    MOST = 0.02

    def make(self) -> tuple[nn.Module, int]:
        """An MLP on ten features, of which some depend on the group."""
        generator = torch.Generator().manual_seed(0)
        self.group = torch.randint(2, (4096,), generator=generator)
        x = torch.randn(4096, 10, generator=generator)
        x[:, :3] += 0.8 * self.group[:, None]
        score = x[:, 0] + 0.5 * x[:, 3] * x[:, 4] - 0.5
        noise = torch.randn(4096, generator=generator)
        self.x, self.y = x, (score + 0.5 * noise > 0).float()
        return chain([10, 32, 1], nn.Tanh), 4096

    def loss(self) -> Tensor:
        """The cross-entropy; keeps the scores for the constraints."""
        self.scores = self.model(self.x[self.batch]).squeeze(1)
        return F.binary_cross_entropy_with_logits(self.scores, self.y[self.batch])

    def values(self) -> Tensor:
        """The difference of the mean probabilities, either way, less the largest allowed."""
        second = self.group[self.batch].bool()
        p = self.scores.sigmoid()
        gap = p[second].mean() - p[~second].mean()
        return torch.stack([gap, -gap]) - self.MOST


class Norms(Task):
    """A classifier of digits with short weights."""

    name = "norms"
    MOST = 3.0

    def make(self) -> tuple[nn.Module, int]:
        """An MLP on the digits of scikit-learn, or on noise without it."""
        x = load_digits()
        datasets = load_peer("sklearn.datasets", "scikit-learn")
        if x is None or datasets is None:
            self.x, self.y = torch.randn(1797, 64), torch.randint(10, (1797,))
        else:
            self.x = (x / 16.0).float()
            self.y = torch.from_numpy(datasets.load_digits().target).long()
        model = chain([64, 64, 10], nn.ReLU)
        self.weights = [p for p in model.parameters() if p.dim() > 1]
        with torch.no_grad():  # in the sets
            for w in self.weights:
                w.mul_((self.MOST / w.norm()).clamp(max=1.0))
        return model, len(self.x)

    def loss(self) -> Tensor:
        """The cross-entropy."""
        return F.cross_entropy(self.model(self.x[self.batch]), self.y[self.batch])

    def values(self) -> Tensor:
        """The squared Frobenius norms, relative to the largest allowed, less one."""
        norms = [w.square().sum() for w in self.weights]
        return torch.stack(norms) / self.MOST**2 - 1.0


#: Prepares a step on the present batch.
Maker = Callable[[Task], Callable[[], object]]


def adam(task: Task) -> torch.optim.Optimizer:
    """The optimizer inside all of them."""
    return torch.optim.Adam(task.model.parameters(), lr=RATE)


def closure_of(task: Task, optimizer: Any) -> Callable[[], Tensor]:
    """The standard closure."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = task.loss()
        loss.backward()
        return loss

    return closure


def without(task: Task) -> Callable[[], object]:
    """No constraints."""
    optimizer = adam(task)
    return partial(optimizer.step, closure_of(task, optimizer))


def ours(method: str, task: Task) -> Callable[[], object]:
    """`Constrained` around Adam, with its defaults."""
    optimizer = Constrained(
        adam(task),
        inequalities=task.values,
        method=method,  # type: ignore[arg-type]
    )
    return partial(optimizer.step, closure_of(task, optimizer))


def projected(task: Task) -> Callable[[], object] | None:
    """`Projected` around Adam, where the constraints are sets."""
    if not isinstance(task, Norms):
        return None
    from torch_secondorder import Projected
    from torch_secondorder.constraints import NormBall

    optimizer = Projected(adam(task), [(task.weights, NormBall(task.MOST))])
    return partial(optimizer.step, closure_of(task, optimizer))


def by_hand(task: Task) -> Callable[[], object]:
    """Gradient descent and ascent on the Lagrangian, as one writes it."""
    optimizer = adam(task)
    y = torch.zeros_like(task.values().detach()) if isinstance(task, Norms) else torch.zeros(2)
    rate = ASCENT[task.name]

    def step() -> None:
        nonlocal y
        optimizer.zero_grad()
        loss = task.loss()
        g = task.values()
        (loss + y @ g).backward()
        optimizer.step()
        y = (y + rate * g.detach()).clamp(min=0.0)

    return step


def with_cooper(cooper: Any, formulation: str, task: Task) -> Callable[[], object]:
    """Cooper: gradient ascent, its augmented Lagrangian or its nuPI controller."""
    rate = (NU_PI if formulation == "nuPI" else ASCENT)[task.name]
    is_augmented = formulation == "augmented Lagrangian"
    more: dict[str, Any] = {}
    if is_augmented:
        coefficients = cooper.penalty_coefficients.DensePenaltyCoefficient
        more["penalty_coefficient"] = coefficients(init=torch.ones(2))
        more["formulation_type"] = cooper.formulations.AugmentedLagrangian

    class Problem(cooper.ConstrainedMinimizationProblem):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.constraint = cooper.Constraint(
                cooper.ConstraintType.INEQUALITY,
                multiplier=cooper.multipliers.DenseMultiplier(num_constraints=2),
                **more,
            )

        def compute_cmp_state(self) -> Any:
            loss = task.loss()
            state = cooper.ConstraintState(violation=task.values())
            return cooper.CMPState(loss=loss, observed_constraints={self.constraint: state})

    cmp = Problem()
    params = list(cmp.dual_parameters())
    if formulation == "nuPI":
        dual = cooper.optim.nuPI(params, lr=rate, Kp=10.0, Ki=1.0, ema_nu=0.9, maximize=True)
    else:
        dual = torch.optim.SGD(params, lr=rate, maximize=True)
    kind = (
        cooper.optim.AlternatingDualPrimalOptimizer
        if is_augmented
        else cooper.optim.SimultaneousOptimizer
    )
    optimizer = kind(cmp, primal_optimizers=adam(task), dual_optimizers=dual)
    roll: Callable[[], object] = optimizer.roll
    return roll


def full_batch(task: Task) -> None:
    """`Constrained(LBFGS)` on all data: what there is to be had."""
    task.batch = task.everything
    optimizer = Constrained(
        LBFGS(task.model.parameters(), max_iter=300, tolerance_grad=1e-6), inequalities=task.values
    )
    optimizer.step(closure_of(task, optimizer))


def makers() -> dict[str, Maker]:
    """All ways that are installed, by name."""
    table: dict[str, Maker] = {
        "Adam without constraints": without,
        "Constrained(Adam)": partial(ours, "augmented_lagrangian"),
        "Constrained(Adam), penalty": partial(ours, "penalty"),
    }
    if load_ours("torch_secondorder", "Projected") is not None:
        table["Projected(Adam)"] = projected  # type: ignore[assignment]
    table["descent and ascent by hand"] = by_hand
    if (cooper := load_peer("cooper", "cooper-optim")) is not None:
        for formulation in ("ascent", "augmented Lagrangian", "nuPI"):
            table[f"cooper, {formulation}"] = partial(with_cooper, cooper, formulation)
    return table


@dataclass(frozen=True)
class Outcome:
    """The end of a training.

    Attributes:
        loss: On all data.
        violation: The largest value of a constraint on all data, or zero.
        worst: The largest violation at an epoch's end in the last quarter.
        oscillation: The standard deviation of the largest value over these epochs.
    """

    loss: float
    violation: float
    worst: float
    oscillation: float


def train(make: Maker, task: Task, epochs: int) -> Outcome | None:
    """Trains in one way; None if it does not apply."""
    step = make(task)
    if step is None:
        return None
    seen = []
    for _ in range(epochs):
        for _ in task.batches():
            step()
        seen.append(task.judged())
    last = [value for _, value in seen[-max(2, epochs // 4) :]]
    loss, value = seen[-1]
    return Outcome(loss, max(value, 0.0), max(0.0, *last), statistics.pstdev(last))


def run(options: Options, report: Report) -> None:
    """Trains in every way, over several seeds."""
    epochs, seeds = (2, 1) if options.quick else (EPOCHS, SEEDS)
    table = options.chosen(makers())
    with threads(1):
        for kind in (Rates, Norms):
            shown = Table(
                f"{kind.name}: Adam, batches of {BATCH}, {epochs} epochs, medians of {seeds} seeds",
                ["way", "loss", "violation", "worst of the last quarter", "oscillation"],
            )
            rows: dict[str, list[Outcome]] = {}
            for name, make in progress(list(table.items()), kind.name):
                found = [train(make, kind(seed), epochs) for seed in range(seeds)]
                if all(outcome is not None for outcome in found):
                    rows[name] = [outcome for outcome in found if outcome is not None]
            rows["Constrained(LBFGS), all data"] = [_reference(kind, s) for s in range(seeds)]
            for name, outcomes in rows.items():
                cells = (
                    number(statistics.median(getattr(o, column) for o in outcomes))
                    for column in ("loss", "violation", "worst", "oscillation")
                )
                shown.add(name, *cells)
                report.record(
                    f"constraints.minibatch.{kind.name}.{name}", [vars(o) for o in outcomes]
                )
            report.show(shown)
    say("on all data; worst and oscillation: of the largest constraint at the ends of epochs")


def _reference(kind: type[Task], seed: int) -> Outcome:
    task = kind(seed)
    full_batch(task)
    loss, value = task.judged()
    return Outcome(loss, max(value, 0.0), max(value, 0.0), 0.0)
