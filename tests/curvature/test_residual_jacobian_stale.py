"""Jacobians of residuals whose graph has been seen before, when its rows were others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.oracles import rows_of
from torch_secondorder import ClosureObjective, mark_outputs
from torch_secondorder.curvature import ResidualJacobian

CLOSE: dict[str, float] = {"rtol": 1e-10, "atol": 1e-10}


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def half_square(*outputs: Tensor) -> Tensor:
    loss = torch.stack([mark_outputs(z).square().sum() / 2 for z in outputs]).sum()
    loss.backward()
    return loss


def test_a_block_beside_a_much_larger_one() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x = randn(20, 3).float()

    def closure() -> Tensor:
        z = net(x)
        return half_square(1e-4 * z, z.sin())

    evaluation = ClosureObjective(closure, net.parameters()).evaluate(curvature="jacobian")
    J = ResidualJacobian(evaluation)
    expected = rows_of(evaluation)
    assert J.method == "graph"
    torch.testing.assert_close(J.dense()[20:], expected[20:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(J.dense()[:20], expected[:20], rtol=1e-4, atol=1e-9)


def test_rows_of_a_sample_that_were_zero() -> None:
    # One entry of ten has a gradient by the bound at first, and it fits into more than one pattern.
    bound, c = torch.zeros(1, requires_grad=True), torch.ones(1, requires_grad=True)
    x = torch.ones(5, 2)
    x[0, 0] = -1.0

    def closure() -> Tensor:
        large = 1e4 * c * torch.tensor([1.0, 2.0, 3.0])
        return half_square(torch.maximum(x, bound)[:2], large)

    objective = ClosureObjective(closure, [bound, c])
    assert ResidualJacobian(objective.evaluate(curvature="jacobian")).method == "graph"
    x.copy_(-torch.ones(5, 2))
    with torch.no_grad():
        bound.fill_(0.5)
    evaluation = objective.evaluate(curvature="jacobian")
    torch.testing.assert_close(ResidualJacobian(evaluation).dense(), rows_of(evaluation), **CLOSE)


def test_zeros_that_the_gradient_says_nothing_about() -> None:
    b = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    x = torch.ones(4, 1, dtype=torch.float64)

    def closure() -> Tensor:
        z = torch.maximum(x, b)
        return half_square(z * 1, z * z - 1)  # where one is zero, the other has no derivative

    objective = ClosureObjective(closure, [b])
    ResidualJacobian(objective.evaluate(curvature="jacobian"))
    x.fill_(-1.0)
    evaluation = objective.evaluate(curvature="jacobian")
    J = ResidualJacobian(evaluation)
    torch.testing.assert_close(J.dense(), rows_of(evaluation), **CLOSE)
    assert float(J.dense().sum()) == 4.0


def test_an_order_that_changes_behind_residuals_that_are_the_same_for_all_samples() -> None:
    W = randn(3, 2).requires_grad_()
    x = randn(10, 3)
    order = torch.arange(10)
    y = torch.zeros(10, 2, dtype=torch.float64)
    objective = ClosureObjective(lambda: half_square((x @ W)[order] - y), [W])
    for shift in range(3):
        order.copy_(torch.arange(10).roll(shift))
        y.copy_((x @ W).detach()[order] - torch.tensor([1.0, 2.0]))
        evaluation = objective.evaluate(curvature="jacobian")
        J = ResidualJacobian(evaluation)
        torch.testing.assert_close(J.dense(), rows_of(evaluation), **CLOSE)


@pytest.mark.parametrize("unit", [0, 299])
def test_one_unit_of_many_that_comes_to_mix_samples(unit: int) -> None:
    W, b = randn(300, 20).requires_grad_(), randn(300, seed=1).requires_grad_()
    v = randn(300, 1, seed=2).requires_grad_()
    x, share = randn(256, 20, seed=3), torch.zeros((), dtype=torch.float64)
    chosen = F.one_hot(torch.tensor(unit), 300).double()

    def closure() -> Tensor:
        h = F.linear(x, W, b).tanh()
        return half_square((h - share * chosen * h.mean(0)) @ v)

    objective = ClosureObjective(closure, [W, b, v])
    assert ResidualJacobian(objective.evaluate(curvature="jacobian")).method == "graph"
    share.fill_(0.5)
    evaluation = objective.evaluate(curvature="jacobian")
    J = ResidualJacobian(evaluation)
    ones = torch.zeros(256, dtype=torch.float64)
    ones[3] = 1.0
    torch.testing.assert_close(J.pull(ones), rows_of(evaluation)[3], **CLOSE)


@pytest.mark.parametrize("samples", [5, 60])
def test_products_where_the_graph_has_one_derivative_only(samples: int) -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=True).double()
    x = randn(samples, 6, 4)

    def closure() -> Tensor:
        z = attention(x, x, x, need_weights=False)[0]
        return half_square((z - z.mean(0)).mean(1))

    evaluation = ClosureObjective(closure, attention.parameters()).evaluate(curvature="jacobian")
    J = ResidualJacobian(evaluation)
    v = randn(J.size)
    assert J.method == ("rows" if samples == 5 else "columns")
    torch.testing.assert_close(J.push(v), rows_of(evaluation) @ v, **CLOSE)
    torch.testing.assert_close(J.dense(), rows_of(evaluation), **CLOSE)


@pytest.mark.parametrize("width", [40, 50])
def test_kernel_of_blocks_with_one_channel_and_with_several(width: int) -> None:
    # Where there are several channels, the gradient is the factor that differs by them.
    W, v = randn(50, width).requires_grad_(), randn(width, 2, seed=2)
    x, y = randn(20, 50, seed=3), randn(30, 50, seed=4)
    evaluation = ClosureObjective(
        lambda: half_square((x @ W).tanh() @ v[:, 0], (y @ W).tanh() @ v), [W]
    ).evaluate(curvature="jacobian")
    J, expected = ResidualJacobian(evaluation), rows_of(evaluation)
    assert J.method == "graph"
    torch.testing.assert_close(J.kernel(), expected @ expected.T, rtol=1e-10, atol=1e-9)
