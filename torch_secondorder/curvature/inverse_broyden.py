"""The dense approximation of the inverse Hessian by updates of the self-scaled Broyden family."""

from __future__ import annotations

from math import inf, sqrt
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from torch_secondorder._foundation.checks import check_choice, check_integer
from torch_secondorder._foundation.memory import check_fits
from torch_secondorder.curvature.base import LinearOperator

__all__ = ["BroydenUpdate", "InverseBroyden"]

#: Names of updates.
BroydenUpdate: TypeAlias = Literal["bfgs", "ssbfgs", "ssbroyden", "dfp"]
#: Those that scale with each pair as far as it says.
SELF_SCALED = ("ssbfgs", "ssbroyden")

# BFGS also scales H up, for directions not seen yet: the first step goes along the gradient, where
# curvature is large. With the first few pairs at most by 1 / 0.3 each, then by a few percent, until
# there are twice as many as parameters.
_EARLY, _BOLDEST, _LATER = 8, 0.3, 0.93
# Updates that are gathered before the matrix is written. Each is of rank two.
_GATHERED = 16
# Rows of the matrix that are written at once.
_STRIP = 256
# The scale is kept within these; beyond, it goes into the matrix.
_LEAST, _MOST = 2.0**-40, 2.0**40


class Scaling(NamedTuple):
    """The parameters of one update; see `InverseBroyden`."""

    tau: float
    phi: float


