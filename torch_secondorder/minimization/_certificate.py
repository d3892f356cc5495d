"""The conditions of Karush, Kuhn and Tucker at a point of a minimization with constraints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite, isnan

import torch
from torch import Tensor

from torch_secondorder.minimization._constraints import ConstraintSet
from torch_secondorder.minimization._runs import Problem

# Constraints of which the gradients are looked at where the violation does not fall any more.
_MOST_ROWS = 100
# Rounding errors of a constraint, as a multiple of the machine epsilon.
_ROUNDING = 10.0
# The gradient of the violation is zero if its terms cancel to this part of their sizes, or if moves
# as large as x change the violation by no more than this part of it.
_CANCELS = 1e-3


@dataclass(frozen=True)
class Certificate:
    """The conditions of Karush, Kuhn and Tucker at a point.

    Attributes:
        value: The function.
        gradients: Its gradient, by leaves.
        values: Those of each constraint.
        y: The multipliers of the rows, `(m,)`; see `ConstraintSet`.
        bounds_v: The multipliers of the bounds, by leaves; None without bounds.
        lagrangian: The gradient of the Lagrangian, by leaves; zero at a solution. Within bounds it
            is as long as the way to them at most, and the rest is in `bounds_v`.
        optimality: Its largest entry.
        scale: The largest entry of the function's gradient.
        violation: The largest violation of a constraint.
        most_violated: The name of that one.
        complementarity: The largest product of a multiplier and its inequality.
    """

    value: float
    gradients: list[Tensor]
    values: list[Tensor]
    y: Tensor
    bounds_v: list[Tensor] | None
    lagrangian: list[Tensor]
    optimality: float
    scale: float
    violation: float
    most_violated: str
    complementarity: float

    @property
    def finite(self) -> bool:
        """True if function, constraints and derivatives are finite."""
        return all(map(isfinite, (self.value, self.optimality, self.violation)))


def certificate(problem: Problem, constraints: ConstraintSet, y: Tensor | None) -> Certificate:
    """The conditions where the parameters stand, by one evaluation.

    Args:
        problem: The minimization.
        constraints: The constraints.
        y: The multipliers of the rows; None for zeros.
    """
    params = problem.params
    with torch.enable_grad():
        value = problem.function(problem.tree())
        gradients = _gradients(value, params)
        values = constraints.values(problem.tree())
        rows = torch.cat(constraints.rows(values))
        if y is None:
            y = torch.zeros(len(rows), dtype=torch.float64)
        y = y.detach().to("cpu", torch.float64)
        pull = _gradients((rows * y.to(rows)).sum(), params)
    lagrangian = [g + p for g, p in zip(gradients, pull, strict=True)]
    values = [v.detach() for v in values]
    violation, most_violated = _largest_violation(constraints, values)
    projected, taken = _projected(problem, lagrangian), None
    if problem.limits is not None:
        taken = [p - g for p, g in zip(projected, lagrangian, strict=True)]
    products = (rows.detach() * y.to(rows))[constraints.n_equalities :]
    return Certificate(
        value=value.item(),
        gradients=gradients,
        values=values,
        y=y,
        bounds_v=taken,
        lagrangian=projected,
        optimality=largest(projected),
        scale=largest(gradients),
        violation=violation,
        most_violated=most_violated,
        complementarity=largest([products]),
    )


def violation_is_stationary(problem: Problem, constraints: ConstraintSet) -> bool:
    """True if no small move lowers the sum of the squares of the violations, to first order."""
    params = problem.params
    with torch.enable_grad():
        rows = torch.cat(constraints.rows(constraints.values(problem.tree())))
        outside = rows.detach().clone()
        outside[constraints.n_equalities :].clamp_(min=0)
        most = outside.abs().argsort(descending=True)[:_MOST_ROWS]
        sizes, total = 0.0, [torch.zeros_like(p) for p in params]
        for i in most.tolist():
            terms = _gradients(outside[i] * rows[i], params, retain=True)
            sizes = max(sizes, largest(terms))
            total = [t + term for t, term in zip(total, terms, strict=True)]
    slope, reach = (
        largest(_projected(problem, total)),
        max(1.0, largest([p.detach() for p in params])),
    )
    return slope <= _CANCELS * sizes or slope * reach <= _CANCELS * outside.square().sum().item()


def violation_is_rounding(problem: Problem, constraints: ConstraintSet) -> bool:
    """True if each violation is as small as rounding errors of `x` make it."""
    params = problem.params
    with torch.enable_grad():
        rows = torch.cat(constraints.rows(constraints.values(problem.tree())))
        outside = rows.detach().clone()
        outside[constraints.n_equalities :].clamp_(min=0)
        for i in outside.abs().argsort(descending=True)[:_MOST_ROWS].tolist():
            gradients = _gradients(rows[i], params, retain=True)
            pairs = zip(gradients, params, strict=True)
            size = sum((g.abs() * p.detach().abs()).sum().item() for g, p in pairs)
            if outside[i].abs().item() > _ROUNDING * problem.eps * size:
                return False
    return True


def _largest_violation(constraints: ConstraintSet, values: Sequence[Tensor]) -> tuple[float, str]:
    most, name = -1.0, ""
    for i, outside in enumerate(constraints.violations(values)):
        if outside.numel():
            found, place = outside.reshape(-1).max(0)
            size = found.item()
            if (inf if isnan(size) else size) > most:
                most, name = size, constraints.entry(i, int(place))
            if isnan(size):
                break
    return most if isnan(most) else max(most, 0.0), name


def _projected(problem: Problem, gradients: list[Tensor]) -> list[Tensor]:
    """Gradients, no longer than the way to the bounds."""
    if problem.limits is None:
        return gradients
    found = []
    for p, g, (low, high) in zip(problem.params, gradients, problem.limits, strict=True):
        x = p.detach()
        g = g if low is None else torch.minimum(g, x - low)
        found.append(g if high is None else torch.maximum(g, x - high))
    return found


def _gradients(value: Tensor, params: Sequence[Tensor], *, retain: bool = False) -> list[Tensor]:
    """The gradient by each leaf, zeros where there is none."""
    found: Sequence[Tensor | None] = [None] * len(params)
    if value.requires_grad:
        found = torch.autograd.grad(value, params, allow_unused=True, retain_graph=retain)
    return [
        torch.zeros_like(p) if g is None else g.detach() for p, g in zip(params, found, strict=True)
    ]


def largest(tensors: Sequence[Tensor]) -> float:
    """The largest absolute entry; zero if there is none."""
    return max((t.abs().max().item() for t in tensors if t.numel()), default=0.0)
