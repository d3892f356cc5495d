"""Resolution of names of line searches and other globalizations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

from torch_secondorder._foundation.checks import check_choice, check_number
from torch_secondorder.globalization.backtracking import Armijo, FixedStep
from torch_secondorder.globalization.damping import DampingRule, MarquardtDamping, NielsenDamping
from torch_secondorder.globalization.hager_zhang import HagerZhang
from torch_secondorder.globalization.line_search import LineSearch
from torch_secondorder.globalization.strong_wolfe import StrongWolfe
from torch_secondorder.globalization.trust_region import TrustRegion

LineSearchName: TypeAlias = Literal["strong_wolfe", "hager_zhang", "armijo", "backtracking"]
DampingName: TypeAlias = Literal["nielsen", "marquardt"]
GlobalizationName: TypeAlias = LineSearchName | Literal["damping", "trust_region", "line_search"]
Globalization: TypeAlias = DampingRule | TrustRegion | LineSearch

_KNOWN: dict[str, Callable[[], LineSearch]] = {
    "strong_wolfe": StrongWolfe,
    "hager_zhang": HagerZhang,
    "armijo": Armijo,
    "backtracking": Armijo,
}


def resolve_line_search(spec: str | LineSearch | None, name: str = "line_search") -> LineSearch:
    """A line search from its name.

    Args:
        spec: A name, a line search (returned as it is), or None for no search.
        name: The argument's name, for error messages.

    Returns:
        The line search.

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
    if isinstance(spec, (str, type)) or not callable(spec):
        check_choice(name, spec, _KNOWN, "an instance such as StrongWolfe(), or None")
        return _KNOWN[spec]()
    return spec


def resolve_globalization(
    spec: str | Globalization | None, damping: float | None, uses_hessian: bool
) -> Globalization:
    """A globalization from its name: it keeps a Newton step from going too far.

    Args:
        spec: `"damping"`, `"trust_region"`, `"line_search"`, the name of one, an instance (returned
            as it is), or None for a trust region with the Hessian and damping without.
        damping: The initial damping, if it is not the default.
        uses_hessian: Whether the curvature may be indefinite.

    Returns:
        A line search, a trust region, or a damping.

    Raises:
        ValueError: The name is unknown, or a number is out of range or given twice.
        TypeError: It is neither a name, nor an instance, nor None.

    >>> type(resolve_globalization("trust_region", None, uses_hessian=True)).__name__
    'TrustRegion'
    """
    if spec is None:
        spec = "trust_region" if uses_hessian else "damping"
    if spec == "damping":
        check_number("damping", damping, above=0, optional=True)
        return MarquardtDamping() if damping is None else MarquardtDamping(initial=damping)
    if spec == "trust_region":
        return TrustRegion()
    if spec == "line_search":
        return resolve_line_search("armijo")
    if isinstance(spec, DampingRule) and damping is not None:
        raise ValueError(
            f"the damping to begin with is {type(spec).__name__}'s own: leave damping out"
        )
    if isinstance(spec, (DampingRule, TrustRegion)):
        return spec
    if isinstance(spec, (str, type)) or not callable(spec):
        known = ("damping", "trust_region", "line_search", *_KNOWN)
        check_choice("globalization", spec, known, "an instance such as TrustRegion()")
    return resolve_line_search(spec)


def resolve_damping(
    damping: DampingName | DampingRule | float | None, adapts: bool
) -> DampingRule | float | None:
    """The rule of a damping, or a constant one; None for the default constant.

    Args:
        damping: A name, a rule, a number, or None.
        adapts: Whether the damping follows the gain ratio.

    Returns:
        A rule, a number, or None.

    Raises:
        TypeError: It is neither.
        ValueError: The name is unknown, or the number is out of range.

    >>> type(resolve_damping("nielsen", adapts=True)).__name__, resolve_damping(0.1, adapts=False)
    ('NielsenDamping', 0.1)
    """
    if adapts:
        if isinstance(damping, DampingRule):
            return damping
        if isinstance(damping, str):
            check_choice("damping", damping, DampingName, "a DampingRule, a number, or None")
            return MarquardtDamping() if damping == "marquardt" else NielsenDamping()
        check_number("damping", damping, above=0.0, optional=True)
        return NielsenDamping(None if damping is None else float(damping))
    if isinstance(damping, (str, DampingRule)):
        raise ValueError(
            "without globalization='damping' the damping is constant: give a number, got "
            f"{damping!r}"
        )
    check_number("damping", damping, above=0.0, optional=True)
    return None if damping is None else float(damping)
