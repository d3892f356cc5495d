"""The objective behind a standard closure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from torch_secondorder._closure.capture import Capture, uncaptured
from torch_secondorder._closure.replay import ModuleRegistry
from torch_secondorder._closure.validation import (
    backward_of,
    check_is_closure,
    differentiable,
    lost_graph,
    scalar,
    touched,
)
from torch_secondorder._objective.base import Objective, Regularization
from torch_secondorder._objective.evaluation import RawEvaluation
from torch_secondorder._params.vector import ParameterVector

__all__ = ["ClosureObjective"]

_Self = TypeVar("_Self", bound="ClosureObjective")


class ClosureObjective(Objective):
    """The objective behind a standard PyTorch closure.

    The closure zeroes gradients, computes the loss, calls `loss.backward()` and returns the loss;
    see the closure contract in the README for what else it may do. Optimizers make one for each
    step by themselves. Make your own to get at curvature, see `torch_secondorder.curvature`.

    Args:
        closure: Called without arguments, returns the loss: a tensor with one element, or a number.
        params: The parameters that the loss is differentiated with respect to.
        curvature_closure: Another closure to make products from, for instance of the loss on less
            data.

    Raises:
        TypeError: A closure is not callable, or a parameter is not a tensor of numbers.
        ValueError: There is no parameter, or one is empty.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> def closure():
    ...     loss = (w**4).sum()
    ...     loss.backward()
    ...     return loss
    >>> evaluation = ClosureObjective(closure, [w]).evaluate(curvature=True)
    >>> evaluation.loss, evaluation.grad
    (tensor(17.), tensor([ 4., 32.]))
    >>> evaluation.linearization.hessian_product(torch.ones(2))
    tensor([12., 48.])
    """

    def __init__(
        self,
        closure: Callable[[], Any],
        params: Iterable[Tensor],
        *,
        curvature_closure: Callable[[], Any] | None = None,
    ) -> None:
        self._begin(closure, params, curvature_closure=curvature_closure)

    @classmethod
    def for_step(
        cls: type[_Self],
        closure: Callable[[], Any],
        vector: ParameterVector | Iterable[Tensor],
        regularization: Regularization | None = None,
        master: Tensor | None = None,
        registry: ModuleRegistry | None = None,
        curvature_closure: Callable[[], Any] | None = None,
    ) -> _Self:
        """The objective of one step of an optimizer.

        Args:
            closure: See `ClosureObjective`.
            vector: See `Objective`.
            regularization: See `Objective`.
            master: See `Objective`.
            registry: See `Objective`.
            curvature_closure: See `ClosureObjective`.
        """
        objective = cls.__new__(cls)
        objective._begin(closure, vector, regularization, master, registry, curvature_closure)
        return objective

    def _begin(
        self,
        closure: Callable[[], Any],
        vector: ParameterVector | Iterable[Tensor],
        regularization: Regularization | None = None,
        master: Tensor | None = None,
        registry: ModuleRegistry | None = None,
        curvature_closure: Callable[[], Any] | None = None,
    ) -> None:
        for given in (closure, closure if curvature_closure is None else curvature_closure):
            check_is_closure(given)
        super().__init__(vector, regularization, master, registry)
        self._closure = closure
        self._curvature_closure = curvature_closure

    @property
    def source(self) -> Callable[[], Any]:
        """See `Objective.source`."""
        return self._curvature_closure or self._closure

    def _run(self, position: Tensor, curvature: bool) -> RawEvaluation:
        params = self.vector.params
        if curvature and self.vector.sharded:
            raise RuntimeError(
                "the hooks of fully_shard let no second derivative through: for sharded parameters "
                "multiply with torch_secondorder.curvature.FiniteDifference(objective)"
            )
        # Whatever is in `p.grad` is of another evaluation, whether or not the closure clears it.
        for p in params:
            p.grad = None
        if position is not self._placed:
            self.vector.move(position)
            self._placed = position
        if curvature and self._curvature_closure is None:
            return self._run_captured(self._closure, position)
        with uncaptured():
            loss = scalar(self._replay.run(self._closure))
            grads = [p.grad for p in params]
            if grads[0] is None and all(g is None for g in grads):
                backward_of(loss)
                grads = [p.grad for p in params]
        raw = RawEvaluation(loss, touched(grads), None, averaged=True)
        if curvature:
            other = self._other_evaluation(grads)
            raw = raw._replace(graph=other.graph, copies=other.copies, place=other.place)
        return raw

    def _other_evaluation(self, grads: Sequence[Tensor | None]) -> RawEvaluation:
        """That of the curvature closure; leaves the gradients of the closure in place."""
        assert self._curvature_closure is not None
        start = self.position
        if not self.vector.holds(start):  # the closure has moved them
            start = self.vector.gather(self.vector.params)
        for p in self.vector.params:
            p.grad = None
        try:
            self.evaluations += 1
            return self._run_captured(self._curvature_closure, start)
        finally:
            for p, grad in zip(self.vector.params, grads, strict=True):
                p.grad = grad

    @property
    def _captured_source(self) -> Callable[..., Any]:
        return self._closure if self._curvature_closure is None else self._curvature_closure

    def _run_captured(self, closure: Callable[[], Any], start: Tensor) -> RawEvaluation:
        """Evaluates a closure where the parameters are, at `start`."""
        raw = self._captured(closure)
        if self.vector.holds(start):
            return raw if start is self.position else raw._replace(place=start)
        if not raw.copies:
            # It moves parameters, which the graph has saved.
            self._note_writes(closure)
            self.vector.move(start)
            for p in self.vector.params:
                p.grad = None
            self.evaluations += 1
            raw = self._captured(closure)
        self._placed = self._tried = None
        return raw

    def _captured(self, closure: Callable[[], Any]) -> RawEvaluation:
        params = self.vector.params
        capture = Capture(params, copies=self._copies(closure))
        with capture, self.ranks.quiet():
            loss = scalar(self._replay.run(closure))
            if capture.foreign or (not capture.calls and any(p.grad is not None for p in params)):
                raise lost_graph()
            if not capture.calls:
                capture.backward(differentiable(capture.checked(loss)))
        grads = touched([p.grad for p in params])
        capture.graph.check_once(self._registry.graphs)
        place = self._place_of(capture)
        return RawEvaluation(loss, grads, capture.graph, copies=capture.copies, place=place)

    def _place_of(self, capture: Capture) -> Tensor | None:
        """Where parameters were when a graph of copies was made, if that is not `position`."""
        if capture.place is None:
            return None
        place = self.vector.gather(capture.place)
        return None if torch.equal(place, self.position) else place
