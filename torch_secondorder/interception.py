"""Attributes that stand in the place of others for a time: `Tensor.backward` above all."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = ["Substitution", "intercepting"]

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
    handling = _Handling(handler, _modes())
    token = _handlings.set((*_handlings.get(), handling))
    _method.begin()
    try:
        yield
    finally:
        _method.end()
        _handlings.reset(token)


def _modes() -> int:
    return int(torch._C._len_torch_function_stack())


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
    """Whether a mode that was entered later, or the tensor's own class, is to see the call."""
    modes = _modes()
    return modes > depth or (modes == 0 and torch.overrides.has_torch_function_unary(tensor))


_method = Substitution(Tensor, "backward", _dispatching)
