"""Solves Poisson's equation on the unit square with a small network, to high precision.

The network `u` has to satisfy `u_xx + u_yy = f` inside and `u = 0` on the boundary, for an `f`
whose solution is `sin(pi x) sin(pi y)`. The loss is so badly conditioned that first-order methods
nearly stop far from the solution; second-order methods get much closer in the same time. The loss
is a sum of squares, and steps of Levenberg and Marquardt that follow the bend of its residuals get
closest.

    python examples/pinn_poisson.py
    python examples/pinn_poisson.py --target 1e-4
    python examples/pinn_poisson.py --optimizers all --seconds 30
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
)
from _pinn import make_task as task_of
from _training import Task

__all__ = ["CONTENDERS", "make_network", "make_problem", "make_task", "residual_loss"]

INSIDE, EDGE, GRID = 30, 30, 101  # points per side


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
    return make_layers([2, width, 1], seed)


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
    return task_of(net, lambda net: residual_loss(net, problem), problem.grid, problem.exact)


def main() -> None:
    """Solves the equation with each optimizer in turn, prints the table and saves the plot."""
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    problem = make_problem(arguments.device)
    net = make_network(arguments.width, arguments.seed).to(arguments.device)
    print(
        f"Poisson's equation on the unit square: {len(problem.inside):,} points inside, "
        f"{len(problem.boundary)} on the boundary; {describe_network(net)}; "
        f"at most {arguments.seconds:g} s for each optimizer",
        flush=True,
    )
    picture = Picture(
        exact=problem.exact.reshape(GRID, GRID),
        found=lambda net: net(problem.grid).reshape(GRID, GRID),
        extent=(0, 1, 0, 1),
        names=("x", "y"),
        look={"cmap": "viridis", "vmin": 0.0, "vmax": 1.0},
    )
    compare(make_task(problem, net), picture, arguments)


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; mistakes are reported before any work is done."""
    parser = argparse.ArgumentParser(
        description="Solve Poisson's equation on the unit square with a network."
    )
    parser.add_argument(
        "--width", type=positive(int), default=64, help="width of the hidden layer; default: 64"
    )
    add_pinn_arguments(parser, out="pinn_poisson.png")
    return parser.parse_args()


if __name__ == "__main__":
    main()
