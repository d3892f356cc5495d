"""The updates of AdaHessian and Sophia, written down parameter by parameter, and a net for them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.closures import standard
from tests.support.oracles import flat
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder.curvature._output_space import LossCurvature, OutputSpace
from torch_secondorder.curvature._random import draw
from torch_secondorder.curvature._samples import Samples
from torch_secondorder.curvature.gauss_newton import random_roots

CPU = torch.device("cpu")


class Mixed(nn.Module):
    """A classifier of token sequences with every kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.conv = nn.Conv2d(1, 2, 2, bias=False)  # batch normalization would take it away
        self.batchnorm = nn.BatchNorm2d(2)
        self.layernorm = nn.LayerNorm(18)
        self.linear = nn.Linear(18, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        image = self.embedding(tokens).unsqueeze(1)
        x = F.softplus(self.batchnorm(self.conv(image))).flatten(1)
        return self.linear(self.layernorm(x))


class Task:
    """A model, data, and the loss; two made alike are equal and independent."""

    def __init__(self, device: torch.device = CPU, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(11)
        self.model = Mixed().to(device, dtype)
        self.tokens = torch.randint(6, (8, 4)).to(device)
        self.y = torch.randint(3, (8,)).to(device)

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.tokens), self.y)

    def groups(self, *more: dict[str, Any]) -> list[dict[str, Any]]:
        """Three groups with hyperparameters of their own."""
        layers = [
            [self.model.conv, self.model.layernorm],
            [self.model.embedding, self.model.linear],
            [self.model.batchnorm],
        ]
        own = (*more, {}, {}, {})
        return [
            {"params": [p for layer in some for p in layer.parameters()], **options}
            for some, options in zip(layers, own, strict=False)
        ]


def real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


class Reference(ABC):
    """A diagonal optimizer as its paper has it.

    Attributes:
        warm_up: How many steps at the beginning all estimate, but no more than a period.

    Args:
        groups: Parameters and all hyperparameters.
        period: Steps from one estimate to the next.
        samples: Products for one estimate.
        seed: Of the probes.
        maximize: Whether to maximize.
    """

    warm_up = 1

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        period: int = 1,
        samples: int = 1,
        seed: int = 0,
        maximize: bool = False,
    ) -> None:
        self.groups = [{**group, "params": list(group["params"])} for group in groups]
        self.period, self.samples = period, samples
        self.sign = -1.0 if maximize else 1.0
        self.state: dict[Tensor, dict[str, Any]] = {}
        self.steps = 0
        self.known: list[Tensor] | None = None
        self.overdue = 0
        self.generator = torch.Generator(self.groups[0]["params"][0].device).manual_seed(seed)

    @property
    def params(self) -> list[Tensor]:
        return [p for group in self.groups for p in group["params"] if p.requires_grad]

    def step(self, loss: Callable[[], Tensor], factor: float = 1.0) -> None:
        """One step; the gradient and the diagonal count `factor` times."""
        params = self.params
        new = self.known is not None and not {*map(id, params)} <= {*map(id, self.known)}
        self.first = self.steps == 0 or new or self.overdue > 0
        warming_up = self.steps < min(self.period, self.warm_up)
        due = self.first or warming_up or self.steps % self.period == 0
        self.steps += 1
        self.known = params
        waits = serves = False
        value = loss()
        gradients = torch.autograd.grad(value, params, create_graph=due, allow_unused=True)
        diagonals = self.estimate(params, gradients, loss) if due else [None] * len(params)
        with torch.no_grad():
            for p, g, h in zip(params, gradients, diagonals, strict=True):
                if g is None:
                    continue
                state = self.state.setdefault(p, self.begin(p))
                if h is not None:
                    serves |= state["s"] == 0 and self.overdue > 0
                    state["s"] += 1
                    self.bend(self.group_of(p), state, self.sign * factor * h, p)
                if state["s"] == 0:  # waits for its first curvature
                    waits = True
                    continue
                state["t"] += 1
                g = self.sign * factor * real(g.detach()).to(state["m"].dtype)
                beta1 = self.group_of(p)["betas"][0]
                state["m"] = beta1 * state["m"] + (1 - beta1) * g
                if real(p).dtype == state["theta"].dtype:  # else what is held there is finer
                    state["theta"] = real(p).clone()
                state["theta"] = self.moved(self.group_of(p), state, state["theta"])
                real(p).copy_(state["theta"])
        self.overdue = max(self.overdue - 1, 0)
        if new or serves:
            self.overdue = min(self.period, self.warm_up) - 1
        if waits:
            self.overdue = self.period

    def begin(self, p: Tensor) -> dict[str, Any]:
        wide = real(p.detach()).to(torch.promote_types(real(p).dtype, torch.float32), copy=True)
        return {
            "t": 0,
            "s": 0,
            "m": torch.zeros_like(wide),
            "v": torch.zeros_like(wide),
            "theta": wide,
        }

    def group_of(self, p: Tensor) -> dict[str, Any]:
        return next(g for g in self.groups if any(p is q for q in g["params"]))

    def estimate(
        self, params: Sequence[Tensor], gradients: Sequence[Tensor | None], _: Any
    ) -> list[Tensor | None]:
        """Hutchinson's, with one flat vector of signs cut up for all parameters."""
        counts = [real(p).numel() for p in params]
        work = torch.float32
        for p in params:
            work = torch.promote_types(work, real(p).dtype)
        vectors = [
            draw(sum(counts), "rademacher", self.generator, dtype=work, device=p.device)
            for _ in range(self.samples)
        ]
        total: list[Tensor | None] = [None] * len(params)
        for vector in vectors:
            pieces = [
                piece.view_as(real(p)).to(real(p).dtype)
                for piece, p in zip(vector.split(counts), params, strict=True)
            ]
            slopes = [
                (real(g) * z).sum()
                for g, z in zip(gradients, pieces, strict=True)
                if g is not None and g.requires_grad
            ]
            products: Sequence[Tensor | None] = [None] * len(params)
            if slopes:
                slope = sum(s.to(work) for s in slopes)
                products = torch.autograd.grad(slope, params, retain_graph=True, allow_unused=True)
            for i, (p, z, product) in enumerate(zip(params, pieces, products, strict=True)):
                hz = torch.zeros_like(real(p.detach())) if product is None else real(product)
                part = (z * hz).to(torch.promote_types(hz.dtype, torch.float32)) / self.samples
                total[i] = part if total[i] is None else total[i] + part
        return total

    @abstractmethod
    def bend(self, group: dict[str, Any], state: dict[str, Any], h: Tensor, p: Tensor) -> None:
        """Takes in an estimate."""

    @abstractmethod
    def moved(self, group: dict[str, Any], state: dict[str, Any], theta: Tensor) -> Tensor:
        """The parameter after the step."""


