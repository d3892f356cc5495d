"""Attention and recurrent layers in an implementation that can be differentiated twice."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["twice_differentiable"]

#: The layers that run on cuDNN as a whole.
_RECURRENT: tuple[type[nn.Module], ...] = (nn.RNN, nn.LSTM, nn.GRU)

_wanted: ContextVar[bool] = ContextVar("twice_differentiable", default=False)


@contextmanager
def twice_differentiable(tensors: Iterable[Tensor]) -> Iterator[None]:
    """What runs forward inside, and in this thread, has second derivatives where PyTorch has any.

    Scaled dot-product attention runs on its math backend, the only one with a second derivative;
    `nn.RNN`, `nn.LSTM` and `nn.GRU` run on PyTorch's own kernels, for those of cuDNN have none.
    Everything else (convolutions, which cuDNN differentiates twice) and all other settings of cuDNN
    stay as they are. Does nothing inside `torch.compile`.

    Args:
        tensors: What is differentiated by: recurrent layers are seen to where one is on a device.

    >>> with twice_differentiable([]):
    ...     y = nn.functional.scaled_dot_product_attention(*torch.ones(3, 1, 2, 2))
    """
    if torch.compiler.is_compiling():
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        if not any(t.is_cuda for t in tensors):
            yield
            return
        token = _wanted.set(True)
        _forwards.begin()
        try:
            yield
        finally:
            _forwards.end()
            _wanted.reset(token)


class _Forwards:
    """The `forward` methods that are there instead, as long as anybody needs them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._originals: dict[type[nn.Module], Callable[..., Any]] = {}

    def begin(self) -> None:
        """Puts them there, unless they are."""
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._originals = {kind: kind.forward for kind in _RECURRENT}
                for kind, forward in self._originals.items():
                    setattr(kind, "forward", _without_cudnn(forward))  # noqa: B010

    def end(self) -> None:
        """Takes them away with the last user."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                for kind, forward in self._originals.items():
                    setattr(kind, "forward", forward)  # noqa: B010


def _without_cudnn(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        cudnn = torch.backends.cudnn
        if not (_wanted.get() and cudnn.enabled):
            return forward(*args, **kwargs)
        # `cudnn.flags` would set all other flags as well.
        cudnn.enabled = False
        try:
            return forward(*args, **kwargs)
        finally:
            cudnn.enabled = True

    return wrapper


_forwards = _Forwards()
