"""Runs a closure or a function, and collects its gradients.

Everything that evaluates a loss goes through `run`. Where backward passes go is up to its sink:

* without one, the closure runs untouched;
* a `Capture` keeps the whole graph, for evaluations whose curvature is used later;
* a `Capture` with a sink of its own, such as a `WatchSink`, passes on the graph of each backward
  pass and frees it, for optimizers that evaluate once a step.

Loops that pass no closure call `backward()` by themselves. Their passes end in the same sinks.

A step may evaluate its closure many times, and all evaluations have to see the same model: a
`Replay` sees to that. Dropout has to draw the same masks each time, or the evaluations are of
different functions; running statistics have to move once, as they would in a loop that evaluates
once. Buffers that the loss depends on, such as the vectors of spectral normalization, are another
kind: a step of many iterations that held them would minimize another loss than the one that is
trained. They move on with each iterate, and stand still in between.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple
from weakref import ReferenceType, WeakSet, ref

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from torch_secondorder._autograd.graph import Graph
from torch_secondorder._closure.capture import Capture, active_capture, uncaptured
from torch_secondorder._closure.data_parallel import Ranks
from torch_secondorder._closure.validation import (
    backward_of,
    differentiable,
    lost_graph,
    no_gradient,
    scalar,
    touched,
)
from torch_secondorder._foundation.private_torch import (
    NormBase,
    any_autocast_enabled,
    engine_run_backward,
    fsdp_dtype,
    plainly,
)
from torch_secondorder._foundation.random_state import random_state, set_random_state
from torch_secondorder._foundation.subclasses import plain, snapshot


class Run(NamedTuple):
    """The result of one run of a closure or function, before regularization.

    Attributes:
        loss: The loss, 0-dim.
        gradients: One for each parameter, None where the loss does not depend on it.
        graph: The retained graph, if it was asked for.
        averaged: Whether a DDP module has averaged the gradients over the ranks.
        copies: Whether the graph has saved copies.
        place: The position that the graph belongs to, if the closure has moved parameters.
    """

    loss: Tensor
    gradients: Sequence[Tensor | None]
    graph: Graph | None = None
    averaged: bool = False
    copies: bool = False
    place: Tensor | None = None


class _Slot(NamedTuple):
    """A buffer by its place: a module may change it in place or put another tensor there."""

    module: torch.nn.Module
    name: str

    def read(self) -> Tensor | None:
        tensor: Tensor | None = getattr(self.module, self.name, None)
        return tensor

    def restore(self, value: Tensor) -> None:
        tensor = self.read()
        if tensor is None or tensor.shape != value.shape:
            setattr(self.module, self.name, value)
        else:
            # Through `.data`: a retained graph may have saved the buffer, and its value is the
            # same again once the evaluation is over.
            plain(tensor).data.copy_(value)


def _slots(module: torch.nn.Module) -> Iterator[tuple[_Slot, Tensor]]:
    for name, buffer in module.named_buffers(recurse=False):
        if not is_lazy(buffer):
            yield _Slot(module, name), buffer


_UNKNOWN: tuple[Callable[[], torch.nn.Module | None], bool] = (lambda: None, False)


class ModuleRegistry:
    """A record of the modules that closures call, kept from step to step.

    Attributes:
        ranks: The ranks that share the work, from the DistributedDataParallel modules met.
        precision: The largest machine epsilon that modules of `fully_shard` compute with by their
            policy; 0 where none has one.
        graphs: The kinds of graphs that were checked, see `Graph.check_once`.
        jacobians: What is known of the Jacobians of graphs, by their structure.
        sharded: The modules of `fully_shard` that were called.
        moving: Whether modules other than PyTorch's normalization layers were seen to move buffers.
    """

    def __init__(self) -> None:
        self.ranks = Ranks()
        self.precision = 0.0
        self.moving = False
        # Modules met, by id, and whether they were training when their buffers were last compared.
        # Read at every call of a module: a WeakKeyDictionary would take twice as long.
        self._modes: dict[int, tuple[ReferenceType[torch.nn.Module], bool]] = {}
        self._norms: WeakSet[torch.nn.Module] = WeakSet()
        self._stateful: WeakSet[torch.nn.Module] = WeakSet()
        # Those whose buffers move when they train, and when they do not.
        self._moving: dict[bool, WeakSet[torch.nn.Module]] = {m: WeakSet() for m in (False, True)}
        # By class, whether the loss depends on the buffers that move.
        self._in_loss: dict[type, bool] = {}
        self.sharded: WeakSet[Any] = WeakSet()
        self._known: dict[str, set[object]] = {}  # closures by the notes on them
        self.graphs: set[Hashable] = set()
        self.jacobians: dict[Hashable, Any] = {}

    def knows(self, source: Callable[..., Any], what: str) -> bool:
        """True if a note was made on a closure like this one.

        Args:
            source: The closure. The same code over the same modules is a closure like it.
            what: The name of the note.
        """
        known = self._known.get(what)
        return False if not known else _identity(source) in known

    def note(self, source: Callable[..., Any], what: str) -> None:
        """See `knows`."""
        self._known.setdefault(what, set()).add(_identity(source))

    def forget(self, source: Callable[..., Any], what: str) -> None:
        """Takes a note back, see `knows`."""
        self._known.get(what, set()).discard(_identity(source))

    @contextmanager
    def watch(self, before: dict[_Slot, Tensor]) -> Iterator[None]:
        """Notes every module called inside.

        Buffers of modules that are new, or were compared in another mode, are added to `before` as
        they were, and compared in the end.
        """
        compared: dict[_Slot, Tensor] = {}
        thread, modes = threading.get_ident(), self._modes
        # Where there is a sharded module, this has been imported.
        fsdp = sys.modules.get("torch.distributed.fsdp")

        def note(module: torch.nn.Module, _: Any) -> None:
            # Compiled code must not contain this; the compiled module itself has been noted.
            if torch.compiler.is_compiling():
                return
            known, training = modes.get(id(module), _UNKNOWN)
            if known() is module and training is module.training:
                return
            if threading.get_ident() != thread:
                return
            # All inside it as well: a compiled module hides the calls of its children.
            for inner in module.modules():
                if isinstance(inner, DistributedDataParallel):
                    self.ranks.note(inner)
                elif isinstance(inner, NormBase):
                    self._norms.add(inner)
                if fsdp is not None and isinstance(inner, fsdp.FSDPModule):
                    self.sharded.add(inner)
                    self.precision = max(self.precision, _policy_precision(inner))
                modes[id(inner)] = ref(inner), inner.training
                for slot, buffer in _slots(inner):
                    # A module whose mode changes within the evaluation comes here twice.
                    if slot not in compared:
                        compared[slot] = before.get(slot, snapshot(buffer))

        handle = register_module_forward_pre_hook(note)
        try:
            with warnings.catch_warnings():
                # torch.compile warns that global hooks fire once more for the compiled module.
                warnings.filterwarnings("ignore", message="Using `torch.compile")
                yield
        finally:
            handle.remove()
            for slot, old in compared.items():
                before.setdefault(slot, old)
                now = slot.read()
                if now is None or now.shape != old.shape or not torch.equal(plain(now), old):
                    self._stateful.add(slot.module)
                    self._moving[slot.module.training].add(slot.module)
                    self.moving = self.moving or slot.module not in self._norms

    def buffers_before(self) -> dict[_Slot, Tensor]:
        """Copies of the buffers that the coming evaluation may change."""
        if not self._norms and not self._stateful:
            return {}
        # Of all normalization layers, in whatever mode: the closure may set them to train.
        modules = self._norms | self._stateful
        return {slot: snapshot(b) for module in modules for slot, b in _slots(module)}

    def unknown_kinds(self) -> set[type]:
        """Classes of modules that move buffers, if it is unknown whether the loss depends on these.

        Normalization layers are known: they do not read the buffers that they move.
        """
        return {type(module) for module in self._movers()} - self._in_loss.keys()

    def note_kind(self, kind: type, in_loss: bool) -> None:
        """Says whether the loss depends on the buffers that modules of a class move."""
        self._in_loss[kind] = in_loss

    def buffers_in_loss(self) -> list[_Slot]:
        """The buffers that move and that the loss depends on."""
        found = [m for m in self._movers() if self._in_loss.get(type(m), False)]
        return [slot for module in found for slot, _ in _slots(module)]

    def _movers(self) -> Iterator[torch.nn.Module]:
        for training, modules in self._moving.items():
            for module in modules:
                if module.training is training and module not in self._norms:
                    yield module

    def reshard(self) -> None:
        """Makes modules of `fully_shard` gather their parameters again at their next call.

        A forward pass that no backward pass follows leaves the gathered parameters in place.
        """
        for module in self.sharded:
            module.reshard()


def _policy_precision(module: Any) -> float:
    """The machine epsilon that a module of `fully_shard` computes with; 0 for the parameters'."""
    dtype = fsdp_dtype(module)
    return 0.0 if dtype is None else torch.finfo(dtype).eps


