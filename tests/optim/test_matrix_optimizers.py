"""Optimizers that see whole parameters by shape, and estimate no curvature: the seat for them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_secondorder.optim.extending import DiagonalOptimizer, Factors, Moment, declare


def inverse_root(factor: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(factor)
    return (vectors * values.clamp(min=1e-12) ** -power) @ vectors.T


class Shampoo(DiagonalOptimizer):
    """Matrices divided by the fourth roots of `sum G G'` and `sum G' G`, with momentum."""

    _estimates = False
    _state_fields = declare(factor=Factors(scale=1e-4), second=Moment())

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.9, **more: Any) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, **more})

    def _update(self, block: Any, inputs: Any) -> None:
        direction = inputs.gradient.clone()
        for state, piece in block.members(direction):
            matrix = piece.clone()
            for dim, size in enumerate(piece.shape):
                rows = matrix.movedim(dim, 0).reshape(size, -1)
                factor = state[f"factor_{dim}"].add_(rows @ rows.T)
                root = inverse_root(factor, 0.5 / piece.dim())
                piece.copy_(torch.tensordot(root, piece, ([1], [dim])).movedim(0, dim))
        block.moments["second"].mul_(block.group["beta"]).add_(direction)
        block.move(inputs.lr, block.moments["second"].clone())


class Reference:
    """The same, parameter by parameter, without the package."""

    def __init__(self, params: list[Tensor], lr: float = 0.1, beta: float = 0.9) -> None:
        self.params, self.lr, self.beta = params, lr, beta
        self.factors = [[1e-4 * torch.eye(n, dtype=p.dtype) for n in p.shape] for p in params]
        self.moments = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self) -> None:
        for p, factors, moment in zip(self.params, self.factors, self.moments, strict=True):
            direction = p.grad
            for dim, factor in enumerate(factors):
                rows = p.grad.movedim(dim, 0).flatten(1) if p.dim() > 1 else p.grad[:, None]
                factor += rows @ rows.T
                root = inverse_root(factor, 0.5 / p.dim())
                direction = torch.tensordot(root, direction, ([1], [dim])).movedim(0, dim)
            moment.mul_(self.beta).add_(direction)
            p -= self.lr * moment


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten(), nn.Tanh(), nn.Linear(12, 2)).double()


X, Y = torch.randn(8, 1, 3, 3, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)


def closure_of(net: nn.Module, optimizer: Any) -> Any:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(X), Y)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("with_closure", [True, False])
def test_steps_are_those_of_the_plain_algorithm(with_closure: bool) -> None:
    net, other = model(), model()
    optimizer, expected = Shampoo(net.parameters()), Reference(list(other.parameters()))
    closure = closure_of(net, optimizer)
    for _ in range(6):
        if with_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        other.zero_grad()
        nn.functional.mse_loss(other(X), Y).backward()
        expected.step()
        assert not optimizer.curvature_due
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)
    info = optimizer.info
    assert (info.status.name, info.products, info.iterations) == ("MOVED", 0, 1)
    assert "exp_hessian" not in optimizer.state[next(net.parameters())]


@pytest.mark.parametrize("way", ["checkpoint", "copy"])
def test_checkpoints_and_copies_go_on_bit_for_bit(way: str) -> None:
    net = model()
    optimizer = Shampoo(net.parameters())
    for _ in range(3):
        optimizer.step(closure_of(net, optimizer))
    if way == "copy":
        resumed_net, resumed = copy.deepcopy((net, optimizer))
    else:
        resumed_net = model()
        resumed = Shampoo(resumed_net.parameters())
        resumed_net.load_state_dict(net.state_dict())
        resumed.load_state_dict(optimizer.state_dict())
    for _ in range(3):
        optimizer.step(closure_of(net, optimizer))
        resumed.step(closure_of(resumed_net, resumed))
    for p, q in zip(net.parameters(), resumed_net.parameters(), strict=True):
        assert torch.equal(p, q)


def test_groups_have_hyperparameters_of_their_own() -> None:
    net = model()
    first, last = net[0], net[3]
    optimizer = Shampoo([{"params": first.parameters(), "lr": 0.0}, {"params": last.parameters()}])
    before = copy.deepcopy(net.state_dict())
    optimizer.step(closure_of(net, optimizer))
    assert torch.equal(first.weight, before["0.weight"])
    assert not torch.equal(last.weight, before["3.weight"])


def test_a_gradient_that_is_not_finite_leaves_everything() -> None:
    net = model()
    optimizer = Shampoo(net.parameters())
    optimizer.step(closure_of(net, optimizer))
    before = copy.deepcopy(optimizer.state_dict()["state"][0])
    for p in net.parameters():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    after = optimizer.state_dict()["state"][0]
    assert optimizer.info.status.name == "NONFINITE_START"
    assert all(torch.equal(before[name], after[name]) for name in ("factor_0", "second", "step"))


def test_on_a_device_that_is_not_waited_for() -> None:
    net, other = model(), model()
    optimizer = Shampoo(net.parameters(), capturable=True)
    expected = Shampoo(other.parameters())
    for _ in range(4):
        optimizer.step(closure_of(net, optimizer))
        expected.step(closure_of(other, expected))
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
