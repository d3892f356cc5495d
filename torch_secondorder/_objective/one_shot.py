"""One evaluation of a closure, for optimizers that look at each point only once.

What such an optimizer needs of the curvature is taken while `backward()` runs: the graph of the
gradient is used on the spot and freed, so that nothing is retained, not even over the micro-batches
of one closure. Where no curvature is due, the closure runs untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol
from weakref import ref

import torch
from torch import Tensor

from torch_secondorder._autograd.graph import Graph
from torch_secondorder._closure.capture import Capture, uncaptured
from torch_secondorder._closure.data_parallel import Ranks
from torch_secondorder._closure.replay import ModuleRegistry
from torch_secondorder._closure.validation import (
    backward_of,
    check_is_closure,
    differentiable,
    lost_graph,
    no_gradient,
    scalar,
    touched,
)
from torch_secondorder._foundation.buffer_pool import BufferPool
from torch_secondorder._foundation.private_torch import (
    any_autocast_enabled,
    flatten_tensors,
    unflatten_tensors,
)
from torch_secondorder._foundation.subclasses import all_plain, plainly, snapshot
from torch_secondorder._objective.functional import FunctionalObjective

__all__ = [
    "GradientTrace",
    "IdleClosure",
    "Outcome",
    "SingleEvaluation",
    "Watch",
    "averaged",
    "nonzero",
    "without_autocast",
]


class Watch(Protocol):
    """What looks at the graph of each `backward()` of an evaluation.

    Attributes:
        twice: Whether it needs gradients that can be differentiated again.
        outputs: Whether it needs the model's outputs.
    """

    twice: bool
    outputs: bool

    def observe(self, graph: Graph, retain: bool) -> None:
        """Takes what it needs.

        Args:
            graph: One loss, its gradients and outputs; it ends after this call.
            retain: Whether the closure asked to retain the graph of the loss.
        """


class Outcome(NamedTuple):
    """What an evaluation gave.

    Attributes:
        loss: The closure's, 0-dim, detached, averaged over the ranks; None without a closure.
        gradients: One for each parameter, None where it had no part.
        whole: The same as one vector that they are views of, if there is one.
        accumulated: Whether gradients from before the evaluation are among them.
    """

    loss: Tensor | None
    gradients: Sequence[Tensor | None]
    whole: Tensor | None = None
    accumulated: bool = False


class IdleClosure(Exception):
    """A closure that returned nothing and did nothing, with gradients there from before it."""


class GradientTrace:
    """Remembers which gradients some parameters have, without keeping them.

    Args:
        params: The parameters.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        grads = [p.grad for p in params]
        self._marks = [None if grad is None else (ref(grad), grad._version) for grad in grads]

    def matches(self, params: Sequence[Tensor]) -> bool:
        """Whether all of them still have these very gradients, unchanged."""
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
        """Whether gradients were made since, and not just dropped or set to zero."""
        if self.matches(params) or all(p.grad is None for p in params):
            return False
        if not any(self._marks):
            return True
        # Looked at only where there were gradients before.
        return any(p.grad is not None and nonzero(p.grad) for p in params)


