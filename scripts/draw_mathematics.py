"""Draws the pictures of docs/mathematics, one for a page, from the numbers of the page's own code.

python scripts/draw_mathematics.py                 # all, into docs/images/mathematics
python scripts/draw_mathematics.py taylor newton   # only these
python scripts/draw_mathematics.py --format png --output /tmp
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch

mpl.use("Agg")

import matplotlib.pyplot as plt
from torch import Tensor
from torch.func import grad, jacrev

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "mathematics"
sys.path.insert(1, str(ROOT))  # the checkout may not be installed

from torch_secondorder import BFGS  # noqa: E402
from torch_secondorder.diagnostics import second_order_model  # noqa: E402

# Okabe and Ito's palette, for any colour vision. Figures have a white ground of their own, so that
# they can be read on light and dark pages alike.
BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#767676"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "torch_secondorder",
}

Page = dict[str, Any]
FIGURES: dict[str, Callable[[Page], Any]] = {}


def picture(draw: Callable[[Page], Any]) -> Callable[[Page], Any]:
    """Registers the function that draws the picture of the page with its name."""
    FIGURES[draw.__name__] = draw
    return draw


def names_of(page: str) -> Page:
    """The names that the code of a page defines, once it has run."""
    spec = importlib.util.spec_from_file_location(
        "documented", ROOT / "tests" / "support" / "documented.py"
    )
    assert spec is not None
    assert spec.loader is not None
    documented = importlib.util.module_from_spec(spec)
    sys.modules["documented"] = documented
    spec.loader.exec_module(documented)
    names: Page = {}
    documented.run_page(PAGES / f"{page}.md", names)
    return names


def ellipse(matrix: Tensor, level: float = 1.0, points: int = 90) -> np.ndarray[Any, Any]:
    """Points with `d'M d = level`, shape `(2, points)`."""
    angles = torch.linspace(0, 2 * torch.pi, points)
    values, vectors = torch.linalg.eigh(matrix)
    circle = torch.stack([angles.cos(), angles.sin()])
    found: np.ndarray[Any, Any] = (vectors @ (circle * (level / values[:, None]).sqrt())).numpy()
    return found


def arrow(axes: Any, start: Any, end: Any, colour: str) -> None:
    """An arrow between two points."""
    style = {"arrowstyle": "-|>", "color": colour, "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=tuple(map(float, end)), xytext=tuple(map(float, start)), arrowprops=style)


def plain(axes: Any, title: str) -> None:
    """Axes of equal units, without numbers."""
    axes.set(aspect="equal", xticks=[], yticks=[], title=title)
    axes.spines[:].set_visible(False)


@picture
def jacobian(page: Page) -> Any:
    """Errors of one column by finite differences against the step."""
    torch.manual_seed(0)
    f, x = page["smooth"], page["x"]
    exact = jacrev(f)(x)[:, 0]
    steps = torch.logspace(-12, 0, 49)
    figure, axes = plt.subplots(figsize=(6.2, 3.2))
    for dtype, style in ((torch.float64, "-"), (torch.float32, "--")):
        f.to(dtype)
        for central, colour in ((False, RED), (True, BLUE)):
            found = []
            for h in steps:
                e = torch.zeros_like(x)
                e[0] = h
                up, here, down = (f(p.to(dtype)).double() for p in (x + e, x, x - e))
                column = (up - down) / 2 / h if central else (up - here) / h
                found.append(((column - exact).norm() / exact.norm()).item())
            name = f"{'central' if central else 'forward'}, {str(dtype)[6:]}"
            axes.loglog(steps, found, style, color=colour, label=name)
    f.double()
    axes.set(xlabel="step $h$", ylabel="relative error", ylim=(1e-12, 1e2))
    axes.legend(loc="lower left", ncols=1)
    return figure


@picture
def hessian(page: Page) -> Any:
    """The Hessian of a network and its two parts, before and after training."""
    figure, all_axes = plt.subplots(2, 3, figsize=(6.0, 4.2))
    for row, (state, (H, G)) in zip(
        all_axes, (("at the start", page["untrained"]), ("trained", page["trained"])), strict=True
    ):
        limit = H.abs().max().item()
        for axes, matrix, name in zip(
            row, (H, G, H - G), ("Hessian", "Gauss-Newton", "rest"), strict=True
        ):
            # Square roots, so that small entries can be seen.
            shown = matrix.sign() * (matrix.abs() / limit).sqrt()
            axes.imshow(shown, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[], title=name if state == "at the start" else "")
            axes.grid(visible=False)
        row[0].set_ylabel(state)
    return figure


@picture
def taylor(page: Page) -> Any:
    """Stationary points of a cubic, and the model along the gradient of another function."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.4, 3.4))
    grid = torch.linspace(-1.9, 1.9, 41)
    values = (grid**3 - 3 * grid)[:, None] + (grid**3 - 3 * grid)
    levels = np.arange(-3.6, 3.7, 0.9)
    left.contour(grid, grid, values.T, levels=levels, colors="0.75", linewidths=0.8, linestyles="-")
    places = {(1, 1): ("minimum", GREEN), (-1, -1): ("maximum", RED)}
    places |= {(1, -1): ("saddle", BLUE), (-1, 1): ("saddle", BLUE)}
    for (a, b), (name, colour) in places.items():
        left.plot(a, b, "o", color=colour, ms=6)
        left.annotate(name, (a, b), (5, 5), textcoords="offset points", color=colour)
        for axis, sign in ((0, a), (1, b)):
            for way in (-0.55, 0.55) if sign < 0 else ():
                end = [a, b]
                end[axis] += way
                arrow(left, (a, b), end, colour)
    left.set(aspect="equal", xlabel="x", ylabel="y", title="$x^3 - 3x + y^3 - 3y$")
    left.grid(visible=False)

    f, x = page["rosenbrock"], page["x"]
    model = second_order_model(page["FunctionalObjective"](f, x))
    times = torch.linspace(0, 2.2 * model.step, 60)
    right.plot(times, [f(x + t * model.direction) for t in times], color=BLUE, label="function")
    right.plot(times, [model(t) for t in times.tolist()], "--", color=RED, label="model")
    right.plot(model.step, model(model.step), "o", color=RED)
    right.annotate(
        "best step of\nthe model", (model.step, model(model.step)), (0, 12),
        textcoords="offset points", ha="center", va="bottom", color=RED,
    )  # fmt: skip
    right.set(xlabel="step $t$ along $-g$", title="Rosenbrock's function at (-1.2, 1)")
    right.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    right.legend(loc="upper center")
    return figure


