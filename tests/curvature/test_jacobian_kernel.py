"""Kernels `JJ'` without the Jacobian: tensors that a sample uses several times, with biases."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from torch_secondorder import ClosureObjective, mark_outputs
from torch_secondorder.curvature import ResidualJacobian, _jacobian_kernel
from torch_secondorder.curvature.residual_jacobian import ResidualJacobian as Jacobian

WIDTH = 24


def layers(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for wide, following in pairwise(widths):
        parts += [nn.Linear(wide, following, dtype=torch.float64), nn.Tanh()]
    return nn.Sequential(*parts[:-1])


def slopes(net: nn.Module, points: Tensor) -> Tensor:
    points = points.clone().requires_grad_()
    (slope,) = torch.autograd.grad(net(points).sum(), points, create_graph=True)
    return slope


def pinn(net: nn.Module) -> Tensor:
    """Derivatives, values and differences: each block uses a layer a number of times of its own."""
    inside, start, ends = (torch.rand(n, 2, dtype=torch.float64) for n in (11, 5, 3))
    equation = slopes(net, inside).sum(1) * net(inside)[:, 0]
    residuals = [equation, net(start) - 1.0, net(ends) - net(ends + 1.0)]
    return torch.stack([mark_outputs(r).square().mean() for r in residuals]).sum()


def outputs(net: nn.Module) -> Tensor:
    """Two outputs for each sample, which are residuals of their own."""
    inputs = torch.rand(13, 2, dtype=torch.float64)
    return nn.functional.mse_loss(net(inputs) + net(2.0 * inputs), inputs)


def classes(net: nn.Module) -> Tensor:
    """Three classes: two channels."""
    inputs = torch.rand(13, 2, dtype=torch.float64)
    logits = net(inputs) - net(2.0 * inputs)
    return nn.functional.cross_entropy(logits, torch.arange(13) % 3)


def two_classes(net: nn.Module) -> Tensor:
    """Two classes: one channel."""
    inputs = torch.rand(13, 2, dtype=torch.float64)
    return nn.functional.cross_entropy(net(inputs), torch.arange(13) % 2)


LOSSES: dict[str, tuple[Callable[[nn.Module], Tensor], int]] = {
    "pinn": (pinn, 1),
    "outputs": (outputs, 2),
    "classes": (classes, 3),
    "two_classes": (two_classes, 2),
}


def jacobian(name: str) -> tuple[Jacobian, nn.Module]:
    loss_of, count = LOSSES[name]
    net = layers(2, WIDTH, WIDTH, count)

    def closure() -> Tensor:
        net.zero_grad()
        torch.manual_seed(1)
        loss = loss_of(net)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    evaluation = ClosureObjective(closure, net.parameters()).evaluate(curvature=True)
    J = ResidualJacobian(evaluation)
    assert J.method == "graph", J.reason
    return J, net


def weights_of(kind: str, net: nn.Module) -> Tensor | None:
    """None, a weight for each parameter, of any sign, or one for each entry."""
    torch.manual_seed(2)
    if kind == "none":
        return None
    counts = [p.numel() for p in net.parameters()]
    if kind == "entries":
        return torch.randn(sum(counts), dtype=torch.float64)
    drawn = torch.randn(len(counts), dtype=torch.float64)
    return drawn.repeat_interleave(torch.tensor(counts))


@pytest.mark.parametrize("tile", [4, 256])
@pytest.mark.parametrize("kind", ["none", "tensors", "entries"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_kernel_is_the_product_of_the_jacobian(
    name: str, kind: str, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_jacobian_kernel, "_TILE", tile)
    monkeypatch.setattr(_jacobian_kernel, "_ENTRYWISE", 0)
    J, net = jacobian(name)
    weights = weights_of(kind, net)
    found = J.kernel(weights)
    D = J.dense()
    expected = D @ D.T if weights is None else (D * weights) @ D.T
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("name", ["pinn", "outputs", "classes"])
def test_no_matrix_as_wide_as_a_layer_is_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_jacobian_kernel, "_ENTRYWISE", 0)
    widest = 0
    original = _jacobian_kernel.matmul_transposed

    def watched(a: Tensor, b: Tensor) -> Tensor:
        nonlocal widest
        widest = max(widest, a.shape[1])
        return original(a, b)

    monkeypatch.setattr(_jacobian_kernel, "matmul_transposed", watched)
    J, _ = jacobian(name)
    J.kernel()
    assert WIDTH <= widest < WIDTH * WIDTH
