"""Problems with general constraints, in float64 and differentiable by autograd.

They are from Hock and Schittkowski, "Test Examples for Nonlinear Programming Codes", Springer
(1981), with their numbers: equalities `h(x) = 0`, inequalities `g(x) <= 0` (the book has `>= 0`)
and bounds, which are kept apart from the inequalities.

>>> hs14 = CONSTRAINED_BY_NAME["hs14"]
>>> float(hs14.function(hs14.start)), hs14.violation(hs14.start)
(1.0, 4.0)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]
INF = math.inf


@dataclass(frozen=True)
class ConstrainedProblem:
    """A smooth function with constraints, where to start from, and its known minimum.

    Attributes:
        name: A short name, unique in the table.
        about: A sentence about it.
        function: Maps a vector of shape (n,) to a 0-dim tensor.
        start: The starting point, of shape (n,), float64. It may violate everything.
        equalities: Maps a vector to values that are to be zero; None if there are none.
        inequalities: Maps a vector to values that are to be zero or less, without the bounds;
            None if there are none.
        low: The lower bounds, of shape (n,), minus infinity where there is none; or None.
        high: The upper bounds, of shape (n,), infinity where there is none; or None.
        start_value: The function at the starting point, from the book or by hand.
        minimum: The smallest value under the constraints.
    """

    name: str
    about: str
    function: Function
    start: Tensor
    equalities: Function | None
    inequalities: Function | None
    low: Tensor | None
    high: Tensor | None
    start_value: float
    minimum: float

    @property
    def size(self) -> int:
        """The number of variables."""
        return self.start.numel()

    def all_equalities(self, x: Tensor) -> Tensor:
        """The values that are to be zero, perhaps none."""
        return x.new_zeros(0) if self.equalities is None else self.equalities(x)

    def all_inequalities(self, x: Tensor) -> Tensor:
        """The values that are to be zero or less: the inequalities, then finite bounds as rows."""
        rows = [x.new_zeros(0) if self.inequalities is None else self.inequalities(x)]
        if self.low is not None:
            rows.append((self.low - x)[self.low.isfinite()])
        if self.high is not None:
            rows.append((x - self.high)[self.high.isfinite()])
        return torch.cat(rows)

    def violation(self, x: Tensor) -> float:
        """The largest violation of a constraint or bound."""
        x = x.detach()
        violations = (self.all_equalities(x).abs(), self.all_inequalities(x).clamp(min=0))
        return max(v.max().item() for v in violations if len(v))

    def is_minimum(self, value: float, tolerance: float = 1e-6) -> bool:
        """Whether a value is the minimum, to a tolerance relative to 1 or to it."""
        return abs(value - self.minimum) <= tolerance * max(1.0, abs(self.minimum))

    def kkt_residual(self, x: Tensor, of_equalities: Tensor, of_inequalities: Tensor) -> float:
        """The largest violation of the conditions of Karush, Kuhn and Tucker.

        Args:
            x: A point, of shape (n,).
            of_equalities: Multipliers in the order of `all_equalities`.
            of_inequalities: Multipliers in the order of `all_inequalities`.
        """
        point = x.detach().clone().requires_grad_()
        h, g = self.all_equalities(point), self.all_inequalities(point)
        lagrangian = self.function(point) + of_equalities @ h + of_inequalities @ g
        (gradient,) = torch.autograd.grad(lagrangian, point)
        residuals = [gradient.abs(), h.abs(), g.clamp(min=0)]
        residuals += [(-of_inequalities).clamp(min=0), (of_inequalities * g).abs()]
        return torch.cat(residuals).max().item()


@dataclass(frozen=True)
class _Row:
    """A problem, with numbers in place of tensors, and a word about it."""

    name: str
    about: str
    start_value: float
    minimum: float
    function: Function
    start: Sequence[float]
    equalities: Function | None = None
    inequalities: Function | None = None
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


_TABLE: list[_Row] = []


def _problem(*about: str, **more: Any) -> None:
    """Enters a problem in the table."""
    _TABLE.append(_Row(*about, **more))


def _rows(*values: Tensor) -> Tensor:
    return torch.stack(values)


def _banana(x: Tensor) -> Tensor:
    a, b = x.unbind()
    return 100.0 * (b - a * a).square() + (1.0 - a).square()


def _minus_product(x: Tensor) -> Tensor:
    return -x.prod()


#: Free energies of the compounds of a reaction.
_ENERGIES = (
    *(-6.089, -17.164, -34.054, -5.914, -24.721),
    *(-14.986, -24.100, -10.708, -26.662, -22.179),
)


def _wong(x: Tensor) -> Tensor:
    """The inequalities of hs113."""
    return _rows(
        4.0 * x[0] + 5.0 * x[1] - 3.0 * x[6] + 9.0 * x[7] - 105.0,
        10.0 * x[0] - 8.0 * x[1] - 17.0 * x[6] + 2.0 * x[7],
        -8.0 * x[0] + 2.0 * x[1] + 5.0 * x[8] - 2.0 * x[9] - 12.0,
        3.0 * (x[0] - 2.0) ** 2 + 4.0 * (x[1] - 3.0) ** 2 + 2.0 * x[2] ** 2 - 7.0 * x[3] - 120.0,
        5.0 * x[0] ** 2 + 8.0 * x[1] + (x[2] - 6.0) ** 2 - 2.0 * x[3] - 40.0,
        0.5 * (x[0] - 8.0) ** 2 + 2.0 * (x[1] - 4.0) ** 2 + 3.0 * x[4] ** 2 - x[5] - 30.0,
        x[0] ** 2 + 2.0 * (x[1] - 2.0) ** 2 - 2.0 * x[0] * x[1] + 14.0 * x[4] - 6.0 * x[5],
        -3.0 * x[0] + 6.0 * x[1] + 12.0 * (x[8] - 8.0) ** 2 - 7.0 * x[9],
    )


_problem(
    "hs6",
    "Rosenbrock's function, split into objective and constraint.",
    start_value=4.84,
    minimum=0.0,
    function=lambda x: (1.0 - x[0]) ** 2,
    start=[-1.2, 1.0],
    equalities=lambda x: _rows(10.0 * (x[1] - x[0] ** 2)),
)
_problem(
    "hs7",
    "A logarithm on a closed curve.",
    start_value=math.log(5.0) - 2.0,
    minimum=-math.sqrt(3.0),
    function=lambda x: torch.log(1.0 + x[0] ** 2) - x[1],
    start=[2.0, 2.0],
    equalities=lambda x: _rows((1.0 + x[0] ** 2) ** 2 + x[1] ** 2 - 4.0),
)
_problem(
    "hs9",
    "A wave with one linear constraint; it has many solutions.",
    start_value=0.0,
    minimum=-0.5,
    function=lambda x: torch.sin(math.pi * x[0] / 12.0) * torch.cos(math.pi * x[1] / 16.0),
    start=[0.0, 0.0],
    equalities=lambda x: _rows(4.0 * x[0] - 3.0 * x[1]),
)
_problem(
    "hs10",
    "Linear on an ellipse, from far outside.",
    start_value=-20.0,
    minimum=-1.0,
    function=lambda x: x[0] - x[1],
    start=[-10.0, 10.0],
    inequalities=lambda x: _rows(3.0 * x[0] ** 2 - 2.0 * x[0] * x[1] + x[1] ** 2 - 1.0),
)
_problem(
    "hs11",
    "The distance to a point outside of a parabola.",
    start_value=-24.98,
    minimum=-8.498464223,
    function=lambda x: (x[0] - 5.0) ** 2 + x[1] ** 2 - 25.0,
    start=[4.9, 0.1],
    inequalities=lambda x: _rows(x[0] ** 2 - x[1]),
)
_problem(
    "hs12",
    "Quadratic, with an ellipse.",
    start_value=0.0,
    minimum=-30.0,
    function=lambda x: 0.5 * x[0] ** 2 + x[1] ** 2 - x[0] * x[1] - 7.0 * x[0] - 7.0 * x[1],
    start=[0.0, 0.0],
    inequalities=lambda x: _rows(4.0 * x[0] ** 2 + x[1] ** 2 - 25.0),
)
_problem(
    "hs14",
    "Quadratic, with a line and an ellipse.",
    start_value=1.0,
    minimum=9.0 - 2.875 * math.sqrt(7.0),
    function=lambda x: (x[0] - 2.0) ** 2 + (x[1] - 1.0) ** 2,
    start=[2.0, 2.0],
    equalities=lambda x: _rows(x[0] - 2.0 * x[1] + 1.0),
    inequalities=lambda x: _rows(x[0] ** 2 / 4.0 + x[1] ** 2 - 1.0),
)
_problem(
    "hs15",
    "Rosenbrock's function, pushed to a corner; the start is far outside.",
    start_value=909.0,
    minimum=306.5,
    function=_banana,
    start=[-2.0, 1.0],
    inequalities=lambda x: _rows(1.0 - x[0] * x[1], -x[0] - x[1] ** 2),
    high=[0.5, INF],
)
_problem(
    "hs17",
    "Rosenbrock's function between two parabolas; the solution is the origin.",
    start_value=909.0,
    minimum=1.0,
    function=_banana,
    start=[-2.0, 1.0],
    inequalities=lambda x: _rows(x[0] - x[1] ** 2, x[1] - x[0] ** 2),
    low=[-0.5, -INF],
    high=[0.5, 1.0],
)
_problem(
    "hs18",
    "Quadratic, with a hyperbola and the outside of a circle.",
    start_value=4.04,
    minimum=5.0,
    function=lambda x: 0.01 * x[0] ** 2 + x[1] ** 2,
    start=[2.0, 2.0],
    inequalities=lambda x: _rows(25.0 - x[0] * x[1], 25.0 - x[0] ** 2 - x[1] ** 2),
    low=[2.0, 0.0],
    high=[50.0, 50.0],
)
_problem(
    "hs22",
    "Quadratic, with a line and a parabola.",
    start_value=1.0,
    minimum=1.0,
    function=lambda x: (x[0] - 2.0) ** 2 + (x[1] - 1.0) ** 2,
    start=[2.0, 2.0],
    inequalities=lambda x: _rows(x[0] + x[1] - 2.0, x[0] ** 2 - x[1]),
)
_problem(
    "hs23",
    "Quadratic, outside of curves; two of them meet at the solution.",
    start_value=10.0,
    minimum=2.0,
    function=lambda x: x[0] ** 2 + x[1] ** 2,
    start=[3.0, 1.0],
    inequalities=lambda x: _rows(
        1.0 - x[0] - x[1],
        1.0 - x[0] ** 2 - x[1] ** 2,
        9.0 - 9.0 * x[0] ** 2 - x[1] ** 2,
        x[1] - x[0] ** 2,
        x[0] - x[1] ** 2,
    ),
    low=[-50.0, -50.0],
    high=[50.0, 50.0],
)
_problem(
    "hs24",
    "A cubic on a triangle.",
    start_value=-5.0 / (8.0 * 27.0 * math.sqrt(3.0)),
    minimum=-1.0,
    function=lambda x: ((x[0] - 3.0) ** 2 - 9.0) * x[1] ** 3 / (27.0 * math.sqrt(3.0)),
    start=[1.0, 0.5],
    inequalities=lambda x: _rows(
        -x[0] / math.sqrt(3.0) + x[1],
        -x[0] - math.sqrt(3.0) * x[1],
        x[0] + math.sqrt(3.0) * x[1] - 6.0,
    ),
    low=[0.0, 0.0],
)
_problem(
    "hs26",
    "The Hessian of the Lagrangian is singular at the solution.",
    start_value=21.16,
    minimum=0.0,
    function=lambda x: (x[0] - x[1]) ** 2 + (x[1] - x[2]) ** 4,
    start=[-2.6, 2.0, 2.0],
    equalities=lambda x: _rows((1.0 + x[1] ** 2) * x[0] + x[2] ** 4 - 3.0),
)
_problem(
    "hs27",
    "A curved valley with an equality.",
    start_value=4.01,
    minimum=0.04,
    function=lambda x: 0.01 * (x[0] - 1.0) ** 2 + (x[1] - x[0] ** 2) ** 2,
    start=[2.0, 2.0, 2.0],
    equalities=lambda x: _rows(x[0] + x[2] ** 2 + 1.0),
)
_problem(
    "hs28",
    "A convex quadratic program with a line.",
    start_value=13.0,
    minimum=0.0,
    function=lambda x: (x[0] + x[1]) ** 2 + (x[1] + x[2]) ** 2,
    start=[-4.0, 1.0, 1.0],
    equalities=lambda x: _rows(x[0] + 2.0 * x[1] + 3.0 * x[2] - 1.0),
)
_problem(
    "hs29",
    "A product on an ellipsoid; unbounded below outside of it.",
    start_value=-1.0,
    minimum=-16.0 * math.sqrt(2.0),
    function=_minus_product,
    start=[1.0, 1.0, 1.0],
    inequalities=lambda x: _rows(x[0] ** 2 + 2.0 * x[1] ** 2 + 4.0 * x[2] ** 2 - 48.0),
)
_problem(
    "hs30",
    "A ball outside of a cylinder; the constraint's multiplier is not unique.",
    start_value=3.0,
    minimum=1.0,
    function=lambda x: (x**2).sum(),
    start=[1.0, 1.0, 1.0],
    inequalities=lambda x: _rows(1.0 - x[0] ** 2 - x[1] ** 2),
    low=[1.0, -10.0, -10.0],
    high=[10.0, 10.0, 10.0],
)
_problem(
    "hs31",
    "Quadratic, with a hyperbola.",
    start_value=19.0,
    minimum=6.0,
    function=lambda x: 9.0 * x[0] ** 2 + x[1] ** 2 + 9.0 * x[2] ** 2,
    start=[1.0, 1.0, 1.0],
    inequalities=lambda x: _rows(1.0 - x[0] * x[1]),
    low=[-10.0, 1.0, -10.0],
    high=[10.0, 10.0, 1.0],
)
_problem(
    "hs32",
    "Quadratic, with a line, a cubic and a corner of bounds.",
    start_value=7.2,
    minimum=1.0,
    function=lambda x: (x[0] + 3.0 * x[1] + x[2]) ** 2 + 4.0 * (x[0] - x[1]) ** 2,
    start=[0.1, 0.7, 0.2],
    equalities=lambda x: _rows(1.0 - x[0] - x[1] - x[2]),
    inequalities=lambda x: _rows(x[0] ** 3 - 6.0 * x[1] - 4.0 * x[2] + 3.0),
    low=[0.0, 0.0, 0.0],
)
_problem(
    "hs34",
    "Linear, with two nested exponentials.",
    start_value=0.0,
    minimum=-math.log(math.log(10.0)),
    function=lambda x: -x[0],
    start=[0.0, 1.05, 2.9],
    inequalities=lambda x: _rows(torch.exp(x[0]) - x[1], torch.exp(x[1]) - x[2]),
    low=[0.0, 0.0, 0.0],
    high=[100.0, 100.0, 10.0],
)
_problem(
    "hs35",
    "A convex quadratic program (Beale).",
    start_value=2.25,
    minimum=1.0 / 9.0,
    function=lambda x: (
        9.0
        - 8.0 * x[0]
        - 6.0 * x[1]
        - 4.0 * x[2]
        + 2.0 * x[0] ** 2
        + 2.0 * x[1] ** 2
        + x[2] ** 2
        + 2.0 * x[0] * x[1]
        + 2.0 * x[0] * x[2]
    ),
    start=[0.5, 0.5, 0.5],
    inequalities=lambda x: _rows(x[0] + x[1] + 2.0 * x[2] - 3.0),
    low=[0.0, 0.0, 0.0],
)
_problem(
    "hs36",
    "The volume of a box that is to be posted; two bounds are active.",
    start_value=-1000.0,
    minimum=-3300.0,
    function=_minus_product,
    start=[10.0, 10.0, 10.0],
    inequalities=lambda x: _rows(x[0] + 2.0 * x[1] + 2.0 * x[2] - 72.0),
    low=[0.0, 0.0, 0.0],
    high=[20.0, 11.0, 42.0],
)
_problem(
    "hs37",
    "The volume of a box that is to be posted.",
    start_value=-1000.0,
    minimum=-3456.0,
    function=_minus_product,
    start=[10.0, 10.0, 10.0],
    inequalities=lambda x: _rows(
        x[0] + 2.0 * x[1] + 2.0 * x[2] - 72.0, -x[0] - 2.0 * x[1] - 2.0 * x[2]
    ),
    low=[0.0, 0.0, 0.0],
    high=[42.0, 42.0, 42.0],
)
_problem(
    "hs39",
    "Linear, with two equalities of third order.",
    start_value=-2.0,
    minimum=-1.0,
    function=lambda x: -x[0],
    start=[2.0, 2.0, 2.0, 2.0],
    equalities=lambda x: _rows(x[1] - x[0] ** 3 - x[2] ** 2, x[0] ** 2 - x[1] - x[3] ** 2),
)
_problem(
    "hs40",
    "A product with three equalities.",
    start_value=-0.4096,
    minimum=-0.25,
    function=_minus_product,
    start=[0.8, 0.8, 0.8, 0.8],
    equalities=lambda x: _rows(
        x[0] ** 3 + x[1] ** 2 - 1.0, x[0] ** 2 * x[3] - x[2], x[3] ** 2 - x[1]
    ),
)
_problem(
    "hs42",
    "The distance to a point from a circle.",
    start_value=14.0,
    minimum=28.0 - 10.0 * math.sqrt(2.0),
    function=lambda x: (
        (x[0] - 1.0) ** 2 + (x[1] - 2.0) ** 2 + (x[2] - 3.0) ** 2 + (x[3] - 4.0) ** 2
    ),
    start=[1.0, 1.0, 1.0, 1.0],
    equalities=lambda x: _rows(x[0] - 2.0, x[2] ** 2 + x[3] ** 2 - 2.0),
)
_problem(
    "hs43",
    "Quadratic, with three quadratic inequalities (Rosen and Suzuki).",
    start_value=0.0,
    minimum=-44.0,
    function=lambda x: (
        x[0] ** 2
        + x[1] ** 2
        + 2.0 * x[2] ** 2
        + x[3] ** 2
        - 5.0 * x[0]
        - 5.0 * x[1]
        - 21.0 * x[2]
        + 7.0 * x[3]
    ),
    start=[0.0, 0.0, 0.0, 0.0],
    inequalities=lambda x: (
        -_rows(
            8.0 - x[0] ** 2 - x[1] ** 2 - x[2] ** 2 - x[3] ** 2 - x[0] + x[1] - x[2] + x[3],
            10.0 - x[0] ** 2 - 2.0 * x[1] ** 2 - x[2] ** 2 - 2.0 * x[3] ** 2 + x[0] + x[3],
            5.0 - 2.0 * x[0] ** 2 - x[1] ** 2 - x[2] ** 2 - 2.0 * x[0] + x[1] + x[3],
        )
    ),
)
_problem(
    "hs46",
    "The Hessian of the Lagrangian is singular at the solution.",
    start_value=(1.75 - math.sqrt(0.5)) ** 2 + 2.25,
    minimum=0.0,
    function=lambda x: (
        (x[0] - x[1]) ** 2 + (x[2] - 1.0) ** 2 + (x[3] - 1.0) ** 4 + (x[4] - 1.0) ** 6
    ),
    start=[0.5 * math.sqrt(2.0), 1.75, 0.5, 2.0, 2.0],
    equalities=lambda x: _rows(
        x[0] ** 2 * x[3] + torch.sin(x[3] - x[4]) - 1.0, x[1] + x[2] ** 4 * x[3] ** 2 - 2.0
    ),
)
_problem(
    "hs47",
    "Of fourth order, with three equalities; a cube makes it unbounded below.",
    start_value=(2.0 - math.sqrt(2.0)) ** 2
    + (1.0 + math.sqrt(2.0)) ** 3
    + (3.0 - math.sqrt(2.0)) ** 4
    + (1.5 - math.sqrt(2.0)) ** 4,
    minimum=0.0,
    function=lambda x: (
        (x[0] - x[1]) ** 2 + (x[1] - x[2]) ** 3 + (x[2] - x[3]) ** 4 + (x[3] - x[4]) ** 4
    ),
    start=[2.0, math.sqrt(2.0), -1.0, 2.0 - math.sqrt(2.0), 0.5],
    equalities=lambda x: _rows(
        x[0] + x[1] ** 2 + x[2] ** 3 - 3.0, x[1] - x[2] ** 2 + x[3] - 1.0, x[0] * x[4] - 1.0
    ),
)
_problem(
    "hs48",
    "A convex quadratic program with two equalities.",
    start_value=84.0,
    minimum=0.0,
    function=lambda x: (x[0] - 1.0) ** 2 + (x[1] - x[2]) ** 2 + (x[3] - x[4]) ** 2,
    start=[3.0, 5.0, -3.0, 2.0, -2.0],
    equalities=lambda x: _rows(x.sum() - 5.0, x[2] - 2.0 * (x[3] + x[4]) + 3.0),
)
_problem(
    "hs49",
    "Of sixth order, with two lines; the Hessian is singular at the solution.",
    start_value=266.000064,
    minimum=0.0,
    function=lambda x: (
        (x[0] - x[1]) ** 2 + (x[2] - 1.0) ** 2 + (x[3] - 1.0) ** 4 + (x[4] - 1.0) ** 6
    ),
    start=[10.0, 7.0, 2.0, -3.0, 0.8],
    equalities=lambda x: _rows(x[0] + x[1] + x[2] + 4.0 * x[3] - 7.0, x[2] + 5.0 * x[4] - 6.0),
)
_problem(
    "hs50",
    "Of fourth order, with three lines; the start is far away.",
    start_value=7516.0,
    minimum=0.0,
    function=lambda x: (
        (x[0] - x[1]) ** 2 + (x[1] - x[2]) ** 2 + (x[2] - x[3]) ** 4 + (x[3] - x[4]) ** 2
    ),
    start=[35.0, -31.0, 11.0, 5.0, -5.0],
    equalities=lambda x: _rows(
        x[0] + 2.0 * x[1] + 3.0 * x[2] - 6.0,
        x[1] + 2.0 * x[2] + 3.0 * x[3] - 6.0,
        x[2] + 2.0 * x[3] + 3.0 * x[4] - 6.0,
    ),
)
_problem(
    "hs51",
    "A convex quadratic program with three equalities.",
    start_value=8.5,
    minimum=0.0,
    function=lambda x: (
        (x[0] - x[1]) ** 2 + (x[1] + x[2] - 2.0) ** 2 + (x[3] - 1.0) ** 2 + (x[4] - 1.0) ** 2
    ),
    start=[2.5, 0.5, 2.0, -1.0, 0.5],
    equalities=lambda x: _rows(x[0] + 3.0 * x[1] - 4.0, x[2] + x[3] - 2.0 * x[4], x[1] - x[4]),
)
_problem(
    "hs52",
    "A convex quadratic program with three equalities, infeasible at the start.",
    start_value=42.0,
    minimum=1859.0 / 349.0,
    function=lambda x: (
        (4.0 * x[0] - x[1]) ** 2 + (x[1] + x[2] - 2.0) ** 2 + (x[3] - 1.0) ** 2 + (x[4] - 1.0) ** 2
    ),
    start=[2.0, 2.0, 2.0, 2.0, 2.0],
    equalities=lambda x: _rows(x[0] + 3.0 * x[1], x[2] + x[3] - 2.0 * x[4], x[1] - x[4]),
)
_problem(
    "hs53",
    "A convex quadratic program with three equalities and bounds.",
    start_value=6.0,
    minimum=176.0 / 43.0,
    function=lambda x: (
        (x[0] - x[1]) ** 2 + (x[1] + x[2] - 2.0) ** 2 + (x[3] - 1.0) ** 2 + (x[4] - 1.0) ** 2
    ),
    start=[2.0, 2.0, 2.0, 2.0, 2.0],
    equalities=lambda x: _rows(x[0] + 3.0 * x[1], x[2] + x[3] - 2.0 * x[4], x[1] - x[4]),
    low=[-10.0] * 5,
    high=[10.0] * 5,
)
_problem(
    "hs60",
    "Of fourth order, with one equality.",
    start_value=1.0,
    minimum=0.03256820025,
    function=lambda x: (x[0] - 1.0) ** 2 + (x[0] - x[1]) ** 2 + (x[1] - x[2]) ** 4,
    start=[2.0, 2.0, 2.0],
    equalities=lambda x: _rows(x[0] * (1.0 + x[1] ** 2) + x[2] ** 4 - 4.0 - 3.0 * math.sqrt(2.0)),
    low=[-10.0] * 3,
    high=[10.0] * 3,
)
_problem(
    "hs61",
    "Its equalities contradict each other, linearized at the start.",
    start_value=0.0,
    minimum=-143.6461422,
    function=lambda x: (
        4.0 * x[0] ** 2
        + 2.0 * x[1] ** 2
        + 2.0 * x[2] ** 2
        - 33.0 * x[0]
        + 16.0 * x[1]
        - 24.0 * x[2]
    ),
    start=[0.0, 0.0, 0.0],
    equalities=lambda x: _rows(3.0 * x[0] - 2.0 * x[1] ** 2 - 7.0, 4.0 * x[0] - x[2] ** 2 - 11.0),
)
_problem(
    "hs63",
    "Concave, with a plane and a sphere.",
    start_value=976.0,
    minimum=961.7151721,
    function=lambda x: 1000.0 - x[0] ** 2 - 2.0 * x[1] ** 2 - x[2] ** 2 - x[0] * x[1] - x[0] * x[2],
    start=[2.0, 2.0, 2.0],
    equalities=lambda x: _rows(
        8.0 * x[0] + 14.0 * x[1] + 7.0 * x[2] - 56.0, x[0] ** 2 + x[1] ** 2 + x[2] ** 2 - 25.0
    ),
    low=[0.0] * 3,
)
_problem(
    "hs64",
    "Reciprocals, of very different size.",
    start_value=266035.0,
    minimum=6299.842428,
    function=lambda x: (
        5.0 * x[0] + 50000.0 / x[0] + 20.0 * x[1] + 72000.0 / x[1] + 10.0 * x[2] + 144000.0 / x[2]
    ),
    start=[1.0, 1.0, 1.0],
    inequalities=lambda x: _rows(4.0 / x[0] + 32.0 / x[1] + 120.0 / x[2] - 1.0),
    low=[1e-05] * 3,
)
_problem(
    "hs65",
    "Quadratic, with a ball; the start is in a corner of the bounds.",
    start_value=1225.0 / 9.0,
    minimum=0.9535288567,
    function=lambda x: (x[0] - x[1]) ** 2 + (x[0] + x[1] - 10.0) ** 2 / 9.0 + (x[2] - 5.0) ** 2,
    start=[-5.0, 5.0, 0.0],
    inequalities=lambda x: _rows(x[0] ** 2 + x[1] ** 2 + x[2] ** 2 - 48.0),
    low=[-4.5, -4.5, -5.0],
    high=[4.5, 4.5, 5.0],
)
_problem(
    "hs66",
    "Linear, with two nested exponentials.",
    start_value=0.58,
    minimum=0.5181632741,
    function=lambda x: 0.2 * x[2] - 0.8 * x[0],
    start=[0.0, 1.05, 2.9],
    inequalities=lambda x: _rows(torch.exp(x[0]) - x[1], torch.exp(x[1]) - x[2]),
    low=[0.0, 0.0, 0.0],
    high=[100.0, 100.0, 10.0],
)
_problem(
    "hs71",
    "Products, with an equality, an inequality and bounds.",
    start_value=16.0,
    minimum=17.0140173,
    function=lambda x: x[0] * x[3] * (x[0] + x[1] + x[2]) + x[2],
    start=[1.0, 5.0, 5.0, 1.0],
    equalities=lambda x: _rows((x**2).sum() - 40.0),
    inequalities=lambda x: _rows(25.0 - x.prod()),
    low=[1.0] * 4,
    high=[5.0] * 4,
)
_problem(
    "hs76",
    "A convex quadratic program with three inequalities.",
    start_value=-1.25,
    minimum=-4.681818181,
    function=lambda x: (
        x[0] ** 2
        + 0.5 * x[1] ** 2
        + x[2] ** 2
        + 0.5 * x[3] ** 2
        - x[0] * x[2]
        + x[2] * x[3]
        - x[0]
        - 3.0 * x[1]
        + x[2]
        - x[3]
    ),
    start=[0.5, 0.5, 0.5, 0.5],
    inequalities=lambda x: _rows(
        x[0] + 2.0 * x[1] + x[2] + x[3] - 5.0,
        3.0 * x[0] + x[1] + 2.0 * x[2] - x[3] - 4.0,
        1.5 - x[1] - 4.0 * x[2],
    ),
    low=[0.0] * 4,
)
_problem(
    "hs77",
    "Of sixth order, with two equalities.",
    start_value=4.0,
    minimum=0.24150513,
    function=lambda x: (
        (x[0] - 1.0) ** 2
        + (x[0] - x[1]) ** 2
        + (x[2] - 1.0) ** 2
        + (x[3] - 1.0) ** 4
        + (x[4] - 1.0) ** 6
    ),
    start=[2.0, 2.0, 2.0, 2.0, 2.0],
    equalities=lambda x: _rows(
        x[0] ** 2 * x[3] + torch.sin(x[3] - x[4]) - 2.0 * math.sqrt(2.0),
        x[1] + x[2] ** 4 * x[3] ** 2 - 8.0 - math.sqrt(2.0),
    ),
)
_problem(
    "hs78",
    "A product with three equalities.",
    start_value=-6.0,
    minimum=-2.91970041,
    function=lambda x: x.prod(),
    start=[-2.0, 1.5, 2.0, -1.0, -1.0],
    equalities=lambda x: _rows(
        (x**2).sum() - 10.0, x[1] * x[2] - 5.0 * x[3] * x[4], x[0] ** 3 + x[1] ** 3 + 1.0
    ),
)
_problem(
    "hs79",
    "Of fourth order, with three equalities.",
    start_value=1.0,
    minimum=0.0787768209,
    function=lambda x: (
        (x[0] - 1.0) ** 2
        + (x[0] - x[1]) ** 2
        + (x[1] - x[2]) ** 2
        + (x[2] - x[3]) ** 4
        + (x[3] - x[4]) ** 4
    ),
    start=[2.0, 2.0, 2.0, 2.0, 2.0],
    equalities=lambda x: _rows(
        x[0] + x[1] ** 2 + x[2] ** 3 - 2.0 - 3.0 * math.sqrt(2.0),
        x[1] - x[2] ** 2 + x[3] + 2.0 - 2.0 * math.sqrt(2.0),
        x[0] * x[4] - 2.0,
    ),
)
_problem(
    "hs80",
    "The exponential of a product, with three equalities.",
    start_value=math.exp(-8.0),
    minimum=0.0539498478,
    function=lambda x: torch.exp(x.prod()),
    start=[-2.0, 2.0, 2.0, -1.0, -1.0],
    equalities=lambda x: _rows(
        (x**2).sum() - 10.0, x[1] * x[2] - 5.0 * x[3] * x[4], x[0] ** 3 + x[1] ** 3 + 1.0
    ),
    low=[-2.3, -2.3, -3.2, -3.2, -3.2],
    high=[2.3, 2.3, 3.2, 3.2, 3.2],
)
_problem(
    "hs81",
    "As hs80, with a term that is zero where the constraints hold.",
    start_value=math.exp(-8.0) - 0.5,
    minimum=0.0539498478,
    function=lambda x: torch.exp(x.prod()) - 0.5 * (x[0] ** 3 + x[1] ** 3 + 1.0) ** 2,
    start=[-2.0, 2.0, 2.0, -1.0, -1.0],
    equalities=lambda x: _rows(
        (x**2).sum() - 10.0, x[1] * x[2] - 5.0 * x[3] * x[4], x[0] ** 3 + x[1] ** 3 + 1.0
    ),
    low=[-2.3, -2.3, -3.2, -3.2, -3.2],
    high=[2.3, 2.3, 3.2, 3.2, 3.2],
)
_problem(
    "hs93",
    "The design of a transformer.",
    start_value=137.06644,
    minimum=135.075961,
    function=lambda x: (
        0.0204 * x[0] * x[3] * (x[0] + x[1] + x[2])
        + 0.0187 * x[1] * x[2] * (x[0] + 1.57 * x[1] + x[3])
        + 0.0607 * x[0] * x[3] * x[4] ** 2 * (x[0] + x[1] + x[2])
        + 0.0437 * x[1] * x[2] * x[5] ** 2 * (x[0] + 1.57 * x[1] + x[3])
    ),
    start=[5.54, 4.4, 12.02, 11.82, 0.702, 0.852],
    inequalities=lambda x: _rows(
        2.07 - 0.001 * x.prod(),
        0.00062 * x[0] * x[3] * x[4] ** 2 * (x[0] + x[1] + x[2])
        + 0.00058 * x[1] * x[2] * x[5] ** 2 * (x[0] + 1.57 * x[1] + x[3])
        - 1.0,
    ),
    low=[0.0] * 6,
)
_problem(
    "hs100",
    "Of sixth order, with four inequalities.",
    start_value=714.0,
    minimum=680.6300573,
    function=lambda x: (
        (x[0] - 10.0) ** 2
        + 5.0 * (x[1] - 12.0) ** 2
        + x[2] ** 4
        + 3.0 * (x[3] - 11.0) ** 2
        + 10.0 * x[4] ** 6
        + 7.0 * x[5] ** 2
        + x[6] ** 4
        - 4.0 * x[5] * x[6]
        - 10.0 * x[5]
        - 8.0 * x[6]
    ),
    start=[1.0, 2.0, 0.0, 4.0, 0.0, 1.0, 1.0],
    inequalities=lambda x: _rows(
        2.0 * x[0] ** 2 + 3.0 * x[1] ** 4 + x[2] + 4.0 * x[3] ** 2 + 5.0 * x[4] - 127.0,
        7.0 * x[0] + 3.0 * x[1] + 10.0 * x[2] ** 2 + x[3] - x[4] - 282.0,
        23.0 * x[0] + x[1] ** 2 + 6.0 * x[5] ** 2 - 8.0 * x[6] - 196.0,
        4.0 * x[0] ** 2
        + x[1] ** 2
        - 3.0 * x[0] * x[1]
        + 2.0 * x[2] ** 2
        + 5.0 * x[5]
        - 11.0 * x[6],
    ),
)
_problem(
    "hs111",
    "The equilibrium of a chemical reaction, in logarithms.",
    start_value=-21.0145395,
    minimum=-47.76109026,
    function=lambda x: (torch.exp(x) * (x.new_tensor(_ENERGIES) + x - torch.logsumexp(x, 0))).sum(),
    start=[-2.3] * 10,
    equalities=lambda x: _rows(
        x[0].exp() + 2.0 * x[1].exp() + 2.0 * x[2].exp() + x[5].exp() + x[9].exp() - 2.0,
        x[3].exp() + 2.0 * x[4].exp() + x[5].exp() + x[6].exp() - 1.0,
        x[2].exp() + x[6].exp() + x[7].exp() + 2.0 * x[8].exp() + x[9].exp() - 1.0,
    ),
    low=[-100.0] * 10,
    high=[100.0] * 10,
)
_problem(
    "hs113",
    "Quadratic, with eight inequalities (Wong).",
    start_value=753.0,
    minimum=24.3062091,
    function=lambda x: (
        x[0] ** 2
        + x[1] ** 2
        + x[0] * x[1]
        - 14.0 * x[0]
        - 16.0 * x[1]
        + (x[2] - 10.0) ** 2
        + 4.0 * (x[3] - 5.0) ** 2
        + (x[4] - 3.0) ** 2
        + 2.0 * (x[5] - 1.0) ** 2
        + 5.0 * x[6] ** 2
        + 7.0 * (x[7] - 11.0) ** 2
        + 2.0 * (x[8] - 10.0) ** 2
        + (x[9] - 7.0) ** 2
        + 45.0
    ),
    start=[2.0, 3.0, 5.0, 5.0, 1.0, 2.0, 7.0, 3.0, 6.0, 10.0],
    inequalities=_wong,
)


def make_constrained_problems(
    device: torch.device | str = "cpu",
) -> tuple[ConstrainedProblem, ...]:
    """Builds the table with its starting points and bounds on a device."""

    def make(values: Sequence[float] | None) -> Tensor | None:
        return None if values is None else torch.tensor(values, dtype=torch.float64, device=device)

    table = []
    for row in _TABLE:
        start = make(row.start)
        assert start is not None
        table.append(
            ConstrainedProblem(
                row.name,
                row.about,
                row.function,
                start,
                row.equalities,
                row.inequalities,
                make(row.low),
                make(row.high),
                row.start_value,
                row.minimum,
            )
        )
    return tuple(table)


CONSTRAINED_PROBLEMS: tuple[ConstrainedProblem, ...] = make_constrained_problems()
CONSTRAINED_BY_NAME: dict[str, ConstrainedProblem] = {p.name: p for p in CONSTRAINED_PROBLEMS}