@picture
def newton(page: Page) -> Any:
    """Gradient norms of gradient descent, BFGS and Newton's method by iteration."""
    f, start = page["f"], 0.3 * torch.ones(10)
    gradient, hessian_at = grad(f), page["hessian_at"]
    runs: dict[str, list[float]] = {"gradient, best step": [], "BFGS": [], "Newton": []}
    x = start
    for _ in range(40):
        g = gradient(x)
        runs["gradient, best step"].append(g.norm().item())
        x = x - (g @ g) / (g @ hessian_at(f, x) @ g) * g
    x = start
    for _ in range(8):
        runs["Newton"].append(gradient(x).norm().item())
        x = x - torch.linalg.solve(hessian_at(f, x), gradient(x))
    point = start.clone().requires_grad_()
    optimizer = BFGS([point], max_iter=1, tolerance_grad=0.0, tolerance_change=0.0)
    for _ in range(40):
        runs["BFGS"].append(gradient(point.detach()).norm().item())
        optimizer.step(lambda: f(point))
    figure, axes = plt.subplots(figsize=(6.2, 3.0))
    for (name, norms), colour, marker in zip(runs.items(), (GREY, BLUE, RED), ".sv", strict=True):
        kept = [norm for norm in norms if norm > 1e-15]
        axes.semilogy(kept, color=colour, marker=marker, ms=4, label=name)
    axes.set(xlabel="iteration", ylabel="$|g|$", ylim=(1e-15, None))
    axes.legend()
    return figure


