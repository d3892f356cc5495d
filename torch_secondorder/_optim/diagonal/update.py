"""Per-block step inputs and finiteness checks."""

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
from torch_secondorder._params.vector import ParameterVector


class FiniteCheck:
    """A check of loss, gradients and estimate for infinity and NaN.

    On a CPU the result is known at once. On a device it stays there: the update then multiplies by
    weights of zero or one, and nothing waits.

    Args:
        outcome: Loss and gradients.
        estimate: The new estimate of the diagonal, if there is one.
        inverse_scale: A factor for the gradients, multiplied in place; None for one.
        on_device: Whether the result stays on the device.
        space: Where gradients and estimate live.

    Attributes:
        on_device: The same.
        failed: Whether loss or gradients are known not to be finite.
        estimate_failed: Whether these or the estimate are.
        weight: One, or on a device zero if loss or gradients are not finite.
        estimate_weight: One, or on a device zero if these or the estimate are not finite.
        moves: For each block one, or on a device zero if it did not move.
    """

    def __init__(
        self,
        outcome: Outcome,
        estimate: Tensor | None,
        inverse_scale: Tensor | None,
        on_device: bool,
        space: Space = WHOLE,
    ) -> None:
        self.on_device = on_device
        self.failed = self.estimate_failed = False
        self.weight: Number = 1.0
        self.estimate_weight: Number = 1.0
        self.moves: list[Number] = []
        self._bad: Tensor | None = None  # zero if loss and gradients are finite
        self._estimate_bad: Tensor | None = None
        loss, whole = outcome.loss, outcome.whole
        if not on_device and loss is not None and whole is not None and estimate is not None:
            # One pass over both: a product that is finite has no infinity and no NaN in it.
            same = whole.dtype == estimate.dtype
            if same and math.isfinite(torch.dot(whole, estimate) + loss):
                return
        found = (
            [whole]
            if whole is not None
            else [as_real(g) for g in outcome.gradients if g is not None]
        )
        bad = nonfinite(found, inverse_scale)
        if inverse_scale is not None:  # NaN where infinity was found elsewhere
            bad = bad + torch.isnan(inverse_scale).to(bad)
        if loss is not None:
            bad = bad + (~torch.isfinite(loss)).to(bad)
        if estimate is None:
            self._bad = space.total(bad)
        else:
            self._bad, more = space.totals(bad, nonfinite([estimate]).to(bad.device))
            self._estimate_bad = self._bad + more.to(self._bad.device)
        if on_device:
            self.weight = self.estimate_weight = _in_double(self._bad == 0)
            if self._estimate_bad is not None:
                self.estimate_weight = _in_double(self._estimate_bad == 0)
        else:
            self.failed = bool(self._bad)
            self.estimate_failed = self.failed or bool(self._estimate_bad)

    @property
    def status(self) -> StepStatus:
        """The status of the step; waits for the device."""
        if self._bad is not None and bool(self._bad):
            return StepStatus.NONFINITE_START
        estimate_bad = self._estimate_bad is not None and bool(self._estimate_bad)
        if self.moved:
            return StepStatus.MOVED_ON_OLD_CURVATURE if estimate_bad else StepStatus.MOVED
        return StepStatus.NONFINITE_PRODUCTS if estimate_bad else StepStatus.NO_CURVATURE

    @property
    def moved(self) -> bool:
        """True if any parameter moved; waits for the device."""
        return any(bool(moves) for moves in self.moves)


