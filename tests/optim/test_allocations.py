"""New vectors in inner loops: how many there are, and why each has to be new."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.allocations import Allocations
from torch_secondorder import LBFGS, SOAP, AdaHessian, Shampoo, Sophia
from torch_secondorder.curvature import InverseBFGS
from torch_secondorder.curvature.base import LinearOperator
from torch_secondorder.solvers import CG

N = 2**19  # so large that buffers are used again on a CPU, and a GPU counts it as large


class Diagonal(LinearOperator):
    """A product that allocates nothing."""

    def __init__(self, entries: Tensor) -> None:
        self.size, self.dtype, self.device = len(entries), entries.dtype, entries.device
        self.entries, self.product = entries, torch.empty_like(entries)

    def matvec(self, v: Tensor) -> Tensor:
        return torch.mul(self.entries, v, out=self.product)


def direction(device: Any) -> Callable[[], Any]:
    """A pair enters the history, which is full, and the next direction is made."""
    history = InverseBFGS(N, 4, device=torch.device(device))
    vectors = torch.rand(3, N, device=device)
    for _ in range(6):
        history.push(vectors[0], vectors[1], 0.5)
        history.direction(vectors[2])

    def run() -> None:
        history.push(vectors[1], vectors[0], 0.5)
        history.direction(vectors[2])

    return run


def conjugate_gradients(iterations: int, device: Any) -> Callable[[], Any]:
    A = Diagonal(torch.linspace(1, 1000, N, device=device))
    b = torch.ones(N, device=device)
    solver = CG(max_iterations=iterations, tolerance=0.0)
    return lambda: solver(A, b)


def step_of(kind: Any, device: Any, **options: Any) -> Callable[[], Any]:
    """The update of a step without an estimate, gradients being there."""
    params = [nn.Parameter(torch.linspace(1, 2, N, device=device)) for _ in range(2)]
    optimizer = kind(params, lr=1e-3, update_period=100, **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.stack([(p**3).sum() for p in params]).sum()
        loss.backward()
        return loss

    for _ in range(12):
        optimizer.step(closure)
    assert not optimizer.curvature_due
    return optimizer.step


def of_some_iterations(device: Any) -> list[int]:
    """Iterations of L-BFGS, their trials, and new vectors; the closure makes none."""
    counts = []
    for iterations in (2, 6):
        x = nn.Parameter(torch.ones(N, device=device))
        optimizer = LBFGS([x], max_iter=iterations, history_size=4, tolerance_grad=0.0)
        scales = torch.linspace(1, 2, N, device=device)
        gradient = torch.empty(N, device=device)

        def closure(x: Any = x, scales: Tensor = scales, gradient: Tensor = gradient) -> Tensor:
            torch.mul(scales, x.detach(), out=gradient)
            x.grad = gradient
            return 0.5 * torch.dot(gradient, x.detach())

        with Allocations(N) as found:
            optimizer.step(closure)
        info = optimizer.info
        counts.append((info.iterations, info.evaluations, found.count))
    return [after - before for before, after in zip(*counts, strict=True)]


def counted(run: Callable[[], Any]) -> int:
    run()
    with Allocations(N) as found:
        run()
    return found.count


#: New vectors: of a direction with its update of the history, a step's update, an iteration.
EXPECTED = {
    # The direction, and one matrix of two rows, with which one pass over the history suffices.
    "direction": (direction, 2),
    # Adam's kernel, and buffers.
    "AdaHessian": (partial(step_of, AdaHessian, capturable=False), 0),
    # The gradient of all parameters as one vector, which zeros replace if it is not finite.
    "AdaHessian, on the device": (partial(step_of, AdaHessian, capturable=True), 1),
    # The ratio that is clipped.
    "Sophia": (partial(step_of, Sophia, capturable=False), 1),
    "Sophia, on the device": (partial(step_of, Sophia, capturable=True), 2),
    "SOAP": (partial(step_of, SOAP, capturable=False), 0),
    "SOAP, on the device": (partial(step_of, SOAP, capturable=True), 0),
    "Shampoo": (partial(step_of, Shampoo, capturable=False), 0),
    "Shampoo, on the device": (partial(step_of, Shampoo, capturable=True), 0),
}
# AdaHessian takes roots in a buffer on a CPU only, and Adam's kernel for curvature is the CPU's.
ON_GPU = {"AdaHessian": 1, "AdaHessian, on the device": 2}


@pytest.mark.parametrize("case", EXPECTED)
def test_new_vectors_in_a_step(case: str, device: torch.device) -> None:
    make, expected = EXPECTED[case]
    if device.type != "cpu":
        expected = ON_GPU.get(case, expected)
    assert counted(make(device)) == expected


def test_new_vectors_in_an_iteration(device: torch.device) -> None:
    """The point of a trial and its gradient; two of a direction, and the change of the gradient."""
    iterations, trials, new = of_some_iterations(device)
    assert iterations >= 4
    assert new == 2 * trials + 3 * iterations


def test_iterations_of_conjugate_gradients_make_none(device: torch.device) -> None:
    few, many = (counted(conjugate_gradients(count, device)) for count in (5, 25))
    assert few == many


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", EXPECTED)
def test_what_the_allocator_of_a_gpu_counts(case: str) -> None:
    make, expected = EXPECTED[case]
    run = make("cuda")
    run()
    name = "allocation.large_pool.allocated"
    before = torch.cuda.memory_stats()[name]
    run()
    assert torch.cuda.memory_stats()[name] - before <= ON_GPU.get(case, expected)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_conjugate_gradients_ask_the_allocator_for_no_vector() -> None:
    name, found = "allocation.large_pool.allocated", []
    for count in (5, 25):
        run = conjugate_gradients(count, "cuda")
        run()
        before = torch.cuda.memory_stats()[name]
        run()
        found.append(torch.cuda.memory_stats()[name] - before)
    assert found[0] == found[1]
