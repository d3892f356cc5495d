"""Preconditioners: learned from an operator now and then, damped as the system is."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_integer, check_number
from torch_secondorder._foundation.host_transfer import read_numbers
from torch_secondorder.curvature import Diagonal, FromOutputs, LinearOperator
from torch_secondorder.solvers.base import Preconditioner

__all__ = ["Martens", "Nystrom", "NystromApproximation"]


class Martens(Preconditioner):
    """The diagonal `(d + damping)^power` of Martens 2010, section 4.7, in units of its mean.

    There `d` is the sum of the squares of the samples' gradients, which takes a pass for each
    sample. Here it is estimated from random vectors, see `GaussNewton.diagonal`.

    Args:
        power: Below one, for the diagonal is a poor approximation of the matrix.
        n_samples: Random vectors for each operator; they cost a backward pass each.

    Raises:
        ValueError: A number is out of range.

    >>> from torch_secondorder import NewtonCG
    >>> layer = torch.nn.Linear(2, 1)
    >>> optimizer = NewtonCG(layer.parameters(), preconditioner=Martens(n_samples=2))
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = torch.nn.functional.mse_loss(layer(torch.eye(2)), torch.ones(2, 1))
    ...     loss.backward()
    ...     return loss
    >>> loss = optimizer.step(closure)
    >>> optimizer.info.preconditioner
    'Martens'
    """

    def __init__(self, power: float = 0.75, n_samples: int = 4) -> None:
        check_number("power", power, above=0, high=1)
        check_integer("n_samples", n_samples)
        self._power = power
        self._n_samples = n_samples
        self._diagonal: Tensor | None = None

    def refresh(self, operator: LinearOperator, generator: torch.Generator | None) -> int:
        """See `Preconditioner.refresh`.

        Raises:
            TypeError: The operator is not made from model outputs.
            FloatingPointError: The diagonal was not finite.
        """
        if not isinstance(operator, FromOutputs):
            raise TypeError(
                f"the preconditioner 'martens' is made from model outputs, which "
                f"{type(operator).__name__} does not know; use curvature='ggn', or 'nystrom'"
            )
        diagonal = operator.diagonal(self._n_samples, generator)
        if not bool(torch.isfinite(diagonal).all()):
            raise FloatingPointError("the diagonal was not finite")
        self._diagonal = diagonal
        return self._n_samples

    def inverse(self, damping: float) -> LinearOperator:
        """See `Preconditioner.inverse`."""
        assert self._diagonal is not None
        damped = self._diagonal + damping
        # Where no sample has anything to say and nothing is damped, there is no scale to go by.
        # In units of its mean: no other digits come of another scale.
        mean, tiny = damped.mean(), torch.finfo(damped.dtype).tiny ** 0.5
        damped = torch.where(mean > 0, damped / mean, 1.0).clamp_(min=tiny)
        return Diagonal(damped.pow_(-self._power))

    def state_dict(self) -> dict[str, Any]:
        """See `Preconditioner.state_dict`; it is made anew for each operator."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Preconditioner.load_state_dict`."""
        self._diagonal = None