@picture
def convexity(page: Page) -> Any:
    """The loss of a network between two equal solutions, and a convex loss between two points."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.0, 2.8))
    shares = torch.linspace(-0.15, 1.15, 80)
    found, exchanged, loss_of = page["found"], page["exchanged"], page["loss_of"]

    def between(t: Tensor) -> float:
        mixed = [(1 - t) * a + t * b for a, b in zip(found, exchanged, strict=True)]
        return float(loss_of(mixed))

    left.plot(shares, [between(t) for t in shares], color=RED)
    left.plot([0, 1], [between(torch.tensor(t)) for t in (0.0, 1.0)], "o--", color=GREY)
    left.set(title="network: units exchanged", xlabel="share of the way", ylabel="loss")
    a, b = page["ends"][0]
    right.plot(shares, [page["logistic"]((1 - t) * a + t * b) / 200 for t in shares], color=BLUE)
    right.plot([0, 1], [page["logistic"](p) / 200 for p in (a, b)], "o--", color=GREY)
    right.set(title="logistic regression", xlabel="share of the way")
    return figure


@picture
def information(page: Page) -> Any:
    """Confidence intervals of one parameter for many data sets."""
    count = 60
    theta, errors = page["theta"][:count, 1], page["errors"][:count, 1]
    truth = page["truth"][1].item()
    figure, axes = plt.subplots(figsize=(7.0, 2.6))
    missed = (theta - truth).abs() > 1.96 * errors
    for which, colour, label in ((~missed, BLUE, "covers"), (missed, RED, "misses")):
        axes.errorbar(
            torch.arange(count)[which], theta[which], 1.96 * errors[which],
            fmt="o", ms=2.5, lw=1.2, color=colour, label=label,
        )  # fmt: skip
    axes.axhline(truth, color="black", lw=0.8)
    axes.set(xlabel="data set", ylabel="estimate $\\pm$ 1.96 se", ylim=(None, -0.85))
    axes.legend(loc="upper right", ncols=2)
    return figure


@picture
def quasi_newton(page: Page) -> Any:
    """Unit ellipses of the estimated curvature after each pair, on a quadratic in the plane."""
    A = torch.tensor([[3.0, 1.0], [1.0, 1.0]])
    H, x = torch.eye(2), torch.tensor([1.0, -2.0])
    names = ["no pair", "one pair", "two pairs"]
    figure, all_axes = plt.subplots(1, 3, figsize=(7.0, 2.7))
    for axes, name in zip(all_axes, names, strict=True):
        axes.plot(*ellipse(A), color=GREY, lw=4, alpha=0.5, label="Hessian")
        axes.plot(*ellipse(torch.linalg.inv(H)), color=RED, label="estimate")
        plain(axes, name)
        axes.set(xlim=(-1.6, 1.6), ylim=(-1.75, 1.75))
        g = A @ x
        direction = -H @ g
        if name != names[-1]:
            unit = direction / (direction @ A @ direction).sqrt()  # ends at the Hessian's ellipse
            axes.plot([-unit[0], unit[0]], [-unit[1], unit[1]], ":", color=BLUE, label="next step")
        step = -(g @ direction) / (direction @ A @ direction) * direction
        x, rho = x + step, 1 / (step @ A @ step)
        V = torch.eye(2) - rho * torch.outer(A @ step, step)
        H = V.T @ H @ V + rho * torch.outer(step, step)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


@picture
def conjugate_gradients(page: Page) -> Any:
    """Conjugate directions in coordinates where they are skew, and where they are perpendicular."""
    A = torch.tensor([[1.0, 0.6], [0.6, 0.8]])
    b = torch.zeros(2)
    start = torch.tensor([-2.2, 0.2])
    points, directions, _ = page["conjugate_gradients"](A, b - A @ start, 2)
    points = [start + p for p in points]
    assert abs(directions[0] @ A @ directions[1]) < 1e-10
    L = torch.linalg.cholesky(A)
    gradient_path = [start]
    for _ in range(12):
        x = gradient_path[-1]
        g = A @ x
        gradient_path.append(x - (g @ g) / (g @ A @ g) * g)
    figure, all_axes = plt.subplots(1, 3, figsize=(7.4, 2.8))
    views = (
        (torch.eye(2), A, points, "conjugate gradients, $x$"),
        (L.T, torch.eye(2), points, "the same, $z = L^T x$"),
        (torch.eye(2), A, gradient_path, "steepest descent, $x$"),
    )
    for axes, (view, matrix, path, title) in zip(all_axes, views, strict=True):
        for p in path[:2] if len(path) > 3 else path[:-1]:
            axes.plot(*ellipse(matrix, float(p @ A @ p)), color="0.75", lw=0.8)
        seen = [view @ p for p in path]
        colours = [BLUE, RED] if len(path) == 3 else [GREY] * len(path)
        for k, (a, c, colour) in enumerate(zip(seen, seen[1:], colours, strict=False)):
            if len(path) == 3:
                arrow(axes, a, c, colour)
                middle, offset = (a + c) / 2, ((-2, -14), (4, 4))[k]
                axes.annotate(
                    f"$p_{k}$", tuple(middle.tolist()), offset, textcoords="offset points",
                    color=colour,
                )  # fmt: skip
            else:
                axes.plot([a[0], c[0]], [a[1], c[1]], color=colour, lw=1.2)
        axes.plot(0, 0, "o", color="black", ms=3)
        plain(axes, title)
        axes.margins(0.06)
    return figure


@picture
def learning_rates(page: Page) -> Any:
    """Steps with one rate, and with a rate for each coordinate, on two quadratics."""
    straight = torch.tensor([12.0, 1.0]).diag()
    turn = torch.tensor([[1.0, -1.0], [1.0, 1.0]]) / 2**0.5
    figure, all_axes = plt.subplots(1, 2, figsize=(7.0, 3.1))
    quadratics = ((straight, torch.tensor([0.5, 2.0])), (turn @ straight @ turn.T, None))
    for axes, (H, start) in zip(all_axes, quadratics, strict=True):
        start = turn @ torch.tensor([0.5, 2.0]) if start is None else start
        for level in (1, 4, 9):
            axes.plot(*ellipse(H, float(start @ H @ start) * level / 9), color="0.8", lw=0.8)
        highest = torch.linalg.eigvalsh(H)[-1]
        ways = (
            ("one rate, $1.8 / \\lambda_{\\max}$", 1.8 / highest * torch.ones(2), GREY),
            ("$0.9 / H_{ii}$", 0.9 / H.diagonal(), RED),
        )
        for name, rates, colour in ways:
            path = [start]
            for _ in range(12):
                path.append(path[-1] - rates * (H @ path[-1]))
            x = torch.stack(path)
            axes.plot(x[:, 0], x[:, 1], ".-", color=colour, ms=5, lw=1.2, label=name)
        axes.plot(0, 0, "+", color="black", ms=8)
    plain(all_axes[0], "axes along the coordinates")
    plain(all_axes[1], "turned by 45 degrees")
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


@picture
def kronecker(page: Page) -> Any:
    """A Fisher matrix, its Kronecker product, and the best diagonal in the product's eigenbasis."""
    exact, product = page["F"], torch.kron(page["B"], page["A"])
    improved = page["Q"] * page["S"].flatten() @ page["Q"].T
    limit = exact.abs().max().item()
    figure, all_axes = plt.subplots(1, 3, figsize=(7.0, 2.6))
    titles = "exact", "Kronecker product", "diagonal in its eigenbasis"
    for axes, matrix, title in zip(all_axes, (exact, product, improved), titles, strict=True):
        axes.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        error = ((matrix - exact).norm() / exact.norm()).item()
        axes.set(xticks=[], yticks=[], title=title)
        axes.set_xlabel("" if matrix is exact else f"relative error {error:.2f}")
        axes.grid(visible=False)
    return figure


