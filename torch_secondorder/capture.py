"""What is caught inside a closure: the gradient's graph at `backward()`, and the model's outputs.

An optimizer that needs curvature must differentiate the gradient once more, so the gradient has to
be made with a graph. Instead of asking the user for `create_graph=True`, the evaluation of the
closure runs under a `TorchFunctionMode` that sees `Tensor.backward` and keeps the graph to itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

__all__ = ["Capture", "Graph", "LinearCall", "Output", "mark_outputs"]

#: Losses whose first argument is the model's output, so that it is found without being told.
STANDARD_LOSSES: frozenset[Callable[..., Any]] = frozenset(
    {
        F.binary_cross_entropy,
        F.binary_cross_entropy_with_logits,
        F.cross_entropy,
        F.gaussian_nll_loss,
        F.huber_loss,
        F.kl_div,
        F.l1_loss,
        F.mse_loss,
        F.multi_margin_loss,
        F.multilabel_margin_loss,
        F.multilabel_soft_margin_loss,
        F.nll_loss,
        F.poisson_nll_loss,
        F.smooth_l1_loss,
        F.soft_margin_loss,
    }
)

# The file of the wrapper that `once_differentiable` puts around a backward.
_MARKED_IN = once_differentiable(lambda *_: None).__code__.co_filename

_active: ContextVar[Capture | None] = ContextVar("active_capture", default=None)


@dataclass(frozen=True, slots=True)
class Output:
    """A model output that a captured evaluation met.

    Attributes:
        tensor: The output, with its graph; never a leaf.
        loss: The standard loss that took it as an argument, or None where it was marked by hand.
        argument: The argument's name, `"input"` for most.
        arguments: The loss's arguments by name, defaults included (`target`, `reduction`, ...).
        value: What the loss returned; None where it was marked by hand. The closure has a copy, so
            that `loss += penalty` cannot reach it.
        versions: Version counters of the tensors among the arguments.
    """

    tensor: Tensor
    loss: Callable[..., Any] | None = None
    argument: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    value: Tensor | None = None
    versions: tuple[int, ...] = ()

    @property
    def intact(self) -> bool:
        """Whether the loss's arguments still are what it was given."""
        return self.versions == _versions(self.arguments)


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
        linear_calls: The linear layers met, in order.
    """

    params: Sequence[Tensor]
    losses: list[Tensor] = field(default_factory=list)
    weights: list[Tensor | None] = field(default_factory=list)
    gradients: list[tuple[Tensor | None, ...]] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    linear_calls: list[LinearCall] = field(default_factory=list)

    def differentiate(
        self, loss: Tensor, weight: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """Adds `loss` to the graph and returns its gradients, with their graph.

        Args:
            loss: What `backward()` was called on.
            weight: The `gradient` argument of `backward()`, of the loss's shape.
        """
        try:
            gradients = torch.autograd.grad(
                loss, self.params, weight, create_graph=True, allow_unused=True
            )
        except RuntimeError as error:
            raise explained(error) from error
        self.losses.append(loss)
        self.weights.append(weight)
        self.gradients.append(gradients)
        return gradients

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
                raise _no_second_derivative(
                    "activation checkpointing with use_reentrant=True; False works"
                )

    def hessian_product(
        self, tangents: Sequence[Tensor], batched: bool = False
    ) -> tuple[Tensor | None, ...]:
        """The Hessian of the evaluated loss times a direction, by a second backward pass.

        Args:
            tangents: The direction, shaped like the parameters; with `batched`, each with a leading
                dimension `k`.
            batched: Whether `k` directions are multiplied in one vectorized pass.

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
            return torch.autograd.grad(
                outputs,
                self.params,
                weights,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=batched,
            )
        except RuntimeError as error:
            raise explained(error) from error


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
    if "donated buffers" in text:  # torch says how to change a setting, which would not do either
        return _no_second_derivative("a module compiled by torch.compile")
    signs = ("is not implemented", "once_differentiable", "double backward")
    return _no_second_derivative(text) if any(sign in text for sign in signs) else error


def _no_second_derivative(what: str) -> RuntimeError:
    return RuntimeError(
        f"an operation inside the closure has no second derivative: {what}. Use an implementation "
        "of it that has one, products that need none (NewtonCG takes "
        'curvature_products="finite_difference"), or an optimizer that needs gradients only'
    )


