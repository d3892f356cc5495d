"""A source, opened: loss, gradient and curvature at one place, and everything put back after."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._foundation.progress_bar import bar
from torch_secondorder.curvature import LinearOperator
from torch_secondorder.curvature._products import AT_ONCE
from torch_secondorder.diagnostics.problem import Problem
from torch_secondorder.diagnostics.sources import as_problem

__all__ = ["Counted", "Point", "generator_of", "opened"]


class Counted(LinearOperator):
    """An operator whose products are counted, shown and looked at.

    Attributes:
        products: Products done so far.
    """

    def __init__(self, operator: LinearOperator, tell: Callable[[int], None]) -> None:
        self._operator, self._tell = operator, tell
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device
        self.products = 0

    def matvec(self, v: Tensor) -> Tensor:
        """See `LinearOperator.matvec`.

        Raises:
            RuntimeError: The product is not finite.
        """
        return self._seen(self._operator @ v, 1)

    def matmat(self, V: Tensor) -> Tensor:
        """See `LinearOperator.matmat` and `matvec`; some at a time, so that a bar moves."""
        parts = [self._seen(self._operator @ some, some.shape[1]) for some in V.split(AT_ONCE, 1)]
        return torch.cat(parts, 1)

    def _seen(self, product: Tensor, count: int) -> Tensor:
        self.products += count
        self._tell(count)
        product = product.detach()
        if not torch.isfinite(product).all():
            raise RuntimeError(
                f"product {self.products} with the curvature is not finite: the loss has no second "
                "derivative here (a norm or a root at zero?), or numbers overflow"
            )
        return product


@dataclass(frozen=True, slots=True)
class Point:
    """What there is at a place.

    Attributes:
        operator: The curvature.
        value: The loss, None for a bare operator.
        grad: The gradient, shape `(n,)`, None for a bare operator.
        params: The parameters; empty for a bare operator.
    """

    operator: Counted
    value: float | None
    grad: Tensor | None
    params: Sequence[Tensor] = ()


@contextmanager
def opened(source: Any, progress: bool | None, total: int | None, label: str) -> Iterator[Point]:
    """Evaluates a source; on leaving, everything is as it was before.

    That is the random state of PyTorch's generators, the gradients in `p.grad`, the buffers of all
    modules that are called, and the modes of those that the source names.

    Args:
        source: A `Problem`, `FunctionalObjective` or `LinearOperator`.
        progress: Whether to show a bar, see `bar`.
        total: Products to come, at most; None if that is not known.
        label: The bar's.

    Raises:
        TypeError: The source is none of these.
    """
    with ExitStack() as stack:
        if isinstance(source, LinearOperator):
            _keep_random_state(stack, [source.device])
            tell = stack.enter_context(bar(progress, total, label))
            yield Point(Counted(source, tell), None, None)
            return
        problem = as_problem(source)
        _keep_random_state(stack, problem.vector.devices)
        _keep_model(stack, problem)
        operator, value, grad = _evaluated(problem, stack)
        tell = stack.enter_context(bar(progress, total, label))
        yield Point(Counted(operator, tell), value, grad, problem.vector.params)


def _evaluated(problem: Problem, stack: ExitStack) -> tuple[LinearOperator, float, Tensor]:
    value, operators, weights = 0.0, [], []
    grad = torch.zeros(problem.size, dtype=problem.vector.dtype, device=problem.vector.device)
    for weight, evaluation, operator in problem.evaluations(stack):
        value += weight * evaluation.loss.item()
        grad.add_(evaluation.grad, alpha=weight)
        operators.append(operator)
        weights.append(weight)
    if len(operators) == 1 and weights[0] == 1.0:
        return operators[0], value, grad
    return _Sum(operators, weights), value, grad


class _Sum(LinearOperator):
    """A weighted sum of operators."""

    def __init__(self, operators: Sequence[LinearOperator], weights: Sequence[float]) -> None:
        first = operators[0]
        self.size, self.dtype, self.device = first.size, first.dtype, first.device
        self._terms = list(zip(operators, weights, strict=True))

    def matvec(self, v: Tensor) -> Tensor:
        return self.matmat(v)

    def matmat(self, V: Tensor) -> Tensor:
        total = torch.zeros_like(V)
        for operator, weight in self._terms:
            total.add_(operator @ V, alpha=weight)
        return total


def _keep_random_state(stack: ExitStack, devices: Sequence[torch.device]) -> None:
    stack.enter_context(torch.random.fork_rng(devices=[]))
    by_type: dict[str, list[torch.device]] = defaultdict(list)
    for device in devices:
        if device.type not in ("cpu", "meta"):
            by_type[device.type].append(device)
    for kind, some in by_type.items():
        stack.enter_context(torch.random.fork_rng(devices=some, device_type=kind))


def _keep_model(stack: ExitStack, problem: Problem) -> None:
    for module in problem.modules:
        stack.callback(setattr, module, "training", module.training)
    for p in problem.vector.params:
        stack.callback(setattr, p, "grad", p.grad)


def generator_of(generator: torch.Generator | None) -> torch.Generator:
    """The generator given, or a new one, so that torch's own stays where it is."""
    return torch.Generator().manual_seed(0) if generator is None else generator
