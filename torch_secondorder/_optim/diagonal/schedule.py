"""The steps at which the curvature is estimated."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._optim.diagonal.blocks import BlockLayout
from torch_secondorder._optim.diagonal.update import FiniteCheck
from torch_secondorder._optim.state import Number, Random


class EstimateSchedule:
    """Decides which steps estimate the curvature.

    Each `period`-th step does, and the first `warm_up` steps, if that is not more than a period.
    Other steps do if they have to, out of turn: a parameter was added or thawed, or had no gradient
    at the last estimate, or an estimate failed. New parameters have a warm-up as well.

    Args:
        warm_up: The number of first steps that all estimate.
        active: Whether the optimizer estimates the curvature at all.

    Attributes:
        steps: The number of steps that moved something.
        out_of_turn: The number of coming steps that estimate out of turn.
        trained: The trainable parameters at the last of these steps, frozen ones left out; None
            before the first.
    """

    def __init__(self, warm_up: int = 1, *, active: bool = True) -> None:
        self._warm_up, self._active = warm_up, active
        self.steps = 0
        self.out_of_turn = 0
        self.trained: Sequence[Tensor] | None = None
        self._unconfirmed: FiniteCheck | None = None  # of a step that moved something, or nothing
        self._has_moved = False

    def warm_up(self, group: dict[str, Any]) -> int:
        """The number of first steps of a parameter that all estimate the curvature.

        Args:
            group: The hyperparameters.
        """
        return min(int(group["update_period"]), self._warm_up)

    def is_settled(self, params: Sequence[Tensor]) -> bool:
        """True if steps follow their turns from now on: no warm-up, nobody waits for a curvature.

        Args:
            params: The trainable parameters.
        """
        if self._active and (self._unconfirmed is not None or not self._has_moved):
            return False
        return self.steps >= max(1, self._warm_up) and not self.is_out_of_turn(params)

    def is_due(self, params: Sequence[Tensor], group: dict[str, Any]) -> bool:
        """True if the next step estimates the curvature.

        Args:
            params: The trainable parameters.
            group: The hyperparameters; `update_period` counts from one estimate to the next.
        """
        if not params or not self._active:
            return False
        if self._unconfirmed is not None:
            self.confirm(params)
        steps, period = self.steps, int(group["update_period"])
        if steps % period == 0 or (steps < period and steps < self._warm_up):
            return True
        return self.is_out_of_turn(params)

    def is_out_of_turn(self, params: Sequence[Tensor]) -> bool:
        """True if some parameter cannot wait until an estimate comes in turn."""
        return self.out_of_turn > 0 or self.has_new(params)

    def has_new(self, params: Sequence[Tensor]) -> bool:
        """True if some of the parameters were not trained at the last step, if there was one."""
        trained = self.trained
        if trained is None or (len(params) == len(trained) and all(map(is_, params, trained))):
            return False
        return not {id(p) for p in trained}.issuperset(map(id, params))

    def count(
        self,
        params: Sequence[Tensor],
        group: dict[str, Any],
        check: FiniteCheck,
        layout: BlockLayout,
    ) -> bool:
        """Counts a step that moved something.

        Args:
            params: The trainable parameters.
            group: The hyperparameters.
            check: The check of the step, which may turn out to have moved nothing.
            layout: The blocks of the step, which tell whether parameters wait for an estimate.

        Returns:
            See `is_due`.
        """
        if layout.got_curvature or self.has_new(params):
            self.out_of_turn = self.warm_up(group) - 1  # this step is the first of them
        elif self.out_of_turn:
            self.out_of_turn -= 1
        if layout.lacks_curvature:
            # Until the parameter has a gradient at an estimate, or an estimate comes in turn.
            self.out_of_turn = int(group["update_period"])
        self.trained = params
        self.steps += 1
        if check.on_device and not self._has_moved:
            self._unconfirmed = check
        return self.is_due(params, group)

    def repeat(self) -> bool:
        """Lets the next step estimate, in turn or not; says whether it does."""
        self.out_of_turn = max(self.out_of_turn, 1)
        return self._active

    def confirm(self, params: Sequence[Tensor]) -> None:
        """Takes back a step on a device that turned out to have moved nothing; waits for it once.

        Without any curvature no step moves, so the next one has to estimate. On the CPU such a step
        is not counted in the first place.

        Args:
            params: The trainable parameters.
        """
        check = self._unconfirmed
        if check is None or any(map(capturing, params[:1])):
            return
        self._unconfirmed = None
        self._has_moved = check.moved
        if not self._has_moved:
            self.steps -= 1
            self.repeat()


class OutOfTurn(Number):
    """Steps that estimate out of turn; parameters thawed since the last step need some."""

    def save(self, optimizer: Any) -> dict[str, Any]:
        """See `ModelField.save`."""
        schedule = optimizer._schedule
        new = schedule.has_new(optimizer._trainable)
        least = schedule.warm_up(optimizer.param_groups[0]) if new else 0
        return {self.name: max(schedule.out_of_turn, least)}


class GeneratorBefore(Random):
    """The generator as it was before an observation, which is not saved."""

    def save(self, optimizer: Any) -> dict[str, Any]:
        """See `ModelField.save`."""
        before = optimizer._generator_before
        return super().save(optimizer) if before is None else {self.name: before}


def capturing(parameter: Tensor) -> bool:
    """True if a CUDA graph is being captured, which forbids reading numbers on the host."""
    return parameter.is_cuda and torch.cuda.is_current_stream_capturing()
