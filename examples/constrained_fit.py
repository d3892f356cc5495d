"""Fits a curve to noisy measurements, with what is known about it as constraints.

A fluid flows through a channel. Its velocity was measured at some places between the wall, 0, and
the middle, 1, with noise. Four things are known without measuring the velocity: it is zero at the
wall, its slope is zero in the middle, its mean is what the flow meter shows, and it never falls on
the way from the wall to the middle. The first three are equalities, the last one is an inequality
at each point of a grid.

`Constrained` keeps them to rounding error: beside `BFGS` and `LBFGS` by sequential quadratic
programming, in some ten evaluations, or by an augmented Lagrangian, as beside any optimizer.
Penalties of the violations reach a compromise, which costs more evaluations the better it is; the
largest does not get to its end. `kkt_residuals` certifies the result.

The multipliers tell what each piece of knowledge costs: by how much the loss would fall if its
bound were moved. Solving again with other bounds confirms them. A flow meter with a large
multiplier contradicts the measurements.

    python examples/constrained_fit.py
    python examples/constrained_fit.py --model network
    python examples/constrained_fit.py --flow 0.85 --seed 3 --out fit.pdf
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from _command_line import output_file, positive
from _constrained import Price, check_price, finished, print_prices
from _report import COLOURS, format_table, line_style, pyplot, style_axes
from torch_secondorder import BFGS, LBFGS, Constrained, kkt_residuals
from torch_secondorder.constraints import KKTReport

DTYPE = torch.float64
PENALTIES = [1e2, 1e4, 1e6, 1e8]
STEPS = 30  # at most; each is up to 100 iterations
GRID = 40  # points where the slope is bounded
CHANGE = 1e-4  # of the bounds, to check their prices
DECAY = 0.1  # of the network's weights


class Polynomial(nn.Module):
    """A polynomial on [0, 1], as a sum of Chebyshev's.

    Args:
        degree: Its degree.
    """

    def __init__(self, degree: int) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.zeros(degree + 1, dtype=DTYPE))

    def forward(self, x: Tensor) -> Tensor:
        """The values at some points `(n,)`."""
        return chebyshev(x, len(self.coefficients)) @ self.coefficients

    def slope(self, x: Tensor) -> Tensor:
        """The derivative at some points `(n,)`."""
        from numpy.polynomial.chebyshev import chebder

        count = len(self.coefficients)
        derivatives = torch.from_numpy(chebder(torch.eye(count, dtype=DTYPE).numpy(), scl=2.0))
        return chebyshev(x, count - 1) @ (derivatives @ self.coefficients)


def chebyshev(x: Tensor, count: int) -> Tensor:
    """The first Chebyshev polynomials on [0, 1] at some points `(n,)`, shape `(n, count)`."""
    from numpy.polynomial.chebyshev import chebvander

    return torch.from_numpy(chebvander(2.0 * x.numpy() - 1.0, count - 1))


class Network(nn.Module):
    """A network with one hidden layer of tanh units.

    Args:
        units: Their number.
        seed: Seed of the weights.
    """

    def __init__(self, units: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(
            nn.Linear(1, units, dtype=DTYPE), nn.Tanh(), nn.Linear(units, 1, dtype=DTYPE)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The values at some points `(n,)`."""
        return self.layers(x[:, None])[:, 0]

    def slope(self, x: Tensor) -> Tensor:
        """The derivative at some points `(n,)`, with its graph."""
        x = x.clone().requires_grad_()
        return torch.autograd.grad(self(x).sum(), x, create_graph=True)[0]


Curve = Polynomial | Network


def truth(x: Tensor) -> Tensor:
    """The profile behind the measurements; its mean is 0.8."""
    return 1.0 - (1.0 - x) ** 4


