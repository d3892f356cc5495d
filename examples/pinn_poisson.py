"""Solves Poisson's equation on the unit square with a small network, to high precision.

The network `u` has to satisfy `u_xx + u_yy = f` inside and `u = 0` on the boundary, for an `f`
whose solution is `sin(pi x) sin(pi y)`. The loss is so badly conditioned that first-order methods
nearly stop far from the solution; second-order methods get much closer in the same time.

    python examples/pinn_poisson.py
    python examples/pinn_poisson.py --target 1e-4
    python examples/pinn_poisson.py --optimizers newton-cg,lbfgs,torch-lbfgs,adam --seconds 30
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_secondorder
from _command_line import add_common_arguments, positive
from _report import format_table, line_style, pyplot, style_axes
from _training import Contender, Loss, Run, Task, endings, train

ACCURATE = 1e-4  # a relative error; the table shows the time it was reached
DTYPE = torch.float64
INSIDE, EDGE, GRID = 30, 30, 101  # points per side

CONTENDERS = {
    "newton-cg": Contender(
        "NewtonCG (ours)", lambda p: torch_secondorder.NewtonCG(p, preconditioner="nystrom")
    ),
    "lbfgs": Contender("LBFGS (ours)", lambda p: torch_secondorder.LBFGS(p, max_iter=10)),
    "torch-lbfgs": Contender(
        "torch.optim.LBFGS",
        lambda p: torch.optim.LBFGS(
            p,
            max_iter=10,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        ),
    ),
    "adam": Contender("Adam", lambda p: torch.optim.Adam(p, lr=1e-3)),
}


@dataclass(frozen=True)
class Problem:
    """The equation, at a set of points.

    Attributes:
        inside: Points in the open square, shape `(n, 2)`.
        boundary: Points on its edges, shape `(m, 2)`.
        source: `f` at the points inside, shape `(n, 1)`.
        grid: Points for measuring the error, shape `(101 * 101, 2)`.
        exact: The solution there, shape `(101 * 101, 1)`.
    """

    inside: Tensor
    boundary: Tensor
    source: Tensor
    grid: Tensor
    exact: Tensor


def make_problem(device: torch.device) -> Problem:
    """The equation on regular grids of points."""

    def line(count: int) -> Tensor:
        return torch.linspace(0, 1, count, dtype=DTYPE, device=device)

    t = line(EDGE)
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    edges = [(t, zero), (t, one), (zero, t), (one, t)]
    inside = torch.cartesian_prod(*[line(INSIDE + 2)[1:-1]] * 2)
    grid = torch.cartesian_prod(*[line(GRID)] * 2)
    return Problem(
        inside=inside,
        boundary=torch.cat([torch.stack(edge, dim=1) for edge in edges]),
        source=-2 * math.pi**2 * solution(inside),
        grid=grid,
        exact=solution(grid),
    )


def solution(points: Tensor) -> Tensor:
    """The exact solution, shape `(n, 1)`, at points of shape `(n, 2)`."""
    return (math.pi * points).sin().prod(dim=1, keepdim=True)


def make_network(width: int, seed: int) -> nn.Sequential:
    """A network with one hidden layer, the same for the same seed."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(2, width, dtype=DTYPE), nn.Tanh(), nn.Linear(width, 1, dtype=DTYPE)
    )


