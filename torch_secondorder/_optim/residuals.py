"""The residuals where an objective stands, that of a closure or of a whole data set."""

from __future__ import annotations

from torch_secondorder._objective.base import Evaluation, Objective
from torch_secondorder.curvature.residual_jacobian import JacobianMethod, ResidualJacobian
from torch_secondorder.dataset._objective import DatasetObjective
from torch_secondorder.dataset._residuals import BatchResiduals


def over_batches(objective: Objective) -> bool:
    """True if residuals come batch by batch, and only sums over them are kept."""
    return isinstance(objective, DatasetObjective)


def check_batches(
    objective: Objective, solver: str, acceleration: str | None, region: bool
) -> None:
    """Raises where a method needs rows of a Jacobian that comes batch by batch.

    Args:
        objective: The objective of the step.
        solver: The solver of damped systems.
        acceleration: The kind of acceleration.
        region: Whether a trust region is asked for.

    Raises:
        ValueError: It does.
    """
    if not over_batches(objective):
        return
    for name, refused in {
        f"solver={solver!r}": solver not in ("auto", "primal"),
        f"acceleration={acceleration!r}": acceleration == "geodesic",
        'globalization="trust_region"': region,
    }.items():
        if refused:
            raise ValueError(
                "the residuals of a DatasetClosure come batch by batch, and of these J'J and the "
                f"gradient are kept alone, which is too little for {name}: leave it out, or step "
                "on one batch at a time"
            )


def residuals_at(
    objective: Objective, evaluation: Evaluation | None, method: JacobianMethod | None = None
) -> ResidualJacobian | BatchResiduals:
    """The Jacobian of the residuals at an objective's current position.

    Args:
        objective: An objective of any kind; one over a data set gives `BatchResiduals`.
        evaluation: The evaluation there, made by `evaluate(curvature="jacobian")`.
        method: The way to the Jacobian of a single evaluation, see `ResidualJacobian`.

    Raises:
        RuntimeError: The loss has no residuals, see `ResidualJacobian`.
    """
    if isinstance(objective, DatasetObjective):
        return BatchResiduals(objective)
    assert evaluation is not None
    return ResidualJacobian(evaluation, method=method)
