"""Recurrent layers run where they have second derivatives, and nothing else leaves cuDNN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.oracles import dense_hessian
from torch_secondorder import AdaHessian, NewtonCG
from torch_secondorder._autograd.twice_differentiable import twice_differentiable
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder.func import hessian_diagonal, hvp, jacobian, vhp
from torch_secondorder.penalties import contractive_penalty, jacobian_penalty

LAYERS = [nn.RNN, nn.LSTM, nn.GRU]


class Spied:
    """Notes at each call of a recurrent layer whether cuDNN would have been taken."""

    def __init__(self, kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[bool] = []
        original = kind.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.seen.append(torch.backends.cudnn.enabled)
            return original(*args, **kwargs)

        monkeypatch.setattr(kind, "forward", forward)
        self.forward = forward
        self.layer = kind(3, 4)

    def __call__(self) -> list[bool]:
        self.seen.clear()
        self.layer(torch.randn(2, 1, 3))
        return list(self.seen)


@pytest.mark.parametrize("kind", LAYERS)
def test_recurrent_layers_leave_cudnn(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spied, cudnn = Spied(kind, monkeypatch), torch.backends.cudnn
    monkeypatch.setattr(cudnn, "benchmark", True)
    others = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32
    assert spied() == [True]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with twice_differentiable():
        assert spied() == [True]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with twice_differentiable():
        assert cudnn.enabled  # for convolutions
        assert spied() == [False] and cudnn.enabled
        with twice_differentiable():
            assert spied() == [False]
        assert spied() == [False]
        with pytest.raises(RuntimeError):
            spied.layer(torch.randn(2, 1, 7))
        assert cudnn.enabled
    assert kind.forward is spied.forward and spied() == [True]
    assert others == (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32)
    monkeypatch.setattr(cudnn, "enabled", False)
    with twice_differentiable():
        assert spied() == [False]
    assert not cudnn.enabled


class Reader(nn.Module):
    """A recurrent layer, read out at its last position."""

    def __init__(self, kind: type[nn.Module], **more: Any) -> None:
        super().__init__()
        self.cells = kind(3, 4, **more)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0][-1])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("layers", [1, 2])
def test_products_of_recurrent_layers(kind: Any, layers: int, device: torch.device) -> None:
    model = Reader(kind, num_layers=layers).to(device, torch.float64)
    names = [name for name, _ in model.named_parameters()]
    params = list(model.parameters())
    x = torch.randn(4, 5, 3, dtype=torch.float64, device=device)
    y = torch.randn(5, 2, dtype=torch.float64, device=device)

    def of(*values: Tensor) -> Tensor:
        named = dict(zip(names, values, strict=True))
        return F.mse_loss(torch.func.functional_call(model, named, (x,)), y)

    hessian = dense_hessian(of, params)
    v = torch.randn(len(hessian), dtype=torch.float64, device=device)

    def closure() -> Tensor:
        model.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    evaluation = ClosureObjective(closure, params).evaluate(curvature=True)
    product = evaluation.linearization.hessian_product(v)
    torch.testing.assert_close(product, hessian @ v, rtol=1e-9, atol=1e-11)
    # Both ways in which optimizers look at a closure.
    for optimizer in (AdaHessian(params), NewtonCG(params, curvature="hessian")):
        optimizer.step(closure)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of PyTorch's cells on a device
def test_functions_of_recurrent_layers(device: torch.device) -> None:
    model = Reader(nn.GRU).to(device, torch.float64).requires_grad_(False)
    x = torch.randn(3, 2, 3, dtype=torch.float64, device=device)

    def f(x: Tensor) -> Tensor:
        return model(x).square().sum()

    hessian = dense_hessian(f, [x])
    v = torch.randn_like(x)
    expected = (hessian @ v.flatten()).view_as(x)
    torch.testing.assert_close(vhp(f, x, v), expected)
    if device.type == "cuda":
        with pytest.raises(NotImplementedError, match="vhp"):  # PyTorch's own cells are fused there
            hvp(f, x, v)
    else:
        torch.testing.assert_close(hvp(f, x, v), expected)
    torch.testing.assert_close(hessian_diagonal(f, x).flatten(), hessian.diagonal())
    leaf = x.clone().requires_grad_()
    whole = jacobian(model, leaf)
    (again,) = torch.autograd.grad(whole.square().sum(), leaf)
    assert again.any()
    (gradient,) = torch.autograd.grad(f(leaf), leaf)
    torch.testing.assert_close(jacobian(f, x), gradient)


def test_penalties_of_recurrent_layers(device: torch.device) -> None:
    cells = nn.GRU(3, 4, batch_first=True).to(device, torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64, device=device)

    def encode(x: Tensor) -> Tensor:
        return cells(x)[0][:, -1]

    for penalty in (jacobian_penalty, contractive_penalty):
        penalty(encode, x).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in cells.parameters())


def test_functions_with_attention(device: torch.device) -> None:
    q = torch.randn(1, 1, 3, 2, dtype=torch.float64, device=device)

    def f(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q).square().sum()

    hessian = dense_hessian(f, [q])
    v = torch.randn_like(q)
    expected = (hessian @ v.flatten()).view_as(q)
    torch.testing.assert_close(vhp(f, q, v), expected)
    torch.testing.assert_close(hvp(f, q, v), expected)
    jacobian_penalty(lambda q: F.scaled_dot_product_attention(q, q, q).flatten(1), q)
