"""LSMR: least squares by MINRES on the normal equations."""

from __future__ import annotations

from math import hypot, inf

import torch
from torch import Tensor

from torch_secondorder.linear._bidiagonalization import Bidiagonalization, rotation
from torch_secondorder.linear.iterative import KrylovResult, Settings, iterate
from torch_secondorder.linear.operators import OperatorLike

__all__ = ["lsmr"]


def lsmr(
    A: OperatorLike,
    b: Tensor,
    damp: float = 0.0,
    atol: float = 1e-6,
    btol: float = 1e-6,
    conlim: float = 1e8,
    max_iterations: int | None = None,
    *,
    x0: Tensor | None = None,
    preconditioner: OperatorLike | None = None,
) -> KrylovResult:
    """Minimizes `|A x - b|^2 + damp^2 |x|^2` on a matrix-free operator, by LSMR.

    It is MINRES on the normal equations: `|A'r|`, what has to become zero, falls with every
    iteration, and so does `|r|`. With `lsqr` only the latter falls, by a little more, while `|A'r|`
    goes up and down. So it is safer to stop LSMR early, and it meets the tolerance of a
    least-squares solution sooner: the looser the tolerance and the larger the condition, the more
    iterations it saves, up to half of them. One more vector is held.

    Arguments and tests are those of `lsqr`, except that the condition is estimated by the ratio of
    diagonal entries of the bidiagonal matrix, from below.

    Reference: Fong and Saunders 2011, "LSMR: An iterative algorithm for sparse least-squares
    problems".

    Args:
        A: The matrix; see `as_operator` for its forms.
        b: The right-hand side, see `lsqr`.
        damp: See `lsqr`.
        atol: See `lsqr`.
        btol: See `lsqr`.
        conlim: See `lsqr`.
        max_iterations: The most iterations; `2 n` by default.
        x0: See `lsqr`.
        preconditioner: See `lsqr`.

    Returns:
        The solution, the reason why the iteration stopped, and norms.

    Raises:
        TypeError: See `lsqr`.
        ValueError: See `lsqr`.

    >>> A = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    >>> result = lsmr((lambda v: A @ v, lambda u: A.T @ u), A @ A.new_ones(2))
    >>> print(result.status.name, result.x.round(decimals=8))
    CONSISTENT tensor([1., 1.], dtype=torch.float64)
    """
    settings = Settings(damp, atol, btol, conlim, max_iterations)
    return iterate(_LSMR, A, b, settings, x0, preconditioner)


class _LSMR:
    """The recurrence of LSMR; names are those of the paper's sections 2 to 5."""

    variance: Tensor | None = None

    def __init__(self, process: Bidiagonalization, damp: float) -> None:
        self.x = torch.zeros_like(process.v)
        self.residual_norm, self.norm = process.beta, 0.0
        self.normal_residual_norm = process.alpha * process.beta
        self.operator_norm = self.condition = 0.0
        self._damp = damp
        self._h, self._h_bar = process.v.clone(), torch.zeros_like(process.v)
        self._alpha_bar, self._zeta_bar = process.alpha, process.alpha * process.beta
        self._rho, self._rho_bar, self._c_bar, self._s_bar = 1.0, 1.0, 1.0, 0.0
        self._residual = _Residual(process.beta)
        self._norm = process.alpha  # the Frobenius norm of the bidiagonal matrix
        self._first, self._largest, self._smallest = True, 0.0, inf  # of the entries rho_bar

    def wanted(self) -> Tensor:
        """The norm of the iterate so far; there is no recurrence for it."""
        norm: Tensor = torch.linalg.vector_norm(self.x)
        return norm

    def update(self, process: Bidiagonalization, value: float) -> None:
        """See `Recurrence.update`."""
        alpha, beta, damp = process.alpha, process.beta, self._damp
        self.norm = value
        c_hat, s_hat, alpha_hat = rotation(self._alpha_bar, damp)
        rho_old, rho_bar_old = self._rho, self._rho_bar
        c, s, rho = rotation(alpha_hat, beta)
        theta, self._alpha_bar = s * alpha, c * alpha
        theta_bar, rho_temp = self._s_bar * rho, self._c_bar * rho
        self._c_bar, self._s_bar, rho_bar = rotation(rho_temp, theta)
        zeta, self._zeta_bar = self._c_bar * self._zeta_bar, -self._s_bar * self._zeta_bar
        share = theta_bar * rho / (rho_old * rho_bar_old)
        torch.add(self._h, self._h_bar, alpha=-share, out=self._h_bar)
        if rho and rho_bar:
            self.x.add_(self._h_bar, alpha=zeta / (rho * rho_bar))
            torch.add(process.v, self._h, alpha=-theta / rho, out=self._h)
        self._residual.update(c_hat, s_hat, c, s, theta_bar, rho_bar, zeta)
        self.residual_norm = self._residual.norm
        self.normal_residual_norm = abs(self._zeta_bar)
        self.operator_norm = hypot(self._norm, beta, damp)
        self._norm = hypot(self.operator_norm, alpha)
        if not self._first:
            self._smallest = min(self._smallest, rho_bar_old)
        self._first = False
        self._largest = max(self._largest, rho_bar_old)
        smallest = min(self._smallest, rho_temp)
        self.condition = max(self._largest, rho_temp) / smallest if smallest else inf
        self._rho, self._rho_bar = rho, rho_bar


class _Residual:
    """The norm of `(b - A x, damp x)`, see the paper's section 5.1.

    Attributes:
        norm: The norm.
    """

    def __init__(self, beta: float) -> None:
        self.norm = beta
        self._beta_dd, self._beta_d, self._rho_d = beta, 0.0, 1.0
        self._tau, self._theta, self._zeta, self._damped = 0.0, 0.0, 0.0, 0.0

    def update(
        self,
        c_hat: float,
        s_hat: float,
        c: float,
        s: float,
        theta_bar: float,
        rho_bar: float,
        zeta: float,
    ) -> None:
        """Takes in the rotations of an iteration."""
        self._damped = hypot(self._damped, s_hat * self._beta_dd)
        beta_acute = c_hat * self._beta_dd
        beta_hat, self._beta_dd = c * beta_acute, -s * beta_acute
        theta_old = self._theta
        c_tilde, s_tilde, rho_tilde = rotation(self._rho_d, theta_bar)
        self._theta, self._rho_d = s_tilde * rho_bar, c_tilde * rho_bar
        self._beta_d = -s_tilde * self._beta_d + c_tilde * beta_hat
        self._tau = (self._zeta - theta_old * self._tau) / rho_tilde if rho_tilde else 0.0
        tau_d = (zeta - self._theta * self._tau) / self._rho_d if self._rho_d else 0.0
        self._zeta = zeta
        self.norm = hypot(self._damped, self._beta_d - tau_d, self._beta_dd)
