"""Classical problems of nonlinear least squares as residuals.

Those of `tests/support/problems.py` that are sums of squares, by the same names and with the minima
that are known there; Moré, Garbow and Hillstrom (1981) give the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .lbfgs_problems import load_problems

Residuals = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ResidualProblem:
    """Residuals, where to start, and what is known about the minima.

    Attributes:
        name: A name, unique in a table.
        residuals: From shape `(n,)` to `(N,)`.
        start: Shape `(n,)`, float64.
        minima: Values of the sum of squares at known local minima, the smallest first.
        solution: The parameters at the minimum, where they are certified.
    """

    name: str
    residuals: Residuals
    start: Tensor
    minima: tuple[float, ...]
    solution: Tensor | None = None

    def digits(self, x: Tensor) -> float:
        """Correct digits of a point, at most eleven.

        Of its worst entry where the solution is certified, else of the sum of squares: its distance
        to the nearest known minimum above, over that minimum, or over the start's value where the
        minimum is zero.
        """
        if self.solution is not None:
            return _digits(
                ((x.to(self.solution) - self.solution) / self.solution).abs().max().item()
            )
        value, first = (_square(self.residuals(point)) for point in (x, self.start))
        return max(_digits(abs(value - low) / (low or first)) for low in self.minima)

    def reached(self, value: float) -> bool:
        """True if a sum of squares is that of a known minimum, to about six digits."""
        return any(
            value <= low * (1.0 + 1e-6) + 1e-12 and value >= low * (1.0 - 1e-4)
            for low in self.minima
        )


def _digits(error: float) -> float:
    if not error < 1.0:  # NaN as well
        return 0.0
    return min(11.0, -math.log10(error)) if error > 0.0 else 11.0


def _square(r: Tensor) -> float:
    return r.square().sum().item()


def rosenbrock(x: Tensor) -> Tensor:
    """MGH 1, and with more pairs MGH 21."""
    a, b = x.view(-1, 2).unbind(1)
    return torch.stack([10.0 * (b - a * a), 1.0 - a], dim=1).view(-1)


def freudenstein_roth(x: Tensor) -> Tensor:
    """MGH 2."""
    a, b = x.unbind()
    first = a - 13.0 + ((5.0 - b) * b - 2.0) * b
    return torch.stack([first, a - 29.0 + ((b + 1.0) * b - 14.0) * b])


def powell_badly_scaled(x: Tensor) -> Tensor:
    """MGH 3."""
    return torch.stack([1e4 * x.prod() - 1.0, torch.exp(-x).sum() - 1.0001])


def brown_badly_scaled(x: Tensor) -> Tensor:
    """MGH 4."""
    return torch.cat([x - x.new_tensor([1e6, 2e-6]), x.prod()[None] - 2.0])


def beale(x: Tensor) -> Tensor:
    """MGH 5."""
    a, b = x.unbind()
    powers = torch.stack([b, b * b, b * b * b])
    return x.new_tensor([1.5, 2.25, 2.625]) - a * (1.0 - powers)


def jennrich_sampson(x: Tensor) -> Tensor:
    """MGH 6, m = 10."""
    i = torch.arange(1, 11).to(x)
    return 2.0 + 2.0 * i - torch.exp(i[:, None] * x).sum(1)


def helical_valley(x: Tensor) -> Tensor:
    """MGH 7."""
    a, b, c = x.unbind()
    angle = torch.atan2(b, a) / (2.0 * math.pi)
    radius = torch.sqrt(a * a + b * b)
    return torch.stack([10.0 * (c - 10.0 * angle), 10.0 * (radius - 1.0), c])


BARD = (
    *(0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39),
    *(0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39),
)


def bard(x: Tensor) -> Tensor:
    """MGH 8."""
    a, b, c = x.unbind()
    u = torch.arange(1, 16).to(x)
    v = 16.0 - u
    return x.new_tensor(BARD) - a - u / (v * b + torch.minimum(u, v) * c)


def box_3d(x: Tensor) -> Tensor:
    """MGH 12, m = 10."""
    a, b, c = x.unbind()
    t = 0.1 * torch.arange(1, 11).to(x)
    return torch.exp(-t * a) - torch.exp(-t * b) - c * (torch.exp(-t) - torch.exp(-10.0 * t))


def powell_singular(x: Tensor) -> Tensor:
    """MGH 13."""
    a, b, c, d = x.unbind()
    first = [a + 10.0 * b, math.sqrt(5.0) * (c - d)]
    return torch.stack([*first, (b - 2.0 * c) ** 2, math.sqrt(10.0) * (a - d) ** 2])


def wood(x: Tensor) -> Tensor:
    """MGH 14."""
    a, b, c, d = x.unbind()
    first = [10.0 * (b - a * a), 1.0 - a, math.sqrt(90.0) * (d - c * c), 1.0 - c]
    return torch.stack([*first, math.sqrt(10.0) * (b + d - 2.0), math.sqrt(0.1) * (b - d)])


KOWALIK_Y = (0.1957, 0.1947, 0.1735, 0.16, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246)
KOWALIK_U = (4.0, 2.0, 1.0, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625)


def kowalik_osborne(x: Tensor) -> Tensor:
    """MGH 15."""
    a, b, c, d = x.unbind()
    u = x.new_tensor(KOWALIK_U)
    return x.new_tensor(KOWALIK_Y) - a * (u * u + u * b) / (u * u + u * c + d)


def brown_dennis(x: Tensor) -> Tensor:
    """MGH 16, m = 20."""
    a, b, c, d = x.unbind()
    t = torch.arange(1, 21).to(x) / 5.0
    return (a + t * b - torch.exp(t)) ** 2 + (c + d * torch.sin(t) - torch.cos(t)) ** 2


def biggs_exp6(x: Tensor) -> Tensor:
    """MGH 18, m = 13."""
    a, b, c, d, e, f = x.unbind()
    t = 0.1 * torch.arange(1, 14).to(x)
    y = torch.exp(-t) - 5.0 * torch.exp(-10.0 * t) + 3.0 * torch.exp(-4.0 * t)
    return c * torch.exp(-t * a) - d * torch.exp(-t * b) + f * torch.exp(-t * e) - y


def watson(x: Tensor) -> Tensor:
    """MGH 20, n = 6."""
    t, j = torch.arange(1, 30).to(x) / 29.0, torch.arange(len(x)).to(x)
    slopes = j * t[:, None] ** (j - 1.0).clamp(min=0.0)
    most = slopes @ x - (t[:, None] ** j @ x) ** 2 - 1.0
    return torch.cat([most, x[:1], x[1:2] - x[:1] ** 2 - 1.0])


def trigonometric(x: Tensor) -> Tensor:
    """MGH 26, n = 10."""
    i, cosine = torch.arange(1, len(x) + 1).to(x), torch.cos(x)
    return len(x) - cosine.sum() + i * (1.0 - cosine) - torch.sin(x)


def brown_almost_linear(x: Tensor) -> Tensor:
    """MGH 27, n = 10."""
    return torch.cat([x[:-1] + (x.sum() - (len(x) + 1.0)), x.prod()[None] - 1.0])


def broyden_tridiagonal(x: Tensor) -> Tensor:
    """MGH 30, n = 10."""
    padded = torch.nn.functional.pad(x, (1, 1))
    return (3.0 - 2.0 * x) * x - padded[:-2] - 2.0 * padded[2:] + 1.0


def chebyquad(x: Tensor) -> Tensor:
    """MGH 35, m = n = 8."""
    shifted = 2.0 * x - 1.0
    rows = [torch.ones_like(x), shifted]
    for _ in range(len(x) - 1):
        rows.append(2.0 * shifted * rows[-1] - rows[-2])
    integrals = [0.0 if i % 2 else -1.0 / (i * i - 1.0) for i in range(1, len(x) + 1)]
    return torch.stack(rows[1:]).mean(1) - x.new_tensor(integrals)


FUNCTIONS: dict[str, Residuals] = {
    "rosenbrock": rosenbrock,
    "freudenstein_roth": freudenstein_roth,
    "powell_badly_scaled": powell_badly_scaled,
    "brown_badly_scaled": brown_badly_scaled,
    "beale": beale,
    "jennrich_sampson": jennrich_sampson,
    "helical_valley": helical_valley,
    "bard": bard,
    "box_3d": box_3d,
    "powell_singular": powell_singular,
    "wood": wood,
    "kowalik_osborne": kowalik_osborne,
    "brown_dennis": brown_dennis,
    "biggs_exp6": biggs_exp6,
    "watson": watson,
    "extended_rosenbrock": rosenbrock,
    "trigonometric": trigonometric,
    "brown_almost_linear": brown_almost_linear,
    "broyden_tridiagonal": broyden_tridiagonal,
    "chebyquad": chebyquad,
}


def classical(device: torch.device) -> list[ResidualProblem]:
    """The problems with their starts and minima."""
    known = {problem.name: problem for problem in load_problems(device)}
    return [
        ResidualProblem(name, residuals, known[name].start, known[name].minima)
        for name, residuals in FUNCTIONS.items()
    ]
