"""Classical smooth unconstrained test functions, in float64 and differentiable by autograd.

Most are from Moré, Garbow and Hillstrom, "Testing unconstrained optimization software", ACM
Transactions on Mathematical Software 7 (1981); numbers such as "MGH 8" are theirs. Where the paper
defines residuals r_i, the function is the sum of r_i squared. The functions are vectorized, with as
few tensor operations as is readable, because benchmarks pay for each of them.

>>> rosenbrock = PROBLEMS_BY_NAME["rosenbrock"]
>>> float(rosenbrock.function(rosenbrock.start))
24.199999999999996
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]
Make = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Problem:
    """A smooth function, where to start from, and what is known about its minima.

    Attributes:
        name: A short name, unique in the table.
        function: Maps a vector of shape (n,) to a 0-dim tensor.
        start: The customary starting point, of shape (n,), float64.
        start_value: The function there, from the literature or by hand; None where it is random.
        minima: Values of the known local minima; a solver may end in any of them. The first is the
            smallest. Some are infima, approached as a parameter goes to infinity.
    """

    name: str
    function: Function
    start: Tensor
    start_value: float | None
    minima: tuple[float, ...]

    @property
    def size(self) -> int:
        """The number of variables."""
        return self.start.numel()

    def is_minimum(self, value: float, rtol: float = 1e-4, atol: float = 1e-6) -> bool:
        """Whether a function value is that of one of the known minima."""
        return any(abs(value - minimum) <= rtol * abs(minimum) + atol for minimum in self.minima)


Builder = Callable[[Make], tuple[Function, Tensor]]
Builders = list[tuple[str, float | None, tuple[float, ...], Builder]]
_BUILDERS: Builders = []
_NONCONVEX: Builders = []


def _problem(
    name: str, start_value: float | None, *minima: float, table: Builders = _BUILDERS
) -> Callable[[Builder], Builder]:
    """Enters a builder, which gets a maker of float64 tensors, in a table."""

    def register(builder: Builder) -> Builder:
        table.append((name, start_value, minima, builder))
        return builder

    return register


def _squares(r: Tensor) -> Tensor:
    return r.dot(r)


@_problem("rosenbrock", 24.2, 0.0)
def _rosenbrock(make: Make) -> tuple[Function, Tensor]:
    """MGH 1."""

    def function(x: Tensor) -> Tensor:
        a, b = x.unbind()
        return 100.0 * (b - a * a).square() + (1.0 - a).square()

    return function, make([-1.2, 1.0])


@_problem("freudenstein_roth", 400.5, 0.0, 48.9842536792)
def _freudenstein_roth(make: Make) -> tuple[Function, Tensor]:
    """MGH 2."""

    def function(x: Tensor) -> Tensor:
        a, b = x.unbind()
        first = a - 13.0 + ((5.0 - b) * b - 2.0) * b
        second = a - 29.0 + ((b + 1.0) * b - 14.0) * b
        return first.square() + second.square()

    return function, make([0.5, -2.0])


@_problem("powell_badly_scaled", 1.13526171734, 0.0)
def _powell_badly_scaled(make: Make) -> tuple[Function, Tensor]:
    """MGH 3; the minimum is at (1.098e-5, 9.106)."""

    def function(x: Tensor) -> Tensor:
        return (1e4 * x.prod() - 1.0).square() + (torch.exp(-x).sum() - 1.0001).square()

    return function, make([0.0, 1.0])


@_problem("brown_badly_scaled", 999998000003.0, 0.0)
def _brown_badly_scaled(make: Make) -> tuple[Function, Tensor]:
    """MGH 4; the minimum is at (1e6, 2e-6)."""
    target = make([1e6, 2e-6])

    def function(x: Tensor) -> Tensor:
        return _squares(x - target) + (x.prod() - 2.0).square()

    return function, make([1.0, 1.0])


@_problem("beale", 14.203125, 0.0)
def _beale(make: Make) -> tuple[Function, Tensor]:
    """MGH 5."""
    y, powers = make([1.5, 2.25, 2.625]), make([1.0, 2.0, 3.0])

    def function(x: Tensor) -> Tensor:
        a, b = x.unbind()
        return _squares(y - a * (1.0 - b**powers))

    return function, make([1.0, 1.0])


@_problem("jennrich_sampson", 4171.30616196, 124.362182356)
def _jennrich_sampson(make: Make) -> tuple[Function, Tensor]:
    """MGH 6, m = 10."""
    i = make(range(1, 11))

    def function(x: Tensor) -> Tensor:
        return _squares(2.0 + 2.0 * i - torch.exp(torch.outer(i, x)).sum(1))

    return function, make([0.3, 0.4])


@_problem("helical_valley", 2500.0, 0.0)
def _helical_valley(make: Make) -> tuple[Function, Tensor]:
    """MGH 7. Its angle, atan(x2 / x1) with a half turn added left of the axis, is an atan2."""

    def function(x: Tensor) -> Tensor:
        a, b, c = x.unbind()
        angle = torch.atan2(b, a) / (2.0 * math.pi)
        radius = torch.sqrt(a * a + b * b)
        return 100.0 * ((c - 10.0 * angle).square() + (radius - 1.0).square()) + c * c

    return function, make([-1.0, 0.0, 0.0])


_BARD = (
    *(0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39),
    *(0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39),
)


@_problem("bard", 41.6816958617, 8.21487730658e-3, 17.4286917)
def _bard(make: Make) -> tuple[Function, Tensor]:
    """MGH 8; the second value is an infimum, at (0.8406, -inf, -inf)."""
    u, y = make(range(1, 16)), make(_BARD)
    v = 16.0 - u
    w = torch.minimum(u, v)

    def function(x: Tensor) -> Tensor:
        a, b, c = x.unbind()
        return _squares(y - a - u / (v * b + w * c))

    return function, make([1.0, 1.0, 1.0])


_GAUSSIAN = (0.0009, 0.0044, 0.0175, 0.0540, 0.1295, 0.2420, 0.3521, 0.3989)


@_problem("gaussian", 3.88810699e-6, 1.12793276961e-8)
def _gaussian(make: Make) -> tuple[Function, Tensor]:
    """MGH 9."""
    t = 4.0 - 0.5 * make(range(1, 16))
    y = make(_GAUSSIAN + _GAUSSIAN[-2::-1])

    def function(x: Tensor) -> Tensor:
        a, b, c = x.unbind()
        return _squares(a * torch.exp(-0.5 * b * (t - c).square()) - y)

    return function, make([0.4, 1.0, 0.0])


@_problem("box_3d", 1031.15381061, 0.0)
def _box_3d(make: Make) -> tuple[Function, Tensor]:
    """MGH 12, m = 10; zero at (1, 10, 1), at (10, 1, -1) and on the line x1 = x2, x3 = 0."""
    t = 0.1 * make(range(1, 11))
    y = torch.exp(-t) - torch.exp(-10.0 * t)

    def function(x: Tensor) -> Tensor:
        a, b, c = x.unbind()
        return _squares(torch.exp(-t * a) - torch.exp(-t * b) - c * y)

    return function, make([0.0, 10.0, 20.0])


@_problem("wood", 19192.0, 0.0)
def _wood(make: Make) -> tuple[Function, Tensor]:
    """MGH 14."""

    def function(x: Tensor) -> Tensor:
        a, b, c, d = x.unbind()
        valleys = 100.0 * (b - a * a).square() + (1.0 - a).square()
        valleys = valleys + 90.0 * (d - c * c).square() + (1.0 - c).square()
        return valleys + 10.0 * (b + d - 2.0).square() + 0.1 * (b - d).square()

    return function, make([-3.0, -1.0, -3.0, -1.0])


_KOWALIK_Y = (
    *(0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627),
    *(0.0456, 0.0342, 0.0323, 0.0235, 0.0246),
)
_KOWALIK_U = (4.0, 2.0, 1.0, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625)


@_problem("kowalik_osborne", 5.31317227211e-3, 3.07505603849e-4, 1.02734e-3)
def _kowalik_osborne(make: Make) -> tuple[Function, Tensor]:
    """MGH 15; the second value is an infimum, at (+inf, -14.07..., -inf, -inf)."""
    y, u = make(_KOWALIK_Y), make(_KOWALIK_U)
    uu = u * u

    def function(x: Tensor) -> Tensor:
        a, b, c, d = x.unbind()
        return _squares(y - a * (uu + u * b) / (uu + u * c + d))

    return function, make([0.25, 0.39, 0.415, 0.39])


@_problem("brown_dennis", 7926693.337, 85822.2016263)
def _brown_dennis(make: Make) -> tuple[Function, Tensor]:
    """MGH 16, m = 20."""
    t = make(range(1, 21)) / 5.0
    sine, cosine, power = torch.sin(t), torch.cos(t), torch.exp(t)

    def function(x: Tensor) -> Tensor:
        a, b, c, d = x.unbind()
        inner = (a + t * b - power).square() + (c + d * sine - cosine).square()
        return _squares(inner)

    return function, make([25.0, 5.0, -5.0, -1.0])


@_problem("biggs_exp6", 0.77907007565597, 0.0, 5.65564980e-3, 0.306366772624)
def _biggs_exp6(make: Make) -> tuple[Function, Tensor]:
    """MGH 18, m = 13; the third value is a known further stationary plateau."""
    t = 0.1 * make(range(1, 14))
    y = torch.exp(-t) - 5.0 * torch.exp(-10.0 * t) + 3.0 * torch.exp(-4.0 * t)

    def function(x: Tensor) -> Tensor:
        a, b, c, d, e, f = x.unbind()
        terms = c * torch.exp(-t * a) - d * torch.exp(-t * b) + f * torch.exp(-t * e)
        return _squares(terms - y)

    return function, make([1.0, 2.0, 1.0, 1.0, 1.0, 1.0])


@_problem("watson", 30.0, 2.28767005355e-3)
def _watson(make: Make) -> tuple[Function, Tensor]:
    """MGH 20, n = 6. A polynomial and its derivative at t = i/29: one matrix each."""
    t, j = make(range(1, 30)) / 29.0, make(range(6))
    values = t[:, None] ** j
    slopes = j * t[:, None] ** (j - 1.0).clamp(min=0.0)

    def function(x: Tensor) -> Tensor:
        a, b = x[0], x[1]
        residuals = slopes @ x - (values @ x).square() - 1.0
        return _squares(residuals) + a * a + (b - a * a - 1.0).square()

    return function, make([0.0] * 6)


@_problem("extended_rosenbrock", 50 * 24.2, 0.0)
def _extended_rosenbrock(make: Make) -> tuple[Function, Tensor]:
    """MGH 21, n = 100."""

    def function(x: Tensor) -> Tensor:
        a, b = x.view(-1, 2).unbind(1)
        return 100.0 * _squares(b - a * a) + _squares(1.0 - a)

    return function, make([-1.2, 1.0] * 50)


def _extended_powell(x: Tensor) -> Tensor:
    a, b, c, d = x.view(-1, 4).unbind(1)
    first = _squares(a + 10.0 * b) + 5.0 * _squares(c - d)
    return first + _squares((b - 2.0 * c).square()) + 10.0 * _squares((a - d).square())


@_problem("powell_singular", 215.0, 0.0)
def _powell_singular(make: Make) -> tuple[Function, Tensor]:
    """MGH 13; the Hessian is singular at the minimum."""
    return _extended_powell, make([3.0, -1.0, 0.0, 1.0])


@_problem("extended_powell_singular", 25 * 215.0, 0.0)
def _extended_powell_singular(make: Make) -> tuple[Function, Tensor]:
    """MGH 22, n = 100."""
    return _extended_powell, make([3.0, -1.0, 0.0, 1.0] * 25)


@_problem("penalty_1", 148032.56535, 7.08765e-5)
def _penalty_1(make: Make) -> tuple[Function, Tensor]:
    """MGH 23, n = 10."""

    def function(x: Tensor) -> Tensor:
        return 1e-5 * _squares(x - 1.0) + (_squares(x) - 0.25).square()

    return function, make(range(1, 11))


@_problem("penalty_2", 162.65277656596712, 2.93660e-4)
def _penalty_2(make: Make) -> tuple[Function, Tensor]:
    """MGH 24, n = 10."""
    i = make(range(2, 11))
    y = torch.exp(i / 10.0) + torch.exp((i - 1.0) / 10.0)
    weights = make(range(10, 0, -1))
    shift = math.exp(-0.1)

    def function(x: Tensor) -> Tensor:
        e = torch.exp(x / 10.0)
        small = _squares(e[1:] + e[:-1] - y) + _squares(e[1:] - shift)
        ball = weights.dot(x * x) - 1.0
        return (x[0] - 0.2).square() + 1e-5 * small + ball.square()

    return function, make([0.5] * 10)


@_problem("variably_dimensioned", 2198551.1625, 0.0)
def _variably_dimensioned(make: Make) -> tuple[Function, Tensor]:
    """MGH 25, n = 10."""
    j = make(range(1, 11))

    def function(x: Tensor) -> Tensor:
        r = x - 1.0
        square = j.dot(r).square()
        return _squares(r) + square + square.square()

    return function, 1.0 - j / 10.0


@_problem("trigonometric", 7.07575946622e-3, 0.0, 2.79506e-5)
def _trigonometric(make: Make) -> tuple[Function, Tensor]:
    """MGH 26, n = 10."""
    i = make(range(1, 11))

    def function(x: Tensor) -> Tensor:
        cosine = torch.cos(x)
        return _squares(10.0 - cosine.sum() + i * (1.0 - cosine) - torch.sin(x))

    return function, make([0.1] * 10)


@_problem("brown_almost_linear", 9 * 5.5**2 + (1.0 - 2.0**-10) ** 2, 0.0, 1.0)
def _brown_almost_linear(make: Make) -> tuple[Function, Tensor]:
    """MGH 27, n = 10; the second value is at (0, ..., 0, 11)."""

    def function(x: Tensor) -> Tensor:
        return _squares(x[:-1] + (x.sum() - 11.0)) + (x.prod() - 1.0).square()

    return function, make([0.5] * 10)


@_problem("broyden_tridiagonal", 8 * 1.0 + 4.0 + 9.0, 0.0)
def _broyden_tridiagonal(make: Make) -> tuple[Function, Tensor]:
    """MGH 30, n = 10; later literature found minima besides the zero."""

    def function(x: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x, (1, 1))
        return _squares((3.0 - 2.0 * x) * x - padded[:-2] - 2.0 * padded[2:] + 1.0)

    return function, make([-1.0] * 10)


@_problem("chebyquad", 0.0386176982859, 3.51687372568e-3)
def _chebyquad(make: Make) -> tuple[Function, Tensor]:
    """MGH 35, m = n = 8. T_i(2x - 1) = cos(i acos(2x - 1)), by recurrence to stay smooth."""
    integrals = make([0.0 if i % 2 else -1.0 / (i * i - 1.0) for i in range(1, 9)])

    def function(x: Tensor) -> Tensor:
        shifted = 2.0 * x - 1.0
        rows = [torch.ones_like(x), shifted]
        for _ in range(7):
            rows.append(2.0 * shifted * rows[-1] - rows[-2])
        return _squares(torch.stack(rows[1:]).mean(1) - integrals)

    return function, make(range(1, 9)) / 9.0


@_problem("chained_rosenbrock", 25 * 24.2 + 24 * 484.0, 0.0, 3.98662385)
def _chained_rosenbrock(make: Make) -> tuple[Function, Tensor]:
    """Toint (1978), n = 50, from the start of alternating -1.2 and 1."""

    def function(x: Tensor) -> Tensor:
        return 100.0 * _squares(x[1:] - x[:-1].square()) + _squares(1.0 - x[:-1])

    return function, make([-1.2, 1.0] * 25)


@_problem("dixon_price", 54.0, 0.0)
def _dixon_price(make: Make) -> tuple[Function, Tensor]:
    """Dixon and Price (1989), n = 10, from (1, ..., 1)."""
    weights = make(range(2, 11))

    def function(x: Tensor) -> Tensor:
        r = 2.0 * x[1:].square() - x[:-1]
        return (x[0] - 1.0).square() + weights.dot(r * r)

    return function, make([1.0] * 10)


@_problem("ill_conditioned_quadratic", None, 0.0)
def _ill_conditioned_quadratic(make: Make) -> tuple[Function, Tensor]:
    """n = 200, eigenvalues log-spaced from 1 to 1e6 in a random basis, a random minimum."""
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(200, 201, dtype=torch.float64, generator=generator)
    basis, _ = torch.linalg.qr(gaussian[:, :200])
    eigenvalues = torch.logspace(0.0, 6.0, 200, dtype=torch.float64)
    matrix, solution = make((basis * eigenvalues) @ basis.T), make(gaussian[:, 200])

    def function(x: Tensor) -> Tensor:
        # Written around the minimum, so that no digits are lost to cancellation there.
        r = x - solution
        return 0.5 * r.dot(matrix @ r)

    return function, make([0.0] * 200)


# Functions of the CUTEst collection with much negative curvature, by their names there.


@_problem("cosine", 999 * math.cos(0.5), -999.0, table=_NONCONVEX)
def _cosine(make: Make) -> tuple[Function, Tensor]:
    """N. Gould; n = 1,000."""

    def function(x: Tensor) -> Tensor:
        return torch.cos(x[:-1] * x[:-1] - 0.5 * x[1:]).sum()

    return function, make([1.0] * 1000)


@_problem("indefm", 920.339791661, table=_NONCONVEX)
def _indefm(make: Make) -> tuple[Function, Tensor]:
    """Lukšan, Matonoha and Vlček, TR 1081, problem 37, alpha = 0.5, n = 1,000; many minima."""

    def function(x: Tensor) -> Tensor:
        waves = torch.cos(2.0 * x[1:-1] - x[-1] - x[0]).sum()
        return 100.0 * torch.sin(0.01 * x).sum() + 0.5 * waves

    return function, make(range(1, 1001)) / 1001.0


@_problem("chainwoo", 371954.1, 1.0, 4.57276719, table=_NONCONVEX)
def _chainwoo(make: Make) -> tuple[Function, Tensor]:
    """Conn, Gould and Toint (1988), problem 8, n = 100; Wood's function, chained, plus one."""

    def function(x: Tensor) -> Tensor:
        a, b = x.view(-1, 2).unbind(1)
        low, high = b[:-1], b[1:]
        first = 100.0 * _squares(low - a[:-1] * a[:-1]) + _squares(1.0 - a[:-1])
        second = 90.0 * _squares(high - a[1:] * a[1:]) + _squares(1.0 - a[1:])
        return 1.0 + first + second + 10.0 * _squares(low + high - 2.0) + 0.1 * _squares(low - high)

    return function, make([-3.0, -1.0, -3.0, -1.0] + [-2.0] * 96)


@_problem("loghairy", 6.55251979193, math.log(1.2), table=_NONCONVEX)
def _loghairy(make: Make) -> tuple[Function, Tensor]:
    """Ph. Toint; hills of height 30 around a valley, under a logarithm."""

    def function(x: Tensor) -> Tensor:
        a, b = x.unbind()
        hair = 30.0 * (torch.sin(7.0 * a) * torch.cos(7.0 * b)).square()
        bowls = torch.sqrt(0.01 + (a - b).square()) + torch.sqrt(0.01 + a * a)
        return torch.log((100.0 + hair + 100.0 * bowls) / 100.0)

    return function, make([-500.0, -700.0])


def make_problems(
    device: torch.device | str = "cpu", builders: Builders = _BUILDERS
) -> tuple[Problem, ...]:
    """Builds a table with its constants and starting points on a device."""

    def make(values: Sequence[float] | Tensor) -> Tensor:
        data = values if isinstance(values, Tensor) else list(values)
        return torch.as_tensor(data, dtype=torch.float64, device=device)

    table = []
    for name, start_value, minima, builder in builders:
        function, start = builder(make)
        table.append(Problem(name, function, start, start_value, minima))
    return tuple(table)


PROBLEMS: tuple[Problem, ...] = make_problems()
NONCONVEX: tuple[Problem, ...] = make_problems(builders=_NONCONVEX)
PROBLEMS_BY_NAME: dict[str, Problem] = {problem.name: problem for problem in PROBLEMS}