class StepInputs:
    """Gradient and estimate of one step for one block.

    Making them counts the step. If the step is not to be made, and only the device knows, `lr` and
    `estimate_weight` are zero there, and gradient and estimate are zeros.

    Args:
        block: The block.
        gradients: The gradients of all trainable parameters.
        whole: The same as one vector, if there is one.
        diagonal: The new estimate for all of them, if there is one; may be overwritten.
        vector: The vector of the parameters, which the estimate is in.
        check: The check of all this.

    Attributes:
        lr: The learning rate of the group.
        estimate: The new estimate of the block's diagonal, `(n,)`, which may be overwritten; None
            if there is none.
        estimate_weight: One, or on a device zero if the estimate is not to count.
        weight: One, or on a device zero if the block is not to move.
        step: The number of gradients that the block has had, at least one.
        curvature_step: The number of estimates, at least one.
        host_step: See `Block`, this step included; 0 without matrices of blocks.
        on_device: Whether numbers are on the device.
    """

    def __init__(
        self,
        block: Block,
        gradients: Sequence[Tensor | None],
        whole: Tensor | None,
        diagonal: Tensor | None,
        vector: ParameterVector | None,
        check: FiniteCheck,
    ) -> None:
        self._block, self._gradients = block, gradients
        # The gradient as a view, if there is one.
        self._flat = None if whole is None else _slice(whole, block)
        self.on_device = check.on_device
        self.estimate_weight = _on(block.device, check.estimate_weight)
        weight = _on(block.device, check.weight)
        self.estimate: Tensor | None = None
        if diagonal is not None:
            estimate = _slice(diagonal, block)
            if estimate is None:
                assert vector is not None
                estimate = block.join(vector.pieces(diagonal))
            if isinstance(self.estimate_weight, Tensor):
                estimate = torch.where(self.estimate_weight > 0, estimate, 0.0)
            self.estimate = estimate
            block.curvature_step.add_(self.estimate_weight)
        lr = block.group["lr"]
        self.lr: Number
        self.step: Number
        self.curvature_step: Number
        if isinstance(weight, Tensor):
            weight = weight * (block.curvature_step > 0)
            block.step.add_(weight)
            self.lr = lr * weight
            self.step = _in_double(block.step).clamp(min=1)
            self.curvature_step = _in_double(block.curvature_step).clamp(min=1)
        else:
            block.step.add_(weight)
            self.lr = float(lr)
            self.step, self.curvature_step = block.step.item(), block.curvature_step.item()
        self.weight = weight
        self.host_step = 0
        if "host_step" in block.counts:
            self.host_step = int(block.host_step.add_(1.0).item())
        check.moves.append(weight)

    @property
    def gradient(self) -> Tensor:
        """The gradient, `(n,)`, in the precision of the moments."""
        if self._flat is None:
            return self._zeroed_if_bad(self._block.join(self._gradients))
        weight = self.weight
        return (
            torch.where(weight > 0, self._flat, 0.0) if isinstance(weight, Tensor) else self._flat
        )

    @property
    def ordered_gradient(self) -> Tensor:
        """The gradient in block order, `(n,)`, in memory of `block.stacks` that a step reuses."""
        return self._zeroed_if_bad(self._block.gather(self._gradients))

    def _zeroed_if_bad(self, gradient: Tensor) -> Tensor:
        """A copy of the gradient, in place."""
        weight = self.weight
        return gradient.masked_fill_(weight <= 0, 0.0) if isinstance(weight, Tensor) else gradient

    def average_gradient(self, beta: float) -> None:
        """`exp_avg = beta * exp_avg + (1 - beta) * gradient`."""
        block, weight = self._block, (1 - beta) * self.weight
        if isinstance(weight, Tensor):
            gradient = self.gradient
            block.exp_avg.lerp_(gradient, weight.to(gradient.dtype))
        elif self._flat is not None:
            block.exp_avg.lerp_(self._flat, weight)
        else:
            block.average_parts(self._gradients, weight)


def _slice(flat: Tensor, block: Block) -> Tensor | None:
    """The block's share of a vector, as a view; None where it is no view."""
    if block.span is None or flat.dtype != block.dtype or flat.device != block.device:
        return None
    return flat[block.span]


def _on(device: torch.device, number: Number) -> Number:
    """A number on the device of a block: parameters may be on several."""
    return number.to(device) if isinstance(number, Tensor) else number


def _in_double(number: Tensor) -> Tensor:
    """A number on the device in double precision, where the device has that.

    In single precision `1 - 0.999` has four correct digits.
    """
    return number.float() if number.device.type == "mps" else number.double()
