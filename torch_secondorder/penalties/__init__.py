"""Penalties on the Jacobian of a network by its input, to be added to a loss."""

from torch_secondorder.penalties.contractive import contractive_penalty
from torch_secondorder.penalties.jacobian import jacobian_penalty

__all__ = ["contractive_penalty", "jacobian_penalty"]


def __dir__() -> list[str]:
    return __all__
