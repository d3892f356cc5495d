"""What one step sees, and whether it can stand on it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_secondorder._objective.one_shot import Outcome
from torch_secondorder._optim.diagonal.blocks import Block, Number, nonfinite
from torch_secondorder._optim.info import StepStatus
from torch_secondorder._optim.state import as_real
from torch_secondorder._params.space import WHOLE, Space

__all__ = ["FiniteCheck", "StepInputs", "correction", "judge"]


class FiniteCheck:
    """Whether what a step stands on is finite: known, or left on the device.

    Args:
        bad: Zero if loss and gradients are finite, 0-dim, on the device.
        on_device: Whether it is not to be looked at before somebody reads the report.

    Attributes:
        known_bad: Whether it was looked at and is not finite.
        curvature_known_bad: The same for a new estimate of the curvature.
        looked: Whether there was a new estimate of the curvature.
        moving: For each block one, or zero on a device for one that did not move.
    """

    def __init__(self, bad: Tensor, on_device: bool) -> None:
        self.on_device = on_device
        self._bad = self._curvature_bad = bad
        self.known_bad = self.curvature_known_bad = not on_device and bool(bad)
        self.looked = False
        self.moving: list[Number] = []

    def add_curvature(self, bad: Tensor) -> None:
        """Takes in whether a new estimate of the curvature is finite, zero if so."""
        self.looked = True
        self._curvature_bad = self._bad + bad.to(self._bad.device)
        self.curvature_known_bad = not self.on_device and bool(self._curvature_bad)

    def masks(self) -> tuple[Number, Number]:
        """One, or zero on a device, for gradients and for a new estimate of the curvature."""
        if not self.on_device:
            return 1.0, 1.0
        return _wide(self._bad == 0), _wide(self._curvature_bad == 0)

    @property
    def status(self) -> StepStatus:
        """How the step ended; waits for the device."""
        if bool(self._bad):
            return StepStatus.NONFINITE_START
        fine = not bool(self._curvature_bad)
        if self.moved:
            return StepStatus.MOVED if fine else StepStatus.MOVED_ON_OLD_CURVATURE
        return StepStatus.NO_CURVATURE if fine else StepStatus.NONFINITE_PRODUCTS

    @property
    def moved(self) -> bool:
        """Whether any parameter moved; waits for the device."""
        return any(bool(moves) for moves in self.moving)


def judge(
    outcome: Outcome,
    estimate: Tensor | None,
    inverse_scale: Tensor | None,
    on_device: bool,
    space: Space = WHOLE,
) -> FiniteCheck:
    """Looks whether all is finite, and takes a scale out of the gradients.

    Args:
        outcome: Loss and gradients.
        estimate: Of the diagonal, if there is one.
        inverse_scale: What the gradients are multiplied by, in place.
        on_device: Whether nothing is to be read.
        space: Where gradients and estimate live.
    """
    loss, whole = outcome.loss, outcome.whole
    if not on_device and loss is not None and whole is not None and estimate is not None:
        # One pass over both: no infinity and no NaN comes out of a product finite.
        same = whole.dtype == estimate.dtype
        if same and math.isfinite(torch.dot(whole, estimate) + loss):
            return FiniteCheck(torch.zeros(()), on_device)
    found = (
        [whole] if whole is not None else [as_real(g) for g in outcome.gradients if g is not None]
    )
    bad = nonfinite(found, inverse_scale)
    if inverse_scale is not None:  # NaN where infinity was found elsewhere
        bad = bad + torch.isnan(inverse_scale).to(bad)
    if loss is not None:
        bad = bad + (~torch.isfinite(loss)).to(bad)
    if estimate is None:
        return FiniteCheck(space.total(bad), on_device)
    bad, curvature_bad = space.totals(bad, nonfinite([estimate]).to(bad.device))
    verdict = FiniteCheck(bad, on_device)
    verdict.add_curvature(curvature_bad)
    return verdict


class StepInputs:
    """What one step shows to a block, counted. Zero weights on a device stand for a step not made.

    Args:
        block: The block.
        gradients: Of all trainable parameters.
        whole: The same as one vector, if there is one.
        estimate: Of the diagonal for the block, may be overwritten; None for none.
        verdict: Whether all this is finite.

    Attributes:
        estimate: See above; zeros on a device where it is not finite.
        step: How many gradients the block has seen, this one included.
        curvature_step: The same for estimates of the curvature.
        bends: One, or zero on a device if the estimate is not to count.
        on_device: Whether numbers are on the device.
    """

    def __init__(
        self,
        block: Block,
        gradients: Sequence[Tensor | None],
        whole: Tensor | None,
        estimate: Tensor | None,
        verdict: FiniteCheck,
    ) -> None:
        self._block = block
        self._gradients, self._whole = gradients, whole
        self.estimate = estimate
        self.on_device = verdict.on_device
        self._moves, self.bends = verdict.masks()
        if isinstance(self.bends, Tensor) and estimate is not None:
            self.estimate = torch.where(self.bends > 0, estimate, 0.0)
        if estimate is not None:
            block.curvature_step.add_(self.bends)
        if isinstance(self._moves, Tensor):  # not without any curvature
            self._moves = self._moves * (block.curvature_step > 0)
        block.step.add_(self._moves)
        verdict.moving.append(self._moves)
        read = _wide if verdict.on_device else Tensor.item
        self.step: Number = read(block.step)
        self.curvature_step: Number = read(block.curvature_step)

    def average_gradient(self, beta: float) -> None:
        """`exp_avg = beta * exp_avg + (1 - beta) * gradient`."""
        weight = (1 - beta) * self._moves
        self._block.average_gradient(self._whole, self._gradients, weight)

    def rate(self, lr: float | Tensor) -> Number:
        """The learning rate; zero on a device for a step not made."""
        return lr * self._moves if isinstance(self._moves, Tensor) else float(lr)


def _wide(number: Tensor) -> Tensor:
    """A number on the device in double precision, where the device has it.

    In single precision `1 - 0.999` is known to four digits.
    """
    return number.float() if number.device.type == "mps" else number.double()


def correction(beta: float, count: Number) -> Number:
    """`1 - beta ** count`, kept from zero on a device where nothing was counted."""
    value = 1 - beta**count
    return value.clamp(min=1e-12) if isinstance(value, Tensor) else value