class Capture(TorchFunctionMode):
    """Runs a closure and keeps the graph of every `loss.backward()` in it.

    Inside, `loss.backward()` becomes `torch.autograd.grad(loss, params, create_graph=True)`, and a
    *copy* of each gradient is added to `p.grad`: clipping or logging there cannot reach the graph.
    Other leaves than `params` get no gradient. Scaled dot-product attention runs on its math
    backend, the only one with a second derivative.

    Args:
        params: The leaves to differentiate with respect to.

    Attributes:
        graph: What was caught.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph = Graph(params)
        self._places = {id(p): i for i, p in enumerate(params)}
        self._attention: AbstractContextManager[Any] = sdpa_kernel(SDPBackend.MATH)

    def __enter__(self) -> Capture:
        self._attention.__enter__()
        self._token = _active.set(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        _active.reset(self._token)
        self._attention.__exit__(*exception)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Lets everything pass but `Tensor.backward` and the standard losses."""
        kwargs = kwargs or {}
        if func is Tensor.backward:
            return self.backward(*args, **kwargs)
        if func in STANDARD_LOSSES:
            return self._run_loss(func, args, kwargs)
        result = func(*args, **kwargs)
        if func is F.linear and not torch.compiler.is_compiling():
            self._note_linear(result, *args, **kwargs)
        return result

    def backward(
        self,
        loss: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        """What `loss.backward(...)` does here; the graph is kept whatever the flags say.

        Raises:
            RuntimeError: `inputs` was given: the gradient of a part of the parameters would not be
                the gradient of the loss.
        """
        if inputs is not None:
            raise RuntimeError(
                "loss.backward(inputs=...) inside a closure whose curvature is needed: call "
                "loss.backward() without inputs, the optimizer knows its parameters"
            )
        gradients = self.graph.differentiate(loss, gradient)
        with torch.no_grad():
            for p, g in zip(self.graph.params, gradients, strict=True):
                if g is not None:
                    # Not an alias: the graph goes on using the storage of `g`.
                    p.grad = g.clone() if p.grad is None else p.grad + g

    def _note_linear(
        self, output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> None:
        place = self._places.get(id(weight))
        plain = weight.dim() == 2 and not weight.is_complex() and input.layout is torch.strided
        if place is None or not plain or output.grad_fn is None:
            return
        added = None
        if bias is not None and bias.shape == weight.shape[:1]:  # else it is broadcast
            added = self._places.get(id(bias))
        call = LinearCall(input.detach(), place, added, get_gradient_edge(output))
        self.graph.linear_calls.append(call)

    def _run_loss(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        bound = inspect.signature(func).bind(*args, **kwargs)
        found = [
            name
            for name, value in bound.arguments.items()
            if isinstance(value, Tensor) and value.requires_grad
        ]
        for name in found:
            bound.arguments[name] = _not_a_leaf(bound.arguments[name])
        value = func(*bound.args, **bound.kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        versions = _versions(arguments)
        for name in found:
            output = Output(arguments[name], func, name, arguments, value, versions)
            self.graph.outputs.append(output)
        return value.clone() if found else value


def _versions(arguments: dict[str, Any]) -> tuple[int, ...]:
    return tuple(
        value._version
        for value in arguments.values()
        if isinstance(value, Tensor) and not value.is_inference()
    )


def _not_a_leaf(tensor: Tensor) -> Tensor:
    """The tensor, or a view of a leaf: a place of its own in the graph."""
    return tensor.view_as(tensor) if tensor.grad_fn is None else tensor


def mark_outputs(outputs: Tensor) -> Tensor:
    """Marks the model's output for Gauss-Newton products, where the loss is not a standard one.

    Call it anywhere in the forward pass; the losses of `torch.nn.functional` need no mark. Outside
    an optimizer's evaluation, and in one that needs no curvature, it does nothing.

    Args:
        outputs: The tensor through which the loss depends on the parameters, any shape.

    Returns:
        The same tensor, or a view of it.

    Raises:
        TypeError: Not a tensor.

    >>> z = torch.ones(3)
    >>> mark_outputs(z) is z
    True
    """
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"mark_outputs takes one tensor, got {type(outputs).__name__}; mark several outputs "
            "one by one"
        )
    capture = _active.get()
    if capture is None or not outputs.requires_grad:
        return outputs
    outputs = _not_a_leaf(outputs)
    capture.graph.outputs.append(Output(outputs))
    return outputs
