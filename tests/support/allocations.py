"""Counts new vectors: results of operations that have memory of their own."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Counts results of at least `size` elements that share no memory with the arguments.

    Args:
        size: The least number of elements.

    Attributes:
        found: The number of such results by operation.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.found: Counter[str] = Counter()

    @property
    def count(self) -> int:
        return self.found.total()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _is_tensor(t)}
        result = func(*args, **kwargs)
        fresh = {
            t.untyped_storage()._cdata
            for t in tree_leaves(result)
            if _is_tensor(t) and t.numel() >= self.size
        }
        self.found[func.name()] += len(fresh - given)
        return result


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
