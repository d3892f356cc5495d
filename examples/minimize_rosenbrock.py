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
    "newton-cg": ("NewtonCG", {}),
    "trust-ncg": ("NewtonCG, trust region", {}),
    # Made for losses with noise: steps of a fixed size, many of them.
    "adahessian": ("AdaHessian", {"lr": 0.1, "maxiter": 500}),
}
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
        """How far from the minimum it ended."""
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
        1, 2, figsize=(12.5, 5.8), width_ratios=(1.25, 1), layout="constrained"
    )
    draw_contours(left, torch.cat([run.path for run in runs]))
    styles = {label: line_style(i) for i, label in enumerate(dict.fromkeys(r.label for r in runs))}
    for run in runs:
        exact = run.gradient == "exact"
        look = styles[run.label] | {"linestyle": "-" if exact else ":", "linewidth": 1.6}
        if exact or not any(r.label == run.label and r.gradient == "exact" for r in runs):
            x, y = run.path.T
            left.plot(x, y, marker="o", markersize=3.5, label=run.label, **look)
        # Rounding can make the last value zero, which a logarithmic axis cannot show.
        shown = [max(value, 1e-32) for value in run.values]
        right.plot(range(len(shown)), shown, **look)
    left.plot(*MINIMUM, marker="*", markersize=15, color="black", zorder=10)
    style_axes(right, xlabel="iterations", ylabel="value", yscale="log")
    right.set(title="exact gradients solid, differences dotted", xlim=(0, longest(runs)))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def longest(runs: Sequence[Descent]) -> int:
    """Iterations to show: those of all but methods with very many."""
    counts = sorted(run.result.nit for run in runs)
    return min(counts[-1], 3 * counts[len(counts) // 2])


def draw_contours(axes: Any, points: Tensor) -> None:
    """Draws contour lines of the function around points, denser where it is low."""
    (left, bottom), (right, top) = points.amin(0).tolist(), points.amax(0).tolist()
    margin = 0.08 * max(right - left, top - bottom)
    x = torch.linspace(left - margin, right + margin, 300, dtype=torch.float64)
    y = torch.linspace(bottom - margin, top + margin, 300, dtype=torch.float64)
    values = rosenbrock(torch.cartesian_prod(x, y)).reshape(300, 300).T
    levels = [10.0 ** (k / 2) for k in range(-4, 1 + math.ceil(2 * math.log10(values.max())))]
    axes.contour(x, y, values, levels=levels, colors="0.75", linewidths=0.8)
    style_axes(axes, xlabel="x", ylabel="y")
    axes.grid(visible=False)
    axes.set(title="paths over the contours of Rosenbrock's function")


def main() -> None:
    """Runs all methods, then prints the table and saves the picture."""
    arguments = parse_arguments()
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
        raise argparse.ArgumentTypeError(f"{text} is not two numbers such as -1.2,1")
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
