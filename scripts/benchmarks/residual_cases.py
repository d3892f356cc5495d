"""Networks with residuals whose Jacobians are compared, each as a closure and as pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacfwd, jacrev, vmap

from torch_secondorder import mark_outputs

from .networks import chain
from .quasi_newton_pinn import SPEED

Net = Callable[[Tensor], Tensor]
Parameters = Mapping[str, Tensor]
DTYPE = torch.float64


def _network(net: Net, x: Tensor) -> Tensor:
    return net(x)


def _network_once(net: Net, x: Tensor) -> Tensor:
    return net(x[None])[0]


@dataclass(frozen=True)
class Term:
    """Residuals of one kind, one row for each sample.

    Attributes:
        inputs: The samples.
        targets: Subtracted from what the network gives, `(samples, channels)`.
        values: Gives the residuals of all samples, before that, by the operators of autograd.
        once: The same for one sample, as a pure function.
    """

    inputs: Tensor
    targets: Tensor
    values: Callable[[Net, Tensor], Tensor] = _network
    once: Callable[[Net, Tensor], Tensor] = _network_once

    @property
    def scale(self) -> float:
        """The factor that makes `|r|^2 / 2` of a mean of squares."""
        return math.sqrt(2.0 / self.targets.numel())


@dataclass(frozen=True)
class Case:
    """A network and the sum of the mean squares of its residuals.

    Attributes:
        name: Name in the tables.
        model: The network.
        terms: The kinds of residuals.
    """

    name: str
    model: nn.Module
    terms: tuple[Term, ...]

    @property
    def params(self) -> list[nn.Parameter]:
        """The parameters, which are all trainable."""
        return list(self.model.parameters())

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(p.numel() for p in self.params)

    @property
    def rows(self) -> int:
        """The number of residuals."""
        return sum(term.targets.numel() for term in self.terms)

    def residuals(self) -> list[Tensor]:
        """The residuals with their graph, unscaled."""
        return [term.values(self.model, term.inputs) - term.targets for term in self.terms]

    def closure(self) -> Tensor:
        """The loss with its backward pass, as for any optimizer."""
        for p in self.params:
            p.grad = None
        loss = torch.stack([mark_outputs(r).square().mean() for r in self.residuals()]).sum()
        loss.backward()
        return loss

    def gradient(self) -> None:
        """The same without marks: the unit of cost."""
        for p in self.params:
            p.grad = None
        torch.stack([r.square().mean() for r in self.residuals()]).sum().backward()

    def detached(self) -> dict[str, Tensor]:
        """The parameters as arguments of pure functions."""
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def sample(self, term: Term, parameters: Parameters, x: Tensor) -> Tensor:
        """The scaled residuals of one sample, as a pure function, less a constant."""

        def net(points: Tensor) -> Tensor:
            result: Tensor = functional_call(self.model, dict(parameters), (points,))
            return result

        return term.scale * term.once(net, x)

    def every(self, parameters: Parameters, limits: Mapping[int, int] | None = None) -> Tensor:
        """All scaled residuals, as a pure function, less a constant: shape `(N,)`.

        Args:
            parameters: The parameters by name.
            limits: Numbers of samples by term; all by default.
        """
        found = []
        for place, term in enumerate(self.terms):
            x = term.inputs if limits is None else term.inputs[: limits[place]]
            found.append(vmap(partial(self.sample, term, parameters))(x).reshape(-1))
        return torch.cat(found)

    def columns(self, jacobian: Mapping[str, Tensor]) -> Tensor:
        """The Jacobian as a matrix with `n` columns."""
        parts = (jacobian[name].reshape(-1, p.numel()) for name, p in self.model.named_parameters())
        return torch.cat(list(parts), dim=1)


def laplacian(net: Net, points: Tensor) -> Tensor:
    """The sum of the second derivatives by the input, shape `(n, 1)`."""
    points = points.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(points).sum(), points, create_graph=True)
    total = torch.zeros_like(points[:, :1])
    for i in range(points.shape[1]):
        (second,) = torch.autograd.grad(gradient[:, i].sum(), points, create_graph=True)
        total = total + second[:, i : i + 1]
    return total


def laplacian_once(net: Net, point: Tensor) -> Tensor:
    """The same at one point, by a forward pass over a backward pass."""

    def value(x: Tensor) -> Tensor:
        return net(x[None])[0, 0]

    result: Tensor = jacfwd(jacrev(value))(point).diagonal().sum()[None]
    return result


def transport(net: Net, points: Tensor) -> Tensor:
    """`u_t + 30 u_x`, shape `(n, 1)`."""
    points = points.clone().requires_grad_()
    (slope,) = torch.autograd.grad(net(points).sum(), points, create_graph=True)
    result: Tensor = slope[:, 1:] + SPEED * slope[:, :1]
    return result


def transport_once(net: Net, point: Tensor) -> Tensor:
    """The same at one point."""
    slope = jacrev(lambda x: net(x[None])[0, 0])(point)
    result: Tensor = slope[1:] + SPEED * slope[:1]
    return result


def difference(net: Net, points: Tensor) -> Tensor:
    """The difference at both ends of a period; points of shape `(n, 2)` are on the left one."""
    shift = points.new_tensor([2.0 * math.pi, 0.0])
    return net(points) - net(points + shift)


def difference_once(net: Net, point: Tensor) -> Tensor:
    """The same at one point."""
    return difference(net, point[None])[0]


def _random(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.rand(*shape, dtype=dtype)


def poisson(device: torch.device, inside: int = 900, edge: int = 120) -> Case:
    """The Laplacian and boundary values of a network 2-64-1."""
    torch.manual_seed(0)
    model = chain([2, 64, 1], nn.Tanh).to(device, DTYPE)
    at, on = _random(inside, 2).to(device), _random(edge, 2).to(device)
    terms = (
        Term(at, at.prod(1, keepdim=True), laplacian, laplacian_once),
        Term(on, torch.zeros_like(on[:, :1])),
    )
    return Case("PINN 2-64-1, Laplacian", model, terms)


def convection(
    device: torch.device, width: int = 50, sizes: tuple[int, int, int] = (2000, 256, 100)
) -> Case:
    """The convection equation, its start and its period, for a network 2-50-50-50-1."""
    torch.manual_seed(0)
    model = chain([2, width, width, width, 1], nn.Tanh).to(device, DTYPE)
    inside, start, ends = (_random(size, 2).to(device) for size in sizes)
    start, ends = start * start.new_tensor([6.0, 0.0]), ends * ends.new_tensor([0.0, 1.0])
    zeros = torch.zeros_like(inside[:, :1])
    terms = (
        Term(inside, zeros, transport, transport_once),
        Term(start, start[:, :1].sin()),
        Term(ends, torch.zeros_like(ends[:, :1]), difference, difference_once),
    )
    return Case(f"PINN 2-{width}-{width}-{width}-1, convection", model, terms)


def cnn(device: torch.device, batch: int = 64) -> Case:
    """Two convolutions and a linear layer with ten outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 9, 10),
    ).to(device, DTYPE)
    images, targets = _random(batch, 1, 12, 12).to(device), _random(batch, 10).to(device)
    return Case("CNN 8-16, ten outputs", model, (Term(images, targets),))


