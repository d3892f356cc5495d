"""L-BFGS compared with torch and SciPy: functions, overhead, softmax regression, a direction."""

from __future__ import annotations

from . import lbfgs_direction, lbfgs_overhead, lbfgs_problems, lbfgs_softmax
from .registry import Options, command
from .report import Report

PARTS = {
    "problems": lbfgs_problems.run,
    "overhead": lbfgs_overhead.run,
    "softmax": lbfgs_softmax.run,
    "direction": lbfgs_direction.run,
}


@command("lbfgs", "L-BFGS, compared with torch.optim.LBFGS and SciPy's L-BFGS-B", tuple(PARTS))
def run(options: Options, report: Report) -> None:
    """Runs the parts."""
    for name, part in PARTS.items():
        if options.wants(name):
            part(options, report)
