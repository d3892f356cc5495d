"""What takes the place of curvature that is not finite."""

from __future__ import annotations

from math import inf, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from torch_secondorder._objective.base import Objective
from torch_secondorder.curvature import Diagonal, FiniteDifference, LinearOperator
from torch_secondorder.curvature._masked import Masked
from torch_secondorder.solvers._units import Rescaled

__all__ = ["Repair", "repaired"]


class Repair(NamedTuple):
    """A curvature that is finite along the gradient.

    Attributes:
        operator: That curvature, in the unit asked for.
        kept: Whether a coordinate still has the original curvature; None if all have.
        products: What it took to find out.
        report: What was done; empty if there was nothing to do.
    """

    operator: LinearOperator
    kept: Tensor | None
    products: int
    report: str


def repaired(operator: LinearOperator, objective: Objective, grad: Tensor, unit: float) -> Repair:
    """Looks for the entries of a product that are not finite, and goes on without them.

    An operation may have a first derivative where it has no second: a norm whose argument is zero,
    say. What depends on it has products that are no numbers, whatever they are products with; all
    else has its curvature. In such coordinates the step is one along the gradient, with a multiple
    of the identity in the place of the curvature that is as large as that of the others. Where no
    entry is finite, products are differences of gradients.

    Args:
        operator: The curvature, in the unit.
        objective: Stands where the curvature is of.
        grad: The gradient there, in the unit.
        unit: See `unit_of`.
    """
    size, space = objective.vector.whole_size, operator.space
    differences = FiniteDifference(objective)
    candidates = (operator, differences if unit == 1.0 else Rescaled(differences, unit))
    reports = ("", "no entry of a product was finite, products were differences of gradients")
    for products, (candidate, report) in enumerate(zip(candidates, reports, strict=True), 1):
        image = candidate.matvec(grad)
        kept = image.isfinite()
        image = torch.where(kept, image, 0.0)
        count, square, whole = space.to_host(sums=(kept.sum(), image @ image, grad @ grad))
        lost = size - round(count)
        if not lost:
            return Repair(candidate, None, products, report)
        diagonal = sqrt(square / whole)
        if 0.0 < diagonal < inf:
            along = f"{lost} of {size} entries of a product were not finite, the step follows the "
            return Repair(
                Masked(candidate, kept, diagonal),
                kept,
                products,
                f"{report}; {along}gradient there".removeprefix("; "),
            )
    length, norm = space.to_host(
        norms=[torch.linalg.vector_norm(v) for v in (objective.position, grad)]
    )
    steepest = Diagonal(torch.full_like(grad, norm / (length or 1.0)))
    steepest.space = space
    report = "no product was finite, the step follows the gradient"
    return Repair(steepest, torch.zeros_like(grad, dtype=torch.bool), len(candidates), report)
