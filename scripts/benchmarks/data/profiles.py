"""Performance profiles of solvers on sets of problems (Dolan and Moré, 2002).

The profile of a solver is the share of problems that it solves at no more than tau times the cost
of the solver that is cheapest there, as a function of tau. The costs are figures of a release, so a
profile can be drawn again from its files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .documents import label
from .figures import Figures, Record, slug
from .svg import Line, Panel, plot

Costs = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Set:
    """Problems, and solvers that are compared on them.

    Attributes:
        name: The name of the plot.
        title: A heading.
        text: What is counted; `{count}` is the number of problems.
        prefix: The beginning of the names of the figures, before the problem.
        command: The command that measures them.
        solvers: Names for readers by the names in the results, this package's first.
        ours: How many of them are this package's.
        costs: Titles of the costs by the last part of the figures' names.
    """

    name: str
    title: str
    text: str
    prefix: str
    command: str
    solvers: Mapping[str, str]
    ours: int
    costs: Mapping[str, str]


SETS = (
    Set(
        "unconstrained",
        "Smooth functions, with gradients",
        "{count} classical functions of 2 to 200 unknowns, to a gradient of 1e-6.",
        "minimize.exact",
        "python scripts/bench.py minimize --part exact",
        {
            "lbfgs": "LBFGS",
            "bfgs": "BFGS",
            "cg": "NonlinearCG",
            "torch.optim.LBFGS": "torch.optim.LBFGS",
            "scipy L-BFGS-B": "SciPy L-BFGS-B",
            "scipy BFGS": "SciPy BFGS",
            "scipy CG": "SciPy CG",
            "torchmin bfgs": "torchmin BFGS",
            "torchmin l-bfgs": "torchmin L-BFGS",
            "torchmin cg": "torchmin CG",
            "optimistix BFGS": "optimistix BFGS",
        },
        3,
        {"evaluations": "evaluations", "time": "time"},
    ),
    Set(
        "lbfgs",
        "Implementations of L-BFGS",
        "The {count} classical functions, with up to 20,000 evaluations.",
        "lbfgs.problems",
        "python scripts/bench.py lbfgs --part problems",
        {
            "ours": "LBFGS",
            "torch h=100": "torch.optim.LBFGS",
            "torch h=20": "torch.optim.LBFGS, history 20",
            "scipy m=10": "SciPy L-BFGS-B, m = 10",
            "scipy m=20": "SciPy L-BFGS-B, m = 20",
        },
        1,
        {"evaluations": "evaluations", "timing": "time"},
    ),
    Set(
        "hessians",
        "Smooth functions, with Hessians",
        "The classical functions. Each iteration has a Hessian. `Newton` tries a rejected "
        "step again within its iteration, while the others count it as another one, so compare "
        "evaluations as well.",
        "newton.exact",
        "python scripts/bench.py newton --part exact",
        {
            "Newton": "Newton",
            "scipy trust-exact": "SciPy trust-exact",
            "torchmin newton-exact": "torchmin newton-exact",
            "torchmin trust-exact": "torchmin trust-exact",
        },
        1,
        {"iterations": "iterations", "evaluations": "evaluations", "seconds": "time"},
    ),
    Set(
        "bounded",
        "Bounds",
        "{count} problems with bounds, to a projected gradient of 1e-6.",
        "bounds",
        "python scripts/bench.py quasi_newton --part bounds",
        {
            "LBFGS (ours)": "LBFGS",
            "BFGS (ours)": "BFGS",
            "scipy L-BFGS-B": "SciPy L-BFGS-B",
            "torch.optim.LBFGS, clamped": "torch.optim.LBFGS, clamped",
        },
        2,
        {"evaluations": "evaluations", "time": "time"},
    ),
    Set(
        "constrained",
        "Constraints",
        "{count} problems of Hock and Schittkowski, evaluations to the first optimum; the time is "
        "that of the whole run, where its end is one.",
        "constraints.problems",
        "python scripts/bench.py constraints --part problems",
        {
            "LBFGS (ours)": "Constrained(LBFGS)",
            "BFGS (ours)": "Constrained(BFGS)",
            "SLSQP 1e-12": "SciPy SLSQP, 1e-12",
            "SLSQP": "SciPy SLSQP",
            "trust-constr": "SciPy trust-constr",
            "IPOPT": "IPOPT, limited memory",
            "nlopt SLSQP": "NLopt SLSQP",
            "torch LBFGS, AL": "torch.optim.LBFGS, by hand",
            "cooper, Adam": "cooper with Adam",
        },
        2,
        {"reached": "evaluations", "time": "time"},
    ),
    Set(
        "residuals",
        "Least squares, classical",
        "{count} problems of Moré, Garbow and Hillstrom; a problem is solved with 5.5 digits of "
        "the sum of squares.",
        "residuals.problems",
        "python scripts/bench.py residuals --part problems",
        {
            "ours": "least_squares",
            "scipy lm": "SciPy lm",
            "scipy trf": "SciPy trf",
            "torch-lm": "torch-levenberg-marquardt",
            "optimistix": "optimistix",
        },
        1,
        {"evaluations": "evaluations", "time": "time"},
    ),
    Set(
        "nist",
        "Least squares, NIST",
        "{count} fits: NIST's nonlinear regressions from both starts; a fit is solved with 5.5 "
        "digits of all parameters.",
        "residuals.nist",
        "python scripts/bench.py residuals --part nist",
        {
            "ours": "least_squares",
            "scipy lm": "SciPy lm",
            "scipy trf": "SciPy trf",
            "torch-lm": "torch-levenberg-marquardt",
            "optimistix": "optimistix",
        },
        1,
        {"evaluations": "evaluations", "time": "time"},
    ),
)


def costs(record: Record, group: Set, cost: str) -> Costs:
    """The cost of each solver on each problem that it solves, by problem and solver.

    Problems are there with no solver if nobody solves them.
    """
    known = {slug(name): shown for name, shown in group.solvers.items()}
    table: Costs = {}
    shape = re.compile(rf"{re.escape(group.prefix)}\.([^.]+)\.(.+)\.(\w+)")
    for name in record.figures:
        match = shape.fullmatch(name)
        if not match or match[1] == "ratios" or match[2] not in known or match[3] != "evaluations":
            continue
        problem, solver = match[1], match[2]
        rows = table.setdefault(problem, {})
        stem = f"{group.prefix}.{problem}.{solver}"
        value, solved = (record.figures.get(f"{stem}.{key}") for key in (cost, "solved"))
        wanted = cost == "reached" or (solved is not None and solved.value)
        if wanted and value is not None and value.value > 0:
            rows[known[solver]] = value.value
    return table


def profile(table: Costs, solver: str) -> list[tuple[float, float]]:
    """The steps of a solver's profile: factors of the best cost, and shares of problems."""
    factors = sorted(rows[solver] / min(rows.values()) for rows in table.values() if solver in rows)
    points = {1.0: 0.0}
    for count, factor in enumerate(factors, start=1):
        points[max(factor, 1.0)] = count / len(table)
    return list(points.items())


