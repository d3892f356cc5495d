"""Iterative least squares on matrix-free operators: the process, its tests and its results."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_integer, check_number
from torch_secondorder._foundation.report import Report
from torch_secondorder.linear._bidiagonalization import (
    Bidiagonalization,
    check_right_hand_side,
    checked,
    true_norms,
)
from torch_secondorder.linear.operators import (
    OperatorLike,
    as_operator,
    preconditioned,
)

__all__ = ["KrylovResult", "KrylovStatus"]


class KrylovStatus(Enum):
    """The reason why an iteration stopped; the value is a sentence."""

    CONSISTENT = "A x = b holds to the tolerances atol and btol"
    LEAST_SQUARES = "x is a least-squares solution to the tolerance atol"
    ILL_CONDITIONED = "the estimate of the condition exceeds conlim, or what the dtype can hold"
    MAX_ITERATIONS = "all max_iterations were done"
    NONFINITE = "a product was not finite; x is the last iterate before it"


@dataclass(frozen=True, slots=True)
class KrylovResult(Report):
    """The outcome of `lsqr` or `lsmr`.

    With a preconditioner `P` and `x = x0 + P z`, the norms of the normal residual and of the
    matrix, and the condition, are those of the system in `z`.

    Attributes:
        x: The solution found.
        status: The reason why it stopped.
        iterations: Iterations done.
        residual_norm: `|b - A x|`, from a product with the final `x`.
        normal_residual_norm: `|A'(b - A x) - damp^2 (x - x0)|`, likewise. It is zero at a solution.
        norm: `|x|`.
        operator_norm: An estimate of the Frobenius norm of `[A; damp I]`, from below.
        condition: An estimate of the condition number of `[A; damp I]`.
        variance: Estimates, from below, of the diagonal of `(A'A + damp^2 I)^-1`, shaped like `x`;
            None if they were not asked for.

    >>> from torch_secondorder.linear import lsmr
    >>> result = lsmr(torch.eye(2), torch.tensor([1.0, 2.0]))
    >>> round(result.norm**2, 3), result.iterations
    (5.0, 1)
    """

    x: Tensor
    status: KrylovStatus
    iterations: int
    residual_norm: float
    normal_residual_norm: float
    norm: float
    operator_norm: float
    condition: float
    variance: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """The arguments that `lsqr` and `lsmr` have in common, checked."""

    damp: float
    atol: float
    btol: float
    conlim: float
    max_iterations: int | None

    def __post_init__(self) -> None:
        check_number("damp", self.damp, low=0)
        for name in ("atol", "btol"):
            check_number(name, getattr(self, name), low=0, below=1)
        check_number("conlim", self.conlim, low=0)
        check_integer("max_iterations", self.max_iterations, optional=True)


class Recurrence(Protocol):
    """The part in which `lsqr` and `lsmr` differ: the iterate and what is known of it.

    Attributes:
        x: The iterate, from zero.
        residual_norm: `|(b - A x, damp x)|`.
        normal_residual_norm: `|A'(b - A x) - damp^2 x|`.
        operator_norm: The Frobenius norm of `[A; damp I]`, from below.
        condition: Its condition.
        norm: `|x|`, perhaps of an earlier iterate.
        variance: See `KrylovResult`.
    """

    x: Tensor
    residual_norm: float
    normal_residual_norm: float
    operator_norm: float
    condition: float
    norm: float
    variance: Tensor | None

    def wanted(self) -> Tensor:
        """A 0-dim tensor that the next `update` needs the value of."""
        ...  # pragma: no cover - a protocol

    def update(self, process: Bidiagonalization, value: float) -> None:
        """Moves the iterate, after a step of the process."""
        ...  # pragma: no cover - a protocol


class MakeRecurrence(Protocol):
    """A class of recurrences."""

    def __call__(self, process: Bidiagonalization, damp: float) -> Recurrence:
        """The recurrence at `x = 0`."""
        ...  # pragma: no cover - a protocol


def iterate(
    make: MakeRecurrence,
    A: OperatorLike,
    b: Tensor,
    settings: Settings,
    x0: Tensor | None,
    preconditioner: OperatorLike | None,
) -> KrylovResult:
    """Runs a method with the tests of Paige and Saunders."""
    operator = as_operator(A)
    right = None if preconditioner is None else as_operator(preconditioner)
    check_right_hand_side(A, b, x0)
    b = b.detach()
    rest, composed = b, preconditioned(operator, right)
    if x0 is not None:
        x0 = x0.detach()
        image = checked("A.matvec", operator.matvec(x0), b, b.shape)
        rest = b - image
    process = Bidiagonalization(composed, rest)
    run = make(process, settings.damp / process.unit)
    size_of_b = process.beta
    if x0 is not None:
        size_of_b = true_norms(b)[0] / process.unit_of_b
    most = settings.max_iterations or 2 * process.v.numel()
    count, status = 0, _status_at_start(process)
    while status is None:
        (value,) = process.step(run.wanted())
        if not process.finite:
            status = KrylovStatus.NONFINITE
            break
        run.update(process, value)
        count += 1
        status = _status(run, settings, size_of_b, torch.finfo(b.dtype).eps)
        if status is None and count >= most:
            status = KrylovStatus.MAX_ITERATIONS
    z = run.x
    if process.unit != process.unit_of_b:
        z = z * (process.unit_of_b / process.unit)
    x = z if right is None else right.matvec(z).detach()
    if x0 is not None:
        x = x0 + x
    # Two more products: recurrences drift.
    r = b - operator.matvec(x).detach()
    g = composed.rmatvec(r).detach().sub(z * settings.damp, alpha=settings.damp)
    residual_norm, normal_residual_norm, norm = true_norms(r, g, x)
    result = KrylovResult(
        x=x,
        status=status,
        iterations=count,
        residual_norm=residual_norm,
        normal_residual_norm=normal_residual_norm,
        norm=norm,
        operator_norm=run.operator_norm * process.unit,
        condition=run.condition,
        variance=None if run.variance is None else run.variance / process.unit / process.unit,
    )
    return result


def _status_at_start(process: Bidiagonalization) -> KrylovStatus | None:
    if not process.finite:
        return KrylovStatus.NONFINITE
    if not process.beta:
        return KrylovStatus.CONSISTENT
    return None if process.alpha else KrylovStatus.LEAST_SQUARES


def _status(
    run: Recurrence, settings: Settings, size_of_b: float, precision: float
) -> KrylovStatus | None:
    """The tests of Paige and Saunders 1982, section 6; no tolerance is below the rounding."""
    atol, btol = max(settings.atol, precision / 2), max(settings.btol, precision / 2)
    if run.residual_norm <= btol * size_of_b + atol * run.operator_norm * run.norm:
        return KrylovStatus.CONSISTENT
    if run.normal_residual_norm <= atol * run.operator_norm * run.residual_norm:
        return KrylovStatus.LEAST_SQUARES
    limit = min(settings.conlim or 2 / precision, 2 / precision)
    return KrylovStatus.ILL_CONDITIONED if run.condition >= limit else None
