"""The course of one subproblem: an augmented Lagrangian that several steps may minimize."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_secondorder._optim.info import StepInfo, StepStatus

#: A subproblem is solved once its gradient has fallen to this share of that at its start.
_ACCURACY = 0.01
#: Steps, or iterations, after which multipliers are updated all the same: noise may keep the
#: gradient up.
_MOST_STEPS = 30
_MOST_ITERATIONS = 100
#: The fall of the loss that shows a subproblem to have no minimum, in units of its start.
_DEPTH = 100.0
_OUT_OF_BUDGET = (StepStatus.MAX_ITERATIONS, StepStatus.MAX_EVALUATIONS)


class Verdict(Enum):
    """The verdicts on a step: what is to be done after it."""

    GO_ON = "the next step goes on with the same multipliers"
    UPDATE = "the subproblem is solved: multipliers and penalties are due"
    ASCEND = "the subproblem takes long: the multipliers move on without it"
    GO_BACK = "the subproblem falls without end: back to its start, with larger penalties"


class Subproblem:
    """The minimization of an augmented Lagrangian with given multipliers and penalties.

    It is solved accurately enough where the gradient has fallen to a hundredth of that at its
    start. Just after an update that gradient is what the new multipliers have added, so this is a
    relative accuracy, as inexact methods of multipliers ask for (Rockafellar 1973; Eckstein and
    Silva 2013), and knows no units.

    Where penalties are too small, the augmented Lagrangian may have no minimum although the problem
    has one. Then the loss falls by far more than its size at the start, while constraints are
    violated more and more.

    Attributes:
        steps: Steps so far.
        iterations: Their iterations.
    """

    def __init__(self) -> None:
        self.steps = self.iterations = 0
        self._grad_norm = self._loss = self._violation = inf
        self._start: list[Tensor] = []
        self._depth = 0.0  # of the deepest fall that was without end

    def begin(
        self, params: Sequence[Tensor], loss: float, grad_norm: float, violation: float
    ) -> None:
        """Notes the start.

        Args:
            params: The parameters, which are copied.
            loss: The minimized function.
            grad_norm: The largest entry of its gradient.
            violation: The largest violation.
        """
        self._start = [p.detach().clone() for p in params]
        self._loss, self._grad_norm, self._violation = loss, grad_norm, violation

    def judge(self, info: StepInfo, violation: float) -> Verdict:
        """The verdict on a step.

        Args:
            info: The report of the optimizer.
            violation: The largest violation at its end.
        """
        assert info.loss_after is not None and info.grad_norm is not None
        loss, grad_norm = info.loss_after, info.grad_norm
        unbounded = info.status is StepStatus.UNBOUNDED
        ended = info.status not in _OUT_OF_BUDGET
        self.steps += 1
        self.iterations += info.iterations
        if violation > self._violation and self._start:
            fall = self._loss - loss
            if unbounded or fall > max(_DEPTH * max(1.0, abs(self._loss)), 10 * self._depth):
                self._depth = max(self._depth, fall) if fall < inf else self._depth
                return Verdict.GO_BACK
        if ended or grad_norm <= _ACCURACY * self._grad_norm:
            return Verdict.UPDATE
        long = self.steps >= _MOST_STEPS or self.iterations >= _MOST_ITERATIONS
        return Verdict.ASCEND if long else Verdict.GO_ON

    def go_back(self, params: Sequence[Tensor]) -> None:
        """Moves the parameters to where the subproblem began."""
        for p, start in zip(params, self._start, strict=False):
            if p.shape == start.shape:
                p.copy_(start)

    def end(self) -> None:
        """Ends it; the next step begins another one."""
        self.steps = self.iterations = 0
        self._start = []

    def state(self) -> dict[str, Any]:
        """Everything that training goes on from, see `load`."""
        return {name.lstrip("_"): value for name, value in vars(self).items()}

    def load(self, state: dict[str, Any]) -> None:
        """Takes over a state.

        Args:
            state: See `state`.
        """
        for name in vars(self):
            setattr(self, name, state[name.lstrip("_")])


def largest_gradient(params: Sequence[Tensor]) -> float:
    """The largest absolute entry of the gradients."""
    found = [p.grad.abs().max() for p in params if p.grad is not None]
    return torch.stack(found).max().item() if found else inf


def iterations_of(optimizer: Optimizer) -> int:
    """All iterations that PyTorch's L-BFGS has made, which has no report."""
    first = optimizer.param_groups[0]["params"][0]
    return int(optimizer.state[first].get("n_iter", 0)) if first in optimizer.state else 0


def restart(optimizer: Optimizer) -> None:
    """Makes PyTorch's L-BFGS begin anew.

    It would compare the next gradient with its last one, which has the multipliers from before.
    """
    first = optimizer.param_groups[0]["params"][0]
    if first in optimizer.state:
        optimizer.state[first]["n_iter"] = 0
