"""The part of MINRES that is arithmetic on a few numbers."""

from __future__ import annotations

from math import hypot, sqrt

__all__ = ["MinresScalars"]


class MinresScalars:
    """What the tridiagonal matrix `T` of the Lanczos process says of the iterates.

    `T` has `alpha` on and `beta` beside its diagonal. Reflections `[c s; s -c]` make it triangular
    while it grows; the entries are named as by Liu and Roosta 2022. The iterates are
    `x_k = x_{k-1} + step d_k` with `d_k = v_k - weight d_{k-1} - weight_before d_{k-2}`, so the
    lengths of the `d` follow too, as long as the Lanczos vectors are orthogonal. Lengths are the
    preconditioner's: `sqrt(r'M r)` for a residual, and by the inverse of `M` for a `d`.

    Attributes:
        phi: The norm of the residual `r`.
        magnitude: The largest column of `T` so far, a lower bound of `|A|`.
        step: How far `x` is to go along the next `d`.
    """

    def __init__(self, phi: float) -> None:
        self.phi = phi
        self.magnitude = self.step = 0.0
        # The first column is treated like any other, with nothing before it.
        self.c, self.s = -1.0, 0.0
        self.beta = self.delta = self.delta_bar = self.gamma_bar = 0.0
        self.epsilon = self.epsilon_next = 0.0
        self.gamma, self.gamma_before, self.gamma_next = 1.0, 1.0, 1.0
        self.c_next, self.s_next = 0.0, 1.0
        # The squares of the last two d, and the product of both.
        self._d_d = self._d_d_before = self._d_before_d = 0.0

    def extend(self, alpha: float, beta: float) -> None:
        """Takes a new column of `T` and finds the next step, not yet taken."""
        self.magnitude = max(self.magnitude, hypot(self.beta, alpha, beta))
        self.beta = beta
        self.delta = self.c * self.delta_bar + self.s * alpha
        self.gamma_bar = self.s * self.delta_bar - self.c * alpha
        self.delta_bar = -self.c * beta
        self.epsilon, self.epsilon_next = self.epsilon_next, self.s * beta
        self.gamma_next = hypot(self.gamma_bar, beta)
        if self.gamma_next > 0.0:
            self.c_next, self.s_next = self.gamma_bar / self.gamma_next, beta / self.gamma_next
            self.step = self.c_next * self.phi / self.gamma_next

    @property
    def weight(self) -> float:
        """Of the last direction in the next one."""
        return self.delta / self.gamma

    @property
    def weight_before(self) -> float:
        """Of the last direction but one in the next one."""
        return self.epsilon / self.gamma_before

    @property
    def curvature(self) -> float:
        """`r'M A M r / r'M r` for the residual before the step."""
        return -self.c * self.gamma_bar

    @property
    def slope(self) -> float:
        """`|A M r| / |r|`, for `A M r = phi (gamma_bar u + delta_bar u_next)`."""
        return hypot(self.gamma_bar, self.delta_bar)

    def spoilt(self, precision: float) -> bool:
        """Whether rounding would make more of the step than the step itself.

        Where `A x = b` has no solution, the least residual `r` has `A r = 0`. Near it the steps
        grow very long, along `r`, and reduce the residual by nothing, while each of them changes it
        by the rounding of `A x`, about `precision |A| |step d|`. The same happens where the
        condition of `A` is beyond the precision. Steps that gain nothing and cost nothing are none
        of these: with as much negative as positive curvature, every other step is zero.
        """
        if self.slope == 0.0:
            return True
        loss = 10.0 * precision * self.magnitude * abs(self.step) * sqrt(self._next_d_d())
        gain = self.phi * self.c_next * self.c_next / (1.0 + self.s_next)
        negligible: float = precision ** (2 / 3) * self.phi
        return loss >= max(gain, negligible)

    def _next_d_d(self) -> float:
        w, w_before = self.weight, self.weight_before
        squares = w * w * self._d_d + w_before * w_before * self._d_d_before
        return max(1.0, 1.0 + squares + 2.0 * w * w_before * self._d_before_d)

    def advance(self) -> None:
        """Takes the step."""
        w, w_before, next_d_d = self.weight, self.weight_before, self._next_d_d()
        self._d_before_d = -w_before * self._d_before_d - w * self._d_d
        self._d_d, self._d_d_before = next_d_d, self._d_d
        self.gamma, self.gamma_before = self.gamma_next, self.gamma
        self.c, self.s = self.c_next, self.s_next
        self.phi *= self.s
