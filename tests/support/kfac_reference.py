"""K-FAC written down layer by layer, with hooks on modules, and explicit sums over samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder.curvature._output_space import LossCurvature, OutputSpace
from torch_secondorder.curvature._samples import Samples
from torch_secondorder.curvature.gauss_newton import random_roots


class Small(nn.Module):
    """Tokens through every kind of layer: one convolution, one layer twice, one without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 5)
        self.conv = nn.Conv2d(1, 3, (2, 3), stride=(1, 2), padding=(1, 0), dilation=(2, 1))
        self.norm = nn.LayerNorm(24)
        self.first = nn.Linear(24, 4)
        self.again = nn.Linear(4, 4)
        self.last = nn.Linear(4, 3, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).unsqueeze(1)
        x = torch.tanh(self.first(self.norm(F.softplus(self.conv(x)).flatten(1))))
        return self.last(torch.tanh(self.again(torch.tanh(self.again(x)))))


class Problem:
    """A model, data, and the loss; two made alike are equal and independent."""

    def __init__(self, dtype: torch.dtype = torch.float64, device: str | torch.device = "cpu"):
        torch.manual_seed(3)
        self.model = Small().to(device, dtype)
        self.tokens = torch.randint(6, (3, 40, 4)).to(device)
        self.y = torch.randint(3, (3, 40)).to(device)
        self.turn = 0

    def loss(self) -> Tensor:
        """That of one of three batches in turn, see `turn`."""
        return F.cross_entropy(self.model(self.tokens[self.turn % 3]), self.y[self.turn % 3])

    def closure(self, optimizer: Any) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        return closure


Recorded = dict[nn.Module, list[tuple[Tensor, Tensor]]]


def recorded(
    model: nn.Module,
    loss: Callable[[], Tensor],
    generator: torch.Generator,
    labels: str = "sampled",
) -> tuple[Recorded, dict[nn.Parameter, Tensor]]:
    """For each call of a layer inputs and gradients `J'q` by results; `J'q` by all parameters.

    The root `q` is the very one that the package draws from a generator in the same state.
    """
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    handles = [
        layer.register_forward_hook(lambda m, args, out: calls.append((m, args[0].detach(), out)))
        for layer in layers
    ]
    params = list(model.parameters())
    evaluation = ClosureObjective(loss, params).evaluate(curvature=True)
    for handle in handles:
        handle.remove()
    space = OutputSpace(evaluation.linearization.graph)
    curvature = LossCurvature(space)
    samples = partial(Samples, space, curvature.coefficients)
    known = curvature.likelihoods if labels == "sampled" else [None] * len(space.tensors)
    (roots,) = random_roots(space, known, samples, 1, generator)
    found = torch.autograd.grad(
        space.tensors, [out for *_, out in calls] + params, roots, allow_unused=True
    )
    result: Recorded = {layer: [] for layer in layers}
    for (layer, x, _), d in zip(calls, found, strict=False):
        result[layer].append((x, d))
    return result, dict(zip(params, found[len(calls) :], strict=True))


