"""Catches the gradient's graph at `backward()` and the model's outputs inside a closure.

An optimizer that needs curvature must differentiate the gradient once more, so the gradient has to
be made with a graph. Instead of asking the user for `create_graph=True`, the evaluation of the
closure runs under a `TorchFunctionMode` that sees `Tensor.backward` and keeps the graph to itself.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from torch_secondorder._autograd.backward_hook import Patch, patched_backward
from torch_secondorder._autograd.custom_functions import (
    applied,
    finding_at,
    note,
    trusted,
)
from torch_secondorder._autograd.graph import (
    INSTEAD_OF_ESTIMATES,
    REENTRANT,
    Graph,
    Output,
    Suspect,
    added,
    reentrant,
    versions,
)
from torch_secondorder._autograd.twice_differentiable import REPLACEMENTS, twice_differentiable
from torch_secondorder._foundation.private_torch import (
    APPLY_HOLDER,
    ENGINE_ENTRY,
    innermost_transform,
    own_apply,
    plainly,
    sequence_number,
    sequence_number_of,
)
from torch_secondorder._foundation.subclasses import PLAIN_TYPES, like, plain, snapshot

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

#: The capture of this thread, if it runs inside one.
active_capture: ContextVar[Capture | None] = ContextVar("active_capture", default=None)


class Sink(Protocol):
    """Takes the graph of each `loss.backward()` as it happens, so that it is not kept.

    Attributes:
        twice: Whether gradients are made with a graph of their own.
        outputs: Whether model outputs are looked for.
    """

    twice: bool
    outputs: bool

    def __call__(
        self, graph: Graph, retain: bool
    ) -> Sequence[Tensor | None]:  # pragma: no cover - a protocol
        """Uses the graph of one `backward()`, and returns the gradients for `p.grad`.

        Args:
            graph: With one loss and its gradients. It ends after this call.
            retain: Whether the closure asked to retain the graph of the loss.
        """
        ...


class Capture(TorchFunctionMode):
    """Runs a closure and keeps the graph of every `loss.backward()` in it.

    Inside, `loss.backward()` becomes `torch.autograd.grad(loss, params, create_graph=True)`, and a
    *copy* of each gradient is added to `p.grad`: clipping or logging there cannot reach the graph.
    Other leaves than `params` get no gradient. Operations whose second derivative is missing, wrong
    or wasteful are replaced, see `torch_secondorder._autograd.twice_differentiable`. Custom
    autograd functions are examined where they are applied, see
    `torch_secondorder._autograd.custom_functions`.

    Args:
        params: The leaves to differentiate with respect to.
        sink: Takes the graphs one by one, so that none has to be kept.
        copies: Whether the graph saves copies, which takes as much memory again. Tensors may then
            be written in place; otherwise products raise `Overwritten`.
        twice: Whether the gradients get a graph of their own, if there is no sink. If not, no
            operation is replaced.

    Attributes:
        graph: The retained graph; it has no losses if there is a sink.
        calls: The number of calls of `backward()`.
        foreign: Whether parameters got gradients from somewhere else.
        copies: Whether the graph saves copies.
        keeps: Whether the graph is kept, because there is no sink.
        place: Copies of the parameters at the last `backward()`, for a graph of copies.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        sink: Sink | None = None,
        *,
        copies: bool = False,
        twice: bool = True,
    ) -> None:
        super().__init__()
        self.graph = Graph(params, twice=twice)
        self.calls = 0
        self.foreign = False
        self.place: list[Tensor] | None = None
        self.keeps = sink is None
        self._sink = sink
        self._suspended = False
        self._differentiates = False
        self._cut_off = False  # whether a reentrant checkpoint got nothing that has a graph
        self.copies = copies
        self._looks = sink is None or sink.outputs
        self._twice = twice if sink is None else sink.twice
        # A mode sees every operation, which takes time; `backward()` alone can be seen for less.
        self._watches = self._looks or max(map(Tensor.dim, params)) > 2
        self._kernels: AbstractContextManager[Any] = (
            twice_differentiable() if twice else nullcontext()
        )

    def __enter__(self) -> Capture:
        self._kernels.__enter__()
        if self.copies:
            self._saving = saved_tensors_hooks(snapshot, _itself)
            self._saving.__enter__()
        self._token = active_capture.set(self)
        Patch.begin(_applications, _accumulations)
        self._begun = sequence_number()
        if self._watches:
            super().__enter__()  # type: ignore[no-untyped-call]
        else:
            self._patched = patched_backward(self._intercept)
            self._patched.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._watches:
            super().__exit__(*exception)  # type: ignore[no-untyped-call]
        else:
            self._patched.__exit__(*exception)
            del self._patched  # it refers to this object: a cycle would hold the graph
        Patch.end(_accumulations, _applications)
        active_capture.reset(self._token)
        if self.copies:
            self._saving.__exit__(*exception)
        self._kernels.__exit__(*exception)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Lets everything pass but `Tensor.backward` and the standard losses."""
        kwargs = kwargs or {}
        if self._suspended:  # an optimizer's step inside the closure
            return func(*args, **kwargs)
        if func is Tensor.backward:
            return self.backward(*args, **kwargs)
        if self._twice and func in REPLACEMENTS:
            return REPLACEMENTS[func](*args, **kwargs)
        if not self._looks:
            return func(*args, **kwargs)
        if func in STANDARD_LOSSES:
            return self._run_loss(func, args, kwargs)
        result = func(*args, **kwargs)
        if func is F.linear and self._sink is None and not torch.compiler.is_compiling():
            # They are examined on request only: networks make many such calls.
            taken = args[0] if args else kwargs["input"]
            if self.copies:
                taken = snapshot(taken)
                args, kwargs = (taken, *args[1:]), {k: v for k, v in kwargs.items() if k != "input"}
            if type(taken) not in PLAIN_TYPES:
                taken = plain(taken)
            self.graph.linear.append((_node(result), versions([taken]), args, kwargs))
        return result

    def backward(
        self,
        loss: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        """Stands in for `loss.backward(...)`; the graph is kept whatever the flags say.

        Raises:
            RuntimeError: `inputs` was given: the gradient of a part of the parameters would not be
                the gradient of the loss.
        """
        if inputs is not None:
            raise RuntimeError(
                "loss.backward(inputs=...) inside a closure whose curvature is needed: call "
                "loss.backward() without inputs, the optimizer knows its parameters"
            )
        gradients = self.differentiate(loss, gradient, bool(retain_graph or create_graph))
        with torch.no_grad():
            for p, g in zip(self.graph.params, gradients, strict=True):
                if g is None:
                    continue
                if p.grad is not None:
                    sparse = p.grad.is_sparse or g.is_sparse
                    p.grad = added(p.grad, g) if sparse else p.grad.add_(g)
                else:
                    # Not an alias: the graph goes on using the storage of `g`.
                    p.grad = g.clone() if self._sink is None and self._twice else g

    def _intercept(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self._suspended:
            loss.backward(*args, **kwargs)
        else:
            self.backward(loss, *args, **kwargs)

    def differentiate(
        self, loss: Tensor, weight: Tensor | None = None, retain: bool = False
    ) -> Sequence[Tensor | None]:
        """The gradients of a loss, whose graph is kept, or given to the sink.

        Args:
            loss: What `backward()` is called on.
            weight: The `gradient` argument of `backward()`, of the loss's shape.
            retain: Whether the graph of the loss is needed again.
        """
        self.calls += 1
        if self._cut_off:
            self.checked(loss)
        if self.copies:
            self.place = [snapshot(p) for p in self.graph.params]
        node = _node(loss)
        # The length of the forward pass and its last operation: graphs of other operations have
        # others, or are very much alike. To walk over the graph would take a hundred times as long.
        kind = () if node is None else (sequence_number_of(node) - self._begun, node.name())
        self._differentiates = True
        try:
            if self._sink is not None:
                return self._handed_on(self._sink, loss, weight, retain, kind)
            self.graph.kind += kind
            gradients = self.graph.differentiate(loss, weight, twice=self._twice)
            if not self._twice:
                self.graph.gradients.clear()  # without a graph they are the closure's alone
            return gradients
        finally:
            self._differentiates = False
            self._begun = sequence_number()

    def checked(self, loss: Tensor) -> Tensor:
        """The loss; raises where a reentrant checkpoint has left it without a graph."""
        if self._cut_off and not loss.requires_grad:
            raise reentrant()
        return loss

    def _handed_on(
        self, sink: Sink, loss: Tensor, weight: Tensor | None, retain: bool, kind: tuple[Any, ...]
    ) -> Sequence[Tensor | None]:
        """The gradients that a sink makes of the graph of one loss."""
        graph = Graph(
            self.graph.params,
            outputs=[*self.graph.outputs],
            suspects=self.graph.suspects,
            kind=kind,
            instead=INSTEAD_OF_ESTIMATES,
        )
        graph.differentiate(loss, weight, twice=sink.twice)
        gradients = sink(graph, retain)
        if (self.graph.outputs or self.graph.suspects) and not retain:
            # Spent outputs are let go, or the graphs of all micro-batches would pile up.
            spent = set(graph.nodes())
            kept = [o for o in self.graph.outputs if _node(o.tensor) not in spent]
            self.graph.outputs[:] = kept
            self.graph.suspects[:] = [s for s in self.graph.suspects if s.node not in spent]
        return gradients

    def _apply(self, cls: Any, apply: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Stands in for `Function.apply`; examines functions that are applied in a new way."""
        if cls is CheckpointFunction:
            result = apply(*args)
            node = _node_of(result)
            if node is None:
                self._cut_off = torch.is_grad_enabled()
            else:
                self.graph.suspects.append(Suspect(node, REENTRANT))
            return result
        passes = (
            self._suspended
            or self._differentiates
            or not (self._twice or self.keeps)
            or not torch.is_grad_enabled()
            or trusted(cls)
        )
        if passes or innermost_transform() is not None:
            return apply(*args)
        with uncaptured():
            result, finding = applied(cls, apply, args)
        note(_node_of(result), finding)
        if finding is not None and not finding.curves:
            self.graph.suspects.append(Suspect(_node_of(result), finding))
        return result

    def _run_loss(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        bound = _signature(func).bind(*args, **kwargs)
        with plainly():
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
        for name, argument in arguments.items():
            if isinstance(argument, Tensor) and type(argument) not in PLAIN_TYPES:
                arguments[name] = plain(argument)
        if self.copies:
            for name in arguments.keys() - found:
                if isinstance(arguments[name], Tensor):
                    arguments[name] = snapshot(arguments[name])
        before = versions(arguments.values())
        for name in found:
            output = Output(bound.arguments[name], func, name, arguments, value, before)
            self.graph.outputs.append(output)
        if not found:
            return value
        with plainly():
            copy = Tensor.clone(value)
        return copy if type(value) in PLAIN_TYPES else like(copy, value)


def _noticing_applications(_: Any) -> Any:
    """An `apply` of custom functions that shows them to the capture of its thread."""

    def apply(cls: Any, *args: Any) -> Any:
        capture, inner = active_capture.get(), own_apply(cls)
        if capture is not None:
            return capture._apply(cls, inner, args)
        return _noted(cls, inner, args) if _everywhere else inner(*args)

    return classmethod(apply)


def _noticing_accumulation(run: Callable[..., Any]) -> Callable[..., Any]:
    """The engine's entry, which tells the capture of its thread about new gradients."""

    def backward(*args: Any, **kwargs: Any) -> Any:
        capture = active_capture.get()
        if capture is None or not kwargs.get("accumulate_grad", _ACCUMULATES):
            return run(*args, **kwargs)
        params = capture.graph.params
        before = [(p.grad, 0 if p.grad is None else p.grad._version) for p in params]
        result = run(*args, **kwargs)
        capture.foreign = capture.foreign or any(
            p.grad is not g or (g is not None and g._version != version)
            for p, (g, version) in zip(params, before, strict=True)
        )
        return result

    return backward


# All custom functions go through it.
_applications = Patch(APPLY_HOLDER, "apply", _noticing_applications)
# By itself, `torch.autograd.backward` accumulates gradients; the engine is told to.
_ACCUMULATES = ENGINE_ENTRY == "backward"
# `torch.autograd.backward` goes through it, which some call in the place of `Tensor.backward`.
_accumulations = Patch(torch.autograd, ENGINE_ENTRY, _noticing_accumulation)


# One entry for each request to examine custom functions outside of captures.
_everywhere: list[object] = []


def examine_everywhere(begin: bool) -> None:
    """Begins, or ends, to examine custom functions that are applied outside of captures.

    The findings are noted at their nodes, see `suspects_among`.
    """
    if begin:
        _everywhere.append(None)
        Patch.begin(_applications)
    else:
        Patch.end(_applications)
        _everywhere.pop()


def _noted(cls: Any, apply: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Applies a custom function, examines it, and notes at its node what was found."""
    if trusted(cls) or not torch.is_grad_enabled() or innermost_transform() is not None:
        return apply(*args)
    result, finding = applied(cls, apply, args)
    note(_node_of(result), finding)
    return result


def suspects_among(nodes: Iterable[Any]) -> list[Suspect]:
    """The custom functions among some nodes that are not known to be differentiated rightly."""
    found = ((node, finding_at(node)) for node in nodes)
    return [Suspect(node, f) for node, f in found if f is not None and not f.curves]


def _node_of(result: Any) -> Any:
    """The node that made a function's results; None where they have no graph."""
    results = result if isinstance(result, (tuple, list)) else (result,)
    nodes = (r.grad_fn for r in results if isinstance(r, Tensor))
    return next((node for node in nodes if node is not None), None)


def uncaptured() -> AbstractContextManager[None]:
    """A context that hides everything inside from a capture around it."""
    capture = active_capture.get()
    return nullcontext() if capture is None else _hidden_from(capture)


@contextmanager
def _hidden_from(capture: Capture) -> Iterator[None]:
    token = active_capture.set(None)
    capture._suspended = True
    try:
        yield
    finally:
        capture._suspended = False
        active_capture.reset(token)


@functools.cache
def _signature(func: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(func)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _not_a_leaf(tensor: Tensor) -> Tensor:
    """The tensor, or a view of a leaf: a place of its own in the graph."""
    if _node(tensor) is not None:
        return tensor
    with plainly():
        view = Tensor.view_as(tensor, tensor)
    return like(view, tensor)


def _node(tensor: Tensor) -> Any:
    with plainly():
        return tensor.grad_fn


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
    capture = active_capture.get()
    if capture is None or not capture._looks:
        return outputs
    with plainly():
        if not outputs.requires_grad:
            return outputs
    outputs = _not_a_leaf(outputs)
    capture.graph.outputs.append(Output(outputs))
    return outputs
