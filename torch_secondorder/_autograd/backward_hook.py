"""Attributes that stand in the place of others for a time: `Tensor.backward` above all.

`torch.autograd.backward` is below it: `Tensor.backward` goes through it.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeAlias
from weakref import ref

import torch
from torch import Tensor

from torch_secondorder._foundation.private_torch import number_of_function_modes, running_pass

__all__ = ["Listeners", "Substitution", "intercepting"]

#: Takes what `Tensor.backward` takes, the tensor first.
Handler: TypeAlias = Callable[..., None]


class _Handling(NamedTuple):
    handler: Handler
    depth: int  # how many function modes were around when it began


_handlings: ContextVar[tuple[_Handling, ...]] = ContextVar("backward_handlings", default=())


@contextmanager
def intercepting(handler: Handler) -> Iterator[None]:
    """Inside, and in this thread, `loss.backward(...)` is `handler(loss, ...)`.

    The handler goes on by calling `backward` itself: that is the handler around, or PyTorch's own.
    Modes of PyTorch and handlers come to their turn in the order in which they were entered, the
    last one first. Costs nothing an operation, where a `TorchFunctionMode` sees them all.

    Args:
        handler: Takes what `Tensor.backward` takes.

    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> with intercepting(lambda loss: (loss + x).backward()):
    ...     (x * x).backward()
    >>> x.grad
    tensor(7.)
    """
    handling = _Handling(handler, number_of_function_modes())
    token = _handlings.set((*_handlings.get(), handling))
    _method.begin()
    try:
        yield
    finally:
        _method.end()
        _handlings.reset(token)


class Substitution:
    """Another attribute in the place of one, as long as anybody needs it.

    Args:
        owner: What has the attribute, by itself or from a base class.
        name: Its name.
        make: Takes what is there and gives what is to be there instead.
    """

    def __init__(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        self._owner, self._name, self._make = owner, name, make
        self._lock = threading.Lock()
        self._users = 0
        self._original: Any = None

    def begin(self) -> None:
        """Puts it there, unless it is."""
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._original = vars(self._owner).get(self._name, _MISSING)
                found = getattr(self._owner, self._name, None)
                setattr(self._owner, self._name, self._make(found))

    def end(self) -> None:
        """Takes it away with the last user."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                if self._original is _MISSING:
                    delattr(self._owner, self._name)
                else:
                    setattr(self._owner, self._name, self._original)


_MISSING = object()


def _dispatching(original: Callable[..., Any]) -> Callable[..., Any]:
    """A `backward` that asks the handlers of its thread."""

    @functools.wraps(original)
    def backward(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        handlings = _handlings.get()
        if not handlings or _others_first(tensor, handlings[-1].depth):
            original(tensor, *args, **kwargs)
            return
        token = _handlings.set(handlings[:-1])
        try:
            handlings[-1].handler(tensor, *args, **kwargs)
        finally:
            _handlings.reset(token)

    return backward


def _others_first(tensor: Tensor, depth: int) -> bool:
    """True if a mode that was entered later, or the tensor's own class, is to see the call."""
    modes = number_of_function_modes()
    return modes > depth or (modes == 0 and torch.overrides.has_torch_function_unary(tensor))


_method = Substitution(Tensor, "backward", _dispatching)


class Listeners:
    """Objects that see every backward pass of the process for as long as they live and listen.

    While there is one, `torch.autograd.backward`, through which `Tensor.backward` goes as well, is
    a function that asks the handler. Without any it is PyTorch's own. Objects are held weakly. What
    `intercepting` handles without a backward pass is not seen, nor are passes inside others.

    Args:
        handler: Takes the listeners, PyTorch's own function, and what that takes.

    >>> listeners = Listeners(lambda those, own, *args, **kwargs: own(*args, **kwargs))
    >>> before, someone = torch.autograd.backward, set([1])
    >>> listeners.add(someone)
    >>> torch.autograd.backward is before
    False
    >>> del someone
    >>> torch.autograd.backward is before
    True
    """

    def __init__(self, handler: Callable[..., None]) -> None:
        self._handler = handler
        self._lock = threading.RLock()  # a reference may die in here and come back to `discard`
        self._references: dict[int, ref[Any]] = {}
        self._original: Callable[..., Any] | None = None
        self._replacement: Callable[..., Any] | None = None

    def __contains__(self, listener: object) -> bool:
        found = self._references.get(id(listener))
        return found is not None and found() is listener

    def __iter__(self) -> Iterator[Any]:
        with self._lock:
            found = [reference() for reference in self._references.values()]
        return iter([listener for listener in found if listener is not None])

    def add(self, listener: Any) -> None:
        """Lets an object see backward passes from now on."""
        if listener in self:
            return
        key = id(listener)

        def forget(reference: ref[Any], finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
            if finalizing():  # modules may be gone
                return
            with self._lock:
                if self._references.get(key) is reference:
                    del self._references[key]
                    self._update()

        with self._lock:
            self._references[key] = ref(listener, forget)
            self._update()

    def discard(self, listener: Any) -> None:
        """Lets an object see no more of them."""
        if listener in self:
            with self._lock:
                self._references.pop(id(listener), None)
                self._update()

    def _update(self) -> None:
        if self._references and self._replacement is None:
            self._original = torch.autograd.backward
            self._replacement = self._asking(self._original)
            setattr(torch.autograd, "backward", self._replacement)  # noqa: B010
        elif not self._references and self._replacement is not None:
            # Else somebody has wrapped it: what is inside of that lets everything through.
            if torch.autograd.backward is self._replacement:
                setattr(torch.autograd, "backward", self._original)  # noqa: B010
            self._original = self._replacement = None

    def _asking(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def backward(*args: Any, **kwargs: Any) -> None:
            # Inside a pass a part of it is computed anew, as for a checkpoint, by any thread.
            nested = _handling.get() or running_pass() != -1
            listeners = () if nested else tuple(self)
            if not listeners:
                original(*args, **kwargs)
                return
            token = _handling.set(True)
            try:
                self._handler(listeners, original, *args, **kwargs)
            finally:
                _handling.reset(token)

        return backward


_handling: ContextVar[bool] = ContextVar("backward_handled", default=False)
