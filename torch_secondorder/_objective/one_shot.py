"""One evaluation of a closure, for optimizers that evaluate each point only once.

Such an optimizer takes its curvature while `backward()` runs: the graph of the gradient is used on
the spot and freed, so that nothing is retained, not even over the micro-batches of one closure. If
no curvature is due, the closure runs untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from torch_secondorder._autograd.graph import Graph
from torch_secondorder._closure.capture import Capture
from torch_secondorder._closure.runner import (
    GradientTrace,
    ModuleRegistry,
    any_nonzero,
    gradients_of,
    run,
    without_autocast,
)
from torch_secondorder._closure.validation import check_is_closure, touched
from torch_secondorder._foundation.buffer_pool import BufferPool
from torch_secondorder._foundation.private_torch import (
    any_autocast_enabled,
    flatten_tensors,
    unflatten_tensors,
)
from torch_secondorder._foundation.subclasses import all_plain
from torch_secondorder._objective.functional import FunctionalObjective


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


class Outcome(NamedTuple):
    """The result of an evaluation.

    Attributes:
        loss: The closure's, 0-dim, detached, averaged over the ranks; None without a closure.
        gradients: One for each parameter, None where the loss does not depend on it.
        whole: The same as one vector that they are views of, if there is one.
        accumulated: Whether gradients from before the evaluation are among them.
    """

    loss: Tensor | None
    gradients: Sequence[Tensor | None]
    whole: Tensor | None = None
    accumulated: bool = False


class SingleEvaluation(WatchSink):
    """One evaluation of a closure or function at the parameters as they stand.

    Args:
        source: The closure, or a `FunctionalObjective`.
        params: The parameters.
        registry: The record of modules and ranks.
        stale: A trace of the gradients that the last step left. If they are unchanged they are
            dropped first, as by `zero_grad()`; other gradients accumulate.
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
        super().__init__(params, registry)
        self._functional = isinstance(source, FunctionalObjective)
        self._compiled = source.bind_to(params) if self._functional else None
        self._source: Callable[[], Any] = source.source if self._functional else source
        if not callable(self._source):
            check_is_closure(self._source)
        self._before = registry.buffers_before()
        self._buffer_pool = buffer_pool or BufferPool()
        self._began = False
        self._accumulates = True
        self._accumulated = False
        self._joined: Tensor | None = None
        self._views: Sequence[Any] = ()  # of that
        self._pointers: Sequence[int] = ()  # to their memory
        if stale is not None and stale.matches(params):
            for p in params:
                p.grad = None

    def run(self, watch: Watch | None = None, *, accumulates: bool = True) -> Outcome:
        """Evaluates.

        Args:
            watch: Looks at the graphs; None for a closure that runs untouched.
            accumulates: Whether gradients from before may be added to although there is a watch,
                which sees the graphs of this evaluation only.

        Raises:
            IdleClosure: The closure did nothing, and gradients are there already.
            RuntimeError: No gradient reached the parameters, there is no second derivative, or
                gradients had accumulated and must not.
        """
        if watch is not None:
            self.watch, self.twice, self.outputs = watch, watch.twice, watch.outputs
        self._accumulates = accumulates or self._functional
        try:
            # An autocast region around the loop caches casts of parameters that have moved since.
            torch.clear_autocast_cache()
            with torch.enable_grad():
                loss, gradients = self._run(watch)
        except BaseException:
            self.restore()
            raise
        loss = loss.detach()
        if self._registry.ranks.met:
            loss = self._registry.ranks.average(loss)
        if gradients[0] is None:
            touched(gradients)
        return Outcome(loss, gradients, self._whole(gradients), self._accumulated)

    def restore(self) -> None:
        """Puts the buffers back to where they were before the evaluation."""
        for slot, value in self._before.items():
            slot.restore(value)

    def _run(self, watch: Watch | None) -> tuple[Tensor, Sequence[Tensor | None]]:
        params, registry, functional = self.params, self._registry, self._functional
        if self._compiled is not None:
            loss, graph = self._compiled(watch is not None)
            gradients = graph.gradients[0] if watch is None else self(graph, False)
        else:
            known = watch is None and registry.knows(self._source, "modules")
            before = None if functional else GradientTrace(params)
            capture = None if watch is None else Capture(params, self)
            with nullcontext() if known else registry.watch(self._before):
                loss, gradients = run(
                    self._source, params, registry, capture, pure=functional, before=before
                )
            if not known:
                registry.note(self._source, "modules")
        if functional and watch is None:
            gradients, _ = registry.ranks.average_gradients(gradients, params)
        return loss, gradients

    def _whole(self, gradients: Sequence[Tensor | None]) -> Tensor | None:
        """The vector that the gradients are views of; None where they are not."""
        # The closure may have put other tensors there, or other memory under these.
        for gradient, view, pointer in zip(gradients, self._views, self._pointers, strict=False):
            if gradient is None or gradient is not view or gradient.data_ptr() != pointer:
                return None
        return self._joined

    # The sink of its backward passes.

    def __call__(self, graph: Graph, retain: bool) -> Sequence[Tensor | None]:
        """See `WatchSink`."""
        gradients, ranks = graph.gradients[0], self._registry.ranks
        if gradients[0] is None and ranks.count == 1 and all(g is None for g in gradients):
            return gradients  # a loss of other parameters
        if not self._began:
            self._began = True
            for p in self.params:
                if p.grad is not None:
                    self._handle_existing_gradients()
                    break
        self.see(graph, retain)
        return self._copies(gradients)

    def _copies(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Copies as one vector and views of it, if possible: updates work on whole vectors.

        They are copies also because one tensor may be the gradient of several parameters.
        """
        ranks = self._registry.ranks
        views: Sequence[Tensor | None]
        if ranks.met and ranks.count > 1:
            views, joined = ranks.average_gradients(gradients, self.params)
        else:
            joined = _join(gradients, self.params, self._buffer_pool)
            if joined is None:
                return super()._copies(gradients)
            views = unflatten_tensors(joined, all_plain(self.params))
        if joined is not None:
            self._joined, self._views = joined, list[Any](views)
            self._pointers = list(map(Tensor.data_ptr, self._views))
        return views

    def _handle_existing_gradients(self) -> None:
        """Sees to gradients that were there before the first backward pass."""
        params, ranks = self.params, self._registry.ranks
        existing: Sequence[Tensor | None] = gradients_of(params)
        if ranks.count > 1:
            # Each rank's own, where they come from no_sync(); means stay what they are.
            existing, _ = ranks.average_gradients(existing, params)
            for p, gradient in zip(params, existing, strict=True):
                p.grad = gradient
        # zero_grad(set_to_none=False) leaves zeros.
        if self._functional or not any_nonzero(existing):
            return
        self._accumulated = True
        if not self._accumulates:
            raise RuntimeError(
                "the closure adds to gradients from before this step, and curvature would be that "
                "of its own loss alone: zero the gradients in the closure and run all "
                "micro-batches there (several loss.backward() calls are fine), or, where it is the "
                "last of N equal parts, say accumulation_steps=N"
            )


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
        return flatten_tensors(gradients).detach()
    pieces = [g.detach().reshape(-1) for g in gradients if g is not None]
    return torch.cat(pieces, out=buffer_pool.empty("gradient", size, dtype, device))
