"""Dense references that the package is held to, and models to hold it to them on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Real numbers of all tensors, complex ones as pairs."""
    parts = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    return torch.cat([p.reshape(-1) for p in parts])


def dense_hessian(function: Callable[..., Tensor], params: Sequence[Tensor]) -> Tensor:
    """The Hessian over the flat real vector of all parameters, row by row through autograd."""
    reals = [
        (torch.view_as_real(p.detach()) if p.is_complex() else p.detach()).clone() for p in params
    ]
    sizes = [r.numel() for r in reals]

    def of_vector(vector: Tensor) -> Tensor:
        pieces = [piece.view(r.shape) for piece, r in zip(vector.split(sizes), reals, strict=True)]
        return function(
            *(
                torch.view_as_complex(q) if p.is_complex() else q
                for p, q in zip(params, pieces, strict=True)
            )
        )

    with sdpa_kernel(SDPBackend.MATH):  # the only attention with a second derivative
        return torch.autograd.functional.hessian(of_vector, flat(reals))


class SelfAttention(nn.Module):
    """One attention layer on `scaled_dot_product_attention`, mean over positions, linear head."""

    def __init__(self, width: int = 8, heads: int = 2, classes: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            t.view(batch, length, self.heads, -1).transpose(1, 2)
            for t in self.qkv(x).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.head(mixed.mean(1))


class LastState(nn.Module):
    """An RNN read out at its last position."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


@dataclass
class Case:
    """A model with data and loss, ready to be evaluated."""

    model: nn.Module
    x: Tensor
    y: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]

    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def value(self) -> Tensor:
        return self.loss(self.model(self.x), self.y)

    def closure(self) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            self.model.zero_grad()
            loss = self.value()
            loss.backward()
            return loss

        return closure

    def pure(self) -> Callable[..., Tensor]:
        """The loss as a function of the parameters, one argument each."""
        names = [name for name, _ in self.model.named_parameters()]

        def function(*params: Tensor) -> Tensor:
            named = dict(zip(names, params, strict=True))
            return self.loss(functional_call(self.model, named, (self.x,)), self.y)

        return function


def make_case(name: str, device: torch.device, dtype: torch.dtype = torch.float64) -> Case:
    """A small case by name; see `CASES`."""
    torch.manual_seed(3)
    model, x, loss = CASES[name]()
    classes = torch.randint(3, (len(x),))
    y = torch.randn(len(x), 3).to(dtype) if loss is F.mse_loss else classes
    return Case(model.to(device, dtype), x.to(device, dtype), y.to(device), loss)


CASES: dict[str, Callable[[], tuple[Any, Tensor, Any]]] = {
    "mlp": lambda: (
        nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)),
        torch.randn(7, 4),
        F.cross_entropy,
    ),
    "cnn": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.Softplus(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)
        ),
        torch.randn(5, 1, 6, 6),
        F.cross_entropy,
    ),
    "batchnorm": lambda: (
        nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Sigmoid(), nn.Linear(5, 3)),
        torch.randn(8, 4),
        F.mse_loss,
    ),
    "attention": lambda: (SelfAttention(), torch.randn(4, 5, 8), F.cross_entropy),
    "rnn": lambda: (LastState(), torch.randn(4, 6, 4), F.mse_loss),
}
