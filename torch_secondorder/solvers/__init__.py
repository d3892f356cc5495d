"""Linear solvers and preconditioners over matrix-free operators."""

import warnings
from typing import Any

from torch_secondorder.solvers._resolve import resolve_preconditioner, resolve_solver
from torch_secondorder.solvers.base import (
    Iterate,
    LinearSolver,
    Preconditioner,
    SolveResult,
    SolveStatus,
)
from torch_secondorder.solvers.cg import CG
from torch_secondorder.solvers.kfac import KFAC
from torch_secondorder.solvers.lanczos import Tridiagonal, lanczos
from torch_secondorder.solvers.minres import MINRES
from torch_secondorder.solvers.preconditioners import (
    Martens,
    Nystrom,
    NystromApproximation,
)

__all__ = [
    "CG",
    "KFAC",
    "MINRES",
    "Iterate",
    "LinearSolver",
    "Martens",
    "Nystrom",
    "NystromApproximation",
    "Preconditioner",
    "SolveResult",
    "SolveStatus",
    "Tridiagonal",
    "lanczos",
    "resolve_preconditioner",
    "resolve_solver",
]


def __getattr__(name: str) -> Any:
    """The old name of `MINRES`, for one release."""
    if name != "Minres":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn("Minres is now called MINRES", DeprecationWarning, stacklevel=2)
    return MINRES
