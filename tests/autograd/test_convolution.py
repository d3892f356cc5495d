"""Convolutions inside captured evaluations have PyTorch's derivatives, of any order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_secondorder._autograd.convolution import CONVOLUTIONS, convolution
from torch_secondorder._objective.closure import ClosureObjective
from torch_secondorder.curvature import GaussNewton, Hessian

GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2, "padding": 2},
    "groups": {"groups": 2},
    "same": {"padding": "same"},
}


def made(dims: int, groups: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(dims)
    shapes = (2, 4, *[6, 5, 5][:dims]), (6, 4 // groups, *[3, 3, 3][:dims]), (6,)
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    x, w, b = (t.to(device).requires_grad_() for t in drawn)
    return x, w, b


@pytest.mark.parametrize("function", CONVOLUTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("needed", ["xwb", "wb", "xw", "w", "x"])
def test_derivatives_are_those_of_pytorch(
    function: Any, name: str, needed: str, device: torch.device
) -> None:
    arguments = GEOMETRIES[name]
    x, w, b = made(CONVOLUTIONS[function], arguments.get("groups", 1), device)
    found = [t for t, letter in zip((x, w, b), "xwb", strict=True) if letter in needed]
    for tensor, letter in zip((x, w, b), "xwb", strict=True):
        tensor.requires_grad_(letter in needed)

    def derivatives(call: Any) -> list[Tensor]:
        value = call(x, w, b if "b" in needed else None, **arguments)
        first = torch.autograd.grad(value.pow(3).sum(), found, create_graph=True)
        directions = [torch.cos(t.detach()) for t in found]
        second = torch.autograd.grad(first, found, directions, create_graph=True)
        third = torch.autograd.grad(second, found, directions)
        return [value, *first, *second, *third]

    ours = derivatives(lambda *args, **kwargs: convolution(function, *args, **kwargs))
    for a, c in zip(ours, derivatives(function), strict=True):
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-9)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 4, 3, stride=2, bias=False)
        self.last = nn.Linear(4 * 2 * 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.second(x)).flatten(1))


@pytest.fixture
def evaluation(device: torch.device) -> Any:
    net = Net().to(device, torch.float64)
    x = torch.randn(5, 1, 6, 6, dtype=torch.float64, device=device)
    y = torch.randint(3, (5,), device=device)

    def closure() -> Tensor:
        net.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    objective = ClosureObjective(closure, net.parameters())
    return objective, objective.evaluate(curvature=True)


def captured(evaluation: Any) -> bool:
    """Whether the graph has our convolutions."""
    waiting, met = [evaluation.linearization.graph.losses[0].grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in met:
            continue
        met.add(node)
        waiting += [following for following, _ in node.next_functions]
    return any("_Convolution" in node.name() for node in met)


@pytest.mark.parametrize("operator", [Hessian, GaussNewton])
def test_vectorized_products_equal_single_ones(evaluation: Any, operator: Any) -> None:
    _objective, made = evaluation
    assert captured(made)
    matrix = operator(made)
    V = torch.randn(matrix.size, 3, dtype=torch.float64, device=matrix.device)
    single = torch.stack([matrix @ v for v in V.T], 1)
    torch.testing.assert_close(matrix @ V, single, rtol=1e-10, atol=1e-12)


def test_under_autocast_pytorch_s_own_convolution_runs() -> None:
    x, w, b = made(2, 1, torch.device("cpu"))
    x, w, b = x.float(), w.float(), b.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = convolution(torch.conv2d, x, w, b)
    assert result.dtype == torch.bfloat16
    assert "_Convolution" not in result.grad_fn.name()


def test_inside_a_transform_pytorch_s_own_convolution_runs() -> None:
    x, w, b = (t.detach() for t in made(1, 1, torch.device("cpu")))

    def loss(w: Tensor) -> Tensor:
        return convolution(torch.conv1d, x, w, b).pow(2).sum()

    found = torch.func.grad(lambda w: torch.func.grad(loss)(w).pow(2).sum())(w)

    def plain(w: Tensor) -> Tensor:
        return torch.conv1d(x, w, b).pow(2).sum()

    expected = torch.func.grad(lambda w: torch.func.grad(plain)(w).pow(2).sum())(w)
    torch.testing.assert_close(found, expected)
