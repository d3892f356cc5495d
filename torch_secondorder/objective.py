"""What an optimizer minimizes: one protocol, fed by a closure or by a pure function.

An `Objective` lives for one step. It evaluates loss, gradient and (where asked) the retained graph
at the parameters, tries moves without losing the place, and accepts one. Weight decay, `maximize`
and relative learning rates are applied here and nowhere else, so that every optimizer above works
on one plain function of one flat vector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils import _pytree as pytree

from torch_secondorder.capture import Capture, Graph
from torch_secondorder.replay import Replay, Surroundings
from torch_secondorder.vector import ParameterVector

__all__ = [
    "ClosureObjective",
    "Evaluation",
    "FunctionalObjective",
    "Linearization",
    "Objective",
    "Regularization",
]

STANDARD_CLOSURE = """\
    def closure():
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss
    optimizer.step(closure)"""


@dataclass(frozen=True, slots=True)
class Regularization:
    """What is done to a loss before it is minimized: `sign * loss + sum(decay * theta**2) / 2`.

    Attributes:
        maximize: Whether the sign is -1.
        weight_decay: One coefficient, or one for each parameter.
    """

    maximize: bool = False
    weight_decay: float | tuple[float, ...] = 0.0


class Evaluation:
    """Facts about one point; made once, passed along, never recomputed.

    Attributes:
        loss: What is minimized, regularization included: 0-dim, detached, in work precision.
        closure_loss: The loss as the closure returned it (averaged over ranks), detached.
        linearization: The retained graph, present only where curvature was asked for.
    """

    __slots__ = ("__weakref__", "_flatten", "_grad", "closure_loss", "linearization", "loss")

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
        self._flatten: Callable[[], Tensor] | None = flatten
        self._grad: Tensor | None = None

    @property
    def grad(self) -> Tensor:
        """The gradient in the work space, shape `(n,)`.

        Flattened when it is first asked for, at the latest before the next evaluation: who works on
        `p.grad` does not pay for it.
        """
        if self._flatten is not None:
            self._grad, self._flatten = self._flatten(), None
        assert self._grad is not None
        return self._grad


class _Raw(NamedTuple):
    """What one run of a closure or function gives, before regularization."""

    loss: Tensor
    grads: Sequence[Tensor | None]
    graph: Graph | None
    averaged: bool = False  # whether a DDP module has averaged the gradients over the ranks


class Linearization:
    """The second-order information at one evaluated point, valid until the parameters move on.

    Hides from operators what lies between the work vector and the graph: scale, sign, weight decay,
    the average over ranks.

    Attributes:
        graph: The retained graph.
    """

    def __init__(self, objective: Objective, graph: Graph) -> None:
        self.graph = graph
        self._objective = objective
        self._generation = objective.generation

    @property
    def size(self) -> int:
        """`n`."""
        return self._objective.vector.size

    def hessian_product(self, v: Tensor) -> Tensor:
        """The Hessian of the objective times `v`.

        Args:
            v: Shape `(n,)`, or `(k, n)` for `k` products in one vectorized pass.

        Raises:
            RuntimeError: The parameters have moved since the evaluation, or an operation of the
                model has no second derivative.
        """
        if self._objective.generation != self._generation:
            raise RuntimeError(
                "this evaluation belongs to an earlier point: the parameters have moved since, "
                "evaluate(curvature=True) again"
            )
        self._objective.settle()
        vector = self._objective.vector
        direction = vector.scaled(v)
        products = self.graph.hessian_product(vector.split(direction), batched=v.dim() == 2)
        return self._objective.product(direction, products)


class Objective(ABC):
    """A function of the parameters, for the length of one step.

    Use it as a context: leaving it settles what the evaluations have touched; leaving it by an
    exception puts the parameters back to where they were on entry.

    Args:
        vector: The parameters, or their vector.
        regularization: What is done to the loss before it is minimized.
        master: The position in work precision, if it is known better than the parameters hold it
            (see `ParameterVector.read`).
        surroundings: What earlier steps learned of the modules that are called.

    Attributes:
        vector: Maps the parameters to the work vector.
        position: Where the parameters are, shape `(n,)`, without the scale.
        evaluations: How many times the loss was evaluated.
        generation: Counts the moves; an evaluation's linearization is valid for one.
    """

    def __init__(
        self,
        vector: ParameterVector | Iterable[Tensor],
        regularization: Regularization | None = None,
        master: Tensor | None = None,
        surroundings: Surroundings | None = None,
    ) -> None:
        self.vector = vector if isinstance(vector, ParameterVector) else ParameterVector(vector)
        self.position = self.vector.read(master)
        self.evaluations = 0
        self.generation = 0
        self._entry = self.position
        self._placed = self.position  # what the parameters hold now: a trial leaves them there
        self._tried: tuple[Tensor, Tensor] | None = None  # the last trial's step and position
        self._last: Callable[[], Evaluation | None] = lambda: None
        self._surroundings = surroundings or Surroundings()
        self._replay = Replay(self._surroundings, self.vector.devices)
        regularization = regularization or Regularization()
        self._sign = -1.0 if regularization.maximize else 1.0
        decay = regularization.weight_decay
        # A number stays one: where it is the same everywhere it needs no vector.
        self._decay = self.vector.expand(decay) if isinstance(decay, tuple) else decay
        self._decays = bool(decay)

    @property
    def autocast(self) -> dict[str, torch.dtype]:
        """Device types for which a closure runs under autocast, as where this was made."""
        return self._replay.autocast

    def evaluate(self, *, curvature: bool = False) -> Evaluation:
        """Loss and gradient where the parameters stand.

        Args:
            curvature: Whether to retain the graph for second-order products.
        """
        return self._evaluate_at(self.position, curvature)

    def trial(self, step: Tensor) -> Evaluation:
        """Loss and gradient at a distance; `position` stays.

        The parameters go back there lazily: before the next product, evaluation or move of this
        objective, at the end of its context, or when `settle` is called.

        Args:
            step: Shape `(n,)`, in the work space.
        """
        position = self.position + self.vector.scaled(step)
        self._tried = (step, position)
        return self._evaluate_at(position, False)

    def accept(self, step: Tensor) -> None:
        """Moves the parameters by `step`, shape `(n,)`; earlier linearizations end here."""
        if self._tried is not None and self._tried[0] is step:
            self._go(self._tried[1])
        else:
            self._go(self.position + self.vector.scaled(step))

    def settle(self) -> None:
        """Puts the parameters back to `position` after a trial."""
        if self._placed is not self.position:
            self.vector.move(self.position)
            self._placed = self.position

    def product(self, direction: Tensor, products: Sequence[Tensor | None]) -> Tensor:
        """Turns a product with the loss's curvature into one with the objective's.

        Args:
            direction: What was multiplied, `(n,)` or `(k, n)`, scale applied.
            products: The parts of the product, shaped like the parameters; None for zeros.
        """
        flat = self.vector.gather(products, batch=direction.shape[:-1])
        if self._sign < 0:
            flat.neg_()
        flat = self._replay.average(flat)
        if self._decays:
            flat.add_(self._decay * direction)
        return self.vector.scaled(flat)

    @abstractmethod
    def _run(self, position: Tensor, curvature: bool) -> _Raw:
        """Evaluates at `position`."""

    def _evaluate_at(self, position: Tensor, curvature: bool) -> Evaluation:
        last = self._last()
        if last is not None:
            _ = last.grad  # before what it is made of changes
        try:
            with torch.enable_grad():
                raw = self._run(position, curvature)
        except BaseException:
            self.settle()
            raise
        self.evaluations += 1
        loss = raw.loss.detach()
        vector = self.vector
        if loss.dtype != vector.dtype or loss.device != vector.device:
            loss = loss.to(vector.device, torch.promote_types(vector.dtype, loss.dtype))
        loss = self._replay.average(loss)
        closure_loss = loss
        if self._sign < 0:
            loss = -loss
        if self._decays:
            loss = loss + 0.5 * ((self._decay * position) @ position)
        linearization = None if raw.graph is None else Linearization(self, raw.graph)
        flatten = partial(self._flat_gradient, raw, position)
        evaluation = Evaluation(loss, closure_loss, flatten, linearization)
        self._last = ref(evaluation)
        return evaluation

    def _flat_gradient(self, raw: _Raw, position: Tensor) -> Tensor:
        grad = self.vector.gather(raw.grads)
        if not raw.averaged:
            grad = self._replay.average(grad)
        if self._sign < 0:
            grad.neg_()
        if self._decays:
            grad.add_(self._decay * position)
        return self.vector.scaled(grad)

    def _check_once(self, source: Callable[..., Any], graph: Graph) -> None:
        """Looks over the graph of a closure or function that is new: it takes some time."""
        if not self._surroundings.knows("graph", source):
            graph.check_differentiable()
            self._surroundings.note("graph", source)

    def _go(self, position: Tensor) -> None:
        if self._placed is position:
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
        self.settle()
        if kind is not None and self.position is not self._entry:
            self._go(self._entry)
        self._replay.finish(aborted=kind is not None)


class ClosureObjective(Objective):
    """The objective behind a standard PyTorch closure.

    The closure zeroes gradients, computes the loss, calls `loss.backward()` and returns the loss;
    see the closure contract in the README for what else it may do.

    Args:
        closure: Called without arguments, returns the loss: a tensor with one element, or a number.
        vector: The parameters, or their vector.
        regularization: See `Objective`.
        master: See `Objective`.
        surroundings: See `Objective`.

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
        surroundings: Surroundings | None = None,
    ) -> None:
        if not callable(closure):
            raise TypeError(
                f"the closure must be callable, got {type(closure).__name__}; pass one like\n"
                + STANDARD_CLOSURE
            )
        super().__init__(vector, regularization, master, surroundings)
        self._closure = closure

    def _run(self, position: Tensor, curvature: bool) -> _Raw:
        params = self.vector.params
        # Whatever is in `p.grad` is of another evaluation, whether or not the closure clears it.
        for p in params:
            p.grad = None
        if position is not self._placed:
            self.vector.move(position)
            self._placed = position
        if curvature:
            return self._run_captured(params)
        loss = _scalar(self._replay.run(self._closure))
        grads = [p.grad for p in params]
        if grads[0] is None and all(g is None for g in grads):
            _differentiable(loss).backward()
            grads = [p.grad for p in params]
        return _Raw(loss, _touched(grads), None, averaged=True)

    def _run_captured(self, params: Sequence[Tensor]) -> _Raw:
        with Capture(params) as capture:
            loss = _scalar(self._replay.run(self._closure))
            if not capture.graph.gradients:
                if any(p.grad is not None for p in params):
                    raise RuntimeError(
                        "the closure made gradients without loss.backward(), so their graph is "
                        "lost: call loss.backward() instead of torch.autograd.backward(loss), "
                        "or return the loss without any backward"
                    )
                capture.backward(_differentiable(loss))
        self._check_once(self._closure, capture.graph)
        return _Raw(loss, _touched([p.grad for p in params]), capture.graph)


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
        surroundings: See `Objective`.

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
        surroundings: Surroundings | None = None,
    ) -> None:
        self._function = function
        self._tree = params
        self._leaves, self._structure = pytree.tree_flatten(params)
        super().__init__(vector or self._leaves, regularization, master, surroundings)
        places = {id(p): i for i, p in enumerate(self.vector.params)}
        self._places = [places.get(id(leaf)) for leaf in self._leaves]
        if all(place is None for place in self._places):
            raise ValueError(
                "the tree of parameters holds none of the optimizer's: pass the very tensors that "
                "the optimizer was given, for instance dict(model.named_parameters())"
            )

    def bind(
        self, vector: ParameterVector, regularization: Regularization, master: Tensor | None
    ) -> FunctionalObjective:
        """The same function on an optimizer's own vector and terms, for one step."""
        return FunctionalObjective(
            self._function, self._tree, vector, regularization, master, self._surroundings
        )

    def _run(self, position: Tensor, curvature: bool) -> _Raw:
        pieces = [piece.detach().requires_grad_() for piece in self.vector.split(position)]
        leaves = [
            leaf if place is None else pieces[place]
            for leaf, place in zip(self._leaves, self._places, strict=True)
        ]
        tree = pytree.tree_unflatten(leaves, self._structure)
        if not curvature:
            loss = _differentiable(_scalar(self._replay.run(lambda: self._function(tree))))
            return _Raw(loss, _touched(torch.autograd.grad(loss, pieces, allow_unused=True)), None)
        with Capture(pieces) as capture:
            loss = _differentiable(_scalar(self._replay.run(lambda: self._function(tree))))
        grads = capture.graph.differentiate(loss)
        self._check_once(self._function, capture.graph)
        return _Raw(loss, _touched(grads), capture.graph)


def _scalar(loss: Any) -> Tensor:
    """The loss as a 0-dim tensor."""
    if not isinstance(loss, Tensor):
        if isinstance(loss, (int, float)) and not isinstance(loss, bool):
            return torch.tensor(float(loss), dtype=torch.float64)
        raise TypeError(
            f"the closure must return the loss, got {type(loss).__name__} ({loss!r:.60}); end it "
            "with `return loss`"
        )
    if loss.numel() != 1 or loss.is_complex():
        raise ValueError(
            f"the closure must return a real scalar loss, got shape {tuple(loss.shape)} and dtype "
            f"{loss.dtype}; reduce it, for instance with .mean()"
        )
    return loss.reshape(()) if loss.dim() else loss


def _differentiable(loss: Tensor) -> Tensor:
    if not loss.requires_grad:
        raise _no_gradient()
    return loss


def _touched(grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    if grads[0] is None and all(g is None for g in grads):
        raise _no_gradient()
    return grads


def _no_gradient() -> RuntimeError:
    return RuntimeError(
        "no gradient reached any of the optimizer's parameters: the closure must compute its loss "
        "from them (not from copies, nor under torch.no_grad()) and call loss.backward():\n"
        + STANDARD_CLOSURE
    )
