"""The constraints of an optimizer with their multipliers and penalties.

Optimizers that take a step's constraints into account themselves read values and Jacobian here:
every evaluation of the closure records them, and the optimizer reads them after each evaluation, as
it reads loss and gradient from the `Evaluation`. For all others the augmented Lagrangian's term is
made here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._autograd.vectorized import Parts
from torch_secondorder._objective.base import Objective
from torch_secondorder.constraints._functions import ConstraintFunctions
from torch_secondorder.constraints._lagrangian import (
    Signs,
    augmented,
    inverses,
    is_slow,
    next_multipliers,
    shortfalls,
)
from torch_secondorder.constraints._rows import jacobian_rows


class Program:
    """The constraints of an optimizer, with its multipliers.

    Args:
        functions: The constraints.

    Attributes:
        multipliers: `(m,)`; None before the first evaluation. Those of inequalities are not
            negative. The Lagrangian is `loss + multipliers @ values`. For optimizers that take
            constraints themselves it is float64 on the CPU, otherwise where the values are.
        penalties: `(m,)`, likewise.
        values: Those of the last evaluation, `(m,)`, likewise.
        tolerance: Violations up to here count as none; None for the optimizer's choice.
        before: The shortfalls at the last update of the multipliers, see `shortfalls`.
        slow: A mask of the constraints whose violation had not fallen enough there, `(m,)`.
        restoration: The progress of the violation, `(3,)`, for optimizers that take constraints
            themselves; None if there is none to report.
        may_refuse: Whether an optimizer that takes constraints itself may refuse these.
    """

    def __init__(self, functions: ConstraintFunctions) -> None:
        self.functions = functions
        self.multipliers: Tensor | None = None
        self.penalties: Tensor | None = None
        self.values: Tensor | None = None
        self.before: Tensor | None = None
        self.slow: Tensor | None = None
        self.restoration: Tensor | None = None
        self.tolerance: float | None = None
        self.may_refuse = False
        self._rows: Parts = []
        self._recorded: Tensor | None = None
        self._signs: Signs | None = None
        # Half the penalties and minus their inverses; the floor of values; made when needed.
        self._of_penalties: tuple[Tensor, Tensor] | None = None
        self._floor: Tensor | None = None

    # For optimizers that take constraints themselves.

    def record(self, values: Tensor, params: Sequence[Tensor]) -> None:
        """Keeps values and Jacobian of an evaluation, before its graph is freed.

        Args:
            values: `(m,)`, with their graph.
            params: What the Jacobian is by: the trainable parameters in the optimizer's order.
        """
        self._rows = jacobian_rows(values, params)
        self._recorded = values.detach()

    def linearized(self, objective: Objective) -> tuple[Tensor, Tensor]:
        """Values `(m,)` and Jacobian `(m, n)` of the last evaluation, in the work space.

        They are means over the ranks, and on the device of the parameters.

        Args:
            objective: What was evaluated.
        """
        vector, values = objective.vector, self._recorded
        assert values is not None
        jacobian = vector.scaled(vector.gather(self._rows, (len(values),)))
        values = values.to(
            vector.device, torch.promote_types(values.dtype, vector.dtype), copy=True
        )
        return objective.ranks.average_(values), objective.ranks.average_(jacobian.contiguous())

    # For all others.

    def fits(self, like: Tensor) -> bool:
        """True if multipliers are there, of the dtype of some values and on their device."""
        y = self.multipliers
        return (
            y is not None
            and self._signs is not None
            and y.dtype == like.dtype
            and y.device == like.device
        )

    def set_up(self, like: Tensor, penalty: float) -> None:
        """Makes multipliers and penalties where there are none; moves them to where values are.

        Args:
            like: A tensor of the wanted dtype and device.
            penalty: The penalties at the start.
        """
        size, (dtype, device) = self.functions.size, (like.dtype, like.device)
        if self.multipliers is None:
            self.multipliers = torch.zeros(size)
        if self.penalties is None:
            self.penalties = torch.full((size,), penalty, dtype=torch.float64)
        self.multipliers = self.multipliers.to(device, dtype)
        self.penalties = self.penalties.to(device, dtype)
        if self.before is not None:
            self.before = self.before.to(device, dtype)
        if self.slow is not None:
            self.slow = self.slow.to(device)
        self._signs = Signs(self.functions.inequality, like)
        self.changed()

    def changed(self) -> None:
        """Makes the next term anew: multipliers or penalties were changed."""
        self._of_penalties = self._floor = None

    def set(self, kind: str, given: Mapping[str, Any]) -> None:
        """Sets some multipliers or penalties.

        Args:
            kind: `"multipliers"` or `"penalties"`.
            given: Tensors or numbers, by the names of the functions.

        Raises:
            TypeError: One is no number; nothing has changed.
            ValueError: One does not fit; nothing has changed.
        """
        now = getattr(self, kind)
        parts = self.functions.split(now.clone())
        signs = self.functions.split(self.functions.inequality)
        for name, value in given.items():
            try:
                new = torch.as_tensor(value, dtype=now.dtype, device=now.device).detach()
            except (TypeError, ValueError, RuntimeError):
                raise TypeError(
                    f"the {kind} of {name} must be a number or a tensor of shape "
                    f"{tuple(parts[name].shape)}, got {value!r}"
                ) from None
            part = parts[name]
            if new.dim() and new.shape != part.shape:
                raise ValueError(
                    f"the {kind} of {name} must be a number or of shape {tuple(part.shape)}, got "
                    f"shape {tuple(new.shape)}"
                )
            if not new.isfinite().all():
                raise ValueError(f"the {kind} of {name} must be finite, got {value!r}")
            if (kind == "penalties" or bool(signs[name].any())) and (new < 0).any():
                raise ValueError(f"the {kind} of {name} must not be negative, got {value!r}")
            part.copy_(new.expand(part.shape))
        setattr(self, kind, torch.cat([part.reshape(-1) for part in parts.values()]))
        self.restoration = None
        self.changed()

    def term(self, values: Tensor) -> Tensor:
        """The term of the augmented Lagrangian, 0-dim, with the graph of the values."""
        assert self.multipliers is not None
        half, _ = self._parts()
        return augmented(values, self.multipliers, half, self._floor)

    def squares(self, values: Tensor, mark: Callable[[Tensor], Tensor]) -> Tensor:
        """The same term as a sum of squares, for optimizers that ask for residuals.

        Args:
            values: `(m,)`, with their graph.
            mark: Tells the optimizer what the residuals are.
        """
        assert self.multipliers is not None and self.penalties is not None
        half, inverse = self._parts()
        if self._floor is not None:
            values = torch.maximum(values, self._floor)
        shift = self.multipliers * inverse
        residuals = mark((values - shift) * half.sqrt())
        return residuals.square().sum() - (shift.square() * half).sum()

    def seeds(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The term's derivative by the values, the next multipliers; and the term.

        Args:
            values: `(m,)`, without a graph.
        """
        y, rho = self.multipliers, self.penalties
        assert y is not None and rho is not None
        return next_multipliers(values, y, rho, self.signs), self.term(values)

    @property
    def signs(self) -> Signs:
        """The signs of multipliers."""
        assert self._signs is not None
        return self._signs

    def _parts(self) -> tuple[Tensor, Tensor]:
        """The parts of a term, see `_of_penalties`; makes the floor as well."""
        assert self.multipliers is not None and self.penalties is not None
        if self._of_penalties is None:
            self._of_penalties = 0.5 * self.penalties, inverses(self.penalties)
        if self._floor is None and not self.signs.free:
            self._floor = self.signs.floor(self.multipliers, self._of_penalties[1])
        return self._of_penalties

    def ascend(self, rate: float | Tensor, most: float | None = None) -> None:
        """Moves the multipliers along the last values.

        Args:
            rate: The step: a number, or the penalties for the method of multipliers.
            most: The largest multiplier; None for no limit.
        """
        assert self.multipliers is not None and self.values is not None
        following = next_multipliers(self.values, self.multipliers, rate, self.signs)
        self.multipliers = following if most is None else following.clamp_(-most, most)
        self._floor = None

    def update(self, tolerance: float, most_penalty: float, most: float | None) -> None:
        """Makes an update of the method of multipliers, at the solution of a subproblem.

        Args:
            tolerance: Violations up to here are not to raise penalties.
            most_penalty: The largest penalty.
            most: The largest multiplier; None to leave the multipliers alone.
        """
        y, rho, values = self.multipliers, self.penalties, self.values
        assert y is not None and rho is not None and values is not None
        self._parts()
        now = shortfalls(values, self._floor)
        before = torch.full_like(now, inf) if self.before is None else self.before
        self.slow = is_slow(now, before, tolerance)
        if most is not None:
            self.ascend(rho, most)
        self.before = now
        self.stiffen(self.slow, most_penalty)

    def stiffen(self, which: Tensor, most_penalty: float) -> None:
        """Makes some penalties ten times as large.

        Args:
            which: A mask, `(m,)`.
            most_penalty: The largest penalty; one that is larger already stays.
        """
        rho = self.penalties
        assert rho is not None
        larger = torch.maximum(rho, (10 * rho).clamp(max=most_penalty))
        self.penalties = torch.where(which, larger, rho)
        self.changed()

    def suspicion(self, violated: Tensor, tolerance: float, much: float) -> str:
        """A sentence on constraints that cannot be kept, it seems; otherwise nothing.

        Args:
            violated: The violations now, `(m,)`.
            tolerance: Violations up to here count as none.
            much: A penalty that is worth a note if it was raised so far in vain.
        """
        rho, y, slow = self.penalties, self.multipliers, self.slow
        if rho is None or y is None or slow is None:
            return ""
        violated = violated.to(slow.device)
        rose = slow & (rho >= much) & (violated > tolerance)
        if not rose.any():
            return ""
        at = int(torch.where(rose, violated, -1.0).argmax())
        return (
            f"the violation {violated[at]:.3g} of {self.functions.name(at)} stays, although its "
            f"penalty has risen to {rho[at]:.3g} and its multiplier to {y[at]:.3g}: the "
            "constraints may contradict each other, or the parameters are at a local minimum of "
            "the violation"
        )

    # Checkpoints.

    def state(self) -> dict[str, Any]:
        """Names and shapes of the constraints, with all that training goes on from."""
        functions = self.functions
        shapes = None if functions.shapes is None else [tuple(s) for s in functions.shapes]
        return {"names": list(functions.names), "shapes": shapes, **self.kept()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes over a state, see `state`."""
        if state["shapes"] is not None:
            self.functions.shapes = [torch.Size(shape) for shape in state["shapes"]]
        self.take(state)
        self.values = self._signs = None

    def kept(self) -> dict[str, Any]:
        """Multipliers and penalties, with what their updates go on from; see `take`."""
        return {name: getattr(self, name) for name in _STATE}

    def take(self, kept: Mapping[str, Any]) -> None:
        """Goes back to what was kept.

        Args:
            kept: See `kept`.
        """
        for name in _STATE:
            setattr(self, name, kept[name])
        self.changed()

    def check(self, state: Mapping[str, Any]) -> None:
        """Raises a ValueError if a state is of other constraints."""
        names, found = self.functions.names, state["shapes"]
        if state["names"] != names:
            raise ValueError(
                f"the state is of constraints {state['names']}, and these are {names}: load it "
                "into a Constrained with the same constraints, or load only that of the optimizer "
                "inside (without its entry 'constrained'); nothing has changed"
            )
        known = self.functions.shapes
        if known is not None and found is not None and known != list(map(torch.Size, found)):
            raise ValueError(
                f"the state is of constraints of shapes {found}, and these have "
                f"{[tuple(shape) for shape in known]}: every entry has a multiplier; nothing has "
                "changed"
            )


_STATE = ("multipliers", "penalties", "before", "slow", "restoration")
