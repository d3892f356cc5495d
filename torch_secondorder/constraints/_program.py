"""The constraints of a step, for optimizers that take a step's constraints into account themselves.

Every evaluation of the closure records the values of the constraints and their Jacobian here. The
optimizer reads them after each evaluation, as it reads loss and gradient from the `Evaluation`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_secondorder._objective.base import Objective
from torch_secondorder.constraints._functions import ConstraintFunctions


class Program:
    """The constraints of an optimizer, with its multipliers.

    Args:
        functions: The constraints.

    Attributes:
        multipliers: `(m,)`, float64 on the CPU; None before the first evaluation. Those of
            inequalities are not negative. The Lagrangian is `loss + multipliers @ values`.
        penalties: `(m,)`, likewise.
        values: Those of the last evaluation, `(m,)`, float64 on the CPU.
    """

    def __init__(self, functions: ConstraintFunctions) -> None:
        self.functions = functions
        self.multipliers: Tensor | None = None
        self.penalties: Tensor | None = None
        self.values: Tensor | None = None
        self._rows: list[Sequence[Tensor | None]] = []

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
