"""The retained graph of an evaluation: gradients that can be differentiated again, and outputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from torch_secondorder._autograd.custom_functions import (
    Finding,
    finding_at,
    marked_once_differentiable,
    unseen,
)
from torch_secondorder._foundation.private_torch import (
    FORWARD_CLASS,
    engine_run_backward,
    output_size,
    plainly,
)
from torch_secondorder._foundation.subclasses import plain

#: A product with a curvature of the loss: parts of the direction, whether they are batched.
Multiply: TypeAlias = Callable[[Sequence[Tensor], bool], Sequence[Tensor | None]]

_COMPILED = (
    "a module compiled by torch.compile has no second derivative. Pass a pure function instead of "
    "the closure, optimizer.step(FunctionalObjective(f, params, compile=True)), which compiles the "
    "products as well; or leave the module as it is; or use products that need none (NewtonCG "
    'takes curvature_products="finite_difference", Sophia and AdaHessian estimator="gnb"), or an '
    "optimizer that needs gradients only"
)
_REENTRANT = (
    "activation checkpointing with use_reentrant=True; False works: the reentrant kind lets no "
    "second derivative through, and no first one that loss.backward() does not take itself. Pass "
    "checkpoint(..., use_reentrant=False), or gradient_checkpointing_kwargs={'use_reentrant': "
    "False} where a trainer does it"
)
_ONCE = (
    'this evaluation was made with curvature="jacobian", which keeps no graph of the gradient for '
    "second derivatives: make it with evaluate(curvature=True)"
)
_SOME_MARKED = "a custom function marked once_differentiable"
#: The finding for a reentrant checkpoint.
REENTRANT = Finding("CheckpointFunction", False, False, "use_reentrant=True")


_INSTEAD = (
    "Use an implementation of it that has one, products that need none (NewtonCG takes "
    'curvature_products="finite_difference"), or an optimizer that needs gradients only (LBFGS)'
)
#: The same for optimizers that evaluate once a step.
INSTEAD_OF_ESTIMATES = (
    'Use estimator="gnb", which needs none (the loss is one of torch.nn.functional, or outputs are '
    "marked with mark_outputs), an implementation of it that has one, or an optimizer that needs "
    "gradients only (SOAP)"
)


class MissingSecondDerivative(RuntimeError):
    """An operation inside the closure has no second derivative, or a wrong one.

    Attributes:
        operation: Which one, and what is wrong with it; empty where there is a way out for this
            one alone, which the message tells.
    """

    def __init__(self, message: str, operation: str = "") -> None:
        super().__init__(message)
        self.operation = operation

    @classmethod
    def of(cls, operation: str, instead: str = _INSTEAD) -> MissingSecondDerivative:
        """The error for an operation, with what to do instead."""
        what = f"an operation inside the closure has no second derivative: {operation}"
        return cls(f"{what}. {instead}", operation)


#: Operations of PyTorch itself, by their nodes.
_WRONG = {"WeightNormInterfaceBackward0": "torch._weight_norm, whose norms count as constants"}


class Suspect(NamedTuple):
    """A custom function in a graph that is not differentiated rightly.

    Attributes:
        node: Where it is.
        finding: What is wrong.
    """

    node: Any
    finding: Finding


class Overwritten(RuntimeError):
    """A tensor that a graph has saved was changed in place since.

    Closures may do that: writing once for each evaluation is harmless in a loop that uses the graph
    at once, but here the graph of one evaluation is used after others. With a graph of copies it is
    harmless as well, see `Capture`.
    """


@dataclass(frozen=True, slots=True)
class Output:
    """A model output that a captured evaluation met.

    Attributes:
        tensor: The output, with its graph; never a leaf. What the closure has, class and all.
        loss: The standard loss that took it as an argument, or None where it was marked by hand.
        argument: The argument's name, `"input"` for most.
        arguments: The loss's arguments by name, defaults included (`target`, `reduction`, ...);
            plain tensors.
        value: What the loss returned, or its place in the graph; None where it was marked by hand.
            The closure has a copy, so that `loss += penalty` cannot reach it.
        versions: Version counters of the tensors among the arguments.
    """

    tensor: Tensor
    loss: Callable[..., Any] | None = None
    argument: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    value: Tensor | GradientEdge | None = None
    versions: tuple[int, ...] = ()

    @property
    def values(self) -> Tensor:
        """The output without its graph."""
        return plain(self.tensor).detach()

    @property
    def intact(self) -> bool:
        """True if the loss's arguments are unchanged."""
        return self.versions == versions(self.arguments.values())


