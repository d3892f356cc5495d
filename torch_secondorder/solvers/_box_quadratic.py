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

from torch_secondorder._foundation.host_transfer import read_numbers
from torch_secondorder.curvature import InverseBFGS, InverseBroyden, ReducedBroyden

# Guesses in a row that do not lower the number of entries that are wrong, after which the guesses
# are given up, and the faces of the method that follows.
_PATIENCE = 6
_MOST_FACES = 60
# Entries may leave the box by this share of the longest entry of the step, and multipliers may have
# a wrong sign by this share of the largest slope: rounding, which would be corrected for ever.
_ROUNDING = 1e-10
# Columns of the pairs that are copied at a time.
_COLUMNS = 1 << 16


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
        length, longest = read_numbers(t * direction.abs().amax(), t)
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
    """The quadratic of steepest descent, `B = (unit / length) I`.

    Args:
        length: The length of the step along a gradient of length `unit`.
        unit: About the size of the gradient: the quotient may be beyond the range of float32.
    """

    def __init__(self, length: float, unit: float = 1.0) -> None:
        self.length, self.unit = length, unit

    def minimize_on_face(self, grad: Tensor, fixed: Tensor, values: Tensor) -> Face:
        """See `FaceModel.minimize_on_face`."""
        step = torch.where(fixed, values, grad / self.unit * -self.length)
        return Face(step, torch.where(fixed, grad + values / self.length * self.unit, 0))


class CompactBFGS:
    """The L-BFGS matrix on faces, from its pairs.

    With `U = [S', gamma Y']` and the inverse Hessian `H = gamma I + U N U'` in compact form (Byrd,
    Nocedal, Schnabel 1994), and the sets `F` of free and `A` of held entries,

        w = K^-1 U'z,    d = z + U w on F,    g + B d = g + (z - U w) / gamma on A,

    where `z` is `-gamma g` on `F` and the values held on `A`. The matrix `K = gamma N^-1 + U_A'U_A`
    of size `2m` is that of Byrd, Lu, Nocedal and Zhu 1995, equation 5.12 (their `theta` is
    `1 / gamma`). Two passes over the pairs and the matrix `K` are all that a face costs.

    The products of the pairs over free and held entries, which `K` consists of, are kept from one
    face and one iteration to the next: a new pair adds a row, and entries that are held or let go
    take the products of their columns along.

    Args:
        inverse: The pairs, at least one when a face is asked for.
    """

    def __init__(self, inverse: InverseBFGS) -> None:
        self.inverse = inverse
        self._changes = -2  # of the inverse, when it was last looked at
        self._products: _Products | None = None

    def minimize_on_face(self, grad: Tensor, fixed: Tensor, values: Tensor) -> Face | None:
        """See `FaceModel.minimize_on_face`."""
        inverse, gamma = self.inverse, self.inverse.gamma
        if not bool(fixed.any()):
            return Face(inverse.direction(grad), torch.zeros_like(grad))
        steps, differences, ages = inverse.pairs()
        matrix = self._matrix(steps, differences, ages, fixed)
        z = torch.where(fixed, values, grad * -gamma)
        right = torch.cat((torch.mv(steps, z), gamma * torch.mv(differences, z)))
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

    def _matrix(self, steps: Tensor, differences: Tensor, ages: Tensor, fixed: Tensor) -> Tensor:
        """`K` for the face where some entries are held."""
        products, changes = self._products, self.inverse.changes
        if products is None or changes - self._changes > 1 or len(fixed) != len(products.held):
            products = self._products = _Products(steps, differences)
        elif changes > self._changes:
            products.enter(steps, differences, self.inverse.newest)
        self._changes = changes
        products.hold(steps, differences, fixed)
        gamma, count = self.inverse.gamma, len(steps)
        ss, sy_held, sy_free, yy = (kind[:count, :count] for kind in products.kinds)
        corner = torch.where(ages[:, None] <= ages, sy_free, -sy_held).mul_(-gamma)
        below = (-gamma * gamma) * yy
        below.diagonal().sub_((sy_held + sy_free).diagonal(), alpha=gamma)
        return torch.cat((torch.cat((ss, corner), 1), torch.cat((corner.T, below), 1)))


class _Products:
    """Inner products of pairs over the held and the free entries, with none held at first.

    Attributes:
        held: The held entries, a mask.
        kinds: `S S'` over the held ones, `S Y'` over the held, over the free, `Y Y'` over the free,
            each with room for further pairs.
    """

    def __init__(self, steps: Tensor, differences: Tensor) -> None:
        count, n = steps.shape
        small = torch.float64 if steps.device.type != "mps" else torch.float32
        self.held = torch.zeros(n, dtype=torch.bool, device=steps.device)
        room = torch.zeros(4, 2 * count, 2 * count, dtype=small, device=steps.device)
        room[2, :count, :count] = steps @ differences.T
        room[3, :count, :count] = differences @ differences.T
        self.kinds = room

    def enter(self, steps: Tensor, differences: Tensor, row: int) -> None:
        """Takes in a pair.

        Args:
            steps: `S`, the new step included.
            differences: `Y` likewise.
            row: Where it is.
        """
        count, size = len(steps), self.kinds.shape[1]
        if count > size:
            self.kinds = torch.nn.functional.pad(self.kinds, (0, size, 0, size))
        ss, sy_held, sy_free, yy = self.kinds
        s, y = steps[row], differences[row]
        s_held, y_held = torch.where(self.held, s, 0), torch.where(self.held, y, 0)
        s_free, y_free = s - s_held, y - y_held
        # Two passes over the pairs.
        by_steps = (steps @ torch.stack((s_held, y_held, y_free), 1)).to(ss.dtype)
        by_differences = (differences @ torch.stack((s_held, s_free, y_free), 1)).to(ss.dtype)
        ss[row, :count] = ss[:count, row] = by_steps[:, 0]
        sy_held[:count, row], sy_held[row, :count] = by_steps[:, 1], by_differences[:, 0]
        sy_free[:count, row], sy_free[row, :count] = by_steps[:, 2], by_differences[:, 1]
        yy[row, :count] = yy[:count, row] = by_differences[:, 2]

    def hold(self, steps: Tensor, differences: Tensor, fixed: Tensor) -> None:
        """Moves the products of columns to where they belong when other entries are held."""
        changed = (fixed != self.held).nonzero().squeeze(1)
        count = len(steps)
        ss, sy_held, sy_free, yy = (kind[:count, :count] for kind in self.kinds)
        for columns in changed.split(_COLUMNS):
            sign = torch.where(fixed[columns], 1.0, -1.0).to(ss.dtype)
            s, y = steps[:, columns].to(ss.dtype), differences[:, columns].to(ss.dtype)
            signed = s * sign
            both = signed @ y.T
            ss.addmm_(signed, s.T)
            sy_held.add_(both)
            sy_free.sub_(both)
            yy.addmm_(y * sign, y.T, alpha=-1)
        self.held = fixed


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