@picture
def contraction(page: Page) -> Any:
    """Singular values of the encoder's Jacobian, with and without the penalty."""
    figure, axes = plt.subplots(figsize=(5.6, 2.8))
    for name, values, colour, marker in (
        ("plain", page["plain"], GREY, "s"),
        ("contractive", page["contractive"], RED, "o"),
    ):
        values = values.detach()
        axes.semilogy(
            range(1, len(values) + 1), values / values[0], color=colour, marker=marker, ms=4,
            label=name,
        )  # fmt: skip
    axes.set(xlabel="number", ylabel="singular value / largest", ylim=(1e-4, 2))
    axes.legend(loc="lower left")
    return figure


@picture
def least_squares(page: Page) -> Any:
    """Filters of the pseudoinverse with a cutoff, gradient steps, and a bounded norm."""
    sigma = page["sigma"]
    figure, axes = plt.subplots(figsize=(6.2, 2.8))
    axes.semilogx(sigma, (sigma > 1e-3**0.5).double(), "--", color=GREY, label="pseudoinverse")
    axes.semilogx(sigma, page["stopped"], color=BLUE, label="1000 gradient steps")
    axes.semilogx(sigma, page["penalized"], color=RED, label="bounded norm")
    axes.set(xlabel="singular value $\\sigma$ (largest: 1)", ylabel="filter $\\phi$")
    axes.legend(loc="upper left")
    return figure


