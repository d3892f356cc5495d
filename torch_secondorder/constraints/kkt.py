"""The certificate of a constrained minimum: residuals of the conditions of optimality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_secondorder._foundation.checks import check_number
from torch_secondorder._foundation.report import Report
from torch_secondorder._foundation.types import Closure, ParamsT
from torch_secondorder._objective.functional import FunctionalObjective
from torch_secondorder._params.bounds import Bounds
from torch_secondorder.constraints import _words as words
from torch_secondorder.constraints._conditions import Condition, Conditions, Name
from torch_secondorder.constraints._critical import SecondOrder, Verdict, second_order
from torch_secondorder.constraints._estimates import estimated_multipliers, row_space
from torch_secondorder.constraints._evaluation import ConstrainedLoss
from torch_secondorder.constraints._functions import ConstraintFunctions, Constraints
from torch_secondorder.constraints._setting import (
    Multipliers,
    Setting,
    constraints_of,
    given_multipliers,
    set_up,
)

__all__ = ["KKTReport", "kkt_residuals"]

_SHOWN = 12  # multipliers in a printed report


@dataclass(frozen=True, slots=True)
class KKTReport(Report):
    """The residuals of the conditions of Karush, Kuhn and Tucker at a point.

    With the loss `f` and multipliers `y`, the Lagrangian is `f + y'c`, `c` the equalities `c = 0`
    and inequalities `c <= 0`. The residuals are largest absolute values; `relative` has the same
    numbers relative to the sizes of what cancels in them.

    Attributes:
        summary: The verdict in words.
        loss: The loss that is minimized, weight decay included.
        stationarity: The largest entry of the Lagrangian's gradient; at bounds of the parameters,
            as far as a step along it leads.
        feasibility: The largest violation of a constraint or a bound.
        signs: The most negative multiplier of an inequality, as a positive number.
        complementarity: The largest product of a multiplier with the slack of its inequality.
        relative: The four by name: stationarity relative to the largest entry of 1, the loss's
            gradient and the constraints' gradients times multipliers; feasibility to 1 or the
            constraint's gradient; signs, as multiplier times gradient, to what stationarity is
            relative to; complementarity to 1 or the loss.
        where: The entry of a parameter, or the constraint, with the largest relative residual, by
            the name of the condition; empty if the condition holds exactly.
        multipliers: By the names of the functions, in the shapes that these return.
        estimated: Whether these are least-squares estimates.
        values: The values of the constraints, likewise.
        equalities: The names of the functions that are equalities.
        active: The names of the inequalities that hold as equalities. What slack counts as none
            follows from the residuals.
        rank: The rank of the gradients of equalities and active inequalities, on the parameters
            that are not at a bound. If it is below their number the multipliers are not unique.
        dependent: Whether it is.
        bound_multipliers: The slopes that bounds hold, by parameter: positive at lower bounds,
            negative at upper ones; empty without bounds.
        verdict: `"minimum"`, `"saddle"` or `"undecided"`, if `second_order` was asked for and the
            conditions of first order hold; else None.
        curvature: The lowest curvature of the Lagrangian along the constraints; None if it was not
            asked for, or no direction is left.
        direction: The unit vector with that curvature, by parameter; empty if there is none.
        tolerance: The relative residual below which the summary counts a condition as holding.

    >>> x = torch.zeros(2, requires_grad=True)
    >>> report = kkt_residuals(lambda: (x - 1).square().sum(), [x])
    >>> report.stationarity, report.satisfied(1e-6)
    (2.0, False)
    """

    summary: str
    loss: float
    stationarity: float
    feasibility: float
    signs: float
    complementarity: float
    relative: dict[str, float]
    where: dict[str, str]
    multipliers: dict[str, Tensor]
    estimated: bool
    values: dict[str, Tensor]
    equalities: tuple[str, ...]
    active: tuple[str, ...]
    rank: int
    dependent: bool
    bound_multipliers: dict[str, Tensor]
    verdict: Verdict | None
    curvature: float | None
    direction: dict[str, Tensor]
    tolerance: float

    @property
    def largest(self) -> float:
        """The largest relative residual."""
        return max(self.relative.values())

    @property
    def worst(self) -> str:
        """The name of the condition with that residual."""
        return max(self.relative, key=lambda name: self.relative[name])

    def satisfied(self, tolerance: float | None = None) -> bool:
        """True if no relative residual is above a tolerance.

        Args:
            tolerance: The tolerance; by default that of the summary.
        """
        return self.largest <= (self.tolerance if tolerance is None else tolerance)

    def as_dict(self) -> dict[str, Any]:
        """The fields as numbers, strings and lists, for loggers."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: plain(entry) for name, entry in value.items()}
            return value.tolist() if isinstance(value, Tensor) else value

        found = {field.name: plain(getattr(self, field.name)) for field in fields(self)}
        return {**found, "largest": self.largest}

    def __str__(self) -> str:
        """The summary, a table of the conditions, and one of the multipliers."""
        rows = [("", "absolute", "relative", "largest at")]
        for name, relative in self.relative.items():
            numbers = f"{getattr(self, name):.2e}", f"{relative:.2e}"
            rows.append((name, *numbers, self.where[name]))
        parts = [type(self).__name__ + ": " + self.summary, _table(rows)]
        if self.multipliers:
            how = "estimated by least squares" if self.estimated else "given"
            parts += [f"  multipliers, {how}", *self._constraint_rows()]
        return "\n".join(parts)

    def _constraint_rows(self) -> list[str]:
        """The constraints that matter, the largest multipliers first, and a count of the rest."""
        y = dict(_entries(self.multipliers))
        kinds = dict.fromkeys(y, "") | dict.fromkeys(self.active, "active")
        for name in self.equalities:
            kinds.update((entry, "equality") for entry, _ in _entries({name: self.values[name]}))
        for entry, value in _entries(self.values):
            if value > self.tolerance and kinds[entry] == "active":
                kinds[entry] = "violated"
        found = [entry for entry in _entries(self.values) if kinds[entry[0]] or y[entry[0]]]
        found.sort(key=lambda entry: -abs(y[entry[0]]))
        rows = [("constraint", "multiplier", "value", "")]
        rows += [(n, f"{y[n]:.6g}", f"{value:.6g}", kinds[n]) for n, value in found[:_SHOWN]]
        more, idle = len(found) - _SHOWN, len(y) - len(found)
        counts = [f"{more} more"] if more > 0 else []
        counts += [f"{idle} with slack and no multiplier"] if idle else []
        rest = [f"    and {', '.join(counts)}"] if counts else []
        return [*([_table(rows)] if found else []), *rest]