def _identity(source: Any, depth: int = 4) -> object:
    """The parts of a closure: its code, and the modules and functions that it holds."""
    if isinstance(source, partial):
        parts = (source.func, *source.args, *source.keywords.values())
        return tuple(_identity(part, depth - 1) for part in parts) if depth else id(source)
    code = getattr(source, "__code__", None)
    if code is None or not depth:
        if not callable(source):
            return None
        if not depth or isinstance(source, (torch.nn.Module, type)) or not _has_attributes(source):
            return id(source)
        # Lightning makes a new object for each step, whose contents stay the same.
        return type(source), tuple(_identity(v, depth - 1) for v in vars(source).values())
    inner = []
    for cell in getattr(source, "__closure__", None) or ():
        with suppress(ValueError):  # a variable that has no value yet
            inner.append(_identity(cell.cell_contents, depth - 1))
    return code, id(getattr(source, "__self__", None)), tuple(inner)


def _has_attributes(source: Any) -> bool:
    return bool(getattr(source, "__dict__", None))


class Replay:
    """The evaluations of one step: each starts from the same random state and buffers.

    Only generators that PyTorch owns (the CPU's and those of `devices`) are put back; a closure
    that draws from NumPy or from a generator of its own has to reset that by itself.

    Args:
        registry: The record of the closure's modules.
        devices: Where the parameters are.

    Attributes:
        autocast: Dtypes by device type of the autocast regions around, in which closures run.
    """

    def __init__(self, registry: ModuleRegistry, devices: Collection[torch.device]) -> None:
        self._registry = registry
        self.autocast: dict[str, torch.dtype] = {}
        self._random: list[tuple[Callable[[Tensor], Any], Tensor]] = []  # setters and states
        for device in {torch.device("cpu"), *devices}:
            kind = device.type
            if torch.is_autocast_enabled(kind):
                self.autocast[kind] = torch.get_autocast_dtype(kind)
            if kind == "cpu":
                generator = torch.default_generator
                self._random.append((generator.set_state, generator.get_state()))
            else:
                self._random.append((partial(set_random_state, device), random_state(device)))
        self._devices = devices
        self._before = registry.buffers_before()
        self._after: dict[_Slot, Tensor] | None = None
        self._entry: dict[_Slot, Tensor] = {}  # buffers that have moved on, as they were before
        self._evaluations = 0
        self._sharded = bool(registry.sharded)
        self._failed = False  # whether the last evaluation was broken off

    def run(self, closure: Callable[[], Any]) -> Any:
        """Calls the closure once more under the same conditions."""
        self._evaluations += 1
        if self._sharded:
            self._registry.reshard()
        if self._evaluations > 1:
            for set_state, state in self._random:
                set_state(state)
            if self._before:
                self._restore_buffers()
        # An autocast region around caches casts of parameters that have moved since.
        torch.clear_autocast_cache()
        self._failed = True
        if self._evaluations > 1 and not self.autocast:
            result = closure()
        else:
            with ExitStack() as stack:
                for device_type, dtype in self.autocast.items():
                    stack.enter_context(torch.autocast(device_type, dtype=dtype))
                if self._evaluations == 1:
                    stack.enter_context(self._watch())
                result = closure()
        self._failed = False
        return result

    @contextmanager
    def _watch(self) -> Iterator[None]:
        """Notes the modules that the first evaluation calls."""
        try:
            with self._registry.watch(self._before):
                yield
        finally:
            self._sharded = bool(self._registry.sharded)

    def _restore_buffers(self) -> None:
        """Puts the buffers back to where they were before the first evaluation."""
        if self._after is None and not self._failed:
            self._note_after()
        for slot, value in self._before.items():
            slot.restore(value)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Keeps random draws inside apart from the closure's randomness."""
        states = self._random_now()
        yield
        for device, state in states:
            set_random_state(device, state)

    def mark(self) -> Callable[[], None]:
        """Saves random state and buffers within a closure; returns what restores them."""
        states = self._random_now()
        now = {slot: slot.read() for slot in self._before}
        buffers = {slot: snapshot(b) for slot, b in now.items() if b is not None}

        def go() -> None:
            for device, state in states:
                set_random_state(device, state)
            for slot, value in buffers.items():
                slot.restore(value)

        return go

    def move_on(self) -> bool:
        """Lets buffers that the loss depends on stay where the last evaluation has left them.

        Returns:
            Whether there are any; the evaluations from here on are then of another function.
        """
        slots = self._registry.buffers_in_loss()
        if not slots:
            return False
        after = self._note_after()
        for slot, value in self._now(slots).items():
            if slot in self._before:
                self._entry.setdefault(slot, self._before[slot])
            self._before[slot] = after[slot] = value
        return True

    @contextmanager
    def moved(self, kind: type) -> Iterator[None]:
        """Evaluations inside begin with the buffers of a class where the last one has left them."""
        held = self._before
        slots = [slot for slot in held if type(slot.module) is kind]
        self._before = {**held, **self._now(slots)}
        try:
            yield
        finally:
            self._before = held

    @staticmethod
    def _now(slots: Iterable[_Slot]) -> dict[_Slot, Tensor]:
        now = {slot: slot.read() for slot in slots}
        return {slot: snapshot(b) for slot, b in now.items() if b is not None}

    def _note_after(self) -> dict[_Slot, Tensor]:
        """The buffers as the first evaluation has left them."""
        if self._after is None:
            self._after = self._now(self._before)
        return self._after

    def _random_now(self) -> list[tuple[torch.device, Tensor]]:
        return [(d, random_state(d)) for d in {torch.device("cpu"), *self._devices}]

    def finish(self, *, aborted: bool = False) -> None:
        """Leaves the buffers as one evaluation at the start of the step would have.

        Those that the loss depends on have moved on with each iterate.

        Args:
            aborted: Whether the step came to nothing: the buffers are then as before it.
        """
        held = {**self._before, **self._entry} if aborted else self._after or {}
        for slot, value in held.items():
            slot.restore(value)
        if self._registry.sharded:
            self._registry.reshard()

    @property
    def precision(self) -> float:
        """The largest machine epsilon that closures are known to compute with; 0 for none."""
        dtypes = self.autocast.values()
        return max(self._registry.precision, *(torch.finfo(d).eps for d in dtypes), 0.0)


