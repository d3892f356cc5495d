"""Loss, gradient and curvature of a source, with everything restored afterwards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._autograd.vectorized import AT_ONCE
from torch_secondorder._foundation.progress_bar import bar
from torch_secondorder.curvature import LinearOperator
from torch_secondorder.diagnostics.problem import Problem, as_problem


class Counted(LinearOperator):
    """An operator that counts its products, checks them and advances a progress bar.

    Attributes:
        products: Number of products so far.
    """

    def __init__(self, operator: LinearOperator, advance: Callable[[int], None]) -> None:
        self._operator, self._advance = operator, advance
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device
        self.products = 0

    def matvec(self, v: Tensor) -> Tensor:
        """See `LinearOperator.matvec`.

        Raises:
            RuntimeError: The product is not finite.
        """
        return self._checked(self._operator @ v, 1)

    def matmat(self, V: Tensor) -> Tensor:
        """See `LinearOperator.matmat` and `matvec`; in chunks, so that the bar moves."""
        chunks = V.split(AT_ONCE, 1)
        return torch.cat([self._checked(self._operator @ W, W.shape[1]) for W in chunks], 1)

    def _checked(self, product: Tensor, count: int) -> Tensor:
        self.products += count
        self._advance(count)
        product = product.detach()
        if not torch.isfinite(product).all():
            raise RuntimeError(
                f"product {self.products} with the curvature is not finite: the loss has no second "
                "derivative here (a norm or a root at zero?), or numbers overflow"
            )
        return product


@dataclass(frozen=True, slots=True)
class Point:
    """A source at the current values of its parameters.

    Attributes:
        operator: The curvature.
        value: The loss, None for a bare operator.
        grad: The gradient, shape `(n,)`, None for a bare operator.
    """

    operator: Counted
    value: float | None
    grad: Tensor | None


@contextmanager
def opened(source: Any, progress: bool | None, total: int | None, label: str) -> Iterator[Point]:
    """Evaluates a source, and restores everything on exit.

    Restored are the random state of PyTorch's generators, the gradients in `p.grad`, the buffers of
    all modules called, and the modes of the source's own modules.

    Args:
        source: A `Problem`, `FunctionalObjective` or `LinearOperator`.
        progress: Shows a progress bar, see `bar`.
        total: The largest number of products to come; None if unknown.
        label: The label of the bar.

    Raises:
        TypeError: The source is of another type.
    """
    with ExitStack() as stack:
        operator, value, grad = source, None, None
        if isinstance(source, LinearOperator):
            keep_random_state(stack, [source.device])
        else:
            problem = as_problem(source)
            keep_random_state(stack, problem.vector.devices)
            keep_model(stack, problem)
            evaluation, operator = problem.evaluate(stack)
            value, grad = evaluation.loss.item(), evaluation.grad
        advance = stack.enter_context(bar(progress, total, label))
        yield Point(Counted(operator, advance), value, grad)


def keep_random_state(stack: ExitStack, devices: Sequence[torch.device]) -> None:
    """Puts the random state of PyTorch's generators back when the stack ends."""
    stack.enter_context(torch.random.fork_rng(devices=[]))
    by_type: dict[str, list[torch.device]] = defaultdict(list)
    for device in devices:
        if device.type not in ("cpu", "meta"):
            by_type[device.type].append(device)
    for kind, some in by_type.items():
        stack.enter_context(torch.random.fork_rng(devices=some, device_type=kind))


def keep_model(stack: ExitStack, problem: Problem) -> None:
    """Puts gradients, and the modes of a source's own modules, back when the stack ends."""
    for module in problem.modules:
        stack.callback(setattr, module, "training", module.training)
    params = {
        *problem.vector.params,
        *(p for m in problem.modules for p in m.parameters(recurse=False)),
    }
    for p in params:
        stack.callback(setattr, p, "grad", p.grad)


def generator_of(generator: torch.Generator | None) -> torch.Generator:
    """The given generator, or a new one with a fixed seed instead of torch's global one."""
    return torch.Generator().manual_seed(0) if generator is None else generator
