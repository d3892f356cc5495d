"""Constraints, compared with SciPy, cooper and other peers, and with loops written by hand."""

from __future__ import annotations

from . import constraints_overhead, constraints_problems
from .registry import Options, command
from .report import Report

PARTS = {
    "problems": constraints_problems.run,
    "overhead": constraints_overhead.run,
}


@command("constraints", "constrained optimization beside SciPy, cooper and others", tuple(PARTS))
def run(options: Options, report: Report) -> None:
    """Runs the parts."""
    for name, part in PARTS.items():
        if options.wants(name):
            part(options, report)
