"""What an evaluation leaves behind: gradients that can be differentiated again, and outputs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, _engine_run_backward

__all__ = [
    "Graph",
    "LinearCall",
    "MissingSecondDerivative",
    "Multiply",
    "Output",
    "explained",
    "versions",
]

#: A product with a curvature of the loss: parts of the direction, whether they are batched.
Multiply: TypeAlias = Callable[[Sequence[Tensor], bool], Sequence[Tensor | None]]

# The file of the wrapper that `once_differentiable` puts around a backward.
_MARKED_IN = once_differentiable(lambda *_: None).__code__.co_filename

_COMPILED = (
    "a module compiled by torch.compile has no second derivative. Pass a pure function instead of "
    "the closure, optimizer.step(FunctionalObjective(f, params, compile=True)), which compiles the "
    "products as well; or leave the module as it is; or use products that need none (NewtonCG "
    'takes curvature_products="finite_difference", Sophia and AdaHessian estimator="gnb"), or an '
    "optimizer that needs gradients only"
)
_REENTRANT = "activation checkpointing with use_reentrant=True; False works"


class MissingSecondDerivative(RuntimeError):
    """An operation inside the closure has no second derivative, or a wrong one."""


@dataclass(frozen=True, slots=True)
class Output:
    """A model output that a captured evaluation met.

    Attributes:
        tensor: The output, with its graph; never a leaf.
        loss: The standard loss that took it as an argument, or None where it was marked by hand.
        argument: The argument's name, `"input"` for most.
        arguments: The loss's arguments by name, defaults included (`target`, `reduction`, ...).
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
    def intact(self) -> bool:
        """Whether the loss's arguments still are what it was given."""
        return self.versions == versions(self.arguments)


class LinearCall(NamedTuple):
    """A call of `torch.nn.functional.linear` with a parameter, a real matrix, as its weight.

    Attributes:
        input: What was multiplied, `(..., in)`.
        weight: Which of the parameters.
        bias: Which of the parameters; None for none, or for one that is not among them.
        output: Where the output stands in the graph; its values are not kept.
    """

    input: Tensor
    weight: int
    bias: int | None
    output: GradientEdge


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
        linear: Calls of `torch.nn.functional.linear`, in order: node and arguments.
    """

    params: Sequence[Tensor]
    losses: list[Tensor] = field(default_factory=list)
    weights: list[Tensor | None] = field(default_factory=list)
    gradients: list[tuple[Tensor | None, ...]] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    linear: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def linear_calls(self) -> list[LinearCall]:
        """The linear layers met whose weights are among the parameters."""
        places = {id(p): i for i, p in enumerate(self.params)}
        calls = (_linear_call(places, node, *args, **kwargs) for node, args, kwargs in self.linear)
        return [call for call in calls if call is not None]

    def differentiate(
        self, loss: Tensor, weight: Tensor | None = None, *, twice: bool = True
    ) -> tuple[Tensor | None, ...]:
        """Adds `loss` to the graph and returns its gradients.

        Args:
            loss: What `backward()` was called on.
            weight: The `gradient` argument of `backward()`, of the loss's shape.
            twice: Whether the gradients get a graph of their own.
        """
        try:
            gradients = torch.autograd.grad(
                loss,
                self.params,
                weight,
                retain_graph=True,
                create_graph=twice,
                allow_unused=True,
            )
        except RuntimeError as error:
            raise explained(error) from error
        self.losses.append(loss)
        self.weights.append(weight)
        self.gradients.append(gradients)
        return gradients

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

    def check_differentiable(self) -> None:
        """Raises where a second derivative would be silently zero.

        PyTorch cuts the graph at the backward of a function marked `once_differentiable`, and at
        reentrant checkpoints, and never reports it in `torch.autograd.grad`: gradients or products
        would lack what passes through there.
        """
        # Where what comes in is constant, nothing in the gradient's graph tells of the cut.
        names = _once_differentiable(self.losses)
        if names:
            raise _no_second_derivative(f"{', '.join(names)}, marked once_differentiable")
        for node in _nodes(g for gs in self.gradients for g in gs if g is not None):
            if node.name() == "torch::autograd::Error":
                raise _no_second_derivative("a custom function marked once_differentiable")
            if node.name() == "CheckpointFunctionBackward":
                raise _no_second_derivative(_REENTRANT)

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
        """
        pairs = [
            (gradient, tangent)
            for gradients in self.gradients
            for gradient, tangent in zip(gradients, tangents, strict=True)
            # A gradient without a graph does not depend on the parameters: its rows are zero.
            if gradient is not None and gradient.requires_grad
        ]
        if not pairs:
            return (None,) * len(self.params)
        outputs, weights = zip(*pairs, strict=True)
        try:
            if not batched:
                # `torch.autograd.grad` without its look at every shape, which takes four
                # microseconds a parameter; these fit.
                products: tuple[Tensor | None, ...] = _engine_run_backward(
                    outputs, weights, retain, False, tuple(self.params), True, accumulate_grad=False
                )
                return products
            return torch.autograd.grad(
                outputs,
                self.params,
                weights,
                retain_graph=retain,
                allow_unused=True,
                is_grads_batched=batched,
            )
        except RuntimeError as error:
            raise explained(error) from error


def _linear_call(
    places: dict[int, int], node: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> LinearCall | None:
    place = places.get(id(weight))
    if place is None or node is None or weight.dim() != 2 or weight.is_complex():
        return None
    try:
        input = input.detach()
    except RuntimeError:  # a tensor of a torch.func transform that is over
        return None
    if input.layout is not torch.strided:
        return None
    added = None
    if bias is not None and bias.shape == weight.shape[:1]:  # else it is broadcast
        added = places.get(id(bias))
    return LinearCall(input, place, added, GradientEdge(node, 0))


def _nodes(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """All nodes of the graph below some tensors."""
    waiting = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


def _once_differentiable(losses: Iterable[Tensor]) -> list[str]:
    """The custom functions in a graph whose backward is marked `once_differentiable`."""
    names = set()
    for node in _nodes(losses):
        function: Any = getattr(type(node), "_forward_cls", None)
        backward = getattr(function, "backward", None)
        while backward is not None:
            code = getattr(backward, "__code__", None)
            if code is not None and code.co_filename == _MARKED_IN:
                names.add(function.__name__)
            backward = getattr(backward, "__wrapped__", None)
    return sorted(names)


def explained(error: RuntimeError) -> RuntimeError:
    """Says what to do where an operation of the model cannot be differentiated twice."""
    text = str(error)
    if "donated buffers" in text or "torch.compile with aot_autograd" in text:
        return MissingSecondDerivative(_COMPILED)
    if "use_reentrant=True" in text:
        return _no_second_derivative(_REENTRANT)
    signs = ("is not implemented", "once_differentiable", "double backward")
    return _no_second_derivative(text) if any(sign in text for sign in signs) else error


def _no_second_derivative(what: str) -> MissingSecondDerivative:
    return MissingSecondDerivative(
        f"an operation inside the closure has no second derivative: {what}. Use an implementation "
        "of it that has one, products that need none (NewtonCG takes "
        'curvature_products="finite_difference"), or an optimizer that needs gradients only'
    )


def versions(arguments: dict[str, Any]) -> tuple[int, ...]:
    """The version counters of the tensors among a call's arguments."""
    return tuple(
        value._version
        for value in arguments.values()
        if isinstance(value, Tensor) and not value.is_inference()
    )
