"""The Jacobian of residuals against one made row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_secondorder import ClosureObjective, mark_outputs
from torch_secondorder._foundation.private_torch import load_forward_rules
from torch_secondorder._objective.base import Evaluation
from torch_secondorder.curvature import (
    JacobianMethod,
    ResidualJacobian,
    _jacobian_columns,
    _jacobian_kernel,
    _local_jacobian,
)

#: A model's closure, and what is optimized.
Problem = tuple[Callable[[], Tensor], list[Tensor]]


def halved(*residuals: Tensor) -> Tensor:
    """Half the sum of squares of marked residuals."""
    total = torch.zeros((), dtype=residuals[0].dtype)
    for i, r in enumerate(residuals):
        marked = mark_outputs(r)
        total = total + (i + 1) * marked.square().sum() / 2
    total.backward()
    return total


# Of all models and data.
DTYPE = [torch.float64]


def inputs(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DTYPE[-1])


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return make().double().to(DTYPE[-1])


def reference(evaluation: Evaluation) -> Tensor:
    """`J` of the residuals of `halved`, from a backward pass for each row."""
    assert evaluation.linearization is not None
    graph, rows = evaluation.linearization.graph, []
    for i, output in enumerate(graph.outputs):
        for entry in output.tensor.reshape(-1):
            found = torch.autograd.grad(entry, graph.params, retain_graph=True, allow_unused=True)
            parts = [
                torch.zeros_like(p) if g is None else g
                for p, g in zip(graph.params, found, strict=True)
            ]
            rows.append((i + 1) ** 0.5 * torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows)


def mlp() -> Problem:
    net = built(lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)))
    x, y = inputs(7, 3), inputs(7, 2, seed=1)
    return lambda: halved(net(x) - y), list(net.parameters())


def bias_free() -> Problem:
    net = built(
        lambda: nn.Sequential(nn.Linear(3, 5, bias=False), nn.Tanh(), nn.Linear(5, 1, bias=False))
    )
    x = inputs(7, 3)
    return lambda: halved(net(x).squeeze(1)), list(net.parameters())


def pinn(order: int) -> Problem:
    net = built(
        lambda: nn.Sequential(
            nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)
        )
    )
    x, boundary = inputs(8, 2).requires_grad_(), inputs(3, 2, seed=1)

    def closure() -> Tensor:
        u = net(x)
        for k in range(order):
            u = torch.autograd.grad(u.sum(), x, create_graph=True)[0][:, k % 2]
        return halved(u - x.detach()[:, 0], net(boundary).squeeze(1))

    return closure, list(net.parameters())


def laplacian() -> Problem:
    net = built(lambda: nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)))
    x, boundary = inputs(8, 2).requires_grad_(), inputs(3, 2, seed=1)

    def closure() -> Tensor:
        u = net(torch.cat([x, boundary])).squeeze(1)
        (g,) = torch.autograd.grad(u[:8].sum(), x, create_graph=True)
        total = sum(
            torch.autograd.grad(g[:, k].sum(), x, create_graph=True)[0][:, k] for k in range(2)
        )
        return halved(total + u[:8] ** 3, u[8:])

    return closure, list(net.parameters())


def functional_laplacian() -> Problem:
    net = built(lambda: nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)))
    x = inputs(5, 2)

    def closure() -> Tensor:
        params = dict(net.named_parameters())

        def u(point: Tensor) -> Tensor:
            return torch.func.functional_call(net, params, (point[None],))[0, 0]

        load_forward_rules()
        hessians = torch.func.vmap(torch.func.hessian(u))(x)
        return halved(hessians.diagonal(dim1=1, dim2=2).sum(1) - 1)

    return closure, list(net.parameters())


def cnn() -> Problem:
    net = built(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(4, 4, 2, groups=2, dilation=2),
            nn.GroupNorm(2, 4),
            nn.Flatten(),
            nn.Linear(4, 2),
        )
    )
    x = inputs(5, 2, 6, 6)
    return lambda: halved(net(x)), list(net.parameters())


def cnn_1d() -> Problem:
    net = built(
        lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Conv1d(3, 1, 2, bias=False))
    )
    x = inputs(4, 2, 7)
    return lambda: halved(net(x).mean((1, 2))), list(net.parameters())


def cnn_3d() -> Problem:
    net = built(
        lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 1))
    )
    x = inputs(3, 1, 3, 3, 3)
    return lambda: halved(net(x)), list(net.parameters())


def attention() -> Problem:
    net = built(lambda: nn.MultiheadAttention(4, 2, batch_first=True))
    head = built(lambda: nn.Linear(4, 1))
    x = inputs(3, 5, 4)

    def closure() -> Tensor:
        return halved(head(net(x, x, x, need_weights=False)[0].mean(1)).squeeze(1))

    return closure, [*net.parameters(), *head.parameters()]


def transformer() -> Problem:
    layer = built(lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True))
    embedding = built(lambda: nn.Embedding(6, 4))
    tokens = torch.tensor([[0, 1, 2], [3, 4, 5], [0, 5, 0], [1, 1, 1]])
    return (
        lambda: halved(layer(embedding(tokens)).sum(1)[:, :2]),
        [*layer.parameters(), *embedding.parameters()],
    )


def batch_second() -> Problem:
    net = built(lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0))
    x = inputs(5, 3, 4)
    return lambda: halved(net(x)[0]), list(net.parameters())


def deeponet() -> Problem:
    branch = built(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)))
    trunk = built(lambda: nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 5)))
    bias = torch.nn.Parameter(torch.ones((), dtype=DTYPE[-1]))
    f, t = inputs(7, 4), inputs(7, 1, seed=1)
    return (
        lambda: halved(torch.einsum("ni,ni->n", branch(f), trunk(t)) + bias),
        [*branch.parameters(), *trunk.parameters(), bias],
    )


def several_terms() -> Problem:
    net = built(lambda: nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3)))
    x, y = inputs(6, 2), inputs(4, 2, seed=1)

    def closure() -> Tensor:
        u, v, w = net(x).unbind(1)
        return halved(u * v, v + w**2, net(y).sum(1), u[:2])

    return closure, list(net.parameters())


def tied() -> Problem:
    net = built(lambda: nn.Linear(4, 4))
    x = inputs(5, 4)
    return (
        lambda: halved((net(torch.tanh(net(x))) @ net.weight).tanh() @ net.bias),
        list(net.parameters()),
    )


def weight_norm() -> Problem:
    net = built(
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1)
        )
    )
    x = inputs(6, 3)
    return lambda: halved(net(x)), list(net.parameters())


def low_rank() -> Problem:
    net = built(lambda: nn.Linear(3, 4))
    a, b = inputs(4, 2, seed=2).requires_grad_(), inputs(2, 3, seed=3).requires_grad_()
    x = inputs(6, 3)
    return (
        lambda: halved(F.linear(x, net.weight + 0.5 * (a @ b), net.bias).sin()[:, 0]),
        [*net.parameters(), a, b],
    )


def curve() -> Problem:
    b = torch.tensor([1.5, 0.3, 2.0], dtype=DTYPE[-1], requires_grad=True)
    x = torch.linspace(0.1, 2, 9, dtype=DTYPE[-1])
    return lambda: halved(b[0] * (1 - torch.exp(-b[1] * x)) + x ** b[2] / (1 + b[2] * x)), [b]


def scalars() -> Problem:
    net = built(lambda: nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)))
    log_k = torch.zeros((), dtype=DTYPE[-1], requires_grad=True)
    shift = torch.ones(1, dtype=DTYPE[-1], requires_grad=True)
    t = inputs(6, 1).requires_grad_()

    def closure() -> Tensor:
        u = net(t)
        (du,) = torch.autograd.grad(u.sum(), t, create_graph=True)
        return halved((du + F.softplus(log_k) * u - 2 * shift).squeeze(1), net(t.detach()[:2]))

    return closure, [*net.parameters(), log_k, shift]


def norms() -> Problem:
    net = built(
        lambda: nn.Sequential(
            nn.Linear(3, 4),
            nn.LayerNorm(4),
            nn.PReLU(4),
            nn.BatchNorm1d(4),
            nn.RMSNorm(4),
            nn.Linear(4, 1),
        )
    ).eval()
    x = inputs(6, 3)
    return lambda: halved(net(x)), list(net.parameters())


def permuted() -> Problem:
    net = built(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    x, order = inputs(6, 3), torch.tensor([3, 1, 5, 0, 2, 4])
    return lambda: halved(net(x)[order], net(x[order])[:, 0][:4]), list(net.parameters())


def grid() -> Problem:
    net = built(lambda: nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)))
    x = inputs(3, 4, 2)
    return lambda: halved(net(x).squeeze(-1)), list(net.parameters())


def sequence() -> Problem:
    net = built(lambda: nn.RNN(2, 3, batch_first=True))
    x = inputs(4, 5, 2)
    return lambda: halved(net(x)[0][:, -1]), list(net.parameters())


def constant_matrices() -> Problem:
    w = inputs(4, 3, seed=5).requires_grad_()
    mask, x = (inputs(4, 3) > 0).to(DTYPE[-1]), inputs(5, 4, seed=2)
    order = torch.tensor([2, 0, 1])
    return lambda: halved((x @ (w * mask)[:, order] + w.sum(0)).sin().sum(1)), [w]


def batched_matrices() -> Problem:
    w = inputs(2, 3, 4, seed=5).requires_grad_()
    x = inputs(5, 3, seed=2)
    return lambda: halved((x.expand(2, 5, 3) @ w).sin().sum((0, 2))), [w]


def single_sample() -> Problem:
    net = built(lambda: nn.Linear(3, 2))
    x = inputs(3)
    return lambda: halved(net(x).prod()), list(net.parameters())


def partly_used() -> Problem:
    net = built(lambda: nn.Linear(3, 2))
    unused = torch.ones(2, dtype=DTYPE[-1], requires_grad=True)
    net.bias.requires_grad_(False)
    x = inputs(5, 3)
    return lambda: halved(net(x)), [net.weight, unused]


GRAPH: dict[str, Callable[[], Problem]] = {
    f.__name__: f
    for f in (
        mlp,
        bias_free,
        laplacian,
        functional_laplacian,
        cnn,
        cnn_1d,
        cnn_3d,
        attention,
        transformer,
        batch_second,
        deeponet,
        several_terms,
        tied,
        weight_norm,
        low_rank,
        curve,
        scalars,
        norms,
        permuted,
        grid,
        sequence,
        constant_matrices,
        batched_matrices,
        single_sample,
        partly_used,
    )
}
for order in (1, 2, 3):
    GRAPH[f"pinn_{order}"] = lambda order=order: pinn(order)


def evaluated(problem: Problem) -> Evaluation:
    closure, params = problem
    return ClosureObjective(closure, params).evaluate(curvature=True)


def _in_single_precision(make: Callable[[], Problem]) -> Problem:
    DTYPE.append(torch.float32)
    try:
        return make()
    finally:
        DTYPE.pop()


CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


@pytest.mark.parametrize("name", GRAPH)
def test_models_by_the_graph(name: str) -> None:
    evaluation = evaluated(GRAPH[name]())
    J, expected = ResidualJacobian(evaluation), reference(evaluation)
    assert J.method == "graph", J.reason
    assert J.reason == ""
    torch.testing.assert_close(J.dense(), expected, **CLOSE)
    torch.testing.assert_close(expected.T @ J.residuals, evaluation.grad, **CLOSE)


@pytest.mark.parametrize("name", GRAPH)
def test_products_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = evaluated(GRAPH[name]())
    D = reference(evaluation)
    # As if it were large: nothing is made at once, or kept.
    for limit, value in {"_SMALL": 0, "_KEPT": 0, "_PART": 50}.items():
        monkeypatch.setattr(_local_jacobian, limit, value)
    for limit, value in {"_CACHED": 10}.items():
        monkeypatch.setattr(_jacobian_columns, limit, value)
    monkeypatch.setattr(_jacobian_kernel, "_LARGEST", 50)
    J = ResidualJacobian(evaluation, method="graph")
    u, v, w = inputs(J.rows), inputs(J.size, seed=1), inputs(J.size, seed=2)
    torch.testing.assert_close(J.pull(u), D.T @ u, **CLOSE)
    torch.testing.assert_close(J.push(v), D @ v, **CLOSE)
    torch.testing.assert_close(J.diagonal(), D.square().sum(0), **CLOSE)
    torch.testing.assert_close(J.kernel(), D @ D.T, **CLOSE)
    torch.testing.assert_close(J.kernel(w), (D * w) @ D.T, **CLOSE)
    torch.testing.assert_close(J.kernel(2 * torch.ones_like(w)), 2 * D @ D.T, **CLOSE)
    torch.testing.assert_close(J.normal_matrix(), D.T @ D, **CLOSE)
    torch.testing.assert_close(J.dense(), D, **CLOSE)


@pytest.mark.parametrize("method", ["rows", "columns"])
@pytest.mark.parametrize("name", GRAPH)
def test_models_by_other_methods(name: str, method: JacobianMethod) -> None:
    evaluation = evaluated(GRAPH[name]())
    J, D = ResidualJacobian(evaluation, method=method), reference(evaluation)
    assert (J.method, J.reason) == (method, "")
    u, v = inputs(J.rows), inputs(J.size, seed=1)
    torch.testing.assert_close(J.pull(u), D.T @ u, **CLOSE)
    torch.testing.assert_close(J.push(v), D @ v, **CLOSE)
    torch.testing.assert_close(J.dense(), D, **CLOSE)
    torch.testing.assert_close(J.kernel(v), (D * v) @ D.T, **CLOSE)
    torch.testing.assert_close(J.normal_matrix(), D.T @ D, **CLOSE)
    torch.testing.assert_close(J.diagonal(), D.square().sum(0), **CLOSE)


@pytest.mark.parametrize("name", GRAPH)
def test_models_in_single_precision(name: str) -> None:
    closure, params = GRAPH[name]()
    evaluation = evaluated((closure, params))
    assert evaluation.linearization is not None
    expected = reference(evaluation)
    single = _in_single_precision(GRAPH[name])
    J = ResidualJacobian(evaluated(single))
    assert J.method == "graph", J.reason
    assert J.dense().dtype == torch.float32
    scale = float(expected.abs().max())
    torch.testing.assert_close(J.dense().double(), expected, rtol=1e-3, atol=1e-4 * scale)
