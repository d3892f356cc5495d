"""Parts of the examples with physics-informed networks: optimizers, table, plot, command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torch_secondorder
from _command_line import add_common_arguments, positive
from _report import format_table, line_style, pyplot, style_axes
from _training import Contender, Loss, Run, Task, endings, train

ACCURATE = 1e-4  # a relative error; the table shows the time it was reached
DTYPE = torch.float64

CONTENDERS = {
    "levenberg-marquardt": Contender(
        "LevenbergMarquardt (ours)", lambda p: torch_secondorder.LevenbergMarquardt(p)
    ),
    "levenberg-marquardt-identity": Contender(
        "LevenbergMarquardt, identity (ours)",
        lambda p: torch_secondorder.LevenbergMarquardt(p, scaling="identity", acceleration=None),
    ),
    "ssbroyden": Contender(
        "BFGS, ssbroyden (ours)",
        lambda p: torch_secondorder.BFGS(p, update="ssbroyden", max_iter=10),
    ),
    "bfgs": Contender(
        "BFGS (ours)", lambda p: torch_secondorder.BFGS(p, update="bfgs", max_iter=10)
    ),
    "lbfgs-ssbroyden": Contender(
        "LBFGS, ssbroyden (ours)",
        lambda p: torch_secondorder.LBFGS(p, update="ssbroyden", max_iter=10),
    ),
    "lbfgs": Contender("LBFGS (ours)", lambda p: torch_secondorder.LBFGS(p, max_iter=10)),
    "nonlinear-cg": Contender(
        "NonlinearCG (ours)", lambda p: torch_secondorder.NonlinearCG(p, max_iter=10)
    ),
    "newton-cg": Contender(
        "NewtonCG (ours)", lambda p: torch_secondorder.NewtonCG(p, preconditioner="nystrom")
    ),
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
class Picture:
    """A solution over a rectangle, for the plot.

    Attributes:
        exact: The solution, shape `(n, m)`: the first index runs along the horizontal axis.
        found: Computes the same for a network.
        extent: Ends of the horizontal axis, then of the vertical one.
        names: Names of the axes.
        look: Colour map and limits.
    """

    exact: Tensor
    found: Callable[[nn.Module], Tensor]
    extent: tuple[float, float, float, float]
    names: tuple[str, str]
    look: Mapping[str, Any]


def make_layers(widths: Sequence[int], seed: int) -> nn.Sequential:
    """A tanh network with layers of these widths, the same for the same seed."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for width, following in pairwise(widths):
        layers += [nn.Linear(width, following, dtype=DTYPE), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def describe_network(net: nn.Module) -> str:
    """The widths of the layers, and the number of parameters."""
    linear = [layer for layer in net.modules() if isinstance(layer, nn.Linear)]
    widths = "-".join(str(n) for n in (linear[0].in_features, *(m.out_features for m in linear)))
    return f"network {widths} ({sum(p.numel() for p in net.parameters()):,} parameters)"


def make_task(
    net: nn.Module, loss: Callable[[nn.Module], Tensor], grid: Tensor, exact: Tensor
) -> Task:
    """The training problem.

    Args:
        net: The initial network.
        loss: Computes the loss of a network.
        grid: Points for measuring the error, shape `(n, 2)`.
        exact: The solution there, shape `(n, 1)`.
    """

    def losses(batch_size: int | None) -> Iterator[Loss]:
        while True:
            yield loss

    def measure(net: nn.Module) -> tuple[float, float]:
        with torch.enable_grad():
            value = loss(net).item()
        error = (net(grid) - exact).norm() / exact.norm()
        return value, error.item()

    def describe(loss: float, error: float) -> str:
        return f"loss {loss:.1e}, relative L2 error {error:.2e}"

    return Task(net, losses, measure, describe, interval=1.02)


def compare(task: Task, picture: Picture, arguments: argparse.Namespace) -> None:
    """Trains with each optimizer in turn, prints the table and saves the plot."""
    runs = [
        train(task, CONTENDERS, name, seconds=arguments.seconds, target=arguments.target)
        for name in arguments.optimizers
    ]
    print_table(runs, arguments.target or ACCURATE)
    print(endings(runs), end="")
    plot(runs, picture, arguments.out)
    print(f"plot: {arguments.out}")


def reached(run: Run, error: float) -> str:
    """The time at which the relative error was reached, or a dash."""
    times = zip(run.curve.seconds, run.curve.score, strict=True)
    first = next((seconds for seconds, score in times if score <= error), None)
    return "-" if first is None else f"{first:.1f} s"


def print_table(runs: Sequence[Run], error: float) -> None:
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
def plot(runs: Sequence[Run], picture: Picture, path: Path) -> None:
    """Plots the best solution, the exact one, the difference, and the errors over time."""
    plt = pyplot()
    best = min(runs, key=lambda run: run.curve.score[-1])
    exact, found = picture.exact.cpu(), picture.found(best.model).cpu()
    error = found - exact
    figure, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(10.5, 8.4), layout="constrained")
    largest = error.abs().max().item()
    signed: Mapping[str, Any] = {"cmap": "RdBu_r", "vmin": -largest, "vmax": largest}
    for axes, field, look, title in (
        (a, found, picture.look, f"network, by {best.contender.label}"),
        (b, exact, picture.look, "solution"),
        (c, error, signed, f"network - solution, at most {largest:.1e}"),
    ):
        # Transposed, because the first index runs along the columns of a picture.
        image = axes.imshow(field.T, origin="lower", extent=picture.extent, aspect="auto", **look)
        axes.set(title=title, xlabel=picture.names[0], ylabel=picture.names[1])
        figure.colorbar(image, ax=axes, shrink=0.9)
    for i, run in enumerate(runs):
        d.plot(run.curve.seconds, run.curve.score, label=run.contender.label, **line_style(i))
    style_axes(d, xlabel="seconds", ylabel="relative L2 error", yscale="log")
    d.set(title="error over time")
    d.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def widths(text: str) -> list[int]:
    """Parses the widths of the hidden layers."""
    return [int(positive(int)(part)) for part in text.split(",")]


def add_pinn_arguments(
    parser: argparse.ArgumentParser,
    out: str,
    *,
    seconds: float = 60.0,
) -> None:
    """Adds the options that these examples have, except for the size of the network."""
    add = parser.add_argument
    add(
        "--seconds",
        type=positive(float),
        default=seconds,
        help=f"for each optimizer; default: {seconds:g}",
    )
    add(
        "--target",
        type=positive(float),
        help="stop at this relative L2 error; default: continue until the time limit",
    )
    add_common_arguments(
        parser, contenders=CONTENDERS, chosen=["levenberg-marquardt"], out=out, dtype=DTYPE
    )
