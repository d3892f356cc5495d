"""Temporary replacements of attributes, of `Tensor.backward` above all.

`torch.autograd.backward` is below it: `Tensor.backward` goes through it.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary, WeakSet, finalize, ref

import torch
from torch import Tensor

from torch_secondorder._foundation.private_torch import (
    engine_run_backward,
    innermost_transform,
    number_of_function_modes,
    running_pass,
)

#: Takes what `Tensor.backward` takes, the tensor first.
Handler: TypeAlias = Callable[..., None]


class _Handling(NamedTuple):
    handler: Handler
    depth: int  # the number of function modes around it


_handlings: ContextVar[tuple[_Handling, ...]] = ContextVar("backward_handlings", default=())
# PyTorch's own, unless another package has replaced it already.
_plain_backward: Any = torch.autograd.backward
if getattr(_plain_backward, "__globals__", None) is not vars(torch.autograd):
    _plain_backward = None


class patched_backward:
    """A context inside which, in this thread, `loss.backward(...)` is `handler(loss, ...)`.

    The handler goes on by calling `backward` itself: that is the handler around, or PyTorch's own.
    Modes of PyTorch and handlers come to their turn in the order in which they were entered, the
    last one first. It costs nothing an operation, where a `TorchFunctionMode` sees them all.

    Args:
        handler: Takes what `Tensor.backward` takes.

    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> with patched_backward(lambda loss: (loss + x).backward()):
    ...     (x * x).backward()
    >>> x.grad
    tensor(7.)
    """

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    def __enter__(self) -> None:
        handling = _Handling(self._handler, number_of_function_modes())
        self._token = _handlings.set((*_handlings.get(), handling))
        Patch.begin(_method)
        _method.renew()

    def __exit__(self, *exception: object) -> None:
        Patch.end(_method)
        _handlings.reset(self._token)


def keep_patched(user: object) -> None:
    """Leaves the function behind `patched_backward` in place for as long as an object lives.

    For objects that use it in every step: whenever a class changes, Python forgets what it has
    learned about its attributes, and from Python 3.13 on it learns nothing more about a class that
    has changed a thousand times. Where nobody handles `backward()`, a call takes 0.1 microseconds
    more.

    Args:
        user: The object.
    """
    Patch.keep(user, _method)


def backward_from(values: Tensor, derivative: Tensor, loss: Tensor | None = None) -> None:
    """A backward pass from values with a derivative by them, and from a loss, to the leaves.

    It is `torch.autograd.backward` without the checks that gradients given cost there, which take
    as long as eight operations.

    Args:
        values: A plain tensor.
        derivative: One of the same shape, dtype and device.
        loss: A plain tensor.
    """
    outputs = (values,) if loss is None else (loss, values)
    # Not if somebody wants to see the call, or PyTorch is to refuse it.
    directly = torch.autograd.backward is _plain_backward and innermost_transform() is None
    if not directly or (loss is not None and (loss.dim() or not loss.is_floating_point())):
        seeds = (derivative,) if loss is None else (None, derivative)
        torch.autograd.backward(outputs, seeds)
        return
    grads = (derivative,) if loss is None else (torch.ones_like(loss), derivative)
    engine_run_backward(
        outputs, grads, False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def is_outermost() -> bool:
    """True inside a handler if nobody else waits for its call of `backward()`."""
    return not _handlings.get() and number_of_function_modes() == 0


class Patch:
    """A replacement for an attribute, in place as long as somebody needs it.

    Args:
        owner: The object that has the attribute, by itself or from a base class.
        name: The attribute's name.
        make: Takes the original and returns the replacement.
    """

    # A user may die in here and come back to `end`.
    _lock = threading.RLock()

    def __init__(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        self._owner, self._name, self._make = owner, name, make
        self._users = 0
        # The last replacement, with the attribute that it was made from.
        self._made_from: Any = _MISSING
        self._made: Any = None
        # What to put back for each: who has wrapped one may put it in place again at any time.
        self._originals: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    @staticmethod
    def begin(*patches: Patch) -> None:
        """Puts replacements in place, unless they are."""
        with Patch._lock:
            for patch in patches:
                patch._users += 1
                if patch._users == 1:
                    patch._put()

    @staticmethod
    def end(*patches: Patch) -> None:
        """Takes replacements away again, each with its last user."""
        with Patch._lock:
            for patch in patches:
                patch._users -= 1
                if patch._users == 0:
                    patch._take_away()

    @staticmethod
    def keep(user: object, *patches: Patch) -> None:
        """Leaves replacements in place for as long as an object lives."""
        Patch.begin(*patches)
        finalize(user, Patch.end, *patches).atexit = False

    def renew(self) -> None:
        """Puts the replacement in place again if somebody has replaced it since."""
        if vars(self._owner).get(self._name) is not self._made:
            with Patch._lock:
                self._put()

    def _put(self) -> None:
        own = vars(self._owner).get(self._name, _MISSING)
        if _function(own) in self._originals:
            return
        found = getattr(self._owner, self._name, None)
        if found != self._made_from:
            self._made_from, self._made = found, self._make(found)
        self._originals[_function(self._made)] = own
        setattr(self._owner, self._name, self._made)

    def _take_away(self) -> None:
        own = vars(self._owner).get(self._name, _MISSING)
        if _function(own) not in self._originals:
            return  # somebody has wrapped it, and it lets everything through
        original = self._originals[_function(own)]
        if original is _MISSING:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, original)


def _function(attribute: Any) -> Any:
    """The function in a class method, which has no weak references itself; all else as it is."""
    return getattr(attribute, "__func__", attribute)


_MISSING = object()


def _dispatching(original: Callable[..., Any]) -> Callable[..., Any]:
    """A `backward` that asks the handlers of its thread."""

    @functools.wraps(original)
    def backward(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        handlings = _handlings.get()
        if not handlings:
            original(tensor, *args, **kwargs)
            return
        modes = number_of_function_modes()
        # A mode that was entered later, or the tensor's own class, is to see the call first.
        if modes > handlings[-1].depth or (
            modes == 0 and torch.overrides.has_torch_function_unary(tensor)
        ):
            original(tensor, *args, **kwargs)
            return
        token = _handlings.set(handlings[:-1])
        try:
            handlings[-1].handler(tensor, *args, **kwargs)
        finally:
            _handlings.reset(token)

    return backward


_method = Patch(Tensor, "backward", _dispatching)


class BackwardListeners:
    """Objects that see every backward pass of the process for as long as they live and listen.

    While there is one, `torch.autograd.backward`, through which `Tensor.backward` goes as well, is
    a function that asks the handler. Without any it is PyTorch's own. Objects are held weakly.
    Calls that `patched_backward` handles without a backward pass are not seen, nor are passes
    inside others.

    Args:
        handler: Takes the listeners, PyTorch's own function, and what that takes.

    >>> listeners = BackwardListeners(lambda those, own, *args, **kwargs: own(*args, **kwargs))
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
        # The last replacement, and all: who has wrapped one may put it back at any time.
        self._replacement: Any = None
        self._replacements: WeakSet[Callable[..., Any]] = WeakSet()
        self._listens = False

    def __contains__(self, listener: object) -> bool:
        found = self._references.get(id(listener))
        return found is not None and found() is listener

    def __iter__(self) -> Iterator[Any]:
        with self._lock:
            found = [reference() for reference in self._references.values()]
        return iter([listener for listener in found if listener is not None])

    def add(self, listener: Any) -> None:
        """Lets an object see backward passes from now on."""
        key = id(listener)
        known = self._references.get(key)
        if known is not None and known() is listener:
            return

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
        known = self._references.get(id(listener))
        if known is not None and known() is listener:
            with self._lock:
                self._references.pop(id(listener), None)
                self._update()

    def _update(self) -> None:
        if bool(self._references) is self._listens:
            return
        self._listens = not self._listens
        found: Any = torch.autograd.backward
        asks = found in self._replacements
        if self._listens and not asks:
            if self._replacement is None or self._replacement.__wrapped__ is not found:
                self._replacement = self._asking(found)
                self._replacements.add(self._replacement)
            setattr(torch.autograd, "backward", self._replacement)  # noqa: B010
        elif asks and not self._listens:
            # Else somebody has wrapped it, and the function inside lets everything through.
            setattr(torch.autograd, "backward", found.__wrapped__)  # noqa: B010

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
