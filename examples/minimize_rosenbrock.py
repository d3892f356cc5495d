"""Minimizes Rosenbrock's function with every method, and draws their paths on one picture.

The function has a curved, narrow valley, `100 (y - x^2)^2 + (1 - x)^2`, whose lowest point (1, 1)
is hard to reach along its floor. Each method runs twice where it can: with the exact gradient by
autograd, and with one by finite differences, which takes three evaluations each.

    python examples/minimize_rosenbrock.py
    python examples/minimize_rosenbrock.py --methods bfgs,newton --start 0,3
    python examples/minimize_rosenbrock.py --jac exact --out paths.pdf
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torch_secondorder
from _command_line import names_among, output_file
from _report import format_table, line_style, pyplot, style_axes

MINIMUM = (1.0, 1.0)
# The name of a method, how it is shown, and its options.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "bfgs": ("BFGS", {}),
    "ssbroyden": ("BFGS, ssbroyden", {}),
    "lbfgs": ("LBFGS", {}),
    "cg": ("NonlinearCG", {}),
    "newton": ("Newton", {}),
    "newton-cg": ("NewtonCG", {}),
    # Made for losses with noise: steps of about a fixed size, many of them.
    "adahessian": ("AdaHessian", {"lr": 2.0, "maxiter": 1000}),
    "sophia": ("Sophia", {"lr": 0.02, "estimator": "hutchinson", "maxiter": 1000}),
}
MARKERS = "os^vDP"
GRADIENTS = {"exact": None, "differences": "2-point"}


@dataclass(frozen=True)
class Descent:
    """One run of one method.

    Attributes:
        label: The method, as shown.
        gradient: `exact` or `differences`.
        result: What `minimize` returned.
        path: The points of all iterations with the start, shape `(n, 2)`.
        values: The function there.
    """

    label: str
    gradient: str
    result: torch_secondorder.OptimizeResult
    path: Tensor
    values: list[float]

    @property
    def distance(self) -> float:
        """The distance from its end to the minimum."""
        return (self.result.x - torch.tensor(MINIMUM, dtype=torch.float64)).norm().item()


def rosenbrock(point: Tensor) -> Tensor:
    """The function, at points of shape `(..., 2)`."""
    x, y = point.unbind(-1)
    return 100.0 * (y - x * x).square() + (1.0 - x).square()


def descend(method: str, gradient: str, start: Tensor) -> Descent:
    """Runs one method, and records its path."""
    label, options = METHODS[method]
    path, values = [start], [rosenbrock(start).item()]

    def record(intermediate_result: torch_secondorder.OptimizeResult) -> None:
        path.append(intermediate_result.x.clone())
        values.append(intermediate_result.fun)

    result = torch_secondorder.minimize(
        rosenbrock, start, method, jac=GRADIENTS[gradient], callback=record, options=options
    )
    return Descent(label, gradient, result, torch.stack(path), values)


def takes_differences(method: str, start: Tensor) -> bool:
    """False for methods that need second derivatives, which differences are too inaccurate for."""
    try:
        torch_secondorder.minimize(rosenbrock, start, method, jac="2-point", options={"maxiter": 1})
    except ValueError:
        return False
    return True


def print_table(runs: Sequence[Descent]) -> None:
    """Prints one row for each run."""
    header = ["method", "gradient", "iterations", "evaluations", "Hessians, products"]
    rows = [
        [
            run.label,
            run.gradient,
            f"{run.result.nit:,}",
            f"{run.result.nfev:,}",
            f"{run.result.nhev:,}",
            f"{run.result.fun:.1e}",
            f"{run.distance:.1e}",
        ]
        for run in runs
    ]
    print(format_table([*header, "value", "distance to (1, 1)"], rows))


def plot(runs: Sequence[Descent], path: Path) -> None:
    """Draws the paths over the contours, and the values by iterations."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 6.2), width_ratios=(1.5, 1), layout="constrained"
    )
    draw_contours(left, torch.cat([run.path for run in runs]))
    number = {label: i for i, label in enumerate(dict.fromkeys(run.label for run in runs))}
    drawn = set()
    for run in runs:
        i = number[run.label]
        look = line_style(i) | {"linestyle": "-" if run.gradient == "exact" else ":"}
        if run.label not in drawn:  # the path with differences can hardly be told from it
            drawn.add(run.label)
            x, y = run.path.T
            # A marker for each iteration, where those do not merge into a thick line.
            marker = MARKERS[i % len(MARKERS)] if len(x) <= 100 else ""
            left.plot(x, y, marker=marker, ms=5, label=run.label, **look | {"linewidth": 1.2})
        # Rounding can make the last value zero, which a logarithmic axis cannot show.
        right.plot([max(value, 1e-32) for value in run.values], **look)
    left.plot(*MINIMUM, marker="*", markersize=15, color="black", zorder=10)
    style_axes(right, xlabel="iterations", ylabel="value", xscale="symlog", yscale="log")
    right.set(title="exact gradients solid, differences dotted", xlim=(0, None))
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_contours(axes: Any, points: Tensor) -> None:
    """Draws the function around points, in steps of a factor of three."""
    low, high = points.amin(0), points.amax(0)
    margin = 0.08 * (high - low).clamp(min=0.1)
    x, y = (
        torch.linspace(start, end, 400, dtype=torch.float64)
        for start, end in zip(low - margin, high + margin, strict=True)
    )
    values = rosenbrock(torch.cartesian_prod(x, y)).reshape(400, 400).T.log10()
    highest = math.ceil(2.0 * values.max().item())
    levels = [k / 2 for k in range(-5, highest + 1)]
    axes.contourf(x, y, values, levels=levels, cmap="Greys", alpha=0.35, extend="min")
    axes.contour(x, y, values, levels=levels, colors="0.7", linewidths=0.5, linestyles="solid")
    style_axes(axes, xlabel="x", ylabel="y")
    axes.grid(visible=False)
    axes.set(title="paths over the contours of Rosenbrock's function")


