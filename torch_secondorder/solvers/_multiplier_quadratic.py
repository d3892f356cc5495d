"""Multipliers of a quadratic program, from its dual problem: small, dense, perhaps singular.

The quadratic program `min g'd + d'B d / 2` subject to `J d + c = 0`, or `<= 0` for inequalities,
has the dual problem

    minimize  y'W y / 2 - b'y  subject to  y_i >= 0 for inequalities,

with `W = J B^-1 J'` and `b = c - J B^-1 g`, and the solution `d = -B^-1 (g + J'y)`. Least-squares
estimates of multipliers are of the same form, with the identity for `B`.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from torch_secondorder.solvers._box_quadratic import solve_in_box
from torch_secondorder.solvers._boxed_dense import MatrixOnFaces

# What is added to the diagonal of the scaled matrix, of ones. It makes singular matrices definite,
# and repeated steps take its effect away.
_LIFT = 1e-10
_ROUNDS = 12
_PRECISE = 1e-13  # the slopes that are left, over those that cancel in them


def solve(
    W: Tensor,
    b: Tensor,
    inequality: Tensor,
    *,
    limit: float | Tensor = inf,
    start: Tensor | None = None,
) -> Tensor:
    """Minimizes `y'W y / 2 - b'y` over multipliers `y`, those of inequalities not negative.

    Steps are proximal: each minimizes the problem with `lift |y - y_before|^2 / 2` added, in which
    the matrix is definite, and the last one changes nothing. Where multipliers are not unique, as
    those of dependent constraints, they stay close to the start (the stabilized quadratic program
    of Wright 1998).

    Args:
        W: Symmetric and positive semidefinite up to rounding, `(m, m)`, float64, on the CPU.
        b: `(m,)`.
        inequality: A mask of the multipliers that must not be negative, `(m,)`.
        limit: The largest multiplier, or one for each. Constraints that contradict each other have
            a dual problem that is unbounded: with a limit, the sum of their violations is
            minimized, with the limit as its weight.
        start: Multipliers to start from, `(m,)`; zero by default.

    Returns:
        `y`, `(m,)`. It is zero where the row and column of `W` are. Without a limit, an unbounded
        problem gives large multipliers.

    >>> W = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    >>> b = torch.tensor([4.0, -3.0], dtype=torch.float64)
    >>> solve(W, b, torch.tensor([False, True])).tolist()
    [2.0, 0.0]
    """
    if not len(b):
        return b.clone()
    # Rows of the Jacobian may differ in length by orders of magnitude.
    roots = W.diagonal().clamp(min=0).sqrt()
    some = roots > 0
    unit = torch.where(some, 1 / torch.where(some, roots, 1), 0)
    matrix = W * unit * unit[:, None]
    matrix, right = (matrix + matrix.T) / 2, b * unit
    high = torch.where(some, limit * torch.where(some, roots, 1), 0)
    low = torch.where(inequality, 0, -high)
    z = torch.zeros_like(right) if start is None else (start * roots).clamp(low, high)
    model: MatrixOnFaces | None = None
    lift = _LIFT
    least, best = inf, z
    for _ in range(_ROUNDS):
        slopes = matrix @ z - right
        left = (z - (z - slopes).clamp(low, high)).abs()
        worst = left.max().item()
        if not worst < 0.5 * least:  # rounding, or the problem is unbounded
            break
        least, best = worst, z
        if worst <= _PRECISE * (right.abs() + matrix.abs() @ z.abs()).max().item():
            break
        face = None
        while face is None and lift < 1.0:
            model = model or MatrixOnFaces(_lifted(matrix, lift))
            face = solve_in_box(model, slopes, low - z, high - z)
            if face is None:  # rounding has made the matrix indefinite
                model, lift = None, 100 * lift
        if face is None:
            break
        z = (z + face.step).clamp(low, high)
    return best * unit


def _lifted(matrix: Tensor, lift: float) -> Tensor:
    lifted = matrix.clone()
    lifted.diagonal().add_(lift)
    return lifted
