"""The secular equation `|(S'S + multiplier I)^-1 S'c| = radius` of a diagonal matrix `S`.

All is float64 and on the host; columns are problems of their own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_MOST = 200
_TOLERANCE = 4 * torch.finfo(torch.float64).eps


class SecularSolution(NamedTuple):
    """Solutions in the basis of the singular vectors.

    Attributes:
        x: Shape `(p, k)`.
        multiplier: Shape `(k,)`.
        missing: The length of what `x` lacks of the radius, in a direction that changes no
            residual, or changes it by the least; zero but for `equality`. Shape `(k,)`.
        iterations: Of Newton's method.
    """

    x: Tensor
    multiplier: Tensor
    missing: Tensor
    iterations: int


def solve_secular(
    s: Tensor, c: Tensor, radius: Tensor, *, equality: bool = False, singular: bool = False
) -> SecularSolution:
    """The minimizers of `|S x - c|` with `|x| <= radius`, or `|x| = radius`.

    Newton's method runs on `1 / |x|`, which is concave in the multiplier and nearly linear. From a
    multiplier below the solution it converges monotonically (Reinsch 1971; Moré and Sorensen 1983).

    Args:
        s: Positive, in descending order, shape `(p,)`.
        c: Shape `(p, k)`.
        radius: Above zero, shape `(k,)`.
        equality: Whether `|x| = radius` is asked for. The multiplier may then be negative, down to
            minus the square of the smallest singular value.
        singular: Whether there is a null space besides: then it cannot be.
    """
    zeros = torch.zeros_like(radius)
    if not len(s):
        return SecularSolution(c, zeros, radius.clone() if equality else zeros, 0)
    # In units of the largest singular value and of |c|, so that no square leaves the range.
    unit_s, unit_c = s[0], c.abs().amax(0)
    unit_c = torch.where(unit_c > 0, unit_c, 1.0)
    s, c, target = s / unit_s, c / unit_c, radius * unit_s / unit_c
    inside = torch.linalg.vector_norm(c / s[:, None], dim=0) <= target
    negative = inside & equality & (not singular)
    # What the divisors s^2 + multiplier exceed the excess by, without cancellation.
    gaps = torch.where(negative, ((s - s[-1]) * (s + s[-1]))[:, None], s.square()[:, None])
    c = s[:, None] * c
    excess, iterations = _excess(gaps, c, target, fixed=inside & ~negative)
    x = _divided(c, gaps + excess)
    shift = torch.where(negative, s[-1].square(), 0.0)
    length = torch.linalg.vector_norm(x, dim=0)
    rest = target * (1 - (length / target).square()).clamp(min=0).sqrt()
    missing = torch.where(inside & equality & (excess == 0), rest, 0.0)
    units = unit_c / unit_s
    return SecularSolution(
        x * units, (excess - shift) * unit_s.square(), missing * units, iterations
    )


def _excess(gaps: Tensor, c: Tensor, target: Tensor, fixed: Tensor) -> tuple[Tensor, int]:
    """The sum added to all gaps that makes the length that of the target, at least zero."""
    # Each component alone would have it at least this large: a start from below.
    excess = (c.abs() / target - gaps).amax(0).clamp(min=0)
    excess = torch.where(fixed, 0.0, excess)
    for iteration in range(_MOST):
        divisors = gaps + excess
        x = _divided(c, divisors)
        length = torch.linalg.vector_norm(x, dim=0)
        short = fixed | (length <= target * (1 + _TOLERANCE))
        if bool(short.all()):
            return excess, iteration
        unit = x / torch.where(length > 0, length, 1.0)
        slope = (unit * _divided(unit, divisors)).sum(0)
        step = torch.where(short, 0.0, (length - target) / target / slope)
        if torch.equal(excess + step, excess):  # as near as rounding allows
            return excess, iteration
        excess = excess + step
    return excess, _MOST  # pragma: no cover - convergence is quadratic


def _divided(c: Tensor, divisors: Tensor) -> Tensor:
    """The quotient, zero where the numerator is."""
    return torch.where(c == 0.0, 0.0, c / divisors)
