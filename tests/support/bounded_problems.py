"""Smooth test functions with bounds on their variables, in float64 and differentiable by autograd.

Those named `hs` are from Hock and Schittkowski, "Test Examples for Nonlinear Programming Codes",
Springer (1981), with their numbers. Others are of the CUTEst collection, by their names there, or
classical functions of `problems.py` in boxes that exclude the unconstrained minimum.

>>> hs1 = BOUNDED_BY_NAME["hs1"]
>>> float(hs1.function(hs1.start)), hs1.low.tolist()
(909.0, [-inf, -1.5])
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
INF = math.inf


@dataclass(frozen=True)
class BoundedProblem:
    """A smooth function on a box, where to start from, and what is known about its minima there.

    Attributes:
        name: A short name, unique in the table.
        function: Maps a vector of shape (n,) to a 0-dim tensor.
        start: The starting point, of shape (n,), float64. It may lie outside of the box.
        low: The lower bounds, of shape (n,); minus infinity where there is none.
        high: The upper bounds, of shape (n,); infinity where there is none.
        start_value: The function at the starting point, from the literature or by hand, or None.
        minima: Values of the known local minima in the box; a solver may end in any of them. The
            first is the smallest.
        solution: Where the first of them is; None where that has no short form.
        degenerate: Whether a multiplier of an active bound is zero at the solution.
    """

    name: str
    function: Function
    start: Tensor
    low: Tensor
    high: Tensor
    start_value: float | None
    minima: tuple[float, ...]
    solution: Tensor | None
    degenerate: bool = False

    @property
    def size(self) -> int:
        """The number of variables."""
        return self.start.numel()

    @property
    def feasible_start(self) -> Tensor:
        """The point of the box next to the starting point."""
        return self.start.clamp(self.low, self.high)

    def is_minimum(self, value: float, tolerance: float = 1e-8) -> bool:
        """Whether a value is that of a known minimum, to a tolerance relative to 1 or to it."""
        return any(abs(value - known) <= tolerance * max(1.0, abs(known)) for known in self.minima)

    def projected_gradient(self, x: Tensor) -> Tensor:
        """The step from a point along the negative gradient and back into the box.

        It is zero exactly at points that satisfy the conditions of first order.
        """
        point = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.function(point), point)
        return (x - gradient).clamp(self.low, self.high) - x


Built = tuple[Function, Tensor, Tensor, Tensor]
Builder = Callable[[Make], Built]
Row = tuple[str, float | None, tuple[float, ...], Sequence[float] | None, bool, Builder]
_BUILDERS: list[Row] = []


def _problem(
    name: str,
    start_value: float | None,
    *minima: float,
    at: Sequence[float] | None = None,
    degenerate: bool = False,
) -> Callable[[Builder], Builder]:
    """Enters a builder, which gets a maker of float64 tensors, in the table."""

    def register(builder: Builder) -> Builder:
        _BUILDERS.append((name, start_value, minima, at, degenerate, builder))
        return builder

    return register


def _squares(r: Tensor) -> Tensor:
    return r.dot(r)


def _banana(x: Tensor) -> Tensor:
    a, b = x.unbind()
    return 100.0 * (b - a * a).square() + (1.0 - a).square()


@_problem("hs1", 909.0, 0.0, at=[1.0, 1.0])
def _hs1(make: Make) -> Built:
    """Rosenbrock's function; the bound is met on the way only."""
    return _banana, make([-2.0, 1.0]), make([-INF, -1.5]), make([INF, INF])


# The stationary points of Rosenbrock's function at x2 = 1.5, by the formula of the book.
_HS2_A = math.sqrt(598.0 / 1200.0)
_HS2_X = 2.0 * _HS2_A * math.cos(math.acos(1.0 / (400.0 * _HS2_A**3)) / 3.0)


@_problem("hs2", 909.0, 0.0504261878936, 4.94122931799, at=[_HS2_X, 1.5])
def _hs2(make: Make) -> Built:
    """Rosenbrock's function above its minimum; the start is outside of the box."""
    return _banana, make([-2.0, 1.0]), make([-INF, 1.5]), make([INF, INF])


