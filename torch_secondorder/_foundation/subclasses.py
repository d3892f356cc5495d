"""Tensor subclasses: data with labels or metadata, which have a say in every function.

Functions of PyTorch hand subclasses of `Tensor` to their `__torch_function__`, which wraps what
comes out, or refuses; methods may be overridden as well. All that is for the closure. The numbers
that an optimizer computes with are plain tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from torch_secondorder._foundation.private_torch import plainly

_T = TypeVar("_T")
#: The types of plain tensors, and of what else functions of PyTorch often take.
PLAIN_TYPES = frozenset(
    {Tensor, torch.nn.Parameter, torch.nn.Buffer, type(None), bool, int, float, str}
)


def _wraps(value: Any) -> bool:
    """True for a plain tensor with something added in Python."""
    kind: Any = type(value)
    return isinstance(value, Tensor) and kind.__torch_dispatch__ is Tensor.__torch_dispatch__


def plain(value: _T) -> _T:
    """The same numbers as a plain tensor, with the same graph behind it; anything else as it is.

    Subclasses that define what operations do below autograd (`DTensor`, say) are no plain tensors
    with something added, and stay as they are.

    >>> class Labelled(Tensor):
    ...     pass
    >>> type(plain(torch.ones(2).as_subclass(Labelled)))
    <class 'torch.Tensor'>
    """
    if type(value) in PLAIN_TYPES or not _wraps(value):
        return value
    with plainly():
        return cast(_T, Tensor.as_subclass(cast(Tensor, value), Tensor))


def all_plain(tensors: Sequence[Any]) -> Sequence[Any]:
    """The same of several."""
    if PLAIN_TYPES.issuperset(map(type, tensors)):
        return tensors
    return list(map(plain, tensors))


def snapshot(tensor: Tensor) -> Tensor:
    """A copy of the numbers, plain and without a graph."""
    with plainly():
        return Tensor.clone(Tensor.detach(plain(tensor)))


def like(tensor: Tensor, original: Tensor) -> Tensor:
    """A plain tensor made one of another's class, with the attributes that are set on that one."""
    if type(original) in PLAIN_TYPES or not _wraps(original):
        return tensor
    with plainly():
        result = Tensor.as_subclass(tensor, type(original))
    vars(result).update(vars(original))
    return result