class InverseBroyden(LinearOperator):
    """`H`, a dense symmetric matrix that learns from pairs of steps `s` and differences `y`.

    With `v = sqrt(y'Hy) (s / y's - Hy / y'Hy)`, a pair turns `H` into

        (H - Hy y'H / y'Hy + phi v v') / tau + s s' / y's

    so that `H y = s`. The updates differ in `tau` and `phi`. `"dfp"` has 1 and 0. The self-scaled
    ones shrink the eigenvalues of the Hessian's approximation where they are too large: `"ssbfgs"`
    has `phi = 1` and `tau = min(1, y's / s'H^-1 s)`, and `"ssbroyden"` adapts both (Al-Baali 1998).
    `"bfgs"` has `phi = 1`. Its `tau` makes `H` larger where no pair has been yet: with pairs two to
    eight it is `min(1, y'Hy / y's)`, at least 0.3, then that of `"ssbfgs"`, at least 0.93, and 1
    after `2 n` pairs. The first pair gives `H` its scale, with all of them.

    An update is of rank two. It is kept as two vectors, and sixteen updates together are written
    into the matrix, so that learning a pair costs little more than the product `H y`.

    References:
        M. Al-Baali 1998, "Numerical experience with a class of self-scaling quasi-Newton
        algorithms", JOTA 96; J. F. Urbán, P. Stefanou, J. A. Pons 2025, "Unveiling the optimization
        process of physics informed neural networks", J. Comput. Phys. 523.

    Args:
        size: `n`. The matrix takes `n^2` numbers.
        dtype: Of the matrix and the vectors.
        device: Of the matrix and the vectors.
        update: `"bfgs"`, `"ssbfgs"`, `"ssbroyden"` or `"dfp"`.

    Attributes:
        count: Pairs learned.
        tau: Of the last update.
        phi: Of the last update.
        ratio: `s'H^-1 s / s'y` of the last pair, with the `H` before it, if it is known; 1 after
            the first pair. On a parabola the line along `-H g` has its minimum at this multiple.

    Raises:
        TooLarge: The matrix does not fit into memory.
        ValueError: `size` is no positive integer, or `update` is unknown.

    >>> H = InverseBroyden(2, torch.float64)
    >>> s, y = torch.eye(2).double(), torch.tensor([[4.0, 0.0], [0.0, 2.0]]).double()
    >>> H.push(s[0], y[0]), H.push(s[1], y[1])
    (True, True)
    >>> [round(x, 6) for x in (H @ y[1]).tolist()]
    [0.0, 1.0]
    """

    def __init__(
        self,
        size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        *,
        update: BroydenUpdate = "bfgs",
    ) -> None:
        check_integer("size", size)
        check_choice("update", update, BroydenUpdate)
        self.size = size
        self.dtype = dtype
        self.device = device or torch.device("cpu")
        self.update = update
        self._matrix: Tensor | None = None  # B
        self.reset()

    def reset(self) -> None:
        """Forgets all pairs: `H` is the identity. The memory of the matrix is kept."""
        self.count = 0
        self.tau = self.phi = self.ratio = 1.0
        self._scale = 1.0  # omega
        self._gathered = 0  # updates that are not in B yet

    def push(
        self,
        s: Tensor,
        y: Tensor,
        *,
        expected: float | None = None,
        of_y: Tensor | None = None,
        initial: float | None = None,
    ) -> bool:
        """Learns from a pair.

        Args:
            s: The step, shape `(n,)`.
            y: The difference of the gradients, shape `(n,)`.
            expected: `s'H^-1 s`, if it is known. Without it, an update that needs it (not DFP, nor
                BFGS after `2 n` pairs) solves a system with `H`, in `n^3` operations.
            of_y: `H y`, if it is known.
            initial: For the first pair: the `H` that the step was made with, as a multiple of the
                identity.

        Returns:
            True if the pair was learned. False if `y's` or `y'Hy` is not positive and finite; then
            nothing has changed.
        """
        if not self.count:
            # What stays of H outside of s and Hy has the scale s'y / y'y, whatever it is now.
            of_y = y if initial is None else y * initial
        elif of_y is None:
            of_y = self.matvec(y)
        s_y, y_h_y = self.space.to_host(sums=(s @ y, y @ of_y))
        if not (0 < s_y < inf and 0 < y_h_y < inf):
            return False
        if expected is None and needs_expected(self.update, self.count, self.size):
            expected = self._expected(s)
        tau, phi = update_parameters(self.update, self.count, self.size, s_y, y_h_y, expected)
        if not self.count:
            self._begin(1.0 if initial is None else initial)
        else:
            self.ratio = 1.0 if expected is None else expected / s_y
            if self._gathered == _GATHERED:
                self._write()
        self._enter(s, of_y, s_y, y_h_y, tau, phi)
        return True

    def matvec(self, v: Tensor) -> Tensor:
        """See `LinearOperator.matvec`."""
        return self._multiply(v, 1.0)

    def matmat(self, V: Tensor) -> Tensor:
        """See `LinearOperator.matmat`."""
        if not self.count:
            return V.clone()
        assert self._matrix is not None
        weighted = self._signs[:, None] * (self._rows @ V)
        return self._scale * torch.addmm(self._rows.T @ weighted, self._matrix, V)

    def direction(self, grad: Tensor) -> Tensor:
        """The quasi-Newton direction `-H grad`, shape `(n,)`."""
        return self._multiply(grad, -1.0)

    def columns(self, index: Tensor) -> Tensor:
        """Some columns of `H`, shape `(n, k)`; of the identity before the first pair.

        Args:
            index: Their numbers, shape `(k,)`.
        """
        if not self.count:
            return torch.eye(self.size, dtype=self.dtype, device=self.device)[:, index]
        assert self._matrix is not None
        weighted = self._signs[:, None] * self._rows[:, index]
        return torch.addmm(self._matrix[:, index], self._rows.T, weighted).mul_(self._scale)

    def advance(self, product: Tensor, v: Tensor) -> Tensor:
        """`H v` from what it was before the last pair, without a pass over the matrix.

        Args:
            product: `H v` with the `H` before, shape `(n,)`; it is overwritten.
            v: Shape `(n,)`.
        """
        newest = slice(2 * self._gathered - 2, 2 * self._gathered)
        rows = self._rows[newest]
        weights = torch.mv(rows, v).mul_(self._signs[newest])
        return product.addmv_(rows.T, weights, beta=1 / self.tau, alpha=self._scale)

    def _multiply(self, v: Tensor, sign: float) -> Tensor:
        if not self.count:
            return sign * v
        assert self._matrix is not None
        scale = sign * self._scale
        weights = torch.mv(self._rows, v).mul_(self._signs)
        product = torch.mv(self._matrix, v)
        return product.addmv_(self._rows.T, weights, beta=scale, alpha=scale)

    def _begin(self, scale: float) -> None:
        """Makes `H` a multiple of the identity, in memory of its own."""
        n = self.size
        if self._matrix is None:
            self.check_fits()
            self._matrix = torch.zeros(n, n, dtype=self.dtype, device=self.device)
            self._rows = torch.zeros(2 * _GATHERED, n, dtype=self.dtype, device=self.device)
            self._signs = torch.zeros(2 * _GATHERED, dtype=self.dtype, device=self.device)
        else:
            self._matrix.zero_()
            self._signs.zero_()
        self._matrix.fill_diagonal_(1.0)
        self._scale = scale
        self._gathered = 0

    def check_fits(self) -> None:
        """Raises `TooLarge` if there is no room for the matrix."""
        if self._matrix is None:
            check_fits(
                "the inverse Hessian",
                (self.size, self.size),
                self.dtype,
                self.device,
                "use LBFGS, which keeps a few vectors instead",
            )

    def _enter(
        self, s: Tensor, of_y: Tensor, s_y: float, y_h_y: float, tau: float, phi: float
    ) -> None:
        """Adds an update, as two vectors `w` that stand for plus or minus `w w'`."""
        self.tau, self.phi = tau, phi
        self._scale /= tau
        if not _LEAST <= self._scale <= _MOST:
            self._absorb_scale()
        # H is scale (B + sum of +-w w'), and the update a quadratic form in s and Hy.
        of_s = (1.0 + phi * (y_h_y / s_y) / tau) / s_y
        mixed = -phi / (tau * s_y)
        of_h_y = (phi - 1.0) / (tau * y_h_y)
        # It is diagonal in one of the two, and what is left of the other.
        if abs(of_s * s_y) >= abs(of_h_y * y_h_y):
            first, second, pivot, rest = s, of_y, of_s, of_h_y - mixed * mixed / of_s
        else:
            first, second, pivot, rest = of_y, s, of_h_y, of_s - mixed * mixed / of_h_y
        at = 2 * self._gathered
        length = sqrt(abs(pivot) / self._scale)
        row = torch.mul(first, length, out=self._rows[at])
        row.add_(second, alpha=length * mixed / pivot)
        torch.mul(second, sqrt(abs(rest) / self._scale), out=self._rows[at + 1])
        self._signs[at] = 1.0 if pivot > 0 else -1.0
        self._signs[at + 1] = 1.0 if rest > 0 else -1.0
        self._gathered += 1
        self.count += 1

    def _write(self) -> None:
        """Writes the gathered updates into the matrix, and keeps it symmetric to the last bit.

        An update is made from `H y`, so it takes symmetric errors into account and is blind to
        others: these would grow with each scaling up, until `H` is indefinite. Only the lower
        triangle is computed, by strips, and mirrored.
        """
        assert self._matrix is not None
        signed = self._signs[:, None] * self._rows
        for start in range(0, self.size, _STRIP):
            stop = min(start + _STRIP, self.size)
            strip = self._matrix[start:stop, :stop]
            strip.addmm_(self._rows[:, start:stop].T, signed[:, :stop])
            square = strip[:, start:]
            square.copy_((square + square.T).mul_(0.5))
            # Two copies that run along rows, and between them a transposition of dense memory.
            self._matrix[:start, start:stop] = strip[:, :start].contiguous().T.contiguous()
        self._signs.zero_()
        self._gathered = 0

    def _absorb_scale(self) -> None:
        """Takes the scale into the matrix."""
        assert self._matrix is not None
        self._matrix.mul_(self._scale)
        self._rows.mul_(sqrt(self._scale))
        self._scale = 1.0

    def _expected(self, s: Tensor) -> float:
        if not self.count:
            return float(s @ s)
        dense = self.matmat(torch.eye(self.size, dtype=self.dtype, device=self.device))
        return float(s @ torch.linalg.solve(dense, s))

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and numbers: a copy, for the matrix is overwritten in place."""
        state: dict[str, Any] = {name: getattr(self, name) for name in _NUMBERS}
        if self.count:
            assert self._matrix is not None
            state |= {
                "matrix": self._matrix.clone(),
                "rows": self._rows.clone(),
                "signs": self._signs.clone(),
            }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a state, bit for bit; the tensors move to this operator's device.

        Raises:
            TooLarge: The matrix does not fit into memory.
            ValueError: The state is of vectors of another length; nothing has changed.
        """
        if state["size"] != self.size:
            raise ValueError(
                f"this inverse Hessian is of vectors of length {state['size']}, not {self.size}"
            )
        if state["count"]:
            self.check_fits()
        for name in _NUMBERS:
            setattr(self, name, state[name])
        if self.count:
            for name in ("matrix", "rows", "signs"):
                setattr(self, f"_{name}", state[name].to(self.device, self.dtype, copy=True))