def share(table: Costs, solver: str, factor: float) -> float:
    """The share of problems that a solver solves within a factor of the best cost."""
    return max(y for x, y in profile(table, solver) if x <= factor)


def find(figures: Figures, group: Set) -> Record | None:
    """The newest record of a set, or None."""
    solved = re.compile(rf"{re.escape(group.prefix)}\.(?!ratios\.)[^.]+\..+\.solved")
    for record in figures.records:
        if any(solved.fullmatch(name) for name in record.figures):
            return record
    return None


def tables(figures: Figures, group: Set) -> dict[str, Costs]:
    """The costs of a set by the titles of what is counted; without what was not measured."""
    record = find(figures, group)
    if record is None:
        return {}
    found = {title: costs(record, group, key) for key, title in group.costs.items()}
    return {title: table for title, table in found.items() if any(table.values())}


def solvers_of(table: Costs, group: Set) -> list[str]:
    """The solvers that were run, in the order of the set."""
    there = {solver for rows in table.values() for solver in rows}
    return [shown for shown in group.solvers.values() if shown in there]


def draw(figures: Figures, sets: Sequence[Set] = SETS) -> dict[str, str]:
    """The plots of all sets that were measured, by their file names."""
    made = {}
    for group in sets:
        ours = list(group.solvers.values())[: group.ours]
        panels = [
            Panel(
                title,
                "factor of the best",
                [
                    Line(solver, profile(table, solver), dashed=solver not in ours)
                    for solver in solvers_of(table, group)
                ],
            )
            for title, table in tables(figures, group).items()
        ]
        if panels:
            made[f"profile_{group.name}.svg"] = plot(panels, "share of problems")
    return made


def sections(figures: Figures, newest: str, sets: Sequence[Set] = SETS) -> str:
    """The part of the page about profiles: plots, and the shares at some factors."""
    parts = []
    for group in sets:
        record, found = find(figures, group), tables(figures, group)
        if record is None or not found:
            continue
        text = group.text.format(count=len(next(iter(found.values()))))
        parts.append(
            f"### {group.title}\n\n{text}\n\nMeasured by `{group.command}` "
            f"({label([record], newest)}).\n\n"
            f"![Performance profiles: {group.title}](images/profile_{group.name}.svg)\n"
        )
        for title, table in found.items():
            rows = [f"| by {title} | best | within 2 | within 10 | solved |", "|---|" + 4 * "---|"]
            for solver in solvers_of(table, group):
                shares = (share(table, solver, factor) for factor in (1.0, 2.0, 10.0, math.inf))
                rows.append(f"| {solver} | " + " | ".join(f"{100 * s:.0f}%" for s in shares) + " |")
            parts.append("\n".join(rows) + "\n")
    return "\n".join(parts).strip("\n")
