"""The objective that an optimizer minimizes: a function of one flat vector.

An `Objective` lives for one step. It evaluates loss, gradient and (where asked) the retained graph
at the parameters, tries moves without losing the place, and accepts one. Weight decay, `maximize`
and relative learning rates are applied here and nowhere else, so that every optimizer above works
on one plain function.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any, Literal, NamedTuple, TypeAlias
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from torch_secondorder._autograd.graph import Graph, MissingSecondDerivative, Multiply
from torch_secondorder._closure.runner import ModuleRegistry, Replay, Run
from torch_secondorder._foundation.checks import check_choice
from torch_secondorder._foundation.memory import free_memory
from torch_secondorder._foundation.private_torch import set_grad_mode
from torch_secondorder._params.box import Box
from torch_secondorder._params.manifold import NOISE, Manifold, Tried
from torch_secondorder._params.vector import ParameterVector

#: What an evaluation keeps for products: nothing; the graphs of the loss and of its gradient; or
#: that of the loss alone.
Curvature: TypeAlias = bool | Literal["jacobian"]


class EvaluationsSpent(Exception):
    """A step has made all the evaluations that it may make."""


# The note on closures that write what their graphs have saved, see `ModuleRegistry.note`.
_WRITES = "writes"


@dataclass(frozen=True, slots=True)
class Regularization:
    """Changes to a loss before it is minimized: `sign * loss + sum(decay * theta**2) / 2`.

    Attributes:
        maximize: Whether the sign is -1.
        weight_decay: One coefficient, or one for each parameter.
    """

    maximize: bool = False
    weight_decay: float | tuple[float, ...] = 0.0


class Evaluation:
    """Loss, gradient and, on request, the retained graph at one point.

    The operators of `torch_secondorder.curvature` are made from an evaluation with curvature. You
    get one from a `ClosureObjective`, or from a `FunctionalObjective` if your loss is a pure
    function. It is valid until the parameters move.

    Args:
        flatten: Computes `grad`.

    Attributes:
        loss: The loss that is minimized, regularization included: 0-dim, detached, in work
            precision.
        closure_loss: The loss as the closure returned it (averaged over ranks), detached.
        linearization: The retained graph, present only where curvature was asked for.
        ambient: On a manifold, the gradient by the parameters, in the work space; else None.

    >>> import torch
    >>> from torch_secondorder import ClosureObjective
    >>> from torch_secondorder.curvature import GaussNewton
    >>> model, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0]])
    >>> def closure():
    ...     return torch.nn.functional.mse_loss(model(x), torch.zeros(1, 1))
    >>> evaluation = ClosureObjective(closure, model.parameters()).evaluate(curvature=True)
    >>> GaussNewton(evaluation) @ torch.tensor([1.0, 0.0])
    tensor([2., 4.])
    """

    def __init__(
        self,
        loss: Tensor,
        closure_loss: Tensor,
        flatten: Callable[[], Tensor],
        linearization: Linearization | None = None,
    ) -> None:
        self.loss = loss
        self.closure_loss = closure_loss
        self.linearization = linearization
        self.ambient: Tensor | None = None
        self._flatten: Callable[[], Tensor] | None = flatten
        self._grad: Tensor | None = None

    @property
    def grad(self) -> Tensor:
        """The gradient in the work space, shape `(n,)`.

        It is flattened when you first read it, at the latest before the next evaluation: an
        optimizer that works on `p.grad` does not pay for it.
        """
        grad = self._grad
        if grad is None:
            flatten, self._flatten = self._flatten, None
            assert flatten is not None
            grad = self._grad = flatten()
        return grad

    def put_on(self, manifold: Manifold, position: Tensor, tried: Tried | None) -> None:
        """Makes the gradient one by a step along a manifold, see `Manifold.along`."""
        if self.ambient is None:
            self.ambient = self.grad
            if self.linearization is not None:
                self.linearization.ambient = self.ambient
        self._grad = manifold.along(position, tried, self.ambient)


class Slot(NamedTuple):
    """A parameter's place in the work vector, from `start` to `stop`.

    Attributes:
        start: Its first entry.
        stop: The entry after its last one.
        scale: What its part of the work vector is multiplied by.
        decay: What weight decay adds to the diagonal of the curvature there.
    """

    start: int
    stop: int
    scale: float
    decay: float


class Linearization:
    """The second-order information at one evaluated point, valid until the parameters move on.

    It hides everything that lies between the work vector and the graph from operators: scale, sign,
    weight decay, the average over ranks.

    Args:
        objective: The objective that stands at the point.
        graph: The retained graph of the loss.
        copies: Whether the graph has saved copies.
        place: The position that the graph belongs to, if the closure has moved parameters.

    Attributes:
        graph: The retained graph.
        ranks: The ranks that the loss is averaged over.
        size: `n`.
    """

    def __init__(
        self,
        objective: Objective,
        graph: Graph,
        *,
        copies: bool = False,
        place: Tensor | None = None,
    ) -> None:
        self.graph = graph
        self.ranks = objective.ranks
        self.size = objective.vector.size
        self._copies, self._place = copies, place
        #: On a manifold, the gradient by the parameters, in the work space.
        self.ambient: Tensor | None = None
        self._objective = objective
        self._generation = objective.generation

    def suspend(self) -> None:
        """Marks this as of a point where the objective does not stand yet."""
        self._generation = -1

    def resume(self) -> None:
        """Marks this as of the point where the objective stands now."""
        self._generation = self._objective.generation

    def hessian_product(self, v: Tensor) -> Tensor:
        """The Hessian of the objective times `v`.

        Args:
            v: Shape `(n,)`, or `(k, n)` for `k` products in one vectorized pass.

        Raises:
            RuntimeError: The parameters have moved since the evaluation, or an operation of the
                model has no second derivative.
        """
        return self.product(v, self.graph.hessian_product, bends=True)

    def product(self, v: Tensor, multiply: Multiply, *, bends: bool = False) -> Tensor:
        """The product of a curvature of the objective with `v`, from one of the loss.

        Args:
            v: Shape `(n,)`, or `(k, n)` for `k` products in one vectorized pass.
            multiply: Takes tensors shaped like the parameters and whether they are batched, and
                returns the product, None for zeros.
            bends: Whether the curvature of a manifold is part of it, as of a Hessian.

        Raises:
            RuntimeError: The parameters have moved since the evaluation.
        """
        objective = self._objective
        if objective.generation != self._generation:
            self.check()
        objective.settle(self._place)
        vector = objective.vector
        manifold = objective.manifold
        if manifold is not None:
            v = manifold.tangent(objective.position, v)
        direction = v if vector.scale is None else v * vector.scale
        products = multiply(vector.split(direction), v.dim() == 2)
        product = objective.product(direction, products)
        if manifold is not None:
            gradient = self.ambient if bends else None
            product = manifold.product(objective.position, direction, product, gradient)
        return product

    def diagonal(self, roots: Sequence[Tensor | None], count: int) -> Tensor:
        """The diagonal of a curvature of the loss, from random roots of it.

        Args:
            roots: `k` samples `q` with `E[q q']` equal to the curvature, in parts `(k, ...)` shaped
                like the parameters; None for zeros. The roots of other ranks are independent.
            count: `k`.

        Returns:
            The mean of `q * q` with the diagonal of the regularization, `(n,)`, not negative.
        """
        self.check()
        return self._objective.diagonal(roots, count)

    def slots(self) -> list[Slot]:
        """The place of each parameter in the work vector."""
        return self._objective.slots()

    @property
    def vector(self) -> ParameterVector:
        """The map from the parameters to the work vector."""
        return self._objective.vector

    @property
    def registry(self) -> ModuleRegistry:
        """The record of modules, graphs and closures."""
        return self._objective.registry

    @property
    def maximizes(self) -> bool:
        """True if the loss is maximized."""
        return self._objective._sign < 0

    def decay_gradient(self) -> Tensor | None:
        """The part of the gradient that weight decay adds, `(n,)`; None for zeros."""
        objective = self._objective
        if not objective._decays:
            return None
        return objective.vector.scaled(objective._decay * objective.position)

    def check_transposable(self) -> None:
        """See `Graph.check_transposable`."""
        self.graph.check_transposable(self._objective.registry.graphs)

    def check(self) -> None:
        """Makes the graph usable: puts the parameters back to where it was made.

        Raises:
            RuntimeError: The parameters have moved since the evaluation.
        """
        if self._objective.generation != self._generation:
            raise RuntimeError(
                "this evaluation belongs to an earlier point: the parameters have moved since, "
                "evaluate(curvature=True) again"
            )
        self._objective.settle(self._place)

    def renew(self) -> bool:
        """Makes the graph again, of copies that nobody writes; says whether it is another one.

        It is for graphs whose products raise `Overwritten`.
        """
        self.check()
        kind: Curvature = True if self.graph.twice else "jacobian"
        again = None if self._copies else self._objective.evaluated_again(kind)
        if again is None or again.graph is None:
            return False
        self.graph, self._copies, self._place = again.graph, again.copies, again.place
        return True


class Objective(ABC):
    """A function of the parameters, for the length of one step.

    Use it as a context: leaving it settles what the evaluations have touched; leaving it by an
    exception puts the parameters back to where they were on entry.

    Args:
        vector: The parameters, or their vector.
        regularization: Changes to the loss before it is minimized.
        master: The position in work precision, if it is known better than the parameters hold it
            (see `ParameterVector.read`).
        registry: The record of modules, ranks and closures that earlier steps have made.

    Attributes:
        vector: Maps the parameters to the work vector.
        position: The position of the parameters, shape `(n,)`, without the scale.
        evaluations: The number of evaluations of the loss.
        examinations: How many of these only examined the buffers that modules move.
        limit: The largest number of evaluations; one more raises `EvaluationsSpent`.
        renewed: Whether the function has changed since the last evaluation: buffers that the loss
            depends on have moved on with an accepted step.
        generation: Counts the moves; an evaluation's linearization is valid for one.
        box: The bounds that every position is kept in; None for none.
        manifold: The manifold that positions, gradients and products are along; None for none.
        registry: The record of modules, ranks and closures.
        ranks: The ranks that the loss is averaged over.
        autocast: The autocast regions in which closures run, those around the place where this was
            made: dtypes by device type.
    """

    def __init__(
        self,
        vector: ParameterVector | Iterable[Tensor],
        regularization: Regularization | None = None,
        master: Tensor | None = None,
        registry: ModuleRegistry | None = None,
    ) -> None:
        self.vector = vector if isinstance(vector, ParameterVector) else ParameterVector(vector)
        self.registry = registry or ModuleRegistry()
        self.ranks = self.registry.ranks
        self.position = self.vector.read(master)
        self.evaluations = self.examinations = 0
        self.limit: float = inf
        self.renewed = False
        self.generation = 0
        self.box: Box | None = None
        self.manifold: Manifold | None = None
        self._entry = self.position
        # The position that the parameters hold now; None if it is that of a trial and not kept.
        self._placed: Tensor | None = self.position
        # The last trial: step and factor, and its position if that is short.
        self._tried: Tried | None = None
        self._abandoned = False
        self._unseen = False  # whether the parameters moved without a trace
        self._last_evaluation: ref[Evaluation] | None = None
        self._replay = Replay(self.registry, self.vector.devices)
        self.autocast = self._replay.autocast
        regularization = regularization or Regularization()
        self._sign = -1.0 if regularization.maximize else 1.0
        self._regularization = regularization
        decay = regularization.weight_decay
        # A number stays one: where it is the same everywhere it needs no vector.
        self._decay = self.vector.expand(decay) if isinstance(decay, tuple) else decay
        self._decays = bool(decay)
        # Whether the objective is the loss, in this process.
        plain = self.vector.scale is None and not self.vector.sharded
        self._unchanged = plain and self._sign > 0 and not self._decays

    @property
    @abstractmethod
    def source(self) -> Callable[..., Any]:
        """The closure or function that products come from, for `ModuleRegistry.knows`."""

    @property
    def precision(self) -> float:
        """The machine epsilon that gradients are computed with, as far as that is known."""
        return max(self.vector.precision, self._replay.precision)

    @property
    def noise(self) -> float:
        """The relative precision of the loss, as far as the parameters' precision tells it."""
        return self.vector.precision * (1.0 if self.manifold is None else NOISE)

    def evaluate(self, *, curvature: Curvature = False) -> Evaluation:
        """Loss and gradient where the parameters stand.

        Args:
            curvature: Whether to retain the graph for second-order products. `"jacobian"` retains
                the graph of the loss, but makes none of the gradient: it takes the time of an
                evaluation without curvature, and no operation needs a second derivative. It is
                enough for a `ResidualJacobian` and for what is made of Jacobians alone.

        Raises:
            ValueError: `curvature` is another string.
        """
        self.renewed = False
        return self._evaluate_at(self.position, curvature)

    def trial(self, step: Tensor, t: float = 1.0, *, curvature: Curvature = False) -> Evaluation:
        """Loss and gradient at a distance; `position` stays.

        The parameters go back there lazily: before the next product, evaluation or move of this
        objective, at the end of its context, or when `settle` is called.

        Args:
            step: Shape `(n,)`, in the work space.
            t: A factor of the step.
            curvature: Whether to retain the graph for the case that this is accepted, see `accept`
                and `evaluate`; until then no product can be made from it.
        """
        position = self._moved(step, t)
        # A long one is not kept: it is made again where it is needed.
        self._tried = (step, t, position if self.vector.is_short else None)
        evaluation = self._evaluate_at(position, curvature)
        if evaluation.linearization is not None:
            evaluation.linearization.suspend()
        if self._placed is position and not self.vector.is_short:
            self._placed = None
        return evaluation

    def accept(self, step: Tensor, t: float = 1.0, trial: Evaluation | None = None) -> None:
        """Moves the parameters by `t` times `step`, `(n,)`; earlier linearizations end here.

        Args:
            step: As given to `trial`.
            t: As given to `trial`.
            trial: The evaluation there. If it has a graph, products are made from that now.
        """
        tried, at, position = self._tried or (None, t, None)
        again = tried is step and at == t
        # A function is evaluated without moving the parameters.
        there = again and self._placed is not self.position
        graph = None if trial is None else trial.linearization
        if not again or position is None:
            bounded = self.box is not None or self.manifold is not None
            if self.position is self._entry or self.vector.is_short or bounded:
                position = self._moved(step, t)
            else:
                self._complete_last()
                # In place: a vector's memory costs as much as the arithmetic.
                position = self.position.add_(self.vector.scaled(step), alpha=t)
        self._go(position, there=there, unseen=graph is not None)
        if self.registry.moving:
            self._move_buffers_on(there)
        if graph is not None:
            graph.resume()

    def _moved(self, step: Tensor, t: float) -> Tensor:
        """The position at `t` times `step` from the current one, within the box."""
        within = self.box or self.manifold
        if within is not None:
            return within.moved(self.position, step, t)
        scale = self.vector.scale
        return torch.add(self.position, step if scale is None else step * scale, alpha=t)

    def project(self) -> bool:
        """Moves the parameters into the box, if they are outside; says whether they were."""
        assert self.box is not None
        inside = self.box.project(self.position)
        if torch.equal(inside, self.position):
            return False
        self._go(inside)
        return True

    def return_to_entry(self) -> None:
        """Moves the parameters back to where this objective was entered."""
        self._complete_last()
        self._go(self._entry)

    def _move_buffers_on(self, there: bool) -> None:
        """Moves buffers that the loss depends on as one evaluation here would have moved them.

        Args:
            there: Whether the last evaluation was here.
        """
        for kind in self.registry.unknown_kinds():
            self._examine(kind)
            there = True
        if not self.registry.buffers_in_loss():
            return
        if not there:
            self._evaluate_at(self.position, False)
        self.renewed = self._replay.move_on()

    def _examine(self, kind: type) -> None:
        """Finds whether the loss depends on the buffers that modules of a class move."""
        before = self.evaluations
        first = self._loss_here()
        with self._replay.moved(kind):
            moved = self._loss_here()
        repeated = self._loss_here()
        self.examinations += self.evaluations - before
        # A loss that differs a second time, on devices that add in any order, shows nothing.
        in_loss = abs(moved - first) > 10 * abs(repeated - first)
        self.registry.note_kind(kind, in_loss)

    def _loss_here(self) -> float:
        return self._evaluate_at(self.position, False).loss.item()

    def settle(self, place: Tensor | None = None) -> None:
        """Puts the parameters back to `position` after a trial.

        Args:
            place: Another one, for a graph that was made there.
        """
        place = self.position if place is None else place
        if self._placed is not place:
            self.vector.move(place)
            self._placed = place
        self._tried = None  # it is a vector, and nothing stands there any more

    def evaluated_again(self, curvature: Curvature = True) -> Run | None:
        """The evaluation at `position` with a graph of copies; None where there can be none.

        Args:
            curvature: See `evaluate`.
        """
        source = self._captured_source
        if source is None:
            return None
        self._note_writes(source)
        self._complete_last()
        self.settle()
        with torch.enable_grad():
            again = self._run(self.position, curvature)
        self.evaluations += 1
        return again

    @property
    def _captured_source(self) -> Callable[..., Any] | None:
        """The closure or function that graphs come from; None if they cannot be made again."""
        return None

    def _copies(self, source: Callable[..., Any]) -> bool:
        """True if graphs of a closure or function have to be of copies."""
        return self.registry.knows(source, _WRITES)

    def _note_writes(self, source: Callable[..., Any]) -> None:
        self.registry.note(source, _WRITES)

    def has_room_for_a_graph(self) -> bool:
        """True if a graph may be kept beside that of the position: if all in use fits twice.

        If buffers move on with an accepted step, the graph of a trial is of another function. A
        graph is kept on all ranks or on none: gradients are averaged differently with one.
        """
        return not self.ranks.any(not self._has_room_here(), self.vector.device)

    def _has_room_here(self) -> bool:
        registry = self.registry
        if registry.moving and (registry.buffers_in_loss() or registry.unknown_kinds()):
            return False
        for device in self.vector.devices:
            if device.type == "cuda" and free_memory(device) < torch.cuda.memory_allocated(device):
                return False
        return True

    def abandon(self) -> None:
        """Marks the step as failed: its end leaves buffers as they were before it."""
        self._abandoned = True

    def product(self, direction: Tensor, products: Sequence[Tensor | None]) -> Tensor:
        """Turns a product with the loss's curvature into one with the objective's.

        Args:
            direction: The direction that was multiplied, `(n,)` or `(k, n)`, scale applied.
            products: The parts of the product, shaped like the parameters; None for zeros.
        """
        flat = self.vector.gather(products, batch=direction.shape[:-1])
        if self._sign < 0:
            flat.neg_()
        if self.ranks.met:
            flat = self.ranks.average_(flat)
        if self._decays:
            flat.add_(self._decay * direction)
        scale = self.vector.scale
        return flat if scale is None else flat * scale

    def slots(self) -> list[Slot]:
        """See `Linearization.slots`."""
        slots = self.vector.slots()
        decay = self._regularization.weight_decay
        decays = decay if isinstance(decay, tuple) else (decay,) * len(slots)
        return [Slot(*slot, slot[2] ** 2 * d) for slot, d in zip(slots, decays, strict=True)]

    def diagonal(self, roots: Sequence[Tensor | None], count: int) -> Tensor:
        """See `Linearization.diagonal`."""
        flat = self.ranks.join_roots_(self.vector.gather(roots, batch=(count,)))
        diagonal = self.vector.scaled(flat).square_().mean(0)
        if self._decays:
            decay = self.vector.scaled(self.vector.scaled(torch.ones_like(diagonal)))
            diagonal.add_(decay.mul_(self._decay))
        return diagonal

    @abstractmethod
    def _run(self, position: Tensor, curvature: Curvature) -> Run:
        """Evaluates at `position`."""

    def _evaluate_at(self, position: Tensor, curvature: Curvature) -> Evaluation:
        if curvature and not isinstance(curvature, bool):
            check_choice("curvature", curvature, ("jacobian",), "a bool")
        if self.evaluations >= self.limit:
            raise EvaluationsSpent
        self._complete_last()
        vector, ranks = self.vector, self.ranks
        before = torch.is_grad_enabled()
        try:
            set_grad_mode(True)
            if curvature:
                found = self._run_on_all_ranks(position, curvature)
            else:
                found = self._run(position, False)
        except BaseException:
            self.settle()
            raise
        finally:
            set_grad_mode(before)
        self.evaluations += 1
        loss = found.loss.detach()
        if loss.dtype != vector.dtype or loss.device != vector.device:
            loss = loss.to(vector.device, torch.promote_types(vector.dtype, loss.dtype))
        if ranks.met:
            loss = ranks.average(loss)
        closure_loss = loss
        flatten: Callable[[], Tensor]
        if self._unchanged and (found.averaged or not ranks.met):
            flatten = partial(vector.gather, found.gradients)
        else:
            if vector.sharded:
                loss = closure_loss = vector.space.mean(loss)
            if self._sign < 0:
                loss = -loss
            if self._decays:
                loss = loss + 0.5 * vector.space.total((self._decay * position) @ position)
            flatten = partial(self._flat_gradient, found, position if self._decays else None)
        linearization = None
        if found.graph is not None:
            linearization = Linearization(self, found.graph, copies=found.copies, place=found.place)
        evaluation = Evaluation(loss, closure_loss, flatten, linearization)
        if self.manifold is not None:
            tried = None if position is self.position else self._tried
            evaluation.put_on(self.manifold, self.position, tried)
        self._last_evaluation = ref(evaluation)
        return evaluation

    def _complete_last(self) -> None:
        """Flattens the gradient of the last evaluation before what it is made of changes."""
        if self._last_evaluation is not None and (last := self._last_evaluation()) is not None:
            _ = last.grad

    def _run_on_all_ranks(self, position: Tensor, curvature: Curvature) -> Run:
        """Evaluates with curvature; if one rank finds no second derivative, no rank does.

        Others would wait for products that this one cannot have a part in.
        """
        ranks, device = self.ranks, self.vector.device
        try:
            found = self._run(position, curvature)
        except MissingSecondDerivative:
            ranks.any(True, device)
            raise
        if ranks.met and ranks.any(False, device):
            raise MissingSecondDerivative(
                "an operation inside the closure of another rank has no second derivative; the "
                "error of that rank names it"
            )
        return found

    def _flat_gradient(self, found: Run, position: Tensor | None) -> Tensor:
        grad = self.vector.gather(found.gradients)
        if self.ranks.met and not found.averaged:
            grad = self.ranks.average_(grad)
        if self._sign < 0:
            grad.neg_()
        if position is not None:
            grad.add_(self._decay * position)
        scale = self.vector.scale
        return grad if scale is None else grad * scale

    def _go(self, position: Tensor, *, there: bool = False, unseen: bool = False) -> None:
        if unseen:
            # A graph that was made there is going to be used: others notice at the end.
            if not there:
                self.vector.move(position)
            self._unseen = True
        elif there:
            # They are there already; a graph that saved them earlier still has to notice.
            increment_version(self.vector.params)
        else:
            self.vector.write(position)
        self.position = self._placed = position
        self._tried = None
        self.generation += 1

    def __enter__(self) -> Objective:
        self._entry = self.position
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._placed is not self.position:
            self.settle()
        self._tried = None
        if self._unseen:
            increment_version(self.vector.params)
        if kind is not None and self.position is not self._entry:
            self._go(self._entry)
        self._replay.finish(aborted=self._abandoned or kind is not None)
