"""The manifold of a step, from those that `Projected` hands over."""

from __future__ import annotations

from collections.abc import Mapping

from torch_secondorder._params.manifold import Chart, Manifold
from torch_secondorder._params.vector import ParameterVector


def manifold_of(
    vector: ParameterVector, charts: Mapping[int, Chart], program: object | None
) -> Manifold:
    """The manifold that the parameters of a vector stay on.

    Args:
        vector: The parameters.
        charts: The manifolds, by the `id` of their parameters.
        program: The constraints that the optimizer takes into account itself; None for none.

    Raises:
        ValueError: There are such constraints.
    """
    if program is not None:
        raise ValueError(
            'method="sqp" of Constrained takes no manifolds: use method="augmented_lagrangian" '
            "with Projected"
        )
    return Manifold(vector, charts)
