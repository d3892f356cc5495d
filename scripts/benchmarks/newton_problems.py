"""Cost of Newton-CG with the Hessian on test functions, in gradients, compared with L-BFGS."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from torch_secondorder import LBFGS, NewtonCG

from .harness import progress, say, threads
from .lbfgs_problems import load_problems
from .registry import Options
from .report import Report, Table, number
from .solvers import Outcome, Solver, in_one_step, with_closure

if TYPE_CHECKING:
    from tests.support.problems import Problem

TOLERANCES = (1e-6, 1e-10)
NAMES = ("extended_rosenbrock", "chained_rosenbrock", "powell_singular", "wood")
# The Rosenbrock functions of the tests are defined for any number of variables.
SIZE = 100
BUDGET = 20_000


def _problems(device: torch.device) -> list[Problem]:
    table = {problem.name: problem for problem in load_problems(device)}
    chosen = [table[name] for name in NAMES]
    return [
        replace(p, start=p.start.repeat(SIZE // p.size)) if "rosenbrock" in p.name else p
        for p in chosen
    ]


def _judged(problem: Problem, outcome: Outcome, tolerance: float) -> dict[str, Any]:
    """Cost and success of a solver; the gradient is computed separately."""
    point = outcome.point.clone().requires_grad_()
    loss = problem.function(point)
    (gradient,) = torch.autograd.grad(loss, point)
    norm = gradient.abs().max().item()
    return {
        "evaluations": outcome.evaluations,
        "products": outcome.products,
        "gradients": outcome.evaluations + outcome.products,
        "gradients, a product for two": outcome.evaluations + 2 * outcome.products,
        "gradient": norm,
        "value": loss.item(),
        "is_known_minimum": problem.is_minimum(loss.item()),
        "solved": norm <= tolerance,
    }


def _cell(found: dict[str, Any]) -> str:
    mark = "" if found["is_known_minimum"] else " *"
    count = f"{found['evaluations']}"
    if found["products"]:
        sums = found["gradients"], found["gradients, a product for two"]
        count = f"{count} + {found['products']} = {sums[0]} / {sums[1]}"
    return f"{count}{mark}" if found["solved"] else f"{count} FAILS |g| {found['gradient']:.0e}"


def _over(rows: dict[str, dict[str, Any]], base: str) -> dict[str, float]:
    """Newton-CG over another solver, with a product counted as one gradient and as two."""
    mine, other = rows["NewtonCG"], rows[base]
    if not (mine["solved"] and other["solved"]):
        return {"one": float("nan"), "two": float("nan")}
    one, two = (mine[key] for key in ("gradients", "gradients, a product for two"))
    return {"one": one / other["evaluations"], "two": two / other["evaluations"]}


def run(options: Options, report: Report) -> None:
    """Runs every solver once, because counts do not vary, with one CPU thread for short vectors."""
    if options.device.type != "cpu":
        say("skipped: newton problems, which only counts work, on the CPU")
        return
    table: dict[str, Solver] = {
        "NewtonCG": partial(in_one_step, NewtonCG, curvature="hessian"),
        "LBFGS (ours)": partial(with_closure, LBFGS),
        "LBFGS (torch)": partial(with_closure, torch.optim.LBFGS, line_search_fn="strong_wolfe"),
    }
    bases = list(table)[1:]
    shown = Table(
        "Newton-CG with the Hessian, in gradients; a product counts as one / two, float64",
        ["problem", "|g| <=", *table, *(f"NewtonCG / {base}" for base in bases)],
    )
    problems = _problems(options.device)
    turns = [(p, t) for p in problems for t in (TOLERANCES[:1] if options.quick else TOLERANCES)]
    with threads(1):
        for problem, tolerance in progress(turns, "test functions"):
            rows = {
                name: _judged(
                    problem, solver(problem.function, problem.start, tolerance, BUDGET), tolerance
                )
                for name, solver in table.items()
            }
            over = {base: _over(rows, base) for base in bases}
            title = f"{problem.name}, n = {problem.size}"
            ratios = [f"{number(r['one'])} / {number(r['two'])}" for r in over.values()]
            shown.add(title, f"{tolerance:g}", *map(_cell, rows.values()), *ratios)
            key = f"newton.problems.{problem.name}.{tolerance:g}"
            report.record(key, {"n": problem.size, **rows, "NewtonCG over": over})
    report.show(shown)
    say("* the final value is not that of a known minimum")
