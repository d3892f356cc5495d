"""The objective behind a standard closure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from torch_secondorder._closure.capture import Capture
from torch_secondorder._closure.runner import ModuleRegistry, Run, run
from torch_secondorder._closure.validation import check_is_closure
from torch_secondorder._objective.base import Curvature, Objective, Regularization
from torch_secondorder._params.vector import ParameterVector

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
        check_is_closure(closure)
        if curvature_closure is not None:
            check_is_closure(curvature_closure)
        super().__init__(vector, regularization, master, registry)
        self._closure = closure
        self._curvature_closure = curvature_closure

    @property
    def source(self) -> Callable[[], Any]:
        """See `Objective.source`."""
        return self._curvature_closure or self._closure

    def _run(self, position: Tensor, curvature: Curvature) -> Run:
        vector = self.vector
        if curvature and vector.sharded:
            raise RuntimeError(
                "the hooks of fully_shard let no second derivative through: for sharded parameters "
                "multiply with torch_secondorder.curvature.FiniteDifference(objective)"
            )
        # Whatever is in `p.grad` is of another evaluation, whether or not the closure clears it.
        for p in vector.params:
            p.grad = None
        if position is not self._placed:
            vector.move(position)
            self._placed = position
        if curvature and self._curvature_closure is None:
            return self._run_captured(self._closure, position, curvature)
        replayed = partial(self._replay.run, self._closure)
        loss, gradients = run(replayed, vector.params, self.registry)
        if curvature:
            return self._with_other_graph(Run(loss, gradients, averaged=True), curvature)
        return Run(loss, gradients, averaged=True)

    def _with_other_graph(self, own: Run, curvature: Curvature) -> Run:
        """Takes the graph from the curvature closure; leaves the closure's gradients in place."""
        assert self._curvature_closure is not None
        vector, start = self.vector, self.position
        if not vector.holds(start):  # the closure has moved them
            start = vector.gather(vector.params)
        for p in vector.params:
            p.grad = None
        try:
            self.evaluations += 1
            other = self._run_captured(self._curvature_closure, start, curvature)
        finally:
            for p, grad in zip(vector.params, own.gradients, strict=True):
                p.grad = grad
        return own._replace(graph=other.graph, copies=other.copies, place=other.place)

    @property
    def _captured_source(self) -> Callable[..., Any]:
        return self.source

    def _run_captured(self, closure: Callable[[], Any], start: Tensor, curvature: Curvature) -> Run:
        """Evaluates a closure where the parameters are, at `start`, and keeps the graph."""
        twice = curvature is True
        found = self._captured(closure, twice)
        if self.vector.holds(start):
            return found if start is self.position else found._replace(place=start)
        if not found.copies:
            # It moves parameters, which the graph has saved.
            self._note_writes(closure)
            self.vector.move(start)
            for p in self.vector.params:
                p.grad = None
            self.evaluations += 1
            found = self._captured(closure, twice)
        self._placed = self._tried = None
        return found

    def _captured(self, closure: Callable[[], Any], twice: bool) -> Run:
        params = self.vector.params
        capture = Capture(params, copies=self._copies(closure), twice=twice)
        loss, gradients = run(partial(self._replay.run, closure), params, self.registry, capture)
        place = None if capture.place is None else self._place_of(capture)
        return Run(loss, gradients, capture.graph, copies=capture.copies, place=place)

    def _place_of(self, capture: Capture) -> Tensor | None:
        """The place where a graph of copies was made, if that is not `position`."""
        if capture.place is None:
            return None
        place = self.vector.gather(capture.place)
        return None if torch.equal(place, self.position) else place
