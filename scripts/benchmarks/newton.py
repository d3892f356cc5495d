"""Newton-CG: overhead of CG over products, and runs of several optimizers; exact Newton."""

from __future__ import annotations

from . import (
    newton_autoencoder,
    newton_exact,
    newton_overhead,
    newton_pinn,
    newton_problems,
    newton_softmax,
)
from .registry import Options, command
from .report import Report

PARTS = {
    "cg": newton_overhead.run,
    "softmax": newton_softmax.run,
    "problems": newton_problems.run,
    "autoencoder": newton_autoencoder.run,
    "pinn": newton_pinn.run,
    "exact": newton_exact.run,
}


@command(
    "newton", "Newton-CG, compared with L-BFGS, Adam and others; the overhead of CG", tuple(PARTS)
)
def run(options: Options, report: Report) -> None:
    """Runs the parts."""
    for name, part in PARTS.items():
        if options.wants(name):
            part(options, report)
