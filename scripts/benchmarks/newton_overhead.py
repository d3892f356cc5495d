"""Overhead of conjugate gradients over their products."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder.curvature import Damped, Diagonal, GaussNewton, LinearOperator
from torch_secondorder.solvers import CG, SolveResult

from .harness import Ratio, alternate, progress, ratio, say
from .networks import Case, autoencoder, mlp
from .registry import Options
from .report import Report, Table, number, seconds

# So small that no run converges early.
DAMPING = 1e-6
BAR = 0.10


def _closure(case: Case) -> Tensor:
    for p in case.params:
        p.grad = None
    loss = case.value()
    loss.backward()
    return loss


def _products(A: LinearOperator, v: Tensor, count: int) -> None:
    for _ in range(count):
        A.matvec(v)


def _syncs(solve: Callable[[int], SolveResult], iterations: int) -> float:
    """Number of times the host waits in an iteration, from two runs of different length."""
    kind = importlib.import_module("torch_secondorder._params.space").Space
    original, calls = kind.to_host, 0

    def counting(space: Any, *numbers: Any, **more: Any) -> list[float]:
        nonlocal calls
        calls += 1
        result: list[float] = original(space, *numbers, **more)
        return result

    found = []
    kind.to_host = counting
    try:
        for most in (iterations, 2 * iterations):
            before = calls
            done = solve(most).iterations
            found.append((calls - before, done))
    finally:
        kind.to_host = original
    (fewer, short), (more, long) = found
    return (more - fewer) / (long - short) if long > short else float("nan")


@torch.no_grad()
def _measure(case: Case, iterations: int, options: Options) -> dict[str, Any]:
    """Times runs of CG and the same number of products, in turns."""
    objective = ClosureObjective(partial(_closure, case), case.params)
    evaluation = objective.evaluate(curvature=True)
    operator = GaussNewton(evaluation)
    A, b = Damped(operator, DAMPING), -evaluation.grad
    diagonal = Diagonal((operator.diagonal(4) + DAMPING).pow(-0.75))

    def solve(most: int, preconditioner: LinearOperator | None = None) -> SolveResult:
        return CG(most, tolerance=0.0, recompute=0)(A, b, preconditioner=preconditioner)

    # Without the recomputed residuals, which take products: this measures work on vectors.
    runs = {"CG": solve, "CG, diagonal": partial(solve, preconditioner=diagonal)}
    for name, call in runs.items():
        done = call(iterations).iterations
        if done < iterations:
            raise AssertionError(f"{name} on {case.name} ends after {done} of {iterations}")
    calls: dict[str, Callable[[], object]] = {"products": partial(_products, A, b, iterations)}
    calls |= {name: partial(call, iterations) for name, call in runs.items()}
    timings = alternate(calls, options.repeat, options.device, min_seconds=0.0)
    base = timings["products"]
    return {
        "n": operator.size,
        "iterations": iterations,
        "product": base.median / iterations,
        "overhead": {name: ratio(timings[name], base).as_dict() for name in runs},
        "syncs per iteration": {name: _syncs(call, 5) for name, call in runs.items()},
        **{name: timing.as_dict() for name, timing in timings.items()},
    }


def _percent(found: Ratio) -> str:
    low, high = (f"{100.0 * (value - 1.0):.1f}" for value in (found.minimum, found.maximum))
    return f"{100.0 * (found.of_medians - 1.0):.1f}% [{low} {high}]"


def run(options: Options, report: Report) -> None:
    """Measures each network."""
    iterations = 10 if options.quick else 50
    makers: list[tuple[Callable[..., Case], int]] = [(mlp, 256), (autoencoder, 256)]
    makers = [(mlp, 64)] if options.quick else [*makers, (autoencoder, 1024)]
    header = ["network", "n", "batch", "product", "overhead", "with a diagonal", "syncs"]
    table = Table(
        f"CG over {iterations} iterations, compared with {iterations} damped Gauss-Newton products",
        header,
    )
    for make, batch in progress(makers, "conjugate gradients"):
        case = make(options.device, batch=batch)
        found = _measure(case, iterations, options)
        overheads = [Ratio(**entry) for entry in found["overhead"].values()]
        syncs = " ".join(number(value) for value in found["syncs per iteration"].values())
        cells = (f"{found['n']:,}", batch, seconds(found["product"]), *map(_percent, overheads))
        table.add(case.name, *cells, syncs)
        found["within the bar"] = all(o.of_medians - 1.0 <= BAR for o in overheads)
        report.record(f"newton.cg.{case.name}.{batch}", found)
    report.show(table)
    say(
        f"overhead of medians [within a round]; the bar is {BAR:.0%}. syncs: to_host calls per ", ""
    )
    say("iteration, without and with the diagonal")
