"""L-BFGS implementations, each run on a smooth function until it ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .harness import load_ours, load_peer

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Outcome:
    """The result of a solver and its cost.

    Attributes:
        point: The final point.
        evaluations: Number of evaluations of the function with its gradient.
        products: Number of products with the Hessian.
    """

    point: Tensor
    evaluations: int
    products: int = 0


Solver = Callable[[Function, Tensor, float, int], Outcome]


def with_closure(
    optimizer_class: Any,
    function: Function,
    start: Tensor,
    tolerance: float,
    budget: int,
    **arguments: Any,
) -> Outcome:
    """Runs an L-BFGS with torch's interface in one call of `step`."""
    return in_one_step(
        optimizer_class, function, start, tolerance, budget, max_eval=budget, **arguments
    )


def in_one_step(
    optimizer_class: Any,
    function: Function,
    start: Tensor,
    tolerance: float,
    iterations: int,
    **arguments: Any,
) -> Outcome:
    """Runs an optimizer that takes a closure in one call of `step`."""
    point = start.clone().requires_grad_()
    optimizer = optimizer_class(
        [point],
        max_iter=iterations,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        **arguments,
    )
    count = 0

    def closure() -> Tensor:
        nonlocal count
        count += 1
        optimizer.zero_grad()
        loss = function(point)
        loss.backward()
        return loss

    optimizer.step(closure)
    products = getattr(getattr(optimizer, "info", None), "products", 0)
    return Outcome(point.detach(), count, products)


def with_scipy(
    minimize: Any, function: Function, start: Tensor, tolerance: float, budget: int, memory: int
) -> Outcome:
    """Runs SciPy's L-BFGS-B on the same function, with the cheapest conversion to NumPy."""
    count = 0

    def value_and_gradient(x: Any) -> tuple[float, Any]:
        nonlocal count
        count += 1
        point = torch.from_numpy(x).to(start.device).requires_grad_()
        loss = function(point)
        loss.backward()
        assert point.grad is not None
        return loss.item(), point.grad.cpu().numpy()

    limits = {"maxiter": budget, "maxfun": budget, "gtol": tolerance, "ftol": 0.0}
    result = minimize(
        value_and_gradient,
        start.cpu().numpy(),
        jac=True,
        method="L-BFGS-B",
        options={**limits, "maxcor": memory},
    )
    return Outcome(torch.from_numpy(result.x).to(start), count)


def solvers() -> dict[str, Solver]:
    """All installed solvers; the others are compared with the first."""
    table: dict[str, Solver] = {}
    ours = load_ours("torch_secondorder", "LBFGS")
    if ours is not None:
        table["ours"] = partial(with_closure, ours)
    torch_wolfe = partial(with_closure, torch.optim.LBFGS, line_search_fn="strong_wolfe")
    table["torch h=100"] = torch_wolfe
    table["torch h=20"] = partial(torch_wolfe, history_size=20)
    optimize = load_peer("scipy.optimize", "scipy")
    if optimize is not None:
        for memory in (10, 20):
            table[f"scipy m={memory}"] = partial(with_scipy, optimize.minimize, memory=memory)
    return table
