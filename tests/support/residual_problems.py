"""Classical nonlinear least-squares problems as residuals, in float64.

From Moré, Garbow and Hillstrom, "Testing unconstrained optimization software", ACM Transactions on
Mathematical Software 7 (1981); numbers such as "MGH 8" are theirs. Values are sums of squares,
without a half. The customary starts are the given one, and ten and a hundred times that.

>>> rosenbrock = RESIDUAL_PROBLEMS_BY_NAME["rosenbrock"]
>>> rosenbrock.residuals(rosenbrock.start).square().sum().item()
24.199999999999996
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.support.problems import _BARD, _GAUSSIAN, _KOWALIK_U, _KOWALIK_Y

Residuals = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ResidualProblem:
    """Residuals, where to start from, and what is known about the minima.

    Attributes:
        name: A short name, unique in the table.
        residuals: Maps a vector of shape (n,) to one of shape (m,).
        start: The customary starting point, of shape (n,), float64.
        minima: Sums of squares at known local minima; the first is the smallest. Some are infima,
            approached as a parameter goes to infinity.
        factors: Multiples of the start that are customary.
    """

    name: str
    residuals: Residuals
    start: Tensor
    minima: tuple[float, ...]
    factors: tuple[float, ...] = (1.0, 10.0, 100.0)

    @property
    def starts(self) -> list[Tensor]:
        """The customary starting points."""
        return [factor * self.start for factor in self.factors]

    def is_minimum(self, value: float, rtol: float = 1e-4, atol: float = 1e-8) -> bool:
        """Whether a sum of squares is that of one of the known minima."""
        return any(abs(value - minimum) <= rtol * abs(minimum) + atol for minimum in self.minima)


RESIDUAL_PROBLEMS: list[ResidualProblem] = []


def _make(values: object) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)  # type: ignore[call-overload]


def _problem(
    start: object, *minima: float, factors: tuple[float, ...] = (1.0, 10.0, 100.0)
) -> Callable[[Residuals], Residuals]:
    """Enters residuals in the table."""

    def register(residuals: Residuals) -> Residuals:
        name = residuals.__name__.strip("_")
        RESIDUAL_PROBLEMS.append(ResidualProblem(name, residuals, _make(start), minima, factors))
        return residuals

    return register


@_problem([-1.2, 1.0], 0.0)
def _rosenbrock(x: Tensor) -> Tensor:
    """MGH 1."""
    a, b = x.unbind()
    return torch.stack((10.0 * (b - a * a), 1.0 - a))


@_problem([0.5, -2.0], 0.0, 48.9842536792)
def _freudenstein_roth(x: Tensor) -> Tensor:
    """MGH 2."""
    a, b = x.unbind()
    first = a - 13.0 + ((5.0 - b) * b - 2.0) * b
    return torch.stack((first, a - 29.0 + ((b + 1.0) * b - 14.0) * b))


@_problem([0.0, 1.0], 0.0, factors=(1.0,))
def _powell_badly_scaled(x: Tensor) -> Tensor:
    """MGH 3; the minimum is at (1.098e-5, 9.106)."""
    return torch.stack((1e4 * x.prod() - 1.0, torch.exp(-x).sum() - 1.0001))


@_problem([1.0, 1.0], 0.0)
def _brown_badly_scaled(x: Tensor) -> Tensor:
    """MGH 4; the minimum is at (1e6, 2e-6)."""
    return torch.cat((x - _make([1e6, 2e-6]), (x.prod() - 2.0)[None]))


@_problem([1.0, 1.0], 0.0, factors=(1.0,))
def _beale(x: Tensor) -> Tensor:
    """MGH 5."""
    a, b = x.unbind()
    return _make([1.5, 2.25, 2.625]) - a * (1.0 - b ** _make([1.0, 2.0, 3.0]))


@_problem([0.3, 0.4], 124.362182356, 2020.0, factors=(1.0,))
def _jennrich_sampson(x: Tensor) -> Tensor:
    """MGH 6, m = 10."""
    i = _make(range(1, 11))
    return 2.0 + 2.0 * i - torch.exp(torch.outer(i, x)).sum(1)


@_problem([-1.0, 0.0, 0.0], 0.0)
def _helical_valley(x: Tensor) -> Tensor:
    """MGH 7."""
    a, b, c = x.unbind()
    angle = torch.atan2(b, a) / (2.0 * math.pi)
    return torch.stack((10.0 * (c - 10.0 * angle), 10.0 * (torch.hypot(a, b) - 1.0), c))


@_problem([1.0, 1.0, 1.0], 8.21487730658e-3, 17.4286917)
def _bard(x: Tensor) -> Tensor:
    """MGH 8; the second value is an infimum, at (0.8406, -inf, -inf)."""
    u = _make(range(1, 16))
    v = 16.0 - u
    a, b, c = x.unbind()
    return _make(_BARD) - a - u / (v * b + torch.minimum(u, v) * c)


@_problem([0.4, 1.0, 0.0], 1.12793276961e-8, factors=(1.0,))
def _gaussian(x: Tensor) -> Tensor:
    """MGH 9."""
    t = 4.0 - 0.5 * _make(range(1, 16))
    a, b, c = x.unbind()
    return a * torch.exp(-0.5 * b * (t - c).square()) - _make(_GAUSSIAN + _GAUSSIAN[-2::-1])


_MEYER = (
    *(34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744),
    *(8261, 7030, 6005, 5147, 4427, 3820, 3307, 2872),
)


@_problem([0.02, 4000.0, 250.0], 87.9458551714, factors=(1.0,))
def _meyer(x: Tensor) -> Tensor:
    """MGH 10."""
    a, b, c = x.unbind()
    return a * torch.exp(b / (45.0 + 5.0 * _make(range(1, 17)) + c)) - _make(_MEYER)


@_problem([5.0, 2.5, 0.15], 0.0, factors=(1.0,))
def _gulf(x: Tensor) -> Tensor:
    """MGH 11, m = 99."""
    t = _make(range(1, 100)) / 100.0
    y = 25.0 + (-50.0 * torch.log(t)) ** (2.0 / 3.0)
    a, b, c = x.unbind()
    return torch.exp(-((y - b).abs() ** c) / a) - t


@_problem([0.0, 10.0, 20.0], 0.0, 0.0755887, factors=(1.0,))
def _box_3d(x: Tensor) -> Tensor:
    """MGH 12, m = 10."""
    t = 0.1 * _make(range(1, 11))
    a, b, c = x.unbind()
    return torch.exp(-t * a) - torch.exp(-t * b) - c * (torch.exp(-t) - torch.exp(-10.0 * t))


@_problem([3.0, -1.0, 0.0, 1.0], 0.0)
def _powell_singular(x: Tensor) -> Tensor:
    """MGH 13; the Jacobian is singular at the minimum."""
    a, b, c, d = x.unbind()
    first = torch.stack((a + 10.0 * b, math.sqrt(5.0) * (c - d)))
    return torch.cat(
        (first, torch.stack(((b - 2.0 * c).square(), math.sqrt(10.0) * (a - d).square())))
    )


@_problem([-3.0, -1.0, -3.0, -1.0], 0.0, factors=(1.0,))
def _wood(x: Tensor) -> Tensor:
    """MGH 14."""
    a, b, c, d = x.unbind()
    first = (10.0 * (b - a * a), 1.0 - a, math.sqrt(90.0) * (d - c * c), 1.0 - c)
    return torch.stack((*first, math.sqrt(10.0) * (b + d - 2.0), (b - d) / math.sqrt(10.0)))


@_problem([0.25, 0.39, 0.415, 0.39], 3.07505603849e-4, 1.02734e-3)
def _kowalik_osborne(x: Tensor) -> Tensor:
    """MGH 15; the second value is an infimum, at (+inf, -14.07..., -inf, -inf)."""
    u = _make(_KOWALIK_U)
    a, b, c, d = x.unbind()
    return _make(_KOWALIK_Y) - a * (u * u + u * b) / (u * u + u * c + d)


@_problem([25.0, 5.0, -5.0, -1.0], 85822.2016263)
def _brown_dennis(x: Tensor) -> Tensor:
    """MGH 16, m = 20."""
    t = _make(range(1, 21)) / 5.0
    a, b, c, d = x.unbind()
    first = (a + t * b - torch.exp(t)).square()
    return first + (c + d * torch.sin(t) - torch.cos(t)).square()


_OSBORNE_1 = (
    *(0.844, 0.908, 0.932, 0.936, 0.925, 0.908, 0.881, 0.850, 0.818, 0.784, 0.751),
    *(0.718, 0.685, 0.658, 0.628, 0.603, 0.580, 0.558, 0.538, 0.522, 0.506, 0.490),
    *(0.478, 0.467, 0.457, 0.448, 0.438, 0.431, 0.424, 0.420, 0.414, 0.411, 0.406),
)


@_problem([0.5, 1.5, -1.0, 0.01, 0.02], 5.46489469748e-5, factors=(1.0,))
def _osborne_1(x: Tensor) -> Tensor:
    """MGH 17."""
    t = 10.0 * _make(range(33))
    a, b, c, d, e = x.unbind()
    return _make(_OSBORNE_1) - (a + b * torch.exp(-t * d) + c * torch.exp(-t * e))


@_problem([1.0, 2.0, 1.0, 1.0, 1.0, 1.0], 0.0, 5.65564980e-3, 0.306366772624, factors=(1.0,))
def _biggs_exp6(x: Tensor) -> Tensor:
    """MGH 18, m = 13."""
    t = 0.1 * _make(range(1, 14))
    y = torch.exp(-t) - 5.0 * torch.exp(-10.0 * t) + 3.0 * torch.exp(-4.0 * t)
    a, b, c, d, e, f = x.unbind()
    return c * torch.exp(-t * a) - d * torch.exp(-t * b) + f * torch.exp(-t * e) - y


_OSBORNE_2 = (
    *(1.366, 1.191, 1.112, 1.013, 0.991, 0.885, 0.831, 0.847, 0.786, 0.725, 0.746),
    *(0.679, 0.608, 0.655, 0.616, 0.606, 0.602, 0.626, 0.651, 0.724, 0.649, 0.649),
    *(0.694, 0.644, 0.624, 0.661, 0.612, 0.558, 0.533, 0.495, 0.500, 0.423, 0.395),
    *(0.375, 0.372, 0.391, 0.396, 0.405, 0.428, 0.429, 0.523, 0.562, 0.607, 0.653),
    *(0.672, 0.708, 0.633, 0.668, 0.645, 0.632, 0.591, 0.559, 0.597, 0.625, 0.739),
    *(0.710, 0.729, 0.720, 0.636, 0.581, 0.428, 0.292, 0.162, 0.098, 0.054),
)


@_problem(
    [1.3, 0.65, 0.65, 0.7, 0.6, 3.0, 5.0, 7.0, 2.0, 4.5, 5.5],
    4.01377362935e-2,
    1.789813,
    factors=(1.0,),
)
def _osborne_2(x: Tensor) -> Tensor:
    """MGH 19."""
    t = 0.1 * _make(range(65))
    model = x[0] * torch.exp(-t * x[4])
    for k in (1, 2, 3):
        model = model + x[k] * torch.exp(-(t - x[k + 7]).square() * x[k + 4])
    return _make(_OSBORNE_2) - model


def _watson_residuals(x: Tensor) -> Tensor:
    """MGH 20. A polynomial and its derivative at t = i/29: one matrix each."""
    t, j = _make(range(1, 30)) / 29.0, _make(range(len(x)))
    values = t[:, None] ** j
    slopes = j * t[:, None] ** (j - 1.0).clamp(min=0.0)
    first = slopes @ x - (values @ x).square() - 1.0
    return torch.cat((first, torch.stack((x[0], x[1] - x[0] * x[0] - 1.0))))


for _size, _value in ((6, 2.28767005355e-3), (9, 1.39976013e-6), (12, 4.72238e-10)):
    RESIDUAL_PROBLEMS.append(
        ResidualProblem(
            f"watson_{_size}", _watson_residuals, torch.zeros(_size).double(), (_value,), (1.0,)
        )
    )


@_problem([0.1] * 10, 0.0, 2.79506e-5)
def _trigonometric(x: Tensor) -> Tensor:
    """MGH 26, n = 10."""
    cosine = torch.cos(x)
    return 10.0 - cosine.sum() + _make(range(1, 11)) * (1.0 - cosine) - torch.sin(x)


@_problem([0.5] * 10, 0.0, 1.0)
def _brown_almost_linear(x: Tensor) -> Tensor:
    """MGH 27, n = 10; the second value is at (0, ..., 0, 11)."""
    return torch.cat((x[:-1] + (x.sum() - 11.0), (x.prod() - 1.0)[None]))


@_problem([-1.0] * 10, 0.0, factors=(1.0,))
def _broyden_tridiagonal(x: Tensor) -> Tensor:
    """MGH 30, n = 10."""
    padded = torch.nn.functional.pad(x, (1, 1))
    return (3.0 - 2.0 * x) * x - padded[:-2] - 2.0 * padded[2:] + 1.0


@_problem([1.0] * 5, 5.0)
def _linear_full_rank(x: Tensor) -> Tensor:
    """MGH 32, n = 5, m = 10."""
    shift = 2.0 / 10 * x.sum() + 1.0
    return torch.cat((x, x.new_zeros(5))) - shift


@_problem([1.0] * 5, 2.14285714286)
def _linear_rank_1(x: Tensor) -> Tensor:
    """MGH 33, n = 5, m = 10."""
    return _make(range(1, 11)) * (_make(range(1, 6)) @ x) - 1.0


@_problem([i / 9 for i in range(1, 9)], 3.51687372568e-3, factors=(1.0,))
def _chebyquad(x: Tensor) -> Tensor:
    """MGH 35, m = n = 8."""
    integrals = _make([0.0 if i % 2 else -1.0 / (i * i - 1.0) for i in range(1, 9)])
    shifted = 2.0 * x - 1.0
    rows = [torch.ones_like(x), shifted]
    for _ in range(7):
        rows.append(2.0 * shifted * rows[-1] - rows[-2])
    return torch.stack(rows[1:]).mean(1) - integrals


RESIDUAL_PROBLEMS_BY_NAME = {problem.name: problem for problem in RESIDUAL_PROBLEMS}