def main() -> None:
    """Runs all methods, then prints the table and saves the picture."""
    arguments = parse_arguments()
    torch.manual_seed(0)  # AdaHessian and Sophia draw random vectors
    start = torch.tensor(arguments.start, dtype=torch.float64)
    print(f"Rosenbrock's function from ({start[0]:g}, {start[1]:g}); its minimum is 0 at (1, 1)")
    runs = [
        descend(method, gradient, start)
        for method in arguments.methods
        for gradient in arguments.jac
        if gradient == "exact" or takes_differences(method, start)
    ]
    if not runs:
        raise SystemExit("error: these methods need second derivatives; add exact to --jac")
    print_table(runs)
    for run in runs:
        if not run.result.success:
            print(f"{run.label}, {run.gradient}: {run.result.message}")
    plot(runs, arguments.out)
    print(f"plot: {arguments.out}")


def point(text: str) -> tuple[float, ...]:
    """Parses two finite numbers."""
    numbers = tuple(float(part) for part in text.split(","))
    if len(numbers) != 2 or not all(map(math.isfinite, numbers)):
        raise argparse.ArgumentTypeError(f"{text} is not two finite numbers such as -1.2,1")
    return numbers


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; mistakes are reported before any work is done."""
    parser = argparse.ArgumentParser(description="Minimize Rosenbrock's function by all methods.")
    add = parser.add_argument
    for option, known, kind in (("--methods", METHODS, "method"), ("--jac", GRADIENTS, "gradient")):
        add(
            option,
            type=names_among(known, kind),
            default=list(known),
            metavar="A,B,...",
            help=f"any of {', '.join(known)}; default: all",
        )
    add("--start", type=point, default=(-1.2, 1.0), metavar="X,Y", help="default: -1.2,1")
    out = "minimize_rosenbrock.png"
    add("--out", type=output_file, default=out, help=f"file of the picture; default: {out}")
    return parser.parse_args()


if __name__ == "__main__":
    main()
