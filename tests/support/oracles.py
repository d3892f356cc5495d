"""Dense references that the package is held to, and models to hold it to them on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_secondorder import Evaluation
from torch_secondorder.curvature import LinearOperator


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Real numbers of all tensors, complex ones as pairs."""
    parts = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    return torch.cat([p.reshape(-1) for p in parts])


def dense_hessian(function: Callable[..., Tensor], params: Sequence[Tensor]) -> Tensor:
    """The Hessian over the flat real vector of all parameters, row by row through autograd."""
    # The only attention, and the only recurrent layers, with a second derivative.
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        return torch.autograd.functional.hessian(_of_vector(function, params), _reals(params))


def dense_gauss_newton(
    outputs: Callable[..., Sequence[Tensor]],
    loss: Callable[..., Tensor],
    params: Sequence[Tensor],
) -> Tensor:
    """`J'B J`, with `J` of `outputs(*params)` and `B` of `loss(*outputs)`, both dense."""

    def flat_outputs(*params: Tensor) -> Tensor:
        return flat(outputs(*params))

    jacobian = dense_jacobian(flat_outputs, params)
    z = [t.detach() for t in outputs(*params)]
    return jacobian.T @ dense_hessian(loss, z) @ jacobian


def dense_jacobian(function: Callable[..., Tensor], params: Sequence[Tensor]) -> Tensor:
    """The Jacobian of a vector over the flat real vector of all parameters."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.jacobian(_of_vector(function, params), _reals(params))


def rows_of(evaluation: Evaluation) -> Tensor:
    """The Jacobian of all outputs from a backward pass for each entry."""
    assert evaluation.linearization is not None
    graph, rows = evaluation.linearization.graph, []
    for output in graph.outputs:
        for entry in output.tensor.reshape(-1):
            found = torch.autograd.grad(
                entry, graph.params, retain_graph=True, materialize_grads=True
            )
            rows.append(torch.cat([part.reshape(-1) for part in found]))
    return torch.stack(rows)


def _reals(params: Sequence[Tensor]) -> Tensor:
    return flat([p.detach() for p in params]).clone()


def _of_vector(
    function: Callable[..., Tensor], params: Sequence[Tensor]
) -> Callable[[Tensor], Tensor]:
    """The function of tensors as one of their flat real vector."""
    shapes = [torch.view_as_real(p).shape if p.is_complex() else p.shape for p in params]

    def of_vector(vector: Tensor) -> Tensor:
        pieces = vector.split([shape.numel() for shape in shapes])
        reals = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        return function(
            *(
                torch.view_as_complex(q) if p.is_complex() else q
                for p, q in zip(params, reals, strict=True)
            )
        )

    return of_vector


def assert_matrix(operator: LinearOperator, expected: Tensor) -> None:
    """Both kinds of products are those of a dense matrix, to ten digits of its size."""
    eye = torch.eye(operator.size, dtype=expected.dtype, device=expected.device)
    one_by_one = torch.stack([operator @ e for e in eye], dim=1)
    atol = 1e-10 * float(expected.abs().max())
    torch.testing.assert_close(one_by_one, expected, rtol=1e-10, atol=atol)
    torch.testing.assert_close(operator @ eye, expected, rtol=1e-10, atol=atol)


def theta_on(device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.randn(6, dtype=torch.float64, device=device))


def outputs_of(theta: Tensor, *shape: int) -> Tensor:
    """Outputs of any shape from six parameters."""
    generator = torch.Generator().manual_seed(len(shape))
    count = torch.Size(shape).numel()
    weight = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return (2 * torch.tanh(weight.to(theta.device) @ theta)).view(shape)


def labels(z: Tensor) -> Tensor:
    classes = z.shape[0] if z.dim() == 1 else z.shape[1]
    shape = z.shape[:1] + z.shape[2:] if z.dim() > 1 else ()
    return (torch.arange(torch.Size(shape).numel(), device=z.device) % classes).view(shape)


def numbers(like: Tensor, low: float = 0.1, high: float = 1.0) -> Tensor:
    """Spread between two bounds, in no order."""
    t = torch.linspace(0, 50, like.numel(), dtype=like.dtype, device=like.device).sin()
    return (low + (high - low) * (t + 1) / 2).view_as(like)


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


class Residual(nn.Module):
    """The residual of a differential equation: inner derivatives of a network by its input."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        u = self.net(x)
        slopes = [torch.autograd.grad(c.sum(), x, create_graph=True)[0] for c in u.unbind(1)]
        return torch.cat(slopes, dim=1) + u**2


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
    "pinn": lambda: (Residual(), torch.randn(6, 1), F.mse_loss),
}


@cache
def compiles_gradients() -> bool:
    """Whether this torch compiles functions that call `torch.autograd.grad`; 2.11 does not."""

    def slope(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(x.sin().sum(), x, create_graph=True)[0].detach()

    with warnings.catch_warnings(), torch._dynamo.config.patch(trace_autograd_ops=True):
        warnings.simplefilter("ignore")
        try:
            torch.compile(slope, fullgraph=True, backend="eager")(torch.ones(2))
        except torch._dynamo.exc.TorchDynamoException:
            return False
    return True