def kkt_residuals(
    closure: Closure | FunctionalObjective,
    params: ParamsT | Tensor | Optimizer | None = None,
    equalities: Constraints = None,
    inequalities: Constraints = None,
    multipliers: Multipliers = None,
    *,
    bounds: Bounds = None,
    weight_decay: float | None = None,
    maximize: bool | None = None,
    second_order: bool = False,
    tolerance: float | None = None,
) -> KKTReport:
    """The residuals of the conditions of optimality, at the parameters as they stand.

    Nothing changes: parameters, `p.grad`, buffers and random state are as before afterwards. The
    closure runs once, and the constraints are evaluated where it calls `backward()`, as beside
    `Constrained`; `second_order` runs it once more. The Jacobian of `m` constraints takes the
    memory of `m` gradients.

    A multiplier is a price: if `c <= 0` becomes `c <= t`, the least loss changes at the rate `-y`
    in `t`. It is unique only if the gradients of the active constraints are independent.

    Without `multipliers` they are estimated: those that minimize `|grad f + J'y|^2 + |s y|^2`, `s`
    the slacks, with `y >= 0` for inequalities (Nocedal and Wright 2006, "Numerical Optimization",
    equation 19.38; the conditions are in section 12.3, those of second order in 12.5).

    Args:
        closure: The standard closure, a `DatasetClosure`, or a `FunctionalObjective`.
        params: Parameters or groups, as an optimizer takes them, or an optimizer. From its groups
            come `bounds`, `maximize` and `weight_decay`, unless that is decoupled; from a
            `Constrained` optimizer the constraints and multipliers too, where none are given here.
            May be left out beside a `FunctionalObjective`.
        equalities: Functions of what is to be zero, as `Constrained` takes them.
        inequalities: Functions of what is to be zero or less.
        multipliers: Multipliers by the names of the functions, as `Constrained.multipliers` gives
            them, or as one vector with the equalities first; None for estimates. They may have any
            sign: that is reported.
        bounds: Lower and upper bounds of the parameters as optimizers take them. Their multipliers
            are always those that fit best.
        weight_decay: Coefficient of `|theta|^2 / 2` in the loss; by default that of the groups.
        maximize: Whether the loss is maximized; by default as the groups say.
        second_order: Whether to search for the lowest curvature of the Lagrangian along the active
            constraints, which tells a minimum from a saddle. Up to 300 parameters this is exact;
            beyond that it is the Lanczos process with at most 500 products.
        tolerance: The relative residual below which the summary counts a condition as holding; by
            default 1e-6 in float64 and 1e-3 in float32.

    Returns:
        The report. Print it, or see `KKTReport.satisfied`.

    Raises:
        TypeError: The closure or a constraint is not callable, returns the wrong type, or
            multipliers are not numbers.
        ValueError: Multipliers do not fit the constraints, there is no parameter, or another
            argument is out of range.
        RuntimeError: Loss, constraints or their gradients are not finite, or have no graph.

    >>> x = torch.tensor([0.6, 0.8], dtype=torch.float64, requires_grad=True)
    >>> report = kkt_residuals(
    ...     lambda: ((x - torch.tensor([1.2, 1.6])) ** 2).sum(),
    ...     [x],
    ...     inequalities={"ball": lambda: x.square().sum() - 1},
    ...     second_order=True,
    ... )
    >>> report.satisfied(1e-7), round(report.multipliers["ball"].item(), 6), report.verdict
    (True, 1.0, 'minimum')
    """
    functions = None
    if equalities is not None or inequalities is not None:
        functions = ConstraintFunctions(equalities, inequalities)
    elif isinstance(params, Optimizer):
        functions, kept = constraints_of(params)
        multipliers = kept if multipliers is None else multipliers
    return residuals_of(
        closure,
        params,
        functions,
        multipliers,
        {"bounds": bounds, "weight_decay": weight_decay, "maximize": maximize},
        second_order=second_order,
        tolerance=tolerance,
    )