def rows_of(layer: nn.Module, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs with a one for the bias, and gradients, both `(samples, places, ...)`."""
    if isinstance(layer, nn.Conv2d):
        x = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT
        d = d.flatten(2).mT
    else:
        x, d = x.unsqueeze(1), d.unsqueeze(1)
    if layer.bias is not None:
        x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
    return x, d


class PlainKFAC:
    """Martens and Grosse 2015, or George et al. 2018; one group."""

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        momentum: float = 0.9,
        damping: float = 1e-3,
        weight_decay: float = 0.0,
        kl_clip: float | None = 1e-3,
        ekfac: bool = False,
        factor_decay: float = 0.95,
        update_period: int = 10,
        basis_period: int = 100,
        max_precond_dim: int | None = 1024,
        labels: str = "sampled",
        seed: int = 0,
        maximize: bool = False,
    ) -> None:
        self.model = model
        self.lr, self.momentum, self.damping, self.decay = lr, momentum, damping, weight_decay
        self.kl_clip, self.ekfac, self.factor_decay = kl_clip, ekfac, factor_decay
        self.update_period, self.basis_period = update_period, basis_period
        self.longest = math.inf if max_precond_dim is None else max_precond_dim
        self.labels = labels
        self.sign = -1.0 if maximize else 1.0
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = self.estimates = 0
        self.last_basis = -1
        self.layers: dict[nn.Module, dict[str, Any]] = {}
        self.diagonal: dict[nn.Parameter, Tensor] = {}
        self.buffers: dict[nn.Parameter, Tensor] = {}

    def step(self, loss: Callable[[], Tensor]) -> None:
        if self.steps % self.update_period == 0 or self.steps < min(10, self.update_period):
            found, pulled = recorded(self.model, loss, self.generator, self.labels)
            self.learn(found, pulled)
        params = list(self.model.parameters())
        gradients = dict(zip(params, torch.autograd.grad(loss(), params), strict=True))
        directions: dict[nn.Parameter, Tensor] = {}
        for layer, state in self.layers.items():
            weight, bias = layer.weight, layer.bias
            g = gradients[weight].flatten(1)
            if bias is not None:
                g = torch.cat([g, gradients[bias][:, None]], dim=1)
            d = self.solved(state, g)
            if bias is not None:
                directions[bias] = d[:, -1]
                d = d[:, :-1]
            directions[weight] = d.reshape(weight.shape)
        for p, h in self.diagonal.items():
            directions[p] = gradients[p] / (h + self.damping)
        scale = 1.0
        if self.kl_clip is not None:
            total = sum(float((directions[p] * gradients[p]).sum()) for p in params)
            scale = min(1.0, (self.kl_clip / total) ** 0.5)
        with torch.no_grad():
            for p in params:
                before = self.buffers.get(p, torch.zeros_like(p))
                self.buffers[p] = self.momentum * before + scale * directions[p]
                p.mul_(1 - self.lr * self.decay).sub_(self.sign * self.lr * self.buffers[p])
        self.steps += 1

    def learn(self, found: Recorded, pulled: dict[nn.Parameter, Tensor]) -> None:
        self.estimates += 1
        w = max(1 - self.factor_decay, 1 / self.estimates)
        gap = min(self.basis_period, max(self.last_basis, 1))
        due = self.steps - self.last_basis >= gap
        if due:
            self.last_basis = self.steps
        inside = set()
        for layer, calls in found.items():
            inside |= set(layer.parameters())
            rows = [rows_of(layer, *call) for call in calls]
            count = sum(x.shape[0] * x.shape[1] for x, _ in rows)
            R = sum(torch.einsum("nti,ntj->ij", x, x) for x, _ in rows) / count
            L = sum(torch.einsum("nti,ntj->ij", d, d) for _, d in rows)
            fresh = layer not in self.layers
            state = self.layers.setdefault(layer, {"L": L, "R": R, "E": None})
            state["whole"] = (
                layer.weight.shape[0] <= self.longest,
                layer.weight[0].numel() + 1 <= self.longest,
            )
            if not fresh:
                state["E"] = state["E"] + w * (self.moments(state, rows) - state["E"])
            for name, new in (("L", L), ("R", R)):
                state[name] = state[name] + w * (new - state[name])
            if due or fresh:
                self.renew(state, fresh)
        for p, j in pulled.items():
            if p not in inside:
                h = (j**2 + (j**2).mean()) / 2
                self.diagonal[p] = self.diagonal.get(p, h) + w * (h - self.diagonal.get(p, h))

    def rotates(self, state: dict[str, Any]) -> bool:
        return self.ekfac or not all(state["whole"])

    def moments(self, state: dict[str, Any], rows: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        total = torch.zeros(len(state["L"]), len(state["R"])).to(state["L"])
        if self.rotates(state):
            for x, d in rows:
                for xs, ds in zip(x, d, strict=True):
                    total += (state["U"].T @ (ds.T @ xs) @ state["V"]) ** 2
        return total

    def renew(self, state: dict[str, Any], fresh: bool) -> None:
        if self.rotates(state):
            bases, values = [], []
            for name, whole in zip("LR", state["whole"], strict=True):
                matrix = state[name]
                e, U = torch.linalg.eigh(matrix) if whole else (matrix.diagonal(), _eye(matrix))
                bases.append(U)
                values.append(e.clamp(min=0))
            U, V = bases
            if fresh:
                state["E"] = torch.outer(*values)
            else:
                state["E"] = ((state["U"].T @ U) ** 2).T @ state["E"] @ ((state["V"].T @ V) ** 2)
            state["U"], state["V"] = U, V
            return
        L, R = state["L"], state["R"]
        pi = (R.diagonal().mean() / L.diagonal().mean()).sqrt()
        root = self.damping**0.5
        state["E"] = torch.zeros(())
        state["inverses"] = (
            torch.linalg.inv(L + root / pi * _eye(L)),
            torch.linalg.inv(R + root * pi * _eye(R)),
        )

    def solved(self, state: dict[str, Any], g: Tensor) -> Tensor:
        if self.rotates(state):
            U, V = state["U"], state["V"]
            return U @ ((U.T @ g @ V) / (state["E"] + self.damping)) @ V.T
        left, right = state["inverses"]
        return left @ g @ right


def _eye(matrix: Tensor) -> Tensor:
    return torch.eye(len(matrix)).to(matrix)
