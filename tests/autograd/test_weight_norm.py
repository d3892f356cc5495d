"""Weight normalization is differentiated rightly, as often as one likes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm as by_parametrization

from torch_secondorder import AdaHessian, diagnostics, func
from torch_secondorder._autograd.weight_norm import WEIGHT_NORM, weight_norm
from torch_secondorder._objective.functional import FunctionalObjective
from torch_secondorder.curvature import Hutchinson

DOUBLE = torch.float64


def old(module: nn.Module, dim: int | None = 0) -> nn.Module:
    module_of_old: Any = sys.modules["torch.nn.utils.weight_norm"]
    wrapped: nn.Module = module_of_old.WeightNorm.apply(module, "weight", dim) and module
    return wrapped


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_values_are_those_of_pytorch(dim: int) -> None:
    torch.manual_seed(0)
    v = torch.randn(3, 4, 2, dtype=DOUBLE)
    g = torch.norm_except_dim(v, 2, dim) + 1
    torch.testing.assert_close(weight_norm(v, g, dim), WEIGHT_NORM(v, g, dim))


def model_of(kind: str, dim: int | None) -> nn.Module:
    torch.manual_seed(3)
    wrap: Callable[..., nn.Module] = by_parametrization if kind == "parametrization" else old
    first, last = wrap(nn.Linear(4, 3), dim=dim), wrap(nn.Linear(3, 2), dim=dim)
    return nn.Sequential(first, nn.Tanh(), last).double()


def hessian_by_differences(loss: Callable[[], Tensor], params: list[Tensor]) -> Tensor:
    def gradient() -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss(), params)])

    rows, step = [], 1e-5
    for p in params:
        flat = p.data.view(-1)
        for i in range(flat.numel()):
            value = flat[i].item()
            flat[i] = value + step
            ahead = gradient()
            flat[i] = value - step
            rows.append((ahead - gradient()) / (2 * step))
            flat[i] = value
    return torch.stack(rows)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("kind", ["parametrization", "old"])
def test_second_derivatives(kind: str, dim: int | None) -> None:
    model = model_of(kind, dim)
    x, y = torch.randn(6, 4, dtype=DOUBLE), torch.randn(6, 2, dtype=DOUBLE)
    params: list[Tensor] = list(model.parameters())

    def loss() -> Tensor:
        return F.mse_loss(model(x), y)

    expected = hessian_by_differences(loss, params)
    problem = diagnostics.from_closure(loss, params)
    trace = diagnostics.trace(problem).value
    assert trace == pytest.approx(expected.trace().item(), rel=1e-6)

    tree = {name: p.detach().clone() for name, p in model.named_parameters()}

    def function(tree: Any) -> Tensor:
        return F.mse_loss(torch.func.functional_call(model, tree, (x,)), y)

    objective = FunctionalObjective(function, tree)
    product = objective.evaluate(curvature=True).linearization.hessian_product
    eye = torch.eye(len(expected), dtype=DOUBLE)
    rows = torch.stack([product(row) for row in eye])
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-8)
    diagonal = torch.cat([d.flatten() for d in func.hessian_diagonal(function, tree).values()])
    torch.testing.assert_close(diagonal, expected.diagonal(), rtol=1e-5, atol=1e-8)
    assert func.check_derivatives(function, tree)


def test_estimates_without_a_mode_that_sees_all_operations() -> None:
    model = model_of("parametrization", 0)
    x, y = torch.randn(6, 4, dtype=DOUBLE), torch.randn(6, 2, dtype=DOUBLE)
    params: list[Tensor] = list(model.parameters())
    optimizer = AdaHessian(params, lr=0.0, estimator=Hutchinson(2000), betas=(0.9, 0.0))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = hessian_by_differences(lambda: F.mse_loss(model(x), y), params).diagonal()
    squares = torch.cat([optimizer.state[p]["exp_hessian"].flatten() for p in params])
    torch.testing.assert_close(squares.sqrt(), expected.abs(), rtol=0.2, atol=0.1)


def test_everything_is_as_before_afterwards() -> None:
    func.hvp(lambda x: (x**3).sum(), torch.ones(2), torch.ones(2))
    assert torch._weight_norm is WEIGHT_NORM
    assert sys.modules["torch.nn.utils.weight_norm"]._weight_norm is WEIGHT_NORM  # type: ignore[attr-defined]