class Attention(nn.Module):
    """A block of a transformer: attention with two heads, two linear layers, norms."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mixed, self.joined = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner = nn.Sequential(
            nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps shape `(batch, length, width)` to the same."""
        batch, length, width = x.shape
        parts = self.mixed(self.norms[0](x)).view(batch, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind()
        scores = query @ key.transpose(-1, -2) / math.sqrt(width // self.heads)
        attended = scores.softmax(-1) @ value
        x = x + self.joined(attended.transpose(1, 2).reshape(batch, length, width))
        result: Tensor = x + self.inner(self.norms[1](x))
        return result


class Transformer(nn.Module):
    """Two blocks over short sequences of numbers, and one output."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(1, width)
        self.position = nn.Parameter(0.1 * torch.randn(length, width))
        self.blocks = nn.Sequential(Attention(width), Attention(width))
        self.output = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps shape `(batch, length)` to `(batch, 1)`."""
        hidden = self.blocks(self.embedding(x[..., None]) + self.position)
        result: Tensor = self.output(hidden.mean(1))
        return result


def transformer(device: torch.device, batch: int = 256, width: int = 16) -> Case:
    """A small transformer that predicts a number from eight others."""
    torch.manual_seed(0)
    model = Transformer(width, 8).to(device, DTYPE)
    sequences, targets = _random(batch, 8).to(device), _random(batch, 1).to(device)
    return Case(f"transformer, width {width}", model, (Term(sequences, targets),))


class Decay(nn.Module):
    """`a exp(-b x) + c`."""

    def __init__(self, start: tuple[float, float, float] = (1.0, 1.0, 0.0)) -> None:
        super().__init__()
        self.curve = nn.Parameter(torch.tensor(start, dtype=DTYPE))

    def forward(self, x: Tensor) -> Tensor:
        """Maps shape `(n, 1)` to the same."""
        a, b, c = self.curve.unbind()
        return a * torch.exp(-b * x) + c


def curve(device: torch.device, points: int = 250) -> Case:
    """A decay with three parameters, measured with noise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(0.0, 4.0, points, dtype=DTYPE)[:, None]
    noise = torch.randn(points, 1, generator=generator, dtype=DTYPE)
    targets = 2.5 * torch.exp(-1.3 * x) + 0.5 + 0.05 * noise
    term = Term(x.to(device), targets.to(device))
    return Case("curve fit, three parameters", Decay().to(device), (term,))


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The cases of the comparison, from the bars' first."""
    small: Any = {"inside": 60, "edge": 20} if quick else {}
    deep: Any = {"width": 8, "sizes": (50, 20, 10)} if quick else {}
    return [
        poisson(device, **small),
        convection(device, **deep),
        cnn(device, **({"batch": 4} if quick else {})),
        transformer(device, **({"batch": 16, "width": 8} if quick else {})),
        curve(device),
    ]
