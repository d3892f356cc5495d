"""Forward passes that can be differentiated twice.

Some of PyTorch's kernels have no second derivative, others a wasteful one. This module changes what
is needed while a function runs whose derivatives will be differentiated again: switches between
kernels, which cost nothing an operation, and replacements of operations, for modes that see every
operation anyway.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from operator import attrgetter
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.backends import cuda, mha
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_secondorder._autograd.backward_hook import Patch
from torch_secondorder._autograd.convolution import CONVOLUTIONS, convolution
from torch_secondorder._autograd.weight_norm import WEIGHT_NORM, weight_norm
from torch_secondorder._foundation.private_torch import (
    WEIGHT_NORM_HOLDERS,
    WEIGHT_NORM_NAME,
    enable_overrideable_attention,
    overrideable_attention_enabled,
)

#: Operations, and what a mode is to call with the same arguments in their place. The second
#: derivatives of convolutions are right, and these are faster; weight norm's is wrong.
REPLACEMENTS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    WEIGHT_NORM: weight_norm,
    **{func: partial(convolution, func) for func in CONVOLUTIONS},
}


def twice_differentiable() -> AbstractContextManager[Any]:
    """A context for forward passes whose derivatives are differentiated again.

    Scaled dot-product attention runs on its math backend, the only one that has a second derivative
    and a forward mode; the attention layers of `torch.nn` leave out the fused forward pass that
    they have for evaluation, for it has no derivatives. `nn.RNN`, `nn.LSTM` and `nn.GRU` run on
    PyTorch's own kernels, for those of cuDNN have no second derivative. Weight normalization is
    done by operations whose second derivatives are right. What was set before is set again in the
    end. The switches are those of the process: other threads get the same kernels meanwhile.
    Contexts may be nested, inside transforms of `torch.func` and `torch.compile` too, and those of
    several threads may overlap.

    >>> q = torch.ones(1, 1, 2, 3, requires_grad=True)
    >>> with twice_differentiable():
    ...     y = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    >>> (g,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
    >>> torch.autograd.grad(g.sum(), q)[0].shape
    torch.Size([1, 1, 2, 3])
    """
    if torch.compiler.is_compiling():  # which knows this one
        return sdpa_kernel(SDPBackend.MATH)
    return _switches


def with_second_derivatives(f: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, called within `twice_differentiable`."""

    def called(*args: Any, **kwargs: Any) -> Any:
        with twice_differentiable():
            return f(*args, **kwargs)

    return called


# Attention's backends: math, flash, memory-efficient, cuDNN, of another package; then the fused
# forward pass of layers. `sdpa_kernel` sets the same, and takes five times as long: too much beside
# a small Jacobian.
_State: TypeAlias = tuple[bool, bool, bool, bool, bool, bool]
_DIFFERENTIABLE: _State = (True, False, False, False, False, False)


def _write(state: _State) -> None:
    math, flash, efficient, cudnn, overrideable, fused = state
    cuda.enable_math_sdp(math)
    cuda.enable_flash_sdp(flash)
    cuda.enable_mem_efficient_sdp(efficient)
    cuda.enable_cudnn_sdp(cudnn)
    enable_overrideable_attention(overrideable)
    mha.set_fastpath_enabled(fused)


class _Switches:
    """The context of `twice_differentiable`, one object for all.

    Those of one thread end in the reverse order; those of several threads may not, and none may
    take away what another one still needs. So each that ends takes back the newest change: in one
    thread that is its own, and in several the last to leave takes back the first.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._before: list[_State] = []
        self._patches: Sequence[Patch] = ()
        self._weight_norms: list[Any] = []

    def __enter__(self) -> None:
        with self._lock:
            if not self._before:
                # Assignments alone: this is done around each small Jacobian.
                self._weight_norms = list(map(_weight_norm_in, WEIGHT_NORM_HOLDERS))
                for holder in WEIGHT_NORM_HOLDERS:
                    setattr(holder, WEIGHT_NORM_NAME, weight_norm)
                if torch.cuda.is_initialized():
                    self._patches = _recurrent
                    Patch.begin(*_recurrent)
            self._before.append(
                (
                    cuda.math_sdp_enabled(),
                    cuda.flash_sdp_enabled(),
                    cuda.mem_efficient_sdp_enabled(),
                    cuda.cudnn_sdp_enabled(),
                    overrideable_attention_enabled(),
                    mha.get_fastpath_enabled(),
                )
            )
            _write(_DIFFERENTIABLE)

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            _write(self._before.pop())
            if not self._before:
                for holder, original in zip(WEIGHT_NORM_HOLDERS, self._weight_norms, strict=True):
                    setattr(holder, WEIGHT_NORM_NAME, original)
                if self._patches:
                    Patch.end(*self._patches)
                    self._patches = ()


_weight_norm_in = attrgetter(WEIGHT_NORM_NAME)
_switches = _Switches()


def _without_cudnn(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The `forward` of a recurrent layer on PyTorch's own kernels.

    All of cuDNN's other kernels, convolutions above all, can be differentiated twice.
    """

    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        cudnn = torch.backends.cudnn
        if not cudnn.enabled:
            return forward(*args, **kwargs)
        # `cudnn.flags` would set all other flags as well.
        cudnn.enabled = False
        try:
            return forward(*args, **kwargs)
        finally:
            cudnn.enabled = True

    return wrapper


_recurrent = [Patch(kind, "forward", _without_cudnn) for kind in (nn.RNN, nn.LSTM, nn.GRU)]
