"""Solves the convection equation with a fast wave, at which networks are known to fail.

The equation is `u_t + 30 u_x = 0` for x in [0, 2 pi] and t in [0, 1], periodic in x, from
`u(x, 0) = sin(x)`. The wave passes the domain almost five times. The loss has solutions of the
equation as valleys that lead away from the initial values: most optimizers end in one, with an
error of 80 to 100 percent (Krishnapriyan et al., "Characterizing possible failure modes in
physics-informed neural networks", NeurIPS 2021). Here neither the speed is raised in stages, nor
are the conditions built into the network.

    python examples/pinn_convection.py
    python examples/pinn_convection.py --target 1e-2
    python examples/pinn_convection.py --optimizers levenberg-marquardt,torch-lbfgs,adam
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _command_line import positive
from _pinn import (
    CONTENDERS,
    DTYPE,
    Picture,
    add_pinn_arguments,
    compare,
    describe_network,
    make_layers,
    widths,
)
from _pinn import make_task as task_of
from _training import Task

__all__ = ["CONTENDERS", "make_network", "make_problem", "make_task", "residual_loss"]

SPEED = 30.0
INSIDE, START, EDGE = 2000, 256, 100  # points for the residual, at t = 0, and at both ends
GRID = (101, 101)  # points in x and in t, for the error


@dataclass(frozen=True)
class Problem:
    """The equation, at a set of points.

    Attributes:
        inside: Points (x, t) for the residual, shape `(n, 2)`.
        start: Points with t = 0, shape `(m, 2)`.
        wave: The initial values there, shape `(m, 1)`.
        left: Points with x = 0, shape `(k, 2)`.
        right: The same with x = 2 pi.
        grid: Points for measuring the error, shape `(101 * 101, 2)`.
        exact: The solution there, shape `(101 * 101, 1)`.
    """

    inside: Tensor
    start: Tensor
    wave: Tensor
    left: Tensor
    right: Tensor
    grid: Tensor
    exact: Tensor


def make_problem(device: torch.device, points: int = INSIDE) -> Problem:
    """The equation at the first points of a Sobol sequence, and on lines along three sides."""
    period = 2.0 * math.pi

    def line(end: float, count: int) -> Tensor:
        return torch.linspace(0, end, count, dtype=DTYPE, device=device)

    # Not a grid: between its lines a network can satisfy the equation at the points only.
    square = torch.quasirandom.SobolEngine(2).draw(points, dtype=DTYPE).to(device)
    inside = square * square.new_tensor([period, 1.0])
    start = torch.cartesian_prod(line(period, START + 1)[:-1], line(0, 1))
    left, right = (
        torch.cartesian_prod(torch.full_like(line(0, 1), x), line(1, EDGE)) for x in (0.0, period)
    )
    grid = torch.cartesian_prod(line(period, GRID[0]), line(1, GRID[1]))
    return Problem(inside, start, solution(start), left, right, grid, solution(grid))


def solution(points: Tensor) -> Tensor:
    """The exact solution, shape `(n, 1)`, at points (x, t) of shape `(n, 2)`."""
    return (points[:, :1] - SPEED * points[:, 1:]).sin()


def make_network(widths: list[int], seed: int) -> nn.Sequential:
    """A network with hidden layers of these widths, the same for the same seed."""
    return make_layers([2, *widths, 1], seed)


def residual_loss(net: nn.Module, problem: Problem) -> Tensor:
    """The mean squares of the residual, of the initial error and of the jump from end to end."""
    points = problem.inside.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(points).sum(), points, create_graph=True)
    residual = gradient[:, 1] + SPEED * gradient[:, 0]
    equation = F.mse_loss(residual, torch.zeros_like(residual))
    initial = F.mse_loss(net(problem.start), problem.wave)
    return equation + initial + F.mse_loss(net(problem.left), net(problem.right))


def make_task(problem: Problem, net: nn.Module) -> Task:
    """The training problem: its losses, and the error of a network."""
    return task_of(net, lambda net: residual_loss(net, problem), problem.grid, problem.exact)


def main() -> None:
    """Solves the equation with each optimizer in turn, prints the table and saves the plot."""
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    problem = make_problem(arguments.device, arguments.points)
    net = make_network(arguments.widths, arguments.seed).to(arguments.device)
    print(
        f"Convection with speed {SPEED:g}: {len(problem.inside):,} points inside, "
        f"{len(problem.start)} at the start, {len(problem.left)} at the ends; "
        f"{describe_network(net)}; at most {arguments.seconds:g} s for each optimizer",
        flush=True,
    )
    picture = Picture(
        exact=problem.exact.reshape(GRID).T,
        found=lambda net: net(problem.grid).reshape(GRID).T,
        extent=(0, 1, 0, 2 * math.pi),
        names=("t", "x"),
        look={"cmap": "viridis", "vmin": -1.0, "vmax": 1.0},
    )
    compare(make_task(problem, net), picture, arguments)


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; mistakes are reported before any work is done."""
    parser = argparse.ArgumentParser(description="Solve the convection equation with a network.")
    add = parser.add_argument
    add(
        "--widths",
        type=widths,
        default=[50, 50, 50],
        metavar="A,B,...",
        help="widths of the hidden layers; default: 50,50,50",
    )
    add(
        "--points",
        type=positive(int),
        default=INSIDE,
        help=f"number of points inside; default: {INSIDE}",
    )
    add_pinn_arguments(parser, out="pinn_convection.png", seconds=300.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