class PlainAdaHessian(Reference):
    """Yao et al. 2021, algorithm 1."""

    warm_up = 10

    def bend(self, group: dict[str, Any], state: dict[str, Any], h: Tensor, p: Tensor) -> None:
        magnitudes = h.abs().clone()
        block = group["average_block"]
        if block is not None and p.dim() > 2:
            for i in range(p.shape[0]):
                for j in range(p.shape[1]):
                    magnitudes[i, j] = magnitudes[i, j].mean()
        elif isinstance(block, int):
            flat = magnitudes.reshape(-1)
            for start in range(0, len(flat), block):
                flat[start : start + block] = flat[start : start + block].mean()
            magnitudes = flat.view_as(h)
        beta2 = group["betas"][1]
        state["v"] = beta2 * state["v"] + (1 - beta2) * magnitudes**2

    def moved(self, group: dict[str, Any], state: dict[str, Any], theta: Tensor) -> Tensor:
        beta1, beta2 = group["betas"]
        m = state["m"] / (1 - beta1 ** state["t"])
        v = state["v"] / (1 - beta2 ** state["s"])
        direction = m / (v.sqrt() ** group["hessian_power"] + group["eps"])
        rate = float(group["lr"])
        return theta - rate * (direction + group["weight_decay"] * theta)


class PlainSophia(Reference):
    """Liu et al. 2023, algorithm 3."""

    def bend(self, group: dict[str, Any], state: dict[str, Any], h: Tensor, p: Tensor) -> None:
        beta2 = group["betas"][1]
        state["v"] = beta2 * state["v"] + (1 - beta2) * h

    def moved(self, group: dict[str, Any], state: dict[str, Any], theta: Tensor) -> Tensor:
        rate = float(group["lr"])
        theta = theta - rate * group["weight_decay"] * theta
        floor = torch.full_like(state["v"], group["eps"])
        ratio = state["m"] / torch.maximum(group["gamma"] * state["v"], floor)
        return theta - rate * ratio.clamp(-1, 1)

    def unclipped(self) -> float:
        """The share of entries whose update is not clipped."""
        inside = total = 0
        for group in self.groups:
            for p in group["params"]:
                state = self.state[p]
                for m, h in zip(state["m"].flatten(), state["v"].flatten(), strict=True):
                    inside += bool(abs(m) < max(group["gamma"] * h, group["eps"]))
                    total += 1
        return inside / total


