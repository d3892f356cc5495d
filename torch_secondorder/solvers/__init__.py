"""Linear solvers and preconditioners over matrix-free operators."""

from typing import TYPE_CHECKING

from torch_secondorder._foundation.deprecation import renamed
from torch_secondorder.solvers._resolve import (
    PreconditionerName,
    SolverName,
    resolve_preconditioner,
    resolve_solver,
)
from torch_secondorder.solvers.base import (
    Iterate,
    LinearSolver,
    Preconditioner,
    SolveResult,
    SolveStatus,
)
from torch_secondorder.solvers.cg import CG
from torch_secondorder.solvers.damped_least_squares import (
    DampedLeastSquares,
    DampedStep,
    LeastSquaresSolverName,
)
from torch_secondorder.solvers.dense import (
    DefinitenessName,
    DenseQuadratic,
    DenseStep,
    solve_trust_region,
)
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
    "DampedLeastSquares",
    "DampedStep",
    "DefinitenessName",
    "DenseQuadratic",
    "DenseStep",
    "Iterate",
    "LeastSquaresSolverName",
    "LinearSolver",
    "Martens",
    "Nystrom",
    "NystromApproximation",
    "Preconditioner",
    "PreconditionerName",
    "SolveResult",
    "SolveStatus",
    "SolverName",
    "Tridiagonal",
    "lanczos",
    "resolve_preconditioner",
    "resolve_solver",
    "solve_trust_region",
]

if not TYPE_CHECKING:
    __getattr__ = renamed(__name__, {"Minres": "MINRES"})


def __dir__() -> list[str]:
    return __all__
