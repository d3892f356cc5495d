"""The constraints of an optimizer with their multipliers and penalties.

Optimizers that take a step's constraints into account themselves read values and Jacobian here:
every evaluation of the closure records them, and the optimizer reads them after each evaluation, as
it reads loss and gradient from the `Evaluation`. For all others the augmented Lagrangian's term is
made here.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

from torch_secondorder._objective.base import Objective
from torch_secondorder.constraints._functions import ConstraintFunctions
from torch_secondorder.constraints._lagrangian import (
    augmented,
    floor_of,
    lower_bounds,
    next_multipliers,
    raised,
    shortfalls,
)


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
        before: The shortfalls at the last update of the multipliers, see `shortfalls`.
    """

    def __init__(self, functions: ConstraintFunctions) -> None:
        self.functions = functions
        self.multipliers: Tensor | None = None
        self.penalties: Tensor | None = None
        self.values: Tensor | None = None
        self.before: Tensor | None = None
        self._rows: list[Sequence[Tensor | None]] = []
        # What a term is made of: least multipliers; half the penalties and the floor of values.
        self._lower: Tensor | None = None
        self._terms: tuple[Tensor, Tensor | None] | None = None

    # For optimizers that take constraints themselves.

    def record(self, values: Tensor, params: Sequence[Tensor]) -> None:
        """Keeps values and Jacobian of an evaluation, before its graph is freed.

        Args:
            values: `(m,)`, with their graph.
            params: What the Jacobian is by: the trainable parameters in the optimizer's order.
        """
        self._rows = [
            torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
            for value in values.unbind()
        ]
        self.values = values.detach().to("cpu", torch.float64)

    def jacobian(self, objective: Objective) -> Tensor:
        """The Jacobian of the last evaluation in the work space, `(m, n)`."""
        vector = objective.vector
        rows = [vector.scaled(vector.gather(row)) for row in self._rows]
        return torch.stack(rows) if rows else torch.zeros(0, vector.size, dtype=vector.dtype)

    # For all others.

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
        self._lower = lower_bounds(self.functions.inequality, like)
        self.changed()

    def changed(self) -> None:
        """Makes the next term anew: multipliers or penalties were changed."""
        self._terms = None

    @property
    def lower(self) -> Tensor:
        """The least multiplier of each constraint, see `lower_bounds`."""
        assert self._lower is not None
        return self._lower

    def term(self, values: Tensor) -> Tensor:
        """The term of the augmented Lagrangian, 0-dim, with the graph of the values."""
        assert self.multipliers is not None and self.penalties is not None
        if self._terms is None:
            floor = None
            if self.functions.n_equalities < len(values):
                floor = floor_of(self.multipliers, self.penalties, self.lower)
            self._terms = 0.5 * self.penalties, floor
        return augmented(values, self.multipliers, *self._terms)

    def ascend(self, rate: float | Tensor) -> None:
        """Moves the multipliers along the last values.

        Args:
            rate: The step.
        """
        assert self.multipliers is not None and self.values is not None
        self.multipliers = next_multipliers(self.values, self.multipliers, rate, self.lower)
        self.changed()

    def update(
        self, tolerance: float, most_penalty: Tensor, most: float, *, multipliers: bool
    ) -> bool:
        """Makes an update of the method of multipliers, at the solution of a subproblem.

        Args:
            tolerance: Violations up to here are not to raise penalties.
            most_penalty: The largest penalties, `(m,)`.
            most: The largest multiplier.
            multipliers: Whether multipliers are updated, or penalties alone.

        Returns:
            Whether a penalty was raised.
        """
        y, rho, values = self.multipliers, self.penalties, self.values
        assert y is not None and rho is not None and values is not None
        now = shortfalls(values, floor_of(y, rho, self.lower))
        before = torch.full_like(now, inf) if self.before is None else self.before
        self.penalties = raised(rho, now, before, tolerance, most_penalty)
        if multipliers:
            following = next_multipliers(values, y, rho, self.lower)
            self.multipliers = following.clamp(-most, most)
        self.before = now
        self.changed()
        return not torch.equal(self.penalties, rho)
