"""Solves Burgers' equation, whose solution steepens into a shock, with a small network.

The equation is `u_t + u u_x = (0.01 / pi) u_xx` for x in [-1, 1] and t in [0, 1], from
`u(x, 0) = -sin(pi x)`, with `u = 0` at both ends. The initial and the boundary values are built
into the network, so that the loss is the residual alone. The error is measured against a solution
by the method of lines, computed here.

    python examples/pinn_burgers.py
    python examples/pinn_burgers.py --optimizers all --seconds 30
    python examples/pinn_burgers.py --widths 40,40,40 --target 1e-3
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.integrate import solve_ivp
from scipy.interpolate import CubicSpline
from torch import Tensor, nn

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

VISCOSITY = 0.01 / math.pi
STRETCH = 5.0  # of the meshes, towards the shock at x = 0
INSIDE = 2000  # points for the residual
GRID = (257, 101)  # points in x and in t, for the error


class Ansatz(nn.Module):
    """A network that satisfies the initial and the boundary conditions whatever its weights."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, points: Tensor) -> Tensor:
        """The solution, shape `(n, 1)`, at points (x, t) of shape `(n, 2)`."""
        x, t = points[:, :1], points[:, 1:]
        return t * (1.0 - x * x) * self.net(points) - torch.sin(math.pi * x)


@dataclass(frozen=True)
class Problem:
    """The equation, at a set of points.

    Attributes:
        inside: Points (x, t) for the residual, shape `(n, 2)`.
        grid: Points for measuring the error, shape `(257 * 101, 2)`.
        reference: The solution there, shape `(257 * 101, 1)`.
        accuracy: Estimated relative L2 error of that.
    """

    inside: Tensor
    grid: Tensor
    reference: Tensor
    accuracy: float


def make_problem(device: torch.device) -> Problem:
    """The equation on grids of points, which are denser near the shock."""
    # A Sobol sequence, not a grid: between the columns of a grid a network can hide a jump.
    square = torch.quasirandom.SobolEngine(2).draw(INSIDE, dtype=DTYPE)
    s, t = 2.0 * square[:, :1] - 1.0, square[:, 1:]
    inside = torch.cat([torch.sinh(STRETCH * s) / math.sinh(STRETCH), t], dim=1)
    x, times = (
        torch.linspace(low, 1, n, dtype=DTYPE) for low, n in zip((-1, 0), GRID, strict=True)
    )
    reference, accuracy = reference_solution(x.numpy(), times.numpy())
    return Problem(
        inside.to(device),
        torch.cartesian_prod(x, times).to(device),
        torch.from_numpy(reference.reshape(-1, 1)).to(device),
        accuracy,
    )


def reference_solution(x: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, float]:
    """The solution by the method of lines, extrapolated from two meshes.

    The error of one mesh falls with the square of its width, so that two meshes tell it. Three of
    them, each twice as fine as the one before, give two extrapolations; their difference is an
    estimate of the error of the coarser one, and an upper bound for that of the finer.

    Args:
        x: Where, in [-1, 1].
        times: When, increasing, in [0, 1].

    Returns:
        The solution, shape `(len(x), len(times))`, and its estimated relative L2 error.
    """
    coarse, middle, fine = (method_of_lines(x, times, cells) for cells in (250, 500, 1000))
    rough, better = middle + (middle - coarse) / 3.0, fine + (fine - middle) / 3.0
    error = np.linalg.norm(better - rough) / np.linalg.norm(better)
    return better, float(error)


def method_of_lines(x: np.ndarray, times: np.ndarray, cells: int) -> np.ndarray:
    """The solution by central differences in space, and a stiff solver in time.

    Only for x > 0, because the solution is odd. The mesh is dense at zero, where the shock is.

    Args:
        x: Where, in [-1, 1].
        times: When, increasing, in [0, 1].
        cells: Number of intervals of the mesh of [0, 1].

    Returns:
        The solution, shape `(len(x), len(times))`.
    """
    s = np.linspace(0.0, 1.0, cells + 1)
    mesh = np.sinh(STRETCH * s) / np.sinh(STRETCH)
    width, cell = np.diff(mesh), 0.5 * (mesh[2:] - mesh[:-2])

    def slope(t: float, inner: np.ndarray) -> np.ndarray:
        u = np.pad(inner, 1)
        flux = 0.25 * (u[1:] ** 2 + u[:-1] ** 2) - VISCOSITY * np.diff(u) / width
        return -np.diff(flux) / cell

    solution = solve_ivp(
        slope,
        (0.0, 1.0),
        -np.sin(np.pi * mesh[1:-1]),
        method="LSODA",
        t_eval=times,
        lband=1,  # each value depends on its neighbours only
        uband=1,
        rtol=1e-9,
        atol=1e-11,
    )
    u = np.pad(solution.y, ((1, 1), (0, 0)))
    at = np.arcsinh(np.abs(x) * np.sinh(STRETCH)) / STRETCH
    return np.sign(x)[:, None] * CubicSpline(s, u)(at)


def make_network(widths: list[int], seed: int) -> Ansatz:
    """A network with hidden layers of these widths, the same for the same seed."""
    return Ansatz(make_layers([2, *widths, 1], seed))


def residual_loss(net: nn.Module, problem: Problem) -> Tensor:
    """The mean squared residual of the equation."""
    points = problem.inside.clone().requires_grad_()
    u = net(points)
    (gradient,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    u_x, u_t = gradient[:, :1], gradient[:, 1:]
    (second,) = torch.autograd.grad(u_x.sum(), points, create_graph=True)
    residual = u_t + u * u_x - VISCOSITY * second[:, :1]
    return F.mse_loss(residual, torch.zeros_like(residual))


def make_task(problem: Problem, net: nn.Module) -> Task:
    """The training problem: its losses, and the error of a network."""
    return task_of(net, lambda net: residual_loss(net, problem), problem.grid, problem.reference)


def main() -> None:
    """Solves the equation with each optimizer in turn, prints the table and saves the plot."""
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    problem = make_problem(arguments.device)
    net = make_network(arguments.widths, arguments.seed).to(arguments.device)
    print(
        f"Burgers' equation: {len(problem.inside):,} points; {describe_network(net)}; "
        f"at most {arguments.seconds:g} s for each optimizer\n"
        f"solution by the method of lines: relative L2 error about {problem.accuracy:.0e}",
        flush=True,
    )
    picture = Picture(
        exact=problem.reference.reshape(GRID).T,
        found=lambda net: net(problem.grid).reshape(GRID).T,
        extent=(0, 1, -1, 1),
        names=("t", "x"),
        look={"cmap": "viridis", "vmin": -1.0, "vmax": 1.0},
    )
    compare(make_task(problem, net), picture, arguments)


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; mistakes are reported before any work is done."""
    parser = argparse.ArgumentParser(description="Solve Burgers' equation with a network.")
    parser.add_argument(
        "--widths",
        type=widths,
        default=[20, 20, 20],
        metavar="A,B,...",
        help="widths of the hidden layers; default: 20,20,20",
    )
    add_pinn_arguments(parser, out="pinn_burgers.png")
    return parser.parse_args()


if __name__ == "__main__":
    main()
