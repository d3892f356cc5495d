"""Minimization of a convex quadratic in a box, by solutions on faces of the box.

With the step `d` from the current point, the problem is

    minimize  g'd + d'B d / 2  subject to  low <= d <= high,    low <= 0 <= high.

A face holds some entries of `d` at bounds and leaves the others free. A model of the curvature
need only minimize the quadratic on a face; where its face is right, that is the solution.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from torch_secondorder.curvature import InverseBFGS, InverseBroyden, ReducedBroyden

# Guesses in a row that do not lower the number of entries that are wrong, after which the guesses
# are given up, and the faces of the method that follows.
_PATIENCE = 6
_MOST_FACES = 60
# Entries may leave the box by this share of the longest entry of the step, and multipliers may have
# a wrong sign by this share of the largest slope: rounding, which would be corrected for ever.
_ROUNDING = 1e-10


class Face(NamedTuple):
    """The minimizer of a quadratic on a face of the box.

    Attributes:
        step: `d`, shape `(n,)`.
        slopes: `g + B d`, shape `(n,)`: zero for free entries, the multipliers of the others.
    """

    step: Tensor
    slopes: Tensor


class FaceModel(Protocol):
    """A quadratic that can be minimized on the faces of a box."""

    def minimize_on_face(self, grad: Tensor, fixed: Tensor, values: Tensor) -> Face | None:
        """The minimizer with some entries held.

        Args:
            grad: `g`, shape `(n,)`.
            fixed: The entries that are held, a mask.
            values: Their values; zero for the others.

        Returns:
            The minimizer; None where the quadratic is not convex on the face.
        """


def solve_in_box(model: FaceModel, grad: Tensor, low: Tensor, high: Tensor) -> Face | None:
    """Minimizes a convex quadratic in a box around the origin.

    The face is guessed: entries that would leave the box are held at the bound, held entries whose
    multiplier has the wrong sign are let go, all at once (the primal-dual active set method,
    Hintermüller, Ito and Kunisch 2003). Most guesses are right after two to four faces, whatever
    `n` is. The guesses may go round in circles; where the number of wrong entries has not fallen
    for a while (Júdice and Pires 1994), a primal active set method follows (Nocedal and Wright
    2006, section 16.5), each of whose steps lowers the quadratic.

    Args:
        model: The quadratic.
        grad: `g`, shape `(n,)`.
        low: Lower bounds of the step, at most zero; minus infinity for none.
        high: Upper bounds, at least zero.

    Returns:
        A step in the box, and `g + B d`. It is the solution, or where the second method was stopped
        early, a point with a lower value than the origin's. None where the quadratic is not convex,
        or no descent was found.
    """
    still = high <= low  # variables that cannot move
    at_low, at_high = still | ((low == 0) & (grad > 0)), (high == 0) & (grad < 0) & ~still
    fewest, patience = inf, _PATIENCE
    while patience:
        fixed = at_low | at_high
        face = model.minimize_on_face(grad, fixed, _held(low, high, at_low, at_high))
        if face is None:
            return None
        step, slopes = face
        below, above = step < low, step > high
        wrong_low, wrong_high = at_low & ~still & (slopes < 0), at_high & (slopes > 0)
        outside = torch.maximum(low - step, step - high).amax()
        wrong = torch.where(wrong_low | wrong_high, slopes, 0).abs().amax()
        room = _ROUNDING * torch.where(fixed, 0, step).abs().amax()
        slack = _ROUNDING * torch.where(fixed, 0, grad).abs().amax()
        count = (below | above | wrong_low | wrong_high).sum()
        # NaN is not within rounding either.
        found, count = torch.stack(((outside <= room) & (wrong <= slack), count)).tolist()
        if found:
            return Face(torch.clamp(step, low, high), slopes)
        fewest, patience = (count, _PATIENCE) if count < fewest else (fewest, patience - 1)
        at_low, at_high = (at_low & ~wrong_low) | below, (at_high & ~wrong_high) | above
    return _descend(model, grad, low, high, still)


def _held(low: Tensor, high: Tensor, at_low: Tensor, at_high: Tensor) -> Tensor:
    """The values of the entries that are held at a bound; zero elsewhere."""
    return torch.where(at_low, low, torch.where(at_high, high, 0))


def _descend(
    model: FaceModel, grad: Tensor, low: Tensor, high: Tensor, still: Tensor
) -> Face | None:
    """The primal active set method, from the origin: as far towards each face as the box allows."""
    step, slopes = torch.zeros_like(grad), grad
    at_low, at_high = still | ((low == 0) & (grad > 0)), (high == 0) & (grad < 0) & ~still
    moved = False
    for _ in range(_MOST_FACES):
        fixed = at_low | at_high
        face = model.minimize_on_face(grad, fixed, _held(low, high, at_low, at_high))
        if face is None:
            break
        direction = torch.where(fixed, 0, face.step - step)
        reach = torch.where(direction < 0, low - step, high - step) / direction
        reach = torch.where(direction == 0, torch.inf, reach)
        t = reach.amin().clamp(max=1.0)
        blocked = reach <= t
        step = torch.clamp(step + t * direction, low, high)
        # B is linear, so the slopes along the way are known.
        slopes = slopes + t * (face.slopes - slopes)
        length, longest = (t * direction.abs().amax()).item(), t.item()
        if not length >= 0.0:  # NaN
            return None
        moved = moved or length > 0.0
        if longest < 1.0:
            at_low = at_low | (blocked & (direction < 0))
            at_high = at_high | (blocked & (direction > 0))
            step = torch.where(blocked, _held(low, high, at_low, at_high), step)
            continue
        wrong_low, wrong_high = at_low & ~still & (slopes < 0), at_high & (slopes > 0)
        if not bool((wrong_low | wrong_high).any()):
            break
        at_low, at_high = at_low & ~wrong_low, at_high & ~wrong_high
    return Face(step, slopes) if moved else None


class ScaledIdentity:
    """The quadratic of steepest descent, `B = I / length`."""

    def __init__(self, length: float) -> None:
        self.length = length

    def minimize_on_face(self, grad: Tensor, fixed: Tensor, values: Tensor) -> Face:
        """See `FaceModel.minimize_on_face`."""
        step = torch.where(fixed, values, grad * -self.length)
        return Face(step, torch.where(fixed, grad + values / self.length, 0))


class CompactBFGS:
    """The L-BFGS matrix on faces, from its pairs.

    With `U = [S', gamma Y']` and the inverse Hessian `H = gamma I + U N U'` in compact form (Byrd,
    Nocedal, Schnabel 1994), and the sets `F` of free and `A` of held entries,

        w = K^-1 U'z,    d = z + U w on F,    g + B d = g + (z - U w) / gamma on A,

    where `z` is `-gamma g` on `F` and the values held on `A`. The matrix `K = gamma N^-1 + U_A'U_A`
    of size `2m` is that of Byrd, Lu, Nocedal and Zhu 1995, equation 5.12 (their `theta` is
    `1 / gamma`). Two passes over the pairs and the matrix `K` are all that a face costs.

    Args:
        inverse: The pairs, at least one.
    """

    def __init__(self, inverse: InverseBFGS) -> None:
        self._inverse, self.gamma = inverse, inverse.gamma
        self.steps, self.differences, ages = inverse.pairs()
        self._not_newer = ages[:, None] <= ages

    def minimize_on_face(self, grad: Tensor, fixed: Tensor, values: Tensor) -> Face | None:
        """See `FaceModel.minimize_on_face`."""
        held, free = fixed.nonzero().squeeze(1), (~fixed).nonzero().squeeze(1)
        if not len(held):
            return Face(self._inverse.direction(grad), torch.zeros_like(grad))
        gamma, steps, differences = self.gamma, self.steps, self.differences
        z = torch.where(fixed, values, grad * -gamma)
        right = torch.cat((torch.mv(steps, z), gamma * torch.mv(differences, z)))
        matrix = self._matrix(held, free)
        # Rows and columns scaled alike: pairs differ in length by orders of magnitude.
        scale = matrix.abs().amax(1).rsqrt()
        # A singular matrix gives infinities or NaN, which end the search for a face.
        solution = torch.linalg.solve_ex(
            scale[:, None] * matrix * scale, scale * right.to(matrix.dtype)
        )[0]
        of_steps, of_differences = (scale * solution).to(z.dtype).chunk(2)
        move = torch.mv(steps.t(), of_steps)
        move = torch.addmv(move, differences.t(), of_differences, alpha=gamma)
        slopes = torch.where(fixed, grad + (z - move) / gamma, 0)
        return Face(torch.where(fixed, values, z + move), slopes)

    def _matrix(self, held: Tensor, free: Tensor) -> Tensor:
        """`K`, without a difference of two sums over variables: those over `F` and `A` apart."""
        small = torch.float64 if self.steps.device.type != "mps" else torch.float32
        s_held, y_held = self.steps[:, held].to(small), self.differences[:, held].to(small)
        s_free, y_free = self.steps[:, free].to(small), self.differences[:, free].to(small)
        gamma = self.gamma
        cross_held, cross_free = s_held @ y_held.T, s_free @ y_free.T
        curvature = torch.diag(torch.diagonal(cross_held + cross_free))
        corner = torch.where(self._not_newer, cross_free, -cross_held).mul_(-gamma)
        below = (curvature + gamma * (y_free @ y_free.T)).mul_(-gamma)
        top = torch.cat((s_held @ s_held.T, corner), dim=1)
        return torch.cat((top, torch.cat((corner.T, below), dim=1)))


class InverseOnFaces:
    """A dense inverse Hessian `H` on faces.

    With the held entries `A` at values `b` and the gradient `g` that is zero there,

        d = -H g + H_A p,    H_AA p = b + (H g)_A,

    where `p` is the change of the multipliers.

    Args:
        inverse: `H`.
    """

    def __init__(self, inverse: InverseBroyden) -> None:
        self._inverse = inverse

    def minimize_on_face(self, grad: Tensor, fixed: Tensor, values: Tensor) -> Face | None:
        """See `FaceModel.minimize_on_face`."""
        held = fixed.nonzero().squeeze(1)
        if not len(held):
            return Face(self._inverse.direction(grad), torch.zeros_like(grad))
        slopes = torch.zeros_like(grad)
        step = self._inverse.direction(torch.where(fixed, 0, grad))
        columns = self._inverse.columns(held)
        factor, info = torch.linalg.cholesky_ex(columns[held])
        if info.item():
            return None
        change = torch.cholesky_solve((values - step)[held][:, None], factor)[:, 0]
        slopes[held] = grad[held] + change
        return Face(torch.where(fixed, values, step.addmv_(columns, change)), slopes)


class ReducedModel:
    """The matrix of `ReducedBroyden` on faces.

    With `H = Q'A Q + c (I - Q'Q)`, `z` as in `CompactBFGS` with `c` for `gamma`, and the products
    `G` of the columns of `Q` over free and held entries,

        (A G_held + c G_free) u = (c I - A) Q z,    d = z - Q'u on F,    g + B d = g + (z + Q'u) / c
        on A.

    Args:
        inverse: The inverse Hessian, with at least one pair.
    """

    def __init__(self, inverse: ReducedBroyden) -> None:
        self._inverse = inverse

    def minimize_on_face(self, grad: Tensor, fixed: Tensor, values: Tensor) -> Face | None:
        """See `FaceModel.minimize_on_face`."""
        if not bool(fixed.any()):
            return Face(self._inverse.direction(grad), torch.zeros_like(grad))
        basis, matrix, scale = self._inverse.reduced()
        z = torch.where(fixed, values, grad * -scale)
        of_z = torch.mv(basis, z).cpu().double()
        held, free = basis[:, fixed], basis[:, ~fixed]
        g_held, g_free = (torch.mm(part, part.t()).cpu().double() for part in (held, free))
        right = scale * of_z - matrix @ of_z
        # A singular matrix gives infinities or NaN, which end the search for a face.
        u = torch.linalg.solve_ex(matrix @ g_held + scale * g_free, right)[0]
        move = torch.mv(basis.t(), u.to(z.dtype).to(z.device))
        slopes = torch.where(fixed, grad + (z + move) / scale, 0)
        return Face(torch.where(fixed, values, z - move), slopes)
