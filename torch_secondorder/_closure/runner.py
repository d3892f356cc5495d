"""Runs a closure or a function once, and collects its gradients.

Everything that evaluates a loss goes through `run`. Where backward passes go is up to its sink:

* without one, the closure runs untouched;
* a `Capture` keeps the whole graph, for evaluations whose curvature is used later;
* a `Capture` with a `WatchSink` shows the graph of each backward pass to a watch and frees it, for
  optimizers that evaluate once a step.

Loops that pass no closure call `backward()` by themselves. Their passes end in the same sinks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from operator import attrgetter
from typing import Any, NamedTuple, Protocol
from weakref import ref

import torch
from torch import Tensor

from torch_secondorder._autograd.graph import Graph
from torch_secondorder._closure.capture import Capture, active_capture, uncaptured
from torch_secondorder._closure.replay import ModuleRegistry
from torch_secondorder._closure.validation import (
    backward_of,
    differentiable,
    lost_graph,
    no_gradient,
    scalar,
    touched,
)
from torch_secondorder._foundation.private_torch import any_autocast_enabled, plainly

__all__ = [
    "GradientTrace",
    "IdleClosure",
    "Run",
    "Watch",
    "WatchSink",
    "any_nonzero",
    "gradients_of",
    "nonzero",
    "run",
    "without_autocast",
]


class Run(NamedTuple):
    """The result of one run of a closure or function, before regularization.

    Attributes:
        loss: The loss, 0-dim.
        gradients: One for each parameter, None where the loss does not depend on it.
        graph: The retained graph, if it was asked for.
        averaged: Whether a DDP module has averaged the gradients over the ranks.
        copies: Whether the graph has saved copies.
        place: The position that the graph belongs to, if the closure has moved parameters.
    """

    loss: Tensor
    gradients: Sequence[Tensor | None]
    graph: Graph | None = None
    averaged: bool = False
    copies: bool = False
    place: Tensor | None = None


def gradients_of(params: Iterable[Tensor]) -> list[Tensor | None]:
    """The gradients that parameters have now."""
    return list(map(_grad, params))


_grad: Callable[[Tensor], Tensor | None] = attrgetter("grad")


def run(
    source: Callable[[], Any],
    params: Sequence[Tensor],
    registry: ModuleRegistry,
    capture: Capture | None = None,
    *,
    pure: bool = False,
    before: GradientTrace | None = None,
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """Runs a closure or a pure function once.

    Args:
        source: Returns the loss. If it does not call `backward()`, the loss is differentiated here.
        params: The parameters, leaves.
        registry: The record of modules and ranks.
        capture: The sink of backward passes; None to let them run untouched.
        pure: Whether the source is a function. It makes no `p.grad`, and gets none.
        before: The gradients from before the run; None if there were none.

    Returns:
        The loss and the gradients. Those of a pure function without a capture are this rank's, and
        there may be none.

    Raises:
        IdleClosure: The closure did nothing, and `before` has gradients.
        RuntimeError: No gradient reached the parameters, or their graph was lost.
    """
    gradients: Sequence[Tensor | None]
    if capture is None:
        around: Any = _nothing if active_capture.get() is None else uncaptured()
    else:
        around = capture
    with around, registry.ranks.quiet() if pure or capture is not None else _nothing:
        value = source()
        if value is None and before is not None and before.any and before.matches(params):
            raise IdleClosure
        if pure:
            loss = scalar(value)
            if capture is None:
                with plainly():
                    gradients = torch.autograd.grad(differentiable(loss), params, allow_unused=True)
                return loss, gradients
            gradients = capture.differentiate(differentiable(capture.checked(loss)))
        elif capture is None:
            gradients = list(map(_grad, params))
            # Without gradients before, the first one tells most of the time.
            made = before is None and gradients[0] is not None
            if not made and not _made(gradients, params, before):
                backward_of(scalar(value))
                if before is not None and before.matches(params):
                    raise no_gradient()
                gradients = gradients_of(params)
        elif not capture.calls:
            loss = scalar(value)
            if capture.foreign or _made(gradients_of(params), params, before):
                raise lost_graph()
            capture.backward(differentiable(capture.checked(loss)))
    if not pure:
        # Outside, where a capture does not see each of these operations.
        simple = type(value) is Tensor and not value.dim() and not value.is_complex()
        loss = value if simple else scalar(value)
        if capture is not None:
            if capture.foreign:
                raise lost_graph()
            gradients = list(map(_grad, params))
    if capture is None or capture.keeps:
        if gradients[0] is None:
            touched(gradients)
        if capture is not None:
            capture.graph.check_once(registry.graphs)
    return loss, gradients


_nothing = nullcontext()


def _made(
    gradients: Sequence[Tensor | None], params: Sequence[Tensor], before: GradientTrace | None
) -> bool:
    """True if a closure has made gradients."""
    if before is not None:
        return before.shows_backward(params)
    return any(g is not None for g in gradients)


class IdleClosure(Exception):
    """A closure returned nothing and did nothing, and there were gradients before it."""


class GradientTrace:
    """Remembers which gradients some parameters have, without keeping them.

    Args:
        params: The parameters.

    Attributes:
        any: Whether there is a gradient.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._marks: list[tuple[ref[Tensor], int] | None] = []
        self.any = False
        for p in params:
            grad = p.grad
            if grad is None:
                self._marks.append(None)
            else:
                self._marks.append((ref(grad), grad._version))
                self.any = True

    def matches(self, params: Sequence[Tensor]) -> bool:
        """True if all of them still have the same gradients, unchanged."""
        if len(params) != len(self._marks):
            return False
        for p, mark in zip(params, self._marks, strict=True):
            grad = p.grad
            if grad is None or mark is None:
                if (grad is None) != (mark is None):
                    return False
            elif mark[0]() is not grad or mark[1] != grad._version:
                return False
        return True

    def shows_backward(self, params: Sequence[Tensor]) -> bool:
        """True if gradients were made since, and not just dropped or set to zero."""
        if self.matches(params) or all(p.grad is None for p in params):
            return False
        # Values are read only if there were gradients before: on a device that waits.
        return not self.any or any_nonzero(gradients_of(params))