@_problem("hs3", 1.00081, 0.0, at=[0.0, 0.0])
def _hs3(make: Make) -> Built:
    """Linear but for a curvature of 1e-5."""

    def function(x: Tensor) -> Tensor:
        a, b = x.unbind()
        return b + 1e-5 * (b - a).square()

    return function, make([10.0, 1.0]), make([-INF, 0.0]), make([INF, INF])


@_problem("hs4", 2.125**3 / 3.0 + 0.125, 8.0 / 3.0, at=[1.0, 0.0])
def _hs4(make: Make) -> Built:
    """Unbounded below without the bounds."""

    def function(x: Tensor) -> Tensor:
        a, b = x.unbind()
        return (a + 1.0).pow(3) / 3.0 + b

    return function, make([1.125, 0.125]), make([1.0, 0.0]), make([INF, INF])


@_problem(
    "hs5",
    1.0,
    -math.sqrt(3.0) / 2.0 - math.pi / 3.0,
    -math.sqrt(3.0) / 2.0 + 2.0 * math.pi / 3.0,
    at=[0.5 - math.pi / 3.0, -0.5 - math.pi / 3.0],
)
def _hs5(make: Make) -> Built:
    """McCormick's function."""

    def function(x: Tensor) -> Tensor:
        a, b = x.unbind()
        return torch.sin(a + b) + (a - b).square() - 1.5 * a + 2.5 * b + 1.0

    return function, make([0.0, 0.0]), make([-1.5, -3.0]), make([4.0, 3.0])


@_problem("hs25", None, 0.0, at=[50.0, 25.0, 1.5])
def _hs25(make: Make) -> Built:
    """A fit of a curve, from another start: the one of the book is on a plateau."""
    i = make(range(1, 100))
    u = 25.0 + (-50.0 * torch.log(0.01 * i)).pow(2.0 / 3.0)

    def function(x: Tensor) -> Tensor:
        a, b, c = x.unbind()
        return _squares(torch.exp(-(u - b).pow(c) / a) - 0.01 * i)

    return function, make([70.0, 20.0, 1.8]), make([0.1, 0.0, 0.0]), make([100.0, 25.6, 5.0])


def _wood(x: Tensor) -> Tensor:
    a, b, c, d = x.unbind()
    valleys = 100.0 * (b - a * a).square() + (1.0 - a).square()
    valleys = valleys + 90.0 * (d - c * c).square() + (1.0 - c).square()
    return valleys + 10.1 * ((b - 1.0).square() + (d - 1.0).square()) + 19.8 * (b - 1.0) * (d - 1.0)


@_problem("hs38", 19192.0, 0.0, at=[1.0] * 4)
def _hs38(make: Make) -> Built:
    """Wood's function in a wide box."""
    return _wood, make([-3.0, -1.0, -3.0, -1.0]), make([-10.0] * 4), make([10.0] * 4)


@_problem("hs45", 2.0 - 32.0 / 120.0, 1.0, at=[1.0, 2.0, 3.0, 4.0, 5.0])
def _hs45(make: Make) -> Built:
    """A product; all variables end at bounds, and the start is outside of the box."""

    def function(x: Tensor) -> Tensor:
        return 2.0 - x.prod() / 120.0

    return function, make([2.0] * 5), make([0.0] * 5), make(range(1, 6))


@_problem("hs110", -43.1343369180, -45.7784697074463, at=[9.35026583306938] * 10)
def _hs110(make: Make) -> Built:
    """Not defined outside of the box; all variables are equal at the solution."""

    def function(x: Tensor) -> Tensor:
        logs = _squares(torch.log(x - 2.0)) + _squares(torch.log(10.0 - x))
        return logs - x.prod().pow(0.2)

    return function, make([9.0] * 10), make([2.001] * 10), make([9.999] * 10)


@_problem(
    "hatfldb",
    0.81 + 3.0 * (0.1 - math.sqrt(0.1)) ** 2,
    0.5 * (1.0 - math.sqrt(0.8)) ** 2,
    at=[0.5 + 0.5 * math.sqrt(0.8), 0.8, 0.64, 0.4096],
)
def _hatfldb(make: Make) -> Built:
    """CUTEst; square roots, with one active upper bound; not defined for negative variables."""

    def function(x: Tensor) -> Tensor:
        return (x[0] - 1.0).square() + _squares(x[:-1] - torch.sqrt(x[1:]))

    return function, make([0.1] * 4), make([1e-7] * 4), make([INF, 0.8, INF, INF])


@_problem("pspdoc", 2.0 * math.sqrt(10.0), 1.0 + math.sqrt(2.0), at=[-1.0, 0.0, 0.0, 0.0])
def _pspdoc(make: Make) -> Built:
    """CUTEst; convex, with one bound, above the first variable, which the start exceeds."""

    def function(x: Tensor) -> Tensor:
        a, b, c, d = x.unbind()
        first = torch.sqrt(1.0 + a * a + (b - c).square())
        return first + torch.sqrt(1.0 + b * b + (c - d).square())

    return function, make([3.0] * 4), make([-INF] * 4), make([-1.0, INF, INF, INF])


@_problem("nonscomp", 4.0 + 9.0 * 4.0 * 36.0, 0.0, at=[1.0] * 10, degenerate=True)
def _nonscomp(make: Make) -> Built:
    """CUTEst, n = 10; half of the variables end at bounds with multipliers of zero."""

    def function(x: Tensor) -> Tensor:
        return (x[0] - 1.0).square() + 4.0 * _squares(x[1:] - x[:-1].square())

    return function, make([3.0] * 10), make([1.0, -100.0] * 5), make([100.0] * 10)


@_problem("mccormck", 49.0, -46.1269256442026)
def _mccormck(make: Make) -> Built:
    """CUTEst, n = 50; McCormick's function, chained."""

    def function(x: Tensor) -> Tensor:
        a, b = x[:-1], x[1:]
        return (torch.sin(a + b) + (a - b).square() - 1.5 * a + 2.5 * b + 1.0).sum()

    return function, make([0.0] * 50), make([-1.5] * 50), make([3.0] * 50)


@_problem("exponential", 0.0, -2922.54928425019)
def _exponential(make: Make) -> Built:
    """n = 100; convex, exponentials of the sums of neighbours against a linear pull."""
    rates = 0.02 * make(range(1, 101))
    pull = make([1.0, 3.0, -1.0, 20.0] * 25)

    def function(x: Tensor) -> Tensor:
        sums = x + torch.nn.functional.pad(x[1:], (0, 1))
        return torch.expm1(rates * sums).sum() - pull.dot(x)

    return function, make([0.0] * 100), make([0.0] * 100), make([2.0, INF] * 50)


@_problem("bounded_rosenbrock", 29.0, 15.7620441881602, 19.6451880420985)
def _bounded_rosenbrock(make: Make) -> Built:
    """The chained function, n = 30, below 0.9 at every third variable."""

    def function(x: Tensor) -> Tensor:
        return 100.0 * _squares(x[1:] - x[:-1].square()) + _squares(1.0 - x[:-1])

    return function, make([0.0] * 30), make([-2.0] * 30), make([2.0, 2.0, 0.9] * 10)


@_problem("bounded_wood", 19192.0, 0.241665292065171, 5.03742713774618)
def _bounded_wood(make: Make) -> Built:
    """Wood's function, with bounds on one side only."""
    return _wood, make([-3.0, -1.0, -3.0, -1.0]), make([-INF] * 4), make([INF, INF, 0.7, INF])


@_problem("fixed_wood", 19192.0, 0.569967159624170, 5.74187306543597)
def _fixed_wood(make: Make) -> Built:
    """Wood's function, with its third variable fixed."""
    start, low = make([-3.0, -1.0, -3.0, -1.0]), make([-10.0, -10.0, 0.5, -10.0])
    return _wood, start, low, make([10.0, 10.0, 0.5, 10.0])


def _extended_powell(x: Tensor) -> Tensor:
    a, b, c, d = x.view(-1, 4).unbind(1)
    first = _squares(a + 10.0 * b) + 5.0 * _squares(c - d)
    return first + _squares((b - 2.0 * c).square()) + 10.0 * _squares((a - d).square())


@_problem("bounded_powell", 5 * 215.0, 0.100537575088495)
def _bounded_powell(make: Make) -> Built:
    """Powell's singular function, n = 20, with the singular minimum outside of the box."""
    low = make([0.1, -INF, -INF, 0.2] * 5)
    return _extended_powell, make([3.0, -1.0, 0.0, 1.0] * 5), low, make([INF] * 20)


@_problem("cornered_powell", 215.0, 0.0, at=[0.0] * 4, degenerate=True)
def _cornered_powell(make: Make) -> Built:
    """Powell's singular function; its minimum is in a corner, with singular Hessian."""
    start = make([3.0, -1.0, 0.0, 1.0])
    return _extended_powell, start, make([0.0, -1.0, 0.0, -1.0]), make([4.0, 0.0, 4.0, 4.0])


@_problem("degenerate_quadratic", None, 0.0, degenerate=True)
def _degenerate_quadratic(make: Make) -> Built:
    """n = 40, condition 1e3; at the solution a third is free, a third of multipliers is zero."""
    matrix, solution = _spectrum(make, 40, 3.0)
    third = make([1.0, 2.0, 3.0] * 14)[:40]
    multipliers = (third == 3.0).to(solution)

    def function(x: Tensor) -> Tensor:
        # Written around the minimum, so that no digits are lost to cancellation there.
        r = x - solution
        return 0.5 * r.dot(matrix @ r) + multipliers.dot(r)

    low = torch.where(third == 1.0, solution - 1.0, solution)
    return function, solution + 2.0 * third, low, solution + 10.0


def _spectrum(make: Make, n: int, decades: float) -> tuple[Tensor, Tensor]:
    """A random matrix with eigenvalues log-spaced from 1 to `10**decades`, and a random vector."""
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(n, n + 1, dtype=torch.float64, generator=generator)
    basis, _ = torch.linalg.qr(gaussian[:, :n])
    eigenvalues = torch.logspace(0.0, decades, n, dtype=torch.float64)
    return make((basis * eigenvalues) @ basis.T), make(gaussian[:, n])


@_problem("nonnegative_least_squares", None, 11.2990087208246)
def _nonnegative_least_squares(make: Make) -> Built:
    """60 equations in 30 nonnegative unknowns; about half are zero at the solution."""
    i, j = make(range(1, 61)), make(range(1, 31))
    matrix, right = torch.sin(torch.outer(i, j) + j * j), torch.cos(3.0 * i * i)

    def function(x: Tensor) -> Tensor:
        return 0.5 * _squares(matrix @ x - right)

    return function, make([1.0] * 30), make([0.0] * 30), make([INF] * 30)


def _membrane(v: Tensor, side: int, load: float) -> Tensor:
    """Energy of a loaded membrane over the unit square, held at its edges, on a regular grid."""
    grid = torch.nn.functional.pad(v.view(side, side), (1, 1, 1, 1))
    stretch = grid.diff(dim=0).square().sum() + grid.diff(dim=1).square().sum()
    return 0.5 * stretch - load / (side + 1) ** 2 * v.sum()


def _mesh(make: Make, side: int) -> tuple[Tensor, Tensor]:
    """Coordinates of the inner points of a regular grid on the unit square, each flat."""
    line = make(range(1, side + 1)) / (side + 1)
    x, y = torch.meshgrid(line, line, indexing="ij")
    return x.reshape(-1), y.reshape(-1)


@_problem("torsion", 0.0, -0.416112871791891)
def _torsion(make: Make) -> Built:
    """MINPACK-2, n = 400; a bar twisted until it yields (force 5): bounded by the distance."""
    x, y = _mesh(make, 20)
    distance = torch.stack([x, 1.0 - x, y, 1.0 - y]).amin(0)
    return lambda v: _membrane(v, 20, 5.0), torch.zeros_like(x), -distance, distance


@_problem("obstacle", None, 6.51338001151660)
def _obstacle(make: Make) -> Built:
    """Moré and Toraldo (1991), n = 225; a membrane between two obstacles, started on the lower."""
    x, y = _mesh(make, 15)
    waves = torch.sin(9.2 * x) * torch.sin(9.3 * y)
    low, high = waves**3, waves**2 + 0.02
    return lambda v: _membrane(v, 15, 1.0), low.clone(), low, high


