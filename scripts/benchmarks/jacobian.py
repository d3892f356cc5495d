"""The Jacobian of a small network by its input: ours, other known methods, and a closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian as functional_jacobian
from torch.func import jacrev, vmap

from .harness import Timing, alternate, load_ours, ratio
from .registry import Options, command
from .report import Report, Table, seconds

Array = Any
Calls = dict[str, Callable[[], Any]]

WIDTHS = (500, 100, 10)
BATCH = 256
WORST = 1e-6  # relative error to the closed form in float64, in the norm


STEP = 1e-4  # of central differences in float64


@dataclass(frozen=True)
class Network:
    """A classifier with one hidden layer.

    Attributes:
        function: Maps `(..., 500)` to `(..., 10)`; its parameters are constants.
        weights: Weights and biases in float64, for the closed form.
    """

    function: nn.Module
    weights: tuple[Array, ...]

    @classmethod
    def make(cls, device: torch.device) -> Network:
        """A random network, the same at each call."""
        torch.manual_seed(0)
        inputs, hidden, outputs = WIDTHS
        net = nn.Sequential(
            nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs), nn.Softmax(-1)
        ).requires_grad_(False)
        weights = tuple(p.double().numpy() for p in net.parameters())
        return cls(net.to(device), weights)


def closed_form(weights: tuple[Array, ...], x: Array) -> Array:
    """The Jacobian `(diag p - p p') W2 diag(a > 0) W1`, for one input `(500,)`."""
    w1, b1, w2, b2 = weights
    a = w1 @ x + b1
    z = w2 @ np.maximum(a, 0) + b2
    p = np.exp(z - z.max())
    p /= p.sum()
    inner = (w2 * (a > 0)) @ w1
    return p[:, None] * (inner - p @ inner)


def closed_form_of_batch(weights: tuple[Array, ...], x: Array) -> Array:
    """The same for a batch `(B, 500)`, with one large product at the end."""
    w1, b1, w2, b2 = weights
    a = x @ w1.T + b1
    z = np.maximum(a, 0) @ w2.T + b2
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    inner = w2 * (a > 0)[:, None]
    inner = p[:, :, None] * (inner - p[:, None] @ inner)
    return (inner.reshape(-1, len(b1)) @ w1).reshape(len(x), len(b2), -1)


def differences(weights: tuple[Array, ...], x: Array, *, central: bool = True) -> Array:
    """Finite differences in float64, column by column, in NumPy."""
    w1, b1, w2, b2 = weights

    def f(x: Array) -> Array:
        z = w2 @ np.maximum(w1 @ x + b1, 0) + b2
        p = np.exp(z - z.max())
        return p / p.sum()

    # A forward difference has its smallest error at a shorter step.
    h, here = (STEP, None) if central else (STEP / 100, f(x))
    columns = []
    for j in range(len(x)):
        e = np.zeros_like(x)
        e[j] = h
        columns.append((f(x + e) - (f(x - e) if central else here)) / (2 * h if central else h))
    return np.stack(columns, axis=1)


def batched(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Batched cotangents; the rows of a batch share them."""
    x = x.detach().requires_grad_()
    y = f(x)
    count = y.shape[-1]
    units = torch.eye(count, device=x.device)
    if x.dim() == 2:
        units = units.unsqueeze(1).expand(count, len(x), count)
    (found,) = torch.autograd.grad(y, x, units, is_grads_batched=True)
    return found if x.dim() == 1 else found.transpose(0, 1)


def replicated(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """One copy of the input for each output, so that one backward pass gives all rows.

    This is correct only for functions that handle rows independently.
    """
    with torch.no_grad():
        count = f(x[:1] if x.dim() == 2 else x).shape[-1]
    copies = x.detach().expand(count, *x.shape).reshape(-1, x.shape[-1]).requires_grad_()
    units = torch.eye(count, device=x.device).repeat_interleave(len(copies) // count, 0)
    (found,) = torch.autograd.grad(f(copies), copies, units)
    found = found.view(count, *x.shape)
    return found if x.dim() == 1 else found.transpose(0, 1)


def one_input(net: Network, x: Tensor) -> Calls:
    """All ways to the Jacobian of one input, shape `(10, 500)`."""
    f, array = net.function, x.cpu().numpy()
    weights = tuple(w.astype(np.float32) for w in net.weights)
    ours = load_ours("torch_secondorder.func", "jacobian")
    return {
        **({"ours": partial(ours, f, x)} if ours is not None else {}),
        "torch.func.jacrev": lambda: jacrev(f)(x),
        "autograd.functional": partial(functional_jacobian, f, x),
        "autograd.functional, vectorized": partial(functional_jacobian, f, x, vectorize=True),
        "is_grads_batched": partial(batched, f, x),
        "replicated": partial(replicated, f, x),
        "NumPy, closed form": partial(closed_form, weights, array),
        "NumPy, central differences": partial(differences, net.weights, array.astype(float)),
        "NumPy, forward differences": partial(
            differences, net.weights, array.astype(float), central=False
        ),
    }


def batch_of_inputs(net: Network, x: Tensor) -> Calls:
    """All methods for the Jacobians of a batch, shape `(B, 10, 500)`."""
    f, array = net.function, x.cpu().numpy()
    weights = tuple(w.astype(np.float32) for w in net.weights)
    ours = load_ours("torch_secondorder.func", "batch_jacobian")

    def of_sum(vectorize: bool) -> Tensor:  # rows are independent, so a sum over them suffices
        return functional_jacobian(lambda x: f(x).sum(0), x, vectorize=vectorize).transpose(0, 1)

    return {
        **({"ours": partial(ours, f, x)} if ours is not None else {}),
        "vmap(jacrev)": lambda: vmap(jacrev(f))(x),
        "autograd.functional": partial(of_sum, False),
        "autograd.functional, vectorized": partial(of_sum, True),
        "is_grads_batched": partial(batched, f, x),
        "replicated": partial(replicated, f, x),
        "NumPy, closed form": partial(closed_form_of_batch, weights, array),
    }


def errors(calls: Calls, exact: Array) -> dict[str, float]:
    """Relative errors; raises if one is too large."""
    found = {}
    for name, call in calls.items():
        value = torch.as_tensor(call()).detach().cpu().double().numpy()
        found[name] = float(np.linalg.norm(value - exact) / np.linalg.norm(exact))
        if not found[name] < WORST:
            raise AssertionError(f"{name}: relative error {found[name]:.1e} to the closed form")
    return found


def _note(report: Report, key: str, title: str, base: str, calls: Calls, measured: Any) -> None:
    timings, wrong = measured
    closed = "NumPy, closed form"
    table = Table(title, ["", "time", f"/ {base}", f"/ {closed}", "relative error"])
    result: dict[str, Any] = {}
    for name in calls:
        timing: Timing = timings[name]
        against, beside = ratio(timing, timings[base]), ratio(timing, timings[closed])
        table.add(name, seconds(timing.median), against, beside, f"{wrong[name]:.0e}")
        result[name] = timing.as_dict() | {"relative error": wrong[name]}
        result[f"{name}/{base}"] = against.as_dict()
        result[f"{name}/{closed}"] = beside.as_dict()
    report.record(key, result)
    report.show(table)


@command(
    "jacobian", "full Jacobians of a small network, compared with torch.func and a closed form"
)
def run(options: Options, report: Report) -> None:
    """Measures one input and a batch."""
    net = Network.make(options.device)
    batch = 32 if options.quick else BATCH
    x = torch.rand(batch, WIDTHS[0], generator=torch.Generator().manual_seed(1))
    exact = closed_form_of_batch(net.weights, x.double().numpy())
    rounds, x = 6 * options.repeat, x.to(options.device)
    shape = "-".join(map(str, WIDTHS))
    cases = (
        ("one", f"{shape}, one input", "torch.func.jacrev", one_input(net, x[0]), exact[0]),
        ("batch", f"{shape}, batch of {batch}", "vmap(jacrev)", batch_of_inputs(net, x), exact),
    )
    for key, title, base, calls, expected in cases:
        wrong = errors(calls, expected)
        timings = alternate(calls, rounds, options.device, min_seconds=0.01)
        _note(report, f"jacobian.{key}", title, base, calls, (timings, wrong))
