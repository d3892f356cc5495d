"""The sub-commands of scripts/bench.py, one module each, registered in one table.

To add one, write a module with a function under `@command(...)`, and import it here.
"""

from . import (
    capture,
    captured,
    compiled,
    constraints,
    diagnostics,
    diagonal,
    distributed,
    iteration_costs,
    jacobian,
    kronecker,
    lbfgs,
    lightning,
    linear,
    minimize,
    newton,
    penalties,
    products,
    quasi_newton,
    residuals,
)
from .registry import COMMANDS, Command, Options, command

__all__ = [
    "COMMANDS",
    "Command",
    "Options",
    "capture",
    "captured",
    "command",
    "compiled",
    "constraints",
    "diagnostics",
    "diagonal",
    "distributed",
    "iteration_costs",
    "jacobian",
    "kronecker",
    "lbfgs",
    "lightning",
    "linear",
    "minimize",
    "newton",
    "penalties",
    "products",
    "quasi_newton",
    "residuals",
]
