"""NewtonCG does not depend on the units of the loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.closures import closure_of
from torch_secondorder import NewtonCG
from torch_secondorder.solvers import Martens

KINDS: dict[str, dict[str, Any]] = {
    "damping": {},
    "trust region": {"curvature": "hessian"},
    "line search": {"curvature": "hessian", "globalization": "line_search"},
    "gauss-newton, line search": {"globalization": "line_search"},
    "gauss-newton, trust region": {"globalization": "trust_region"},
    "minres": {"solver": "minres"},
    "kfac": {"preconditioner": "kfac"},
    "kfac, trust region": {"preconditioner": "kfac", "globalization": "trust_region"},
    "nystrom": {"preconditioner": "nystrom"},
    "nystrom, trust region": {"preconditioner": "nystrom", "curvature": "hessian"},
    "martens": {"preconditioner": Martens(0.75, 1)},
    "martens, trust region": {"preconditioner": "martens", "globalization": "trust_region"},
}
# What is made of roots has other digits where the factor has no root among powers of two.
ROOTS = ("kfac", "nystrom", "martens")


def fitted(
    factor: float,
    steps: int,
    dtype: torch.dtype,
    device: torch.device,
    target: float = 1.0,
    **arguments: Any,
) -> tuple[list[float], Tensor, NewtonCG]:
    """Losses of the unscaled problem and the weights, after some steps on the scaled one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 3, generator=generator, dtype=torch.float64).to(device, dtype)
    y = target * torch.randn(48, 2, generator=generator, dtype=torch.float64).to(device, dtype)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double().to(device, dtype)
    with torch.no_grad():
        net[2].weight.mul_(target)
        net[2].bias.mul_(target)
    optimizer = NewtonCG(net.parameters(), **arguments)
    losses = []
    closure = closure_of(lambda: factor * F.mse_loss(net(x), y), *net.parameters())
    for _ in range(steps):
        optimizer.step(closure)
        with torch.no_grad():
            losses.append(F.mse_loss(net(x), y).item() / target**2)
    return losses, torch.cat([p.detach().flatten() for p in net.parameters()]), optimizer


@pytest.mark.parametrize("exponent", [-60, -33, -8, 7, 60])
@pytest.mark.parametrize("kind", KINDS)
def test_a_power_of_two_changes_no_digit(kind: str, exponent: int, device: torch.device) -> None:
    exponent = 8 * math.ceil(exponent / 8) if kind.startswith(ROOTS) else exponent
    runs = [fitted(f, 6, torch.float64, device, **KINDS[kind]) for f in (1.0, 2.0**exponent)]
    (losses, weights, _), (scaled_losses, scaled_weights, _) = runs
    assert torch.equal(weights, scaled_weights) and losses == scaled_losses
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1e-8, 1e3, 1e20, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_any_factor_gives_the_same_fall(
    kind: str, dtype: torch.dtype, factor: float, device: torch.device
) -> None:
    # Few iterations: conjugate gradients enlarge rounding errors with each.
    arguments = {"max_cg_iter": 5} | KINDS[kind]
    losses, _, _ = fitted(1.0, 5, dtype, device, **arguments)
    scaled, _, _ = fitted(factor, 5, dtype, device, **arguments)
    rel = 1e-8 if dtype == torch.float64 else 5e-3
    assert scaled == pytest.approx(losses, rel=rel)
    assert losses[-1] < 0.9 * losses[0]
