"""Residuals: their Jacobian beside that of `torch.func`, and Levenberg-Marquardt beside peers."""

from __future__ import annotations

from . import (
    residual_equations,
    residual_iteration,
    residual_jacobian,
    residual_race,
    residual_training,
)
from .registry import Options, command
from .report import Report

PARTS = {
    "jacobian": residual_jacobian.run_jacobian,
    "kernel": residual_jacobian.run_kernel,
    "problems": residual_race.run_problems,
    "nist": residual_race.run_nist,
    "pinn": residual_training.run_pinn,
    "poisson": residual_equations.run_poisson,
    "burgers": residual_equations.run_burgers,
    "convection": residual_equations.run_convection,
    "iteration": residual_iteration.run_iteration,
}


@command("residuals", "Jacobians of residuals, Levenberg-Marquardt beside peers", tuple(PARTS))
def run(options: Options, report: Report) -> None:
    """Runs the parts."""
    for name, part in PARTS.items():
        if options.wants(name):
            part(options, report)
