"""Fits the curves of NIST's reference problems, and counts correct digits beside SciPy's.

Each of the 27 problems has certified parameters, standard errors and sums of squares, and two
starting points: one far from the solution, one close to it. `curve_fit` runs on all of them with
its defaults. SciPy's `least_squares` runs on the same functions, with its two methods in their
defaults, where SciPy is installed; the better of its results is shown. The picture has some of the
curves with the uncertainty that the covariance gives them.

    python examples/curve_fitting.py
    python examples/curve_fitting.py --problems ENSO,Gauss3,MGH17 --out fits.pdf
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torch_secondorder
from _command_line import names_among, output_file
from _nist import Problem, digits, load_problems
from _report import COLOURS, format_table, pyplot, style_axes

# Curves in the picture; others take their places if none of these is chosen.
SHOWN = ("BoxBOD", "Chwirut2", "ENSO", "Gauss3", "MGH09", "Rat43")


@dataclass(frozen=True)
class Fit:
    """A fit, and how right it is.

    Attributes:
        parameters: Correct digits of the worst parameter.
        squares: Those of the sum of squares.
        errors: Those of the worst standard error; None if there are none.
        evaluations: Evaluations of the residuals, without those of finite differences.
        jacobians: Jacobians.
        covariance: That of the parameters; None if it was not estimated.
        solution: The parameters.
    """

    parameters: float
    squares: float
    errors: float | None
    evaluations: int
    jacobians: int
    solution: Tensor
    covariance: Tensor | None = None


def fit(problem: Problem, start: Tensor) -> Fit | None:
    """The fit by `curve_fit`; None if it has not converged."""
    try:
        found, covariance, result = torch_secondorder.curve_fit(
            problem.model, problem.x, problem.y, start, full_output=True
        )
    except RuntimeError:
        return None
    return Fit(
        digits(found, problem.certified),
        digits(2.0 * result.cost, problem.residual_sum_of_squares),
        digits(covariance.diagonal().sqrt(), problem.standard_deviations),
        result.nfev,
        result.njev,
        found,
        covariance,
    )


def fit_by_scipy(problem: Problem, start: Tensor) -> Fit | None:
    """The better of the fits by SciPy's two methods for problems without bounds; None if none is.

    Raises:
        ImportError: SciPy is not installed.
    """
    from scipy.optimize import least_squares

    def residuals(b: Any) -> Any:
        return problem.residuals(torch.as_tensor(b)).numpy()

    def jacobian(b: Any) -> Any:  # its count tells how many "lm" has taken, which keeps none itself
        nonlocal count
        count += 1
        return torch.func.jacrev(problem.residuals)(torch.as_tensor(b)).numpy()

    fits = []
    for method in ("trf", "lm"):
        try:
            result = least_squares(residuals, start.numpy(), method=method)
        except ValueError:  # "lm" lets residuals become infinite
            continue
        count = result.njev
        if count is None:
            count = 0
            least_squares(residuals, start.numpy(), jac=jacobian, method=method)
        fits.append(
            Fit(
                digits(torch.as_tensor(result.x), problem.certified),
                digits(2.0 * result.cost, problem.residual_sum_of_squares),
                None,
                result.nfev,
                count,
                torch.as_tensor(result.x),
            )
        )
    return max(fits, key=lambda fit: (min(fit.parameters, 6.0), -fit.jacobians), default=None)


def print_table(
    problems: Mapping[str, Problem],
    ours: Mapping[tuple[str, int], Fit | None],
    theirs: Mapping[tuple[str, int], Fit | None],
) -> None:
    """Prints one row for each fit."""
    header = ["problem", "level", "start", "data", "parameters", "digits", "of squares"]
    header += ["of errors", "evaluations", "Jacobians"]
    if theirs:
        header += ["SciPy: digits", "of squares", "Jacobians"]
    rows = []
    for (name, number), found in ours.items():
        problem = problems[name]
        row = [name, problem.level, str(number), str(len(problem.y)), str(len(problem.certified))]
        row += _cells(found)
        if theirs:
            digits_, squares, _, _, jacobians = _cells(theirs[name, number])
            row += [digits_, squares, jacobians]
        rows.append(row)
    print(format_table(header, rows))


def _cells(found: Fit | None) -> list[str]:
    if found is None:
        return ["failed", "", "", "", ""]
    errors = "" if found.errors is None else f"{found.errors:.1f}"
    return [
        f"{found.parameters:.1f}",
        f"{found.squares:.1f}",
        errors,
        str(found.evaluations),
        str(found.jacobians),
    ]


def print_summary(
    ours: Mapping[tuple[str, int], Fit | None], theirs: Mapping[tuple[str, int], Fit | None]
) -> None:
    """Prints how many fits are right, and the ratio of the Jacobians."""
    right = [f for f in ours.values() if f is not None and f.parameters >= 6.0]
    print(f"six digits of all parameters: {len(right)} of {len(ours)} fits")
    if not theirs:
        print("SciPy is not installed: no comparison")
        return
    theirs_right = sum(f is not None and f.parameters >= 6.0 for f in theirs.values())
    pairs = [(ours[key], theirs[key]) for key in ours]
    both = [
        (a.jacobians, b.jacobians)
        for a, b in pairs
        if a is not None and b is not None and min(a.parameters, b.parameters) >= 1.0
    ]
    print(f"by SciPy, the better of trf and lm: {theirs_right} of {len(ours)}")
    if both:
        ratio = math.exp(sum(math.log(a / b) for a, b in both) / len(both))
        sums = [sum(column) for column in zip(*both, strict=True)]
        print(
            f"Jacobians where both have a correct digit: {sums[0]} against {sums[1]}, "
            f"geometric mean of the ratios {ratio:.2f}"
        )


def plot(problems: Sequence[Problem], fits: Sequence[Fit], path: Path) -> None:
    """Draws data, curves, and bands of two standard errors of the curve."""
    plt = pyplot()
    columns = min(3, len(problems))
    rows = -(-len(problems) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 3.4 * rows), layout="constrained", squeeze=False
    )
    for ax in axes.flat[len(problems) :]:
        ax.set_visible(False)
    for ax, problem, found in zip(axes.flat, problems, fits, strict=False):
        assert found.covariance is not None
        x = torch.linspace(problem.x.min(), problem.x.max(), 300, dtype=torch.float64)
        curve, error = curve_with_error(problem, x, found)
        ax.plot(problem.x, problem.y, ".", color="0.45", ms=4, label="data")
        ax.plot(x, curve, color=COLOURS[0], label="curve")
        band = {"color": COLOURS[1], "alpha": 0.35, "lw": 0}
        ax.fill_between(
            x, curve - 2 * error, curve + 2 * error, label="two standard errors", **band
        )
        style_axes(ax, xlabel="x", ylabel="y")
        ax.set_title(f"{problem.name}: {len(problem.certified)} parameters", fontsize=10)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def curve_with_error(problem: Problem, x: Tensor, found: Fit) -> tuple[Tensor, Tensor]:
    """A fitted curve at some points, and its standard error by the covariance."""
    assert found.covariance is not None

    def curve(b: Tensor) -> Tensor:
        return problem.model(x, *b)

    slopes = torch.func.jacrev(curve)(found.solution)
    variance = ((slopes @ found.covariance) * slopes).sum(1)
    return curve(found.solution), variance.clamp(min=0.0).sqrt()


def main() -> None:
    """Fits all problems from both starts, prints the table and saves the picture."""
    arguments = parse_arguments()
    warnings.simplefilter("ignore", RuntimeWarning)  # overflows in SciPy's trials
    begun = time.perf_counter()
    everything = load_problems()
    problems = {name: everything[name] for name in arguments.problems}
    ours = {
        (name, number): fit(problem, start)
        for name, problem in problems.items()
        for number, start in enumerate(problem.starts, 1)
    }
    seconds = time.perf_counter() - begun
    theirs: dict[tuple[str, int], Fit | None] = {}
    try:
        for name, number in ours:
            start = problems[name].starts[number - 1]
            theirs[name, number] = fit_by_scipy(problems[name], start)
    except ImportError:
        theirs = {}
    print("Digits that agree with NIST's certified values, at most the eleven that these have")
    print_table(problems, ours, theirs)
    print_summary(ours, theirs)
    print(f"{len(ours)} fits in {seconds:.1f} seconds")
    wanted = [name for name in SHOWN if name in problems] or list(problems)
    drawn = [(problems[n], f) for n in wanted if (f := ours[n, 2] or ours[n, 1]) is not None]
    drawn = [(p, f) for p, f in drawn if p.x.dim() == 1][:6]
    if drawn:
        plot([p for p, _ in drawn], [f for _, f in drawn], arguments.out)
        print(f"plot: {arguments.out}")


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; mistakes are reported before any work is done."""
    parser = argparse.ArgumentParser(description="Fit the curves of NIST's reference problems.")
    known = list(load_problems())
    parser.add_argument(
        "--problems",
        type=names_among(known, "problem"),
        default=known,
        metavar="A,B,...",
        help=f"any of {', '.join(known)}; default: all",
    )
    out = "curve_fitting.png"
    parser.add_argument(
        "--out", type=output_file, default=out, help=f"file of the picture; default: {out}"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
