"""The Jacobian of residuals against one made row by row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_secondorder import ClosureObjective, mark_outputs
from torch_secondorder._foundation.private_torch import load_forward_rules
from torch_secondorder._objective.base import Evaluation
from torch_secondorder.curvature import ResidualJacobian

torch.manual_seed(0)
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


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return make().double()


def reference(evaluation: Evaluation) -> Tensor:
    """`J` from a backward pass for each row."""
    J = ResidualJacobian(evaluation, method="rows")
    products = J._products
    unit = torch.eye(J.rows, dtype=J.residuals.dtype)
    return torch.cat([products.pull(u[None]) for u in unit])


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
    bias = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
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
    b = torch.tensor([1.5, 0.3, 2.0], dtype=torch.float64, requires_grad=True)
    x = torch.linspace(0.1, 2, 9, dtype=torch.float64)
    return lambda: halved(b[0] * (1 - torch.exp(-b[1] * x)) + x ** b[2] / (1 + b[2] * x)), [b]


def scalars() -> Problem:
    net = built(lambda: nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)))
    log_k = torch.zeros((), dtype=torch.float64, requires_grad=True)
    shift = torch.ones(1, dtype=torch.float64, requires_grad=True)
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
    mask, x = (inputs(4, 3) > 0).double(), inputs(5, 4, seed=2)
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
    unused = torch.ones(2, dtype=torch.float64, requires_grad=True)
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


@pytest.mark.parametrize("name", GRAPH)
def test_of_models(name: str) -> None:
    evaluation = evaluated(GRAPH[name]())
    J = ResidualJacobian(evaluation)
    assert J.method == "graph", J.reason
    torch.testing.assert_close(J.dense(), reference(evaluation), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", GRAPH)
def test_results_agree(name: str) -> None:
    evaluation = evaluated(GRAPH[name]())
    J = ResidualJacobian(evaluation)
    D = J.dense()
    fresh = ResidualJacobian(evaluation)
    u, v, w = inputs(J.rows), inputs(J.size, seed=1), inputs(J.size, seed=2)
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(fresh.pull(u), D.T @ u, **close)
    torch.testing.assert_close(fresh.push(v), D @ v, **close)
    torch.testing.assert_close(fresh.diagonal(), D.square().sum(0), **close)
    torch.testing.assert_close(fresh.kernel(), D @ D.T, **close)
    torch.testing.assert_close(fresh.kernel(w), (D * w) @ D.T, **close)
    torch.testing.assert_close(fresh.kernel(2 * torch.ones_like(w)), 2 * D @ D.T, **close)
    torch.testing.assert_close(fresh.normal_matrix(), D.T @ D, **close)
    by_rows = ResidualJacobian(evaluation, method="rows")
    for other in (by_rows, ResidualJacobian(evaluation, method="columns")):
        torch.testing.assert_close(other.push(v)[: J.rows].norm(), (D @ v).norm(), **close)
        torch.testing.assert_close(other.normal_matrix(), D.T @ D, **close)
    torch.testing.assert_close(by_rows.pull(by_rows.residuals), evaluation.grad, **close)
