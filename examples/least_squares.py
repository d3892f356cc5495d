"""Fits a polynomial to noisy data by linear least squares, in five ways, and compares them.

The powers of x are nearly dependent, so the problem is ill-conditioned. The pseudoinverse solves it
exactly, noise included: its coefficients are large. The gradient iteration with exact steps,
`g'g / g'A'A g`, hardly moves along the weak directions. LSQR and LSMR take the same products, and
are done after some thirty iterations. A bound on the norm of the coefficients makes the fit
insensitive to the noise; its multiplier is the penalty of the ridge regression with the same
result.

    python examples/least_squares.py
    python examples/least_squares.py --radii 1,2,4,8,16 --iterations 10000
    python examples/least_squares.py --samples 10 --degree 20   # more unknowns than data
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from _command_line import output_file, positive
from _report import format_table, line_style, pyplot, style_axes
from torch_secondorder.linear import lsmr, lsqr, lstsq, norm_constrained, ridge

TOLERANCE = 1e-8


@dataclass(frozen=True)
class Problem:
    """A polynomial to fit.

    Attributes:
        x: The points, shape `(m,)`.
        A: Their powers, `(m, n)`.
        b: The noisy values, `(m,)`.
    """

    x: Tensor
    A: Tensor
    b: Tensor

    def error(self, coefficients: Tensor) -> float:
        """The root mean square of the distance to the true function, on a fine grid."""
        grid = torch.linspace(-1, 1, 501, dtype=torch.float64)
        distance = powers(grid, len(coefficients) - 1) @ coefficients - truth(grid)
        return distance.square().mean().sqrt().item()


@dataclass(frozen=True)
class Fit:
    """The result of one method.

    Attributes:
        label: The method, as shown.
        x: The coefficients.
        iterations: What it took, in words.
        multiplier: That of the bound on the norm; None without a bound.
    """

    label: str
    x: Tensor
    iterations: str = "direct"
    multiplier: float | None = None


def truth(x: Tensor) -> Tensor:
    """The function behind the data."""
    return torch.sin(3 * x) / (1 + x.square())


def powers(x: Tensor, degree: int) -> Tensor:
    """The powers of points from 0 to a degree, shape `(m, degree + 1)`."""
    return x[:, None] ** torch.arange(degree + 1)


def make_problem(samples: int, degree: int, noise: float, seed: int) -> Problem:
    """Evenly spaced points, with random noise on the values."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.linspace(-1, 1, samples, dtype=torch.float64)
    b = truth(x) + noise * torch.randn(samples, dtype=torch.float64, generator=generator)
    return Problem(x, powers(x, degree), b)


def gradient_iteration(A: Tensor, b: Tensor, most: int) -> tuple[Tensor, list[float]]:
    """Minimizes `|A x - b|^2 / 2` from zero along its gradients `g`, by exact line searches.

    Along `-g` the function is lowest at the step `g'g / g'A'A g`.

    Returns:
        The last point, and the norms of the gradients at all points.
    """
    x = A.new_zeros(A.shape[1])
    g = A.T @ (A @ x - b)
    norms = [g.norm().item()]
    while len(norms) <= most and norms[-1] > TOLERANCE * norms[0]:
        x = x - (g @ g) / (A @ g).square().sum() * g
        g = A.T @ (A @ x - b)
        norms.append(g.norm().item())
    return x, norms


def krylov_norms(solver: Callable[..., Any], A: Tensor, b: Tensor, most: int) -> list[float]:
    """The norms of the gradients at the iterates of `lsqr` or `lsmr`."""
    runs = [solver(A, b, 0.0, 0.0, 0.0, 0.0, k) for k in range(1, most + 1)]
    return [(A.T @ b).norm().item(), *(run.normal_residual_norm for run in runs)]


def compare(
    problem: Problem, radii: Sequence[float], most: int
) -> tuple[list[Fit], dict[str, list[float]]]:
    """Runs all methods; returns their results, and the gradients along those that iterate."""
    A, b = problem.A, problem.b
    exact = lstsq(A, b)
    fits = [Fit(f"pseudoinverse, rank {exact.rank}", exact.x)]
    x, norms = gradient_iteration(A, b, most)
    fits.append(Fit("gradient iteration", x, f"{len(norms) - 1:,}"))
    gradients = {"gradient iteration": norms}
    for name, solver in (("LSQR", lsqr), ("LSMR", lsmr)):
        result = solver(A, b, atol=TOLERANCE, btol=TOLERANCE, conlim=0.0, max_iterations=most)
        fits.append(Fit(name, result.x, f"{result.iterations:,}"))
        gradients[name] = krylov_norms(solver, A, b, result.iterations)
    bounded = norm_constrained(A, b, torch.tensor(radii, dtype=A.dtype))
    for k, radius in enumerate(radii):
        multiplier = bounded.multiplier[k].item()
        fits.append(Fit(f"|x| <= {radius:g}", bounded.x[:, k], "direct", multiplier))
    return fits, gradients


def print_table(problem: Problem, fits: Sequence[Fit]) -> None:
    """Prints one row for each method."""
    A, b = problem.A, problem.b
    header = ["method", "iterations", "|Ax - b|", "gradient", "|x|", "multiplier", "error"]
    rows = []
    for fit in fits:
        r = A @ fit.x - b
        # Of the function with its multiplier: at a solution it is zero.
        gradient = A.T @ r + (fit.multiplier or 0.0) * fit.x
        rows.append(
            [
                fit.label,
                fit.iterations,
                f"{r.norm().item():.5f}",
                f"{gradient.norm().item():.1e}",
                f"{fit.x.norm().item():.4g}",
                "" if fit.multiplier is None else f"{fit.multiplier:.3g}",
                f"{problem.error(fit.x):.4f}",
            ]
        )
    print(format_table(header, rows))


def plot(
    problem: Problem, fits: Sequence[Fit], gradients: dict[str, list[float]], path: Path
) -> None:
    """Draws the convergence, the norm against the multiplier, and the fitted functions."""
    plt = pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 4.8), layout="constrained")
    for i, (label, norms) in enumerate(gradients.items()):
        left.plot(range(1, len(norms) + 1), norms, label=label, **line_style(i))
    style_axes(left, xlabel="iterations + 1", ylabel="norm of the gradient", xscale="log")
    left.set(yscale="log", title="convergence")
    left.legend(frameon=False)
    draw_norms(middle, problem, fits)
    grid = torch.linspace(-1, 1, 501, dtype=torch.float64)
    right.plot(problem.x, problem.b, "o", color="0.6", ms=4, label="data")
    right.plot(grid, truth(grid), color="black", lw=1, label="truth")
    chosen = [fits[0], *(fit for fit in fits if fit.multiplier is not None)]
    for i, fit in enumerate(chosen):
        values = powers(grid, len(fit.x) - 1) @ fit.x
        right.plot(grid, values, label=fit.label, **line_style(i))
    low, high = problem.b.min().item(), problem.b.max().item()
    margin = 0.3 * (high - low)
    style_axes(right, xlabel="x", title="fits")
    right.set(ylim=(low - margin, high + margin))
    right.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_norms(axes: Any, problem: Problem, fits: Sequence[Fit]) -> None:
    """Draws `|x|` along the path of multipliers, with the bounds."""
    penalties = torch.logspace(-10, 4, 200, dtype=torch.float64)
    axes.plot(penalties, ridge(problem.A, problem.b, penalties).norm, **line_style(0))
    axes.axhline(fits[0].x.norm().item(), color="0.5", lw=1)
    for i, fit in enumerate((fit for fit in fits if fit.multiplier), start=1):
        style = line_style(i) | {"linestyle": "", "marker": "o"}
        axes.plot([fit.multiplier], [fit.x.norm().item()], label=fit.label, **style)
    style_axes(axes, xlabel="multiplier", ylabel="|x|", xscale="log", yscale="log")
    axes.set(title="norm of the solution; that of the pseudoinverse in gray")
    axes.legend(frameon=False)


def main() -> None:
    """Runs all methods, then prints the table and saves the picture."""
    arguments = parse_arguments()
    problem = make_problem(arguments.samples, arguments.degree, arguments.noise, arguments.seed)
    m, n = problem.A.shape
    condition = lstsq(problem.A, problem.b).condition
    print(f"{m} samples, {n} coefficients, condition {condition:.1e}, noise {arguments.noise:g}")
    fits, gradients = compare(problem, arguments.radii, arguments.iterations)
    print_table(problem, fits)
    plot(problem, fits, gradients, arguments.out)
    print(f"plot: {arguments.out}")


def radii(text: str) -> list[float]:
    """Parses comma-separated positive numbers."""
    return [positive(float)(part) for part in text.split(",")]


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; mistakes are reported before any work is done."""
    parser = argparse.ArgumentParser(description="Fit a polynomial by linear least squares.")
    add = parser.add_argument
    add("--samples", type=positive(int), default=15, help="number of data; default: 15")
    add("--degree", type=positive(int), default=11, help="of the polynomial; default: 11")
    add("--noise", type=positive(float), default=0.2, help="its standard deviation; default: 0.2")
    add("--radii", type=radii, default=[2.0, 8.0], metavar="R,R,...", help="default: 2,8")
    steps = "most steps of the gradient iteration; default: 1,000"
    add("--iterations", type=positive(int), default=1000, help=steps)
    add("--seed", type=int, default=0, help="random seed; default: 0")
    out = "least_squares.png"
    add("--out", type=output_file, default=out, help=f"file of the picture; default: {out}")
    return parser.parse_args()


if __name__ == "__main__":
    main()