def gradients_of(params: Iterable[Tensor]) -> list[Tensor | None]:
    """The gradients that parameters have now."""
    return list(map(_grad, params))


_grad: Callable[[Tensor], Tensor | None] = attrgetter("grad")


def run(
    source: Callable[[], Any],
    params: Sequence[Tensor],
    registry: ModuleRegistry,
    capture: Capture | None = None,
    *,
    pure: bool = False,
    before: GradientTrace | None = None,
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """Runs a closure or a pure function once.

    Args:
        source: Returns the loss. If it does not call `backward()`, the loss is differentiated here.
        params: The parameters, leaves.
        registry: The record of modules and ranks.
        capture: The sink of backward passes; None to let them run untouched.
        pure: Whether the source is a function. It makes no `p.grad`, and gets none.
        before: The gradients from before the run; None if there were none.

    Returns:
        The loss and the gradients. Those of a pure function without a capture are this rank's, and
        there may be none.

    Raises:
        IdleClosure: The closure did nothing, and `before` has gradients.
        RuntimeError: No gradient reached the parameters, or their graph was lost.
    """
    if capture is not None:
        return _run_captured(source, params, registry, capture, pure, before)
    if active_capture.get() is None and not (pure and registry.ranks.several):
        return _run_plainly(source, params, pure, before)
    with (
        nullcontext() if active_capture.get() is None else uncaptured(),
        registry.ranks.quiet() if pure else nullcontext(),
    ):
        return _run_plainly(source, params, pure, before)


def _run_plainly(
    source: Callable[[], Any], params: Sequence[Tensor], pure: bool, before: GradientTrace | None
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """See `run`; backward passes run untouched."""
    value = source()
    if pure:
        loss = differentiable(scalar(value))
        # `torch.autograd.grad` takes as long again as the pass of a small function.
        with plainly():
            weight = torch.ones_like(loss)
            return loss, engine_run_backward((loss,), (weight,), False, False, tuple(params), True)
    _check_not_idle(value, params, before)
    gradients = list(map(_grad, params))
    # Without gradients before, the first one tells most of the time.
    made = before is None and gradients[0] is not None
    if not made and not _made(gradients, params, before):
        backward_of(scalar(value))
        if before is not None and before.matches(params):
            raise no_gradient()
        gradients = gradients_of(params)
    if gradients[0] is None:
        touched(gradients)
    return _loss(value), gradients


def _run_captured(
    source: Callable[[], Any],
    params: Sequence[Tensor],
    registry: ModuleRegistry,
    capture: Capture,
    pure: bool,
    before: GradientTrace | None,
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """See `run`; backward passes go to the capture."""
    gradients: Sequence[Tensor | None]
    with capture, registry.ranks.quiet():
        value = source()
        if pure:
            loss = scalar(value)
            gradients = capture.differentiate(differentiable(capture.checked(loss)))
        else:
            _check_not_idle(value, params, before)
            if not capture.calls:
                loss = scalar(value)
                if capture.foreign or _made(gradients_of(params), params, before):
                    raise lost_graph()
                capture.backward(differentiable(capture.checked(loss)))
    if not pure:
        # Outside, where a capture does not see each of these operations.
        loss = _loss(value)
        if capture.foreign:
            raise lost_graph()
        gradients = list(map(_grad, params))
    if capture.keeps:
        touched(gradients)
        capture.graph.check_once(registry.graphs, capture.graph.twice)
    return loss, gradients


def _loss(value: Any) -> Tensor:
    """The loss that a closure returned, as a 0-dim tensor."""
    simple = type(value) is Tensor and not value.dim() and not value.is_complex()
    return value if simple else scalar(value)


def _check_not_idle(value: Any, params: Sequence[Tensor], before: GradientTrace | None) -> None:
    if value is None and before is not None and before.any and before.matches(params):
        raise IdleClosure


def _made(
    gradients: Sequence[Tensor | None], params: Sequence[Tensor], before: GradientTrace | None
) -> bool:
    """True if a closure has made gradients."""
    if before is not None:
        return before.shows_backward(params)
    return any(g is not None for g in gradients)


class IdleClosure(Exception):
    """A closure returned nothing and did nothing, and there were gradients before it."""


class GradientTrace:
    """Remembers which gradients some parameters have, without keeping them.

    Args:
        params: The parameters.

    Attributes:
        any: Whether there is a gradient.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._marks: list[tuple[ref[Tensor], int] | None] = []
        self.any = False
        for p in params:
            grad = p.grad
            if grad is None:
                self._marks.append(None)
            else:
                self._marks.append((ref(grad), grad._version))
                self.any = True

    def matches(self, params: Sequence[Tensor]) -> bool:
        """True if all of them still have the same gradients, unchanged."""
        if len(params) != len(self._marks):
            return False
        for p, mark in zip(params, self._marks, strict=True):
            grad = p.grad
            if grad is None or mark is None:
                if (grad is None) != (mark is None):
                    return False
            elif mark[0]() is not grad or mark[1] != grad._version:
                return False
        return True

    def shows_backward(self, params: Sequence[Tensor]) -> bool:
        """True if gradients were made since, and not just dropped or set to zero."""
        if self.matches(params) or all(p.grad is None for p in params):
            return False
        # Values are read only if there were gradients before: on a device that waits.
        return not self.any or any_nonzero(gradients_of(params))


def any_nonzero(gradients: Iterable[Tensor | None]) -> bool:
    """True if some gradient has an entry that is not zero."""
    present = [gradient for gradient in gradients if gradient is not None]
    return any(map(nonzero, present))


def nonzero(gradient: Tensor) -> bool:
    """True if any entry is not zero."""
    gradient = gradient.detach()
    values = gradient if gradient.layout is torch.strided else gradient.to_dense()
    return bool(values.any())


@contextmanager
def without_autocast(params: Iterable[Tensor]) -> Iterator[None]:
    """Takes products in the precision of the gradients that they are derivatives of."""
    if not any_autocast_enabled():
        yield
        return
    with ExitStack() as stack:
        for device_type in {p.device.type for p in params}:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield
