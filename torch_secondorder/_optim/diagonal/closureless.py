"""Backward passes of loops without a closure, seen by the optimizers whose curvature is due.

An optimizer that is alive listens from its construction on, and from each step on whose next one
is due. A backward pass that reaches its parameters is then differentiated with a graph, which is
shown to its watch and freed. The gradients then go into the leaves as usual, those of other
optimizers included, by way of their hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from torch_secondorder._autograd.backward_hook import BackwardListeners
from torch_secondorder._autograd.graph import INSTEAD_OF_ESTIMATES, Graph
from torch_secondorder._autograd.traversal import (
    MENDED,
    leaves_of,
    nodes_of,
    standard_losses,
    twice_differentiable,
)
from torch_secondorder._closure.capture import examine_everywhere, suspects_among
from torch_secondorder._closure.data_parallel import several_processes
from torch_secondorder._closure.runner import GradientTrace, without_autocast
from torch_secondorder._foundation.private_torch import engine_run_backward, plainly, tensor_hooks
from torch_secondorder._optim.diagonal.observation import Observation
from torch_secondorder._optim.diagonal.schedule import EstimateSchedule


class Watcher(Protocol):
    """An optimizer that sees backward passes."""

    def observation_of(
        self, reached: Collection[int]
    ) -> Observation | None:  # pragma: no cover - a protocol
        """The observation of a pass; None if the pass reaches no parameter.

        Args:
            reached: The identities of the leaves that it reaches.
        """

    def note_module(self, module: DistributedDataParallel) -> None:  # pragma: no cover
        """Takes in a module that is called."""


class _Watchers(BackwardListeners):
    """The optimizers that see backward passes now.

    Where there are several processes, the modules that average gradients over them are noted as
    they are called.
    """

    def __init__(self) -> None:
        super().__init__(self._observe)
        self._modules: Any = None  # the handle of a hook
        self._examines = False

    def _update(self) -> None:
        super()._update()
        if self._examines is not bool(self._references):
            self._examines = not self._examines
            examine_everywhere(self._examines)
        if not self._references:
            if self._modules is not None:
                self._modules.remove()
            self._modules = None
        elif self._modules is None and several_processes():
            self._modules = register_module_forward_pre_hook(self._note)

    def _note(self, module: torch.nn.Module, _: Any) -> None:
        if isinstance(module, DistributedDataParallel):
            for watcher in self:
                watcher.note_module(module)

    def _observe(
        self,
        watchers: Sequence[Watcher],
        original: Callable[..., None],
        tensors: Any,
        grad_tensors: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        grad_variables: Any = None,
        inputs: Any = None,
    ) -> None:
        """Stands in for `torch.autograd.backward` while anybody watches."""
        more = (grad_tensors, retain_graph, create_graph, grad_variables, inputs)
        with plainly():
            root = None if grad_variables is not None else _root(tensors, grad_tensors)
            nodes = [] if root is None else nodes_of(root[:1])
            leaves = leaves_of(nodes) if inputs is None else _leaves_among(inputs)
            reached = {id(leaf) for leaf in leaves}
            left_out = set() if inputs is None else {id(p) for p in leaves_of(nodes)} - reached
            found = [w.observation_of(reached) for w in watchers] if nodes and reached else []
            observations = [o for o in found if o is not None]
            if root is not None and self._can_observe(observations, left_out):
                retain = bool(create_graph if retain_graph is None else retain_graph)
                gradients = _differentiated(root, nodes, leaves, observations, retain)
                if gradients is not None:
                    _accumulate(leaves, gradients, create_graph)
                    for observation in observations:
                        observation.settle()
                    return
        original(tensors, *more)

    def _can_observe(self, observations: Sequence[Observation], left_out: set[int]) -> bool:
        """True if a pass goes by way of the observations; otherwise the reason is noted there."""
        late = self._modules is None and several_processes()
        if late:
            self._update()  # from the next pass on
        for observation in observations:
            if late:
                observation.refuse(
                    "torch.distributed was initialized after the optimizer was made, which has to "
                    "see calls of DistributedDataParallel: make it later"
                )
            elif observation.ranks.delays_averaging:
                observation.refuse(
                    "the first backward pass of DistributedDataParallel(static_graph=True) cannot "
                    "be seen from outside"
                )
            elif observation.open and observation.ranks.count > 1:
                observation.refuse(
                    "inside `with optimizer.watching()` under DistributedDataParallel a backward "
                    "pass begins with loss.backward(), not with torch.autograd.backward(loss)"
                )
            elif not observation.twice and any(id(p) in left_out for p in observation.params):
                observation.refuse(
                    "loss.backward(inputs=...) differentiates by some parameters, and this "
                    "estimator takes the curvature by all of them"
                )
        return any(observation.failure is None for observation in observations)


def predates(
    params: Sequence[Tensor],
    observation: Observation | None,
    since: GradientTrace | None,
    schedule: EstimateSchedule,
    *,
    uses_graphs: bool,
) -> bool:
    """True if gradients were made before the estimate became due.

    That happens in loops that make optimizers as parameters appear, as Pyro's do, and in loops that
    thaw parameters between estimates, or after the backward pass. The step then uses older
    curvature, parameters without any wait, and the next step estimates.

    Args:
        params: The trainable parameters.
        observation: The observation of other parameters.
        since: The gradients when the optimizer began to listen; None if it does not.
        schedule: Knows which parameters are new.
        uses_graphs: Whether the graph of the gradients is enough for an estimate.
    """
    grads = [p.grad for p in params if p.grad is not None]
    if not grads or (uses_graphs and any(g.grad_fn is not None for g in grads)):
        return False
    if since is None:  # nothing tells the optimizer of a thawed parameter
        return schedule.has_new(params)
    seen_others = observation is not None and observation.calls > 0
    return since.matches(params) or seen_others


def why_unseen(watches: bool, group: dict[str, Any]) -> str:
    """The reason why no backward pass was seen, for error messages.

    Args:
        watches: Whether the optimizer sees backward passes outside of closures and contexts.
        group: Its first group.
    """
    if not watches:
        return "it was made with watch=False"
    if group["accumulation_steps"] != 1:
        return "accumulation_steps says that a closure comes with each step"
    return (
        "the gradients are not from loss.backward() or torch.autograd.backward(), or from one "
        "that ran before the curvature was due (update_period may have been changed since)"
    )


def _root(tensors: Any, grad_tensors: Any) -> tuple[Tensor, Tensor | None] | None:
    """The tensor that a pass begins with, and its weight; None for other kinds of passes."""
    roots = (tensors,) if isinstance(tensors, Tensor) else tensors
    if isinstance(roots, GradientEdge):
        return None
    roots = tuple(roots)
    if grad_tensors is None or isinstance(grad_tensors, Tensor):
        grad_tensors = (grad_tensors,) * len(roots)
    weights = tuple(grad_tensors)
    if not roots or len(roots) != len(weights):
        return None
    for root, weight in zip(roots, weights, strict=True):
        if not isinstance(root, Tensor) or not root.requires_grad:
            return None
        if weight is None and (root.numel() != 1 or root.is_complex()):
            return None
    if len(roots) == 1:
        return roots[0], weights[0]
    with torch.enable_grad():
        parts = [
            root.sum() if weight is None else (root * weight).sum()
            for root, weight in zip(roots, weights, strict=True)
        ]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
    return (total, None) if not total.is_complex() else None


def _leaves_among(inputs: Any) -> list[Tensor]:
    """The leaves that gradients are asked for; empty if some of the inputs are no leaves."""
    if isinstance(inputs, dict):
        inputs = inputs.values()
    asked = [inputs] if isinstance(inputs, (Tensor, GradientEdge)) else list(inputs)
    leaves = {id(x): x for x in asked if isinstance(x, Tensor) and x.is_leaf and x.requires_grad}
    return list(leaves.values()) if len(leaves) == len(asked) else []


def _differentiated(
    root: tuple[Tensor, Tensor | None],
    nodes: Sequence[Any],
    leaves: Sequence[Tensor],
    observations: Sequence[Observation],
    retain: bool,
) -> Sequence[Tensor | None] | None:
    """The gradients by the leaves, whose graph was shown; None where there is none to show."""
    observing = [o for o in observations if o.failure is None]
    twice = any(o.twice for o in observing)
    suspects = suspects_among(nodes) if twice else []
    whole = Graph(leaves, suspects=suspects, instead=INSTEAD_OF_ESTIMATES)
    kind = len(nodes), nodes[0].name()
    try:
        with twice_differentiable(nodes if twice else ()), without_autocast(leaves):
            gradients = whole.differentiate(*root, twice=twice)
        outputs = standard_losses(nodes) if any(o.outputs for o in observing) else []
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        for observation in observing:
            observation.refuse(error)
        return None
    places = {id(leaf): i for i, leaf in enumerate(leaves)}
    for observation in observing:
        numbers = [places.get(id(p)) for p in observation.params]
        own = tuple(None if i is None else gradients[i] for i in numbers)
        graph = Graph(
            observation.params,
            [root[0]],
            [root[1]],
            [own],
            [*outputs],
            curving=whole.curving,
            kind=kind,
            instead=INSTEAD_OF_ESTIMATES,
            mended=MENDED,
        )
        try:
            observation.see(graph, retain or observation is not observing[-1])
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            # The pass itself is fine, and a step may never come.
            observation.refuse(error)
    return gradients


def _accumulate(
    leaves: Sequence[Tensor], gradients: Sequence[Tensor | None], create_graph: bool
) -> None:
    """Does what is left of a backward pass, at the leaves and with what hangs there."""
    pairs = [(p, g) for p, g in zip(leaves, gradients, strict=True) if g is not None]
    if not pairs:
        return
    ends, values = zip(*pairs, strict=True)
    if not create_graph:
        values = tuple(g.detach() for g in values)
    with _without_hooks(ends):
        engine_run_backward(
            ends,
            values,
            create_graph,
            create_graph,
            (),
            allow_unreachable=True,
            accumulate_grad=True,
        )


@contextmanager
def _without_hooks(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Lets the hooks of `Tensor.register_hook` rest: they have seen these gradients."""
    held = [(hooks, dict(hooks)) for p in leaves if (hooks := tensor_hooks(p))]
    for hooks, _ in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, own in held:
            hooks.update(own)


#: Optimizers whose curvature is due.
WATCHERS = _Watchers()
