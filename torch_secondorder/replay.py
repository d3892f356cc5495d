"""Makes all evaluations of one step see the same model: randomness, buffers, process groups.

A step may evaluate its closure many times. Dropout has to draw the same masks each time, or the
evaluations are of different functions; running statistics have to move once, as they would in a
loop that evaluates once; and under DistributedDataParallel every rank has to see the same loss.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple
from weakref import ReferenceType, WeakSet, ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

__all__ = ["Replay", "Surroundings"]


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
            tensor.data.copy_(value)


def _slots(module: torch.nn.Module) -> Iterator[tuple[_Slot, Tensor]]:
    for name, buffer in module.named_buffers(recurse=False):
        if not is_lazy(buffer):
            yield _Slot(module, name), buffer


_UNKNOWN: tuple[Callable[[], torch.nn.Module | None], bool] = (lambda: None, False)


class Surroundings:
    """What closures call, found by watching, kept from step to step.

    Attributes:
        process_groups: Those of the DistributedDataParallel modules met.
    """

    def __init__(self) -> None:
        self.process_groups: list[Any] = []
        # Modules met, by id, and whether they were training when their buffers were last compared.
        # Asked at every call of a module: a WeakKeyDictionary would take twice as long.
        self._modes: dict[int, tuple[ReferenceType[torch.nn.Module], bool]] = {}
        self._norms: WeakSet[torch.nn.Module] = WeakSet()
        self._stateful: WeakSet[torch.nn.Module] = WeakSet()
        self._seen: set[object] = set()

    def knows(self, source: Callable[..., Any], what: str = "graph") -> bool:
        """Whether something about a closure like this one was noted.

        Args:
            source: The same code over the same modules is a closure like it.
            what: What was looked at.
        """
        return (what, _identity(source)) in self._seen

    def note(self, source: Callable[..., Any], what: str = "graph") -> None:
        """See `knows`."""
        self._seen.add((what, _identity(source)))

    @contextmanager
    def watch(self, before: dict[_Slot, Tensor]) -> Iterator[None]:
        """Notes every module called inside.

        Buffers of modules that are new, or were compared in another mode, are added to `before` as
        they were, and compared in the end.
        """
        compared: dict[_Slot, Tensor] = {}
        thread, modes = threading.get_ident(), self._modes

        def note(module: torch.nn.Module, _: Any) -> None:
            # Compiled code is not to contain this; the compiled module itself has been noted.
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
                    if inner.process_group not in self.process_groups:
                        self.process_groups.append(inner.process_group)
                elif isinstance(inner, _NormBase):
                    self._norms.add(inner)
                modes[id(inner)] = ref(inner), inner.training
                compared.update(
                    (slot, before.get(slot, b.detach().clone())) for slot, b in _slots(inner)
                )

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
                if now is None or now.shape != old.shape or not torch.equal(now, old):
                    self._stateful.add(slot.module)

    def moving_buffers(self) -> list[tuple[_Slot, Tensor]]:
        """The buffers that the coming evaluation may change."""
        # Of all normalization layers, in whatever mode: the closure may set them to train.
        return [pair for module in self._norms | self._stateful for pair in _slots(module)]

    def average(self, tensor: Tensor) -> Tensor:
        """The mean over the ranks, where a DDP module was called; else the tensor itself."""
        if not self.process_groups:
            return tensor
        group = self.process_groups[0]
        tensor = tensor.clone()
        dist.all_reduce(tensor, group=group)
        return tensor.div_(dist.get_world_size(group))


def _identity(source: Any, depth: int = 4) -> object:
    """What a closure is made of: code, and the modules and functions that it holds."""
    if isinstance(source, partial):
        parts = (source.func, *source.args, *source.keywords.values())
        return tuple(_identity(part, depth - 1) for part in parts) if depth else id(source)
    code = getattr(source, "__code__", None)
    if code is None or not depth:
        if not callable(source):
            return None
        if not depth or isinstance(source, (torch.nn.Module, type)) or not _has_attributes(source):
            return id(source)
        # An object made anew for each step, as Lightning does: what it holds stays the same.
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
        surroundings: What is known of the closure's modules.
        devices: Where the parameters are.

    Attributes:
        autocast: Dtypes by device type of the autocast regions around, in which closures run.
    """

    def __init__(self, surroundings: Surroundings, devices: Collection[torch.device]) -> None:
        self._surroundings = surroundings
        types = {"cpu", *(d.type for d in devices)}
        self.autocast = {
            t: torch.get_autocast_dtype(t) for t in types if torch.is_autocast_enabled(t)
        }
        self._random = [(d, _random_state(d)) for d in {torch.device("cpu"), *devices}]
        self._before = {s: b.detach().clone() for s, b in surroundings.moving_buffers()}
        self._after: dict[_Slot, Tensor] | None = None
        self._evaluations = 0

    def run(self, closure: Callable[[], Any]) -> Any:
        """Calls the closure once more under the same conditions."""
        self._evaluations += 1
        first = self._evaluations == 1
        if not first:
            self._rewind()
        # An autocast region around caches casts of parameters that have moved since.
        torch.clear_autocast_cache()
        if not (first or self.autocast):
            return closure()
        with ExitStack() as stack:
            for device_type, dtype in self.autocast.items():
                stack.enter_context(torch.autocast(device_type, dtype=dtype))
            if first:
                stack.enter_context(self._surroundings.watch(self._before))
            return closure()

    def _rewind(self) -> None:
        if self._after is None:
            now = {slot: slot.read() for slot in self._before}
            self._after = {s: b.detach().clone() for s, b in now.items() if b is not None}
        for device, state in self._random:
            _set_random_state(device, state)
        for slot, value in self._before.items():
            slot.restore(value)

    def finish(self, *, aborted: bool = False) -> None:
        """Leaves the buffers as one evaluation at the start of the step would have.

        Args:
            aborted: Whether the step came to nothing: the buffers are then as before it.
        """
        for slot, value in (self._before if aborted else self._after or {}).items():
            slot.restore(value)

    def average(self, tensor: Tensor) -> Tensor:
        """See `Surroundings.average`."""
        return self._surroundings.average(tensor)


def _random_state(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    state: Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)