def residuals_of(
    source: Any,
    params: Any,
    functions: ConstraintFunctions | None,
    multipliers: Multipliers = None,
    options: Mapping[str, Any] | None = None,
    *,
    second_order: bool = False,
    tolerance: float | None = None,
) -> KKTReport:
    """See `kkt_residuals`.

    Args:
        source: The closure.
        params: Parameters or groups.
        functions: The constraints; None for none.
        multipliers: None or nothing for estimates.
        options: What takes the place of options of the groups; None in it for nothing.
        second_order: See `kkt_residuals`.
        tolerance: See `kkt_residuals`.
    """
    check_number("tolerance", tolerance, above=0.0, optional=True)
    setting = set_up(source, params, options or {})
    loss = ConstrainedLoss(source, setting.vector, functions, setting.regularization)
    point = loss.first_order()
    inequality = torch.zeros(0, dtype=torch.bool) if functions is None else functions.inequality
    conditions = Conditions(point, inequality, setting.box)
    best = estimated_multipliers(
        point.jacobian,
        point.grad,
        conditions.slack,
        conditions.inequality,
        conditions.at_bounds,
        point.precision,
    )
    given = given_multipliers(multipliers, functions)
    y = best if given is None else given.to(best)
    if tolerance is None:
        tolerance = max(1e-6, 3.0 * point.precision**0.5)
    certificate = _Certificate(setting, functions, conditions, y, best, given is None, tolerance)
    return certificate.report(loss if second_order else None)