@dataclass(frozen=True)
class Known:
    """Knowledge about the profile.

    Attributes:
        wall: The velocity at the wall.
        middle: Its slope in the middle.
        flow: Its mean.
        fall: How steeply it may fall at the points of the grid, shape `(n,)`.
    """

    wall: float
    middle: float
    flow: float
    fall: Tensor

    @property
    def grid(self) -> Tensor:
        """The points where the slope is bounded, `(n,)`; not the middle, where it is zero."""
        return torch.linspace(0.0, 1.0, len(self.fall) + 1, dtype=DTYPE)[:-1]

    def equalities(self, model: Curve) -> dict[str, Callable[[], Tensor]]:
        """Functions that are to be zero."""
        nodes, weights = quadrature()
        ends = torch.tensor([[0.0], [1.0]], dtype=DTYPE)
        return {
            "wall": lambda: model(ends[0])[0] - self.wall,
            "middle": lambda: model.slope(ends[1])[0] - self.middle,
            "flow": lambda: weights @ model(nodes) - self.flow,
        }

    def inequalities(self, model: Curve) -> dict[str, Callable[[], Tensor]]:
        """A function that is to be zero or less."""
        return {"fall": lambda: -model.slope(self.grid) - self.fall}


@cache
def quadrature() -> tuple[Tensor, Tensor]:
    """Points and weights of Gauss's rule on [0, 1], exact for polynomials up to degree 39."""
    from numpy.polynomial.legendre import leggauss

    nodes, weights = (torch.from_numpy(v) for v in leggauss(20))
    return (nodes + 1.0) / 2.0, weights / 2.0


@dataclass(frozen=True)
class Task:
    """A fit.

    Attributes:
        x: The places of the measurements, `(n,)`.
        y: The velocities there, `(n,)`.
        noise: The standard deviation of their noise.
        start: The curve to begin with.
        decay: Factor of the squared weights in the loss.
    """

    x: Tensor
    y: Tensor
    noise: float
    start: Curve
    decay: float

    def loss(self, model: Curve) -> Tensor:
        """Half the sum of squared distances in units of the noise, 0-dim."""
        squares = ((model(self.x) - self.y) / self.noise).square().sum()
        return 0.5 * squares + self.decay * sum(p.square().sum() for p in model.parameters())


@dataclass(frozen=True)
class Fit:
    """A fitted curve.

    Attributes:
        label: The method, as shown.
        model: The curve.
        evaluations: Closure calls.
        loss: The loss, without penalties.
        violation: The largest violation of what is known.
        multipliers: Those of the constraints, by name; estimates without `Constrained`.
        report: The residuals of the conditions of optimality.
    """

    label: str
    model: Curve
    evaluations: int
    loss: float
    violation: float
    multipliers: dict[str, Tensor]
    report: KKTReport

    @property
    def error(self) -> float:
        """The root mean square of the distance to the true profile."""
        grid = torch.linspace(0.0, 1.0, 501, dtype=DTYPE)
        with torch.no_grad():
            return (self.model(grid) - truth(grid)).square().mean().sqrt().item()


def constrain(inner: type[Optimizer], method: str | None = None) -> Any:
    """Makes `Constrained` optimizers from parameters, equalities and inequalities."""

    def make(params: Any, equal: Any, unequal: Any) -> Constrained:
        return Constrained(inner(params, max_iter=100), equal, unequal, method)

    return make


def penalize(params: Any, equal: Any, unequal: Any) -> Optimizer:
    """Makes an optimizer that knows of no constraint."""
    return BFGS(params, max_iter=100)


def fit(
    task: Task, known: Known, label: str, make: Any, penalty: float = 0.0, start: Any = None
) -> Fit:
    """Fits a curve.

    Args:
        task: The measurements.
        known: The constraints.
        label: The method, as shown.
        make: Makes the optimizer.
        penalty: Factor of half the squared violations in the loss.
        start: Where to begin, if not at the task's start.
    """
    model = copy.deepcopy(start or task.start)
    equal, unequal = known.equalities(model), known.inequalities(model)
    optimizer = make(model.parameters(), equal, unequal)
    evaluations = 0

    def closure(penalty: float = penalty) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = task.loss(model)
        if penalty:
            both = *(h() for h in equal.values()), *(g().clamp(min=0.0) for g in unequal.values())
            loss = loss + 0.5 * penalty * sum(v.square().sum() for v in both)
        loss.backward()
        return loss

    for _ in range(STEPS):
        optimizer.step(closure)
        if finished(optimizer.info):
            break
    used, multipliers = evaluations, getattr(optimizer, "multipliers", None)
    report = kkt_residuals(
        lambda: closure(0.0), model.parameters(), equal, unequal, multipliers
    )  # with estimates where there are no multipliers
    return Fit(label, model, used, report.loss, report.feasibility, report.multipliers, report)


def compare(task: Task, known: Known, penalties: Sequence[float]) -> list[Fit]:
    """Fits by all methods."""
    fits = [fit(task, known, "without constraints", penalize)]
    fits += [fit(task, known, f"penalty {rho:.0e}", penalize, rho) for rho in penalties]
    lagrangian = constrain(BFGS, "augmented_lagrangian")
    fits.append(fit(task, known, "augmented Lagrangian, BFGS", lagrangian))
    fits.append(fit(task, known, "SQP, LBFGS", constrain(LBFGS)))
    fits.append(fit(task, known, "SQP, BFGS", constrain(BFGS)))
    return fits


def print_table(fits: Sequence[Fit]) -> None:
    """Prints one row for each fit."""
    header = ["fit", "evaluations", "loss", "largest violation", "KKT residual", "error"]
    rows = [
        [
            f.label,
            f"{f.evaluations:,}",
            f"{f.loss:.6f}",
            f"{f.violation:.1e}",
            f"{f.report.largest:.1e}",
            f"{f.error:.4f}",
        ]
        for f in fits
    ]
    print(format_table(header, rows))


def prices(task: Task, known: Known, found: Fit) -> list[Price]:
    """The prices of the equalities, and of the highest-priced points of the grid."""

    def lowest_loss(moved: Known) -> float:
        return fit(task, moved, "", constrain(BFGS), start=found.model).loss

    checked = []
    for name in ("wall", "middle", "flow"):
        bound, multiplier = getattr(known, name), found.multipliers[name].item()
        checked.append(
            check_price(
                name,
                bound,
                CHANGE,
                multiplier,
                lambda b, name=name: lowest_loss(replace(known, **{name: b})),
            )
        )
    for i in active(found)[:2]:

        def moved(b: float, i: int = i) -> float:
            fall = known.fall.clone()
            fall[i] = b
            return lowest_loss(replace(known, fall=fall))

        label, multiplier = f"fall at {known.grid[i]:g}", found.multipliers["fall"][i].item()
        checked.append(check_price(label, known.fall[i].item(), CHANGE, multiplier, moved))
    return checked


def active(found: Fit) -> list[int]:
    """The points of the grid with a price, the highest first."""
    y = found.multipliers["fall"]
    return [i for i in y.argsort(descending=True).tolist() if y[i] > 1e-6 * y.max()]


def plot(task: Task, known: Known, fits: Sequence[Fit], path: Path) -> None:
    """Draws the curves, their slopes with the prices, and what penalties reach."""
    plt = pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 4.8), layout="constrained")
    grid = torch.linspace(0.0, 1.0, 501, dtype=DTYPE)
    free, penalized, best = fits[0], fits[1], fits[-1]
    left.plot(task.x, task.y, "o", color="0.6", ms=4, label="measurements")
    left.plot(grid, truth(grid), color="black", lw=1, label="true profile")
    for i, f in enumerate((free, penalized, best)):
        u, rise = f.model(grid).detach(), f.model.slope(grid).detach()
        left.plot(grid, u, label=f.label, **line_style(i))
        middle.plot(grid, rise, label=f.label, **line_style(i))
    low, high = task.y.min().item(), task.y.max().item()
    style_axes(left, xlabel="place: wall 0, middle 1", ylabel="velocity")
    left.set(title="profiles", ylim=(low - 0.3, high + 0.2))
    left.legend(frameon=False)
    draw_prices(middle, known, best)
    draw_penalties(right, [f for f in fits if f.label.startswith("penalty")], fits[-3:])
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_prices(axes: Any, known: Known, found: Fit) -> None:
    """Marks the points of the grid where the slope is bounded; the larger, the dearer."""
    y = found.multipliers["fall"]
    chosen = active(found)
    axes.axhline(0.0, color="0.5", lw=1)
    axes.scatter(
        known.grid[chosen],
        -known.fall[chosen],
        s=20 + 250 * y[chosen] / y.max(),
        color=COLOURS[3],
        alpha=0.6,
        label="bound is active; size: multiplier",
        zorder=3,
    )
    style_axes(axes, xlabel="place", ylabel="slope")
    axes.set(title="slopes: not below zero", ylim=(-3.0, 5.0))
    axes.legend(frameon=False)


def draw_penalties(axes: Any, penalized: Sequence[Fit], others: Sequence[Fit]) -> None:
    """Draws violations against evaluations."""
    x = [f.evaluations for f in penalized]
    axes.plot(x, [f.violation for f in penalized], "o-", color=COLOURS[1], label="penalties")
    for f in penalized:
        at = f.evaluations, f.violation
        axes.annotate(f.label.split()[1], at, (6, 4), textcoords="offset points")
    for i, f in enumerate(others):
        style = line_style(i + 2) | {"linestyle": "", "marker": "s"}
        axes.plot([f.evaluations], [max(f.violation, 1e-17)], label=f.label, **style)
    style_axes(axes, xlabel="evaluations", ylabel="largest violation", xscale="log", yscale="log")
    axes.set(title="what feasibility costs")
    axes.legend(frameon=False)


def make_task(model: Curve, samples: int, noise: float, decay: float, seed: int) -> Task:
    """Evenly spaced measurements with random noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.linspace(0.04, 1.0, samples, dtype=DTYPE)
    y = truth(x) + noise * torch.randn(samples, dtype=DTYPE, generator=generator)
    return Task(x, y, noise, model, decay)


def main() -> None:
    """Fits by all methods, prints the tables and saves the picture."""
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.model == "network":
        model, decay = Network(arguments.units, arguments.seed), DECAY
    else:
        model, decay = Polynomial(arguments.degree), 0.0
    task = make_task(model, arguments.samples, arguments.noise, decay, arguments.seed)
    known = Known(0.0, 0.0, arguments.flow, torch.zeros(GRID, dtype=DTYPE))
    n = sum(p.numel() for p in model.parameters())
    print(
        f"{arguments.model} of {n} parameters, {arguments.samples} measurements with noise "
        f"{arguments.noise:g}; 3 equalities, {GRID} inequalities"
    )
    fits = compare(task, known, arguments.penalties)
    print_table(fits)
    print(fits[-1].report)
    print("what the constraints cost, by the multipliers of the last fit and by solving again:")
    print_prices(prices(task, known, fits[-1]))
    plot(task, known, fits, arguments.out)
    print(f"plot: {arguments.out}")


def numbers(text: str) -> list[float]:
    """Parses comma-separated positive numbers."""
    return [positive(float)(part) for part in text.split(",")]


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; mistakes are reported before any work is done."""
    parser = argparse.ArgumentParser(description="Fit a curve subject to constraints.")
    add = parser.add_argument
    add("--model", choices=("polynomial", "network"), default="polynomial", help="of the curve")
    add("--degree", type=positive(int), default=11, help="of the polynomial; default: 11")
    add("--units", type=positive(int), default=8, help="of the network; default: 8")
    add("--samples", type=positive(int), default=24, help="number of data; default: 24")
    add("--noise", type=positive(float), default=0.1, help="its standard deviation; default: 0.1")
    add("--flow", type=float, default=0.8, help="mean velocity; default: 0.8, the true one")
    add(
        "--penalties",
        type=numbers,
        default=PENALTIES,
        metavar="P,P,...",
        help="for comparison; default: 1e2,1e4,1e6,1e8",
    )
    add("--seed", type=int, default=0, help="random seed; default: 0")
    add("--threads", type=positive(int), help="CPU threads; default: torch's choice")
    out = "constrained_fit.png"
    add("--out", type=output_file, default=out, help=f"file of the picture; default: {out}")
    return parser.parse_args()


if __name__ == "__main__":
    main()
