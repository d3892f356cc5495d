"""The two ways into an objective: a standard closure, or a pure function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_secondorder._autograd.graph import Graph
from torch_secondorder._closure.capture import Capture, uncaptured
from torch_secondorder._closure.replay import ModuleRegistry
from torch_secondorder._closure.validation import (
    backward_of,
    check_callable,
    differentiable,
    lost_graph,
    scalar,
    touched,
)
from torch_secondorder._foundation.private_torch import pytree
from torch_secondorder._objective.compiled import CompiledFunction
from torch_secondorder._objective.evaluation import Objective, RawEvaluation, Regularization
from torch_secondorder._params.vector import ParameterVector

__all__ = ["ClosureObjective", "FunctionalObjective"]


class ClosureObjective(Objective):
    """The objective behind a standard PyTorch closure.

    The closure zeroes gradients, computes the loss, calls `loss.backward()` and returns the loss;
    see the closure contract in the README for what else it may do.

    Args:
        closure: Called without arguments, returns the loss: a tensor with one element, or a number.
        vector: The parameters, or their vector.
        regularization: See `Objective`.
        master: See `Objective`.
        registry: See `Objective`.
        curvature_closure: Another closure to make products from, of the loss on less data, say.

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
        vector: ParameterVector | Iterable[Tensor],
        regularization: Regularization | None = None,
        master: Tensor | None = None,
        registry: ModuleRegistry | None = None,
        curvature_closure: Callable[[], Any] | None = None,
    ) -> None:
        for given in (closure, closure if curvature_closure is None else curvature_closure):
            check_callable(given)
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


class FunctionalObjective(Objective):
    """The objective behind a pure function of a tree of tensors, in the style of `torch.func`.

    Nothing is moved while it is evaluated and no `p.grad` is made. Pass it to an optimizer's
    `step()` in place of a closure.

    Args:
        function: Takes a tree like `params`, returns the loss: a tensor with one element.
        params: The tree: a tensor, or a list, tuple or dict of tensors. An optimizer recognizes its
            parameters in it by identity (`dict(model.named_parameters())` is fine); what it does
            not own is passed on as a constant.
        vector: The parameters' vector; made of all leaves of `params` unless given.
        regularization: See `Objective`.
        master: See `Objective`.
        registry: See `Objective`.
        compile: Whether loss, gradient and products with the curvature are compiled, each as a
            whole; or arguments for `torch.compile`, such as `{"backend": "aot_eager"}`. It pays
            where operations are small and the same shapes come back for many steps. The function
            must draw no random numbers and change no tensor in place.

    Raises:
        ValueError: The tree holds none of the parameters.

    >>> w = torch.tensor([1.0, 2.0])
    >>> objective = FunctionalObjective(lambda p: (p["w"] ** 4).sum(), {"w": w})
    >>> objective.evaluate(curvature=True).linearization.hessian_product(torch.ones(2))
    tensor([12., 48.])
    """

    def __init__(
        self,
        function: Callable[[Any], Tensor],
        params: Any,
        vector: ParameterVector | None = None,
        regularization: Regularization | None = None,
        master: Tensor | None = None,
        registry: ModuleRegistry | None = None,
        *,
        compile: bool | Mapping[str, Any] = False,
    ) -> None:
        self._compiled: CompiledFunction | None = None
        if compile is not False:
            self._compiled = CompiledFunction(function, {} if compile is True else compile)
        self._function = function
        self._tree = params
        self._leaves, self._structure = pytree.tree_flatten(params)
        if vector is None:  # what cannot be optimized is a constant
            vector = ParameterVector(
                leaf
                for leaf in self._leaves
                if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
            )
        super().__init__(vector, regularization, master, registry)
        if self.vector.sharded:
            raise TypeError(
                "a FunctionalObjective is a function of whole tensors, and these parameters are "
                "sharded: use a closure that calls the sharded module"
            )
        places = {id(p): i for i, p in enumerate(self.vector.params)}
        self._places = [places.get(id(leaf)) for leaf in self._leaves]
        if all(place is None for place in self._places):
            raise ValueError(
                "the tree of parameters holds none of the optimizer's: pass the very tensors that "
                "the optimizer was given, for instance dict(model.named_parameters())"
            )

    @property
    def function(self) -> Callable[[Any], Tensor]:
        """What is evaluated, a function of the tree."""
        return self._function

    def with_function(self, function: Callable[[Any], Tensor]) -> FunctionalObjective:
        """Another function of the same tree."""
        return FunctionalObjective(function, self._tree)

    @property
    def source(self) -> Callable[[], Any]:
        """The function of the very tensors of the tree, to be called without arguments."""
        return partial(self._function, self._tree)

    def bind(
        self, vector: ParameterVector, regularization: Regularization, master: Tensor | None
    ) -> FunctionalObjective:
        """The same function on an optimizer's own vector and terms, for one step."""
        bound = FunctionalObjective(
            self._function, self._tree, vector, regularization, master, self._registry
        )
        bound._compiled = self._compiled
        return bound

    def bind_to(self, params: Sequence[Tensor]) -> Callable[[bool], tuple[Tensor, Graph]] | None:
        """Loss and graph at some parameters, where they stand; None where it is not compiled.

        Args:
            params: Some of the tree's tensors.

        Returns:
            A function that takes whether products are needed.
        """
        compiled = self._compiled
        if compiled is None:
            return None
        places = {id(p): i for i, p in enumerate(params)}
        found = [places.get(id(leaf)) for leaf in self._leaves]

        def run(curvature: bool) -> tuple[Tensor, Graph]:
            pieces = [p.detach().requires_grad_() for p in params]
            return compiled(self._filled(pieces, found), pieces, curvature)

        return run

    @property
    def _captured_source(self) -> Callable[..., Any] | None:
        return None if self._compiled is not None else self._function

    def _filled(self, pieces: Sequence[Tensor], places: Sequence[int | None]) -> Any:
        """The tree, with some of its leaves replaced."""
        leaves = [
            leaf if place is None else pieces[place]
            for leaf, place in zip(self._leaves, places, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self._structure)

    def _run(self, position: Tensor, curvature: bool) -> RawEvaluation:
        pieces = [piece.detach().requires_grad_() for piece in self.vector.split(position)]
        tree = self._filled(pieces, self._places)
        if self._compiled is not None:
            loss, graph = self._compiled(tree, pieces, curvature)
            return RawEvaluation(loss, touched(graph.gradients[0]), graph if curvature else None)
        if not curvature:
            with self.ranks.quiet():
                loss = differentiable(scalar(self._replay.run(lambda: self._function(tree))))
            gradients = torch.autograd.grad(loss, pieces, allow_unused=True)
            return RawEvaluation(loss, touched(gradients), None)
        with Capture(pieces, copies=self._copies(self._function)) as capture, self.ranks.quiet():
            loss = scalar(self._replay.run(lambda: self._function(tree)))
        grads = capture.differentiate(differentiable(capture.checked(loss)))
        capture.graph.check_once(self._registry.graphs)
        return RawEvaluation(loss, touched(grads), capture.graph, copies=capture.copies)