class SingleEvaluation:
    """One evaluation of a closure or function at the parameters as they stand.

    Args:
        source: The closure, or a `FunctionalObjective`.
        params: The parameters.
        registry: What earlier steps learned of the modules that are called.
        stale: The gradients that the last step left. If nothing has touched them since they are
            dropped first, as by `zero_grad()`; else what is there accumulates.
        buffer_pool: Where memory for gradients may come from.

    Raises:
        TypeError: The source is not callable.
    """

    def __init__(
        self,
        source: Any,
        params: Sequence[Tensor],
        registry: ModuleRegistry,
        stale: GradientTrace | None = None,
        buffer_pool: BufferPool | None = None,
    ) -> None:
        self._functional = isinstance(source, FunctionalObjective)
        self._compiled = source.bind_to(params) if self._functional else None
        self._source: Callable[[], Any] = source.source if self._functional else source
        check_is_closure(self._source)
        self._params = params
        self._registry = registry
        self._before = {slot: snapshot(b) for slot, b in registry.moving_buffers()}
        self._buffer_pool = buffer_pool or BufferPool()
        self._accumulated = False
        self._joined: tuple[Tensor, Sequence[Tensor | None]] | None = None
        self._pointers: list[int] = []
        if stale is not None and stale.matches(params):
            for p in params:
                p.grad = None

    def run(self, watch: Watch | None = None, *, accumulates: bool = True) -> Outcome:
        """Evaluates.

        Args:
            watch: What to show the graphs to; None for a closure that runs untouched.
            accumulates: Whether gradients from before may be added to, where there is a watch: it
                sees the graphs of this evaluation only.

        Raises:
            IdleClosure: The closure did nothing, and gradients are there already.
            RuntimeError: No gradient reached the parameters, there is no second derivative, or
                gradients had accumulated and must not.
        """
        try:
            # An autocast region around the loop caches casts of parameters that have moved since.
            torch.clear_autocast_cache()
            with torch.enable_grad():
                run = self._run if watch is None else partial(self._run_captured, watch)
                if self._compiled is not None:
                    run = partial(self._run_compiled, watch)
                loss, gradients = run(accumulates)
        except BaseException:
            self.restore()
            raise
        loss = self._registry.ranks.average(loss.detach())
        whole = None
        if self._joined is not None:
            vector, views = self._joined
            # The closure may have put other tensors there, or other memory under these.
            pointers = [0 if view is None else view.data_ptr() for view in views]
            if all(g is view for g, view in zip(gradients, views, strict=True)) and (
                pointers == self._pointers
            ):
                whole = vector
        return Outcome(loss, touched(gradients), whole, self._accumulated)

    def restore(self) -> None:
        """Puts the buffers back to where they were before the evaluation."""
        for slot, value in self._before.items():
            slot.restore(value)

    def _run(self, accumulates: bool) -> tuple[Tensor, Sequence[Tensor | None]]:
        params, registry = self._params, self._registry
        before = GradientTrace(params)
        with ExitStack() as stack:
            stack.enter_context(uncaptured())
            if self._functional:
                stack.enter_context(registry.ranks.quiet())
            known = registry.knows(self._source, "modules")
            if not known:
                stack.enter_context(registry.watch(self._before))
            loss = scalar(self._called(before))
            if self._functional:
                with plainly():
                    found = torch.autograd.grad(differentiable(loss), params, allow_unused=True)
                gradients, _ = averaged(found, params, registry.ranks)
            elif not before.shows_backward(params):
                backward_of(loss)
                if before.matches(params):
                    raise no_gradient()
        if not known:
            registry.note(self._source, "modules")
        return loss, gradients if self._functional else [p.grad for p in params]

    def _called(self, before: GradientTrace) -> Any:
        """What the closure returns."""
        value = self._source()
        nothing = value is None and not self._functional and before.matches(self._params)
        if nothing and any(p.grad is not None for p in self._params):
            raise IdleClosure
        return value

    def _run_captured(
        self, watch: Watch, accumulates: bool
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        params, source = self._params, self._source
        before = GradientTrace(params)
        relay = _Relay(self, watch, accumulates=accumulates or self._functional)
        with Capture(params, relay) as capture, self._registry.ranks.quiet():
            with self._registry.watch(self._before):
                loss = scalar(self._called(before))
            if capture.foreign or (not capture.calls and before.shows_backward(params)):
                raise lost_graph()
            gradients: Sequence[Tensor | None] = ()
            if self._functional:
                gradients = capture.differentiate(differentiable(capture.checked(loss)))
            elif not capture.calls:
                capture.backward(differentiable(capture.checked(loss)))
        self._registry.note(source, "modules")
        return loss, gradients if self._functional else [p.grad for p in params]

    def _run_compiled(
        self, watch: Watch | None, accumulates: bool
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        assert self._compiled is not None
        loss, graph = self._compiled(watch is not None)
        if watch is None:
            found = graph.gradients[0]
            return loss, averaged(found, self._params, self._registry.ranks)[0]
        return loss, _Relay(self, watch, accumulates=True)(graph, False)


class _Relay:
    """What `Capture` shows the graphs to: sees to the things that no watch need care for."""

    def __init__(self, evaluation: SingleEvaluation, watch: Watch, *, accumulates: bool) -> None:
        self.twice, self.outputs = watch.twice, watch.outputs
        self._evaluation = evaluation
        self._watch = watch
        self._accumulates = accumulates
        self._first = True

    def __call__(self, graph: Graph, retain: bool) -> Sequence[Tensor | None]:
        gradients = graph.gradients[0]
        if self._evaluation._registry.ranks.count == 1 and all(g is None for g in gradients):
            return gradients  # a loss of other parameters
        if self._first:
            self._look_at_what_was_there()
        graph.check_once(self._evaluation._registry.graphs, self.twice)
        with without_autocast(graph.params):
            self._watch.observe(graph, retain)
        return self._own(gradients, graph.params)

    def _own(
        self, gradients: Sequence[Tensor | None], params: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """Copies, averaged over the ranks: one vector and views of it where that is possible.

        The graph goes on using the storage of the gradients themselves, and may have given one
        tensor to several parameters.
        """
        evaluation = self._evaluation
        ranks = evaluation._registry.ranks
        if ranks.count > 1:
            views, joined = averaged(gradients, params, ranks)
        else:
            joined = _join(gradients, params, evaluation._buffer_pool)
            if joined is None:
                return [None if g is None else g.detach().clone() for g in gradients]
            views = list(unflatten_tensors(joined, all_plain(params)))
        if joined is not None:
            evaluation._joined = joined, views
            evaluation._pointers = [0 if view is None else view.data_ptr() for view in views]
        return views

    def _look_at_what_was_there(self) -> None:
        self._first = False
        evaluation = self._evaluation
        params, ranks = evaluation._params, evaluation._registry.ranks
        if ranks.count > 1 and any(p.grad is not None for p in params):
            # Each rank's own, where they come from no_sync(); what is the mean already stays that.
            means, _ = averaged([p.grad for p in params], params, ranks)
            for p, gradient in zip(params, means, strict=True):
                p.grad = gradient
        # Zeros are what zero_grad(set_to_none=False) leaves.
        if evaluation._functional or not any(
            p.grad is not None and nonzero(p.grad) for p in evaluation._params
        ):
            return
        evaluation._accumulated = True
        if not self._accumulates:
            raise RuntimeError(
                "the closure adds to gradients from before this step, and curvature would be that "
                "of its own loss alone: zero the gradients in the closure and run all "
                "micro-batches there (several loss.backward() calls are fine), or, where it is the "
                "last of N equal parts, say accumulation_steps=N"
            )


@contextmanager
def without_autocast(params: Sequence[Tensor]) -> Iterator[None]:
    """Products are taken in the precision of the gradients that they are derivatives of."""
    if not any_autocast_enabled():
        yield
        return
    types = {p.device.type for p in params}
    with ExitStack() as stack:
        for device_type in types:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def _join(
    gradients: Sequence[Tensor | None], params: Sequence[Tensor], buffer_pool: BufferPool
) -> Tensor | None:
    """The gradients as one vector; None where they are of several kinds, or one is missing."""
    dtype, device = params[0].dtype, params[0].device
    if dtype.is_complex:
        return None
    size = 0
    for g in gradients:
        if g is None or g.layout is not torch.strided or g.dtype != dtype or g.device != device:
            return None
        size += g.numel()
    if len(params) > 1 and not buffer_pool.pays(size, dtype, device):
        joined: Tensor = flatten_tensors(gradients)
        return joined.detach()
    pieces = [g.detach().reshape(-1) for g in gradients if g is not None]
    return torch.cat(pieces, out=buffer_pool.empty("gradient", size, dtype, device))


def nonzero(gradient: Tensor) -> bool:
    """Whether any entry is not zero."""
    gradient = gradient.detach()
    values = gradient if gradient.layout is torch.strided else gradient.to_dense()
    return bool(values.any())


def averaged(
    gradients: Sequence[Tensor | None], params: Sequence[Tensor], ranks: Ranks
) -> tuple[Sequence[Tensor | None], Tensor | None]:
    """The mean over the ranks; one message for each dtype and device.

    Returns:
        The gradients, None where no rank has one; and the same as one vector that they are views
        of, where they are of one kind and all there.
    """
    if ranks.count == 1:
        return gradients, None
    result: list[Tensor | None] = [None] * len(params)
    kinds: dict[Any, list[int]] = {}
    for i, p in enumerate(params):
        kinds.setdefault((p.dtype, p.device), []).append(i)
    for (dtype, device), places in kinds.items():
        pieces = [_dense(gradients[i], params[i]).detach() for i in places]
        used = torch.tensor(
            [gradients[i] is not None for i in places], dtype=torch.float32, device=device
        )
        # Ranks may differ in what they used, not in what they send.
        message = torch.cat([piece.reshape(-1) for piece in pieces] + [used.to(dtype)])
        message = ranks.average_(message)
        anywhere = message[len(message) - len(places) :]
        chunks = message.split([piece.numel() for piece in pieces] + [len(places)])
        for i, chunk, share in zip(places, chunks, anywhere, strict=False):
            if gradients[i] is not None or bool(share):
                result[i] = chunk.view_as(params[i])
    complete = len(kinds) == 1 and not message.is_complex() and all(g is not None for g in result)
    return result, message[: len(message) - len(params)] if complete else None


def _dense(gradient: Tensor | None, p: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros_like(p, requires_grad=False)
    return gradient if gradient.layout is torch.strided else gradient.to_dense()
