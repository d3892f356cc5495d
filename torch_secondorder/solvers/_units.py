"""Systems in units that float32 can hold: a loss may be of any size."""

from __future__ import annotations

from math import frexp, inf, ldexp

import torch
from torch import Tensor

from torch_secondorder.curvature import LinearOperator


def unit_of(size: float, dtype: torch.dtype) -> float:
    """A power of two that numbers of about this size can be counted in.

    It is one unless the size is so far from one that squares of such numbers come near the ends of
    what the dtype holds: dividing by it costs a pass over a vector, and changes nothing else, for
    all digits stay the same. Its square root is a power of two as well.

    >>> unit_of(1e-3, torch.float32), unit_of(1e-20, torch.float32) == 2.0**-64
    (1.0, True)
    """
    quarter, exponent = frexp(torch.finfo(dtype).max)[1] // 4, frexp(size)[1]
    # One from 2^-24 to 2^24 in float32: conjugate gradients multiply three such numbers.
    steps = min((abs(exponent) + quarter // 4) // quarter, 3)
    return ldexp(1.0, quarter * (steps if exponent > 0 else -steps))


def power_of_two(size: Tensor) -> Tensor:
    """The power of two above a size, on its device; one where that is zero or not finite.

    >>> power_of_two(torch.tensor([3.0, 0.25, 0.0]))
    tensor([4.0000, 0.5000, 1.0000])
    """
    # The quotient is exact, which not every `exp2` is.
    return torch.where((size > 0) & (size < inf), size / torch.frexp(size).mantissa, 1.0)


class Rescaled(LinearOperator):
    """`A / unit`; half of the division is done before the product, half of it afterwards.

    Args:
        operator: `A`.
        unit: See `unit_of`.
    """

    def __init__(self, operator: LinearOperator, unit: float) -> None:
        self.operator = operator
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device
        self.space = operator.space
        self._factor = unit**-0.5

    def matvec(self, v: Tensor) -> Tensor:
        """See `LinearOperator.matvec`."""
        return self.operator.matvec(v * self._factor).mul_(self._factor)

    def matmat(self, V: Tensor) -> Tensor:
        """See `LinearOperator.matmat`."""
        return self.operator.matmat(V * self._factor).mul_(self._factor)
