"""Penalties on the Jacobian of a network with respect to its input, to add to a loss."""

from torch_secondorder.penalties.contractive import contractive_penalty
from torch_secondorder.penalties.jacobian import jacobian_penalty

__all__ = ["contractive_penalty", "jacobian_penalty"]


def __dir__() -> list[str]:
    return __all__
