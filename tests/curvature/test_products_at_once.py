"""How many products are made in one pass, and products that keep their digits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.functional import mse_loss

from tests.support.simulated_graph import SimulatedGraph
from torch_secondorder import FunctionalObjective
from torch_secondorder._autograd import vectorized
from torch_secondorder._autograd.vectorized import AT_ONCE, products_at_once
from torch_secondorder._foundation.precision import rounds_float32_products
from torch_secondorder.curvature import GaussNewton, Hessian, InverseBFGS
from torch_secondorder.curvature.inverse_bfgs import products

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIB = 2**30


class Sized:
    """A graph, as far as its size goes."""

    def __init__(self, elements: int) -> None:
        self.elements = elements

    def size(self) -> int:
        return self.elements


@pytest.mark.parametrize(
    ("elements", "size", "device", "free", "expected"),
    [
        (1_000, 1_000, CPU, 0, AT_ONCE),
        (0, 1_000, CPU, 0, AT_ONCE),  # the graph does not tell
        (200_000, 1_000, CPU, 0, 1),
        (1_000, 200_000, CPU, 0, 1),
        (1_000, 1_000, CUDA, 40 * GIB, 64),
        (2_000_000, 1_000_000, CUDA, 40 * GIB, 16),
        (100_000_000, 1_000_000, CUDA, 40 * GIB, 1),
        (2_000_000, 1_000_000, CUDA, 0.25 * GIB, 3),
        (2_000_000, 1_000_000, CUDA, 0, 1),
        (0, 1_000_000, CUDA, 40 * GIB, AT_ONCE),
        (1_000, 1_000, torch.device("xpu"), math.inf, 64),
    ],
)
def test_as_many_as_pay_and_fit(
    elements: int,
    size: int,
    device: torch.device,
    free: float,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vectorized, "free_memory", lambda _: free)
    graph: Any = Sized(elements)
    assert products_at_once(graph, size, torch.float32, device) == expected


@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
@pytest.mark.parametrize("count", [1, 3, 64])
def test_products_do_not_depend_on_their_number_in_a_pass(
    kind: Any, count: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch_secondorder.curvature.base.products_at_once", lambda *_: count)
    w = torch.linspace(-1, 1, 5, dtype=torch.float64, device=device)
    target = torch.ones_like(w)
    objective = FunctionalObjective(lambda w: mse_loss(w.sin() * w.sum(), target), w)
    operator = kind(objective.evaluate(curvature=True))
    V = torch.randn(5, 7, dtype=torch.float64).to(device)
    expected = torch.stack([operator @ v for v in V.T], 1)
    torch.testing.assert_close(operator @ V, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture
def _rounded() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("_rounded")
def test_products_of_the_history_are_not_rounded(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrix products are, on a GPU with TF32; here they fail."""
    assert rounds_float32_products()
    rows, vectors = torch.randn(4, 256).to(device), torch.randn(2, 256).to(device)
    exact = vectors.double() @ rows.double().T
    if device.type == "cpu":
        for name in ("mm", "bmm"):
            monkeypatch.setattr(torch, name, None)
    found = products(rows, vectors)
    assert (found - exact).abs().max().item() < 1e-6 * 256  # of the lengths


def test_newer_names_of_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not rounds_float32_products()

    def mixed() -> str:
        raise RuntimeError("please avoid using a mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    assert rounds_float32_products()


# A direction of L-BFGS as a CUDA graph.


def history_and_gradient(device: Any, pairs: int, size: int = 50) -> tuple[InverseBFGS, Any]:
    torch.manual_seed(0)
    history = InverseBFGS(size, 4, device=torch.device(device))
    for _ in range(pairs):
        s = torch.randn(size, device=device)
        history.push(s, s + 0.1 * torch.randn(size, device=device))
    return history, torch.randn(size, device=device)


@pytest.mark.parametrize("pairs", [2, 4, 7])
def test_a_direction_can_be_recorded(pairs: int) -> None:
    """Also the one that takes in a new pair: nothing in it reads a number."""
    history, gradient = history_and_gradient("cpu", pairs)
    other, _ = history_and_gradient("cpu", pairs)
    first = SimulatedGraph()
    found = first.record(lambda: history.direction(gradient))
    first.replay()
    assert torch.equal(found, other.direction(gradient))
    graph = SimulatedGraph()
    found = graph.record(lambda: history.direction(gradient))
    for _ in range(3):
        gradient.copy_(torch.randn(50))
        graph.replay()
        assert torch.equal(found, other.direction(gradient))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("size", [50, 2**18])
def test_a_direction_as_a_graph(size: int) -> None:
    history, gradient = history_and_gradient("cuda", 7, size)
    history.direction(gradient)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = history.direction(gradient)
    for _ in range(3):
        gradient.copy_(torch.randn(size))
        graph.replay()
        torch.testing.assert_close(found, history.direction(gradient))
