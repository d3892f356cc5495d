"""The verdict of a certificate in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from torch_secondorder.constraints._conditions import Condition, Conditions, Name
from torch_secondorder.constraints._critical import SecondOrder

#: Gives the name of an entry of the parameters, or of a constraint.
Naming = Callable[[int], str]


def verdict(
    conditions: Mapping[Name, Condition], tolerance: float, told: Name, sentence: str
) -> str:
    """The first clauses: that all conditions hold, or which ones do not.

    Args:
        conditions: All four.
        tolerance: The relative residual below which a condition holds.
        told: The condition that has a clause of its own.
        sentence: That clause.
    """
    largest = conditions[worst_of(conditions)].relative
    if largest <= tolerance:
        return f"all conditions hold to {largest:.1g}" if largest else "all conditions hold"
    others = [
        f"{name} {condition.relative:.1g}"
        for name, condition in conditions.items()
        if name != told and condition.relative > tolerance
    ]
    return sentence + (f"; also violated: {', '.join(others)} (relative)" if others else "")


def worst_of(conditions: Mapping[Name, Condition]) -> Name:
    """The condition that is violated most, by its relative residual."""
    return max(conditions, key=lambda name: conditions[name].relative)


def on_stationarity(condition: Condition, entry: Naming, estimated: bool, best: float) -> str:
    """A clause on stationarity.

    Args:
        condition: The condition.
        entry: Names entries of the parameters.
        estimated: Whether the multipliers are estimates.
        best: The largest relative residual with estimated multipliers.
    """
    text = (
        f"the Lagrangian is not stationary: its slope is {condition.at:.3g} at "
        f"{entry(condition.index)} ({condition.relative:.1g} relative to the gradients)"
    )
    if not estimated and best < 0.1 * condition.relative:
        return text + (
            f"; that is due to the multipliers, not to the point: estimated ones leave {best:.1g}"
        )
    return text + ": the loss can still be lowered along the constraints"


def on_feasibility(
    condition: Condition, conditions: Conditions, constraint: Naming, entry: Naming
) -> str:
    """A clause on feasibility.

    Args:
        condition: The condition.
        conditions: The constraints' values.
        constraint: Names constraints.
        entry: Names entries of the parameters.
    """
    m = len(conditions.violation)
    if condition.index >= m:
        return f"{entry(condition.index - m)} is out of its bounds by {condition.at:.3g}"
    value = float(conditions.point.values[condition.index])
    kind, wanted = "equality", "zero"
    if bool(conditions.inequality[condition.index]):
        kind, wanted = "inequality", "zero or less"
    return (
        f"the {kind} {constraint(condition.index)!r} is violated by {condition.at:.3g}: it is "
        f"{value:.3g} and has to be {wanted}"
    )


#: The clause on a point that violates constraints and cannot improve.
CONTRADICTION = (
    "the constraints contradict each other here: to the first order no step lessens all violations "
    "and keeps the rest"
)


def on_signs(condition: Condition, constraint: Naming) -> str:
    """A clause on signs."""
    return (
        f"the multiplier of the inequality {constraint(condition.index)!r} is {-condition.at:.3g} "
        "and must not be negative: the loss falls where that constraint is left to its inside"
    )


def on_complementarity(
    condition: Condition, conditions: Conditions, y: Tensor, constraint: Naming
) -> str:
    """A clause on complementarity."""
    i = condition.index
    return (
        f"the inequality {constraint(i)!r} has a slack of {float(conditions.slack[i]):.3g} and a "
        f"multiplier of {float(y[i]):.3g}, whose product {condition.at:.3g} has to be zero: a "
        "constraint with slack holds nothing back"
    )


def on_dependence(active: int, rank: int) -> str:
    """A clause on dependent gradients."""
    return (
        f"the gradients of the {active} active constraints have rank {rank}: the multipliers are "
        "not unique"
    )


def on_second_order(found: SecondOrder, holds: bool, dependent: bool, entry: Naming) -> str:
    """A clause on the curvature.

    Args:
        found: The curvature.
        holds: Whether the conditions of first order hold.
        dependent: Whether the gradients of active constraints are dependent.
        entry: Names entries of the parameters.
    """
    if found.curvature is None or found.direction is None:
        return (
            "a strict local minimum: the active constraints leave no direction"
            if holds
            else "the active constraints leave no direction to measure curvature in"
        )
    along = entry(int(found.direction.abs().argmax()))
    number = f"{found.curvature:.3g}"
    if not holds:
        return f"the lowest curvature of the Lagrangian along the constraints is {number} here"
    if found.verdict == "minimum":
        return f"a strict local minimum: the curvature along the constraints is {number} or more"
    if found.verdict == "saddle":
        unless = ", unless other multipliers tell otherwise" if dependent else ""
        return (
            f"no minimum{unless}: the Lagrangian has curvature {number} along the constraints, "
            f"mostly in {along}"
        )
    return (
        f"undecided to the second order: the lowest curvature along the constraints is {number}, "
        f"mostly in {along}"
    )
