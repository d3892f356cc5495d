"""Runs of `Constrained` around an optimizer on a function of one vector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_secondorder import Constrained

_UNDONE = ("MAX_ITERATIONS", "MAX_EVALUATIONS")


class Run:
    """An optimizer with constraints, and everything that its closure has seen.

    Args:
        kind: The class of the optimizer inside.
        start: Where it begins, `(n,)`.
        function: The loss, of the vector.
        equalities: Of the vector; None for none.
        inequalities: Likewise.
        tolerance: See `Constrained`.
        **more: Arguments of the optimizer inside.
    """

    def __init__(
        self,
        kind: Any,
        start: Tensor,
        function: Any,
        equalities: Any = None,
        inequalities: Any = None,
        tolerance: float | None = None,
        **more: Any,
    ) -> None:
        self.x = start.clone().requires_grad_()
        self.inner = kind([self.x], **more)
        self.constrained = Constrained(
            self.inner,
            None if equalities is None else lambda: equalities(self.x),
            None if inequalities is None else lambda: inequalities(self.x),
            tolerance=tolerance,
        )
        self.function = function
        self.seen: list[Tensor] = []

    def closure(self) -> Tensor:
        """The standard closure; notes where the parameters are."""
        self.seen.append(self.x.detach().clone())
        self.constrained.zero_grad()
        loss: Tensor = self.function(self.x)
        loss.backward()
        return loss

    def converge(self, steps: int = 50) -> Any:
        """Steps until one ends for another reason than its budget."""
        for _ in range(steps):
            self.constrained.step(self.closure)
            if self.status not in _UNDONE:
                break
        return self

    @property
    def status(self) -> str:
        """The name of the last step's status."""
        return str(self.inner.info.status.name)

    def multipliers(self, name: str) -> Tensor:
        """The multipliers of a function; none where there is no such function."""
        return self.constrained.multipliers.get(name, torch.zeros(0, dtype=torch.float64))
