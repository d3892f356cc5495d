"""What a step that evaluates once reports, made when it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import ReferenceType

from torch import Tensor

from torch_secondorder._objective.one_shot import GradientTrace
from torch_secondorder._optim.diagonal.update import FiniteCheck
from torch_secondorder._optim.info import StepInfo
from torch_secondorder._optim.state import as_real
from torch_secondorder._params.vector import max_norm

__all__ = ["DiagonalInfo", "Effort", "report_of"]


@dataclass(frozen=True, slots=True)
class DiagonalInfo(StepInfo):
    """Report of one step of an optimizer that scales each coordinate by its curvature.

    Attributes:
        products: Products with the curvature.
    """

    products: int = 0


class Effort(NamedTuple):
    """What a step took."""

    evaluations: int
    products: int


def report_of(
    owner: ReferenceType[Any],
    verdict: FiniteCheck,
    loss: Tensor | None,
    params: Sequence[Tensor],
    trace: GradientTrace,
    effort: Effort,
    numbers: Tensor | None = None,
) -> DiagonalInfo:
    """The report of a step; waits for the device.

    Args:
        owner: The optimizer.
        verdict: What was found of loss, gradient and estimate.
        loss: The closure's; None without one.
        params: The trainable parameters.
        trace: Of the gradients that the step left.
        effort: What the step took.
        numbers: Of sharded parameters: entries not clipped, all entries (where anything is
            clipped), and the largest entry of the gradient.
    """
    optimizer = owner()
    assert optimizer is not None
    value = float("nan") if loss is None else loss.item()
    norm = None
    if numbers is not None:
        *inside, norm = numbers.tolist()
    else:
        inside = [count.item() for count in optimizer._inside() or ()]
        if trace.matches(params):
            norms = [max_norm(as_real(p.grad)).item() for p in params if p.grad is not None]
            norm = max(norms, default=None)
    extra = {"unclipped": inside[0] / inside[1]} if inside and inside[1] else {}
    made: DiagonalInfo = optimizer._info_type(
        status=verdict.status,
        loss=-value if optimizer.param_groups[0]["maximize"] else value,
        loss_after=None,
        grad_norm=norm,
        iterations=int(verdict.moved),
        evaluations=effort.evaluations,
        products=effort.products,
        **extra,
    )
    return made
