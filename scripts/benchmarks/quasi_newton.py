"""Dense quasi-Newton methods and their relatives, compared with L-BFGS and peers."""

from __future__ import annotations

from . import (
    bounds,
    quasi_newton_cg,
    quasi_newton_iteration,
    quasi_newton_pinn,
    quasi_newton_problems,
)
from .registry import Options, command
from .report import Report

PARTS = {
    "poisson": quasi_newton_pinn.run_poisson,
    "convection": quasi_newton_pinn.run_convection,
    "nonlinear_cg": quasi_newton_cg.run,
    "limited": quasi_newton_pinn.run_limited,
    "seconds": quasi_newton_pinn.run_seconds,
    "bounds": bounds.run,
    "problems": quasi_newton_problems.run_problems,
    "iteration": quasi_newton_iteration.run_iteration,
}


@command("quasi_newton", "BFGS and its relatives, compared with L-BFGS and peers", tuple(PARTS))
def run(options: Options, report: Report) -> None:
    """Runs the parts."""
    for name, part in PARTS.items():
        if options.wants(name):
            part(options, report)