class _Certificate:
    """The verdict on a point with its multipliers."""

    def __init__(
        self,
        setting: Setting,
        functions: ConstraintFunctions | None,
        conditions: Conditions,
        y: Tensor,
        best: Tensor,
        estimated: bool,
        tolerance: float,
    ) -> None:
        self.setting, self.functions, self.conditions = setting, functions, conditions
        self.y, self.estimated, self.tolerance = y, estimated, tolerance
        self.found = conditions.all(y)
        self.worst = words.worst_of(self.found)
        self.largest = self.found[self.worst].relative
        self.with_estimates = max(c.relative for c in conditions.all(best).values())
        precision = conditions.point.precision
        # The square root of the residual identifies the active constraints near a solution
        # (Facchinei, Fischer and Kanzow 1998).
        floor = max(1e-8, precision**0.5)
        self.identifies = min(max(self.largest**0.5, floor), 1e3 * floor)
        self.active = conditions.active(self.identifies)
        self.slope = conditions.slope(y)
        held = torch.zeros_like(self.slope, dtype=torch.bool)
        if conditions.at_bounds is not None:
            held = conditions.at_bounds.low | conditions.at_bounds.high
        self.at_bound = held
        rows = conditions.point.jacobian[self.active | ~conditions.inequality]
        self.n_rows, self.rank = len(rows), row_space(rows * ~held, precision).shape[1]

    @property
    def dependent(self) -> bool:
        """True if the gradients of active constraints are dependent."""
        return self.rank < self.n_rows

    def report(self, loss: ConstrainedLoss | None) -> KKTReport:
        """The report.

        Args:
            loss: For second derivatives; None for none.
        """
        holds = self.largest <= self.tolerance
        second = None if loss is None else self._second(loss)
        numbers = {name: condition.value for name, condition in self.found.items()}
        found: dict[str, Any] = {name: numbers[name] for name in numbers}
        held = self.conditions.held(self.slope)
        direction = None if second is None else second.direction
        return KKTReport(
            summary=self._summary(second, holds),
            loss=self.conditions.point.loss,
            **found,
            relative={name: condition.relative for name, condition in self.found.items()},
            where={name: self._where(name, c) for name, c in self.found.items()},
            multipliers=self._split(self.y),
            estimated=self.estimated,
            values=self._split(self.conditions.point.values),
            equalities=self._equalities(),
            active=tuple(self._constraint(i) for i in self.active.nonzero().flatten().tolist()),
            rank=self.rank,
            dependent=self.dependent,
            bound_multipliers={} if self.setting.box is None else self._named(held),
            verdict=second.verdict if second is not None and holds else None,
            curvature=None if second is None else second.curvature,
            direction={} if direction is None else self._named(direction),
            tolerance=self.tolerance,
        )

    def _second(self, loss: ConstrainedLoss) -> SecondOrder:
        conditions, y = self.conditions, self.y
        jacobian, inequality = conditions.point.jacobian, conditions.inequality
        size = conditions.size(y)
        pulls = y * conditions.steepness > self.identifies * size
        pushed = self.slope.abs() > self.identifies * size
        loose = torch.zeros_like(self.slope)
        if conditions.at_bounds is not None:
            loose[conditions.at_bounds.low & ~pushed] = 1.0
            loose[conditions.at_bounds.high & ~pushed] = -1.0
        return second_order(
            loss.lagrangian(y),
            jacobian[~inequality | (self.active & pulls)],
            jacobian[self.active & ~pulls],
            self.at_bound & pushed,
            loose,
            conditions.point.precision,
        )

    def _summary(self, second: SecondOrder | None, holds: bool) -> str:
        told = self.worst
        if contradicts := self.conditions.contradict(self.tolerance):
            told = "feasibility"  # until that is solved, the others say little
        sentence = "" if holds else self._sentence(told)
        clauses = [words.verdict(self.found, self.tolerance, told, sentence)]
        if contradicts:
            clauses.append(words.CONTRADICTION)
        if self.dependent:
            clauses.append(words.on_dependence(self.n_rows, self.rank))
        if second is not None:
            clauses.append(words.on_second_order(second, holds, self.dependent, self._entry))
        return "; ".join(clauses)

    def _sentence(self, name: Name) -> str:
        """A clause on a condition that is violated."""
        condition = self.found[name]
        if name == "stationarity":
            return words.on_stationarity(
                condition, self._entry, self.estimated, self.with_estimates
            )
        if name == "feasibility":
            return words.on_feasibility(condition, self.conditions, self._constraint, self._entry)
        if name == "signs":
            return words.on_signs(condition, self._constraint)
        return words.on_complementarity(condition, self.conditions, self.y, self._constraint)

    def _where(self, name: Name, condition: Condition) -> str:
        m = len(self.y)
        if condition.index < 0:
            return ""
        if name == "stationarity":
            return self._entry(condition.index)
        if condition.index >= m:
            return self._entry(condition.index - m)
        return self._constraint(condition.index)

    def _constraint(self, index: int) -> str:
        assert self.functions is not None
        return self.functions.name(index)

    def _entry(self, index: int) -> str:
        vector = self.setting.vector
        pieces = vector.pieces(torch.zeros(vector.size, dtype=vector.dtype, device=vector.device))
        for name, piece, (start, stop, _) in zip(
            self.setting.names, pieces, vector.slots(), strict=True
        ):
            if index < stop:
                return _indexed(name, torch.Size(piece.shape), index - start)
        raise IndexError(index)

    def _equalities(self) -> tuple[str, ...]:
        inequality = self._split(self.conditions.inequality.double())
        return tuple(name for name, mask in inequality.items() if not bool(mask.any()))

    def _split(self, vector: Tensor) -> dict[str, Tensor]:
        return {} if self.functions is None else self.functions.split(vector.cpu())

    def _named(self, vector: Tensor) -> dict[str, Tensor]:
        whole = self.setting.vector
        pieces = whole.pieces(vector.to(whole.device, whole.dtype))
        return dict(zip(self.setting.names, pieces, strict=True))


def _indexed(name: str, shape: torch.Size, index: int) -> str:
    where = [int(i) for i in torch.unravel_index(torch.tensor(index), shape)]
    return f"{name}[{', '.join(map(str, where))}]" if where else name


def _entries(parts: Mapping[str, Tensor]) -> list[tuple[str, float]]:
    return [
        (_indexed(name, part.shape, i), value)
        for name, part in parts.items()
        for i, value in enumerate(part.reshape(-1).tolist())
    ]


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(w) for cell, w in zip(others[:-1], widths[1:-1], strict=True)]
        lines.append("    " + "  ".join([*cells, others[-1]]).rstrip())
    return "\n".join(lines)