def any_nonzero(gradients: Iterable[Tensor | None]) -> bool:
    """True if some gradient has an entry that is not zero."""
    present = [gradient for gradient in gradients if gradient is not None]
    return any(map(nonzero, present))


def nonzero(gradient: Tensor) -> bool:
    """True if any entry is not zero."""
    gradient = gradient.detach()
    values = gradient if gradient.layout is torch.strided else gradient.to_dense()
    return bool(values.any())


class Watch(Protocol):
    """Looks at the graph of each `backward()` of an evaluation.

    Attributes:
        twice: Whether it needs gradients that can be differentiated again.
        outputs: Whether it needs the model's outputs.
    """

    twice: bool
    outputs: bool

    def observe(self, graph: Graph, retain: bool) -> None:
        """Takes from a graph everything it needs.

        Args:
            graph: One loss, its gradients and outputs; it ends after this call.
            retain: Whether the closure asked to retain the graph of the loss.
        """


class WatchSink:
    """Shows the graph of each backward pass to a watch, and gives copies of the gradients.

    It is the sink of a `Capture`, see `torch_secondorder._closure.capture.Sink`.

    Args:
        params: The parameters.
        registry: The record of modules and ranks.
        watch: The watch; None as long as there is none.

    Attributes:
        params: The parameters.
        watch: The watch.
        twice: Whether it needs gradients that can be differentiated again.
        outputs: Whether it needs the model's outputs.
    """

    twice = outputs = False

    def __init__(
        self, params: Sequence[Tensor], registry: ModuleRegistry, watch: Watch | None = None
    ) -> None:
        self.params = params
        self._registry = registry
        self.watch = watch
        if watch is not None:
            self.twice, self.outputs = watch.twice, watch.outputs

    def __call__(self, graph: Graph, retain: bool) -> Sequence[Tensor | None]:
        """See `torch_secondorder._closure.capture.Sink`."""
        self.see(graph, retain)
        return self._copies(graph.gradients[0])

    def see(self, graph: Graph, retain: bool) -> None:
        """Shows the watch the graph of one backward pass.

        Args:
            graph: One loss and its gradients. It ends after this call.
            retain: Whether the graph of the loss is needed again.
        """
        assert self.watch is not None
        graph.check_once(self._registry.graphs, self.twice)
        if any_autocast_enabled():
            with without_autocast(self.params):
                self.watch.observe(graph, retain)
        else:
            self.watch.observe(graph, retain)

    def _copies(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Copies, averaged over the ranks: the graph goes on using the gradients' memory."""
        ranks = self._registry.ranks
        if ranks.count > 1:
            return ranks.average_gradients(gradients, self.params)[0]
        return [None if g is None else g.detach().clone() for g in gradients]


@contextmanager
def without_autocast(params: Iterable[Tensor]) -> Iterator[None]:
    """Takes products in the precision of the gradients that they are derivatives of."""
    if not any_autocast_enabled():
        yield
        return
    with ExitStack() as stack:
        for device_type in {p.device.type for p in params}:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield
