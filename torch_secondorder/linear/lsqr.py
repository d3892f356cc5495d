"""LSQR: least squares by the bidiagonalization of Golub and Kahan."""

from __future__ import annotations

from functools import partial
from math import hypot

import torch
from torch import Tensor

from torch_secondorder.linear._bidiagonalization import Bidiagonalization, rotation
from torch_secondorder.linear.iterative import KrylovResult, Settings, iterate
from torch_secondorder.linear.operators import OperatorLike

__all__ = ["lsqr"]


def lsqr(
    A: OperatorLike,
    b: Tensor,
    damp: float = 0.0,
    atol: float = 1e-6,
    btol: float = 1e-6,
    conlim: float = 1e8,
    max_iterations: int | None = None,
    calc_var: bool = False,
    *,
    x0: Tensor | None = None,
    preconditioner: OperatorLike | None = None,
) -> KrylovResult:
    """Minimizes `|A x - b|^2 + damp^2 |x|^2` on a matrix-free operator, by LSQR.

    The iterates are those of conjugate gradients on the normal equations (CGLS), with better
    numerical properties: `|A x - b|` falls with every iteration, and `|x|` grows. Started from
    zero, it converges to the solution of minimum norm if there are several. `lsmr` is the
    alternative if you stop early.

    Arguments and tests are those of `scipy.sparse.linalg.lsqr`. It stops where `A x = b` holds,
    `|r| <= btol |b| + atol |A| |x|`; at a least-squares solution, `|A'r| <= atol |A| |r|`; or where
    the condition exceeds `conlim`. All tests use estimates that cost nothing. The host waits for
    the device once per iteration.

    No graph is recorded; for gradients with respect to `A` and `b` see `lstsq`.

    Reference: Paige and Saunders 1982, "LSQR: An algorithm for sparse linear equations and sparse
    least squares".

    Args:
        A: The matrix; see `as_operator` for its forms.
        b: The right-hand side, float32 or float64: shape `(m,)`, or the shape that `A.matvec`
            returns.
        damp: The square root of the `penalty` of `ridge`.
        atol: Relative accuracy of `A`, in [0, 1); half of machine epsilon if that is larger.
        btol: Relative accuracy of `b`, likewise.
        conlim: Limit of the condition; 0 for that of the dtype.
        max_iterations: The most iterations; `2 n` by default.
        calc_var: Whether to estimate the diagonal of `(A'A + damp^2 I)^-1`, for standard errors.
        x0: A start. As in SciPy, the damping is then `damp^2 |x - x0|^2`.
        preconditioner: A matrix `P`, such that `A P` has a smaller condition: the iteration solves
            for `z` in `x = x0 + P z`, and the damping is `damp^2 |z|^2`. For a column scaling pass
            `curvature.Diagonal`.

    Returns:
        The solution, the reason why the iteration stopped, and norms.

    Raises:
        TypeError: `A` or the preconditioner is not a matrix in one of these forms, or `b` is not a
            tensor of float32 or float64.
        ValueError: A number is out of range, shapes or dtypes do not fit, or `b` is not finite.

    >>> A = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    >>> b = torch.tensor([1.0, 0.01, -1.0], dtype=torch.float64)
    >>> result = lsqr(A, b)
    >>> result.status.name, result.iterations, round(result.residual_norm, 8)
    ('LEAST_SQUARES', 2, 0.0057735)
    """
    settings = Settings(damp, atol, btol, conlim, max_iterations)
    make = partial(_LSQR, calc_var=calc_var)
    return iterate(make, A, b, settings, x0, preconditioner)


class _LSQR:
    """The recurrence of LSQR; names are those of the paper's sections 4 and 5."""

    def __init__(self, process: Bidiagonalization, damp: float, *, calc_var: bool) -> None:
        self.x = torch.zeros_like(process.v)
        self.variance: Tensor | None = torch.zeros_like(process.v) if calc_var else None
        self.residual_norm, self.norm = process.beta, 0.0
        self.normal_residual_norm = process.alpha * process.beta
        self.operator_norm = self.condition = 0.0
        self._damp = damp
        self._w = process.v.clone()
        self._alpha, self._rho_bar, self._phi_bar = process.alpha, process.alpha, process.beta
        self._inverse_norm = 0.0  # the Frobenius norm of the pseudoinverse, from below
        self._damped = 0.0  # the part of the residual that damping has made
        # For |x|: the rotation from the right, the last entry solved for, and all before it.
        self._c2, self._s2, self._z, self._z_norm = -1.0, 0.0, 0.0, 0.0

    def wanted(self) -> Tensor:
        """The norm of `w`."""
        norm: Tensor = torch.linalg.vector_norm(self._w)
        return norm

    def update(self, process: Bidiagonalization, value: float) -> None:
        """See `Recurrence.update`."""
        alpha, beta, damp = process.alpha, process.beta, self._damp
        self.operator_norm = hypot(self.operator_norm, self._alpha, beta, damp)
        self._alpha = alpha
        # The rotations that eliminate the damping, and the entry below the diagonal.
        c1, s1, rho1 = rotation(self._rho_bar, damp)
        self._damped = hypot(self._damped, s1 * self._phi_bar)
        c, s, rho = rotation(rho1, beta)
        phi_bar = c1 * self._phi_bar
        phi, self._phi_bar = c * phi_bar, s * phi_bar
        theta, self._rho_bar = s * alpha, -c * alpha
        if rho:
            self.x.add_(self._w, alpha=phi / rho)
            if self.variance is not None:
                scaled = self._w / rho
                self.variance.addcmul_(scaled, scaled)
            self._inverse_norm = hypot(self._inverse_norm, value / rho)
            torch.add(process.v, self._w, alpha=-theta / rho, out=self._w)
        self.residual_norm = hypot(self._phi_bar, self._damped)
        self.normal_residual_norm = alpha * abs(s * phi)
        self.condition = self.operator_norm * self._inverse_norm
        self._measure(rho, theta, phi)

    def _measure(self, rho: float, theta: float, phi: float) -> None:
        """Updates `|x|`, by a rotation from the right for the entry above the diagonal."""
        right = phi - self._s2 * rho * self._z
        gamma_bar = -self._c2 * rho
        if gamma_bar:
            self.norm = hypot(self._z_norm, right / gamma_bar)
        self._c2, self._s2, gamma = rotation(gamma_bar, theta)
        self._z = right / gamma if gamma else 0.0
        self._z_norm = hypot(self._z_norm, self._z)
