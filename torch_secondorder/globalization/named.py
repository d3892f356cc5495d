"""The one place where the name of a line search is resolved."""

from __future__ import annotations

from collections.abc import Callable

from torch_secondorder.globalization.backtracking import Armijo, FixedStep
from torch_secondorder.globalization.hager_zhang import HagerZhang
from torch_secondorder.globalization.line_search import LineSearch
from torch_secondorder.globalization.strong_wolfe import StrongWolfe

_KNOWN: dict[str, Callable[[], LineSearch]] = {
    "strong_wolfe": StrongWolfe,
    "hager_zhang": HagerZhang,
    "armijo": Armijo,
    "backtracking": Armijo,
}


LINE_SEARCHES = tuple(_KNOWN)


def resolve_line_search(spec: str | LineSearch | None) -> LineSearch:
    """The line search that `spec` names.

    Args:
        spec: A name, a line search (returned as it is), or None for no search.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If `spec` is neither a string, nor callable, nor None.

    Example:
        >>> resolve_line_search("strong_wolfe")
        StrongWolfe(c1=0.0001, c2=0.75, extrapolation=9.0, max_evaluations=25)
        >>> resolve_line_search(None)
        FixedStep()
    """
    if spec is None:
        return FixedStep()
    if isinstance(spec, str):
        if spec not in _KNOWN:
            names = ", ".join(repr(name) for name in _KNOWN)
            raise ValueError(f"unknown line search {spec!r}; known: {names}, or None for none")
        return _KNOWN[spec]()
    if isinstance(spec, type) or not callable(spec):
        raise TypeError(
            f"a line search is a name, an instance such as StrongWolfe(), or None, got {spec!r}"
        )
    return spec
