"""Linear least squares: LSQR and LSMR beside SciPy's, and solutions within a ball.

Matrices have singular values from 1 down to the inverse of a condition; of each there is a
consistent system and one with a residual. What counts is the number of iterations, the distance to
the solution, and the time of an iteration.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_secondorder.linear import lsmr, lsqr, lstsq, norm_constrained

from .harness import alternate, load_peer, progress, say, threads
from .registry import Options, command
from .report import Report, Table, seconds

CONDITIONS = (1e1, 1e2, 1e3, 1e4)
TOLERANCE = 1e-8
OURS = {"lsqr": lsqr, "lsmr": lsmr}

#: Solves a system; returns the solution and the number of iterations.
Solver = Callable[[Tensor, Tensor, int], tuple[Tensor, int]]


def system(m: int, n: int, condition: float, consistent: bool) -> tuple[Tensor, Tensor]:
    """A random matrix of a condition, and a right-hand side, on the host."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, dtype=torch.float64, generator=generator)
    U, V = torch.linalg.qr(normal(m, n))[0], torch.linalg.qr(normal(n, n))[0]
    s = torch.logspace(0, -torch.tensor(condition).log10().item(), n, dtype=torch.float64)
    A = (U * s) @ V.T
    return A, A @ normal(n) if consistent else normal(m)


def ours(name: str, A: Tensor, b: Tensor, most: int) -> tuple[Tensor, int]:
    """A method of this library."""
    result = OURS[name](A, b, 0.0, TOLERANCE, TOLERANCE, 0.0, most)
    return result.x, result.iterations


def with_scipy(sparse: Any, name: str, A: Tensor, b: Tensor, most: int) -> tuple[Tensor, int]:
    """SciPy's on the same memory."""
    found = getattr(sparse, name)(A.numpy(), b.numpy(), 0.0, TOLERANCE, TOLERANCE, 0.0, most)
    return torch.from_numpy(found[0]), found[2]


@command("linear", "linear least squares: LSQR and LSMR beside SciPy's, and within a ball")
def run(options: Options, report: Report) -> None:
    """Runs every method on every system."""
    sparse = load_peer("scipy.sparse.linalg", "scipy")
    solvers: dict[str, Solver] = {name: partial(ours, name) for name in OURS}
    if sparse is not None:
        solvers |= {f"scipy {name}": partial(with_scipy, sparse, name) for name in OURS}
    m, n = (120, 60) if options.quick else (1000, 500)
    cases = [(condition, kind) for condition in CONDITIONS for kind in (True, False)]
    table = Table(
        f"{m} x {n}, float64, tolerances {TOLERANCE:g}: iterations (relative error)",
        ["condition", "system", *solvers, "lsqr / scipy, an iteration"],
    )
    ball = Table(
        "Within half the norm of that solution (and the stationarity): cost of both routes",
        ["condition", "system", "multiplier", "dense: Newton steps", "matrix-free: products"],
    )
    with threads(1):
        for condition, consistent in progress(cases, "systems"):
            A, b = system(m, n, condition, consistent)
            kind = "consistent" if consistent else "residual"
            exact = lstsq(A, b)
            most = 20 * n
            found = {name: solver(A, b, most) for name, solver in solvers.items()}
            errors = {
                name: ((x - exact.x).norm() / exact.norm).item() for name, (x, _) in found.items()
            }
            times = alternate(
                {
                    name: partial(solver, A, b, 20)
                    for name, solver in solvers.items()
                    if "lsqr" in name
                },
                options.repeat,
            )
            per_step = [seconds(timing.median / 20) for timing in times.values()]
            cells = [f"{found[name][1]:,} ({errors[name]:.0e})" for name in solvers]
            table.add(f"{condition:.0e}", kind, *cells, " / ".join(per_step))
            radius = 0.5 * exact.norm.item()
            dense = norm_constrained(A, b, radius)
            free = norm_constrained((A.mv, A.T.mv), b, radius)
            ball.add(
                f"{condition:.0e}",
                kind,
                f"{dense.multiplier.item():.1e}",
                f"{dense.iterations} ({dense.stationarity.item():.0e})",
                f"{2 * free.iterations + 4} ({free.stationarity.item():.0e})",
            )
            report.record(
                f"linear.{kind}.{condition:.0e}",
                {
                    "iterations": {name: count for name, (_, count) in found.items()},
                    "errors": errors,
                    "ball": {"dense": dense.iterations, "matrix-free": free.iterations},
                    "seconds": {name: timing.as_dict() for name, timing in times.items()},
                },
            )
    report.show(table)
    report.show(ball)
    say("an iteration of both takes a product with A and one with its transpose")
