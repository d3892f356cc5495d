"""The residuals where an objective stands, that of a closure or of a whole data set."""

from __future__ import annotations

from functools import partial

from torch import Tensor

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
        ValueError: The objective is one over a data set, and on a manifold.
    """
    if isinstance(objective, DatasetObjective):
        if objective.manifold is not None:
            raise ValueError(
                "the residuals of a DatasetClosure come batch by batch, which does not go with a "
                "manifold yet: step on one batch at a time, or use NewtonCG"
            )
        return BatchResiduals(objective)
    assert evaluation is not None
    if objective.manifold is not None:
        return JacobianAlong(objective, evaluation, method)
    return ResidualJacobian(evaluation, method=method)


class JacobianAlong(ResidualJacobian):
    """The Jacobian of residuals by a step along a manifold: each row is projected.

    Args:
        objective: Stands on the manifold.
        evaluation: Made there.
        method: See `ResidualJacobian`.
    """

    def __init__(
        self, objective: Objective, evaluation: Evaluation, method: JacobianMethod | None
    ) -> None:
        assert objective.manifold is not None
        self._tangent = partial(objective.manifold.tangent, objective.position)
        super().__init__(evaluation, method=method)

    def dense(self) -> Tensor:
        """See `ResidualJacobian.dense`."""
        return self._tangent(super().dense())

    def pull(self, u: Tensor) -> Tensor:
        """See `ResidualJacobian.pull`."""
        return self._tangent(super().pull(u))

    def push(self, v: Tensor) -> Tensor:
        """See `ResidualJacobian.push`."""
        return super().push(self._tangent(v))

    def normal_matrix(self) -> Tensor:
        """See `ResidualJacobian.normal_matrix`."""
        matrix = self._tangent(self._tangent(super().normal_matrix()).T)
        return (matrix + matrix.T).mul_(0.5)

    def diagonal(self) -> Tensor:
        """See `ResidualJacobian.diagonal`."""
        return self.dense().square().sum(0)

    def kernel(self, weights: Tensor | None = None) -> Tensor:
        """See `ResidualJacobian.kernel`."""
        rows = self.dense()
        matrix = (rows if weights is None else rows * weights) @ rows.T
        return (matrix + matrix.T).mul_(0.5)