class PlainSophiaG(PlainSophia):
    """With the squares of `J'q`, for the very roots `q` that the package draws."""

    def estimate(
        self,
        params: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        loss: Callable[[], Tensor],
    ) -> list[Tensor | None]:
        total = [torch.zeros_like(p.detach()) for p in params]
        for _ in range(self.samples):
            pulled = gradient_for_drawn_labels(params, loss, self.generator)
            total = [t + j**2 / self.samples for t, j in zip(total, pulled, strict=True)]
        return [self.sign * t for t in total]  # squares know no direction


def gradient_for_drawn_labels(
    params: Sequence[Tensor], loss: Callable[[], Tensor], generator: torch.Generator
) -> Sequence[Tensor]:
    """`J'q`, for the very root `q` that the package draws."""
    evaluation = ClosureObjective(loss, params).evaluate(curvature=True)
    space = OutputSpace(evaluation.linearization.graph)
    curvature = LossCurvature(space)
    samples = partial(Samples, space, curvature.coefficients)
    (roots,) = random_roots(space, curvature.likelihoods, samples, 1, generator)
    return torch.autograd.grad(space.tensors, params, roots)


class PlainAdaHessianG(PlainAdaHessian):
    """The same estimates in the place of Hutchinson's."""

    def estimate(
        self,
        params: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        loss: Callable[[], Tensor],
    ) -> list[Tensor | None]:
        """The norms of the rows of the mean of `(J'q)(J'q)'`, which is written out."""
        samples = max(10, self.samples) if self.first else self.samples
        matrix = torch.zeros(())
        for _ in range(samples):
            root = flat(gradient_for_drawn_labels(params, loss, self.generator))
            matrix = matrix + root.outer(root) / samples
        norms = torch.linalg.vector_norm(matrix, dim=1)
        pieces = norms.split([p.numel() for p in params])
        return [piece.view_as(p) for p, piece in zip(params, pieces, strict=True)]


def values(model: nn.Module | Sequence[Tensor]) -> list[Tensor]:
    params = model.parameters() if isinstance(model, nn.Module) else model
    return [p.detach().clone() for p in params]


def assert_same(
    ours: nn.Module | Sequence[Tensor],
    expected: nn.Module | Sequence[Tensor],
    tolerance: float = 1e-12,
) -> None:
    first, second = values(ours), values(expected)
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_moved(ours: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """The test is about something: every tensor has changed."""
    assert all((flat([a]) != flat([b])).any() for a, b in zip(ours, before, strict=True))


#: What the constructors take, and what the groups of a reference must have.
DEFAULTS: dict[type[Reference], dict[str, Any]] = {
    PlainAdaHessian: {
        "lr": 0.15,
        "betas": (0.9, 0.999),
        "eps": 1e-4,
        "weight_decay": 0.0,
        "hessian_power": 1.0,
        "average_block": "spatial",
    },
    PlainSophia: {
        "lr": 1e-3,
        "betas": (0.96, 0.99),
        "gamma": 0.01,
        "eps": 1e-12,
        "weight_decay": 0.0,
    },
}
DEFAULTS[PlainAdaHessianG] = DEFAULTS[PlainAdaHessian]
DEFAULTS[PlainSophiaG] = {**DEFAULTS[PlainSophia], "gamma": 0.05}

_OF_ALL = {
    "update_period": "period",
    "n_samples": "samples",
    "seed": "seed",
    "maximize": "maximize",
}


def plain(
    kind: type[Reference], groups: Sequence[dict[str, Any]], options: dict[str, Any]
) -> Reference:
    """The reference for an optimizer's arguments."""
    own = {name: value for name, value in options.items() if name in DEFAULTS[kind]}
    others = {_OF_ALL[name]: value for name, value in options.items() if name in _OF_ALL}
    return kind([{**DEFAULTS[kind], **own, **group} for group in groups], **others)


def assert_trajectories_agree(
    make: Callable[..., Any],
    kind: type[Reference],
    options: dict[str, Any],
    *more: dict[str, Any],
    device: torch.device = CPU,
    steps: int = 50,
    tolerance: float = 1e-12,
) -> Any:
    """Trains on `Task` with the package and with a reference; returns the optimizer.

    Args:
        make: The optimizer's constructor.
        kind: The reference.
        options: The optimizer's arguments.
        more: Those of each group.
        device: Where.
        steps: How many.
        tolerance: Relative and absolute.
    """
    ours, theirs = Task(device), Task(device)
    before = values(ours.model)
    optimizer = make(ours.groups(*more), **options)
    reference = plain(kind, theirs.groups(*more), options)
    for step in range(steps):
        optimizer.step(standard(optimizer, ours.loss))
        reference.step(theirs.loss)
        if step % 10 in (0, 9):
            assert_same(ours.model, theirs.model, tolerance)
    assert_moved(values(ours.model), before)
    return optimizer, reference
