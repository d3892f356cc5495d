"""Reports of optimizers that scale each coordinate, made when they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import ReferenceType

import torch
from torch import Tensor

from torch_secondorder._closure.runner import GradientTrace
from torch_secondorder._foundation.host_transfer import read_numbers
from torch_secondorder._optim.diagonal.update import FiniteCheck
from torch_secondorder._optim.info import StepInfo
from torch_secondorder._optim.state import as_real
from torch_secondorder._params.space import ShardedSpace, Space, max_norm

#: The last arguments of `report_of`, which a step makes.
Made: TypeAlias = tuple[FiniteCheck, Tensor | None, tuple[int, int], Tensor | None]


@dataclass(frozen=True, slots=True)
class DiagonalInfo(StepInfo):
    """Report of one step of an optimizer that scales each coordinate by its curvature.

    Attributes:
        products: Products with the curvature.
    """

    products: int = 0


def gathered_numbers(
    shares: Callable[[], dict[str, tuple[Tensor, Tensor]]],
    gradients: Sequence[Tensor | None],
    space: Space,
) -> Tensor | None:
    """The numbers of a report that come from all processes with parts of the parameters.

    Args:
        shares: Gives the ratios, numerator and denominator of each.
        gradients: The gradients of all trainable parameters.
        space: The space of the parameters.

    Returns:
        See `report_of`; None where parameters are whole.
    """
    if not isinstance(space, ShardedSpace):
        return None
    largest = [max_norm(as_real(g)).double() for g in gradients if g is not None]
    counts = [count.double() for share in shares().values() for count in share]
    return space.gathered(sums=counts, largest=[torch.stack(largest).amax()])


def report_of(
    owner: ReferenceType[Any],
    params: Sequence[Tensor],
    trace: GradientTrace,
    check: FiniteCheck,
    loss: Tensor | None,
    effort: tuple[int, int],
    numbers: Tensor | None = None,
) -> DiagonalInfo:
    """The report of a step; waits for the device.

    Args:
        owner: The optimizer.
        params: The trainable parameters.
        trace: The trace of the gradients that the step left.
        check: The check of loss, gradients and estimate.
        loss: The closure's loss; None without one.
        effort: The numbers of evaluations and products.
        numbers: Of sharded parameters: the terms of the shares in their order, and the largest
            entry of the gradient.
    """
    optimizer = owner()
    assert optimizer is not None
    grad_norm, shares = None, optimizer._shares()
    found = [torch.tensor(torch.nan) if loss is None else loss]
    if numbers is not None:
        value, *terms, grad_norm = read_numbers(*found, *numbers.unbind())
    else:
        terms_read = [term for share in shares.values() for term in share]
        found += terms_read
        if trace.matches(params):
            found += [max_norm(as_real(p.grad)) for p in params if p.grad is not None]
        value, *read = read_numbers(*found)
        terms, norms = read[: len(terms_read)], read[len(terms_read) :]
        grad_norm = max(norms, default=None)
    ratios = zip(shares, terms[::2], terms[1::2], strict=True)
    moved = check.moved  # if not, the shares are those of an earlier step
    made: DiagonalInfo = optimizer._info_type(
        status=check.status,
        loss=-value if optimizer.param_groups[0]["maximize"] else value,
        loss_after=None,
        grad_norm=grad_norm,
        iterations=int(moved),
        evaluations=effort[0],
        products=effort[1],
        **{name: part / total for name, part, total in ratios if total and moved},
    )
    return made
