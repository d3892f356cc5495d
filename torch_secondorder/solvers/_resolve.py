"""Resolution of names of solvers and preconditioners."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

from torch_secondorder._foundation.checks import check_choice
from torch_secondorder.solvers.base import LinearSolver, Preconditioner
from torch_secondorder.solvers.kfac import KFAC
from torch_secondorder.solvers.minres import MINRES
from torch_secondorder.solvers.preconditioners import Martens, Nystrom

PreconditionerName: TypeAlias = Literal["kfac", "martens", "nystrom"]
SolverName: TypeAlias = Literal["cg", "minres"]

_NAMED: dict[str, Callable[[], Preconditioner]] = {
    "kfac": KFAC,
    "martens": Martens,
    "nystrom": Nystrom,
}


def resolve_preconditioner(spec: str | Preconditioner | None) -> Preconditioner | None:
    """A preconditioner from its name.

    Args:
        spec: `"kfac"`, `"martens"`, `"nystrom"`, an instance (returned as it is), or None for none.

    Returns:
        The preconditioner, or None.

    Raises:
        ValueError: The name is unknown.
        TypeError: It is neither a name, nor an instance, nor None.

    >>> type(resolve_preconditioner("nystrom")).__name__, resolve_preconditioner(None)
    ('Nystrom', None)
    """
    if spec is None or isinstance(spec, Preconditioner):
        return spec
    check_choice("preconditioner", spec, _NAMED, "an instance such as Nystrom(), or None")
    return _NAMED[spec]()


def resolve_solver(spec: str | LinearSolver, max_iterations: int) -> LinearSolver | None:
    """A linear solver from its name.

    Args:
        spec: `"cg"`, `"minres"`, or an instance (returned as it is).
        max_iterations: Most iterations of a solver by name.

    Returns:
        None for conjugate gradients: each iteration makes its own.

    Raises:
        ValueError: The name is unknown.
        TypeError: It is neither a name nor an instance.

    >>> resolve_solver("minres", max_iterations=50)
    MINRES(max_iterations=50, tolerance=1e-06, stop_at_negative_curvature=True)
    """
    if isinstance(spec, (str, type)) or not callable(spec):
        check_choice("solver", spec, SolverName, "an instance such as MINRES()")
        return MINRES(max_iterations) if spec == "minres" else None
    return spec
