"""Solves Poisson's equation in 100 dimensions with a network, from points drawn anew in each step.

The network `u` has to satisfy `u_11 + ... + u_dd = f` in the unit cube and `u = g` on its boundary,
for `f` and `g` whose solution is `|x|^2`. No grid covers 100 dimensions: each step sees 100 points
inside and 50 on the boundary that no other step sees. There are far fewer residuals than
parameters, and Levenberg-Marquardt solves one equation for each residual, with the momentum of
SPRING (Goldshlager, Abrahamsen and Lin 2024, arXiv 2401.10190; for such equations Guzmán-Cordero
et al. 2025, arXiv 2505.12149).

The Laplacian takes no second backward pass. Value, derivatives along all coordinates and Laplacian
go through the layers together (Li et al. 2024, "A computational framework for neural network-based
variational Monte Carlo with Forward Laplacian").

    python examples/poisson_100d.py
    python examples/poisson_100d.py --optimizers levenberg-marquardt --seconds 300
    python examples/poisson_100d.py --dimension 20 --widths 32,32 --seconds 20
    python examples/poisson_100d.py --quick
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import torch_secondorder
from _command_line import add_common_arguments, add_json_argument, positive
from _pinn import DTYPE, describe_network, make_layers, widths
from _report import format_table, line_style, pyplot, style_axes, write_results
from _training import Contender, Loss, Run, Task, endings, train

INSIDE = 100  # points for the equation in each step; half as many for the boundary
TEST = 2000  # points for the error
SHARES = (0.125, 0.25, 0.5)  # of the time, for the table
QUICK = {"dimension": 5, "widths": [12, 12], "points": 20, "seconds": 1.0}


def cosine(share: float) -> float:
    """A factor of the learning rate that falls to zero with the share of the time that is over."""
    return 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))


def make_spring(params: Iterable[nn.Parameter]) -> Optimizer:
    """Levenberg-Marquardt for mini-batches; parameters move by at most a tenth in a step."""
    params = list(params)
    size = nn.utils.parameters_to_vector(params).norm().item()
    return torch_secondorder.LevenbergMarquardt(
        params, lr=0.4, momentum=0.9, max_norm=0.1 * size, globalization=None
    )


# To compare another optimizer, add a row.
CONTENDERS = {
    "levenberg-marquardt": Contender(
        "LevenbergMarquardt, momentum (ours)",
        make_spring,
        INSIDE,
        cosine,
    ),
    "newton-cg": Contender("NewtonCG (ours)", torch_secondorder.NewtonCG, INSIDE),
    "adam": Contender("Adam", lambda p: torch.optim.Adam(p, lr=1e-2), INSIDE, cosine),
}


@dataclass(frozen=True)
class Cube:
    """The unit cube.

    Attributes:
        dimension: Its dimension.
        device: The device of its points.
    """

    dimension: int
    device: torch.device

    def inside(self, count: int, generator: torch.Generator) -> Tensor:
        """Random points, shape `(count, dimension)`."""
        points = torch.rand(count, self.dimension, dtype=DTYPE, generator=generator)
        return points.to(self.device)

    def boundary(self, count: int, generator: torch.Generator) -> Tensor:
        """Random points on the faces, shape `(count, dimension)`."""
        points = torch.rand(count, self.dimension, dtype=DTYPE, generator=generator)
        coordinates = torch.randint(self.dimension, (count,), generator=generator)
        sides = torch.randint(2, (count,), generator=generator)
        points[torch.arange(count), coordinates] = sides.to(DTYPE)
        return points.to(self.device)


def solution(points: Tensor) -> Tensor:
    """The exact solution `|x|^2`, shape `(n, 1)`, at points of shape `(n, d)`."""
    return points.square().sum(1, keepdim=True)


def laplacian_of_the_solution(points: Tensor) -> Tensor:
    """The right side of the equation, shape `(n, 1)`."""
    return torch.full_like(points[:, :1], 2.0 * points.shape[1])


def laplacian(net: nn.Sequential, points: Tensor) -> Tensor:
    """The sum of the second derivatives of a tanh network, by one pass through its layers.

    Args:
        net: Linear layers with tanh between them.
        points: Shape `(n, d)`.

    Returns:
        Shape `(n, 1)`.
    """
    value = points
    # Derivatives along each coordinate, (n, d, width), and their sums at second order, (n, width).
    slopes = torch.eye(points.shape[1]).to(points).expand(len(points), -1, -1)
    bends = torch.zeros_like(points)
    for layer in net:
        if isinstance(layer, nn.Linear):
            value = layer(value)
            slopes, bends = F.linear(slopes, layer.weight), F.linear(bends, layer.weight)
        else:
            value = torch.tanh(value)
            first = 1.0 - value.square()
            bends = first * (bends - 2.0 * value * slopes.square().sum(1))
            slopes = first[:, None, :] * slopes
    return bends


def residual_loss(net: nn.Sequential, inside: Tensor, boundary: Tensor) -> Tensor:
    """The mean squares of the residual and of the error at the boundary.

    Args:
        net: The network.
        inside: Points for the equation, shape `(n, d)`.
        boundary: Points on the faces of the cube, shape `(m, d)`.
    """
    equation = F.mse_loss(laplacian(net, inside), laplacian_of_the_solution(inside))
    return equation + F.mse_loss(net(boundary), solution(boundary))


def make_network(dimension: int, widths: Sequence[int], seed: int) -> nn.Sequential:
    """A network with hidden layers of these widths, the same for the same seed."""
    return make_layers([dimension, *widths, 1], seed)


def make_task(cube: Cube, net: nn.Sequential, points: int, seed: int) -> Task:
    """The training problem: its losses, and the error of a network at points of their own."""
    generator = torch.Generator().manual_seed(seed + 10_000)
    grid = cube.inside(TEST, generator)
    exact, some = solution(grid), (grid[:points], cube.boundary(points, generator))

    def losses(batch_size: int | None) -> Iterator[Loss]:
        draws = torch.Generator().manual_seed(seed)
        while True:
            inside, boundary = cube.inside(points, draws), cube.boundary(points // 2, draws)
            yield partial(residual_loss, inside=inside, boundary=boundary)

    def measure(net: nn.Module) -> tuple[float, float]:
        error = (net(grid) - exact).norm() / exact.norm()
        return residual_loss(net, *some).item(), error.item()

    def describe(loss: float, error: float) -> str:
        return f"loss {loss:.1e}, relative L2 error {error:.2e}"

    return Task(net, losses, measure, describe)


def print_table(runs: Sequence[Run], seconds: float) -> None:
    """Prints one row for each optimizer, with its error at a few times."""
    times = [f"after {share * seconds:g} s" for share in SHARES]
    header = ["relative L2 error", *times, "at the end", "loss", "evaluations", "seconds"]
    rows = [
        [
            run.contender.label,
            *(f"{error_after(run, share * seconds):.2e}" for share in SHARES),
            f"{run.curve.score[-1]:.2e}",
            f"{run.curve.loss[-1]:.2e}",
            f"{run.evaluations:,}",
            f"{run.seconds:.1f}",
        ]
        for run in runs
    ]
    print(format_table(header, rows))


def error_after(run: Run, seconds: float) -> float:
    """The last relative error measured until a time."""
    points = zip(run.curve.seconds, run.curve.score, strict=True)
    return [error for time, error in points if time <= seconds][-1]


@torch.no_grad()
def plot(runs: Sequence[Run], cube: Cube, path: Path) -> None:
    """Plots the errors over time, and the values of the best network against the exact ones."""
    plt = pyplot()
    best = min(runs, key=lambda run: run.curve.score[-1])
    points = cube.inside(TEST, torch.Generator().manual_seed(1))
    exact, found = solution(points)[:, 0].cpu(), best.model(points)[:, 0].cpu()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for i, run in enumerate(runs):
        left.plot(run.curve.seconds, run.curve.score, label=run.contender.label, **line_style(i))
    style_axes(left, xlabel="seconds", ylabel="relative L2 error", yscale="log")
    left.legend(frameon=False)
    right.scatter(exact, found, s=4, alpha=0.5, linewidths=0)
    ends = [exact.min().item(), exact.max().item()]
    right.plot(ends, ends, color="0.3", linewidth=0.8)
    style_axes(right, xlabel="solution", ylabel="network")
    right.set(title=f"{TEST:,} points, by {best.contender.label}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Solves the equation with each optimizer in turn, prints the table and saves the plot."""
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    cube = Cube(arguments.dimension, arguments.device)
    net = make_network(arguments.dimension, arguments.widths, arguments.seed)
    net = net.to(arguments.device)
    points, seconds = arguments.points, arguments.seconds
    print(
        f"Poisson's equation in {cube.dimension} dimensions: {points} points inside and "
        f"{points // 2} on the boundary, new ones in each step; {describe_network(net)}; "
        f"{seconds:g} s for each optimizer",
        flush=True,
    )
    task = make_task(cube, net, points, arguments.seed)
    runs = [train(task, CONTENDERS, name, seconds=seconds) for name in arguments.optimizers]
    print_table(runs, seconds)
    print(endings(runs), end="")
    results = {
        run.contender.label: {"error": run.curve.score[-1], "loss": run.curve.loss[-1]}
        for run in runs
    }
    write_results(arguments.json, "poisson_100d", results)
    plot(runs, cube, arguments.out)
    print(f"plot: {arguments.out}")


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; mistakes are reported before any work is done."""
    parser = argparse.ArgumentParser(description="Solve Poisson's equation in 100 dimensions.")
    add = parser.add_argument
    add("--seconds", type=positive(float), default=120.0, help="for each optimizer; default: 120")
    add("--dimension", type=positive(int), default=100, help="default: 100")
    add(
        "--widths",
        type=widths,
        default=[128, 128],
        metavar="A,B,...",
        help="widths of the hidden layers; default: 128,128",
    )
    add(
        "--points",
        type=positive(int),
        default=INSIDE,
        help=f"points inside in each step, half as many on the boundary; default: {INSIDE}",
    )
    add("--quick", action="store_true", help="a small problem for a second, to try the script")
    add_common_arguments(
        parser, contenders=CONTENDERS, chosen=CONTENDERS, out="poisson_100d.png", dtype=DTYPE
    )
    add_json_argument(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)
    return arguments


if __name__ == "__main__":
    main()
