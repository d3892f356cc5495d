"""Dense quasi-Newton methods and their relatives, compared with L-BFGS and peers."""

from __future__ import annotations

from . import quasi_newton_pinn
from .registry import Options, command
from .report import Report

PARTS = {
    "poisson": quasi_newton_pinn.run_poisson,
    "convection": quasi_newton_pinn.run_convection,
    "limited": quasi_newton_pinn.run_limited,
    "seconds": quasi_newton_pinn.run_seconds,
}


@command("quasi_newton", "BFGS and its relatives, compared with L-BFGS and peers", tuple(PARTS))
def run(options: Options, report: Report) -> None:
    """Runs the parts."""
    for name, part in PARTS.items():
        if options.wants(name):
            part(options, report)