class LinearCall(NamedTuple):
    """A call of `torch.nn.functional.linear` with a parameter, a real matrix, as its weight.

    Attributes:
        input: What was multiplied, `(..., in)`.
        weight: Which of the parameters.
        bias: Which of the parameters; None for none, or for one that is not among them.
        output: Where the output stands in the graph; its values are not kept.
        intact: Whether the input still is what was multiplied.
    """

    input: Tensor
    weight: int
    bias: int | None
    output: GradientEdge
    intact: bool


@dataclass(slots=True)
class Graph:
    """The retained graph of one evaluation: gradients that can be differentiated again.

    Attributes:
        params: What was differentiated with respect to, `P` tensors.
        losses: What `backward()` was called on, one for each call.
        weights: The `gradient` argument of each call, None for one.
        gradients: One list of `P` gradients (None where a parameter had no part) for each
            `backward()`; the evaluation's gradient is their sum.
        outputs: The outputs met, in order.
        linear: Calls of `torch.nn.functional.linear`, in order: node, the input's version counter,
            and arguments.
        suspects: Custom functions met that are not differentiated rightly.
        curving: Those between losses and parameters that have the wrong second derivative, but can
            be multiplied with as a Jacobian; all others are refused.
        kind: Tells graphs of different operations apart, as far as that costs nothing.
        twice: Whether the gradients have a graph of their own. There are none here if not.
        instead: What to do where an operation has no second derivative.
        mended: Names of nodes whose second derivative is not PyTorch's, but the right one.
    """

    params: Sequence[Tensor]
    losses: list[Tensor] = field(default_factory=list)
    weights: list[Tensor | None] = field(default_factory=list)
    gradients: list[tuple[Tensor | None, ...]] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    linear: list[tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = field(
        default_factory=list
    )
    suspects: list[Suspect] = field(default_factory=list)
    curving: list[Suspect] = field(default_factory=list)
    kind: tuple[Hashable, ...] = ()
    twice: bool = True
    instead: str = _INSTEAD
    mended: Collection[str] = ()

    def linear_calls(self) -> list[LinearCall]:
        """The linear layers met whose weights are among the parameters."""
        places = dict(zip(map(id, self.params), itertools.count(), strict=False))
        found = []
        for node, version, args, kwargs in self.linear:
            call = _linear_call(places, node, version, *args, **kwargs)
            if call is not None:
                found.append(call)
        return found

    def differentiate(
        self, loss: Tensor, weight: Tensor | None = None, *, twice: bool = True
    ) -> tuple[Tensor | None, ...]:
        """Adds `loss` to the graph and returns its gradients.

        Args:
            loss: What `backward()` was called on.
            weight: The `gradient` argument of `backward()`, of the loss's shape.
            twice: Whether the gradients get a graph of their own.

        Raises:
            MissingSecondDerivative: There is a reentrant checkpoint on the way to the parameters,
                or, with `twice`, a custom function whose backward cannot be differentiated at all.
        """
        if type(loss) is not Tensor:
            loss = plain(loss)
        if weight is not None:
            weight = plain(weight)
        if self.suspects:
            self._judge(loss, twice)
        try:
            with plainly():
                gradients = torch.autograd.grad(
                    loss,
                    self.params,
                    weight,
                    retain_graph=True,
                    create_graph=twice,
                    allow_unused=True,
                )
        except RuntimeError as error:
            raise explained(error, self.instead) from error
        self.losses.append(loss)
        self.weights.append(weight)
        self.gradients.append(gradients)
        return gradients

    def require_second_derivatives(self) -> None:
        """Raises if the gradients have no graph of their own.

        Raises:
            ValueError: They have none.
        """
        if not self.twice:
            raise ValueError(_ONCE)

    def check_transposable(self, known: set[Hashable]) -> None:
        """Checks that the gradient may be differentiated by what comes in, as for `J v`.

        Where gradients have a graph this was checked when they were made.

        Args:
            known: See `check_once`.

        Raises:
            MissingSecondDerivative: There is an operation where that would be wrong.
        """
        if not self.twice:
            refuse([s for s in self.curving if not s.finding.transposes], self.instead)
            self.check_once(known)

    def _judge(self, loss: Tensor, twice: bool) -> None:
        met = set(_nodes([loss]))
        found = [s for s in self.suspects if s.node in met]
        if any(s.finding.name == REENTRANT.name for s in found):
            raise reentrant()
        params = {id(p) for p in self.params}
        found = [s for s in found if _reaches(s.node, params)]
        if twice:
            refuse([s for s in found if not s.finding.transposes], self.instead)
        self.curving += found

    def compiled(self, kind: Hashable, build: Callable[[Graph], Multiply]) -> Multiply | None:
        """A product of some kind as compiled code; None where this is a graph that has no such.

        Args:
            kind: Tells the products of one evaluation apart.
            build: Gives the product with another graph of the same evaluation.
        """
        return None

    def nodes(self) -> Iterator[Any]:
        """All nodes that the losses depend on."""
        return _nodes(self.losses)

    def size(self) -> int:
        """The number of elements of all intermediate results, as far as their nodes tell."""
        return sum(map(output_size, self.nodes()))

    def check_once(self, known: set[Hashable], twice: bool = True) -> None:
        """Calls `check_differentiable` where this is a graph of a kind that is new.

        Args:
            known: The kinds that were looked over; this one is added.
            twice: Whether second derivatives are needed.
        """
        kind = self.kind, twice
        if kind not in known:
            self.check_differentiable(twice)
            known.add(kind)

    def check_differentiable(self, twice: bool = True) -> None:
        """Checks each operation, and raises if a derivative would be silently wrong.

        PyTorch cuts the graph at the backward of a function marked `once_differentiable`, and at
        reentrant checkpoints, and never reports it in `torch.autograd.grad`: gradients or products
        would lack what passes through there.

        Args:
            twice: Whether second derivatives are needed.

        Raises:
            MissingSecondDerivative: There is such an operation.
        """
        # Where what comes in is constant, nothing in the gradient's graph tells of the cut.
        self.check_nodes(self.nodes(), twice)
        if not twice:
            return
        for node in _nodes(g for gs in self.gradients for g in gs if g is not None):
            if node.name() == "torch::autograd::Error":
                raise MissingSecondDerivative.of(_SOME_MARKED, self.instead)
            if node.name() == "CheckpointFunctionBackward":
                raise reentrant()

    def check_nodes(self, nodes: Iterable[Any], twice: bool = True) -> None:
        """Checks the operations at some nodes, see `check_differentiable`.

        Args:
            nodes: Nodes of the graph.
            twice: Whether second derivatives are needed.

        Raises:
            MissingSecondDerivative: There is one without.
        """
        names: set[str] = set()
        for node in nodes:
            if node.name() == "CheckpointFunctionBackward":
                raise reentrant()
            if twice and node.name() not in self.mended:
                names.update(_wrong(node))
        if names:
            raise MissingSecondDerivative.of(", ".join(sorted(names)), self.instead)

    def hessian_product(
        self, tangents: Sequence[Tensor], batched: bool = False, *, retain: bool = True
    ) -> tuple[Tensor | None, ...]:
        """The Hessian of the evaluated loss times a direction, by a second backward pass.

        Args:
            tangents: The direction, shaped like the parameters; with `batched`, each with a leading
                dimension `k`.
            batched: Whether `k` directions are multiplied in one vectorized pass.
            retain: Whether the graph is needed again; its memory is freed on the way if not.

        Returns:
            `P` tensors shaped like the tangents, None where the loss is linear in the parameter.

        Raises:
            ValueError: The gradients have no graph of their own.
            MissingSecondDerivative: A custom function has a wrong one.
        """
        self.require_second_derivatives()
        if self.curving:
            refuse(self.curving, self.instead)
        outputs, weights = [], []
        for gradients in self.gradients:
            for gradient, tangent in zip(gradients, tangents, strict=True):
                # A gradient without a graph does not depend on the parameters: its rows are zero.
                if gradient is not None and gradient.requires_grad:
                    outputs.append(gradient)
                    weights.append(tangent)
        if not outputs:
            return (None,) * len(self.params)
        try:
            if not batched:
                # `torch.autograd.grad` without its look at every shape, which takes four
                # microseconds a parameter; these fit.
                products: tuple[Tensor | None, ...] = engine_run_backward(
                    tuple(outputs),
                    tuple(weights),
                    retain,
                    False,
                    tuple(self.params),
                    True,
                    accumulate_grad=False,
                )
                return products
            with plainly():
                return torch.autograd.grad(
                    outputs,
                    self.params,
                    weights,
                    retain_graph=retain,
                    allow_unused=True,
                    is_grads_batched=batched,
                )
        except RuntimeError as error:
            raise explained(error, self.instead) from error


def _linear_call(
    places: dict[int, int],
    node: Any,
    version: tuple[int, ...],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> LinearCall | None:
    place = places.get(id(weight))
    if place is None or node is None or weight.dim() != 2 or weight.is_complex():
        return None
    try:
        input = plain(input).detach()
    except RuntimeError:  # a tensor of a torch.func transform that is over
        return None
    if input.layout is not torch.strided:
        return None
    added = None
    if bias is not None and bias.shape == weight.shape[:1]:  # else it is broadcast
        added = places.get(id(bias))
    return LinearCall(input, place, added, GradientEdge(node, 0), versions([input]) == version)


def _nodes(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """All nodes of the graph below some tensors."""
    return walk(t.grad_fn for t in tensors if t.grad_fn is not None)


def walk(nodes: Iterable[Any]) -> Iterator[Any]:
    """Some nodes and all nodes below them, breadth first.

    The order decides which random numbers an output gets, see `standard_losses`.
    """
    found = list(dict.fromkeys(nodes))
    seen = set(found)
    for node in found:  # grows on the way
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                found.append(following)


def _reaches(node: Any, params: Collection[int]) -> bool:
    """True if a path leads from a node to one of some leaves, given by their ids."""
    return any(id(getattr(n, "variable", None)) in params for n in walk([node]))


def refuse(suspects: Sequence[Suspect], instead: str = _INSTEAD) -> None:
    """Raises `MissingSecondDerivative` with the names of the custom functions, if there are any."""
    if suspects:
        names = sorted({str(s.finding) for s in suspects})
        raise MissingSecondDerivative.of("; ".join(names), instead)


def _wrong(node: Any) -> Iterator[str]:
    """The name of an operation whose second derivative is known to be wrong."""
    function = getattr(type(node), FORWARD_CLASS, None)
    if function is not None and marked_once_differentiable(function):
        yield f"{function.__name__}, marked once_differentiable"
    elif unseen(node):
        yield str(finding_at(node))
    if node.name() in _WRONG:
        yield _WRONG[node.name()]


def added(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """The sum of two gradients, dense or sparse; None for zeros."""
    if first is None or second is None:
        return second if first is None else first
    # To a sparse tensor no dense one can be added.
    return second + first if first.is_sparse else first + second


def explained(error: RuntimeError, instead: str = _INSTEAD) -> RuntimeError:
    """Says what to do where an operation of the model cannot be differentiated twice."""
    text = str(error)
    if "donated buffers" in text or "torch.compile with aot_autograd" in text:
        return MissingSecondDerivative(_COMPILED)
    if "modified by an inplace operation" in text:
        return Overwritten(text)
    if "use_reentrant=True" in text:
        return reentrant()
    signs = ("is not implemented", "once_differentiable", "double backward")
    return MissingSecondDerivative.of(text, instead) if any(s in text for s in signs) else error


def reentrant() -> MissingSecondDerivative:
    """The error for reentrant checkpoints."""
    return MissingSecondDerivative(_REENTRANT)


def versions(arguments: Iterable[Any]) -> tuple[int, ...]:
    """The version counters of the tensors among a call's arguments."""
    found = []
    for value in arguments:
        if isinstance(value, Tensor) and not value.is_inference():
            found.append(value._version)  # noqa: PERF401 - on the way of each evaluation
    return tuple(found)
