"""The one place where names of solvers and preconditioners are resolved."""

from __future__ import annotations

from collections.abc import Callable

from torch_secondorder.solvers.base import LinearSolver, Preconditioner
from torch_secondorder.solvers.kfac import KFAC
from torch_secondorder.solvers.minres import MINRES
from torch_secondorder.solvers.preconditioners import Martens, Nystrom

__all__ = ["resolve_preconditioner", "resolve_solver"]

_NAMED: dict[str, Callable[[], Preconditioner]] = {
    "kfac": KFAC,
    "martens": Martens,
    "nystrom": Nystrom,
}


def resolve_preconditioner(spec: str | Preconditioner | None) -> Preconditioner | None:
    """The preconditioner that `spec` names.

    Args:
        spec: `"kfac"`, `"martens"`, `"nystrom"`, an instance (returned as it is), or None for none.

    Raises:
        ValueError: The name is unknown.
        TypeError: It is neither a name, nor an instance, nor None.
    """
    if spec is None or isinstance(spec, Preconditioner):
        return spec
    if not isinstance(spec, str):
        raise TypeError(
            f"a preconditioner is a name, an instance such as Nystrom(), or None, got {spec!r}"
        )
    if spec not in _NAMED:
        names = ", ".join(map(repr, _NAMED))
        raise ValueError(f"unknown preconditioner {spec!r}; known: {names}, or None for none")
    return _NAMED[spec]()


def resolve_solver(spec: str | LinearSolver, max_iterations: int) -> LinearSolver | None:
    """The linear solver that `spec` names.

    Args:
        spec: `"cg"`, `"minres"`, or an instance (returned as it is).
        max_iterations: Most iterations of a solver by name.

    Returns:
        None for conjugate gradients: each iteration makes its own.

    Raises:
        ValueError: The name is unknown.
        TypeError: It is neither a name nor an instance.
    """
    if spec == "cg":
        return None
    if spec == "minres":
        return MINRES(max_iterations)
    if isinstance(spec, str):
        raise ValueError(f"unknown solver {spec!r}; known: 'cg', 'minres', or an instance")
    if isinstance(spec, type) or not callable(spec):
        raise TypeError(f"a solver is a name or an instance such as MINRES(), got {spec!r}")
    return spec