@_problem("journal_bearing", None, -0.178637410976918)
def _journal_bearing(make: Make) -> Built:
    """MINPACK-2, n = 300; pressure in a film of oil, not negative, with a free boundary."""
    across, along, eccentricity = 20, 15, 0.1
    h, k = 2.0 * math.pi / (across + 1), 20.0 / (along + 1)
    whole, half = make(range(1, across + 1)), make(range(across + 1)) + 0.5
    weight, between = ((1.0 + eccentricity * torch.cos(h * i[:, None])) ** 3 for i in (whole, half))
    load = h * k * eccentricity * torch.sin(h * whole[:, None])

    def function(v: Tensor) -> Tensor:
        grid = v.view(across, along)
        padded = torch.nn.functional.pad(grid, (1, 1, 1, 1))
        down = (k / h * between * padded[:, 1:-1].diff(dim=0).square()).sum()
        right = (h / k * weight * padded[1:-1].diff(dim=1).square()).sum()
        return 0.5 * (down + right) - (load * grid).sum()

    x = whole[:, None].expand(across, along)
    start = torch.sin(h * x).clamp(min=0.0).reshape(-1)
    return function, start, torch.zeros_like(start), torch.full_like(start, INF)


def _waves(x: float) -> float:
    return x * x - 10.0 * math.cos(2.0 * math.pi * x)


@_problem(
    "boxed_rastrigin",
    None,
    *sorted(k * _waves(0.3) + (10 - k) * _waves(0.95) for k in range(11)),
    at=[0.95] * 10,
)
def _boxed_rastrigin(make: Make) -> Built:
    """n = 10, on [0.3, 0.95]: a maximum inside, and a minimum in each of 1,024 corners."""

    def function(x: Tensor) -> Tensor:
        return _squares(x) - 10.0 * torch.cos(2.0 * math.pi * x).sum()

    return function, 0.4 + 0.02 * make(range(10)), make([0.3] * 10), make([0.95] * 10)


def polished(problem: BoundedProblem, x: Tensor, steps: int = 50) -> Tensor:
    """The local minimum next to a point, by Newton's method on the variables off their bounds.

    A check on other solvers, not one itself: it takes full steps, and stops where they rise.

    Args:
        problem: The problem.
        x: A point close to the minimum.
        steps: The largest number of steps.
    """
    low, high = problem.low, problem.high
    gradient = torch.func.grad(problem.function)
    hessian = torch.func.jacrev(gradient)
    x = x.clamp(low, high)
    for _ in range(steps):
        g = gradient(x)
        down, up = (x <= low + 1e-9) & (g > 0.0), (x >= high - 1e-9) & (g < 0.0)
        x = torch.where(down, low, torch.where(up, high, x))
        free = ~(down | up | (low == high))
        if not free.any():
            break
        inverse = torch.linalg.pinv(hessian(x)[free][:, free], hermitian=True)
        trial = x.clone()
        trial[free] -= inverse @ g[free]
        trial = trial.clamp(low, high)
        value = problem.function(x)
        if torch.equal(trial, x) or problem.function(trial) > value + 1e-14 * value.abs():
            break
        x = trial
    return x


def make_bounded_problems(device: torch.device | str = "cpu") -> tuple[BoundedProblem, ...]:
    """Builds the table with its constants and starting points on a device."""

    def make(values: Sequence[float] | Tensor) -> Tensor:
        data = values if isinstance(values, Tensor) else list(values)
        return torch.as_tensor(data, dtype=torch.float64, device=device)

    table = []
    for name, start_value, minima, at, degenerate, builder in _BUILDERS:
        function, start, low, high = builder(make)
        solution = None if at is None else make(at)
        table.append(
            BoundedProblem(
                name, function, start, low, high, start_value, minima, solution, degenerate
            )
        )
    return tuple(table)


BOUNDED_PROBLEMS: tuple[BoundedProblem, ...] = make_bounded_problems()
BOUNDED_BY_NAME: dict[str, BoundedProblem] = {p.name: p for p in BOUNDED_PROBLEMS}
