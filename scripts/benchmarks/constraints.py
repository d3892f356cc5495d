"""Constraints, compared with SciPy, cooper and other peers, and with loops written by hand."""

from __future__ import annotations

from . import (
    constraints_large,
    constraints_minibatch,
    constraints_overhead,
    constraints_pca,
    constraints_problems,
)
from .registry import Options, command
from .report import Report

PARTS = {
    "problems": constraints_problems.run,
    "overhead": constraints_overhead.run,
    "pca": constraints_pca.run,
    "minibatch": constraints_minibatch.run,
    "large": constraints_large.run,
}


@command("constraints", "constrained optimization beside SciPy, cooper and others", tuple(PARTS))
def run(options: Options, report: Report) -> None:
    """Runs the parts."""
    for name, part in PARTS.items():
        if options.wants(name):
            part(options, report)