_NUMBERS = ("size", "count", "tau", "phi", "ratio", "_scale", "_gathered")


def needs_expected(update: BroydenUpdate, count: int, n: int) -> bool:
    """True if an update depends on `s'H^-1 s`, after `count` pairs."""
    return update in SELF_SCALED or (update == "bfgs" and _EARLY <= count < 2 * n)


def update_parameters(
    update: BroydenUpdate,
    count: int,
    n: int,
    s_y: float,
    y_h_y: float,
    expected: float | None,
) -> Scaling:
    """The parameters of an update.

    Args:
        update: Its name.
        count: Pairs learned before.
        n: The length of the vectors.
        s_y: `y's`.
        y_h_y: `y'Hy`.
        expected: `s'H^-1 s`, if the update needs it.
    """
    first, h = not count, y_h_y / s_y
    if update == "dfp":
        return Scaling(h if first else 1.0, 0.0)
    if update == "bfgs" and not needs_expected(update, count, n):
        tau = h if first else max(_BOLDEST, min(1.0, h)) if count < _EARLY else 1.0
        return Scaling(tau, 1.0)
    assert expected is not None
    b = expected / s_y
    if update != "ssbroyden" or not (0 < b < inf and b * h < inf):
        tau = h if first else min(1.0, 1 / b) if b > 0 else 1.0
        return Scaling(max(_LATER, tau) if update == "bfgs" else tau, 1.0)
    a = max(b * h - 1.0, 0.0)  # zero only if s and Hy are parallel, when theta does not count
    # h (1 - c) with c = sqrt(a / (1 + a)), without the cancellation where a is large.
    rho = min(1.0, h / ((1.0 + a) * (1.0 + sqrt(a / (1.0 + a)))))
    lowest = (rho - 1.0) / a if a else 0.0
    theta = max(lowest, min(1.0 / rho, (1.0 - b) / b))
    sigma = 1.0 + a * theta  # at least rho, but where rounding cancels it
    if sigma < 0.5 * rho:
        sigma = rho
    phi = (1.0 - theta) / sigma
    if first:
        return Scaling(h / sigma, phi)
    power = abs(sigma) ** (1.0 / (1.0 - n)) if n > 1 else 1.0
    least = min(1.0, 1.0 / b)
    if theta <= 0:
        return Scaling(min(least * power, sigma), phi)
    return Scaling(least * min(power, 1.0 / theta), phi)
