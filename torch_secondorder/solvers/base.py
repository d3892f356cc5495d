"""Protocols of linear solvers and preconditioners, and results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from torch_secondorder.curvature import LinearOperator

__all__ = [
    "Iterate",
    "LinearSolver",
    "Preconditioner",
    "SolveResult",
    "SolveStatus",
    "check_system",
]


class SolveStatus(Enum):
    """The reason why a solver stopped; the value is a sentence."""

    CONVERGED = "The residual is as small as was asked for."
    SLOW_PROGRESS = "The last iterations lowered the quadratic by too little to go on."
    NEGATIVE_CURVATURE = "A direction without positive curvature was met."
    BOUNDARY = "The solution lies at the trust radius."
    MAX_ITERATIONS = "All iterations were done."
    SINGULAR = "The system has no solution; x minimizes the residual as far as it can be lowered."
    NONFINITE = "A product was not finite; x is the last finite iterate."


class Iterate(NamedTuple):
    """A point that a solver passed.

    Attributes:
        x: The point.
        decrease: The fall of the quadratic from zero to there.
        length: The norm of `x`, as in `SolveResult`.

    >>> Iterate(torch.zeros(2), decrease=0.5).length
    0.0
    """

    x: Tensor
    decrease: float
    length: float = 0.0


@dataclass(frozen=True, slots=True)
class SolveResult:
    """The outcome of a solver for `A x = b`.

    Attributes:
        x: The solution found, shape `(n,)`, always finite.
        status: Why the solver stopped.
        iterations: Iterations done.
        products: Products with `A`.
        residual_norm: `|b - A x| / |b|` in the Euclidean norm, as far as the solver knows it.
        decrease: `b'x - x'A x / 2`: how far the quadratic `x'A x / 2 - b'x` lies below zero.
        length: The norm of `x` in the metric of the trust radius, where there is one, else 0.
        negative_direction: A direction `p` with `p'A p <= 0`, or no more than rounding above it,
            where one was met.
        negative_curvature: `p'A p / p'p` for it where that is below zero by more than rounding,
            else 0.
        iterates: Earlier iterates that were kept, oldest first, `x` not among them.

    >>> from torch_secondorder.curvature import Diagonal
    >>> from torch_secondorder.solvers import CG
    >>> result = CG()(Diagonal(torch.tensor([4.0, 2.0])), torch.tensor([4.0, 2.0]))
    >>> result.status.name, round(result.decrease, 3)
    ('CONVERGED', 3.0)
    """

    x: Tensor
    status: SolveStatus
    iterations: int
    products: int
    residual_norm: float
    decrease: float
    length: float = 0.0
    negative_direction: Tensor | None = None
    negative_curvature: float = 0.0
    iterates: tuple[Iterate, ...] = ()


class LinearSolver(Protocol):
    """Anything that solves `A x = b`; the classes here are frozen dataclasses without state.

    >>> from torch_secondorder.curvature import Diagonal
    >>> from torch_secondorder.solvers import CG
    >>> solver: LinearSolver = CG()
    >>> result = solver(Diagonal(torch.tensor([1.0, 2.0])), torch.ones(2))
    >>> [round(value, 3) for value in result.x.tolist()]
    [1.0, 0.5]
    """

    def __call__(
        self,
        A: LinearOperator,
        b: Tensor,
        *,
        x0: Tensor | None = None,
        preconditioner: LinearOperator | None = None,
    ) -> SolveResult:
        """Solves `A x = b`.

        Args:
            A: A symmetric operator.
            b: Shape `(n,)`.
            x0: Where to begin, shape `(n,)`; zero by default.
            preconditioner: A positive definite operator close to the inverse of `A`.
        """


class Preconditioner(ABC):
    """Something close to the inverse of `A + damping I`, kept from one system to the next.

    >>> from torch_secondorder.solvers import Martens, resolve_preconditioner
    >>> isinstance(resolve_preconditioner("martens"), Preconditioner)
    True
    """

    @abstractmethod
    def refresh(self, operator: LinearOperator, generator: torch.Generator | None) -> int:
        """Learns from a new operator `A`; returns how many products with it that took."""

    @abstractmethod
    def inverse(self, damping: float) -> LinearOperator:
        """An approximation of `(A + damping I)^-1`, positive definite."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The state that is kept between systems: tensors and numbers."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state of `state_dict`; an empty one resets."""


def check_system(
    A: LinearOperator, b: Tensor, x0: Tensor | None, preconditioner: LinearOperator | None
) -> None:
    """Raises a ValueError unless all parts of a system are of one size."""
    for name, vector in (("b", b), ("x0", x0)):
        if vector is not None and vector.shape != (A.size,):
            raise ValueError(f"{name} must have shape ({A.size},), got {tuple(vector.shape)}")
    if preconditioner is not None and preconditioner.size != A.size:
        raise ValueError(
            f"the preconditioner is of size {preconditioner.size}, the operator of {A.size}"
        )