def laplacian(net: nn.Module, points: Tensor) -> Tensor:
    """The sum of the second derivatives of the network, shape `(n, 1)`."""
    points = points.clone().requires_grad_()
    u = net(points)
    (gradient,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    total = torch.zeros_like(u)
    for i in range(points.shape[1]):
        (second,) = torch.autograd.grad(gradient[:, i].sum(), points, create_graph=True)
        total = total + second[:, i : i + 1]
    return total


def residual_loss(net: nn.Module, problem: Problem) -> Tensor:
    """The mean squared residual inside, plus that on the boundary."""
    equation = F.mse_loss(laplacian(net, problem.inside), problem.source)
    on_boundary = net(problem.boundary)
    return equation + F.mse_loss(on_boundary, torch.zeros_like(on_boundary))


def make_task(problem: Problem, net: nn.Module) -> Task:
    """The training problem: its losses, and the error of a network."""

    def losses(batch_size: int | None) -> Iterator[Loss]:
        while True:
            yield lambda net: residual_loss(net, problem)

    def measure(net: nn.Module) -> tuple[float, float]:
        with torch.enable_grad():
            loss = residual_loss(net, problem).item()
        error = (net(problem.grid) - problem.exact).norm() / problem.exact.norm()
        return loss, error.item()

    def describe(loss: float, error: float) -> str:
        return f"loss {loss:.1e}, relative L2 error {error:.2e}"

    return Task(net, losses, measure, describe, interval=1.02)


def reached(run: Run, error: float) -> str:
    """The time at which the relative error was reached, or a dash."""
    times = zip(run.curve.seconds, run.curve.score, strict=True)
    first = next((seconds for seconds, score in times if score <= error), None)
    return "-" if first is None else f"{first:.1f} s"


def print_table(runs: list[Run], error: float) -> None:
    """Prints one row for each optimizer."""
    header = ["optimizer", "loss", "relative L2 error", "evaluations", "products", "seconds"]
    rows = [
        [
            run.contender.label,
            f"{run.curve.loss[-1]:.2e}",
            f"{run.curve.score[-1]:.2e}",
            f"{run.evaluations:,}",
            f"{run.products:,}",
            f"{run.seconds:.1f}",
            reached(run, error),
        ]
        for run in runs
    ]
    print(format_table([*header, f"<= {error:g} after"], rows))


@torch.no_grad()
def plot(runs: list[Run], problem: Problem, path: Path) -> None:
    """Plots the best solution, the exact one, the difference, and the errors over time."""
    plt = pyplot()
    best = min(runs, key=lambda run: run.curve.score[-1])
    exact = problem.exact.reshape(GRID, GRID).cpu()
    found = best.model(problem.grid).reshape(GRID, GRID).cpu()
    error = found - exact
    figure, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(10.5, 8.4), layout="constrained")
    values: Mapping[str, Any] = {"cmap": "viridis", "vmin": 0.0, "vmax": 1.0}
    largest = error.abs().max().item()
    signed: Mapping[str, Any] = {"cmap": "RdBu_r", "vmin": -largest, "vmax": largest}
    for axes, field, look, title in (
        (a, found, values, f"network, by {best.contender.label}"),
        (b, exact, values, "exact solution"),
        (c, error, signed, f"network - exact, at most {largest:.1e}"),
    ):
        # Transposed, because the first index is x, which runs along the columns of a picture.
        picture = axes.imshow(field.T, origin="lower", extent=(0, 1, 0, 1), **look)
        axes.set(title=title, xlabel="x", ylabel="y")
        figure.colorbar(picture, ax=axes, shrink=0.9)
    for i, run in enumerate(runs):
        d.plot(run.curve.seconds, run.curve.score, label=run.contender.label, **line_style(i))
    style_axes(d, xlabel="seconds", ylabel="relative L2 error", yscale="log")
    d.set(title="error over time")
    d.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Solves the equation with each optimizer in turn, prints the table and saves the plot."""
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    problem = make_problem(arguments.device)
    net = make_network(arguments.width, arguments.seed).to(arguments.device)
    print(
        f"Poisson's equation on the unit square: {len(problem.inside):,} points inside, "
        f"{len(problem.boundary)} on the boundary; network 2-{arguments.width}-1 "
        f"({sum(p.numel() for p in net.parameters()):,} parameters); "
        f"at most {arguments.seconds:g} s for each optimizer",
        flush=True,
    )
    task = make_task(problem, net)
    runs = [
        train(task, CONTENDERS, name, seconds=arguments.seconds, target=arguments.target)
        for name in arguments.optimizers
    ]
    print_table(runs, arguments.target or ACCURATE)
    print(endings(runs), end="")
    plot(runs, problem, arguments.out)
    print(f"plot: {arguments.out}")


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; mistakes are reported before any work is done."""
    parser = argparse.ArgumentParser(
        description="Solve Poisson's equation on the unit square with a network."
    )
    add = parser.add_argument
    add("--seconds", type=positive(float), default=60.0, help="for each optimizer; default: 60")
    add(
        "--target",
        type=positive(float),
        help="stop at this relative L2 error; default: continue until the time limit",
    )
    add("--width", type=positive(int), default=64, help="width of the hidden layer; default: 64")
    add_common_arguments(
        parser, contenders=CONTENDERS, chosen=["newton-cg"], out="pinn_poisson.png", dtype=DTYPE
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
