"""Updates of the self-scaled Broyden family as textbooks write them."""

from __future__ import annotations

import torch
from torch import Tensor


def textbook_scaling(update: str, count: int, n: int, h: float, b: float) -> tuple[float, float]:
    """tau and theta, after Al-Baali 1998 and Urbán, Stefanou, Pons 2025, with `phi` of `theta`."""
    if update == "bfgs":
        if count < 8:
            return (max(0.3, min(1.0, h)) if count else h), 0.0
        return (max(0.93, min(1.0, 1 / b)) if count < 2 * n else 1.0), 0.0
    if update == "dfp":
        return (h if count == 0 else 1.0), 1.0
    if update == "ssbfgs":
        return (h if count == 0 else min(1.0, 1 / b)), 0.0
    a = b * h - 1
    c = (a / (1 + a)) ** 0.5
    rho_minus = min(1.0, h * (1 - c))
    theta_minus, theta_plus = (rho_minus - 1) / a, 1 / rho_minus
    theta = max(theta_minus, min(theta_plus, (1 - b) / b))
    sigma = 1 + theta * a
    if count == 0:
        return h / sigma, theta
    rho_plus, q = min(1.0, 1 / b), abs(sigma) ** (1 / (1 - n))
    if theta <= 0:
        return min(rho_plus * q, sigma), theta
    return rho_plus * min(q, 1 / theta), theta


def textbook(
    H: Tensor, s: Tensor, y: Tensor, update: str, count: int, *, scaled: bool = True
) -> Tensor:
    """One update, with outer products; the first pair finds the identity."""
    n, s_y, h_y = len(s), s @ y, H @ y
    y_h_y = y @ h_y
    b, h = float(s @ torch.linalg.solve(H, s) / s_y), float(y_h_y / s_y)
    tau, theta = textbook_scaling(update, count, n, h, b)
    phi = (1 - theta) / (1 + theta * (b * h - 1))
    v = y_h_y.sqrt() * (s / s_y - h_y / y_h_y)
    kept = H - torch.outer(h_y, h_y) / y_h_y + phi * torch.outer(v, v)
    return kept / tau + torch.outer(s, s) / s_y
