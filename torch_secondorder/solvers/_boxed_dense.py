"""Quadratics with a dense matrix in a box: within a radius, with damping, or modified."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from torch_secondorder._params.space import WHOLE
from torch_secondorder.solvers._box_quadratic import Face, solve_in_box
from torch_secondorder.solvers._units import power_of_two
from torch_secondorder.solvers.dense import DefinitenessName, DenseStep


def _numbers(*scalars: Tensor) -> list[float]:
    """0-dim tensors as numbers, in one wait; parameters with bounds are not sharded."""
    return WHOLE.to_host(whole=scalars)


class MatrixOnFaces:
    """A quadratic with a dense matrix on faces, by Cholesky's method.

    Args:
        matrix: Symmetric, shape `(n, n)`. It need only be definite on the faces that come up.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self._last: tuple[Tensor, Tensor | None] | None = None  # the last face and its factor

    def minimize_on_face(self, grad: Tensor, fixed: Tensor, values: Tensor) -> Face | None:
        """See `FaceModel.minimize_on_face`."""
        free = (~fixed).nonzero().squeeze(1)
        step = values.clone()
        if len(free):
            factor = self._factor(free)
            if factor is None:
                return None
            right = torch.addmv(grad, self.matrix, values)[free]
            step[free] = torch.cholesky_solve(right[:, None], factor)[:, 0].neg_()
        slopes = torch.addmv(grad, self.matrix, step)
        slopes[free] = 0
        return Face(step, slopes)

    def _factor(self, free: Tensor) -> Tensor | None:
        if self._last is None or not torch.equal(self._last[0], free):
            factor, failed = torch.linalg.cholesky_ex(self.matrix[free[:, None], free])
            least, most = torch.aminmax(factor.diagonal().square())
            rounding = len(free) * torch.finfo(factor.dtype).eps
            definite = bool((failed == 0) & (least > rounding * most))
            self._last = free, factor if definite else None
        return self._last[1]


class BoxedQuadratic:
    """The counterpart of `DenseQuadratic` within bounds.

    Its steps solve the quadratic in the box where it is convex there. Where it is not, entries that
    the gradient holds at their bound stay, and the matrix of the others is made positive definite:
    the signs of its negative eigenvalues change.

    Args:
        H: Symmetric, shape `(n, n)`, finite.
        g: Shape `(n,)`, finite.
        low: Lower bounds of a step, at most zero.
        high: Upper bounds of a step, at least zero.

    Attributes:
        free: The entries that the gradient does not hold at a bound, a mask.
        definiteness: What the eigenvalues of the matrix of the free entries are, up to rounding.
        smallest_eigenvalue: The smallest of these; None where it is not known.
    """

    definiteness: DefinitenessName
    smallest_eigenvalue: float | None = None

    def __init__(self, H: Tensor, g: Tensor, low: Tensor, high: Tensor) -> None:
        self._H, self._g, self._low, self._high = H, g, low, high
        self.free = ~(((low == 0) & (g > 0)) | ((high == 0) & (g < 0)) | (high <= low))
        self._plain = MatrixOnFaces(H)
        still = torch.where(self.free, 0, g)
        if self._plain.minimize_on_face(still, ~self.free, torch.zeros_like(g)) is not None:
            self.definiteness = "positive definite"
            return
        values, _ = self._eigen
        lowest, size = _numbers(values[0], values.abs().amax())
        noise = 4 * len(g) * torch.finfo(H.dtype).eps * size
        self.smallest_eigenvalue = lowest
        self.definiteness = "indefinite" if lowest < -noise else "singular"

    def within(self, radius: float) -> DenseStep:
        """A minimizer none of whose entries is longer than a radius.

        Args:
            radius: Above zero.
        """
        low, high = self._low.clamp(min=-radius), self._high.clamp(max=radius)
        x = self._minimizer(self._plain, low, high)
        (length,) = _numbers(x.abs().amax())
        return self._stepped(x, length, held=length >= 0.99 * radius)

    def damped(self, damping: float) -> DenseStep:
        """A minimizer with a multiple of the identity added, and that of an indefinite `H` lifted.

        Args:
            damping: Above zero.
        """
        lift = -min(self.smallest_eigenvalue or 0.0, 0.0) + damping
        matrix = self._H.clone()
        matrix.diagonal().add_(lift)
        x = self._minimizer(MatrixOnFaces(matrix), self._low, self._high)
        slope, square = _numbers(self._g @ x, x @ x)
        return self._stepped(x, square**0.5, lift, held=lift * square > -0.5 * slope)

    def modified(self) -> DenseStep:
        """A minimizer with a positive definite matrix in place of `H`: a direction of descent."""
        x = self._minimizer(self._plain, self._low, self._high)
        return self._stepped(x, *_numbers(x.norm()))

    def along_gradient(self) -> float:
        """The curvature `|H g| / |g|` along the gradient of the free entries; 0 without one."""
        grad = torch.where(self.free, self._g, 0)
        unit = power_of_two(grad.abs().amax())  # squares may be beyond the range of float32
        grad = grad / unit
        image = torch.where(self.free, self._H @ grad, 0)
        size = power_of_two(image.abs().amax())
        length, of_image, norm = _numbers((image / size).norm(), size, grad.norm())
        return length * of_image / norm if norm else 0.0

    def _minimizer(self, model: MatrixOnFaces, low: Tensor, high: Tensor) -> Tensor:
        face = solve_in_box(model, self._g, low, high)
        if face is not None and bool(self._g @ face.step < 0):
            return face.step
        low, high = torch.where(self.free, low, 0), torch.where(self.free, high, 0)
        face = solve_in_box(self._convex, self._g, low, high)
        return torch.zeros_like(self._g) if face is None else face.step

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        """The eigenvalues and eigenvectors of the matrix of the free entries."""
        index = self.free.nonzero().squeeze(1)
        values, vectors = torch.linalg.eigh(self._H[index[:, None], index])
        return values, vectors

    @cached_property
    def _convex(self) -> MatrixOnFaces:
        """The matrix of the free entries, with the signs of its negative eigenvalues changed."""
        values, vectors = self._eigen
        sizes = values.abs()
        least = torch.finfo(self._H.dtype).eps ** (2 / 3) * sizes.amax()
        sizes = sizes.clamp(min=torch.where(least > 0, least, 1.0))
        index = self.free.nonzero().squeeze(1)
        matrix = torch.zeros_like(self._H)
        matrix[index[:, None], index] = (vectors * sizes) @ vectors.T
        return MatrixOnFaces(matrix)

    def _stepped(
        self, x: Tensor, length: float, multiplier: float = 0.0, *, held: bool = False
    ) -> DenseStep:
        slope, curvature = _numbers(self._g @ x, x @ (self._H @ x))
        return DenseStep(x, multiplier, -(slope + 0.5 * curvature), length, held)

    def further(self, grad: Tensor, moved: Tensor) -> Tensor:
        """The step that the matrix gives with the gradient somewhere else; zero where none falls.

        Args:
            grad: The gradient there.
            moved: The way there, a step in the box.
        """
        low, high = (self._low - moved).clamp(max=0), (self._high - moved).clamp(min=0)
        face = solve_in_box(self._plain, grad, low, high)
        return torch.zeros_like(grad) if face is None else face.step
