"""The Lanczos process with thick restarts, for a few eigenvalues at an end of the spectrum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from torch_secondorder.curvature import LinearOperator
from torch_secondorder.curvature._random import draw
from torch_secondorder.solvers.lanczos import ROUNDING, orthogonalized

Which: TypeAlias = Literal["largest", "smallest", "magnitude"]

_MEMORY = 256 * 2**20  # bytes for the basis
_MAX_ROOM = 300  # beyond it the small eigenproblem takes longer than most products


def subspace_room(size: int, dtype: torch.dtype, k: int) -> int:
    """Number of basis vectors to hold: as many as fit in 256 MiB, between `2 k + 20` and 300."""
    return min(size, max(2 * k + 20, min(vectors_in_memory(size, dtype), _MAX_ROOM)))


def vectors_in_memory(size: int, dtype: torch.dtype) -> int:
    """Number of vectors that fit into 256 MiB."""
    return int(_MEMORY // (size * torch.finfo(dtype).bits // 8))


@dataclass(frozen=True, slots=True)
class Ritz:
    """Approximate eigenpairs, the most wanted first; float64, on the host.

    Attributes:
        values: Shape `(j,)`.
        residuals: `|A y - value y|` for each unit Ritz vector `y`, `(j,)`.
        coordinates: The vectors in the basis, as columns, `(j, j)`.
    """

    values: Tensor
    residuals: Tensor
    coordinates: Tensor


class Krylov:
    """An orthonormal basis that grows by one product at a time, with the projection of `A` on it.

    Every new vector is made orthogonal to all earlier ones, twice. When the basis is full it
    shrinks to the most wanted Ritz vectors and grows again (Wu and Simon 2000, "Thick-restart
    Lanczos method for large symmetric eigenvalue problems"). Because all coefficients of a new
    vector are computed anyway, the arrow that a restart leaves in the projected matrix needs no
    special formulas. When the space is invariant, it continues with a random vector outside.

    Args:
        A: A symmetric operator.
        room: The largest number of vectors in the basis, at most `n`.
        generator: Source of random vectors.

    Attributes:
        count: Number of vectors in the basis.
        steps: Number of steps, which is that of products.
        restarted: True after the basis has been shrunk.
        breaks: How often the space was found to be invariant.
        since_break: Number of steps since then, or since the start.
    """

    def __init__(self, A: LinearOperator, room: int, generator: torch.Generator) -> None:
        self._A, self._generator = A, generator
        self._basis = torch.empty(room, A.size, dtype=A.dtype, device=A.device)
        self._projected = torch.zeros(room, room, dtype=torch.float64)
        self._rounding = ROUNDING * torch.finfo(A.dtype).eps
        self._residual = 0.0
        self._magnitude = 0.0
        self.count = self.steps = self.since_break = self.breaks = 0
        self.restarted = False
        self._next: Tensor | None = self._random()

    @property
    def precision(self) -> float:
        """The largest residual that counts as rounding."""
        return self._rounding * self._magnitude

    @property
    def full(self) -> bool:
        """True if the basis has no room for another vector."""
        return self.count == len(self._basis)

    @property
    def exhausted(self) -> bool:
        """True if the basis spans the whole space, so that Ritz pairs are eigenpairs."""
        return self.count == self._A.size

    def step(self) -> None:
        """Adds a vector, with one product."""
        assert self._next is not None
        v, j = self._next, self.count
        self._basis[j] = v
        self.count += 1
        self.steps += 1
        basis = self._basis[: self.count]
        rest, first, second = orthogonalized(self._A @ v, basis)
        column = torch.cat([first + second, torch.linalg.vector_norm(rest)[None]])
        column = column.to("cpu", torch.float64)  # one transfer for all coefficients
        self._projected[: j + 1, j] = self._projected[j, : j + 1] = column[:-1]
        self._residual = float(column[-1])
        self._magnitude = max(self._magnitude, float(column.norm()))
        self.since_break += 1
        if self._residual > self.precision:
            self._next = rest.mul_(1.0 / self._residual)
        else:
            self._residual = 0.0
            self.breaks += 1
            self.since_break = 0
            self._next = None if self.exhausted else self._random()

    def search(self, k: int, which: Which, max_steps: int) -> Iterator[tuple[Ritz, bool]]:
        """Grows the space, and yields the Ritz pairs from time to time.

        That is whenever they may have changed suddenly, at every tenth of the steps (the small
        eigenproblem is not free), and in the end.

        Args:
            k: Number of wanted pairs.
            which: The end of the spectrum.
            max_steps: The largest number of steps.

        Yields:
            The pairs, and True if the space was just found to be invariant.
        """
        due = k
        while True:
            breaks = self.breaks
            self.step()
            broke = self.breaks > breaks
            last = self.exhausted or self.steps >= max_steps
            if not (last or broke or self.full or self.steps >= due):
                continue
            due = self.steps + max(1, self.steps // 10)
            ritz = self.ritz(which)
            yield ritz, broke
            if last:
                return
            if self.full:
                self.restart(ritz, k + (self.count - k) // 2)

    def _random(self) -> Tensor:
        """A unit vector outside the basis."""
        A = self._A
        v = draw(A.size, "gaussian", self._generator, dtype=A.dtype, device=A.device)
        basis = self._basis[: self.count]
        for _ in range(2):
            v = _unit(v)
            v = v.addmv(basis.T, basis @ v, alpha=-1.0)
        return _unit(v)

    def ritz(self, which: Which) -> Ritz:
        """The Ritz pairs, the most wanted first."""
        j = self.count
        values, vectors = torch.linalg.eigh(self._projected[:j, :j])
        key = {"largest": -values, "smallest": values, "magnitude": -values.abs()}[which]
        order = key.argsort(stable=True)
        residuals = self._residual * vectors[-1].abs()
        return Ritz(values[order], residuals[order], vectors[:, order])

    def vectors(self, ritz: Ritz, k: int) -> Tensor:
        """The first `k` Ritz vectors as columns, `(n, k)`."""
        vectors = self._basis[: self.count].T @ ritz.coordinates[:, :k].to(self._basis)
        return _unit(vectors)

    def restart(self, ritz: Ritz, keep: int) -> None:
        """Shrinks the basis to the first `keep` Ritz vectors."""
        self._basis[:keep] = (
            ritz.coordinates[:, :keep].T.to(self._basis) @ self._basis[: self.count]
        )
        self._projected.zero_()
        self._projected[:keep, :keep] = ritz.values[:keep].diag()
        self.count = keep
        self.restarted = True


class Convergence:
    """The test for convergence of the most wanted Ritz pairs.

    Pairs of an invariant space have no residual, but need not be the wanted ones: a start vector
    sees one vector of each eigenspace. The space then continues with a random vector, which sees
    the rest. The pairs are accepted once that vector has changed nothing, or has had enough steps.

    Args:
        krylov: The space.
        k: Number of wanted pairs.
    """

    def __init__(self, krylov: Krylov, k: int) -> None:
        self._krylov, self._k = krylov, k
        self._at_break: Tensor | None = None

    def reached(self, ritz: Ritz, allowed: Tensor, broke: bool) -> bool:
        """True if the search may stop.

        Args:
            ritz: The pairs, at least `k`.
            allowed: The largest residuals allowed; rounding is always allowed.
            broke: True if the space was just found to be invariant.
        """
        krylov, k = self._krylov, self._k
        if krylov.exhausted:
            return True
        if broke:
            return self.complete(ritz)
        if krylov.breaks and krylov.since_break < k + 20:
            return False
        return bool((ritz.residuals[:k] <= allowed.clamp_min(krylov.precision)).all())

    def complete(self, ritz: Ritz) -> bool:
        """True if the invariant space just found changes nothing; call it once for each."""
        values = ritz.values[: self._k]
        before, self._at_break = self._at_break, values
        return before is not None and bool(
            ((values - before).abs() <= self._krylov.precision).all()
        )


def _unit(columns: Tensor) -> Tensor:
    """A vector, or each column of a matrix, divided by its length."""
    norms: Tensor = torch.linalg.vector_norm(columns, dim=0)
    return columns / norms
