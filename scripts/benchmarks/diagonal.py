"""AdaHessian and Sophia: time and memory of a step, diagonal estimates, a badly scaled problem."""

from __future__ import annotations

from . import diagonal_estimates, diagonal_memory, diagonal_scaling, diagonal_steps
from .registry import Options, command
from .report import Report

PARTS = {
    "steps": diagonal_steps.run,
    "memory": diagonal_memory.run,
    "estimates": diagonal_estimates.run,
    "scaling": diagonal_scaling.run,
}


@command(
    "diagonal", "AdaHessian and Sophia, compared with other implementations and Adam", tuple(PARTS)
)
def run(options: Options, report: Report) -> None:
    """Runs the parts."""
    for name, part in PARTS.items():
        if options.wants(name):
            part(options, report)