class Nystrom(Preconditioner):
    """A randomized low-rank approximation of the operator, see `NystromApproximation`.

    Frangella, Tropp and Udell 2023, "Randomized Nystrom preconditioning"; used for Newton-CG by
    Rathore et al. 2024, "Challenges in training PINNs: a loss landscape perspective".

    Args:
        rank: Columns; the sketch takes as many products.
        period: Operators that one sketch serves.

    Raises:
        ValueError: A number is out of range.

    >>> from torch_secondorder import NewtonCG
    >>> layer = torch.nn.Linear(2, 1)
    >>> optimizer = NewtonCG(layer.parameters(), preconditioner=Nystrom(rank=2))
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = torch.nn.functional.mse_loss(layer(torch.eye(2)), torch.ones(2, 1))
    ...     loss.backward()
    ...     return loss
    >>> loss = optimizer.step(closure)
    >>> optimizer.info.preconditioner
    'Nystrom'
    """

    def __init__(self, rank: int = 60, period: int = 20) -> None:
        check_integer("rank", rank)
        check_integer("period", period)
        self._rank = rank
        self._period = period
        self._age = 0
        self._sketch: NystromApproximation | None = None

    def refresh(self, operator: LinearOperator, generator: torch.Generator | None) -> int:
        """See `Preconditioner.refresh`."""
        if self._sketch is not None and self._sketch.fits(operator):
            self._age += 1
            if self._age < self._period:
                return 0
        rank = min(self._rank, operator.size)
        self._sketch = NystromApproximation.of(operator, rank, generator)
        self._age = 0
        return rank

    def inverse(self, damping: float) -> LinearOperator:
        """See `Preconditioner.inverse`."""
        assert self._sketch is not None
        return _NystromInverse(self._sketch, damping)

    def state_dict(self) -> dict[str, Any]:
        """See `Preconditioner.state_dict`."""
        if self._sketch is None:
            return {}
        return {"age": self._age, "vectors": self._sketch.vectors, "values": self._sketch.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Preconditioner.load_state_dict`."""
        self._age = state.get("age", 0)
        self._sketch = NystromApproximation(state["vectors"], state["values"]) if state else None


class NystromApproximation(LinearOperator):
    """`A ~ U L U'`, the Nystrom approximation from products with a few random vectors.

    Args:
        vectors: `U`, orthonormal columns, shape `(n, k)`.
        values: `L`, not negative, descending, shape `(k,)`.

    >>> A = Diagonal(torch.tensor([9.0, 4.0, 0.0], dtype=torch.float64))
    >>> NystromApproximation.of(A, 2).values.round(decimals=6)
    tensor([9., 4.], dtype=torch.float64)
    """

    def __init__(self, vectors: Tensor, values: Tensor) -> None:
        self.vectors = vectors
        self.values = values
        self.size, self.dtype, self.device = len(vectors), vectors.dtype, vectors.device

    @classmethod
    def of(
        cls, A: LinearOperator, rank: int, generator: torch.Generator | None = None
    ) -> NystromApproximation:
        """Sketches an operator with `rank` products, in one `matmat`.

        A shift makes what is factored positive definite (Tropp et al. 2017, algorithm 3). Where the
        operator is indefinite it lifts the lowest value seen as far above zero as that lies below:
        values are divided by what is left of it.

        Raises:
            FloatingPointError: A product was not finite.
        """
        dtype, device = A.dtype, A.device
        where = device if generator is None else generator.device
        test = torch.randn(A.size, rank, dtype=dtype, device=where, generator=generator).to(device)
        basis = torch.linalg.qr(test).Q
        image = A.matmat(basis)
        core = (basis.T @ image).double()
        core = (core + core.T) / 2
        if not bool(torch.isfinite(core).all()):
            raise FloatingPointError("a product of the Nystrom sketch was not finite")
        size, lowest = read_numbers(
            torch.linalg.matrix_norm(core, 2), torch.linalg.eigvalsh(core)[0]
        )
        shift = max(torch.finfo(dtype).eps * size * 10, torch.finfo(dtype).tiny)
        if lowest < shift:
            shift += 2 * max(-lowest, 0.0)
        identity = torch.eye(rank, dtype=core.dtype, device=device)
        factor = torch.linalg.cholesky(core + shift * identity)
        shifted = image.add(basis, alpha=shift)
        half = torch.linalg.solve_triangular(factor.T.to(dtype), shifted, upper=True, left=False)
        vectors, roots, _ = torch.linalg.svd(half, full_matrices=False)
        return cls(vectors, (roots.square() - shift).clamp_(min=0.0))

    @cached_property
    def deviation(self) -> Tensor:
        """The largest entry of `U'U - I`, 0-dim; libraries differ in it."""
        products = self.vectors.T @ self.vectors
        products.diagonal().sub_(1.0)
        return products.abs().amax()

    def fits(self, operator: LinearOperator) -> bool:
        """True if it may stand for an operator: one of its size and kind."""
        return (
            self.size == operator.size
            and self.dtype == operator.dtype
            and self.device.type == operator.device.type  # an index may be left out
        )

    def matvec(self, v: Tensor) -> Tensor:
        """See `LinearOperator.matvec`."""
        return self.vectors @ (self.values * (self.vectors.T @ v))


class _NystromInverse(LinearOperator):
    """`U (L + damping I)^-1 U' + (I - U U') / (l + damping)`, with the smallest value `l` of `L`.

    Scaled so that the largest value of `L` counts as one: a trust radius then is a length along the
    directions of most curvature, and reaches further along others.
    """

    def __init__(self, sketch: NystromApproximation, damping: float) -> None:
        self.size, self.dtype, self.device = sketch.size, sketch.dtype, sketch.device
        self._vectors = sketch.vectors
        largest, smallest = sketch.values[0], sketch.values[-1]
        # The columns of U are not quite orthonormal: the least eigenvalue has to show.
        numbers = torch.finfo(largest.dtype)
        rounding = (4 * sketch.deviation).clamp(min=50 * numbers.eps)
        shift = damping + (rounding * largest).clamp(min=numbers.tiny)
        self._plain = (largest + shift) / (smallest + shift)
        self._excess = (largest + shift) / (sketch.values + shift) - self._plain

    def matvec(self, v: Tensor) -> Tensor:
        """See `LinearOperator.matvec`."""
        inside = self._excess * (self._vectors.T @ v)
        return torch.addmv(self._plain * v, self._vectors, inside)