@picture
def constraints(page: Page) -> Any:
    """Level sets of a quadratic, the unit disk, and both gradients at the solution."""
    A, b, x = page["A"], page["b"], page["secular"].x
    figure, axes = plt.subplots(figsize=(4.2, 3.8))
    center = torch.linalg.lstsq(A, b[:, None]).solution[:, 0]
    here = (x - center) @ A.T @ A @ (x - center)
    for share, look in ((0.35, "0.8"), (1.0, BLUE), (2.2, "0.8")):
        curve = ellipse(A.T @ A, float(here) * share) + center.numpy()[:, None]
        axes.plot(*curve, color=look, lw=1.6 if share == 1.0 else 0.8)
    disk = ellipse(torch.eye(2, dtype=torch.float64))
    axes.fill(*disk, color="0.93", zorder=0)
    axes.plot(*disk, color="black", lw=1)
    slope = A.T @ (A @ x - b)
    arrow(axes, x, x - 0.45 * slope, RED)
    arrow(axes, x, x + 0.22 * 2 * x, GREEN)
    axes.plot(*x, "o", color="black", ms=4)
    axes.plot(*center, "+", color="black", ms=8)
    beside = {"textcoords": "offset points"}
    axes.annotate("$-\\nabla f$", (x - 0.45 * slope).tolist(), (4, 0), color=RED, **beside)
    axes.annotate("$\\nabla g$", (1.44 * x).tolist(), (6, -14), color=GREEN, **beside)
    axes.annotate("$|x| \\leq 1$", (-0.35, -0.4), color="0.35")
    plain(axes, "")
    axes.set(xlim=(-1.2, 2.0), ylim=(-1.2, 2.6))
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws the pictures of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("pages", nargs="*", metavar="PAGE", help=f"of {', '.join(FIGURES)}")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "mathematics")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    given = parser.parse_args(arguments)
    unknown = set(given.pages) - set(FIGURES)
    if unknown:
        parser.error(f"no picture for {', '.join(sorted(unknown))}; there are {', '.join(FIGURES)}")
    given.output.mkdir(parents=True, exist_ok=True)
    default = torch.get_default_dtype()
    for name in given.pages or FIGURES:
        try:
            with mpl.rc_context(STYLE):
                figure = FIGURES[name](names_of(name))
                metadata = {"Date": None} if given.format == "svg" else None
                path = given.output / f"{name}.{given.format}"
                figure.savefig(path, dpi=150, metadata=metadata)
                plt.close(figure)
        finally:
            torch.set_default_dtype(default)
        print(f"{path}  {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
