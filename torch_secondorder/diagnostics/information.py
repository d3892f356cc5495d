"""Standard errors from the curvature of a likelihood."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_integer, check_number
from torch_secondorder.curvature import LinearOperator
from torch_secondorder.diagnostics._point import Counted, Point, opened
from torch_secondorder.diagnostics.problem import Source
from torch_secondorder.solvers import CG, LinearSolver, SolveStatus

__all__ = ["ObservedInformation", "observed_information"]


@dataclass(frozen=True, slots=True)
class ObservedInformation:
    """The covariance of an estimate, from the observed information matrix `I`.

    Without directions it covers all parameters, and `k` is `n`; otherwise the `k` combinations
    `C'theta` of them.

    Attributes:
        covariance: `I^-1`, or `C'I^-1 C`, shape `(k, k)`, float64, on the host.
        information: `I`, `(n, n)`, likewise; None if it was not formed.
        newton_decrement: `sqrt(g'I^-1 g)`: the distance to the estimate in standard errors, in the
            direction where it is largest. It should be far below one. None if it is unknown.
        products: Number of products.

    >>> from torch_secondorder import FunctionalObjective
    >>> loss = FunctionalObjective(lambda m: 2 * (m**2).sum(), torch.zeros(2))
    >>> found = observed_information(loss)
    >>> found.covariance.diagonal(), found.newton_decrement
    (tensor([0.2500, 0.2500], dtype=torch.float64), 0.0)
    """

    covariance: Tensor
    information: Tensor | None
    newton_decrement: float | None
    products: int

    @property
    def standard_errors(self) -> Tensor:
        """The square roots of the covariance's diagonal, `(k,)`; see `Problem.named`."""
        return self.covariance.diagonal().sqrt()


def observed_information(
    source: Source,
    *,
    scale: float = 1.0,
    directions: Tensor | None = None,
    largest: int = 2000,
    solver: LinearSolver | None = None,
    progress: bool | None = None,
) -> ObservedInformation:
    """Covariance and standard errors from the Hessian of the negative log-likelihood.

    At the maximum of the likelihood, if the model is correct, the inverse of this matrix estimates
    the covariance of the estimate (Efron and Hinkley 1978). The loss has to be the sum of the
    negative log-likelihoods of all observations; if it is a mean, give their number as `scale`.
    Squared errors are log-likelihoods only after division by twice the variance of the noise. A
    penalty in the loss counts as the negative logarithm of a prior.

    Args:
        source: See `eigenpairs`; its parameters are the estimate.
        scale: Factor that turns the loss into that sum: the number of observations, if the loss is
            their mean.
        directions: Combinations of parameters, as columns `C`, `(n, k)` or `(n,)`. For each a
            linear system is solved, and the matrix is not formed.
        largest: The largest number of parameters for which the matrix is formed.
        solver: Solver of these systems; by default conjugate gradients to a residual of 1e-8 (1e-5
            in float32). Use `MINRES` if the matrix is nearly singular.
        progress: Shows a progress bar, see `eigenpairs`.

    Returns:
        The covariance, the information and what they are made from.

    Raises:
        TypeError: The source is of another kind.
        ValueError: There are too many parameters to form the matrix, the matrix is not positive
            definite and has no inverse, or an argument is out of range.
        RuntimeError: Loss or products are not finite or have no derivative, or a system was not
            solved.

    >>> from torch_secondorder import FunctionalObjective
    >>> data = torch.tensor([1.0, 2.0, 6.0])
    >>> loss = FunctionalObjective(lambda m: 0.5 * ((data - m) ** 2).sum(), torch.tensor([3.0]))
    >>> observed_information(loss).standard_errors  # one over the root of three
    tensor([0.5774], dtype=torch.float64)
    """
    check_number("scale", scale, above=0)
    check_integer("largest", largest)
    with opened(source, progress, None, "observed information") as point:
        A = point.operator
        if directions is not None:
            return _along(A, _columns(directions, A), scale, solver)
        if A.size > largest:
            raise ValueError(
                f"{A.size} parameters are too many to form their information matrix, which would "
                f"take {A.size**2 * 8 / 2**30:.3g} GiB: choose some directions=, restrict the "
                f"problem to fewer params, or raise largest={largest}"
            )
        return _dense(point, scale)


def _dense(point: Point, scale: float) -> ObservedInformation:
    A = point.operator
    eye = torch.eye(A.size, dtype=A.dtype, device=A.device)
    information = (A.matmat(eye) * scale).to("cpu", torch.float64)
    information = (information + information.T) / 2
    values = torch.linalg.eigvalsh(information)
    lowest, highest = float(values[0]), float(values.abs().max())
    # Rounding in the products can make a zero eigenvalue this large.
    if lowest <= A.size * torch.finfo(A.dtype).eps * highest:
        raise ValueError(
            "the observed information is not positive definite: its eigenvalues reach from "
            f"{lowest:.3g} to {highest:.3g}. This is not a maximum of the likelihood, or the data "
            "do not determine all parameters: pass directions= that they do, or add a prior"
        )
    factor = torch.linalg.cholesky(information)
    decrement = None
    if point.grad is not None:
        g = (point.grad * scale).to("cpu", torch.float64)
        decrement = float(torch.linalg.solve_triangular(factor, g[:, None], upper=False).norm())
    covariance = torch.cholesky_inverse(factor)
    return ObservedInformation(covariance, information, decrement, A.products)


def _along(
    A: Counted, columns: Tensor, scale: float, solver: LinearSolver | None
) -> ObservedInformation:
    if solver is None:
        tolerance = 1e-8 if A.dtype == torch.float64 else 1e-5
        solver = CG(max_iterations=max(1000, 2 * A.size), tolerance=tolerance)
    solutions = []
    for i, column in enumerate(columns.unbind(1)):
        result = solver(A, column)
        if result.status is SolveStatus.NEGATIVE_CURVATURE:
            raise ValueError(
                "the observed information is not positive definite: it has a curvature of "
                f"{result.negative_curvature:.3g}. This is not a maximum of the likelihood"
            )
        if result.status is not SolveStatus.CONVERGED:
            raise RuntimeError(
                f"the system for direction {i} was not solved after {result.iterations} iterations "
                f"({result.status.name}, residual {result.residual_norm:.1e}): the data may not "
                "determine it; or pass another solver="
            )
        solutions.append(result.x)
    solved = torch.stack(solutions, 1).double()
    covariance = (columns.double().T @ solved / scale).cpu()
    return ObservedInformation((covariance + covariance.T) / 2, None, None, A.products)


def _columns(directions: Tensor, A: LinearOperator) -> Tensor:
    columns = directions.detach().to(A.device, A.dtype)
    if columns.dim() == 1:
        columns = columns[:, None]
    if columns.dim() != 2 or columns.shape[0] != A.size or not columns.shape[1]:
        raise ValueError(
            f"directions must have shape ({A.size},) or ({A.size}, k), got "
            f"{tuple(directions.shape)}"
        )
    if not torch.isfinite(columns).all() or not columns.any(0).all():
        raise ValueError("directions must be finite and not zero")
    return columns
